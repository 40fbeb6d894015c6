//! What a camera's RTCP sender reports say of its clock.
//!
//! GStreamer dates the pictures by them (`add-reference-timestamp-meta`). What it does not tell, and
//! is read here, is when the first report was sent and whether the reports agree with each other.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gstreamer::{self as gst, prelude::*};

use crate::source::{
    gst::{shared::Shared, ssrc::Sources},
    offset::{DRIFT_DIVISOR, Reports},
};

/// Seconds from 1900, where NTP counts from, to 1970.
const NTP_TO_UNIX: u64 = 2_208_988_800;

/// Ticks of the RTP timestamps per second, as all our codecs have it but rare MPEG-4. Where that is
/// wrong the reports do not agree, and nothing is made of them.
const RATE: i128 = 90_000;

/// Reports that differ by more than this say that a clock was set. Cameras write the time of sending
/// beside the timestamp of the last picture, which is off by up to a picture's period.
const SET_MIN: Duration = Duration::from_millis(250);

const SENDER_REPORT: u8 = 200;

/// Reads the RTCP packets that come to an `rtspsrc`, and looks after its sources.
pub fn listen(source: &gst::Element, shared: &Arc<Shared>) {
    let shared = shared.clone();
    source.connect("new-manager", false, move |values| {
        let manager = values.get(1).and_then(|it| it.get::<gst::Element>().ok())?;
        let (shared, sources) = (shared.clone(), Sources::default());
        manager.connect_pad_added(move |_, pad| match pad.name() {
            name if name.starts_with("recv_rtp_sink") => sources.watch(pad),
            name if name.starts_with("recv_rtcp_sink") => read(pad, &shared, &sources),
            _ => {}
        });
        None
    });
}

fn read(pad: &gst::Pad, shared: &Arc<Shared>, sources: &Sources) {
    let (shared, sources) = (shared.clone(), sources.clone());
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        if let Some(buffer) = info.buffer_mut() {
            if let Ok(packet) = buffer.map_readable() {
                shared.report(&packet);
            }
            sources.report(buffer);
        }
        gst::PadProbeReturn::Ok
    });
}

/// When the camera took the picture, if its reports have said how its clock runs.
pub fn captured(buffer: &gst::BufferRef) -> Option<SystemTime> {
    let meta = buffer
        .iter_meta::<gst::ReferenceTimestampMeta>()
        .find(|it| it.reference().structure(0).is_some_and(|it| it.name() == "timestamp/x-ntp"))?;
    let since_1900 = Duration::from(meta.timestamp());
    let since_1970 = since_1900.checked_sub(Duration::from_secs(NTP_TO_UNIX))?;
    SystemTime::UNIX_EPOCH.checked_add(since_1970)
}

/// The reports of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    asked: Option<Instant>,
    reports: Option<Reports>,
    last: Option<Report>,
    /// How far the reports have come to differ from the first, but for what clocks drift.
    off: i128,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    source: u32,
    /// In nanoseconds since 1900.
    clock: i128,
    timestamp: u32,
}

impl Reading {
    /// The stream is about to be asked for. The first time counts.
    pub fn asked(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
    }

    /// What the reports so far have said. `None` before the first.
    pub fn get(&self) -> Option<Reports> {
        self.reports
    }

    /// Reads a packet as it came. What is no sender report, or cut short, says nothing.
    pub fn read(&mut self, mut packet: &[u8]) {
        while let Some(&[first, kind, high, low]) = packet.first_chunk() {
            let length = 4 * (1 + usize::from(u16::from_be_bytes([high, low])));
            if first >> 6 != 2 || packet.len() < length {
                return;
            }
            let (body, rest) = packet.split_at(length);
            let word = |at: usize| body[at..].first_chunk().map(|it| u32::from_be_bytes(*it));
            if kind == SENDER_REPORT && 20 <= length {
                let [source, seconds, parts, timestamp] =
                    [4, 8, 12, 16].map(|at| word(at).expect("the body has 20 bytes"));
                let parts = (i128::from(parts) * 1_000_000_000) >> 32;
                let clock = i128::from(seconds) * 1_000_000_000 + parts;
                // A camera without a clock writes 0.
                if 0 < seconds {
                    self.report(Report { source, clock, timestamp });
                }
            }
            packet = rest;
        }
    }

