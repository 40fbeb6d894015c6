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
        writer::{Stats, Writer},
    },
    label::Labelled,
    stage::{Reason, StageName},
};

/// Most events of one commit.
const GROUP_MAX: usize = 256;
/// Idle or not, the loop turns at least this often.
const TURN: Duration = Duration::from_millis(500);
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
    /// A stream's state has changed.
    fn changed(&self, change: &StateChange);
    /// The loop has turned; `writable` is whether the last append worked.
    fn turned(&self, writable: bool);
}

/// Turns labels into committed events.
pub struct Publisher {
    journal: Writer,
    context: Context,
    watch: Arc<dyn Watch>,
    /// Frames that ended since the last one published, by stream.
    carried: HashMap<String, Skipped>,
    /// The state told last, by stream.
    states: HashMap<String, &'static str>,
    /// Events that must not be lost, and come first once the journal takes events again.
    held: Vec<Event>,
    /// When the trouble with the journal was logged last. `None` iff there is none.
    said: Option<Instant>,
}

/// The events of the next commit, and the frames that they are about.
#[derive(Default)]
struct Group {
    events: Vec<Event>,
    frames: Vec<(Meta, Instant)>,
}

impl Publisher {
    /// A publisher into `journal`.
    pub fn new(journal: Writer, context: Context, watch: Arc<dyn Watch>) -> Publisher {
        Publisher {
            journal,
            context,
            watch,
            carried: HashMap::new(),
            states: HashMap::new(),
            held: Vec::new(),
            said: None,
        }
    }

    /// Publishes until postprocess is gone. Says in the journal when it starts and stops.
    ///
    /// # Errors
    /// The journal failed in a way that forbids to go on.
    pub fn run(mut self, input: Receiver<Item<Labelled>>) -> anyhow::Result<()> {
        let mut group = Group::default();
        group.events.push(self.daemon(DaemonState::Started));
        self.commit(&mut group)?;
        loop {
            let item = match input.recv_deadline(Instant::now() + TURN) {
                Ok(item) => item,
                Err(RecvTimeoutError::Timeout) => {
                    self.idle(&mut group)?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            };
            self.add(&mut group, item);
            while group.events.len() < GROUP_MAX
                && let Some(item) = input.try_recv()
            {
                self.add(&mut group, item);
            }
            self.commit(&mut group)?;
        }
        group.events.push(self.daemon(DaemonState::Stopped));
        self.commit(&mut group)
    }

    fn daemon(&self, state: DaemonState) -> Event {
        Event::daemon(&self.context.instance, state, None)
    }

    /// What is due without events: retention, and another try with what is held back.
    fn idle(&mut self, group: &mut Group) -> anyhow::Result<()> {
        match self.journal.maintain() {
            Ok(_) => {}
            Err(error) if error.is_temporary() => self.say(&error),
            Err(error) => return Err(error.into()),
        }
        if !self.held.is_empty() {
            return self.commit(group);
        }
        self.watch.turned(self.said.is_none());
        Ok(())
    }

    /// Puts what an item says into the group, or into the account of its stream.
    fn add(&mut self, group: &mut Group, item: Item<Labelled>) {
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
                group.events.push(Event::state(&self.context.instance, &change, previous));
            }
            Item::Frame(Labelled { mut meta, top, batch_size, labelled }) => {
                let carried = self.carried.remove(&meta.stream.id);
                meta.skipped.merge(carried.unwrap_or_default());
                group.events.push(Event::frame(&meta, batch_size, &top, &self.context, labelled));
                group.frames.push((meta, labelled));
            }
        }
    }

    /// Appends the group, after what is held back. A journal that takes nothing for now costs the
    /// frames, never the changes of state.
    fn commit(&mut self, group: &mut Group) -> anyhow::Result<()> {
        let Group { events, frames } = std::mem::take(group);
        let held = self.held.len();
        self.held.extend(events);
        let start = Instant::now();
        match self.journal.append(&mut self.held) {
            Ok(_) => {
                let now = Instant::now();
                self.said = None;
                for (mut meta, labelled) in frames {
                    self.watch.published(&meta, labelled, now);
                    meta.stream.published();
                }
                if start < now {
                    self.watch.committed(now - start, self.journal.stats());
                }
            }
            Err(error) if error.is_temporary() => {
                self.say(&error);
                self.watch.lost(frames.len());
                self.hold_back(held);
                for (meta, _) in frames {
                    self.drop_frame(meta);
                }
            }
            Err(error) => {
                for (meta, _) in frames {
                    self.drop_frame(meta);
                }
                return Err(error.into());
            }
        }
        self.watch.turned(self.said.is_none());
        Ok(())
    }

    /// Keeps the changes of state among the events that were refused, `held` of which were held
    /// back before.
    fn hold_back(&mut self, held: usize) {
        let mut index = 0;
        self.held.retain(|it| {
            index += 1;
            index <= held || it.kind != crate::event::Kind::FrameClassified
        });
        if HELD_MAX < self.held.len() {
            let excess = self.held.len() - HELD_MAX;
            self.watch.lost(excess);
            self.held.drain(..excess);
        }
    }

    fn drop_frame(&mut self, mut meta: Meta) {
        meta.stream.dropped(StageName::Journal, Reason::Journal);
        let carried = self.carried.entry(meta.stream.id.clone()).or_default();
        carried.merge(meta.skipped);
        carried.add(Reason::Journal);
    }

    fn say(&mut self, error: &JournalError) {
        let now = Instant::now();
        if self.said.is_none_or(|it| SAY_EVERY <= now - it) {
            tracing::error!(%error, "events are lost until the journal takes them again");
            self.said = Some(now);
        }
    }
}
