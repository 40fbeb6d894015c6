//! Where frames are born: opens a stream, reads it, numbers its pictures, and tries again.
//!
//! A source is the only stage that looks at the stop token. What GStreamer does is in [`gst`]; the
//! rules are in [`clock`] and [`supervise`]; this file only puts them together.

pub mod clock;
pub mod fingerprint;
pub mod gst;
pub mod supervise;
pub mod url;

use std::{
    mem,
    path::PathBuf,
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    frame::{Code, EpochEnd, Frame, Meta, Picture, Skipped, State, StateChange, Timing},
    jitter,
    ledger::{InFlight, Stream},
    secret::Secret,
    source::{
        clock::{Clock, Sampler, Seen},
        fingerprint::Fingerprint,
        supervise::{Backoff, GOOD_AFTER},
        url::{SourceUrl, Transport, UrlError},
    },
    stage::{Reason, StageName},
};

/// Everything that is configured about one stream.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Where it comes from.
    pub url: SourceUrl,
    /// User name for the camera.
    pub username: Option<Secret>,
    /// Password for the camera.
    pub password: Option<Secret>,
    /// How RTP is carried.
    pub transport: Transport,
    /// Size of the jitter buffer.
    pub latency: Duration,
    /// A live stream without a picture for this long (and for five picture periods) has failed.
    pub stall_after: Duration,
    /// At most so many pictures per second go on; `None` for all.
    pub max_fps: Option<f64>,
    /// A file or test pattern comes at its own rate instead of as fast as it can be taken.
    pub realtime: bool,
    /// A file starts over when it has ended.
    pub looped: bool,
    /// Largest width and height that is decoded.
    pub limits: (u32, u32),
    /// When a file was recorded: its pictures' time is this plus their PTS.
    pub start_time: Option<SystemTime>,
    /// Whom to trust.
    pub tls: Tls,
    /// Threads of the decoder, from 1.
    pub decode_threads: u32,
}

/// Whom a TLS connection trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Whether the certificate is checked at all.
    pub verify: bool,
    /// Authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// The one certificate to trust, whoever has signed it. Only for RTSP.
    pub fingerprint: Option<Fingerprint>,
}

impl Spec {
    /// The defaults for a URL or path, with the credentials that are written into it.
    ///
    /// # Errors
    /// What is wrong with the URL, without quoting it.
    pub fn parse(url: &str) -> Result<Spec, UrlError> {
        let parsed = SourceUrl::parse(url)?;
        Ok(Spec {
            url: parsed.url,
            username: parsed.username,
            password: parsed.password,
            transport: Transport::Tcp,
            latency: Duration::from_millis(200),
            stall_after: Duration::from_secs(4),
            max_fps: None,
            realtime: false,
            looped: false,
            limits: (7680, 4320),
            start_time: None,
            tls: Tls { verify: true, ca_file: None, fingerprint: None },
            decode_threads: 1,
        })
    }
}

/// One connection to one camera, or one run of a file. A trait for test injection.
pub trait Source: Send {
    /// What comes next, within a quarter of a second.
    ///
    /// # Errors
    /// Whatever broke the connection; the caller opens a new one.
    fn next(&mut self) -> Result<Next, SourceError>;
}

/// What [`Source::next`] gives.
#[derive(Debug)]
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
    /// Whether the decoder marked it as broken.
    pub corrupt: bool,
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

/// Opens one stream again and again. A trait for test injection.
pub trait Opener: Send {
    /// Starts a connection. Does not wait for the first picture.
    ///
    /// # Errors
    /// What cannot work, as far as that is known at once.
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError>;

    /// Whether the end of the stream is a failure, after which it is opened again.
    fn is_live(&self) -> bool;
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
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// At most so many pictures per second go on; `None` for all.
    pub max_fps: Option<f64>,
    /// Start over at the end.
    pub looped: bool,
    /// When a file was recorded.
    pub start_time: Option<SystemTime>,
    /// The epoch of the first pictures.
    pub first_epoch: u64,
}

impl Settings {
    /// The settings in `spec`.
    pub fn new(spec: &Spec, first_epoch: u64) -> Settings {
        Settings {
            max_fps: spec.max_fps,
            looped: spec.looped,
            start_time: spec.start_time,
            first_epoch,
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
    let mut reader = Reader {
        clock: Clock::new(settings.first_epoch, settings.start_time),
        sampler: settings.max_fps.and_then(Sampler::new),
        stream,
        output,
        stop,
        skipped: Skipped::default(),
        told: None,
        attempt: 0,
        backoff: Backoff::default(),
    };
    reader.run(opener, settings.looped).unwrap_or(End::Closed)
}

/// The loop's state.
struct Reader<'a> {
    stream: Arc<Stream>,
    output: &'a mut dyn Output,
    stop: &'a CancellationToken,
    clock: Clock,
    /// `None` iff every picture goes on.
    sampler: Option<Sampler>,
    /// What ended since the last frame handed on, in the running epoch.
    skipped: Skipped,
    /// The state that went out last, and its reason.
    told: Option<(State, Option<Code>)>,
    /// Tries since the stream was last up.
    attempt: u32,
    backoff: Backoff,
}

/// How one connection ended.
enum Broke {
    Stopped,
    Eos { pictures: bool },
    Failed(SourceError),
}

impl Reader<'_> {
    fn run(&mut self, opener: &mut dyn Opener, looped: bool) -> Result<End, Closed> {
        let mut again = false;
        loop {
            self.attempt = self.attempt.saturating_add(1);
            // Later tries of one outage are told by nothing but the state they end in.
            if self.attempt == 1 && !again {
                self.tell(State::Connecting, None, None)?;
            }
            let error = match self.connection(opener)? {
                Broke::Stopped => {
                    self.tell(State::Removed, None, None)?;
                    return Ok(End::Stopped);
                }
                // Without a picture, starting over would spin.
                Broke::Eos { pictures: true } if looped && !opener.is_live() => {
                    self.tell(State::Up, None, None)?;
                    self.attempt = 0;
                    again = true;
                    continue;
                }
                Broke::Eos { .. } if !opener.is_live() => {
                    self.tell(State::Ended, None, None)?;
                    return Ok(End::Ended);
                }
                Broke::Eos { .. } => {
                    SourceError { code: Code::Eos, detail: "the live stream ended".to_owned() }
                }
                Broke::Failed(error) => error,
            };
            if !opener.is_live() {
                self.tell(State::Down, Some(error), None)?;
                return Ok(End::Failed);
            }
            let was_up = matches!(self.told, Some((State::Up, _)));
            let state = if error.code == Code::Stall { State::Stalled } else { State::Down };
            let pause = self.backoff.next(error.code, jitter::random());
            self.tell(state, Some(error), Some(pause))?;
            if was_up {
                self.attempt = 0;
            }
            wait(self.stop, pause);
        }
    }

