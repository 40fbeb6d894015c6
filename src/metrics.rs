//! Every metric: its name, help, labels and buckets, once.
//!
//! Labels come from bounded sets only: configured stream ids and names written in this crate.
//! Counters that a stage keeps itself ([`Stream`], [`Counts`]) are read when somebody scrapes, so
//! that counting costs the stages one atomic addition. Nothing here waits for a stage.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::{Duration, Instant, SystemTime},
};

use prometheus::{
    Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder, process_collector::ProcessCollector,
};

use crate::{
    edge::Counts,
    frame::{Meta, StateChange},
    infer::batch::CloseReason,
    journal::writer::Stats,
    ledger::Stream,
    sink::progress::Progress,
};

mod account;
mod families;
mod gpus;
mod kinds;
mod queues;
mod sinks;
mod streams;

pub use kinds::{GpuTrouble, InferenceError, JournalLoss, Method, Route, Step};
pub use queues::QueueNow;

use families::{counter, counters, gauge, gauges, histogram, histograms, real_gauge, register};
use queues::Queues;
use sinks::Sinks;
use streams::Streams;

/// Durations of a commit, in seconds.
const COMMIT: [f64; 11] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
/// Frames in a batch.
const BATCH: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

/// What a build is made of.
#[derive(Clone, Copy, Debug)]
pub struct BuildInfo<'a> {
    /// Of this crate.
    pub version: &'a str,
    /// The commit it was built from.
    pub revision: &'a str,
    /// Version of libtorch; `none` without it.
    pub torch: &'a str,
    /// Version of GStreamer.
    pub gstreamer: &'a str,
}

/// What classifies.
#[derive(Clone, Copy, Debug)]
pub struct ModelInfo<'a> {
    /// The architecture.
    pub name: &'a str,
    /// The weights' fingerprint.
    pub weights: &'a str,
    /// Of the numbers on the device.
    pub precision: &'a str,
    /// Where it runs.
    pub device: &'a str,
    /// What computes it: `libtorch`, `native`.
    pub engine: &'a str,
}

/// All metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    streams: Arc<Streams>,
    queues: Arc<Queues>,
    sinks: Arc<Sinks>,
    /// By stream id; what the publishing stage observes into without looking labels up.
    timers: RwLock<HashMap<String, Arc<Timers>>>,
    build_info: IntGaugeVec,
    model_info: IntGaugeVec,
    frame_latency: HistogramVec,
    stage_duration: HistogramVec,
    batch_size: Histogram,
    batch_closed: IntCounterVec,
    inference_errors: IntCounterVec,
    selftest_ok: IntGauge,
    selftest_max_error: Gauge,
    gpu_unusable: IntGaugeVec,
    journal: Journal,
    http: Http,
    reload_successful: IntGauge,
    reload_success_time: Gauge,
}

/// The journal's part.
struct Journal {
    appended: IntCounter,
    size: IntGauge,
    oldest: IntGauge,
    next: IntGauge,
    commit: Histogram,
    lost: IntCounterVec,
}

/// The server's part.
struct Http {
    requests: IntCounterVec,
    duration: HistogramVec,
    clients: IntGaugeVec,
}

/// One stream's histograms.
struct Timers {
    latency: Histogram,
    steps: [Histogram; Step::ALL.len()],
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new() -> Metrics {
        let r = Registry::new();
        let streams = Arc::new(Streams::new());
        let queues = Arc::new(Queues::new());
        let sinks = Sinks::registered(&r);
        register(&r, streams::Reader(streams.clone()));
        register(&r, queues::Reader(queues.clone()));
        let process = Box::new(ProcessCollector::for_self());
        r.register(process).expect("each metric has a name of its own");
        Metrics {
            streams,
            queues,
            sinks,
            timers: RwLock::default(),
            build_info: register(&r, gauges(
                "build_info",
                "What this build is made of; always 1.",
                &["version", "revision", "torch", "gstreamer"],
            )),
            model_info: register(&r, gauges(
                "model_info",
                "The model that classifies; always 1.",
                &["name", "weights", "precision", "device", "engine"],
            )),
            frame_latency: register(&r, histograms(
                "frame_latency_seconds",
                "From a frame's arrival to the commit of its event.",
                &["stream"],
            )),
            stage_duration: register(&r, histograms(
                "stage_duration_seconds",
                "What the parts of a frame's way took.",
                &["stream", "stage"],
            )),
            batch_size: register(&r, histogram("batch_size", "Frames in a batch.", &BATCH)),
            batch_closed: register(&r, counters(
                "batch_closed_total",
                "Batches handed to the device, by why they were closed.",
                &["reason"],
            )),
            inference_errors: register(&r, counters(
                "inference_errors_total",
                "Batches that the model failed on.",
                &["kind"],
            )),
            selftest_ok: register(&r, gauge(
                "selftest_ok",
                "1 if the last self-test gave the reference answers, else 0.",
            )),
            selftest_max_error: register(&r, real_gauge(
                "selftest_max_error",
                "Largest difference of a logit in the last self-test, as a ratio of the largest.",
            )),
            gpu_unusable: register(&r, gauges(
                "gpu_unusable",
                "1 for the reason why a GPU that is there cannot be used.",
                &["reason"],
            )),
            journal: Journal::new(&r),
            http: Http::new(&r),
            reload_successful: register(&r, gauge(
                "config_last_reload_successful",
                "1 if the configuration was taken the last time it was read, else 0.",
            )),
            reload_success_time: register(&r, real_gauge(
                "config_last_reload_success_timestamp_seconds",
                "When a configuration was taken last, since the Unix epoch.",
            )),
            registry: r,
        }
        .at_zero()
    }

