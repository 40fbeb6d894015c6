//! When a picture was taken and which number it has: the rules for PTS, epochs and time. Pure.

use std::time::{Duration, Instant, SystemTime};

use crate::{
    frame::{Dated, TimeSource},
    source::offset::{Arrived, Offset, Reports, nanos, since_1970},
};

/// A PTS further ahead than this is a new epoch, not a gap.
const JUMP_MAX: Duration = Duration::from_secs(10);

/// A clock that was set by more than this is not caught up with in small steps.
const SET_MIN: Duration = Duration::from_secs(2);

/// A correction of `time` is spread so that it runs at most this part faster or slower.
const SLEW_DIVISOR: u32 = 10;

/// What is known about a picture's time.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Presentation time in the stream, if it has one.
    pub pts: Option<Duration>,
    /// When it arrived, by the monotonic clock.
    pub arrived: Instant,
    /// The same, by the wall clock.
    pub arrived_wall: SystemTime,
    /// When the camera says that it took it, through RTCP.
    pub captured: Option<SystemTime>,
    /// What the reports that say so have said.
    pub reports: Option<Reports>,
}

/// What the clock says about a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The epoch.
    pub epoch: u64,
    /// Position in the epoch, from 0.
    pub frame: u64,
    /// Presentation time; never backward inside an epoch.
    pub pts: Duration,
    /// Time of the picture; never backward inside an epoch.
    pub time: SystemTime,
    /// Where `time` comes from, and how good it is.
    pub dated: Dated,
}

/// Numbers and times of one stream's pictures.
#[derive(Debug)]
pub struct Clock {
    /// The start of a file in the real world. `None` for everything else.
    file_start: Option<SystemTime>,
    /// The camera's clock counts only while it is this close to ours.
    max_clock_offset: Duration,
    offset: Offset,
    /// What the monotonic clock counts from.
    origin: Option<Instant>,
    /// The epoch of the next picture if `last` is `None`, else of the last one.
    epoch: u64,
    last: Option<Last>,
    /// The PTS that the epoch before ended with; `None` once there is a picture in this one.
    ended_pts: Option<Duration>,
}

/// The last picture of the running epoch.
#[derive(Clone, Copy, Debug)]
struct Last {
    stamp: Stamp,
    /// PTS as the stream gave it last, unrepaired.
    pts_given: Option<Duration>,
    arrived: Instant,
    arrived_wall: SystemTime,
    /// Capture time less PTS, as last told by RTCP, right or wrong: in nanoseconds since the Unix
    /// epoch.
    captured_at_zero: Option<i128>,
}

impl Clock {
    /// A clock whose first picture opens `first_epoch`.
    pub fn new(
        first_epoch: u64,
        file_start: Option<SystemTime>,
        max_clock_offset: Duration,
    ) -> Clock {
        Clock {
            file_start,
            max_clock_offset,
            offset: Offset::default(),
            origin: None,
            epoch: first_epoch,
            last: None,
            ended_pts: None,
        }
    }

    /// Whether this picture cannot belong to the running epoch: its PTS went back or jumped, or
    /// the host's clock was set back so far that `time` would stand still.
    pub fn breaks(&self, seen: &Seen) -> bool {
        let Some(last) = &self.last else {
            return false;
        };
        let by_pts = jumps(last.pts_given, seen.pts);
        let elapsed = seen.arrived.saturating_duration_since(last.arrived);
        let expected = last.arrived_wall + elapsed;
        let set_back = expected.duration_since(seen.arrived_wall).unwrap_or_default();
        by_pts || (self.file_start.is_none() && SET_MIN < set_back)
    }

    /// Ends the running epoch; returns its number and how many pictures it had. `None` if it had
    /// none, and then its number is used for the next pictures.
    pub fn end_epoch(&mut self) -> Option<(u64, u64)> {
        let last = self.last.take()?;
        self.ended_pts = last.pts_given;
        let ended = self.epoch;
        self.epoch += 1;
        Some((ended, last.stamp.frame + 1))
    }