    /// One try: opens the stream and reads until that breaks.
    fn connection(&mut self, opener: &mut dyn Opener) -> Result<Broke, Closed> {
        let good = self.stream.connects.load(Relaxed);
        let broke = self.read(opener)?;
        if !matches!(broke, Broke::Stopped) && self.stream.connects.load(Relaxed) == good {
            self.stream.connects_failed.fetch_add(1, Relaxed);
        }
        Ok(broke)
    }

    fn read(&mut self, opener: &mut dyn Opener) -> Result<Broke, Closed> {
        if self.stop.is_cancelled() {
            return Ok(Broke::Stopped);
        }
        let mut source = match opener.open() {
            Ok(source) => source,
            Err(error) => return Ok(Broke::Failed(error)),
        };
        let mut first = None;
        while !self.stop.is_cancelled() {
            let decoded = match source.next() {
                Ok(Next::Picture(decoded)) => decoded,
                Ok(Next::Idle) => continue,
                Ok(Next::Eos) => return Ok(Broke::Eos { pictures: first.is_some() }),
                Err(error) => return Ok(Broke::Failed(error)),
            };
            if first.is_none() {
                self.stream.connects.fetch_add(1, Relaxed);
                self.tell(State::Up, None, None)?;
            }
            let first = *first.get_or_insert(decoded.decoded);
            if GOOD_AFTER <= decoded.decoded.saturating_duration_since(first) {
                self.backoff.reset();
            }
            self.picture(decoded)?;
        }
        Ok(Broke::Stopped)
    }

    /// Numbers a picture and hands it on, or counts why not.
    fn picture(&mut self, decoded: Decoded) -> Result<(), Closed> {
        let mut frame = InFlight::decoded(self.stream.clone());
        let since = decoded.arrived_wall.duration_since(SystemTime::UNIX_EPOCH);
        let ms = u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        self.stream.last_frame_ms.store(ms, Relaxed);

        let Decoded { picture, pts, arrived, arrived_wall, captured, .. } = decoded;
        let side = |it: usize| u32::try_from(it).expect("a side within the configured limit");
        let size = (side(picture.width), side(picture.height));
        self.stream.set_size(size);
        let seen = Seen { pts, arrived, arrived_wall, captured };
        if self.clock.breaks(&seen) {
            self.tell(State::Up, None, None)?;
        }
        let stamp = self.clock.stamp(&seen);
        let reason = if decoded.corrupt {
            Some(Reason::Corrupt)
        } else if self.sampler.as_mut().is_some_and(|it| !it.keeps(stamp.pts)) {
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
            time_source: stamp.source,
            ingest_time: arrived_wall,
            size,
            timing: Timing::at(arrived, decoded.decoded),
            skipped: mem::take(&mut self.skipped),
        };
        self.output.frame(Frame { meta, picture }, self.stop)
    }

    /// Ends the running epoch and tells the state, unless that would be no news.
    fn tell(
        &mut self,
        state: State,
        error: Option<SourceError>,
        retry_in: Option<Duration>,
    ) -> Result<(), Closed> {
        let ended = self.clock.end_epoch().map(|(epoch, frames)| {
            let skipped = mem::take(&mut self.skipped);
            EpochEnd { epoch, frames, skipped }
        });
        if let Some(sampler) = &mut self.sampler {
            sampler.reset();
        }
        let code = error.as_ref().map(|it| it.code);
        let news = self.told != Some((state, code));
        if let Some(error) = &error {
            let (stream, code) = (&self.stream.id, error.code.name());
            if news {
                warn!(stream, code, %error, ?retry_in, "the stream failed");
            } else {
                debug!(stream, code, %error, ?retry_in, "the stream failed again");
            }
        }
        if !news && ended.is_none() {
            return Ok(());
        }
        self.told = Some((state, code));
        self.stream.set_state(state);
        let change = StateChange {
            stream: self.stream.clone(),
            state,
            code,
            detail: error.map(|it| it.detail),
            attempt: self.attempt,
            retry_in,
            at: SystemTime::now(),
            ended,
        };
        self.output.state(change, self.stop)
    }
}

/// Sleeps for `duration`, or until the token fires. Needs no runtime.
pub fn wait(stop: &CancellationToken, duration: Duration) {
    let deadline = Instant::now() + duration;
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut cancelled = pin!(stop.cancelled());
    while cancelled.as_mut().poll(&mut context).is_pending() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