    /// Gives every series of a closed set its zero, so that a rate sees the first step.
    fn at_zero(self) -> Metrics {
        for it in CloseReason::ALL {
            self.batch_closed.with_label_values(&[it.name()]);
        }
        for it in InferenceError::ALL {
            self.inference_errors.with_label_values(&[it.name()]);
        }
        for it in JournalLoss::ALL {
            self.journal.lost.with_label_values(&[it.name()]);
        }
        for it in GpuTrouble::ALL {
            self.gpu_unusable.with_label_values(&[it.name()]);
        }
        self.http_clients(0, 0);
        self
    }

    /// All metrics as Prometheus reads them (text format 0.0.4).
    ///
    /// # Errors
    /// A metric cannot be written as text; a bug.
    pub fn text(&self) -> anyhow::Result<String> {
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?)
    }

    /// Says what the build is made of.
    pub fn set_build_info(&self, info: BuildInfo) {
        let labels = [info.version, info.revision, info.torch, info.gstreamer];
        self.build_info.reset();
        self.build_info.with_label_values(&labels).set(1);
    }

    /// Says what classifies from now on.
    pub fn set_model_info(&self, info: ModelInfo) {
        let labels = [info.name, info.weights, info.precision, info.device, info.engine];
        self.model_info.reset();
        self.model_info.with_label_values(&labels).set(1);
    }

    /// Adds a stream; one of the same id is taken out first. `wanted_fps` is the most frames per
    /// second that are asked of it, if there is a limit.
    pub fn add_stream(&self, stream: Arc<Stream>, wanted_fps: Option<f64>) {
        self.remove_stream(&stream.id);
        let id = stream.id.as_str();
        let step = |it: Step| self.stage_duration.with_label_values(&[id, it.name()]);
        let latency = self.frame_latency.with_label_values(&[id]);
        let timers = Timers { latency, steps: Step::ALL.map(step) };
        self.timers.write().expect(LOCK).insert(id.to_owned(), Arc::new(timers));
        self.streams.add(stream.clone(), wanted_fps);
    }

    /// Takes a stream and all its series out. Its frames still in flight stay in the account of
    /// lost frames.
    pub fn remove_stream(&self, id: &str) {
        if self.timers.write().expect(LOCK).remove(id).is_none() {
            return;
        }
        self.streams.remove(id);
        // An error only says that there is no such series.
        drop(self.frame_latency.remove_label_values(&[id]));
        for step in Step::ALL {
            drop(self.stage_duration.remove_label_values(&[id, step.name()]));
        }
    }

    /// A stream's state has changed.
    pub fn stream_changed(&self, change: &StateChange) {
        self.streams.changed(change);
    }

    /// A frame's event was committed.
    pub fn frame_published(&self, meta: &Meta, labelled: Instant, committed: Instant) {
        // The stream may have been taken out while its last frames were on their way.
        let timers = self.timers.read().expect(LOCK).get(meta.stream.id.as_str()).cloned();
        let Some(timers) = timers else { return };
        let seconds = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64();
        timers.latency.observe(seconds(meta.timing.arrived, committed));
        for (step, timer) in Step::ALL.into_iter().zip(&timers.steps) {
            let (from, to) = step.moments(&meta.timing, labelled, committed);
            timer.observe(seconds(from, to));
        }
    }

    /// Adds a queue; one of the same name is replaced. `look` must not wait.
    pub fn add_queue(
        &self,
        name: &str,
        capacity: usize,
        look: impl Fn() -> QueueNow + Send + Sync + 'static,
    ) {
        self.queues.add(name, capacity, Box::new(look));
    }

    /// Adds an edge as a queue.
    pub fn add_edge(&self, name: &str, capacity: usize, counts: Arc<Counts>) {
        self.add_queue(name, capacity, move || QueueNow {
            length: counts.depth(),
            oldest_age: counts.oldest_age(),
        });
    }

    /// Takes a queue out.
    pub fn remove_queue(&self, name: &str) {
        self.queues.remove(name);
    }

    /// A batch was handed to the device.
    pub fn batch(&self, size: usize, reason: CloseReason) {
        self.batch_size.observe(size as f64);
        self.batch_closed.with_label_values(&[reason.name()]).inc();
    }

    /// The model failed on a batch.
    pub fn inference_failed(&self, kind: InferenceError) {
        self.inference_errors.with_label_values(&[kind.name()]).inc();
    }

    /// A self-test was done. `max_error` is relative to the largest logit.
    pub fn selftest(&self, ok: bool, max_error: f64) {
        self.selftest_ok.set(i64::from(ok));
        self.selftest_max_error.set(max_error);
    }

    /// Says why the GPU that is there cannot be used; `None` if none is there or it can.
    pub fn set_gpu_trouble(&self, trouble: Option<GpuTrouble>) {
        for it in GpuTrouble::ALL {
            let holds = trouble == Some(it);
            self.gpu_unusable.with_label_values(&[it.name()]).set(i64::from(holds));
        }
    }

    /// Shows the machine's GPUs from now on, as far as NVIDIA's library is there. Not to be called
    /// twice.
    pub fn watch_gpus(&self) {
        register(&self.registry, gpus::Reader::new());
    }

    /// How the journal stands. The counts in it are those since it was opened.
    pub fn journal_stats(&self, stats: Stats) {
        let int = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        self.journal.size.set(int(stats.size_bytes));
        self.journal.oldest.set(int(stats.oldest));
        self.journal.next.set(int(stats.next));
        self.sinks.next(stats.next);
        raise(&self.journal.appended, stats.appended);
        let retention = [JournalLoss::Retention.name()];
        raise(&self.journal.lost.with_label_values(&retention), stats.lost);
    }

    /// Shows a sink.
    pub fn add_sink(&self, progress: Arc<Progress>) {
        self.sinks.add(progress);
    }

    /// Takes a sink and all its series out.
    pub fn remove_sink(&self, name: &str) {
        self.sinks.remove(name);
    }

    /// A broker has acknowledged a message.
    pub fn acked(&self, sink: &str, took: Duration, since_arrival: Option<Duration>) {
        self.sinks.acked(sink, took, since_arrival);
    }

    /// A commit took this long.
    pub fn journal_committed(&self, took: Duration) {
        self.journal.commit.observe(took.as_secs_f64());
    }

    /// Events were lost other than by retention, which [`Metrics::journal_stats`] counts.
    pub fn journal_lost(&self, loss: JournalLoss, events: usize) {
        self.journal.lost.with_label_values(&[loss.name()]).inc_by(events as u64);
    }

    /// An HTTP request was answered.
    pub fn http_request(&self, route: Route, method: Method, code: u16, took: Duration) {
        let labels = [route.name(), method.name(), kinds::code(code)];
        self.http.requests.with_label_values(&labels).inc();
        self.http.duration.with_label_values(&labels).observe(took.as_secs_f64());
    }

    /// So many HTTP connections are open.
    pub fn http_clients(&self, idle: usize, busy: usize) {
        self.http.clients.with_label_values(&["idle"]).set(idle as i64);
        self.http.clients.with_label_values(&["busy"]).set(busy as i64);
    }

    /// The configuration was read again, and taken or refused.
    pub fn config_reloaded(&self, taken: bool, at: SystemTime) {
        self.reload_successful.set(i64::from(taken));
        if taken {
            let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            self.reload_success_time.set(since.as_secs_f64());
        }
    }
}

