//! Which decoder reads which codec here, and why that one.

use gstreamer::{self as gst, glib::translate::IntoGlib as _, prelude::*};

use crate::source::facts::Chosen;

/// Codecs that cameras and clips use, and their caps.
pub const CODECS: [(&str, &str); 8] = [
    ("H.264", "video/x-h264"),
    ("H.265", "video/x-h265"),
    ("MJPEG", "image/jpeg,parsed=true"),
    ("MPEG-4", "video/mpeg,mpegversion=4,systemstream=false"),
    ("MPEG-2", "video/mpeg,mpegversion=2,systemstream=false"),
    ("VP8", "video/x-vp8"),
    ("VP9", "video/x-vp9"),
    ("AV1", "video/x-av1"),
];

/// A decoder that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The element's name.
    pub name: String,
    /// How GStreamer ranks it.
    pub rank: i32,
    /// Whether a device decodes. Such are not used: their pictures do not lie in memory, where
    /// preprocess reads them.
    pub hardware: bool,
}

/// The decoders of what `caps` say, the one that is used first. None of them is used iff the first
/// is a hardware decoder.
pub fn decoders(caps: &gst::Caps) -> Vec<Found> {
    let mut found: Vec<Found> = factories(caps)
        .iter()
        .map(|it| Found {
            name: it.name().to_string(),
            rank: it.rank().into_glib(),
            hardware: it.has_type(gst::ElementFactoryType::HARDWARE),
        })
        .collect();
    // FFmpeg's first: only those were measured and tested.
    found.sort_by_key(|it| (it.hardware, !it.name.starts_with("avdec_"), -it.rank));
    found
}

/// The decoder that is used for what `caps` say; `None` iff there is none.
pub fn choose(caps: &gst::Caps) -> Option<Chosen> {
    let found = decoders(caps);
    let (hardware, software): (Vec<_>, Vec<_>) = found.iter().partition(|it| it.hardware);
    let best = software.first()?;
    let mut why = match (software.len(), best.name.starts_with("avdec_")) {
        (1, _) => "the only software decoder for it".to_owned(),
        (_, true) => "FFmpeg's goes before other software decoders".to_owned(),
        (_, false) => "the software decoder with the highest rank".to_owned(),
    };
    if !hardware.is_empty() {
        let names: Vec<_> = hardware.iter().map(|it| it.name.as_str()).collect();
        why += &format!("; hardware decoders are not used: {}", names.join(", "));
    }
    Some(Chosen { name: best.name.clone(), why })
}

fn factories(caps: &gst::Caps) -> Vec<gst::ElementFactory> {
    use gst::ElementFactoryType as Type;
    let kind = Type::DECODER | Type::MEDIA_VIDEO | Type::MEDIA_IMAGE;
    let found = gst::ElementFactory::factories_with_type(kind, gst::Rank::MARGINAL);
    found.into_iter().filter(|it| it.can_sink_any_caps(caps)).collect()
}
