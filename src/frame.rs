//! What flows through the pipeline: one plain struct per boundary, in order.
//!
//! [`Frame`] -> [`Input`] -> [`Scores`] -> `Event`. Each carries the same [`Meta`]. Between the
//! stages they travel as [`Item`]s, so that what happened to a stream stays in its place between
//! the stream's frames.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    health::{Flags, Quality},
    ledger::{InFlight, Stream},
    stage::Reason,
};

/// Who a frame is and when it was where. Set by the source; later stages only add to [`Timing`].
///
/// It is never cloned: there is one for each frame in flight.
#[derive(Debug)]
pub struct Meta {
    /// The stream the frame belongs to, which counts it as in flight.
    pub stream: InFlight,
    /// Grows on reconnect, on a backward or large PTS jump and when a file starts over.
    pub epoch: u64,
    /// Position among the decoded frames of the epoch, from 0, dropped ones included.
    pub frame: u64,
    /// Presentation time in the stream.
    pub pts: Duration,
    /// When the picture was taken, as well as it is known; never backward inside an epoch.
    pub time: SystemTime,
    /// Where `time` comes from, and how good it is.
    pub dated: Dated,
    /// When the frame left the depayloader or demuxer, by the wall clock.
    pub ingest_time: SystemTime,
    /// Width and height of the decoded picture in pixels.
    pub size: (u32, u32),
    /// When the frame was where, by the monotonic clock.
    pub timing: Timing,
    /// Frames of this stream and epoch that ended between the frame before and this one.
    pub skipped: Skipped,
    /// What preprocess has measured in the picture, and what is wrong with it.
    pub quality: Quality,
}

/// Where a frame's time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeSource {
    /// The camera's clock, through RTCP sender reports.
    Rtcp,
    /// The configured start time of a file, plus the PTS.
    File,
    /// When the frame reached us.
    Arrival,
}

/// Where a frame's time comes from, and how good it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dated {
    /// Where it comes from.
    pub source: TimeSource,
    /// How far the time is at most from when the picture was taken, by this host's clock. `None` if
    /// nothing bounds it.
    pub error: Option<Duration>,
    /// The camera's clock less this host's in nanoseconds, by the fastest picture, whose way it is
    /// too small by. `None` if the camera does not tell its time.
    pub clock_offset_ns: Option<i64>,
}

impl TimeSource {
    /// Every source.
    pub const ALL: [TimeSource; 3] = [TimeSource::Rtcp, TimeSource::File, TimeSource::Arrival];

    /// The name in events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            TimeSource::Rtcp => "rtcp",
            TimeSource::File => "file",
            TimeSource::Arrival => "arrival",
        }
    }
}

/// Moments of one frame, by the monotonic clock. A moment not yet reached equals the one before.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The frame left the depayloader or demuxer.
    pub arrived: Instant,
    /// The decoded picture was offered to the frame edge.
    pub decoded: Instant,
    /// The batcher took it from the frame edge.
    pub taken: Instant,
    /// The model input was ready.
    pub preprocessed: Instant,
    /// The batch was closed and the device started on it.
    pub started: Instant,
    /// The device was done.
    pub inferred: Instant,
}

impl Timing {
    /// All moments at the time of decoding.
    pub fn at(arrived: Instant, decoded: Instant) -> Timing {
        Timing {
            arrived,
            decoded,
            taken: decoded,
            preprocessed: decoded,
            started: decoded,
            inferred: decoded,
        }
    }
}

/// Counts of frames that ended without a label, by [`Reason`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped([u32; Reason::ALL.len()]);

impl Skipped {
    /// Adds one frame.
    pub fn add(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: Skipped) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// How many ended for a reason.
    pub fn get(&self, reason: Reason) -> u32 {
        self.0[reason as usize]
    }

    /// Each reason with its count, those at zero left out.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u32)> + '_ {
        Reason::ALL.into_iter().zip(self.0).filter(|it| 0 < it.1)
    }

    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|it| u64::from(*it)).sum()
    }
}

/// A decoded picture with its identity.
#[derive(Debug)]
pub struct Frame {
    /// Identity.
    pub meta: Meta,
    /// The pixels, still in the decoder's buffer.
    pub picture: Picture,
}

/// A decoded picture, read in place through the buffer's own strides.
pub struct Picture {
    /// How the planes are laid out.
    pub layout: Layout,
    /// How YUV values map to RGB. Unused by [`Layout::Rgb`]; the range counts for `Gray8`.
    pub colour: Colour,
    /// Width in pixels, from 1.
    pub width: usize,
    /// Height in pixels, from 1.
    pub height: usize,
    /// Bytes from one row to the next, for each plane that the layout has.
    pub strides: [usize; 3],
    /// The planes' bytes.
    pub planes: Box<dyn Planes>,
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({:?} {}x{})", self.layout, self.width, self.height)
    }
}

/// The bytes of a picture, plane by plane. A trait so that the pixels can stay where the decoder
/// put them.
pub trait Planes: Send {
    /// All rows of one plane, from the first byte of its first row. The last row may end right
    /// after its last sample.
    fn plane(&self, index: usize) -> &[u8];
}

/// How the planes of a [`Picture`] are laid out. Chroma sizes round up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Three planes: Y, U, V; U and V have half the width and height.
    I420,
    /// Two planes: Y, then U and V interleaved at half the width and height.
    Nv12,
    /// One plane of R, G, B bytes.
    Rgb,
    /// One plane of grey values.
    Gray8,
}

