//! What the stages tell, turned into metrics and health. The only place that knows all three.

mod selftests;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use crate::{
    config::plan::StreamPlan,
    frame::{Meta, State as StreamState, StateChange},
    http::{Check, Health, State},
    infer::{
        batch::{self, CloseReason},
        device::GpuStatus,
        load::Loaded,
        selftest::Agreement,
    },
    journal::writer::Stats,
    ledger::Stream,
    metrics::{BuildInfo, GpuTrouble, InferenceError, JournalLoss, Metrics, ModelInfo},
    observe::selftests::Selftests,
    pipeline::{Added, Pipeline},
    publish,
    pulse::Pulse,
    sink::{deliver, progress::Progress},
    source::gst,
};

/// A loop that has not turned for this long is stuck. The slowest batch takes a second or two, and a
/// commit has taken 58 ms at most on a disk that others used too.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// The version of libtorch that this is built for.
pub const TORCH: &str = if cfg!(feature = "libtorch") { "2.11.0" } else { "none" };

/// Listens to the stages.
pub struct Observer {
    metrics: Arc<Metrics>,
    /// Of the running pipeline.
    pulses: OnceLock<Vec<Arc<Pulse>>>,
    writable: AtomicBool,
    ready: AtomicBool,
    gpu: Option<String>,
    /// The streams, and what is to be said of those that do not run.
    streams: Mutex<BTreeMap<String, Option<String>>>,
    sinks: Mutex<BTreeMap<String, Arc<Progress>>>,
    /// The sequence number that the journal's next event gets.
    next: AtomicU64,
    selftests: Mutex<Selftests>,
    /// Lanes that are not warm yet.
    cold: Mutex<BTreeSet<usize>>,
}

impl Observer {
    /// For a network that has passed its self-test and is to run on so many lanes.
    pub fn new(loaded: &Loaded, lanes: usize, gpu: &GpuStatus) -> Arc<Observer> {
        let metrics = Arc::new(Metrics::new());
        metrics.set_build_info(BuildInfo {
            version: env!("CARGO_PKG_VERSION"),
            revision: option_env!("GHOSTWATCH_REVISION").unwrap_or("unknown"),
            torch: TORCH,
            gstreamer: &gst::version(),
        });
        metrics.set_model_info(ModelInfo {
            name: &loaded.model,
            weights: &loaded.sha256[..12],
            precision: loaded.engine.precision().name(),
            device: &loaded.engine.device(),
            engine: loaded.engine.name(),
        });
        let by = &loaded.golden.reference.by;
        metrics.selftest(loaded.passes(), loaded.agreement.max_error);
        let gpu = match gpu {
            GpuStatus::Unusable(reason) => Some(reason.clone()),
            GpuStatus::Absent | GpuStatus::Ready(_) => None,
        };
        metrics.watch_gpus();
        metrics.set_gpu_trouble(gpu.as_deref().map(GpuTrouble::of));
        Arc::new(Observer {
            metrics,
            pulses: OnceLock::new(),
            writable: AtomicBool::new(true),
            ready: AtomicBool::new(false),
            gpu,
            streams: Mutex::default(),
            sinks: Mutex::default(),
            next: AtomicU64::new(1),
            selftests: Mutex::new(Selftests::new(by, loaded.agreement, loaded.passes())),
            cold: Mutex::new((0..lanes).collect()),
        })
    }

    /// What the HTTP server tells.
    pub fn state(self: &Arc<Observer>) -> Arc<State> {
        let (live, ready) = (self.clone(), self.clone());
        Arc::new(State {
            metrics: self.metrics.clone(),
            live: Box::new(move || vec![live.loops()]),
            ready: Box::new(move || ready.checks()),
        })
    }

    /// Shows the queues after the frame edges, and listens to the stages' pulses.
    pub fn pipeline(&self, pipeline: &Pipeline) {
        for (name, capacity, counts) in pipeline.queues() {
            self.metrics.add_edge(name, *capacity, counts.clone());
        }
        self.pulses.set(pipeline.pulses().to_vec()).expect("there is one pipeline");
    }

    /// Shows a sink.
    pub fn add_sink(&self, sink: &Arc<Progress>) {
        self.metrics.add_sink(sink.clone());
        locked(&self.sinks).insert(sink.cursor.sink().to_owned(), sink.clone());
    }

    /// Shows a sink no more. It has ended.
    pub fn remove_sink(&self, name: &str) {
        self.metrics.remove_sink(name);
        locked(&self.sinks).remove(name);
    }

    /// Shows a stream.
    pub fn add(&self, stream: &Arc<Stream>, plan: &StreamPlan, added: &Added) {
        self.metrics.add_stream(stream.clone(), plan.max_fps);
        let (capacity, counts) = &added.queue;
        self.metrics.add_edge(&queue(stream), *capacity, counts.clone());
        locked(&self.streams).insert(stream.id.clone(), Some("starting".to_owned()));
    }

    /// Shows a stream no more, unless another has taken its name.
    pub fn remove(&self, stream: &Arc<Stream>) {
        self.metrics.remove_stream(&stream.id);
        self.metrics.remove_queue(&queue(stream));
        locked(&self.streams).remove(&stream.id);
    }

    /// A stream could not be started, which is all that there is to show of it.
    pub fn not_started(&self, stream: &str, why: String) {
        locked(&self.streams).insert(stream.to_owned(), Some(why));
    }

    /// There is nothing more to be said of a stream that is not shown any more.
    pub fn forget(&self, stream: &str) {
        locked(&self.streams).remove(stream);
    }

    /// Whether every lane is ready for its first batch.
    pub fn is_warm(&self) -> bool {
        locked(&self.cold).is_empty()
    }

