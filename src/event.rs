//! Event <-> JSON: the public format (CloudEvents 1.0, structured mode), its versions, its schema.
//!
//! An [`Event`] has everything but its id: that is given once, when the journal appends it.
//! Times on the wire are UTC with microseconds.

use std::{
    fmt::Write as _,
    time::{Instant, SystemTime},
};

use serde::Serialize;
use time::OffsetDateTime;

mod parts;

use parts::{Counts, FlagData, Latency, QualityData};

use crate::{
    frame::{Meta, StateChange},
    postprocess::Ranked,
};

mod gap;

pub use gap::{Elsewhere, GapReason};

/// What an event is about. The number is stored in the journal and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A frame with its labels.
    FrameClassified = 1,
    /// A stream's state has changed.
    StreamState = 2,
    /// Events that a reader will never get.
    JournalGap = 3,
    /// The daemon itself: started, draining, stopped, configuration read again.
    Daemon = 4,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 4] =
        [Kind::FrameClassified, Kind::StreamState, Kind::JournalGap, Kind::Daemon];

    /// The CloudEvents `type`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::FrameClassified => "io.ghostwatch.frame.classified.v1",
            Kind::StreamState => "io.ghostwatch.stream.state.v1",
            Kind::JournalGap => "io.ghostwatch.journal.gap.v1",
            Kind::Daemon => "io.ghostwatch.daemon.v1",
        }
    }

    /// The CloudEvents `dataschema`.
    pub fn schema(self) -> &'static str {
        match self {
            Kind::FrameClassified => "urn:ghostwatch:schema:frame-classified:1",
            Kind::StreamState => "urn:ghostwatch:schema:stream-state:1",
            Kind::JournalGap => "urn:ghostwatch:schema:journal-gap:1",
            Kind::Daemon => "urn:ghostwatch:schema:daemon:1",
        }
    }

    /// The kind with this stored number; `None` if a later version wrote it.
    pub fn from_code(code: i64) -> Option<Kind> {
        Kind::ALL.into_iter().find(|it| *it as i64 == code)
    }

    /// The kind with this `type`, in full or without the common prefix and the version.
    pub fn from_name(name: &str) -> Option<Kind> {
        let short = |it: Kind| {
            it.name().trim_start_matches("io.ghostwatch.").trim_end_matches(".v1") == name
        };
        Kind::ALL.into_iter().find(|it| it.name() == name || short(*it))
    }
}

/// An event that has not been appended yet.
#[derive(Clone, Debug)]
pub struct Event {
    /// What it is about.
    pub kind: Kind,
    /// The stream it belongs to; `None` iff it is about the daemon or the journal.
    pub stream: Option<String>,
    /// The epoch of the stream that it belongs to, if to one.
    pub epoch: Option<u64>,
    /// The CloudEvents `source`, see [`source()`].
    pub source: String,
    /// When it happened.
    pub time: SystemTime,
    /// The payload, as JSON.
    pub data: String,
}

/// What is the same for all frames that one model classifies.
#[derive(Clone, Debug)]
pub struct Context {
    /// Names this daemon in `source`.
    pub instance: String,
    /// The model's name.
    pub model: String,
    /// The SHA-256 of the weights file in hex; its first 12 digits are published.
    pub weights: String,
    /// Names the list of labels.
    pub label_set: String,
    /// The precision of the network: `fp32`, `bf16` or `fp16`.
    pub precision: String,
    /// The device: `cpu` or `cuda:N`.
    pub device: String,
    /// By label id: WordNet id, if the list has them, and name.
    pub labels: Vec<(Option<String>, String)>,
}

/// The CloudEvents `source` of an instance, or of one of its streams.
pub fn source(instance: &str, stream: Option<&str>) -> String {
    let mut it = String::from("/ghostwatch/");
    for byte in instance.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                it.push(char::from(byte));
            }
            _ => push(&mut it, format_args!("%{byte:02X}")),
        }
    }
    if let Some(stream) = stream {
        it.push_str("/streams/");
        it.push_str(stream);
    }
    it
}

