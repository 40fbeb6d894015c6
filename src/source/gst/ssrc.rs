//! One source per stream: a camera that changes its SSRC goes on as the one that it was.
//!
//! `rtspsrc` has one pad per stream, and a second source in the same session breaks the connection.
//! So the packets of a new one are written over with the SSRC of the first. What changes with it,
//! numbers and timestamps, the jitter buffer takes for a restart of the same.

use std::sync::{Arc, Mutex, PoisonError};

use gstreamer::{self as gst, prelude::*};

/// Where the SSRC is in a packet of RTP and in a sender report.
const IN_RTP: usize = 8;
const IN_REPORT: usize = 4;

/// The sources of one connection.
#[derive(Clone, Debug, Default)]
pub struct Sources(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// The SSRC and payload type of the first packet.
    first: Option<(u32, u8)>,
    /// The SSRC of the last one.
    now: u32,
}

impl Sources {
    /// Looks after the RTP packets that pass `pad`.
    pub fn watch(&self, pad: &gst::Pad) {
        let sources = self.clone();
        pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
            if let Some(buffer) = info.buffer_mut() {
                let mut head = [0; 12];
                let read = buffer.copy_to_slice(0, &mut head).is_ok();
                if let Some(first) = sources.rtp(&head).filter(|_| read) {
                    write(buffer, IN_RTP, first);
                }
            }
            gst::PadProbeReturn::Ok
        });
    }

    /// Looks after a packet of RTCP.
    pub fn report(&self, buffer: &mut gst::Buffer) {
        let mut head = [0; 8];
        let read = buffer.copy_to_slice(0, &mut head).is_ok();
        if let Some(first) = self.rtcp(&head).filter(|_| read) {
            write(buffer, IN_REPORT, first);
        }
    }

    /// What is to be written over the SSRC of a packet with this head, if anything. Other payload
    /// types are streams of their own, as for repairs.
    fn rtp(&self, head: &[u8; 12]) -> Option<u32> {
        let (ssrc, kind) = (word(&head[IN_RTP..]), head[1] & 0x7f);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, first_kind) = *seen.first.get_or_insert((ssrc, kind));
        if kind != first_kind {
            return None;
        }
        seen.now = ssrc;
        (ssrc != first).then_some(first)
    }

    /// The same for RTCP.
    fn rtcp(&self, head: &[u8; 8]) -> Option<u32> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, _) = seen.first?;
        let ssrc = word(&head[IN_REPORT..]);
        (ssrc == seen.now && ssrc != first).then_some(first)
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("four bytes"))
}

fn write(buffer: &mut gst::Buffer, at: usize, ssrc: u32) {
    // One that cannot be written goes on as it is.
    buffer.make_mut().copy_from_slice(at, &ssrc.to_be_bytes()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rtp(ssrc: u8, kind: u8) -> [u8; 12] {
        [0x80, 0x80 | kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, ssrc]
    }

    fn report(ssrc: u8) -> [u8; 8] {
        [0x80, 200, 0, 6, 0, 0, 0, ssrc]
    }

    #[test]
    fn a_second_source_of_the_same_kind_is_the_first_and_others_stay_what_they_are() {
        let it = Sources::default();
        assert_eq!(it.rtcp(&report(9)), None, "before the first packet");
        assert_eq!([it.rtp(&rtp(1, 96)), it.rtp(&rtp(1, 96))], [None, None]);
        assert_eq!([it.rtp(&rtp(7, 97)), it.rtcp(&report(7))], [None, None]);
        assert_eq!([it.rtp(&rtp(2, 96)), it.rtcp(&report(2))], [Some(1), Some(1)]);
        assert_eq!(it.rtcp(&report(1)), None, "a late one of the first");
        assert_eq!([it.rtp(&rtp(3, 96)), it.rtcp(&report(2))], [Some(1), None]);
    }
}
