//! What of GStreamer is here, and which Debian package holds what is not.

use gio::prelude::*;
use gstreamer as gst;

use crate::source::{
    SourceError,
    gst::{
        decoders::{self, CODECS, Found},
        start,
    },
};

/// Elements that are needed, by the Debian package that holds them, and what for.
const NEEDED: [(&str, &str, &[&str]); 5] = [
    ("libgstreamer1.0-0", "every stream", &["filesrc", "queue", "capsfilter"]),
    (
        "gstreamer1.0-plugins-base",
        "every stream",
        &["appsink", "videoconvert", "parsebin", "videotestsrc"],
    ),
    (
        "gstreamer1.0-plugins-good",
        "cameras, MP4 and Matroska files",
        &[
            "rtspsrc",
            "rtpbin",
            "udpsrc",
            "souphttpsrc",
            "rtph264depay",
            "rtph265depay",
            "rtpjpegdepay",
            "rtpmp4vdepay",
            "rtpvp8depay",
            "rtpvp9depay",
            "qtdemux",
            "matroskademux",
            "multipartdemux",
        ],
    ),
    (
        "gstreamer1.0-plugins-bad",
        "H.264, H.265, MJPEG and MPEG-4",
        &["h264parse", "h265parse", "jpegparse", "mpeg4videoparse"],
    ),
    ("gstreamer1.0-libav", "most codecs", &["avdec_h264", "avdec_h265", "avdec_mjpeg"]),
];

/// Elements of one Debian package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// The package.
    pub name: &'static str,
    /// What needs them.
    pub needed_for: &'static str,
    /// Those that are there.
    pub present: Vec<&'static str>,
    /// Those that are not.
    pub missing: Vec<&'static str>,
}

/// What is here.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// The elements that are needed.
    pub packages: Vec<Package>,
    /// The decoders of each codec, the one that is used first.
    pub decoders: Vec<(&'static str, Vec<Found>)>,
    /// Whether GLib can speak TLS, for `rtsps:` and `https:`.
    pub tls: bool,
}

/// Looks at what is here.
///
/// # Errors
/// GStreamer cannot be initialised.
pub fn inventory() -> Result<Inventory, SourceError> {
    start()?;
    let package = |(name, needed_for, elements): (_, _, &[&'static str])| {
        let is_there = |it: &&str| gst::ElementFactory::find(it).is_some();
        let (present, missing) = elements.iter().partition(|it| is_there(it));
        Package { name, needed_for, present, missing }
    };
    let codec = |(name, caps): (_, &str)| {
        let caps = caps.parse::<gst::Caps>().expect("the table holds valid caps");
        (name, decoders::decoders(&caps))
    };
    Ok(Inventory {
        packages: NEEDED.into_iter().map(package).collect(),
        decoders: CODECS.into_iter().map(codec).collect(),
        tls: gio::TlsBackend::default().supports_tls(),
    })
}
