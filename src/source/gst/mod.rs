//! One GStreamer pipeline per connection, from the network or disk to decoded pictures.
//!
//! This folder is the only place that says `gstreamer`. [`pipeline`] puts the elements together,
//! [`caps`] reads pictures in place, [`damage`] knows which are broken, [`decoders`] chooses who decodes
//! them and [`thin`] which pictures need it, [`tls`] whom to trust, [`rtcp`] reads what cameras say of their clocks, [`ssrc`] makes one
//! source of several, [`errors`] says in our words what went wrong, [`said`] keeps what GStreamer said
//! before, [`redact`] what of it nobody may read, [`shared`] what the threads of a connection share.
//! [`inventory`] is for `doctor`.

pub mod caps;
pub mod damage;
pub mod decoders;
pub mod errors;
pub mod inventory;
pub mod pipeline;
pub mod redact;
pub mod rtcp;
pub mod said;
pub mod shared;
pub mod ssrc;
pub mod thin;
pub mod tls;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use gstreamer::{self as gst, prelude::*};
use gstreamer_app as gst_app;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    crash,
    frame::Code,
    ledger::Stream,
    source::{
        Decoded, Next, Opener, Source, SourceError, Spec,
        facts::Facts,
        gate::{Gate, Peer},
        gst::{
            redact::Redactor,
            said::Said,
            shared::{Arrival, Shared},
        },
        needed::Needed,
        url::SourceUrl,
        watch::{Known, Watch},
    },
};

/// Longest wait for one sample, so that the loop sees its stop token.
const PULL_MAX: Duration = Duration::from_millis(200);

/// Longest time for a host to take a connection.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Longest wait for a pipeline to shut down; after that it is left to its thread.
const TEARDOWN_MAX: Duration = Duration::from_secs(2);

static CLOSING: AtomicU64 = AtomicU64::new(0);

/// Pipelines whose shutdown has not returned yet. Stays above 0 iff a plugin hangs.
pub fn closing() -> u64 {
    CLOSING.load(Relaxed)
}

/// The version of the GStreamer library, as it names itself.
pub fn version() -> String {
    gst::version_string().to_string()
}

/// Opens one configured stream.
#[derive(Debug)]
pub struct GstOpener {
    spec: Spec,
    stream: Arc<Stream>,
    /// An HTTP resource with a length is a file, whatever its scheme says.
    finite: Arc<AtomicBool>,
    /// What GStreamer said about the last connection.
    said: Arc<Said>,
    /// What the last connection showed.
    facts: Arc<Mutex<Facts>>,
    /// What the connections before have shown of its rate.
    known: Arc<Mutex<Known>>,
    device: Arc<Mutex<Device>>,
}

/// What is known of the device that decoded a stream.
#[derive(Debug, Default)]
struct Device {
    /// Why it is not used again.
    failed: Option<String>,
    /// Whether that has just been found.
    new: bool,
}

/// Starts GStreamer, once.
///
/// # Errors
/// It cannot be initialised.
pub fn start() -> Result<(), SourceError> {
    static ONCE: Once = Once::new();
    gst::init().map_err(|it| SourceError {
        code: Code::Error,
        detail: format!("GStreamer does not start: {it}; is it installed?"),
    })?;
    // Streams open on threads of their own. GLib 2.74 can deadlock where one registers the types of
    // GIO's sockets, as loading souphttpsrc does, while another makes the first client of rtspsrc.
    ONCE.call_once(|| {
        let types = [
            gio::InetAddress::static_type(),
            gio::InetSocketAddress::static_type(),
            gio::NetworkAddress::static_type(),
            gio::ProxyAddress::static_type(),
            gio::Resolver::static_type(),
            gio::Socket::static_type(),
            gio::TcpConnection::static_type(),
            gio::TlsCertificate::static_type(),
            gio::TlsClientConnection::static_type(),
        ];
        debug_assert!(types.iter().all(|it| it.is_valid()), "GIO knows its own types");
        drop(gio::SocketClient::new());
        for name in ["rtspsrc", "rtpbin", "udpsrc", "souphttpsrc"] {
            // One that is missing is told where it is needed.
            drop(gst::ElementFactory::find(name).map(|it| it.load()));
        }
    });
    Ok(())
}