    /// Whether frames are taken.
    pub fn ready(&self, ready: bool) {
        self.ready.store(ready, Relaxed);
    }

    /// The configuration was read again, and taken or refused.
    pub fn reloaded(&self, taken: bool) {
        self.metrics.config_reloaded(taken, SystemTime::now());
    }

    /// Whether every loop turns.
    pub fn alive(&self) -> bool {
        self.stuck().is_none()
    }

    fn stuck(&self) -> Option<(&str, Duration)> {
        let pulses = self.pulses.get().into_iter().flatten();
        pulses.map(|it| (it.name(), it.still())).find(|it| STUCK_AFTER < it.1)
    }

    fn loops(&self) -> Check {
        match self.stuck() {
            None => check("loops", Health::Ok, "every stage turns"),
            Some((name, idle)) => {
                let detail = format!("{name} has not turned for {} s", idle.as_secs());
                check("loops", Health::Failed, detail)
            }
        }
    }

    fn checks(&self) -> Vec<Check> {
        let writable = self.writable.load(Relaxed);
        let ready = self.ready.load(Relaxed);
        let ok = |it: bool| if it { Health::Ok } else { Health::Failed };
        let mut checks = vec![
            check("model", ok(ready), if ready { "loaded" } else { "warming up or draining" }),
            locked(&self.selftests).check(),
            check("journal", ok(writable), if writable { "writable" } else { "takes no events" }),
            self.loops(),
            match &self.gpu {
                None => check("gpu", Health::Ok, "none, or in use"),
                Some(reason) => check("gpu", Health::Degraded, reason.clone()),
            },
        ];
        let next = self.next.load(Relaxed);
        checks.extend(locked(&self.sinks).values().map(|it| sink(it, next)));
        for (id, idle) in &*locked(&self.streams) {
            let degraded = |it: &String| check(format!("stream {id}"), Health::Degraded, it);
            checks.extend(idle.as_ref().map(degraded));
        }
        checks
    }
}

fn check(name: impl Into<Cow<'static, str>>, health: Health, detail: impl Into<String>) -> Check {
    Check { name: name.into(), health, detail: detail.into() }
}

/// A sink that is down costs nothing but time: its events wait in the journal.
fn sink(it: &Progress, next: u64) -> Check {
    let (up, at_risk) = (it.up.load(Relaxed), it.cursor.is_at_risk());
    let behind = next.saturating_sub(it.cursor.get() + 1);
    let mut detail = format!("{}, {behind} events behind", if up { "up" } else { "down" });
    if at_risk {
        detail += ", and retention will soon remove the first";
    }
    if let Some(trouble) = it.trouble() {
        detail += &format!(": {trouble}");
    }
    let health = if up && !at_risk { Health::Ok } else { Health::Degraded };
    check(format!("sink {}", it.cursor.sink()), health, detail)
}

/// What is to be said of a stream that does not run; one that has ended is as it should be.
fn idle(change: &StateChange) -> Option<String> {
    if matches!(change.state, StreamState::Up | StreamState::Ended) {
        return None;
    }
    let mut detail = change.state.name().to_owned();
    if let Some(code) = change.code {
        detail += &format!(", {}", code.name());
    }
    if let Some(said) = &change.detail {
        detail += &format!(": {said}");
    }
    Some(detail)
}

fn locked<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a stream's frame edge in the metrics.
fn queue(stream: &Stream) -> String {
    format!("frames-{}", stream.id)
}

impl batch::Watch for Observer {
    fn batch(&self, size: usize, reason: CloseReason) {
        self.metrics.batch(size, reason);
    }

    fn failed(&self, error: &anyhow::Error) {
        self.metrics.inference_failed(InferenceError::of(error));
    }

    fn warm(&self, lane: usize) {
        locked(&self.cold).remove(&lane);
    }

    fn selftest(&self, lane: usize, agreement: &Agreement, passed: bool) {
        let mut all = locked(&self.selftests);
        all.tell(lane, *agreement, passed);
        let (_, worst, good) = all.worst();
        self.metrics.selftest(good, worst.max_error);
        if passed {
            tracing::debug!(lane, error = agreement.max_error, "the golden self-test agrees");
        } else {
            let Agreement { max_error, same_top1, pictures } = agreement;
            tracing::error!(lane, max_error, same_top1, pictures, "the golden self-test failed");
        }
    }
}

impl deliver::Watch for Observer {
    fn acked(&self, sink: &str, took: Duration, since_arrival: Option<Duration>) {
        self.metrics.acked(sink, took, since_arrival);
    }
}

impl publish::Watch for Observer {
    fn published(&self, meta: &Meta, labelled: Instant, committed: Instant) {
        self.metrics.frame_published(meta, labelled, committed);
    }

    fn committed(&self, took: Duration, stats: Stats) {
        self.metrics.journal_committed(took);
        self.metrics.journal_stats(stats);
        self.next.store(stats.next, Relaxed);
    }

    fn lost(&self, events: usize) {
        self.metrics.journal_lost(JournalLoss::DiskFull, events);
    }

    fn gone(&self, events: u64) {
        // However many there were, whoever watches the metrics must see that some are gone.
        self.metrics.journal_lost(JournalLoss::Corruption, events.max(1) as usize);
    }

    fn changed(&self, change: &StateChange) {
        self.metrics.stream_changed(change);
        // One that was taken out is told of no more.
        if let Some(it) = locked(&self.streams).get_mut(&change.stream.id) {
            *it = idle(change);
        }
    }

    fn writable(&self, writable: bool) {
        self.writable.store(writable, Relaxed);
    }
}
