//! Which pictures are broken: what was lost before the decoder, and what the decoder says.
//!
//! libav conceals what it cannot decode and gives the picture like any other. GStreamer passes on
//! one of its marks, and of 3,214 pictures that bit flips had spoiled none had it; but libav's log
//! tells. Its lines are about no object, so they belong to the picture that the same thread has
//! brought to its decoder last: libav decodes there, as long as it is given no threads of its own.
//! After a broken picture all are until the next keyframe, as each is made from the one before.

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{Arc, Weak},
};

use gstreamer::{self as gst, DebugLevel, prelude::*};

use crate::source::gst::shared::Shared;

/// Encoded pictures that are remembered until they leave the decoder. More than any codec reorders.
const SENT_MAX: usize = 128;

/// How the lines of libav's log begin that say that a picture, or one that others need, is not what
/// was sent. Not among them is what healthy streams of odd cameras make it say, such as of SEI.
const LINES: [&str; 17] = [
    // H.264, and with it most codecs before it.
    "concealing ",
    "error while decoding MB",
    "decode_slice_header error",
    "no frame!",
    "Frame num gap",
    "Missing reference picture",
    "reference picture missing during reorder",
    // H.265.
    "Could not find ref with POC",
    "Error constructing the reference lists",
    "Error parsing NAL unit",
    "First slice in a frame missing",
    "CABAC_MAX_BIN",
    "The cu_qp_delta ",
    // VP9.
    "Requested reference ",
    // JPEG.
    "error count: ",
    "error dc",
    "error y=",
];

/// GStreamer's log category for what libav says.
const LIBAV: &str = "libav";

thread_local! {
    /// Whose picture this thread has brought to a decoder last.
    static DECODING: RefCell<Weak<Shared>> = const { RefCell::new(Weak::new()) };
}

/// Has libav's log heard, where the user has not asked for more of it.
pub fn listen(asked: Option<&str>) {
    if !asked.is_some_and(|it| it.contains(LIBAV)) {
        // Concealment is no warning for it.
        gst::log::set_threshold_for_name(LIBAV, DebugLevel::Info);
    }
}

/// Hears a line of GStreamer's log, in the thread that says it.
pub fn hear(category: &str, text: &str) {
    if category != LIBAV || !LINES.iter().any(|it| text.starts_with(it)) {
        return;
    }
    // A thread that is ending decodes no more.
    let shared = DECODING.try_with(|it| it.borrow().upgrade()).ok().flatten();
    if let Some(shared) = shared {
        shared.damage().broken();
    }
}

/// Looks at each encoded picture that comes to `pad`, the decoder's.
pub fn watch(pad: &gst::Pad, shared: &Arc<Shared>) {
    let shared = Arc::downgrade(shared);
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let (Some(buffer), Some(strong)) = (info.buffer(), shared.upgrade()) else {
            return gst::PadProbeReturn::Ok;
        };
        DECODING.with_borrow_mut(|it| it.clone_from(&shared));
        let keyframe = !buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
        strong.damage().arrives(buffer.pts(), keyframe);
        gst::PadProbeReturn::Ok
    });
}

/// Looks for gaps in the packets that come to `depay`. Not at the decoder: what leaves a demuxer is
/// marked in the same way, where nothing is missing.
pub fn watch_gaps(depay: &gst::Element, shared: &Arc<Shared>) {
    let Some(input) = depay.static_pad("sink") else { return };
    let shared = Arc::downgrade(shared);
    let gap = move |buffer: &gst::BufferRef| {
        if buffer.flags().contains(gst::BufferFlags::DISCONT)
            && let Some(shared) = shared.upgrade()
        {
            shared.damage().gap();
        }
    };
    let kinds = gst::PadProbeType::BUFFER | gst::PadProbeType::BUFFER_LIST;
    input.add_probe(kinds, move |_, info| {
        match &info.data {
            Some(gst::PadProbeData::Buffer(it)) => gap(it),
            Some(gst::PadProbeData::BufferList(list)) => list.iter().for_each(&gap),
            _ => (),
        }
        gst::PadProbeReturn::Ok
    });
}

/// Has nothing leave a depayloader before the first keyframe. From then on all does: after a loss
/// the depayloader would wait again, and what it leaves out nobody counts.
pub fn wait_for_first_keyframe(depay: &gst::Element) {
    const WAIT: &str = "wait-for-keyframe";
    // Not those of JPEG and MPEG-4.
    let (Some(_), Some(output)) = (depay.find_property(WAIT), depay.static_pad("src")) else {
        return;
    };
    depay.set_property(WAIT, true);
    let depay = depay.downgrade();
    output.add_probe(gst::PadProbeType::BUFFER | gst::PadProbeType::BUFFER_LIST, move |_, _| {
        depay.upgrade().iter().for_each(|it| it.set_property(WAIT, false));
        gst::PadProbeReturn::Remove
    });
}

/// What is known about the pictures of one connection. Pure.
#[derive(Debug, Default)]
pub struct Damage {
    /// What the decoder may still give, in the order in which it got it: PTS, and whether it is
    /// broken.
    sent: VecDeque<(Option<gst::ClockTime>, bool)>,
    /// Whether what is made from the last picture is broken.
    spoilt: bool,
    /// The keyframe after the damage; what it precedes in time may be made from pictures before it.
    keyframe: Option<gst::ClockTime>,
    /// Pictures to come that a gap may have touched.
    near_gap: u8,
    /// Whether a gap touched the picture that goes to the decoder next; `None`: nobody has looked.
    announced: Option<bool>,
    begun: bool,
}

impl Damage {
    /// Something was lost, if anything was sent before. Of the two pictures that come next the first
    /// may have been waiting for its end, and the second for its beginning.
    pub fn gap(&mut self) {
        self.near_gap = if self.begun { 2 } else { 0 };
    }

