//! What is configured about one stream.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use crate::{
    secret::Secret,
    source::{
        fingerprint::Fingerprint,
        url::{SourceUrl, Transport, UrlError},
    },
};

/// By how much a camera's clock may differ from ours if nothing is said.
pub const MAX_CLOCK_OFFSET: Duration = Duration::from_secs(2);

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
    /// The camera's clock dates pictures only while it differs from ours by at most this.
    pub max_clock_offset: Duration,
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
    /// Who decodes.
    pub decode: Decode,
    /// Threads of the decoder, from 1.
    pub decode_threads: u32,
}

/// Who decodes pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decode {
    /// NVDEC, else VA-API, else the CPU: the first that is there and opens.
    Auto,
    /// The CPU.
    Software,
    /// VA-API, else the CPU.
    Va,
    /// NVDEC, else the CPU.
    Nv,
}

impl Decode {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Decode::Auto => "auto",
            Decode::Software => "software",
            Decode::Va => "va",
            Decode::Nv => "nv",
        }
    }
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
            max_clock_offset: MAX_CLOCK_OFFSET,
            max_fps: None,
            realtime: false,
            looped: false,
            limits: (7680, 4320),
            start_time: None,
            tls: Tls { verify: true, ca_file: None, fingerprint: None },
            decode: Decode::Software,
            decode_threads: 1,
        })
    }
}