    fn report(&mut self, report: Report) {
        let last = self.last.replace(report);
        let (Some(asked), None) = (self.asked, self.reports) else {
            if let (Some(reports), Some(last)) = (&mut self.reports, last) {
                let elapsed = report.timestamp.wrapping_sub(last.timestamp).cast_signed();
                let elapsed = i128::from(elapsed) * 1_000_000_000 / RATE;
                self.off = settled(self.off, elapsed) + report.clock - last.clock - elapsed;
                let off = Duration::from_nanos_u128(self.off.unsigned_abs());
                if report.source == last.source && off <= SET_MIN {
                    reports.slack = reports.slack.max(off);
                } else {
                    (reports.sets, self.off) = (reports.sets + 1, 0);
                }
            }
            return;
        };
        let since_1900 = Duration::from_nanos_u128(report.clock.unsigned_abs());
        let first = since_1900.checked_sub(Duration::from_secs(NTP_TO_UNIX));
        self.reports = first.map(|it| {
            let first = SystemTime::UNIX_EPOCH + it;
            Reports { asked, first, slack: Duration::ZERO, sets: 0 }
        });
    }
}

/// What is left of a difference when the drift in so much time is not counted.
fn settled(off: i128, elapsed: i128) -> i128 {
    let drift = elapsed.max(0) / DRIFT_DIVISOR;
    off.signum() * (off.abs() - drift).max(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 3_900_000_000;

    fn report(source: u32, seconds: u32, millis: u32, timestamp: u32) -> Vec<u8> {
        let parts = ((u64::from(millis) << 32) / 1_000) as u32;
        let words = [source, seconds, parts, timestamp, 0, 0];
        let mut packet = vec![0x80, SENDER_REPORT, 0, 6];
        packet.extend(words.iter().flat_map(|it| it.to_be_bytes()));
        packet
    }

    fn reading(packets: &[Vec<u8>]) -> Option<(Duration, u32, Duration)> {
        let mut it = Reading::default();
        it.asked(Instant::now());
        packets.iter().for_each(|packet| it.read(packet));
        let Reports { first, slack, sets, .. } = it.get()?;
        Some((first.duration_since(SystemTime::UNIX_EPOCH).unwrap(), sets, slack))
    }

    #[test]
    fn reports_that_agree_count_once_and_those_that_do_not_are_counted() {
        let ms = Duration::from_millis;
        let first = report(1, NOW, 500, u32::MAX - 44_999);
        let since = ms((u64::from(NOW) - NTP_TO_UNIX) * 1_000 + 500);
        // A second later the timestamps have wrapped.
        let good = report(1, NOW + 1, 500, 45_000);
        let close = |it: Duration, ms: u64| it.as_millis().abs_diff(u128::from(ms)) <= 1;
        let got = |packets: &[Vec<u8>]| reading(packets).unwrap();
        assert_eq!(got(std::slice::from_ref(&first)), (since, 0, Duration::ZERO));
        let (at, sets, slack) = got(&[first.clone(), good.clone()]);
        assert!(at == since && sets == 0 && close(slack, 0), "{slack:?}");
        let (_, sets, slack) = got(&[first.clone(), report(1, NOW + 1, 540, 45_000), good.clone()]);
        assert!(sets == 0 && close(slack, 40), "{slack:?}");
        // A clock that is set in many small steps.
        let steps = [0, 1, 2, 3].map(|it| report(1, NOW + it, 500 + 100 * it, it * 90_000));
        assert_eq!(got(&steps).1, 1);
        for other in [
            report(1, NOW + 1, 751, 45_000),
            report(1, NOW + 3_601, 500, 45_000),
            report(1, NOW - 3_599, 500, 45_000),
            report(1, NOW + 1, 500, 1_000_000),
            report(2, NOW + 1, 500, 45_000),
        ] {
            assert_eq!(got(&[first.clone(), other]).1, 1);
        }
    }

    #[test]
    fn what_is_no_whole_report_of_a_clock_says_nothing() {
        let whole = report(1, NOW, 0, 0);
        for length in 0..whole.len() {
            assert_eq!(reading(&[whole[..length].to_vec()]), None, "{length} bytes");
        }
        assert_eq!(reading(&[report(1, 0, 0, 0)]), None, "no clock");
        assert_eq!(reading(&[report(1, 86_400, 0, 0)]), None, "1900");
        let mut other = whole.clone();
        other[1] = 201;
        assert_eq!(reading(&[other.clone()]), None, "a receiver report");
        // A compound packet: the report may be any part of it.
        other.extend(whole);
        assert!(reading(&[other]).is_some());
        assert_eq!(reading(&[vec![0; 64], vec![0x80; 3]]), None);
    }
}
