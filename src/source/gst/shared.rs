//! What the threads of one connection share with its reader: what came when, and what failed.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use gstreamer as gst;

use crate::{
    frame::Code,
    ledger::Stream,
    source::{
        SourceError,
        facts::Facts,
        gst::{damage::Damage, rtcp, said::Said},
        needed::Needed,
        offset::Reports,
        watch::Network,
    },
};

/// Encoded pictures whose arrival is remembered. More than any codec reorders.
const ARRIVALS_MAX: usize = 128;

/// What GStreamer's threads and the reader share.
#[derive(Debug)]
pub struct Shared {
    pub(super) stream: Arc<Stream>,
    pub(super) state: Mutex<State>,
    pub(super) facts: Arc<Mutex<Facts>>,
    /// Whether a video stream has been linked; the first one wins.
    pub(super) linked: AtomicBool,
    /// Whether the server has described its streams: it has taken the password then.
    pub(super) described: AtomicBool,
    pub(super) damage: Mutex<Damage>,
    /// `None` iff every picture is decoded.
    pub(super) needed: Mutex<Option<Needed>>,
    pub(super) said: Arc<Said>,
    /// Why a device that decoded this stream is not used again.
    pub(super) failed_device: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    arrivals: VecDeque<(gst::ClockTime, Arrival)>,
    pub(super) network: Network,
    reports: rtcp::Reading,
    pub(super) failure: Option<SourceError>,
}

/// When an encoded picture came.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub(super) mono: Instant,
    pub(super) wall: SystemTime,
    pub(super) captured: Option<SystemTime>,
    pub(super) reports: Option<Reports>,
}

impl Shared {
    /// An empty pipeline, which has the stream's name, and what GStreamer says about it is kept.
    pub fn pipeline(&self) -> gst::Pipeline {
        let pipeline = gst::Pipeline::with_name(&self.stream.id);
        self.said.about(&pipeline);
        pipeline
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the connection has shown.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which pictures are broken. Held for one of them, never longer.
    pub fn damage(&self) -> MutexGuard<'_, Damage> {
        self.damage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which pictures need to be decoded. Held for one of them, never longer.
    pub fn needed(&self) -> MutexGuard<'_, Option<Needed>> {
        self.needed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to link the video stream. `false` iff one is linked already.
    pub fn link(&self) -> bool {
        !self.linked.swap(true, Relaxed)
    }

    /// The server has described its streams.
    pub fn describe(&self) {
        self.state().reports.asked(Instant::now());
        self.described.store(true, Relaxed);
    }

    /// Whether the server has described its streams.
    pub fn is_described(&self) -> bool {
        self.described.load(Relaxed)
    }

    /// Whether a video stream has been linked.
    pub fn is_linked(&self) -> bool {
        self.linked.load(Relaxed)
    }

    /// Fails the connection, unless it has failed already.
    pub fn fail(&self, code: Code, detail: String) {
        self.state().failure.get_or_insert(SourceError { code, detail });
    }

    /// Whether the connection has failed.
    pub fn failed(&self) -> bool {
        self.state().failure.is_some()
    }

    /// Remembers what comes in before the decoder.
    pub fn set_codec(&self, codec: String) {
        self.stream.set_codec(codec);
    }

    /// Counts an encoded picture. `keyframe`: it needs no other.
    pub fn picture(&self, bytes: usize, pts: Option<Duration>, keyframe: bool) {
        self.stream.received.fetch_add(1, Relaxed);
        self.stream.received_bytes.fetch_add(bytes as u64, Relaxed);
        self.facts().picture(pts, keyframe);
        if keyframe {
            self.stream.keyframe();
            self.state().network.keyframe(Instant::now());
        }
    }

    /// Remembers that data has come, though it may be no whole picture.
    pub fn data(&self) {
        self.state().network.data(Instant::now());
    }

    /// Remembers when the picture with this PTS came first.
    pub fn arrived(&self, pts: Option<gst::ClockTime>, captured: Option<SystemTime>) {
        let (mono, wall) = (Instant::now(), SystemTime::now());
        let mut state = self.state();
        state.network.data(mono);
        let Some(pts) = pts else { return };
        if state.arrivals.iter().rev().take(4).any(|it| it.0 == pts) {
            return;
        }
        if state.arrivals.len() == ARRIVALS_MAX {
            state.arrivals.pop_front();
        }
        let reports = state.reports.get();
        state.arrivals.push_back((pts, Arrival { mono, wall, captured, reports }));
    }

    /// Remembers what a packet of RTCP says of the camera's clock.
    pub fn report(&self, packet: &[u8]) {
        self.state().reports.read(packet);
    }

    /// When the picture with this PTS came. Pictures leave the decoder in another order.
    pub(super) fn arrival(&self, pts: Option<gst::ClockTime>) -> Option<Arrival> {
        let mut state = self.state();
        let at = state.arrivals.iter().position(|it| Some(it.0) == pts)?;
        state.arrivals.remove(at).map(|it| it.1)
    }
}