    /// The epoch that the next picture belongs to.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Numbers the next picture of the running epoch.
    pub fn stamp(&mut self, seen: &Seen) -> Stamp {
        if jumps(self.ended_pts.take(), seen.pts) {
            self.offset.forget();
        }
        let pts = self.pts(seen);
        let captured_at_zero = match seen.captured {
            Some(captured) => Some(since_1970(captured) - nanos(pts)),
            // It is missing on some pictures: they are reckoned from the last that had it.
            None => self.last.and_then(|it| it.captured_at_zero),
        };
        let captured = captured_at_zero.map(|it| it + nanos(pts));
        let agrees = |captured: &i128| {
            (captured - since_1970(seen.arrived_wall)).abs() <= nanos(self.max_clock_offset)
        };
        let (target, source) = match (self.file_start, captured.filter(agrees)) {
            (Some(start), _) => (start + pts, TimeSource::File),
            (None, Some(captured)) => (from_nanos(captured), TimeSource::Rtcp),
            (None, None) => (seen.arrived_wall, TimeSource::Arrival),
        };
        let time = match &self.last {
            None => target,
            Some(_) if source == TimeSource::File => target,
            Some(last) => {
                let elapsed = match source {
                    TimeSource::Rtcp => pts.saturating_sub(last.stamp.pts),
                    _ => seen.arrived.saturating_duration_since(last.arrived),
                };
                slewed(last.stamp.time, elapsed, target, self.max_clock_offset.max(SET_MIN))
            }
        };
        let dated = self.dated(seen, source, captured, time);
        let frame = self.last.map_or(0, |it| it.stamp.frame + 1);
        let stamp = Stamp { epoch: self.epoch, frame, pts, time, dated };
        let pts_given = seen.pts.or(self.last.and_then(|it| it.pts_given));
        let (arrived, arrived_wall) = (seen.arrived, seen.arrived_wall);
        self.last = Some(Last { stamp, pts_given, arrived, arrived_wall, captured_at_zero });
        stamp
    }

    /// The PTS, or what the arrival makes of a missing one.
    fn pts(&self, seen: &Seen) -> Duration {
        match (&self.last, seen.pts) {
            (None, pts) => pts.unwrap_or_default(),
            (Some(last), Some(pts)) => pts.max(last.stamp.pts),
            (Some(last), None) => {
                last.stamp.pts + seen.arrived.saturating_duration_since(last.arrived)
            }
        }
    }

    /// How good `time` is, as far as the camera's clock says.
    fn dated(
        &mut self,
        seen: &Seen,
        source: TimeSource,
        captured: Option<i128>,
        time: SystemTime,
    ) -> Dated {
        let (Some(captured), None) = (captured, self.file_start) else {
            return Dated { source, error: None, clock_offset_ns: None };
        };
        let origin = *self.origin.get_or_insert(seen.arrived);
        let mono = |at: Instant| {
            nanos(at.saturating_duration_since(origin))
                - nanos(origin.saturating_duration_since(at))
        };
        let arrived = Arrived { mono: mono(seen.arrived), wall: since_1970(seen.arrived_wall) };
        let reports = seen.reports.as_ref().map(|it| (mono(it.asked), it));
        let known = self.offset.see(captured, arrived, reports);
        let error = known.taken.map(|(earliest, latest)| {
            let time = since_1970(time);
            Duration::from_nanos_u128((time - earliest).max(latest - time).unsigned_abs())
        });
        let clock_offset_ns = i64::try_from(known.offset).ok();
        Dated { source, error, clock_offset_ns }
    }
}

/// Whether the PTS goes back, or too far ahead for a gap.
fn jumps(before: Option<Duration>, pts: Option<Duration>) -> bool {
    let (Some(before), Some(pts)) = (before, pts) else { return false };
    pts < before || before + JUMP_MAX < pts
}

/// `last` plus `elapsed`, drawn towards `target` without a step: cameras and hosts correct their
/// clocks, and what follows should see neither a jump nor time standing still. More than `step`
/// ahead, it was set and is followed at once.
fn slewed(last: SystemTime, elapsed: Duration, target: SystemTime, step: Duration) -> SystemTime {
    let expected = last + elapsed;
    let give = elapsed / SLEW_DIVISOR;
    let lowest = expected - give;
    let highest = expected + give;
    if expected + step < target { target } else { target.clamp(lowest, highest) }
}

fn from_nanos(nanos: i128) -> SystemTime {
    let size = Duration::from_nanos_u128(nanos.unsigned_abs());
    if nanos < 0 { SystemTime::UNIX_EPOCH - size } else { SystemTime::UNIX_EPOCH + size }
}

