//! The streams as metrics: their ledgers are read when somebody scrapes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, RwLock, atomic::Ordering::Relaxed},
    time::Instant,
};

use prometheus::{
    GaugeVec, IntCounterVec, IntGauge, IntGaugeVec,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::{
    LOCK, account,
    families::{counters, gauge, gauges, real_gauges},
};
use crate::{
    frame::{Dated, State, StateChange, TimeSource},
    health::Flag,
    ledger::Stream,
    source::agree::differ,
    stage::{Reason, StageName},
};

/// Where frames are dropped as a rule: exported from 0, so that a rate sees the first one. Any
/// other pair is exported once it has happened.
const DROPS: [(StageName, Reason); 8] = [
    (StageName::Source, Reason::Rate),
    (StageName::Source, Reason::Corrupt),
    (StageName::Queue, Reason::Overload),
    (StageName::Queue, Reason::Shutdown),
    (StageName::Preprocess, Reason::Error),
    (StageName::Inference, Reason::Error),
    (StageName::Postprocess, Reason::Error),
    (StageName::Journal, Reason::Journal),
];

/// All streams.
pub(crate) struct Streams {
    by_id: RwLock<BTreeMap<String, Entry>>,
    /// Streams taken out that may still have frames in flight.
    leaving: Mutex<Leaving>,
    descs: Vec<Desc>,
}

struct Entry {
    stream: Arc<Stream>,
    wanted_fps: Option<f64>,
    told: Mutex<Told>,
}

/// What a stream's ledger does not know.
#[derive(Default)]
struct Told {
    /// Whether the state told last was up.
    up: bool,
    /// By code.
    disconnects: BTreeMap<&'static str, u64>,
}

#[derive(Default)]
struct Leaving {
    streams: Vec<Arc<Stream>>,
    /// Lost frames of streams that are gone completely.
    lost: u64,
}

/// What the registry holds.
#[derive(Clone)]
pub(crate) struct Reader(pub(crate) Arc<Streams>);

impl Streams {
    pub(crate) fn new() -> Streams {
        let descs = Families::new().all().iter().flat_map(|it| it.desc()).cloned().collect();
        Streams { by_id: RwLock::default(), leaving: Mutex::default(), descs }
    }

    pub(crate) fn add(&self, stream: Arc<Stream>, wanted_fps: Option<f64>) {
        let told = Told { up: stream.state() == State::Up, ..Told::default() };
        // One that comes back must not count twice.
        let other = |it: &Arc<Stream>| !Arc::ptr_eq(it, &stream);
        self.leaving.lock().expect(LOCK).streams.retain(other);
        let entry = Entry { stream, wanted_fps, told: Mutex::new(told) };
        self.by_id.write().expect(LOCK).insert(entry.stream.id.clone(), entry);
    }

    pub(crate) fn remove(&self, id: &str) {
        if let Some(entry) = self.by_id.write().expect(LOCK).remove(id) {
            self.leaving.lock().expect(LOCK).streams.push(entry.stream);
        }
    }

    pub(crate) fn changed(&self, change: &StateChange) {
        let entries = self.by_id.read().expect(LOCK);
        let Some(entry) = entries.get(&change.stream.id) else { return };
        let mut told = entry.told.lock().expect(LOCK);
        if let (true, Some(code)) = (told.up, change.code) {
            *told.disconnects.entry(code.name()).or_default() += 1;
        }
        told.up = change.state == State::Up;
    }
}

impl Leaving {
    /// Frames lost by streams that were taken out. A stream that nobody else holds is settled.
    fn unaccounted(&mut self, deadline: Instant) -> u64 {
        let mut lost = 0;
        let mut settled = 0;
        self.streams.retain(|it| {
            // Looked at first: whoever lets go between the two has counted before.
            let alone = Arc::strong_count(it) == 1;
            let missing = account::unaccounted(it, deadline).unsigned_abs();
            if alone {
                settled += missing;
            } else {
                lost += missing;
            }
            !alone
        });
        self.lost += settled;
        self.lost + lost
    }
}

/// The metrics of one scrape. Made anew each time, so that streams taken out leave nothing.
struct Families {
    info: IntGaugeVec,
    up: IntGaugeVec,
    state: IntGaugeVec,
    last_frame: GaugeVec,
    clock_offset: GaugeVec,
    clock_wrong: IntGaugeVec,
    time_error: GaugeVec,
    time_source: IntGaugeVec,
    connects: IntCounterVec,
    disconnects: IntCounterVec,
    wanted_fps: GaugeVec,
    flags: IntGaugeVec,
    frozen: IntGaugeVec,
    received_bytes: IntCounterVec,
    received: IntCounterVec,
    left_out: IntCounterVec,
    decoded: IntCounterVec,
    published: IntCounterVec,
    dropped: IntCounterVec,
    unaccounted: IntGauge,
}

impl Families {
    fn new() -> Families {
        let id = ["stream"];
        let timestamp = "stream_last_frame_timestamp_seconds";
        let outcome = "Decoded frames that ended without a label.";
        let lost = "Frames lost without an outcome, over all streams; must read 0.";
        Families {
            info: gauges(
                "stream_info",
                "What a stream is coded in, and the size of its pictures; always 1.",
                &["stream", "codec", "width", "height"],
            ),
            up: gauges("stream_up", "1 while frames come, else 0.", &id),
            state: gauges(
                "stream_state",
                "1 for the state that a stream is in, else 0.",
                &["stream", "state"],
            ),
            last_frame: real_gauges(timestamp, "When a frame was decoded last.", &id),
            clock_offset: real_gauges(
                "stream_clock_offset_seconds",
                "The camera's clock less this host's, by the fastest frame, whose way it is too small by.",
                &id,
            ),
            clock_wrong: gauges(
                "stream_clock_wrong",
                "1 while the camera's clock differs from this host's by more than max_clock_offset, else 0.",
                &id,
            ),
            time_error: real_gauges(
                "stream_time_error_seconds",
                "How far the last frame's time is at most from when it was taken.",
                &id,
            ),
            time_source: gauges(
                "stream_time_source",
                "1 for what the last frame's time comes from, else 0.",
                &["stream", "source"],
            ),
            connects: counters(
                "stream_connects_total",
                "Tries to connect, by whether they gave a first frame.",
                &["stream", "result"],
            ),
            disconnects: counters(
                "stream_disconnects_total",
                "Failures of a stream that was up.",
                &["stream", "reason"],
            ),
            wanted_fps: real_gauges("stream_wanted_fps", "The configured frame rate limit.", &id),
            flags: gauges(
                "stream_flag",
                "1 for what is wrong with a stream's pictures, else 0.",
                &["stream", "flag"],
            ),
            frozen: gauges("stream_frozen", "1 while the picture does not change, else 0.", &id),
            received_bytes: counters("stream_received_bytes_total", "Encoded bytes.", &id),
            received: counters("frames_received_total", "Encoded frames.", &id),
            left_out: counters(
                "frames_not_decoded_total",
                "Encoded frames that were not decoded: `skipped` on purpose, as `max_fps` wants less.",
                &["stream", "reason"],
            ),
            decoded: counters("frames_decoded_total", "Frames that left the decoder.", &id),
            published: counters(
                "frames_published_total",
                "Frames whose event was appended to the journal and committed.",
                &id,
            ),
            dropped: counters("frames_dropped_total", outcome, &["stream", "stage", "reason"]),
            unaccounted: gauge("frames_unaccounted", lost),
        }
    }

    fn all(&self) -> [&dyn Collector; 20] {
        [
            &self.info,
            &self.up,
            &self.state,
            &self.last_frame,
            &self.clock_offset,
            &self.clock_wrong,
            &self.time_error,
            &self.time_source,
            &self.connects,
            &self.disconnects,
            &self.wanted_fps,
            &self.flags,
            &self.frozen,
            &self.received_bytes,
            &self.received,
            &self.left_out,
            &self.decoded,
            &self.published,
            &self.dropped,
            &self.unaccounted,
        ]
    }

    fn add(&self, entry: &Entry) {
        let stream = &*entry.stream;
        let id = stream.id.as_str();
        let now = stream.state();
        self.up.with_label_values(&[id]).set(i64::from(now == State::Up));
        for state in State::ALL {
            self.state.with_label_values(&[id, state.name()]).set(i64::from(now == state));
        }
        let last_frame_ms = stream.last_frame_ms.load(Relaxed);
        if 0 < last_frame_ms {
            self.last_frame.with_label_values(&[id]).set(last_frame_ms as f64 / 1000.0);
        }
        if let Some(dated) = stream.dated() {
            self.add_dated(stream, dated);
        }
        for (result, count) in [("ok", &stream.connects), ("failed", &stream.connects_failed)] {
            self.connects.with_label_values(&[id, result]).inc_by(count.load(Relaxed));
        }
        if let Some(fps) = entry.wanted_fps {
            self.wanted_fps.with_label_values(&[id]).set(fps);
        }
        let flags = stream.health().flags();
        for flag in Flag::ALL {
            let gauge = self.flags.with_label_values(&[id, flag.name()]);
            gauge.set(i64::from(flags.has(flag)));
        }
        self.frozen.with_label_values(&[id]).set(i64::from(flags.has(Flag::Frozen)));
        let counts = [
            (&self.received_bytes, &stream.received_bytes),
            (&self.received, &stream.received),
            (&self.decoded, &stream.decoded),
            (&self.published, &stream.published),
        ];
        for (family, count) in counts {
            family.with_label_values(&[id]).inc_by(count.load(Relaxed));
        }
        let left_out = self.left_out.with_label_values(&[id, "skipped"]);
        left_out.inc_by(stream.left_out.load(Relaxed));
        self.add_drops(stream);
        let told = entry.told.lock().expect(LOCK);
        for (reason, count) in &told.disconnects {
            self.disconnects.with_label_values(&[id, reason]).inc_by(*count);
        }
        if let Some((codec, width, height)) = stream.info() {
            let (width, height) = (width.to_string(), height.to_string());
            self.info.with_label_values(&[id, shown(&codec), &width, &height]).set(1);
        }
    }

    fn add_dated(&self, stream: &Stream, dated: Dated) {
        let id = stream.id.as_str();
        for source in TimeSource::ALL {
            let gauge = self.time_source.with_label_values(&[id, source.name()]);
            gauge.set(i64::from(dated.source == source));
        }
        if let Some(offset) = dated.clock_offset_ns {
            self.clock_offset.with_label_values(&[id]).set(offset as f64 / 1e9);
            if let Some(max) = stream.max_clock_offset() {
                let wrong = i64::from(differ(offset, max));
                self.clock_wrong.with_label_values(&[id]).set(wrong);
            }
        }
        if let Some(error) = dated.error {
            self.time_error.with_label_values(&[id]).set(error.as_secs_f64());
        }
    }

    fn add_drops(&self, stream: &Stream) {
        for stage in StageName::ALL {
            for reason in Reason::ALL {
                let count = stream.dropped(stage, reason);
                if 0 < count || DROPS.contains(&(stage, reason)) {
                    let labels = [stream.id.as_str(), stage.name(), reason.name()];
                    self.dropped.with_label_values(&labels).inc_by(count);
                }
            }
        }
    }
}

/// A file or camera can name the codec, so anything odd is not shown.
fn shown(codec: &str) -> &str {
    let plain = |it: u8| it.is_ascii_alphanumeric() || b"-_.".contains(&it);
    if codec.len() <= 32 && codec.bytes().all(plain) { codec } else { "other" }
}

impl Collector for Reader {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        let deadline = Instant::now() + account::PATIENCE;
        // Losses of one stream and double counts of another must not cancel out, so each adds its
        // size without its sign.
        let mut unaccounted = 0;
        {
            let entries = self.0.by_id.read().expect(LOCK);
            for entry in entries.values() {
                unaccounted += account::unaccounted(&entry.stream, deadline).unsigned_abs();
                families.add(entry);
            }
        }
        unaccounted += self.0.leaving.lock().expect(LOCK).unaccounted(deadline);
        families.unaccounted.set(unaccounted as i64);
        families.all().iter().flat_map(|it| it.collect()).collect()
    }
}
