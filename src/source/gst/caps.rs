//! From a sample to a picture that is read in place: layout, colours, strides, limits.

use std::time::Duration;

use gstreamer as gst;
use gstreamer_video::{self as gst_video, prelude::*};

use crate::{
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    source::facts::Facts,
};

/// The formats that are read as they are; everything else goes through `videoconvert` once.
pub const FORMATS: [&str; 4] = ["I420", "NV12", "RGB", "GRAY8"];

/// A picture and what its buffer says about it.
pub struct Sampled {
    /// The picture.
    pub picture: Picture,
    /// PTS as it is on the buffer: the key under which its arrival is remembered.
    pub buffer_pts: Option<gst::ClockTime>,
    /// Time in the stream.
    pub pts: Option<Duration>,
    /// Whether the decoder marked it as broken.
    pub corrupt: bool,
}

/// Maps the sample's buffer. Each sample carries its own caps, so a change needs nothing more.
///
/// # Errors
/// The sample is not a picture, or not one within `limits`.
pub fn frame(sample: &gst::Sample, limits: (u32, u32)) -> Result<Sampled, String> {
    let caps = sample.caps().ok_or("a sample without caps")?;
    let info = gst_video::VideoInfo::from_caps(caps).map_err(|_| "a sample that is no video")?;
    check_size(info.width(), info.height(), limits)?;
    let layout = match info.format() {
        gst_video::VideoFormat::I420 => Layout::I420,
        gst_video::VideoFormat::Nv12 => Layout::Nv12,
        gst_video::VideoFormat::Rgb => Layout::Rgb,
        gst_video::VideoFormat::Gray8 => Layout::Gray8,
        other => return Err(format!("the picture format {other} was not converted")),
    };
    let colour = colour(&info, caps);
    let buffer = sample.buffer_owned().ok_or("a sample without a buffer")?;
    let buffer_pts = buffer.pts();
    let corrupt = buffer.flags().contains(gst::BufferFlags::CORRUPTED);
    let segment = sample.segment().and_then(|it| it.downcast_ref::<gst::ClockTime>());
    let pts = match (segment, buffer_pts) {
        (Some(segment), Some(pts)) => segment.to_stream_time(pts).or(Some(pts)),
        (_, pts) => pts,
    };
    let frame = gst_video::VideoFrame::from_buffer_readable(buffer, &info)
        .map_err(|_| "a picture whose buffer is smaller than its size says")?;
    let mut strides = [0; 3];
    for (mine, theirs) in strides.iter_mut().zip(frame.plane_stride()) {
        *mine = usize::try_from(*theirs).map_err(|_| "a picture stored upside down")?;
    }
    let (width, height) = (frame.width() as usize, frame.height() as usize);
    let planes = Box::new(Mapped(frame));
    let picture = Picture { layout, colour, width, height, strides, planes };
    Ok(Sampled { picture, buffer_pts, pts: pts.map(Duration::from), corrupt })
}

/// What people call the codec that `caps` of an encoded stream stand for; `raw` if it is none.
pub fn codec(caps: &gst::CapsRef) -> Option<String> {
    let it = caps.structure(0)?;
    let version = || it.get::<i32>("mpegversion").ok();
    Some(match it.name().as_str() {
        "image/jpeg" => "mjpeg".to_owned(),
        "video/mpeg" => version().map_or("mpeg".to_owned(), |it| format!("mpeg{it}")),
        other => {
            let name = other.split_once('/').map_or(other, |it| it.1);
            name.strip_prefix("x-").unwrap_or(name).to_owned()
        }
    })
}

/// Puts what `caps` of an encoded stream say into `facts`.
pub fn describe(caps: &gst::CapsRef, facts: &mut Facts) {
    let Some(it) = caps.structure(0) else { return };
    facts.codec = codec(caps);
    facts.profile = it.get::<String>("profile").ok();
    facts.level = it.get::<String>("level").ok();
    // 0/1 stands for a rate that changes; the SDP may know one.
    let rate = it.get::<gst::Fraction>("framerate").ok();
    if let Some(rate) = rate.filter(|it| 0 < it.numer() && 0 < it.denom()) {
        facts.announced_fps = Some(f64::from(rate.numer()) / f64::from(rate.denom()));
    }
}

/// Refuses sizes beyond the limit, before anything of that size is allocated.
///
/// # Errors
/// The size and the limit.
pub fn check_size(width: u32, height: u32, limits: (u32, u32)) -> Result<(), String> {
    if width <= limits.0 && height <= limits.1 {
        return Ok(());
    }
    let (w, h) = limits;
    Err(format!(
        "pictures of {width}x{height} are beyond the limit of {w}x{h}; see limits.max_width, limits.max_height"
    ))
}

/// A picture in the decoder's buffer, mapped for as long as it is kept.
struct Mapped(gst_video::VideoFrame<gst_video::video_frame::Readable>);

impl Planes for Mapped {
    fn plane(&self, index: usize) -> &[u8] {
        // No such plane: what reads it checks sizes anyway.
        u32::try_from(index).ok().and_then(|it| self.0.plane_data(it).ok()).unwrap_or_default()
    }
}

fn colour(info: &gst_video::VideoInfo, caps: &gst::CapsRef) -> Colour {
    use gst_video::{VideoChromaSite as Site, VideoColorMatrix, VideoColorRange};
    let colorimetry = info.colorimetry();
    // As written: `info` has its defaults for all of it where only the range is known.
    let written = caps.structure(0).and_then(|it| it.get::<&str>("colorimetry").ok());
    let written = written.and_then(|it| it.parse::<gst_video::VideoColorimetry>().ok());
    let range = written.map(|it| it.range()).filter(|it| *it != VideoColorRange::Unknown);
    let matrix = match colorimetry.matrix() {
        VideoColorMatrix::Bt709 => Matrix::Bt709,
        VideoColorMatrix::Bt2020 => Matrix::Bt2020,
        VideoColorMatrix::Bt601 | VideoColorMatrix::Fcc => Matrix::Bt601,
        // SMPTE 240M is nearer to 709 (Kr 0.212, Kb 0.087). Of the rest, players take the one
        // that pictures of that size usually have.
        VideoColorMatrix::Smpte240m => Matrix::Bt709,
        _ if 720 <= info.height() => Matrix::Bt709,
        _ => Matrix::Bt601,
    };
    let site = info.chroma_site();
    // Unknown: what MPEG-2 and H.264 mean when they say nothing.
    let site = if site.is_empty() { Site::MPEG2 } else { site };
    let siting = |cosited| if cosited { Siting::Cosited } else { Siting::Centre };
    Colour {
        matrix,
        full_range: range.unwrap_or(colorimetry.range()) == VideoColorRange::Range0_255,
        siting_x: siting(site.contains(Site::H_COSITED)),
        siting_y: siting(site.contains(Site::V_COSITED)),
    }
}
