//! Which decoder reads which codec here, and why that one.

use gstreamer::{self as gst, glib::translate::IntoGlib as _, prelude::*};

use crate::source::{facts::Chosen, spec::Decode};

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
    /// Whether a device decodes. Such are used where `decode` asks for them.
    pub hardware: bool,
}

/// The decoders of what `caps` say, the one that is used first where no hardware is asked for.
/// None of them is then used iff the first is a hardware decoder.
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

/// The decoder that is used for what `caps` say; `None` iff there is none. `failed`: why a device
/// that decoded this stream is not used again.
pub fn choose(caps: &gst::Caps, wanted: Decode, failed: Option<&str>) -> Option<Chosen> {
    pick(&decoders(caps), wanted, failed, opens)
}

/// Which devices' decoders are tried, in this order, and how their elements are called.
fn families(wanted: Decode) -> &'static [(&'static str, &'static str)] {
    const VA: (&str, &str) = ("VA-API", "va");
    const NV: (&str, &str) = ("NVDEC", "nv");
    match wanted {
        Decode::Software => &[],
        Decode::Va => &[VA],
        Decode::Nv => &[NV],
        Decode::Auto => &[NV, VA],
    }
}

fn pick(
    found: &[Found],
    wanted: Decode,
    failed: Option<&str>,
    opens: impl Fn(&str) -> Result<(), String>,
) -> Option<Chosen> {
    let mut why_not = Vec::new();
    if let Some(failed) = failed {
        why_not.push(failed.to_owned());
    }
    for (family, prefix) in families(wanted).iter().filter(|_| failed.is_none()) {
        let ours = found.iter().filter(|it| it.hardware && it.name.starts_with(prefix));
        let mut none = true;
        for Found { name, .. } in ours {
            none = false;
            match opens(name) {
                Ok(()) => {
                    let why = format!("{family} opens; `decode` is {}", wanted.name());
                    return Some(Chosen { name: name.clone(), why, hardware: true });
                }
                Err(error) => why_not.push(format!("{name} does not open: {error}")),
            }
        }
        if none {
            why_not.push(format!("{family} has no decoder for it here"));
        }
    }
    let software: Vec<_> = found.iter().filter(|it| !it.hardware).collect();
    let best = software.first()?;
    let mut why = match (software.len(), best.name.starts_with("avdec_")) {
        (1, _) => "the only software decoder for it".to_owned(),
        (_, true) => "FFmpeg's goes before other software decoders".to_owned(),
        (_, false) => "the software decoder with the highest rank".to_owned(),
    };
    if wanted == Decode::Software && software.len() < found.len() {
        let names: Vec<_> = found.iter().filter(|it| it.hardware).map(|it| &*it.name).collect();
        why_not.push(format!("`decode` is software, so not {}", names.join(", ")));
    }
    for reason in why_not {
        why += &format!("; {reason}");
    }
    Some(Chosen { name: best.name.clone(), why, hardware: false })
}

/// Whether a decoder finds its device.
fn opens(name: &str) -> Result<(), String> {
    let element = gst::ElementFactory::make(name).build().map_err(|_| "it cannot be made")?;
    let ready = element.set_state(gst::State::Ready);
    let closed = element.set_state(gst::State::Null);
    ready.and(closed).map(drop).map_err(|_| "its device does not answer".to_owned())
}

fn factories(caps: &gst::Caps) -> Vec<gst::ElementFactory> {
    use gst::ElementFactoryType as Type;
    let kind = Type::DECODER | Type::MEDIA_VIDEO | Type::MEDIA_IMAGE;
    let found = gst::ElementFactory::factories_with_type(kind, gst::Rank::MARGINAL);
    found.into_iter().filter(|it| it.can_sink_any_caps(caps)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Vec<Found> {
        let hardware = |it: &str| it.starts_with("va") || it.starts_with("nv");
        let found = |it: &&str| Found { name: (*it).to_owned(), rank: 1, hardware: hardware(it) };
        names.iter().map(found).collect()
    }

    /// What is picked of these, of which `broken` do not open.
    fn picked(names: &[&str], wanted: Decode, broken: &[&str], failed: Option<&str>) -> String {
        let opens = |name: &str| match broken.contains(&name) {
            true => Err("no device".to_owned()),
            false => Ok(()),
        };
        let it = pick(&found(names), wanted, failed, opens).unwrap();
        assert_eq!(it.hardware, it.name.starts_with("va") || it.name.starts_with("nv"));
        format!("{}: {}", it.name, it.why)
    }

    #[test]
    fn hardware_is_used_where_it_is_asked_for_and_opens() {
        const ALL: [&str; 4] = ["avdec_h264", "openh264dec", "vah264dec", "nvh264dec"];
        let ffmpeg = "avdec_h264: FFmpeg's goes before other software decoders";
        let check = |wanted, broken: &[&str], failed, expected: &str| {
            assert_eq!(picked(&ALL, wanted, broken, failed), expected);
        };
        check(Decode::Auto, &[], None, "nvh264dec: NVDEC opens; `decode` is auto");
        check(Decode::Auto, &["nvh264dec"], None, "vah264dec: VA-API opens; `decode` is auto");
        check(Decode::Va, &[], None, "vah264dec: VA-API opens; `decode` is va");
        check(Decode::Nv, &[], None, "nvh264dec: NVDEC opens; `decode` is nv");
        let why = format!("{ffmpeg}; vah264dec does not open: no device");
        check(Decode::Va, &["vah264dec"], None, &why);
        let why = format!("{ffmpeg}; vah264dec gave no picture");
        check(Decode::Auto, &[], Some("vah264dec gave no picture"), &why);
        let why = format!("{ffmpeg}; `decode` is software, so not vah264dec, nvh264dec");
        check(Decode::Software, &[], None, &why);
        let none = picked(&["avdec_vp9"], Decode::Auto, &[], None);
        let why = "NVDEC has no decoder for it here; VA-API has no decoder for it here";
        assert_eq!(none, format!("avdec_vp9: the only software decoder for it; {why}"));
        assert!(pick(&found(&["vah264dec"]), Decode::Software, None, |_| Ok(())).is_none());
    }
}