/// Picks pictures by PTS so that at most so many per second go on: of each cell of a fixed grid
/// the picture nearest to its centre line, so that the rate is kept exactly and nothing drifts.
#[derive(Debug)]
pub struct Sampler {
    /// Millionths of pictures per second.
    micro_fps: u128,
    /// First PTS, last PTS and last cell of this epoch.
    last: Option<(Duration, Duration, u128)>,
    /// The last label, where others number them.
    label: Option<u64>,
}

impl Sampler {
    /// Lets `fps` pictures per second through. `None` if `fps` is not a number above 0.
    pub fn new(fps: f64) -> Option<Sampler> {
        let micro_fps = (fps * 1e6).round();
        let valid = (1.0..1e15).contains(&micro_fps);
        valid.then_some(Sampler { micro_fps: micro_fps as u128, last: None, label: None })
    }

    /// Forgets the grid; the next picture goes through and starts another.
    pub fn reset(&mut self) {
        (self.last, self.label) = (None, None);
    }

    /// Whether the picture goes on. `label`: which of all labels it can have, if that is known, as
    /// where not all pictures are decoded.
    pub fn keeps(&mut self, pts: Duration, label: Option<u64>) -> bool {
        if label.is_some() {
            let new = self.label < label;
            self.label = self.label.max(label);
            return new;
        }
        let Some((first, before, cell_before)) = self.last else {
            self.last = Some((pts, pts, 0));
            return true;
        };
        // Half a picture period early is nearer than half a period late. Without this a camera
        // whose own rate is `max_fps` would lose pictures to the jitter of its clock.
        const PER_SECOND: u128 = 1_000_000_000_000_000;
        let early =
            (pts.saturating_sub(before).as_nanos() / 2).min(PER_SECOND / self.micro_fps / 2);
        let cell = (pts.saturating_sub(first).as_nanos() + early) * self.micro_fps / PER_SECOND;
        self.last = Some((first, pts, cell.max(cell_before)));
        cell_before < cell
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const TWO_SECONDS: Duration = Duration::from_secs(2);

    struct Bench {
        clock: Clock,
        mono: Instant,
        wall: SystemTime,
    }

    fn bench() -> Bench {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        Bench { clock: Clock::new(7, None, TWO_SECONDS), mono: Instant::now(), wall }
    }

    impl Bench {
        fn seen(&self, pts: Option<u32>, at: u32, captured: Option<u32>) -> Seen {
            Seen {
                pts: pts.map(|it| it * MS),
                arrived: self.mono + at * MS,
                arrived_wall: self.wall + at * MS,
                captured: captured.map(|it| self.wall + it * MS),
                reports: None,
            }
        }

        fn stamp(&mut self, pts: Option<u32>, at: u32, captured: Option<u32>) -> Stamp {
            let seen = self.seen(pts, at, captured);
            assert!(!self.clock.breaks(&seen));
            self.clock.stamp(&seen)
        }

        fn since(&self, stamp: Stamp) -> u128 {
            stamp.time.duration_since(self.wall).unwrap().as_millis()
        }
    }

    #[test]
    fn equal_pts_are_accepted_and_missing_ones_follow_the_arrival() {
        let mut it = bench();
        let got = [(Some(100), 0), (Some(100), 40), (None, 80), (Some(120), 90), (Some(200), 120)]
            .map(|(pts, at)| it.stamp(pts, at, None))
            .map(|it| (it.epoch, it.frame, it.pts.as_millis()));
        assert_eq!(got, [(7, 0, 100), (7, 1, 100), (7, 2, 140), (7, 3, 140), (7, 4, 200)]);
    }

    #[test]
    fn a_pts_that_goes_back_or_jumps_opens_an_epoch() {
        let mut it = bench();
        it.stamp(Some(5_000), 0, None);
        for (pts, expected) in [(4_999, true), (5_000, false), (15_000, false), (15_001, true)] {
            assert_eq!(it.clock.breaks(&it.seen(Some(pts), 40, None)), expected, "{pts}");
        }
        assert!(!it.clock.breaks(&it.seen(None, 40, None)));
        assert_eq!(it.clock.end_epoch(), Some((7, 1)));
        assert_eq!(it.clock.end_epoch(), None, "no picture since");
        let stamp = it.stamp(Some(0), 80, None);
        assert_eq!((stamp.epoch, stamp.frame, stamp.pts), (8, 0, Duration::ZERO));
    }

    #[test]
    fn capture_time_is_slewed_in_and_carried_over_pictures_without_it() {
        let mut it = bench();
        let first = it.stamp(Some(0), 1_000, None);
        assert_eq!((first.dated.source, it.since(first)), (TimeSource::Arrival, 1_000));
        // The camera says that pictures are 60 ms older than they arrive: 40 ms later, the time
        // may run at 36 ms; after some more pictures it is there.
        let second = it.stamp(Some(40), 1_040, Some(980));
        assert_eq!((second.dated.source, it.since(second)), (TimeSource::Rtcp, 1_036));
        let last = (2..40).map(|i| it.stamp(Some(40 * i), 1_000 + 40 * i, None)).last().unwrap();
        assert_eq!((last.dated.source, it.since(last)), (TimeSource::Rtcp, 940 + 40 * 39));
    }

    #[test]
    fn a_camera_clock_that_is_off_by_more_than_two_seconds_does_not_count() {
        let mut it = bench();
        assert_eq!(it.stamp(Some(0), 10_000, Some(8_000)).dated.source, TimeSource::Rtcp);
        assert_eq!(it.stamp(Some(40), 10_040, Some(8_039)).dated.source, TimeSource::Arrival);
    }

    #[test]
    fn time_never_runs_backward_while_both_clocks_jitter() {
        let mut it = bench();
        let mut before = it.wall;
        for i in 0..1_000_u32 {
            let jitter = i * 7_919 % 101;
            let captured = (i % 3 == 0).then_some(40 * i + jitter * 9 % 400);
            let stamp = it.stamp((i % 5 != 4).then_some(40 * i), 40 * i + jitter, captured);
            assert!(before <= stamp.time, "{i}");
            before = stamp.time;
        }
    }

    #[test]
    fn the_hosts_clock_set_forward_is_followed_and_set_back_opens_an_epoch() {
        let mut it = bench();
        it.stamp(Some(0), 0, None);
        it.wall += Duration::from_secs(3600);
        let stamp = it.stamp(Some(40), 40, None);
        assert_eq!(it.since(stamp), 40);
        it.wall -= Duration::from_secs(3600);
        assert!(it.clock.breaks(&it.seen(Some(80), 80, None)));
    }

    #[test]
    fn a_file_with_a_start_time_counts_from_there() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
        let mut it = Bench { clock: Clock::new(0, Some(start), TWO_SECONDS), ..bench() };
        it.stamp(Some(0), 0, None);
        let stamp = it.stamp(Some(9_000), 1, None);
        assert_eq!((stamp.time, stamp.dated.source), (start + 9_000 * MS, TimeSource::File));
    }