/// RFC 3339 in UTC with microseconds.
pub fn rfc3339(time: SystemTime) -> String {
    let it = OffsetDateTime::from(time);
    let mut text = String::with_capacity(27);
    let (year, month, day) = (it.year(), u8::from(it.month()), it.day());
    push(&mut text, format_args!("{year:04}-{month:02}-{day:02}"));
    let (hour, minute, second, micro) = it.to_hms_micro();
    push(&mut text, format_args!("T{hour:02}:{minute:02}:{second:02}.{micro:06}Z"));
    text
}

/// The JSON Schema (draft 2020-12) of every event that this version writes.
pub fn schema() -> serde_json::Value {
    serde_json::from_str(include_str!("event/schema.json")).expect("the schema file is JSON")
}

/// The 20-digit text of a sequence number, which sorts as text.
pub fn sequence(number: u64) -> String {
    format!("{number:020}")
}

impl Event {
    /// A frame and its labels, best first, at the moment it is handed over to the journal.
    pub fn frame(
        meta: &Meta,
        batch_size: u32,
        top: &[Ranked],
        context: &Context,
        handed_over: Instant,
    ) -> Event {
        let label = |(rank, it): (u32, &Ranked)| {
            let known = context.labels.get(it.label_id as usize);
            Label {
                rank,
                label_id: it.label_id,
                wnid: known.and_then(|it| it.0.as_deref()),
                label: known.map_or("", |it| &it.1),
                confidence: (f64::from(it.confidence) * 1e6).round() / 1e6,
            }
        };
        let weights = context.weights.get(..12).unwrap_or(&context.weights);
        let data = FrameData {
            stream: &meta.stream.id,
            region: "default",
            epoch: meta.epoch,
            frame: meta.frame,
            pts_ns: meta.pts.as_nanos().min(u128::from(u64::MAX)) as u64,
            time_source: meta.dated.source.name(),
            time_error_ms: meta.dated.error.map(|it| it.as_micros().div_ceil(1_000) as u64),
            clock_offset_ms: meta
                .dated
                .clock_offset_ns
                .map(|it| (it + 500_000).div_euclid(1_000_000)),
            ingest_time: rfc3339(meta.ingest_time),
            width: meta.size.0,
            height: meta.size.1,
            model: Model {
                name: &context.model,
                weights: format!("sha256:{weights}"),
                labels: &context.label_set,
                precision: &context.precision,
            },
            device: &context.device,
            batch_size,
            top: (1..).zip(top).map(label).collect(),
            skipped: Counts(meta.skipped),
            quality: QualityData::of(&meta.quality),
            latency_us: Latency::of(meta, handed_over),
        };
        Event {
            kind: Kind::FrameClassified,
            stream: Some(meta.stream.id.clone()),
            epoch: Some(meta.epoch),
            source: source(&context.instance, Some(&meta.stream.id)),
            time: meta.time,
            data: json(&data),
        }
    }

    /// A stream's change of state. `previous` is the name of the state before, if there was one.
    pub fn state(instance: &str, change: &StateChange, previous: Option<&str>) -> Event {
        let decoder = change.stream.decoder();
        let data = StateData {
            stream: &change.stream.id,
            state: change.state.name(),
            previous,
            since: rfc3339(change.since),
            flags: FlagData::all(&change.flags),
            code: change.code.map(|it| it.name()),
            detail: change.detail.as_deref(),
            log: &change.log,
            attempt: change.attempt,
            next_retry_at: change.retry_in.map(|it| rfc3339(change.at + it)),
            epoch: change.ended.map(|it| it.epoch),
            frame: change.ended.and_then(|it| it.frames.checked_sub(1)),
            skipped: change.ended.map(|it| Counts(it.skipped)),
            decoder: decoder.as_ref().map(|(name, why)| DecoderData { name, why }),
        };
        Event {
            kind: Kind::StreamState,
            stream: Some(change.stream.id.clone()),
            epoch: change.ended.map(|it| it.epoch),
            source: source(instance, Some(&change.stream.id)),
            time: change.at,
            data: json(&data),
        }
    }

