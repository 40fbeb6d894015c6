//! The sinks of a running daemon: started, changed by a reload, stopped.
//!
//! A sink is known by its name, and so is its place in the journal: a sink that is changed, or taken
//! out and put in again, goes on where it was.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    cli::text::Clock,
    config::{
        diff::Changes,
        plan::{Plan, SinkPlan},
    },
    edge::{self, NotSent},
    journal::{
        cursor::Cursor,
        read::Reader,
        retain::{Ages, Retain},
        writer::Writer,
    },
    observe::Observer,
    publish::Order,
    sink::{
        Sink, Sinks, deliver,
        progress::Progress,
        settings::{Select, Target},
    },
};

/// How the terminal is called among the sinks. No configured sink can have this name.
const TERMINAL: &str = "--print";

/// Orders that wait for the journal at most; more wait here.
const ORDERS: usize = 64;

/// The sinks, and what the journal has still to be told about them.
pub(super) struct Outlets {
    sinks: Sinks,
    /// Every configured sink that has run, whether it still does or not.
    known: HashMap<String, Arc<Progress>>,
    /// Sinks that start with the next tick, or once what runs under their name has ended.
    waiting: BTreeMap<String, SinkPlan>,
    /// Not taken by the journal yet.
    orders: VecDeque<Order>,
    to_journal: edge::Sender<Order>,
    observer: Arc<Observer>,
    /// How old the journal's events are.
    ages: Arc<Ages>,
}

impl Outlets {
    /// Starts those that are configured, with a cursor in the journal, and the terminal, which only
    /// shows what happens from now on. Gives what the journal's stage is to follow.
    pub(super) fn start(
        plan: &Plan,
        print: bool,
        journal: &mut Writer,
        observer: &Arc<Observer>,
    ) -> anyhow::Result<(Outlets, edge::Receiver<Order>)> {
        let (mut sinks, mut known) = (Vec::new(), HashMap::new());
        if print {
            let cursor = Cursor::new(TERMINAL, journal.stats().next - 1).beside(journal.ages());
            sinks.push(Sink {
                target: Target::Text(Clock::Local),
                select: Select::default(),
                progress: Progress::new(Arc::new(cursor)),
            });
        }
        for it in &plan.sinks {
            let progress = Progress::new(journal.cursor(&it.name)?);
            known.insert(it.name.clone(), progress.clone());
            sinks.push(Sink { target: it.target.clone(), select: it.select.clone(), progress });
        }
        sinks.iter().for_each(|it| observer.add_sink(&it.progress));
        let watch: Arc<dyn deliver::Watch> = observer.clone();
        let sinks = Sinks::start(sinks, &plan.journal.path, &plan.instance, &watch)?;
        let (to_journal, orders_rx) = edge::edge(ORDERS);
        let it = Outlets {
            sinks,
            known,
            waiting: BTreeMap::new(),
            orders: VecDeque::new(),
            to_journal,
            observer: observer.clone(),
            ages: journal.ages(),
        };
        Ok((it, orders_rx))
    }

    /// How much the journal keeps from now on.
    pub(super) fn retain(&mut self, retain: Retain) {
        self.orders.push_back(Order::Retain(retain));
    }

    /// Stops what is gone or changed, and starts what is new or changed once it can. What is the
    /// same is not touched.
    pub(super) fn apply(&mut self, changes: &Changes, plan: &Plan) {
        for name in changes.removed.iter().chain(&changes.changed) {
            self.waiting.remove(name);
            self.sinks.remove(name);
        }
        for name in changes.changed.iter().chain(&changes.added) {
            let mine = plan.sinks.iter().find(|it| it.name == *name);
            let mine = mine.expect("a changed or added sink is in the new plan");
            self.waiting.insert(name.clone(), mine.clone());
        }
    }

