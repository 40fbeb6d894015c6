//! What the loop of a sink asks of a broker, and what a broker says of a failure.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use crate::event::Kind;

/// The journal does not make a frame wait for longer: what looks so is a wall clock that was set.
const WAITED_MAX: Duration = Duration::from_secs(60);

/// One event on its way to a broker.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Its place in the journal.
    pub seq: u64,
    /// The event's id: the same on every retry, and in every sink.
    pub id: String,
    /// What it is about; the last part of its name on the broker.
    pub topic: Topic,
    /// The stream that it belongs to, if to one.
    pub stream: Option<String>,
    /// The complete JSON object.
    pub json: String,
    /// When it was appended to the journal.
    pub appended: SystemTime,
}

impl Message {
    /// How long the frame took from its arrival into the journal; `None` for other events.
    pub fn took(&self) -> Option<Duration> {
        let after = |name: &str| Some(self.json.split_once(name)?.1);
        let (text, _) = after(r#""ingest_time":""#)?.split_once('"')?;
        let format = &time::format_description::well_known::Rfc3339;
        let arrived = SystemTime::from(time::OffsetDateTime::parse(text, format).ok()?);
        let took = self.appended.duration_since(arrived).unwrap_or_default();
        let total = after(r#""latency_us":{"#).and_then(|it| it.split_once(r#""total":"#));
        let total = total.and_then(|it| it.1.split(['}', ',']).next()?.parse().ok());
        let Some(labelled) = total.map(Duration::from_micros) else { return Some(took) };
        // The wall clock was set between the two. What the journal made it wait is not known then.
        let is_set = took < labelled || labelled + WAITED_MAX < took;
        Some(if is_set { labelled } else { took })
    }

    /// The journal's id, the first part of the event's.
    pub fn journal(&self) -> &str {
        self.id.split('-').next().expect("split gives at least one part")
    }

    /// The stream, or what stands for it in names where there is none; no stream is called so.
    pub fn stream_or_none(&self) -> &str {
        self.stream.as_deref().unwrap_or("_")
    }
}

/// The classes of events that have names of their own on brokers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    /// Frames with their labels.
    Frames,
    /// Changes of a stream's state.
    State,
    /// Events that this sink will never get.
    Gap,
    /// What the daemon itself did.
    Daemon,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Topic; 4] = [Topic::Frames, Topic::State, Topic::Gap, Topic::Daemon];

    /// The part of the name on a broker.
    pub fn name(self) -> &'static str {
        match self {
            Topic::Frames => "frames",
            Topic::State => "state",
            Topic::Gap => "gap",
            Topic::Daemon => "daemon",
        }
    }

    /// The topic of a kind of event.
    pub fn of(kind: Kind) -> Topic {
        match kind {
            Kind::FrameClassified => Topic::Frames,
            Kind::StreamState => Topic::State,
            Kind::JournalGap => Topic::Gap,
            Kind::Daemon => Topic::Daemon,
        }
    }
}

/// Why something was not acknowledged. The name is the `code` of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Nobody listens there.
    Refused,
    /// No answer in time.
    Timeout,
    /// User, password or permission refused.
    Auth,
    /// The certificate, or TLS itself.
    Tls,
    /// The host name is not known.
    Dns,
    /// The stream, topic or path is not there and could not be made.
    NotFound,
    /// This message is larger than the broker takes; it will never be taken.
    TooLarge,
    /// The broker has no room.
    Full,
    /// Whoever read what is written has gone for good: the sink ends, and the daemon with it.
    Closed,
    /// Anything else.
    Error,
}

impl Code {
    /// Every code.
    pub const ALL: [Code; 10] = [
        Code::Refused,
        Code::Timeout,
        Code::Auth,
        Code::Tls,
        Code::Dns,
        Code::NotFound,
        Code::TooLarge,
        Code::Full,
        Code::Closed,
        Code::Error,
    ];