    /// What the daemon did.
    pub fn daemon(instance: &str, state: DaemonState, detail: Option<&str>) -> Event {
        let data = DaemonData {
            state: state.name(),
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            detail,
        };
        Event {
            kind: Kind::Daemon,
            stream: None,
            epoch: None,
            source: source(instance, None),
            time: SystemTime::now(),
            data: json(&data),
        }
    }

    /// The complete JSON object, on one line, with the id that its place in the journal gives it.
    pub fn envelope(&self, journal: &str, seq: u64) -> String {
        self.envelope_with(&format!("{journal}-{seq:020}"), seq)
    }

    /// The complete JSON object with an id of its own: for gap events, which are made for one
    /// reader and lie in no journal.
    pub fn envelope_with(&self, id: &str, seq: u64) -> String {
        let envelope = Envelope {
            specversion: "1.0",
            id,
            source: &self.source,
            kind: self.kind.name(),
            subject: self.stream.as_deref(),
            time: rfc3339(self.time),
            datacontenttype: "application/json",
            dataschema: self.kind.schema(),
            sequence: sequence(seq),
        };
        let mut text = json(&envelope);
        text.reserve(self.data.len() + 9);
        text.pop();
        text.push_str(",\"data\":");
        text.push_str(&self.data);
        text.push('}');
        text
    }
}

/// What the daemon did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonState {
    /// It runs.
    Started,
    /// It was told to stop and finishes what it has.
    Draining,
    /// It has finished.
    Stopped,
    /// It follows a new configuration.
    Reloaded,
    /// A new configuration was wrong; it follows the old one.
    Refused,
    /// Retention will soon remove events that a sink has not delivered.
    SinkAtRisk,
}

impl DaemonState {
    /// Every state.
    pub const ALL: [DaemonState; 6] = [
        DaemonState::Started,
        DaemonState::Draining,
        DaemonState::Stopped,
        DaemonState::Reloaded,
        DaemonState::Refused,
        DaemonState::SinkAtRisk,
    ];

    /// The name in events.
    pub fn name(self) -> &'static str {
        match self {
            DaemonState::Started => "started",
            DaemonState::Draining => "draining",
            DaemonState::Stopped => "stopped",
            DaemonState::Reloaded => "config_reloaded",
            DaemonState::Refused => "config_refused",
            DaemonState::SinkAtRisk => "sink_at_risk",
        }
    }
}

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("the event structs have string keys only")
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a string does not fail");
}

#[derive(Serialize)]
struct Envelope<'a> {
    specversion: &'a str,
    id: &'a str,
    source: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    time: String,
    datacontenttype: &'a str,
    dataschema: &'a str,
    sequence: String,
}

#[derive(Serialize)]
struct FrameData<'a> {
    stream: &'a str,
    region: &'a str,
    epoch: u64,
    frame: u64,
    pts_ns: u64,
    time_source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_error_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_offset_ms: Option<i64>,
    ingest_time: String,
    width: u32,
    height: u32,
    model: Model<'a>,
    device: &'a str,
    batch_size: u32,
    top: Vec<Label<'a>>,
    skipped: Counts,
    quality: QualityData,
    latency_us: Latency,
}

#[derive(Serialize)]
struct Model<'a> {
    name: &'a str,
    weights: String,
    labels: &'a str,
    precision: &'a str,
}

#[derive(Serialize)]
struct Label<'a> {
    rank: u32,
    label_id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    wnid: Option<&'a str>,
    label: &'a str,
    confidence: f64,
}

#[derive(Serialize)]
struct StateData<'a> {
    stream: &'a str,
    state: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<&'a str>,
    since: String,
    flags: Vec<FlagData>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    log: &'a [String],
    attempt: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_retry_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frame: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<Counts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decoder: Option<DecoderData<'a>>,
}

#[derive(Serialize)]
struct DecoderData<'a> {
    name: &'a str,
    why: &'a str,
}

#[derive(Serialize)]
struct DaemonData<'a> {
    state: &'a str,
    version: &'a str,
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
}

#[cfg(test)]
mod tests;
