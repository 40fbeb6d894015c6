//! Keeps from the decoder what need not be decoded: asks [`needed`] about each encoded picture, and
//! holds or drops it before it gets there.
//!
//! Not by the decoder's `skip-frame`: its values are older than those that libav compares them with,
//! so that it does nothing, and it knows no keyframes. What others are made from a picture is read
//! in its own bytes, as the parsers call every picture a keyframe that is coded in itself, also where
//! later ones reach back behind it. Known are H.264, H.265 and JPEG; all else is decoded whole.
//!
//! [`needed`]: crate::source::needed

use std::{
    mem,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use gstreamer::{self as gst, prelude::*};

use crate::source::{
    gst::shared::Shared,
    needed::{Kind, Then},
};

/// Bytes of one stream that are held at most; then they are decoded.
const HELD_MAX: usize = 8 << 20;

/// How pictures are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// H.264 or, `true`, H.265 with start codes, or after lengths of so many bytes.
    Nal(bool, Option<usize>),
    /// Each picture for itself.
    Jpeg,
    /// Something else.
    Other,
}

/// An encoded picture that may be needed.
struct Held {
    buffer: gst::Buffer,
    pts: Duration,
    line: u64,
    gap: bool,
}

struct Thin {
    shared: Weak<Shared>,
    format: Format,
    held: Vec<Held>,
    bytes: usize,
    /// The highest temporal layer of H.265 so far.
    layer: u8,
    /// A gap before a picture that was left out.
    gap: bool,
}

/// Looks at each encoded picture that leaves `pad` on its way to the decoder.
pub fn watch(pad: &gst::Pad, shared: &Arc<Shared>) {
    if shared.needed().is_none() {
        return;
    }
    let thin = Mutex::new(Thin {
        shared: Arc::downgrade(shared),
        format: pad.current_caps().map_or(Format::Other, |it| format(&it)),
        held: Vec::new(),
        bytes: 0,
        layer: 0,
        gap: false,
    });
    let kinds = gst::PadProbeType::BUFFER
        | gst::PadProbeType::EVENT_DOWNSTREAM
        | gst::PadProbeType::EVENT_FLUSH;
    // The lock is not waited for: a pad's data and events come one after the other.
    pad.add_probe(kinds, move |pad, info| {
        let mut thin = thin.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = info.event() {
            match event.view() {
                gst::EventView::Caps(event) => thin.format = format(event.caps()),
                gst::EventView::FlushStop(_) | gst::EventView::Eos(_) => thin.forget(),
                gst::EventView::Segment(_) => {}
                _ => return gst::PadProbeReturn::Ok,
            }
            // What was held came before it.
            thin.release(pad).unwrap_or_default();
            return gst::PadProbeReturn::Ok;
        }
        let Some(buffer) = info.buffer() else { return gst::PadProbeReturn::Ok };
        match thin.picture(pad, buffer) {
            Ok(true) => gst::PadProbeReturn::Ok,
            Ok(false) => {
                info.flow_res = Ok(gst::FlowSuccess::Ok);
                gst::PadProbeReturn::Handled
            }
            Err(error) => {
                info.flow_res = Err(error);
                gst::PadProbeReturn::Handled
            }
        }
    });
}

impl Thin {
    /// Whether the picture goes on now.
    fn picture(&mut self, pad: &gst::Pad, buffer: &gst::Buffer) -> Result<bool, gst::FlowError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(true) };
        let pts = buffer.pts().map(Duration::from);
        let (Some(pts), Some(kind)) = (pts, self.kind(buffer)) else {
            // Without a time, or without a picture in it.
            self.release(pad)?;
            return Ok(true);
        };
        let gap = shared.damage().comes();
        if kind == Kind::Key {
            self.forget();
        }
        let (then, line, period) = {
            let mut needed = shared.needed();
            let Some(needed) = needed.as_mut() else { return Ok(true) };
            (needed.sees(kind, pts), needed.line(kind, pts), needed.period())
        };
        shared.state().network.period = period;
        match then {
            Then::Hold if self.bytes + buffer.size() <= HELD_MAX => {
                self.bytes += buffer.size();
                self.held.push(Held { buffer: buffer.clone(), pts, line, gap });
                Ok(false)
            }
            Then::LeaveOut => {
                shared.stream.left_out.fetch_add(1, Relaxed);
                self.gap |= gap;
                Ok(false)
            }
            Then::Hold | Then::Decode => {
                self.release(pad)?;
                announce(&shared, pts, line, gap | mem::take(&mut self.gap));
                Ok(true)
            }
        }
    }

    /// Sends what is held to the decoder.
    fn release(&mut self, pad: &gst::Pad) -> Result<(), gst::FlowError> {
        self.bytes = 0;
        let held = mem::take(&mut self.held);
        let (Some(shared), Some(peer)) = (self.shared.upgrade(), pad.peer()) else { return Ok(()) };
        for Held { buffer, pts, line, gap } in held {
            announce(&shared, pts, line, gap | mem::take(&mut self.gap));
            peer.chain(buffer)?;
        }
        Ok(())
    }

    /// What is held is not needed any more; nor is what was lost in it.
    fn forget(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.stream.left_out.fetch_add(self.held.len() as u64, Relaxed);
        }
        self.held.clear();
        (self.bytes, self.gap) = (0, false);
    }

    /// What others need of the picture. `None` if there is none in it.
    fn kind(&mut self, buffer: &gst::Buffer) -> Option<Kind> {
        let Format::Nal(newer, length) = self.format else {
            // Every one is decoded: each is needed by the next, and no keyframe is known.
            return Some(if self.format == Format::Jpeg { Kind::Key } else { Kind::Used });
        };
        let map = buffer.map_readable().ok()?;
        let first = slice(map.as_slice(), newer, length)?;
        if newer {
            self.layer = self.layer.max(layer(first));
            return Some(kind_h265(first, self.layer));
        }
        Some(kind_h264(first[0]))
    }
}

