//! The account of every frame: what was decoded, published, dropped and where, per stream.
//!
//! Counters only move up, without locks. `decoded = published + dropped + in flight` is checked
//! by the daemon itself. *In flight* is never the remainder: it is the number of frames that exist,
//! counted as each [`Meta`] is made and dropped, so a stage that loses a frame is found out.

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    frame::{Dated, Item, Meta, State},
    health::{Settings, watch::Watch},
    stage::{Reason, StageName},
};

/// One stream: its name and its account. Shared by everything that handles its frames.
#[derive(Debug)]
pub struct Stream {
    /// The configured id; matches `^[a-z0-9][a-z0-9_-]{0,62}$`.
    pub id: String,
    /// Encoded frames that left the depayloader or demuxer.
    pub received: AtomicU64,
    /// Encoded bytes that left the depayloader or demuxer.
    pub received_bytes: AtomicU64,
    /// Encoded frames that were not decoded on purpose: they are not wanted, nor needed by others.
    pub left_out: AtomicU64,
    /// Pictures that left the decoder.
    pub decoded: AtomicU64,
    /// Events appended to the journal and committed.
    pub published: AtomicU64,
    /// Frames that exist now and have no outcome yet.
    in_flight: AtomicI64,
    /// By stage, then reason.
    dropped: [[AtomicU64; Reason::ALL.len()]; StageName::ALL.len()],
    /// Tries to connect that gave a first frame.
    pub connects: AtomicU64,
    /// Tries to connect that ended without one.
    pub connects_failed: AtomicU64,
    /// What comes in before the decoder; empty before that is known.
    codec: Mutex<String>,
    /// The decoder and why it was chosen; empty before that is known.
    decoder: Mutex<(String, String)>,
    /// Width and height of the last picture in pixels, as two halves; 0 before the first.
    size: AtomicU64,
    /// When the last decoded frame came, in milliseconds since the Unix epoch; 0 before the first.
    pub last_frame_ms: AtomicU64,
    /// How the last decoded frame is dated; `None` while none come.
    dated: Mutex<Option<Dated>>,
    /// By how much the camera's clock may differ from ours; set once it is read.
    max_clock_offset: OnceLock<Duration>,
    state: AtomicU8,
    /// Changes of state on their way to the journal.
    states_in_flight: AtomicI64,
    /// Encoded frames that need no other.
    keyframes: AtomicU64,
    health: Mutex<Watch>,
}

impl Stream {
    /// A stream that has seen nothing yet, with the default health settings.
    pub fn new(id: impl Into<String>) -> Stream {
        Stream::watched(id, Settings::default())
    }

    /// A stream that has seen nothing yet.
    pub fn watched(id: impl Into<String>, health: Settings) -> Stream {
        Stream {
            id: id.into(),
            received: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            decoded: AtomicU64::new(0),
            published: AtomicU64::new(0),
            in_flight: AtomicI64::new(0),
            dropped: Default::default(),
            connects: AtomicU64::new(0),
            connects_failed: AtomicU64::new(0),
            codec: Mutex::default(),
            decoder: Mutex::default(),
            size: AtomicU64::new(0),
            last_frame_ms: AtomicU64::new(0),
            dated: Mutex::default(),
            max_clock_offset: OnceLock::new(),
            state: AtomicU8::new(State::Connecting as u8),
            states_in_flight: AtomicI64::new(0),
            keyframes: AtomicU64::new(0),
            health: Mutex::new(Watch::new(health)),
        }
    }

    /// Counts one dropped frame.
    pub fn drop_one(&self, stage: StageName, reason: Reason) {
        self.dropped[stage as usize][reason as usize].fetch_add(1, Relaxed);
    }

    /// Frames dropped at a stage for a reason.
    pub fn dropped(&self, stage: StageName, reason: Reason) -> u64 {
        self.dropped[stage as usize][reason as usize].load(Relaxed)
    }