/// How YUV values map to RGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colour {
    /// The luma coefficients.
    pub matrix: Matrix,
    /// `true`: 0..=255. `false`: Y 16..=235, UV 16..=240.
    pub full_range: bool,
    /// Where the chroma samples of a subsampled layout lie, horizontally.
    pub siting_x: Siting,
    /// The same, vertically.
    pub siting_y: Siting,
}

/// Luma coefficients by their standard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// ITU-R BT.601: Kr 0.299, Kb 0.114.
    Bt601,
    /// ITU-R BT.709: Kr 0.2126, Kb 0.0722.
    Bt709,
    /// ITU-R BT.2020, non-constant luminance: Kr 0.2627, Kb 0.0593.
    Bt2020,
}

/// Where a chroma sample lies among the two luma samples it covers in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Siting {
    /// On the first of the two (MPEG-2 horizontally).
    Cosited,
    /// Between the two (JPEG, and vertically in MPEG-2).
    Centre,
}

/// One model input.
#[derive(Debug)]
pub struct Input {
    /// Identity.
    pub meta: Meta,
    /// `[side, side, 3]`, rows top to bottom, RGB interleaved, not yet scaled or normalised.
    pub pixels: Box<[u8]>,
}

/// The model's answer for one input.
#[derive(Debug)]
pub struct Scores {
    /// Identity.
    pub meta: Meta,
    /// `[classes]`: raw logits.
    pub logits: Vec<f32>,
    /// How many frames were in the batch.
    pub batch_size: u32,
}

/// What a stage hands on: the next form of a frame, or what ended before it.
#[derive(Debug)]
pub enum Item<T> {
    /// The frame goes on.
    Frame(T),
    /// The frame ended here; whoever publishes the stream's next event accounts for it.
    Dropped(Box<Meta>, Reason),
    /// Something that happened to the stream between two of its frames.
    State(Box<StateChange>),
}

/// A stream's state has changed. Becomes a state event at its place in the stream.
#[derive(Clone, Debug)]
pub struct StateChange {
    /// Whose state.
    pub stream: Arc<Stream>,
    /// The new state.
    pub state: State,
    /// Why, if it is a failure.
    pub code: Option<Code>,
    /// What the failure said, without secrets.
    pub detail: Option<String>,
    /// The last lines that GStreamer logged about the connection that failed, without secrets.
    pub log: Vec<String>,
    /// Which try of connecting this is about, from 1.
    pub attempt: u32,
    /// When the next try is due, if one is.
    pub retry_in: Option<Duration>,
    /// When, by the wall clock.
    pub at: SystemTime,
    /// When the state began: before `at` if only something else has changed.
    pub since: SystemTime,
    /// What is wrong with its pictures.
    pub flags: Flags,
    /// `Some` iff an epoch with frames ended with this change.
    pub ended: Option<EpochEnd>,
}

/// How an epoch ended: what is needed to account for its last frames.
#[derive(Clone, Copy, Debug)]
pub struct EpochEnd {
    /// The epoch.
    pub epoch: u64,
    /// The number of frames decoded in it; the last one's number is one less.
    pub frames: u64,
    /// Frames that ended after the last one handed on.
    pub skipped: Skipped,
}

/// What a stream is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Opening, or waiting to open again.
    Connecting,
    /// Frames are coming.
    Up,
    /// Connected, but no frame has come for too long.
    Stalled,
    /// Failed.
    Down,
    /// A file has ended.
    Ended,
    /// Taken out of the configuration, or the daemon has stopped.
    Removed,
    /// Not opened until an operator enables it again.
    Disabled,
    /// Not opened: it has crashed the daemon too often.
    Quarantined,
}

impl State {
    /// Every state.
    pub const ALL: [State; 8] = [
        State::Connecting,
        State::Up,
        State::Stalled,
        State::Down,
        State::Ended,
        State::Removed,
        State::Disabled,
        State::Quarantined,
    ];

    /// The name in events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Up => "up",
            State::Stalled => "stalled",
            State::Down => "down",
            State::Ended => "ended",
            State::Removed => "removed",
            State::Disabled => "disabled",
            State::Quarantined => "quarantined",
        }
    }
}

/// Why a stream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// User name or password refused.
    Auth,
    /// The certificate is not trusted, or TLS failed.
    Tls,
    /// No answer in time.
    Timeout,
    /// The host name is unknown.
    Dns,
    /// The host refused the connection.
    Refused,
    /// No such file or stream.
    NotFound,
    /// No decoder, no video, or a picture that cannot be read.
    Codec,
    /// A live stream ended.
    Eos,
    /// Connected, but frames stopped.
    Stall,
    /// Anything else.
    Error,
}

impl Code {
    /// Every code.
    pub const ALL: [Code; 10] = [
        Code::Auth,
        Code::Tls,
        Code::Timeout,
        Code::Dns,
        Code::Refused,
        Code::NotFound,
        Code::Codec,
        Code::Eos,
        Code::Stall,
        Code::Error,
    ];

    /// The name in events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Code::Auth => "auth",
            Code::Tls => "tls",
            Code::Timeout => "timeout",
            Code::Dns => "dns",
            Code::Refused => "refused",
            Code::NotFound => "not_found",
            Code::Codec => "codec",
            Code::Eos => "eos",
            Code::Stall => "stall",
            Code::Error => "error",
        }
    }
}
