//! Where frames are born: opens a stream, reads it, numbers its pictures, and tries again.
//!
//! A source is the only stage that looks at the stop token. What is configured is in [`spec`], what
//! GStreamer does in [`gst`]; the rules are in [`supervise`] (what next), [`watch`] (what is
//! silence), [`gate`] (who may connect), [`reach`] (who answers), [`quiet`] and [`agree`] (what is logged),
//! [`needed`] (what is decoded), [`clock`] (numbers and times) and [`offset`] (how good those are); this file only puts them together.
//! [`probe`] opens a stream once and says what comes, with [`facts`].

pub mod agree;
pub mod clock;
pub mod facts;
pub mod fingerprint;
pub mod gate;
pub mod gst;
pub mod needed;
pub mod offset;
pub mod pause;
pub mod probe;
pub mod quiet;
pub mod reach;
pub mod spec;
pub mod supervise;
pub mod url;
pub mod watch;

use std::{
    mem,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

pub use spec::{Decode, Spec, Tls};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    frame::{Code, EpochEnd, Frame, Meta, Picture, Skipped, State, StateChange, Timing},
    health::{Flag, Flags, Quality},
    jitter,
    ledger::{InFlight, Stream},
    source::{
        agree::Agree,
        clock::{Clock, Sampler, Seen},
        gate::{Denied, Gate, Peer, Permit},
        offset::Reports,
        pause::wait,
        quiet::Quiet,
        supervise::{Broke, Leave, Supervisor, Tell, Then},
    },
    stage::{Reason, StageName},
};

/// One connection to one camera, or one run of a file. A trait for test injection.
pub trait Source: Send {
    /// What comes next, within a quarter of a second.
    ///
    /// # Errors
    /// Whatever broke the connection; the caller opens a new one.
    fn next(&mut self) -> Result<Next, SourceError>;

    /// Whether data has come: others may connect now.
    fn is_connected(&self) -> bool {
        true
    }

    /// Whether the password was taken: others may try it now.
    fn is_signed_in(&self) -> bool {
        true
    }
}

/// What [`Source::next`] gives.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly all are pictures, and none is kept")]
pub enum Next {
    /// A picture.
    Picture(Decoded),
    /// Nothing yet: lets the loop look at its stop token.
    Idle,
    /// The stream has ended.
    Eos,
}

/// A picture as it left the decoder.
#[derive(Debug)]
pub struct Decoded {
    /// The pixels.
    pub picture: Picture,
    /// Presentation time in the stream, if it has one.
    pub pts: Option<Duration>,
    /// When its data left the depayloader or demuxer, by the monotonic clock.
    pub arrived: Instant,
    /// The same, by the wall clock.
    pub arrived_wall: SystemTime,
    /// When the decoder was done.
    pub decoded: Instant,
    /// When the camera says that it took it, through RTCP.
    pub captured: Option<SystemTime>,
    /// What its reports of that have said.
    pub reports: Option<Reports>,
    /// Whether the decoder marked it as broken, or something before it was lost.
    pub corrupt: bool,
    /// Which label it can have, of labels that are numbered in order; `None` if that was not decided
    /// before the decoder.
    pub label: Option<u64>,
}

/// Why a connection failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct SourceError {
    /// The kind of failure.
    pub code: Code,
    /// What it said, without secrets and control characters.
    pub detail: String,
}

impl SourceError {
    /// Whether the server may have taken the password, and refused this stream only.
    pub fn is_forbidden(&self) -> bool {
        self.code == Code::Auth && self.detail.contains("Forbidden")
    }
}

/// Opens one stream again and again. A trait for test injection.
pub trait Opener: Send {
    /// Starts a connection. Does not wait for the first picture.
    ///
    /// # Errors
    /// What cannot work, as far as that is known at once.
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError>;

    /// Whether the end of the stream is a failure, after which it is opened again.
    fn is_live(&self) -> bool;

    /// Whom it connects to; `None` iff it needs no network.
    fn peer(&self, _gate: &Gate) -> Option<Peer> {
        None
    }