    /// All dropped frames.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().flatten().map(|it| it.load(Relaxed)).sum()
    }

    /// Frames that exist now and have no outcome yet.
    pub fn in_flight(&self) -> i64 {
        self.in_flight.load(Relaxed)
    }

    /// Frames without any outcome that exist no more; 0 unless a stage lost one. Exact only while
    /// no frame is moving.
    pub fn unaccounted(&self) -> i64 {
        let ended = self.published.load(Relaxed) + self.dropped_total();
        let missing = self.decoded.load(Relaxed) as i64 - ended as i64;
        missing - self.in_flight()
    }

    /// Sets what comes in before the decoder.
    pub fn set_codec(&self, codec: String) {
        *self.codec.lock().unwrap_or_else(PoisonError::into_inner) = codec;
    }

    /// Sets who decodes, and why.
    pub fn set_decoder(&self, name: &str, why: &str) {
        let decoder = (name.to_owned(), why.to_owned());
        *self.decoder.lock().unwrap_or_else(PoisonError::into_inner) = decoder;
    }

    /// Who decodes, and why. `None` before that is known, and where nothing is to be decoded.
    pub fn decoder(&self) -> Option<(String, String)> {
        let decoder = self.decoder.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (!decoder.0.is_empty()).then_some(decoder)
    }

    /// Sets the width and height of a decoded picture.
    pub fn set_size(&self, (width, height): (u32, u32)) {
        self.size.store(u64::from(width) << 32 | u64::from(height), Relaxed);
    }

    /// The codec, and width and height of the last picture. `None` before the first.
    pub fn info(&self) -> Option<(String, u32, u32)> {
        let size = self.size.load(Relaxed);
        let codec = self.codec.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (0 < size && !codec.is_empty()).then_some((codec, (size >> 32) as u32, size as u32))
    }

    /// An encoded frame that needs no other left the depayloader or demuxer.
    pub fn keyframe(&self) {
        self.keyframes.fetch_add(1, Relaxed);
    }

    /// Encoded frames that need no other; 0 if the source does not tell them apart.
    pub fn keyframes(&self) -> u64 {
        self.keyframes.load(Relaxed)
    }

    /// What is known of its pictures. Held for the look at one of them, never longer.
    pub fn health(&self) -> MutexGuard<'_, Watch> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how the last decoded frame is dated; `None` if no more come.
    pub fn set_dated(&self, dated: Option<Dated>) {
        *self.dated.lock().unwrap_or_else(PoisonError::into_inner) = dated;
    }

    /// Sets by how much the camera's clock may differ from ours; only the first time counts.
    pub fn set_max_clock_offset(&self, max: Duration) {
        self.max_clock_offset.get_or_init(|| max);
    }

    /// By how much the camera's clock may differ from ours; `None` before the stream is read.
    pub fn max_clock_offset(&self) -> Option<Duration> {
        self.max_clock_offset.get().copied()
    }

    /// How the last decoded frame is dated; `None` while none come.
    pub fn dated(&self) -> Option<Dated> {
        *self.dated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of state was sent on its way to the journal.
    pub fn state_sent(&self) {
        self.states_in_flight.fetch_add(1, Relaxed);
    }

    /// A change of state was committed.
    pub fn state_published(&self) {
        self.states_in_flight.fetch_sub(1, Relaxed);
    }

    /// Whether nothing of the stream is on its way to the journal.
    pub fn is_settled(&self) -> bool {
        self.in_flight() == 0 && self.states_in_flight.load(Relaxed) == 0
    }

    /// Sets what the stream is doing.
    pub fn set_state(&self, state: State) {
        self.state.store(state as u8, Relaxed);
    }

    /// What the stream is doing.
    pub fn state(&self) -> State {
        State::ALL[usize::from(self.state.load(Relaxed))]
    }
}

/// A stream, held by one of its frames on the way to an outcome.
#[derive(Debug)]
pub struct InFlight {
    stream: Arc<Stream>,
    /// Whether the frame still has no outcome.
    open: bool,
}

impl InFlight {
    /// Counts a frame as decoded and in flight.
    pub fn decoded(stream: Arc<Stream>) -> InFlight {
        stream.in_flight.fetch_add(1, Relaxed);
        stream.decoded.fetch_add(1, Relaxed);
        InFlight { stream, open: true }
    }

    /// The stream, to keep beyond the frame.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// The frame's outcome is a committed event.
    pub fn published(&mut self) {
        self.stream.published.fetch_add(1, Relaxed);
        self.close();
    }

    /// The frame's outcome is to be dropped.
    pub fn dropped(&mut self, stage: StageName, reason: Reason) {
        self.stream.drop_one(stage, reason);
        self.close();
    }

    fn close(&mut self) {
        assert!(self.open, "a frame has one outcome");
        self.open = false;
        self.stream.in_flight.fetch_sub(1, Relaxed);
    }
}

impl Deref for InFlight {
    type Target = Stream;

    fn deref(&self) -> &Stream {
        &self.stream
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.open {
            self.stream.in_flight.fetch_sub(1, Relaxed);
        }
    }
}

/// Counts a dropped frame and makes the item that carries it on.
pub fn dropped<T>(mut meta: Meta, stage: StageName, reason: Reason) -> Item<T> {
    meta.stream.dropped(stage, reason);
    Item::Dropped(Box::new(meta), reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_vanishes_without_an_outcome_is_unaccounted() {
        let stream = Arc::new(Stream::new("a"));
        let mut published = InFlight::decoded(stream.clone());
        let mut rejected = InFlight::decoded(stream.clone());
        let lost = InFlight::decoded(stream.clone());
        assert_eq!((stream.in_flight(), stream.unaccounted()), (3, 0));
        published.published();
        rejected.dropped(StageName::Preprocess, Reason::Error);
        assert_eq!((stream.in_flight(), stream.unaccounted()), (1, 0));
        drop((published, rejected));
        assert_eq!((stream.in_flight(), stream.unaccounted()), (1, 0));
        drop(lost);
        assert_eq!((stream.in_flight(), stream.unaccounted()), (0, 1));
    }
}