impl Journal {
    fn new(r: &Registry) -> Journal {
        Journal {
            appended: register(
                r,
                counter(
                    "journal_appended_events_total",
                    "Events committed to the journal since it was opened.",
                ),
            ),
            size: register(r, gauge("journal_size_bytes", "Bytes in use in the journal.")),
            oldest: register(
                r,
                gauge(
                    "journal_oldest_sequence",
                    "Sequence number of the oldest event that is there.",
                ),
            ),
            next: register(
                r,
                gauge("journal_next_sequence", "Sequence number that the next event gets."),
            ),
            commit: register(
                r,
                histogram(
                    "journal_commit_duration_seconds",
                    "What commits to the journal took.",
                    &COMMIT,
                ),
            ),
            lost: register(
                r,
                counters(
                    "journal_lost_events_total",
                    "Events that were removed from the journal or could not be appended.",
                    &["reason"],
                ),
            ),
        }
    }
}

impl Http {
    fn new(r: &Registry) -> Http {
        Http {
            requests: register(
                r,
                counters(
                    "http_requests_total",
                    "HTTP requests answered.",
                    &["route", "method", "code"],
                ),
            ),
            duration: register(
                r,
                histograms(
                    "http_request_duration_seconds",
                    "From a request's header to its answer's.",
                    &["route", "method", "code"],
                ),
            ),
            clients: register(
                r,
                gauges(
                    "http_clients",
                    "Open HTTP connections: idle (waiting for a request) or busy.",
                    &["kind"],
                ),
            ),
        }
    }
}

/// What a poisoned lock would mean.
const LOCK: &str = "nothing panics while it holds a lock of the metrics";

/// Raises a counter to what its owner has counted.
fn raise(counter: &IntCounter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}