    /// The value of the label `code`.
    pub fn name(self) -> &'static str {
        match self {
            Code::Refused => "refused",
            Code::Timeout => "timeout",
            Code::Auth => "auth",
            Code::Tls => "tls",
            Code::Dns => "dns",
            Code::NotFound => "not_found",
            Code::TooLarge => "too_large",
            Code::Full => "full",
            Code::Closed => "closed",
            Code::Error => "error",
        }
    }
}

/// Why a connection was not made, or a message was not acknowledged.
#[derive(Debug)]
pub struct Fault {
    /// What kind of failure it is.
    pub code: Code,
    /// What happened and where, without secrets.
    pub error: anyhow::Error,
    /// When the broker asked to be tried again, if it did.
    pub retry_after: Option<Duration>,
}

impl Fault {
    /// A fault with what happened.
    pub fn new(code: Code, error: impl Into<anyhow::Error>) -> Fault {
        Fault { code, error: error.into(), retry_after: None }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#}", self.code.name(), self.error)
    }
}

/// Takes the acknowledgements of one call of [`Broker::deliver`], in the order of its messages.
pub struct Acks<'a> {
    count: usize,
    told: &'a mut dyn FnMut(usize, bool),
}

impl<'a> Acks<'a> {
    /// Calls `told` with the index of each message that is acknowledged, and whether the broker
    /// had it already.
    pub fn new(told: &'a mut dyn FnMut(usize, bool)) -> Acks<'a> {
        Acks { count: 0, told }
    }

    /// The next message in order is acknowledged: the broker has taken the responsibility.
    pub fn next(&mut self, duplicate: bool) {
        (self.told)(self.count, duplicate);
        self.count += 1;
    }

    /// How many messages are acknowledged: the first ones, without a hole.
    pub fn count(&self) -> usize {
        self.count
    }
}

/// One broker. Its futures run on a thread of the sink's own, so they need not be `Send`; tasks
/// that it spawns run whenever the sink waits for something.
#[allow(async_fn_in_trait, reason = "nobody outside this crate implements or boxes it")]
pub trait Broker {
    /// Connects, or connects anew, and makes what is missing on the broker. What was sent before
    /// and not acknowledged is forgotten: it will be sent again. Bounded in time.
    ///
    /// # Errors
    /// A [`Fault`]; the caller backs off and calls again.
    async fn connect(&mut self) -> Result<(), Fault>;

    /// Sends the messages in order, many in flight at once, and tells of each acknowledgement. At
    /// the first message that is not acknowledged it sends no more: order is kept.
    ///
    /// # Errors
    /// Why the message after the last acknowledged one was not; [`Code::Timeout`] if no
    /// acknowledgement came for too long. After [`Code::TooLarge`] the connection can go on being
    /// used and nothing is in flight; after any other the caller connects anew.
    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault>;

    /// Returns when the connection is found to be lost; never, for a broker that cannot tell.
    /// Called while there is nothing to deliver, and dropped when there is.
    async fn lost(&mut self) -> Fault;

    /// Says good-bye, bounded in time. Nothing is in flight.
    async fn close(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frames_way_into_the_journal_does_not_follow_a_wall_clock_that_is_set_on_it() {
        let took = |data: &str, appended_s: f64| {
            let at = |s: f64| SystemTime::UNIX_EPOCH + Duration::from_secs_f64(s);
            let (id, topic) = ("J-1".to_owned(), Topic::Frames);
            let json = format!(r#"{{"data":{{{data}}}}}"#);
            let appended = at(1_795_485_312.0 + appended_s);
            Message { seq: 1, id, topic, stream: None, json, appended }.took()
        };
        let frame = r#""ingest_time":"2026-11-24T01:55:12.000000Z","latency_us":{"decode":1,"total":13440}"#;
        let ms = Duration::from_millis;
        assert_eq!(took(frame, 0.5), Some(ms(500)));
        for set in [-3_600.0, 3_600.0] {
            assert_eq!(took(frame, 0.5 + set), Some(Duration::from_micros(13_440)), "{set}");
        }
        assert_eq!(took(r#""ingest_time":"2026-11-24T01:55:12Z""#, 0.5), Some(ms(500)));
        assert_eq!(took(r#""state":"up""#, 0.5), None);
    }
}
