//! The streams of a running daemon: started, changed by a reload, held back by order, taken out.
//!
//! A stream that is held back keeps its place in the metrics and the table of streams; only its
//! source has ended. One that is opened again is a new [`Stream`] under the same name, which starts
//! once nothing of the old one is on its way to the journal.

mod orders;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

use crate::{
    config::{
        diff::Changes,
        plan::{Plan, StreamPlan},
    },
    crash,
    daemon::{
        holds::{Hold, Holds, Why, noted},
        mute::{self, left_before},
    },
    frame::{Code, State},
    journal::{JournalError, read::Reader},
    ledger::Stream,
    observe::Observer,
    pipeline::{Exit, Pipeline},
    source::{self, SourceError, gate::Gate, gst::GstOpener, quiet::Quiet, supervise::Leave},
};

/// What streams are started in.
pub(super) struct World<'a> {
    pub(super) pipeline: &'a mut Pipeline,
    pub(super) observer: &'a Arc<Observer>,
    pub(super) plan: &'a Plan,
}

/// A stream that was started, whether its source has ended since or not.
struct Running {
    stream: Arc<Stream>,
    stop: CancellationToken,
    leave: Arc<OnceLock<Leave>>,
}

/// When a stream that could not be started is tried again: what was in the way may be short-lived, such
/// as a lack of file descriptors.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// With `--once` nothing is waited for that could not be started in so many tries.
const TRIES_MAX: u32 = 3;

/// How long a drain waits for the sources of streams that were about to be opened again: longer than a
/// source takes to end.
const LEAVE_MAX: Duration = Duration::from_secs(4);

/// How often it looks.
const LEAVE_TICK: Duration = Duration::from_millis(10);

/// What could not be started.
struct Later {
    /// When it is tried again.
    at: Instant,
    /// Tries so far.
    tries: u32,
    /// What was in the way.
    why: String,
    /// What was logged when.
    quiet: Quiet,
}

/// All streams.
pub(super) struct Streams {
    running: BTreeMap<String, Running>,
    /// Streams that were taken out and may still have something on its way to the journal.
    removed: Vec<Arc<Stream>>,
    /// Streams that start once their namesakes in `removed` have settled. What is in `running` under
    /// their names says only that they could not be started.
    waiting: BTreeMap<String, StreamPlan>,
    /// Those of them, and of `leaving`, that could not be started.
    later: BTreeMap<String, Later>,
    /// Streams that are not configured any more and of which that may not have been said yet.
    leaving: BTreeSet<String>,
    /// Files that had been read to their ends when they were disabled.
    finished: BTreeSet<String>,
    /// Who may connect now, over all streams.
    gate: Arc<Gate>,
    holds: Holds,
    /// Where crashes are written down.
    crashes: PathBuf,
}

impl Streams {
    /// No stream yet. `dangerous`: those that have crashed the daemon, with how often.
    pub(super) fn new(
        plan: &Plan,
        mut holds: Holds,
        crashes: PathBuf,
        dangerous: &BTreeMap<String, usize>,
    ) -> Streams {
        noted(holds.keep(|id| plan.streams.contains_key(id)));
        let mut streams = Streams {
            running: BTreeMap::new(),
            removed: Vec::new(),
            waiting: plan.streams.clone(),
            later: BTreeMap::new(),
            leaving: left_before(plan),
            finished: BTreeSet::new(),
            gate: Arc::default(),
            holds,
            crashes,
        };
        streams.quarantine(plan, dangerous);
        streams
    }

    /// Holds back what has crashed the daemon, unless it was configured otherwise since.
    fn quarantine(&mut self, plan: &Plan, dangerous: &BTreeMap<String, usize>) {
        let digest = |id: &str| plan.streams.get(id).map(|it| it.digest(&plan.limits));
        noted(self.holds.complete(digest));
        let mut lifted = BTreeSet::new();
        for (id, stream) in &plan.streams {
            let digest = stream.digest(&plan.limits);
            if self.holds.get(id).is_some_and(|it| it.is_of_another(&digest)) {
                tracing::warn!(
                    stream = id,
                    "it was quarantined and is configured otherwise now: it is opened again"
                );
                self.lift(id);
                lifted.insert(id);
            }
        }
        for (id, count) in dangerous {
            let known = self.holds.get(id).is_some() || lifted.contains(id);
            let Some(digest) = digest(id).filter(|_| !known) else { continue };
            let detail = format!(
                "not opened: it crashed the daemon {count} times within an hour; `ghostwatch \
                 streams enable {id}` opens it again"
            );
            noted(self.holds.put(id, Hold::quarantined(detail, digest)));
        }
    }