impl GstOpener {
    /// Prepares to open `spec`; what arrives is counted in `stream`.
    ///
    /// # Errors
    /// GStreamer cannot be initialised.
    pub fn new(spec: Spec, stream: Arc<Stream>) -> Result<GstOpener, SourceError> {
        start()?;
        let said = Arc::new(Said::new(Redactor::new(&spec)));
        said::listen(said.redactor());
        let (finite, facts) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (known, device) = Default::default();
        Ok(GstOpener { spec, stream, finite, said, facts, known, device })
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the last connection has shown so far.
    pub fn facts(&self) -> Facts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Opener for GstOpener {
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError> {
        self.said.close();
        self.said = Arc::new(Said::new(self.said.redactor().clone()));
        self.facts = Arc::default();
        let shared = Arc::new(Shared {
            stream: self.stream.clone(),
            state: Mutex::default(),
            facts: self.facts.clone(),
            linked: AtomicBool::new(false),
            described: AtomicBool::new(false),
            damage: Mutex::default(),
            needed: Mutex::new(self.spec.max_fps.and_then(Needed::new)),
            said: self.said.clone(),
            failed_device: self.device().failed.clone(),
        });
        let (pipeline, sink) = pipeline::build(&self.spec, &shared)?;
        let bus = pipeline.bus().expect("a pipeline has a bus");
        let stream = self.stream.clone();
        bus.set_sync_handler(move |_, message| match message.view() {
            gst::MessageView::Error(_) => gst::BusSyncReply::Pass,
            gst::MessageView::StreamStatus(status) => {
                let task = status.stream_status_object().and_then(|it| it.get::<gst::Task>().ok());
                if status.get().0 == gst::StreamStatusType::Enter
                    && let Some(task) = task
                {
                    // Right after this its thread takes over its name.
                    task.set_property("name", crash::thread_name(&stream.id));
                }
                gst::BusSyncReply::Drop
            }
            // Nobody reads the rest, and on a bus it would pile up for as long as the stream lives.
            _ => gst::BusSyncReply::Drop,
        });
        let started = pipeline.set_state(gst::State::Playing);
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let spacing = shared.needed().as_ref().map_or(Duration::ZERO, Needed::longest);
        let watch = Watch::new(self.spec.stall_after, Instant::now()).spaced(spacing);
        let source = GstSource {
            pipeline,
            sink,
            bus,
            shared,
            spec: self.spec.clone(),
            finite: self.finite.clone(),
            watch: watch.expecting(known),
            silent: false,
            known: self.known.clone(),
            device: self.device.clone(),
            stopped: false,
        };
        match started {
            Ok(_) => Ok(Box::new(source)),
            Err(_) => Err(source.failure().unwrap_or_else(|| SourceError {
                code: Code::Error,
                detail: format!("{}: the pipeline does not start", self.spec.url),
            })),
        }
    }

    fn is_live(&self) -> bool {
        self.spec.url.is_live() && !self.finite.load(Relaxed)
    }

    fn peer(&self, gate: &Gate) -> Option<Peer> {
        let (remote, scheme) = self.spec.url.remote()?;
        let Spec { username, password, .. } = &self.spec;
        let server = (&*remote.host, remote.port_or_default(scheme));
        let written = remote.signs_in();
        Some(gate.peer(server, [username.as_ref(), password.as_ref(), written.as_ref()]))
    }

    fn gives_way(&self) -> bool {
        std::mem::take(&mut self.device().new)
    }

    fn reach(&mut self, stop: &CancellationToken) -> Result<(), SourceError> {
        // HTTP may go through a proxy, which then is the host to reach.
        let SourceUrl::Rtsp(_) = self.spec.url else { return Ok(()) };
        errors::reached(&self.spec, ANSWER_MAX, stop)
    }

    fn said(&self) -> Vec<String> {
        self.said.lines()
    }
}

impl Drop for GstOpener {
    fn drop(&mut self) {
        self.said.close();
    }
}

/// One connection.
struct GstSource {
    pipeline: gst::Pipeline,
    sink: gst_app::AppSink,
    bus: gst::Bus,
    shared: Arc<Shared>,
    spec: Spec,
    finite: Arc<AtomicBool>,
    watch: Watch,
    /// Whether a demuxer read no more at the last look.
    stopped: bool,
    /// Whether it has failed because nothing came any more.
    silent: bool,
    /// For the next connection.
    known: Arc<Mutex<Known>>,
    device: Arc<Mutex<Device>>,
}

impl Source for GstSource {
    fn next(&mut self) -> Result<Next, SourceError> {
        self.look().inspect_err(|error| self.blame(error))
    }

    fn is_connected(&self) -> bool {
        self.shared.state().network.last.is_some()
    }

    fn is_signed_in(&self) -> bool {
        self.shared.is_described() || self.is_connected()
    }
}

impl GstSource {
    fn look(&mut self) -> Result<Next, SourceError> {
        let wait = gst::ClockTime::from_mseconds(PULL_MAX.as_millis() as u64);
        if let Some(sample) = self.sink.try_pull_sample(wait) {
            return self.picture(&sample).map(Next::Picture);
        }
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if self.sink.is_eos() {
            if !self.shared.is_linked() {
                return Err(self.error(Code::Codec, "there is no video in it"));
            }
            if matches!(self.spec.url, SourceUrl::Http(_)) {
                let length = self.pipeline.query_duration::<gst::ClockTime>();
                self.finite.store(length.is_some(), Relaxed);
            }
            return Ok(Next::Eos);
        }
        self.check_time()?;
        Ok(Next::Idle)
    }

    /// Uses a device no more that may be what failed: the pictures of this stream were decoded by it,
    /// and data came.
    fn blame(&self, error: &SourceError) {
        let chosen = self.shared.facts().decoder.clone().filter(|it| it.hardware);
        let Some(chosen) = chosen else { return };
        let last = self.shared.state().network.last;
        let coming = last.is_some_and(|it| it.elapsed() < self.spec.stall_after);
        let blamed = match error.code {
            Code::Codec | Code::Error => true,
            Code::Stall | Code::Timeout => coming,
            _ => false,
        };
        if blamed {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            *device =
                Device { failed: Some(format!("{} failed: {error}", chosen.name)), new: true };
        }
    }

    fn picture(&mut self, sample: &gst::Sample) -> Result<Decoded, SourceError> {
        let decoded = Instant::now();
        let frame = caps::frame(sample, self.spec.limits)
            .map_err(|detail| self.error(Code::Codec, &detail))?;
        let arrival = self.shared.arrival(frame.buffer_pts);
        let wall = SystemTime::now;
        let unknown = || Arrival { mono: decoded, wall: wall(), captured: None, reports: None };
        let arrival = arrival.unwrap_or_else(unknown);
        let corrupt = frame.corrupt | self.shared.damage().take(frame.buffer_pts);
        let pts = frame.buffer_pts.map(Duration::from);
        let label = self.shared.needed().as_mut().zip(pts).and_then(|it| it.0.label(it.1, corrupt));
        self.watch.measured(self.shared.state().network.period);
        // A camera whose pictures stay broken is opened again, which gives a keyframe.
        if !corrupt || !self.spec.url.is_live() {
            self.watch.picture(decoded, frame.pts);
        }
        Ok(Decoded {
            picture: frame.picture,
            pts: frame.pts,
            arrived: arrival.mono,
            arrived_wall: arrival.wall,
            decoded,
            captured: arrival.captured,
            reports: arrival.reports,
            corrupt,
            label,
        })
    }

    /// Fails a live stream that has been silent for too long, and a file that never starts:
    /// parsebin can swallow the error of a demuxer that fails while it is being put in.
    fn check_time(&mut self) -> Result<(), SourceError> {
        let live = self.spec.url.is_live();
        if !live && 0 < self.watch.pictures() {
            return Ok(());
        }
        if !live && !self.shared.is_linked() && self.has_stopped() {
            let detail = "there is no video in it, or it is not whole: its index cannot be read";
            return Err(self.error(Code::Codec, detail));
        }
        let announced = self.shared.facts().announced_fps;
        let silence = self.watch.check(&self.shared.state().network, announced, Instant::now());
        self.silent = silence.is_some();
        match silence {
            None => Ok(()),
            Some(silence) if live => Err(self.error(silence.code, &silence.detail)),
            Some(silence) => Err(self.error(Code::Codec, &silence.detail)),
        }
    }

    /// Whether a demuxer reads no more, at two looks in a row: its error may be on the way.
    fn has_stopped(&mut self) -> bool {
        let demuxer = |it: &gst::Element| {
            it.factory().is_some_and(|it| it.has_type(gst::ElementFactoryType::DEMUXER))
        };
        let stopped = |it: &gst::Pad| it.task_state() == gst::TaskState::Paused;
        let mut elements = self.pipeline.iterate_recurse().into_iter().flatten();
        let found = elements.any(|it| demuxer(&it) && it.sink_pads().iter().any(stopped));
        std::mem::replace(&mut self.stopped, found) && found
    }

    /// What has gone wrong, if anything: what the callbacks say, else the first message on the
    /// bus that says more than that the connection is gone.
    fn failure(&self) -> Option<SourceError> {
        if let Some(failure) = &self.shared.state().failure {
            return Some(self.error(failure.code, &failure.detail));
        }
        let mut found: Option<SourceError> = None;
        while let Some(message) = self.bus.pop_filtered(&[gst::MessageType::Error]) {
            let gst::MessageView::Error(error) = message.view() else { continue };
            let error = errors::translate(error, &self.spec);
            // Without data there is nothing to tell the type of, whatever the reason.
            let empty = error.detail.contains("Can't typefind stream");
            let better = error.code != Code::Error && !empty;
            if found.as_ref().is_none_or(|it| it.code == Code::Error && better) {
                found = Some(error);
            }
        }
        let mut found = found?;
        let vague = matches!(found.code, Code::Error | Code::Codec) && !self.shared.is_linked();
        if vague && let Some(error) = errors::diagnosed(&self.spec) {
            return Some(error);
        }
        // What every element says once nobody wants its data.
        if found.detail.contains("Internal data stream error") {
            if vague {
                found.detail = format!("{}: there is no video in it", self.spec.url);
            }
            if !self.spec.url.is_live() || vague {
                found.code = Code::Codec;
            }
        }
        Some(found)
    }

    fn error(&self, code: Code, detail: &str) -> SourceError {
        let detail = redact::redacted(&format!("{}: {detail}", self.spec.url), &self.spec);
        SourceError { code, detail }
    }
}

impl Drop for GstSource {
    /// Shuts the pipeline down on a thread of its own: a plugin that hangs there, and some do when
    /// a camera has gone, must not take the stream's loop with it.
    fn drop(&mut self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.learn(&self.watch, self.silent);
        drop(known);
        // What the elements say while they are taken down would push out why.
        self.shared.said.close();
        CLOSING.fetch_add(1, Relaxed);
        let pipeline = self.pipeline.clone();
        let (done_tx, done) = mpsc::sync_channel(1);
        let close = move || {
            if pipeline.set_state(gst::State::Null).is_err() {
                warn!("a pipeline did not shut down in order");
            }
            CLOSING.fetch_sub(1, Relaxed);
            if done_tx.send(()).is_err() {
                warn!("a pipeline that was left behind has shut down after all");
            }
        };
        // A plugin can crash here too.
        let name = crash::thread_name(&self.shared.stream.id);
        match thread::Builder::new().name(name).spawn(close) {
            Ok(_) => {
                if done.recv_timeout(TEARDOWN_MAX).is_err() {
                    let source = self.spec.url.to_string();
                    warn!(source, "a pipeline does not shut down; it is left behind");
                }
            }
            Err(error) => {
                CLOSING.fetch_sub(1, Relaxed);
                warn!(%error, "no thread to shut a pipeline down; doing it here");
                self.pipeline.set_state(gst::State::Null).err().into_iter().for_each(|error| {
                    warn!(%error, "a pipeline did not shut down in order");
                });
            }
        }
    }
}