    /// An encoded picture has come. Whether a gap touched it.
    pub fn comes(&mut self) -> bool {
        let gap = 0 < self.near_gap;
        self.near_gap = self.near_gap.saturating_sub(1);
        gap
    }

    /// The picture that comes to the decoder next came some time ago.
    pub fn goes(&mut self, gap: bool) {
        self.announced = Some(gap);
    }

    /// An encoded picture comes to the decoder.
    pub fn arrives(&mut self, pts: Option<gst::ClockTime>, keyframe: bool) {
        let gap = self.announced.take();
        let gap = gap.unwrap_or_else(|| self.comes());
        self.sent(pts, keyframe, gap);
    }

    fn sent(&mut self, pts: Option<gst::ClockTime>, keyframe: bool, gap: bool) {
        if gap {
            (self.spoilt, self.keyframe) = (true, None);
        } else if keyframe {
            self.spoilt &= pts.is_some();
            self.keyframe = pts;
        } else if self.keyframe.is_some() && self.keyframe <= pts {
            self.spoilt = false;
        }
        self.begun = true;
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back((pts, self.spoilt && (gap || !keyframe)));
    }

    /// The decoder says that what it got last is broken.
    pub fn broken(&mut self) {
        (self.spoilt, self.keyframe) = (true, None);
        if let Some(last) = self.sent.back_mut() {
            last.1 = true;
        }
    }

    /// Whether the picture with this PTS, which has left the decoder, is broken. The two fields of
    /// one may have come apart. To a stream without times, such as a bare file of H.264, the decoder
    /// gives some: then pictures are taken as they came.
    pub fn take(&mut self, pts: Option<gst::ClockTime>) -> bool {
        let mut found = None;
        self.sent.retain(|it| {
            let same = it.0.is_some() && it.0 == pts;
            found = if same { Some(it.1 | found.unwrap_or_default()) } else { found };
            !same
        });
        let untimed = |it: &Self| it.sent.iter().position(|it| it.0.is_none());
        let next = found.or_else(|| self.sent.remove(untimed(self)?).map(|it| it.1));
        // One that cannot be told from others is as bad as any of them.
        next.unwrap_or_else(|| self.spoilt || self.sent.iter().any(|it| it.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Option<gst::ClockTime> {
        Some(gst::ClockTime::from_mseconds(ms))
    }

    /// The pictures that are broken, of a stream that was sent as `K` keyframe, `P` other, `-` a gap,
    /// `!` what came last is said to be broken; the PTS in that order.
    fn broken(text: &str, pts: &[u64]) -> Vec<u64> {
        let (mut damage, mut next) = (Damage::default(), pts.iter());
        for it in text.chars() {
            match it {
                '!' => damage.broken(),
                '-' => damage.gap(),
                it => damage.arrives(ms(*next.next().unwrap()), it == 'K'),
            }
        }
        let mut all = pts.to_vec();
        all.sort_unstable();
        all.into_iter().filter(|it| damage.take(ms(*it))).collect()
    }

    #[test]
    fn after_damage_all_is_broken_until_the_next_keyframe() {
        assert!(broken("KPPKPP", &[0, 1, 2, 3, 4, 5]).is_empty());
        assert_eq!(broken("KPP!PPKPP", &[0, 1, 2, 3, 4, 5, 6, 7]), [2, 3, 4]);
        assert_eq!(broken("KP-PPKP", &[0, 1, 2, 3, 4, 5]), [2, 3]);
        assert_eq!(broken("KP-PKPKP", &[0, 1, 2, 3, 4, 5, 6]), [2, 3, 4]);
        assert_eq!(broken("K!PKP", &[0, 1, 2, 3]), [0, 1]);
        assert_eq!(broken("KPP!KP!", &[0, 1, 2, 3, 4]), [2, 4], "twice");
        assert!(broken("-KPP", &[0, 1, 2]).is_empty(), "a stream begins with a gap");
    }

    #[test]
    fn what_a_keyframe_precedes_may_be_made_from_before_it() {
        // Sent 0 3 1 2, 6 (the keyframe) 4 5, 9 7 8.
        let pts = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8];
        assert_eq!(broken("KP!PPKPPPPP", &pts), [1, 2, 3, 4, 5]);
        assert_eq!(broken("KPPPKP!PPPP", &pts), [4, 5, 7, 8, 9]);
    }

    #[test]
    fn a_gap_touches_what_came_after_it_though_that_is_decoded_later() {
        let mut damage = Damage::default();
        damage.arrives(ms(0), true);
        damage.gap();
        // Two deltas, of which none is decoded, then a keyframe.
        assert_eq!([damage.comes(), damage.comes(), damage.comes()], [true, true, false]);
        damage.goes(false);
        damage.arrives(ms(3), true);
        assert!(!damage.take(ms(0)) && !damage.take(ms(3)));
    }

    #[test]
    fn pictures_without_times_are_taken_as_they_came() {
        let mut damage = Damage::default();
        damage.arrives(None, true);
        damage.arrives(None, false);
        damage.broken();
        damage.arrives(None, false);
        damage.arrives(None, true);
        damage.arrives(None, false);
        let all: Vec<_> = (0..5).map(|it| damage.take(ms(it).filter(|_| it != 2))).collect();
        assert_eq!(all, [false, true, true, false, false]);
        assert!(!damage.take(None) && damage.sent.is_empty());
    }

    #[test]
    fn a_decoder_that_gives_nothing_takes_no_memory() {
        let mut damage = Damage::default();
        (0..10_000).for_each(|it| damage.arrives(ms(it), it == 0));
        assert_eq!(damage.sent.len(), SENT_MAX);
    }
}