    /// Starts all that are configured.
    ///
    /// # Errors
    /// One cannot be started.
    pub(super) fn start(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        for (id, plan) in std::mem::take(&mut self.waiting) {
            self.add(&id, plan, world)?;
        }
        Ok(())
    }

    fn add(&mut self, id: &str, plan: StreamPlan, world: &mut World<'_>) -> anyhow::Result<()> {
        let stream = Arc::new(Stream::watched(id, plan.health));
        let (opener, settings) = prepare(&stream, &plan, world)?;
        let (gate, leave) = (self.gate.clone(), Arc::new(OnceLock::new()));
        let hold = self.holds.get(id).map(Hold::leave);
        let held = hold.is_some();
        if let Some(hold) = hold {
            leave.set(hold).expect("it was just made");
        }
        let settings = source::Settings { gate, leave: leave.clone(), ..settings };
        let observer = world.observer;
        let added = world.pipeline.add_source(
            Box::new(opener),
            stream.clone(),
            settings,
            (plan.when_full, plan.weight),
            |added| {
                observer.add(&stream, &plan, added);
                if held {
                    // It says what it is held for, and opens nothing.
                    added.stop.cancel();
                }
            },
        );
        let added = added.inspect_err(|_| observer.remove(&stream))?;
        self.running.insert(id.to_owned(), Running { stream, stop: added.stop, leave });
        Ok(())
    }

    /// Ends a stream, which says `leave` last.
    fn remove(&mut self, id: &str, leave: Leave) {
        let Some(running) = self.running.remove(id) else { return };
        // Set already iff it is held back or could not be started, and then its source has ended.
        running.leave.set(leave).ok();
        running.stop.cancel();
        self.removed.push(running.stream);
    }

    /// Ends a stream and lets it start anew.
    fn again(&mut self, id: &str, plan: &StreamPlan) {
        self.remove(id, Leave { state: State::Connecting, error: None });
        self.waiting.insert(id.to_owned(), plan.clone());
        self.later.remove(id);
    }

    /// Follows a changed configuration. A stream that is changed is not quarantined any more: what
    /// crashed may not be there any more.
    pub(super) fn apply(&mut self, changes: &Changes, plan: &Plan) {
        for id in changes.removed.iter().chain(&changes.changed) {
            self.finished.remove(id);
        }
        for id in &changes.removed {
            self.waiting.remove(id);
            self.later.remove(id);
            self.lift(id);
            self.remove(id, Leave::default());
            self.leaving.insert(id.clone());
        }
        for id in &changes.changed {
            if self.is_quarantined(id) {
                self.lift(id);
            }
            self.planned(id, plan);
            self.again(id, &plan.streams[id]);
        }
        // They start with the next tick, or once what runs under their name has settled.
        for id in &changes.added {
            self.planned(id, plan);
            self.later.remove(id);
            self.waiting.insert(id.clone(), plan.streams[id].clone());
        }
    }

    /// Notes by what a stream is run from now on. What crashed may not be there any more.
    fn planned(&self, id: &str, plan: &Plan) {
        let digest = plan.streams[id].digest(&plan.limits);
        let noted = crash::log::changed(&self.crashes, id, &digest, SystemTime::now());
        if let Err(error) = noted {
            tracing::error!(stream = id, %error, "the record of crashes cannot be written");
        }
    }

    fn is_quarantined(&self, id: &str) -> bool {
        self.holds.get(id).is_some_and(|it| it.why == Why::Quarantined)
    }

    /// Holds a stream back no more, whatever it has done. What cannot be written down holds for this
    /// run all the same.
    fn lift(&mut self, id: &str) {
        if let Err(error) = self.forgive(id) {
            tracing::error!(stream = id, %error, "the next start will hold it back again");
        }
    }

    /// The same. The list is written first, at once: if that fails, nothing has changed on the disk.
    ///
    /// # Errors
    /// It cannot be written down.
    fn forgive(&mut self, id: &str) -> io::Result<()> {
        if self.holds.get(id).is_none() {
            return Ok(());
        }
        self.holds.lift(id)?;
        crash::log::forgive(&self.crashes, id, SystemTime::now())
    }

