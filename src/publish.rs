//! The last stage: from labels to committed events, with the account of what was skipped between.
//!
//! Events are committed in groups: as soon as one commit has returned, everything that came in the
//! meantime is the next. An idle stream's event so waits for nothing, and a busy daemon shares the
//! cost of a commit between hundreds of events.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::RecvTimeoutError;

use crate::{
    edge::Receiver,
    event::{Context, DaemonState, Event},
    frame::{Item, Meta, Skipped, StateChange},
    journal::{
        JournalError,
        cursor::Cursor,
        retain::Retain,
        writer::{Stats, Writer},
    },
    label::Labelled,
    pulse::{Pulse, TURN},
    stage::{Reason, StageName},
};

/// Most events of one commit.
const GROUP_MAX: usize = 256;
/// Retention looks at the journal this often.
const MAINTAIN_EVERY: Duration = Duration::from_secs(1);
/// State events that wait for a journal with no space. Streams change state a few times a minute.
const HELD_MAX: usize = 10_000;
/// How often the same trouble with the journal is logged.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What the stage tells about itself.
pub trait Watch: Send + Sync {
    /// A frame's event was committed.
    fn published(&self, meta: &Meta, labelled: Instant, committed: Instant);
    /// A commit took this long; how the journal stands after it.
    fn committed(&self, took: Duration, stats: Stats);
    /// Events could not be appended.
    fn lost(&self, events: usize);
    /// Events are gone with a journal that was damaged or removed; 0 if nobody knows how many.
    fn gone(&self, events: u64);
    /// A stream's state has changed.
    fn changed(&self, change: &StateChange);
    /// Whether the last append worked.
    fn writable(&self, writable: bool);
}

/// What is to change about the journal while the stage runs.
#[derive(Debug)]
pub enum Order {
    /// How much is kept from now on.
    Retain(Retain),
    /// A sink has come: its place is saved.
    Follow(Arc<Cursor>),
    /// A sink has ended and does not come again for now.
    Release(String),
}

/// Turns labels into committed events.
pub struct Publisher {
    journal: Writer,
    orders: Receiver<Order>,
    /// An order that the journal could not carry out yet.
    open: Option<Order>,
    context: Context,
    /// No event waits longer for the next commit, however many more come.
    commit_every: Duration,
    watch: Arc<dyn Watch>,
    /// Frames that ended since the last one published, by stream.
    carried: HashMap<String, Skipped>,
    /// The state told last, by stream.
    states: HashMap<String, &'static str>,
    /// The events of the next commit; after a refused one, the changes of state that wait.
    group: Vec<Entry>,
    /// When retention had nothing left to do.
    maintained: Instant,
    /// When the trouble with the journal was logged last. `None` iff there is none.
    said: Option<Instant>,
}

/// One event of the next commit, in order.
enum Entry {
    Daemon(Event),
    /// Rendered only when it is appended: frames that the journal refuses before it are part of
    /// the account that it closes.
    State(Box<StateChange>, Option<&'static str>),
    Frame(Event, Box<Meta>, Instant),
}

impl Publisher {
    /// A publisher into `journal`, which carries out `orders` between commits.
    pub fn new(
        (journal, orders): (Writer, Receiver<Order>),
        context: Context,
        commit_every: Duration,
        watch: Arc<dyn Watch>,
    ) -> Publisher {
        Publisher {
            journal,
            orders,
            open: None,
            context,
            commit_every,
            watch,
            carried: HashMap::new(),
            states: HashMap::new(),
            group: Vec::new(),
            maintained: Instant::now(),
            said: None,
        }
    }