    /// Whether what failed was a decoder that is not used again, so that a file is opened once more.
    fn gives_way(&self) -> bool {
        false
    }

    /// Finds out whether the host answers at all, before a place among those that connect is
    /// taken: hosts that are gone must not hold up the others.
    ///
    /// # Errors
    /// Why it does not answer.
    fn reach(&mut self, _stop: &CancellationToken) -> Result<(), SourceError> {
        Ok(())
    }

    /// The last lines that were said about the last connection, without secrets.
    fn said(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What the loop hands on to. Implemented by the frame edge.
pub trait Output {
    /// Takes a frame. A live edge never waits: the new frame takes the place of the one waiting,
    /// together with its [`Meta::skipped`]. A file's edge waits for room, or for `stop`.
    ///
    /// # Errors
    /// [`Closed`] if nobody takes frames any more.
    fn frame(&mut self, frame: Frame, stop: &CancellationToken) -> Result<(), Closed>;

    /// Takes what happened to the stream, after all frames before it. Must succeed after `stop`
    /// too: the last change closes the account of the stream.
    ///
    /// # Errors
    /// [`Closed`] if nobody takes changes any more.
    fn state(&mut self, change: StateChange, stop: &CancellationToken) -> Result<(), Closed>;
}

/// The stage after is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stage after the source is gone")]
pub struct Closed;

/// What the loop needs of the [`Spec`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// At most so many pictures per second go on; `None` for all.
    pub max_fps: Option<f64>,
    /// Start over at the end.
    pub looped: bool,
    /// When a file was recorded.
    pub start_time: Option<SystemTime>,
    /// The camera's clock dates pictures only while it differs from ours by at most this.
    pub max_clock_offset: Duration,
    /// The epoch of the first pictures.
    pub first_epoch: u64,
    /// Who may connect: the streams that share it wait for one another.
    pub gate: Arc<Gate>,
    /// What to say last when it is stopped; if nothing is set by then, that it is removed.
    pub leave: Arc<OnceLock<Leave>>,
}

impl Settings {
    /// The settings in `spec`, for a stream that shares its gate with no other.
    pub fn new(spec: &Spec, first_epoch: u64) -> Settings {
        Settings {
            max_fps: spec.max_fps,
            looped: spec.looped,
            start_time: spec.start_time,
            max_clock_offset: spec.max_clock_offset,
            first_epoch,
            gate: Arc::default(),
            leave: Arc::default(),
        }
    }
}

/// Why [`run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The file has ended; its last state is `ended`.
    Ended,
    /// The file cannot be read; its last state is `down`.
    Failed,
    /// The stop token fired; the last state is `removed`.
    Stopped,
    /// The stage after is gone.
    Closed,
}

/// Reads a stream until it ends for good, the stop token fires or the pipeline is gone.
///
/// The last thing that goes out is a state which closes the account of the last epoch.
pub fn run(
    opener: &mut dyn Opener,
    stream: Arc<Stream>,
    settings: Settings,
    output: &mut dyn Output,
    stop: &CancellationToken,
) -> End {
    stream.set_max_clock_offset(settings.max_clock_offset);
    let mut reader = Reader {
        clock: Clock::new(settings.first_epoch, settings.start_time, settings.max_clock_offset),
        sampler: settings.max_fps.and_then(Sampler::new),
        gate: settings.gate,
        supervisor: Supervisor::new(settings.looped).leaving(settings.leave),
        stream,
        output,
        stop,
        skipped: Skipped::default(),
        told: None,
        said: Vec::new(),
        quiet: Quiet::default(),
        agree: Agree::new(settings.max_clock_offset),
    };
    reader.run(opener).unwrap_or(End::Closed)
}

/// The loop's state.
struct Reader<'a> {
    stream: Arc<Stream>,
    output: &'a mut dyn Output,
    stop: &'a CancellationToken,
    gate: Arc<Gate>,
    supervisor: Supervisor,
    clock: Clock,
    /// `None` iff every picture goes on.
    sampler: Option<Sampler>,
    /// What ended since the last frame handed on, in the running epoch.
    skipped: Skipped,
    /// The state that went out last, and its reason.
    told: Option<(State, Option<Code>)>,
    /// What was said about the connection that has just failed.
    said: Vec<String>,
    /// What failures were logged when.
    quiet: Quiet,
    /// What was logged of the camera's clock.
    agree: Agree,
}