    /// Forgets streams whose last frame is published, and starts those that wait for it.
    pub(super) fn tick(&mut self, world: &mut World<'_>) {
        self.removed.retain(|it| {
            let settled = !world.pipeline.is_running(&it.id) && it.is_settled();
            if settled {
                world.observer.remove(it);
                if it.state() == State::Removed {
                    self.leaving.remove(&it.id);
                }
            }
            !settled
        });
        self.take_leave(world);
        // One whose source had ended before it was held back says so by a source that opens nothing.
        let silent = |id: &&String| match (self.holds.get(id), self.running.get(*id)) {
            (Some(hold), Some(it)) => {
                let is_told = it.stream.state() == hold.leave().state;
                !is_told && !world.pipeline.is_running(id) && !self.waiting.contains_key(*id)
            }
            _ => false,
        };
        let silent: Vec<_> = world.plan.streams.keys().filter(silent).cloned().collect();
        for id in silent {
            self.again(&id, &world.plan.streams[&id]);
        }
        self.start_waiting(world);
    }

    /// Starts what waits and can be started now. What fails is tried again.
    fn start_waiting(&mut self, world: &mut World<'_>) {
        let now = Instant::now();
        let ready = |id: &&String| {
            let settled = !self.removed.iter().any(|it| it.id == **id);
            settled && self.later.get(*id).is_none_or(|it| it.at <= now)
        };
        let ready: Vec<_> = self.waiting.keys().filter(ready).cloned().collect();
        for id in ready {
            let plan = self.waiting[&id].clone();
            let started = match self.running.get(&id).map(|it| prepare(&it.stream, &plan, world)) {
                None => self.add(&id, plan, world).map(|()| {
                    self.waiting.remove(&id);
                    self.later.remove(&id);
                }),
                // What says that it is down makes room, and with one of the next ticks it starts.
                Some(prepared) => prepared.map(|_| self.remove(&id, Leave::default())),
            };
            if let Err(error) = started {
                self.not_started(&id, &error, world);
            }
        }
    }

    /// Notes what could not be started, to be tried again, and logs that at most once in ten seconds.
    /// Gives what there is to say.
    fn postpone(&mut self, id: &str, what: &str, error: &anyhow::Error) -> String {
        let (now, why) = (Instant::now(), format!("{error:#}"));
        let seconds = AGAIN_AFTER.as_secs();
        let said = format!("{what}, tried again every {seconds} s: {why}");
        let new = || Later { at: now, tries: 0, why: String::new(), quiet: Quiet::default() };
        let it = self.later.entry(id.to_owned()).or_insert_with(new);
        if let Some(say) = it.quiet.may_say(Code::Error, false, now) {
            tracing::error!(stream = id, left_out = say.left_out, "{said}");
        }
        (it.at, it.tries, it.why) = (now + AGAIN_AFTER, it.tries.saturating_add(1), why);
        said
    }

    /// Lets a stream that could not be started say that it is down, so that it has its event, its
    /// metrics and its line in the table.
    fn not_started(&mut self, id: &str, error: &anyhow::Error, world: &mut World<'_>) {
        let said = self.postpone(id, "cannot be started", error);
        if self.running.contains_key(id) {
            return;
        }
        let plan = &self.waiting[id];
        let stream = Arc::new(Stream::watched(id, plan.health));
        let error = SourceError { code: Code::Error, detail: said.clone() };
        let leave = Leave { state: State::Down, error: Some(error) };
        let observer = world.observer;
        let down = mute::say(world.pipeline, &stream, leave.clone(), |added| {
            observer.add(&stream, plan, added);
        });
        match down {
            Ok(added) => {
                let leave = Arc::new(OnceLock::from(leave));
                let running = Running { stream, stop: added.stop, leave };
                self.running.insert(id.to_owned(), running);
            }
            // Most likely for the same reason.
            Err(_) => {
                observer.remove(&stream);
                observer.not_started(id, said);
            }
        }
    }