    /// Publishes until postprocess is gone. Says in the journal when it starts and stops. Gives the
    /// journal back, for what is still to be noted in it.
    ///
    /// # Errors
    /// The journal failed in a way that forbids to go on.
    pub fn run(mut self, input: Receiver<Item<Labelled>>, pulse: &Pulse) -> anyhow::Result<Writer> {
        if let Some(loss) = self.journal.take_loss() {
            self.watch.gone(loss.count());
            self.group.push(Entry::Daemon(loss.event(&self.context.instance)));
        }
        self.daemon(DaemonState::Started);
        self.commit()?;
        loop {
            pulse.beat();
            self.obey()?;
            match input.recv_deadline(Instant::now() + TURN) {
                Ok(item) => self.add(item),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let end = Instant::now() + self.commit_every;
            while self.group.len() < GROUP_MAX
                && Instant::now() < end
                && let Some(item) = input.try_recv()
            {
                self.add(item);
            }
            self.commit()?;
            self.maintain()?;
        }
        self.obey()?;
        self.daemon(DaemonState::Stopped);
        self.commit()?;
        anyhow::ensure!(
            self.group.is_empty(),
            "{} last events could not be written to the journal",
            self.group.len()
        );
        Ok(self.journal)
    }

    fn daemon(&mut self, state: DaemonState) {
        let event = Event::daemon(&self.context.instance, state, None);
        self.group.push(Entry::Daemon(event));
    }

    /// Carries out what was ordered. What the journal cannot do for now is tried again.
    fn obey(&mut self) -> anyhow::Result<()> {
        while let Some(order) = self.open.take().or_else(|| self.orders.try_recv()) {
            match order {
                Order::Retain(retain) => self.journal.set_retain(retain),
                Order::Follow(cursor) => self.journal.follow(cursor),
                Order::Release(sink) => match self.journal.release(&sink) {
                    Ok(()) => {}
                    Err(error) if error.is_temporary() => {
                        self.open = Some(Order::Release(sink));
                        self.say(&error);
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                },
            }
        }
        Ok(())
    }

    /// Retention, a piece at a time, busy or idle.
    fn maintain(&mut self) -> anyhow::Result<()> {
        if self.maintained.elapsed() < MAINTAIN_EVERY {
            return Ok(());
        }
        match self.journal.maintain() {
            // More is due at once, that is after the next commit.
            Ok(true) => {}
            Ok(false) => {
                self.maintained = Instant::now();
                self.warn_of_losses();
            }
            Err(error) if error.is_temporary() => self.say(&error),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Tells of the sinks that will lose events to retention, while something can be done.
    fn warn_of_losses(&mut self) {
        for cursor in self.journal.newly_at_risk() {
            let behind = self.journal.stats().next - 1 - cursor.get();
            let detail = format!(
                "sink {} has still to deliver {behind} events; retention will soon remove the first",
                cursor.sink()
            );
            tracing::error!(
                sink = cursor.sink(),
                behind,
                "retention will soon remove events that this sink has not delivered"
            );
            let (instance, state) = (&self.context.instance, DaemonState::SinkAtRisk);
            self.group.push(Entry::Daemon(Event::daemon(instance, state, Some(&detail))));
        }
    }

    /// Puts what an item says into the group, or into the account of its stream.
    fn add(&mut self, item: Item<Labelled>) {
        match item {
            Item::Dropped(meta, reason) => {
                let carried = self.carried.entry(meta.stream.id.clone()).or_default();
                carried.merge(meta.skipped);
                carried.add(reason);
            }
            Item::State(mut change) => {
                if let Some(ended) = &mut change.ended {
                    let carried = self.carried.remove(&change.stream.id);
                    ended.skipped.merge(carried.unwrap_or_default());
                }
                self.watch.changed(&change);
                let previous = self.states.insert(change.stream.id.clone(), change.state.name());
                self.group.push(Entry::State(change, previous));
            }
            Item::Frame(Labelled { mut meta, top, batch_size, labelled }) => {
                let carried = self.carried.remove(&meta.stream.id);
                meta.skipped.merge(carried.unwrap_or_default());
                let event = Event::frame(&meta, batch_size, &top, &self.context, labelled);
                self.group.push(Entry::Frame(event, Box::new(meta), labelled));
            }
        }
    }

    /// Appends the group. A journal that takes nothing for now costs the frames, never the changes
    /// of state: those stay in the group.
    fn commit(&mut self) -> anyhow::Result<()> {
        if self.group.is_empty() {
            self.watch.writable(self.said.is_none());
            return Ok(());
        }
        let instance = &self.context.instance;
        let render = |it: &Entry| match it {
            Entry::Daemon(event) | Entry::Frame(event, ..) => event.clone(),
            Entry::State(change, previous) => Event::state(instance, change, *previous),
        };
        let mut events: Vec<Event> = self.group.iter().map(render).collect();
        let start = Instant::now();
        match self.journal.append(&mut events) {
            Ok(_) => {
                self.said = None;
                self.committed(start);
            }
            Err(error) => {
                self.refused();
                if !error.is_temporary() {
                    return Err(error.into());
                }
                self.say(&error);
            }
        }
        self.watch.writable(self.said.is_none());
        Ok(())
    }

    /// Everything in the group is on the disk.
    fn committed(&mut self, start: Instant) {
        let now = Instant::now();
        for entry in self.group.drain(..) {
            match entry {
                Entry::Daemon(_) => {}
                Entry::State(change, _) => change.stream.state_published(),
                Entry::Frame(_, mut meta, labelled) => {
                    self.watch.published(&meta, labelled, now);
                    meta.stream.published();
                }
            }
        }
        self.watch.committed(now - start, self.journal.stats());
    }

    /// Nothing of the group is on the disk: its frames are dropped, and whatever event of their
    /// stream comes next accounts for them.
    fn refused(&mut self) {
        let mut lost = 0;
        let mut carried = HashMap::<String, Skipped>::new();
        for entry in std::mem::take(&mut self.group) {
            match entry {
                Entry::Daemon(event) => self.group.push(Entry::Daemon(event)),
                Entry::State(mut change, previous) => {
                    if let Some(ended) = &mut change.ended {
                        let carry = carried.remove(&change.stream.id);
                        ended.skipped.merge(carry.unwrap_or_default());
                    }
                    self.group.push(Entry::State(change, previous));
                }
                Entry::Frame(_, mut meta, _) => {
                    lost += 1;
                    meta.stream.dropped(StageName::Journal, Reason::Journal);
                    let carry = carried.entry(meta.stream.id.clone()).or_default();
                    carry.merge(meta.skipped);
                    carry.add(Reason::Journal);
                }
            }
        }
        self.watch.lost(lost);
        for (id, skipped) in carried {
            self.carried.entry(id).or_default().merge(skipped);
        }
        // The changes that wait are few; with a broken disk for days they would not stay so.
        if HELD_MAX < self.group.len() {
            let mut excess = self.group.len() - HELD_MAX;
            self.watch.lost(excess);
            self.group.retain(|entry| match entry {
                Entry::State(change, _) if 0 < excess => {
                    excess -= 1;
                    // Nobody waits for it any more; a stream that is taken out could never settle.
                    change.stream.state_published();
                    false
                }
                // Few, and what they tell of the journal is told by nothing else.
                _ => true,
            });
        }
    }

    fn say(&mut self, error: &JournalError) {
        let now = Instant::now();
        if self.said.is_none_or(|it| SAY_EVERY <= now - it) {
            tracing::error!(%error, "events are lost until the journal takes them again");
            self.said = Some(now);
        }
    }
}

#[cfg(test)]
mod tests;