/// A connection that is still to be shut down.
type Opened = Option<Box<dyn Source>>;

impl Reader<'_> {
    fn run(&mut self, opener: &mut dyn Opener) -> Result<End, Closed> {
        loop {
            if !self.stop.is_cancelled()
                && let Some(tell) = self.supervisor.opening()
            {
                self.tell(tell)?;
            }
            let good = self.stream.connects.load(Relaxed);
            let (broke, source) = self.connection(opener)?;
            let tried = !matches!(broke, Broke::Stopped | Broke::Refused(_));
            if tried && self.stream.connects.load(Relaxed) == good {
                self.stream.connects_failed.fetch_add(1, Relaxed);
            }
            if matches!(broke, Broke::Eos | Broke::Failed(_)) {
                self.said = opener.said();
            }
            let again = opener.is_live() || opener.gives_way();
            let (tell, then) = self.supervisor.broke(broke, again, jitter::random());
            self.tell(tell)?;
            // Shutting it down can take seconds, and the news should not wait for that.
            drop(source);
            match then {
                Then::Open => {}
                Then::Wait(pause) => wait(self.stop, pause),
                Then::Over(end) => return Ok(end),
            }
        }
    }

    /// One try: waits until it may connect, opens the stream and reads until that breaks.
    fn connection(&mut self, opener: &mut dyn Opener) -> Result<(Broke, Opened), Closed> {
        if self.stop.is_cancelled() {
            return Ok((Broke::Stopped, None));
        }
        let Some(peer) = opener.peer(&self.gate) else { return self.read(opener, None) };
        if let Err(denied) = self.gate.turn(&peer, self.stop) {
            return Ok((denied.into(), None));
        }
        if let Err(error) = opener.reach(self.stop) {
            let stopped = self.stop.is_cancelled();
            return Ok((if stopped { Broke::Stopped } else { Broke::Failed(error) }, None));
        }
        let permit = match self.gate.permit(&peer, self.stop) {
            Ok(permit) => permit,
            Err(denied) => return Ok((denied.into(), None)),
        };
        self.read(opener, Some((permit, peer)))
    }

    fn read(
        &mut self,
        opener: &mut dyn Opener,
        permit: Option<(Permit, Peer)>,
    ) -> Result<(Broke, Opened), Closed> {
        let (mut permit, peer) = permit.unzip();
        let (gate, id) = (self.gate.clone(), self.stream.id.clone());
        // Before the permit goes, or the next with the same password would be let in.
        let failed = |error: SourceError| {
            if let (Code::Auth, Some(peer)) = (error.code, &peer) {
                gate.refused(peer, error.is_forbidden().then_some(&*id));
            }
            Broke::Failed(error)
        };
        let mut source = match opener.open() {
            Ok(source) => source,
            Err(error) => return Ok((failed(error), None)),
        };
        let mut first = true;
        while !self.stop.is_cancelled() {
            let next = source.next();
            if let Some(it) = &mut permit {
                if source.is_signed_in() {
                    it.signed_in();
                }
                if source.is_connected() || it.is_over() {
                    permit = None;
                }
            }
            let decoded = match next {
                Ok(Next::Picture(decoded)) => decoded,
                Ok(Next::Idle) => continue,
                Ok(Next::Eos) => return Ok((Broke::Eos, Some(source))),
                Err(error) => return Ok((failed(error), Some(source))),
            };
            if mem::take(&mut first) {
                self.stream.connects.fetch_add(1, Relaxed);
            }
            if let Some(tell) = self.supervisor.picture(decoded.decoded) {
                self.tell(tell)?;
            }
            self.picture(decoded)?;
        }
        Ok((Broke::Stopped, Some(source)))
    }

    /// Numbers a picture and hands it on, or counts why not.
    fn picture(&mut self, decoded: Decoded) -> Result<(), Closed> {
        let mut frame = InFlight::decoded(self.stream.clone());
        let since = decoded.arrived_wall.duration_since(SystemTime::UNIX_EPOCH);
        let ms = u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        self.stream.last_frame_ms.store(ms, Relaxed);

        let Decoded { picture, pts, arrived, arrived_wall, captured, reports, .. } = decoded;
        let side = |it: usize| u32::try_from(it).expect("a side within the configured limit");
        let size = (side(picture.width), side(picture.height));
        self.stream.set_size(size);
        let seen = Seen { pts, arrived, arrived_wall, captured, reports };
        if self.clock.breaks(&seen) {
            self.tell(self.supervisor.up())?;
        }
        let stamp = self.clock.stamp(&seen);
        self.stream.set_dated(Some(stamp.dated));
        self.agree.log(&self.stream.id, stamp.dated.clock_offset_ns, decoded.decoded);
        let corrupt = decoded.corrupt.then_some(Flag::Corrupt);
        let reason = if corrupt.is_some_and(|it| !self.stream.health().labels(&[it])) {
            Some(Reason::Corrupt)
        } else if self.sampler.as_mut().is_some_and(|it| !it.keeps(stamp.pts, decoded.label)) {
            Some(Reason::Rate)
        } else {
            None
        };
        if let Some(reason) = reason {
            frame.dropped(StageName::Source, reason);
            self.skipped.add(reason);
            return Ok(());
        }
        let meta = Meta {
            stream: frame,
            epoch: stamp.epoch,
            frame: stamp.frame,
            pts: stamp.pts,
            time: stamp.time,
            dated: stamp.dated,
            ingest_time: arrived_wall,
            size,
            timing: Timing::at(arrived, decoded.decoded),
            skipped: mem::take(&mut self.skipped),
            quality: Quality { flags: corrupt.into_iter().collect(), ..Quality::default() },
        };
        self.output.frame(Frame { meta, picture }, self.stop)
    }

    /// Ends the running epoch and tells the state, unless that would be no news.
    fn tell(&mut self, tell: Tell) -> Result<(), Closed> {
        let Tell { state, error, retry_in, attempt } = tell;
        let ended = self.clock.end_epoch().map(|(epoch, frames)| {
            let skipped = mem::take(&mut self.skipped);
            EpochEnd { epoch, frames, skipped }
        });
        if let Some(sampler) = &mut self.sampler {
            sampler.reset();
        }
        let code = error.as_ref().map(|it| it.code);
        let news = self.told != Some((state, code));
        let log = mem::take(&mut self.said);
        if let Some(error) = &error {
            self.log(error, &log, news, retry_in);
        }
        if !news && ended.is_none() {
            return Ok(());
        }
        self.told = Some((state, code));
        self.stream.set_state(state);
        if state != State::Up {
            self.stream.set_dated(None);
        }
        let now = SystemTime::now();
        let change = StateChange {
            stream: self.stream.clone(),
            state,
            code,
            detail: error.map(|it| it.detail),
            log,
            attempt,
            retry_in,
            at: now,
            since: now,
            // Known where the pictures are looked at, which the change is on its way to.
            flags: Flags::default(),
            ended,
        };
        self.output.state(change, self.stop)
    }

    /// Logs a failure, unless its like was logged a moment ago.
    fn log(&mut self, error: &SourceError, log: &[String], news: bool, retry: Option<Duration>) {
        let Some(said) = self.quiet.may_say(error.code, news, Instant::now()) else { return };
        let (stream, code) = (&self.stream.id, error.code.name());
        let left_out = said.left_out;
        for line in log {
            debug!(stream, code, line, "GStreamer said before the stream failed");
        }
        if said.loud {
            warn!(stream, code, %error, retry_in = ?retry, left_out, "the stream failed");
        } else {
            debug!(stream, code, %error, retry_in = ?retry, left_out, "the stream failed again");
        }
    }
}

impl From<Denied> for Broke {
    fn from(denied: Denied) -> Broke {
        match denied {
            Denied::Stopped => Broke::Stopped,
            Denied::Refused(left) => Broke::Refused(left),
        }
    }
}