    /// Says of the streams whose sources had ended before they were taken out that they are gone.
    fn take_leave(&mut self, world: &mut World<'_>) {
        let now = Instant::now();
        for id in std::mem::take(&mut self.leaving) {
            let is_early = self.later.get(&id).is_some_and(|it| now < it.at);
            // One that has come back says so itself.
            if world.plan.streams.contains_key(&id) {
                continue;
            }
            if is_early || self.removed.iter().any(|it| it.id == id) {
                self.leaving.insert(id);
                continue;
            }
            // It is said of one that could never be started, too.
            world.observer.forget(&id);
            let stream = Arc::new(Stream::new(&id));
            match mute::say(world.pipeline, &stream, Leave::default(), |_| ()) {
                Ok(_) => {
                    self.later.remove(&id);
                    self.removed.push(stream);
                }
                Err(error) => {
                    self.postpone(&id, "its end cannot be told", &error);
                    self.leaving.insert(id);
                }
            }
        }
    }

    /// Which streams were not read to their ends because they are held back or could not be started,
    /// and why, in words. `None` iff there are none.
    pub(super) fn unread(&self, plan: &Plan) -> Option<String> {
        let unread = |id: &String| {
            if let Some(later) = self.later.get(id) {
                return Some(format!("{id} cannot be started: {}", later.why));
            }
            Some(format!("{id} is {}", self.holds.get(id)?.why.name()))
        };
        let unfinished = plan.streams.keys().filter(|it| !self.finished.contains(*it));
        let unread: Vec<_> = unfinished.filter_map(unread).collect();
        (!unread.is_empty()).then(|| unread.join(", "))
    }

    /// Whether something is to be started yet for which there is hope.
    pub(super) fn is_starting(&self) -> bool {
        let hopeless = |id: &String| self.later.get(id).is_some_and(|it| TRIES_MAX <= it.tries);
        !self.waiting.keys().chain(&self.leaving).all(hopeless)
    }

    /// Ends all sources. A stream that waits to be opened again has said last that it would connect, so
    /// that another source says that it is gone, once the one before has nothing more to say. Gives what
    /// ended meanwhile.
    pub(super) fn end(&mut self, world: &mut World<'_>) -> Vec<Exit> {
        self.running.values().for_each(|it| it.stop.cancel());
        self.waiting.retain(|id, _| self.holds.get(id).is_none());
        let (deadline, mut exits) = (Instant::now() + LEAVE_MAX, Vec::new());
        while !self.waiting.is_empty() && Instant::now() < deadline {
            exits.extend(world.pipeline.next_exit(Instant::now() + LEAVE_TICK));
            let is_said = |it: &Arc<Stream>| !world.pipeline.is_running(&it.id) && it.is_settled();
            self.removed.retain(|it| !is_said(it));
            let ended = |id: &String| {
                let last = self.running.get(id).is_none_or(|it| is_said(&it.stream));
                last && !self.removed.iter().any(|it| it.id == *id)
            };
            let ended: Vec<_> = self.waiting.keys().filter(|it| ended(it)).cloned().collect();
            for id in ended {
                self.waiting.remove(&id);
                let stream = Arc::new(Stream::new(&id));
                match mute::say(world.pipeline, &stream, Leave::default(), |_| ()) {
                    Ok(_) => self.removed.push(stream),
                    Err(error) => tracing::error!(stream = id, "its end cannot be told: {error:#}"),
                }
            }
        }
        exits
    }

    /// The accounts of all streams, also those that were taken out and have not settled yet.
    pub(super) fn into_accounts(self) -> Vec<Arc<Stream>> {
        self.running.into_values().map(|it| it.stream).chain(self.removed).collect()
    }
}

/// What opens a stream, and how it is read.
fn prepare(
    stream: &Arc<Stream>,
    plan: &StreamPlan,
    world: &World<'_>,
) -> anyhow::Result<(GstOpener, source::Settings)> {
    let spec = plan.spec(&world.plan.limits)?;
    let first_epoch = next_epoch(&world.plan.journal.path, &stream.id)?;
    let settings = source::Settings::new(&spec, first_epoch);
    Ok((GstOpener::new(spec, stream.clone())?, settings))
}

/// The epoch after the last one that the journal knows of a stream: epochs outlive restarts.
fn next_epoch(journal: &std::path::Path, id: &str) -> anyhow::Result<u64> {
    let last = Reader::open(journal).and_then(|it| it.last_epoch(id));
    Ok(last.map_err(JournalError::in_use)?.map_or(0, |it| it + 1))
}