    fn kept(source_fps: u32, max_fps: f64, frames: u32) -> Vec<u32> {
        let mut sampler = Sampler::new(max_fps).unwrap();
        (0..frames)
            .filter(|i| {
                sampler.keeps(
                    Duration::from_nanos(u64::from(*i) * 1_000_000_000 / u64::from(source_fps)),
                    None,
                )
            })
            .collect()
    }

    #[test]
    fn sampling_keeps_the_cadence_and_does_not_drift() {
        assert_eq!(kept(25, 5.0, 16), [0, 5, 10, 15]);
        assert_eq!(kept(25, 10.0, 11), [0, 2, 5, 7, 10]);
        assert_eq!(kept(25, 30.0, 500).len(), 500, "slower than the limit: all");
        assert_eq!(kept(25, 25.0, 500).len(), 500);
        assert_eq!(kept(30, 0.5, 3_000).len(), 50, "100 s");
        assert_eq!(kept(30, 7.0, 30 * 3600).len(), 7 * 3600, "an hour");
    }

    #[test]
    fn sampling_at_a_cameras_own_rate_survives_its_jitter() {
        let mut sampler = Sampler::new(10.0).unwrap();
        let pts = |i: u32| Duration::from_millis(u64::from(100 * i + i * 7_919 % 41));
        assert_eq!((0..1_000).filter(|i| sampler.keeps(pts(*i), None)).count(), 1_000);
        assert!(Sampler::new(0.0).is_none() && Sampler::new(f64::NAN).is_none());
    }
}