/// Tells what is about to come to the decoder.
fn announce(shared: &Shared, pts: Duration, line: u64, gap: bool) {
    if let Some(needed) = shared.needed().as_mut() {
        needed.decodes(pts, line);
    }
    shared.damage().goes(gap);
}

fn format(caps: &gst::CapsRef) -> Format {
    let Some(it) = caps.structure(0) else { return Format::Other };
    let newer = match it.name().as_str() {
        "video/x-h264" => false,
        "video/x-h265" => true,
        "image/jpeg" => return Format::Jpeg,
        _ => return Format::Other,
    };
    let written = it.get::<String>("stream-format").unwrap_or_default();
    if written == "byte-stream" {
        return Format::Nal(newer, None);
    }
    // Where the size of a length stands, in what ISO/IEC 14496-15 calls a configuration record.
    let at = if newer { 21 } else { 4 };
    let data = it.get::<gst::Buffer>("codec_data").ok();
    let map = data.as_ref().and_then(|it| it.map_readable().ok());
    match map.and_then(|it| it.as_slice().get(at).map(|it| usize::from(it & 3) + 1)) {
        Some(length) => Format::Nal(newer, Some(length)),
        None => Format::Other,
    }
}

/// The first two bytes of the first slice of a picture.
fn slice(data: &[u8], newer: bool, length: Option<usize>) -> Option<[u8; 2]> {
    let is_slice = |it: &[u8; 2]| match newer {
        false => (1..=5).contains(&(it[0] & 31)),
        true => (it[0] >> 1) & 63 < 32,
    };
    let mut rest = data;
    while let Some(length) = length {
        let (size, after) = rest.split_at_checked(length)?;
        let size = size.iter().fold(0_usize, |all, it| all << 8 | usize::from(*it));
        let unit = after.first_chunk::<2>()?;
        if is_slice(unit) {
            return Some(*unit);
        }
        rest = after.get(size..)?;
    }
    let mut codes = data.windows(5).filter(|it| it[..3] == [0, 0, 1]).map(|it| [it[3], it[4]]);
    codes.find(is_slice)
}

fn kind_h264(first: u8) -> Kind {
    match (first & 31, first >> 5 & 3) {
        (5, _) => Kind::Key,
        (_, 0) => Kind::Spare,
        _ => Kind::Used,
    }
}

/// From 0.
fn layer(first: [u8; 2]) -> u8 {
    (first[1] & 7).saturating_sub(1)
}

/// Pictures after a CRA (21) may reach back behind it, so it is no keyframe here. Those of the lower
/// temporal layers serve the higher ones, whatever their type says.
fn kind_h265(first: [u8; 2], highest: u8) -> Kind {
    match (first[0] >> 1) & 63 {
        16..=20 => Kind::Key,
        kind @ 0..=15 if kind % 2 == 0 && layer(first) == highest => Kind::Spare,
        _ => Kind::Used,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_slice_is_found_after_other_units() {
        let coded = [0, 0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x68, 3, 0, 0, 1, 0x65, 0x88, 4];
        assert_eq!(slice(&coded, false, None), Some([0x65, 0x88]));
        let counted = [0, 0, 0, 3, 0x67, 1, 2, 0, 0, 0, 2, 0x41, 0x9a];
        assert_eq!(slice(&counted, false, Some(4)), Some([0x41, 0x9a]));
        assert_eq!(slice(&[2, 0x40, 1, 2, 0x26, 1], true, Some(1)), Some([0x26, 1]));
        for cut in 0..counted.len() - 2 {
            assert_eq!(slice(&counted[..cut], false, Some(4)), None, "{cut}");
        }
        assert_eq!(slice(&[0xff; 32], false, Some(4)), None);
        assert_eq!(slice(&[0, 0, 1, 0x67, 1], false, None), None);
    }

    #[test]
    fn what_others_need_of_a_picture_is_in_its_first_bytes() {
        let h264 = [(0x65, Kind::Key), (0x41, Kind::Used), (0x01, Kind::Spare), (0x61, Kind::Used)];
        for (first, kind) in h264 {
            assert_eq!(kind_h264(first), kind, "{first:#x}");
        }
        let h265 = |unit: u8, layer: u8, highest| kind_h265([unit << 1, layer + 1], highest);
        assert_eq!([h265(19, 0, 0), h265(20, 0, 2), h265(16, 0, 0)], [Kind::Key; 3]);
        assert_eq!([h265(21, 0, 0), h265(1, 0, 0), h265(0, 0, 1)], [Kind::Used; 3]);
        assert_eq!([h265(0, 0, 0), h265(8, 0, 0), h265(2, 1, 1)], [Kind::Spare; 3]);
    }
}
