//! The configuration as it can be run: checked, typed and complete.
//!
//! Paths are absolute or relative to the working directory, secrets are read, defaults are in.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};

use crate::{
    edge::WhenFull,
    health,
    infer::wanted::{Precision, Use},
    journal::retain::Retain,
    secret::Secret,
    sink::settings::{Select, Target},
    source::{
        Decode, Spec, Tls,
        fingerprint::Fingerprint,
        url::{SourceUrl, Transport, UrlError},
    },
};

/// Everything that is configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Names this daemon in the events' `source`.
    pub instance: String,
    /// The streams by id.
    pub streams: BTreeMap<String, StreamPlan>,
    /// The network.
    pub model: ModelPlan,
    /// Where it runs.
    pub device: DevicePlan,
    /// How frames are put into batches.
    pub batch: BatchPlan,
    /// The embedded event log.
    pub journal: JournalPlan,
    /// Where events go besides the journal; names are unique.
    pub sinks: Vec<SinkPlan>,
    /// Metrics, health and the read API.
    pub http: HttpPlan,
    /// The daemon's own log.
    pub log: LogPlan,
    /// Bounds against mistakes and hostile streams.
    pub limits: LimitsPlan,
}

/// One stream.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamPlan {
    /// Where it comes from, in the form that `SourceUrl::parse` reads, without user name and
    /// password. Its query can hold secrets, so print [`StreamPlan::shown`] instead.
    pub url: Secret,
    /// User name for the camera.
    pub username: Option<Secret>,
    /// Password for the camera. `None` also if the secrets were not to be read.
    pub password: Option<Secret>,
    /// At most so many frames per second are classified; `None` for all.
    pub max_fps: Option<f64>,
    /// How RTP is carried.
    pub transport: Transport,
    /// Size of the jitter buffer.
    pub latency: Duration,
    /// A live stream without a picture for this long has failed.
    pub stall_after: Duration,
    /// The camera's clock dates pictures only while it differs from ours by at most this.
    pub max_clock_offset: Duration,
    /// What happens when frames come faster than they are classified.
    pub when_full: WhenFull,
    /// Who decodes.
    pub decode: Decode,
    /// A file starts over when it has ended.
    pub looped: bool,
    /// A file or test pattern comes at its own rate.
    pub realtime: bool,
    /// When a file was recorded.
    pub start_time: Option<SystemTime>,
    /// Its share under overload, from 1 to 100.
    pub weight: u32,
    /// What to do about pictures that show nothing.
    pub health: health::Settings,
    /// Whom to trust.
    pub tls: TlsPlan,
}

impl Plan {
    /// Why `--once` would never end, if so.
    pub fn endless(&self) -> Option<String> {
        let (id, _) = self.streams.iter().find(|it| it.1.is_live() || it.1.looped)?;
        Some(format!("--once would never end: stream {id} is live or looped"))
    }
}

impl StreamPlan {
    /// The URL as it may be printed.
    pub fn shown(&self) -> String {
        self.parsed().map_or_else(|| "***".to_owned(), |it| it.to_string())
    }

    /// Whether pictures come in their own time.
    pub fn is_live(&self) -> bool {
        self.parsed().is_some_and(|it| it.is_live())
    }

    /// What the source needs.
    ///
    /// # Errors
    /// The URL cannot be read; never in a checked plan.
    pub fn spec(&self, limits: &LimitsPlan) -> Result<Spec, UrlError> {
        Ok(Spec {
            username: self.username.clone(),
            password: self.password.clone(),
            transport: self.transport,
            latency: self.latency,
            stall_after: self.stall_after,
            max_clock_offset: self.max_clock_offset,
            max_fps: self.max_fps,
            decode: self.decode,
            realtime: self.realtime,
            looped: self.looped,
            limits: (limits.max_width, limits.max_height),
            start_time: self.start_time,
            tls: Tls {
                verify: self.tls.verify,
                ca_file: self.tls.ca_file.clone(),
                fingerprint: self.tls.fingerprint,
            },
            ..Spec::parse(self.url.expose())?
        })
    }

    /// A short text that is another one if something else would be decoded, or in another way. It
    /// stays the same if only the password is another one, so it tells nothing about it.
    pub fn digest(&self, limits: &LimitsPlan) -> String {
        let parts = (
            (self.url.expose(), self.transport, self.latency),
            (self.looped, self.realtime),
            (limits.max_width, limits.max_height),
        );
        let hash = Sha256::digest(format!("{parts:?}"));
        hash[..8].iter().map(|it| format!("{it:02x}")).collect()
    }

    /// The URL, parsed; always `Some` in a checked plan.
    pub fn parsed(&self) -> Option<SourceUrl> {
        SourceUrl::parse(self.url.expose()).ok().map(|it| it.url)
    }
}

/// Whom a TLS connection trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsPlan {
    /// Whether the certificate is checked at all.
    pub verify: bool,
    /// Authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// The one certificate to trust. `None` for everything but `rtsps`.
    pub fingerprint: Option<Fingerprint>,
}

/// The network. `None`: what the weights file says.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelPlan {
    /// The checkpoint.
    pub weights: PathBuf,
    /// One class per line.
    pub labels: Option<PathBuf>,
    /// The name in events and metrics.
    pub name: Option<String>,
    /// Pixels that the short side is scaled to.
    pub resize: Option<u32>,
    /// Side in pixels of the square that is cut out; at most `resize`, if both are given.
    pub input: Option<u32>,
    /// Subtracted from red, green and blue in 0..1.
    pub mean: Option<[f32; 3]>,
    /// What red, green and blue are then divided by; never 0.
    pub std: Option<[f32; 3]>,
}

/// Where the network runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    /// Which device.
    pub device: Use,
    /// `None`: chosen by the self-test.
    pub precision: Option<Precision>,
    /// Batches that are computed at once; `None`: chosen by device and cores.
    pub lanes: Option<usize>,
    /// The folder with the CUDA libraries; `None`: searched for.
    pub cuda: Option<PathBuf>,
}

/// How frames are put into batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Frames in the largest batch, from 1 to 256.
    pub max_size: usize,
    /// A batch is closed at the latest this long after its oldest frame.
    pub max_wait: Duration,
    /// Sizes that batches are padded to, ascending, the last one `max_size`; `None`: chosen.
    pub buckets: Option<Vec<usize>>,
}

/// The embedded event log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalPlan {
    /// The file.
    pub path: PathBuf,
    /// How much is kept.
    pub retain: Retain,
    /// Events are on disk at the latest after this time.
    pub commit_every: Duration,
}

/// Where events go besides the journal.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkPlan {
    /// The name in metrics; matches the pattern of stream ids.
    pub name: String,
    /// What it is.
    pub target: Target,
    /// Which events it gets.
    pub select: Select,
}

/// Metrics, health and the read API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpPlan {
    /// Loopback, unless `token_file` is set.
    pub listen: SocketAddr,
    /// Where the token comes from.
    pub token_file: Option<PathBuf>,
    /// The token. `None` iff there is no file, or the secrets were not to be read.
    pub token: Option<Secret>,
    /// Host names that clients may use besides localhost and the address, in lower case.
    pub hosts: Vec<String>,
}

/// The daemon's own log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPlan {
    /// The least level that is logged: `error`, `warn`, `info`, `debug` or `trace`.
    pub level: &'static str,
    /// How.
    pub format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Bounds against mistakes and hostile streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsPlan {
    /// Streams.
    pub max_streams: usize,
    /// Width in pixels of a stream's picture.
    pub max_width: u32,
    /// Height in pixels of a stream's picture.
    pub max_height: u32,
}