    /// Forgets sinks that have ended and starts those that wait for it. Gives the names of those
    /// that could not be started; why is in the log.
    pub(super) fn tick(&mut self, plan: &Plan) -> Vec<String> {
        for (name, ended) in self.sinks.left() {
            if let Err(error) = ended {
                tracing::error!(sink = name, "failed as it was stopped: {error:#}");
            }
            if !self.waiting.contains_key(&name) {
                tracing::info!(sink = name, "was taken out");
                self.observer.remove_sink(&name);
                self.orders.push_back(Order::Release(name));
            }
        }
        let mut failed = Vec::new();
        let can_start = |it: &&String| !self.sinks.has(it);
        let ready: Vec<_> = self.waiting.keys().filter(can_start).cloned().collect();
        for name in ready {
            let sink = self.waiting.remove(&name).expect("the key was just seen");
            if let Err(error) = self.add(sink, plan) {
                tracing::error!(sink = name, "cannot be started: {error:#}");
                self.observer.remove_sink(&name);
                failed.push(name);
            }
        }
        self.tell_journal();
        failed
    }

    fn add(&mut self, sink: SinkPlan, plan: &Plan) -> anyhow::Result<()> {
        let SinkPlan { name, target, select } = sink;
        let progress = match self.known.get(&name) {
            Some(it) => it.clone(),
            None => Progress::new(Arc::new(place(plan, &name)?.beside(self.ages.clone()))),
        };
        // Before it runs, so that no acknowledgement is without its series.
        self.observer.remove_sink(&name);
        self.observer.add_sink(&progress);
        self.orders.push_back(Order::Follow(progress.cursor.clone()));
        self.known.insert(name, progress.clone());
        self.sinks.add(Sink { target, select, progress })
    }

    /// Hands over as many orders as the journal's stage takes; never waits for it.
    fn tell_journal(&mut self) {
        while let Some(order) = self.orders.pop_front() {
            match self.to_journal.try_send(order) {
                Ok(()) => {}
                Err(NotSent::Full(order)) => return self.orders.push_front(order),
                // Why it has ended is told elsewhere.
                Err(NotSent::Closed(_)) => return,
            }
        }
    }

    /// A sink that ended though nobody told it to.
    pub(super) fn ended(&self) -> Option<&str> {
        self.sinks.ended()
    }

    /// Lets the sinks deliver what is committed, until `deadline`.
    pub(super) fn stop(self, deadline: Instant) -> anyhow::Result<()> {
        self.sinks.stop(deadline)
    }

    /// As [`Outlets::stop`], but everything up to the event `last` must be delivered: a broker that
    /// is away is waited for.
    ///
    /// # Errors
    /// Also which sinks are behind, and how far.
    pub(super) fn finish(self, last: u64, deadline: Instant) -> anyhow::Result<()> {
        let all: Vec<Arc<Progress>> =
            self.known.values().filter(|it| self.sinks.has(it.cursor.sink())).cloned().collect();
        // What a sink needs to end in order is kept back.
        let patience = deadline - deliver::GRACE - Duration::from_millis(500);
        while all.iter().any(|it| it.cursor.get() < last)
            && self.sinks.ended().is_none()
            && Instant::now() < patience
        {
            thread::sleep(Duration::from_millis(20));
        }
        let ended = self.stop(deadline);
        let mut late: Vec<String> = all.iter().filter_map(|it| behind(it, last)).collect();
        if late.is_empty() {
            return ended;
        }
        late.sort();
        let what =
            format!("{}; they are kept in the journal and sent at the next run", late.join(", "));
        Err(match ended {
            Ok(()) => anyhow::anyhow!(what),
            Err(error) => error.context(what),
        })
    }
}

/// What a sink has still to deliver, in words.
fn behind(sink: &Progress, last: u64) -> Option<String> {
    let count = last.checked_sub(sink.cursor.get()).filter(|it| 0 < *it)?;
    let events = if count == 1 { "event" } else { "events" };
    Some(format!("sink {} is {count} {events} behind", sink.cursor.sink()))
}

/// Where a sink begins that has not run in this process: where it was the last time, or after
/// everything that is there.
fn place(plan: &Plan, name: &str) -> anyhow::Result<Cursor> {
    let reader = Reader::open(&plan.journal.path)?;
    let latest = reader.latest()?;
    Ok(Cursor::new(name, reader.cursor(name)?.map_or(latest, |it| it.min(latest))))
}
