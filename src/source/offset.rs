//! How far a camera's clock is from ours, and between which moments a picture was taken. Pure.
//!
//! A picture that the camera took at `m` by its clock and that came at `a` by ours gives `m - a`: the
//! offset of the camera's clock less the way of the picture, through encoder and network. The picture
//! with the shortest way says the most: the offset is at least the largest `m - a`. Only what goes
//! the other way says what it is at most. The camera cannot have sent its first report before we asked
//! for the stream, so its clock stood at what that report says at `asked` or later: the offset is at
//! most `first - asked`. The two together say how long the shortest way can be, and with it when a
//! picture was taken: neither after `m` less the smallest offset nor before `m` less the largest.

use std::time::{Duration, Instant, SystemTime};

/// Quartz and NTP's corrections move a clock by at most this part of the time that passes.
pub const DRIFT_DIVISOR: i128 = 2_000;

/// A picture that seems to be so much later than the fastest may be one whose RTP timestamps were
/// set back; when it was taken is not known then.
const LATE_MAX: i128 = 1_000_000_000;

/// A picture that would have been taken so long after it came does not belong to the others.
const WRONG_MIN: Duration = Duration::from_millis(250);

/// In so much time a picture comes by the shortest way.
const ROUND: Duration = Duration::from_secs(30);

/// After the camera's clock was set, pictures that were on their way still tell the time before.
const SETTLING: Duration = Duration::from_secs(1);

/// What the RTCP reports of one connection have said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reports {
    /// When we asked for the stream: no report was sent before.
    pub asked: Instant,
    /// Where the camera's clock stood when it sent the first report.
    pub first: SystemTime,
    /// How far two reports differ in what they say of the same picture.
    pub slack: Duration,
    /// How often the camera's clock or its RTP timestamps were set in between.
    pub sets: u32,
}

/// What is known of one picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// The camera's clock less ours, in nanoseconds, by the fastest picture; the true offset is
    /// larger by the way of that one.
    pub offset: i128,
    /// The picture was taken between these, by our clock, in nanoseconds since the Unix epoch.
    pub taken: Option<(i128, i128)>,
}

/// When a picture arrived.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    /// By the monotonic clock, in nanoseconds since any moment that stays the same.
    pub mono: i128,
    /// By the wall clock, in nanoseconds since the Unix epoch.
    pub wall: i128,
}

/// The offset of one camera's clock, measured against our monotonic one.
#[derive(Debug, Default)]
pub struct Offset {
    /// What it is at least: the fastest picture so far.
    least: Option<At>,
    /// What it is at most.
    most: Option<At>,
    /// How long the shortest way of a picture can be, by the first report.
    way: i128,
    /// The fastest picture since [`Offset::since`].
    fastest: Option<At>,
    since: i128,
    /// Whether the first round is over, after which the way is what it is.
    measured: bool,
    /// The connection, by when it was asked for.
    asked: Option<i128>,
    /// The first report says nothing about the clock as it is now.
    spent: bool,
    sets: u32,
    /// Until then only the newest picture counts.
    settled: i128,
}

/// An offset, and when it was that.
#[derive(Clone, Copy, Debug)]
struct At {
    offset: i128,
    mono: i128,
}

impl At {
    /// The least that it can be by now.
    fn least(self, now: i128) -> i128 {
        self.offset - drift(now - self.mono)
    }

    /// The most that it can be by now.
    fn most(self, now: i128) -> i128 {
        self.offset + drift(now - self.mono)
    }
}

impl Offset {
    /// Forgets what the pictures so far have said: their timestamps and the next ones' do not belong
    /// together.
    pub fn forget(&mut self) {
        (self.least, self.most, self.fastest) = (None, None, None);
        self.spent = self.asked.is_some();
    }

    /// Takes in a picture. `captured`: by the camera's clock, in nanoseconds since the Unix epoch.
    /// `reports` come with [`Reports::asked`] by the same clock as `arrived.mono`.
    pub fn see(
        &mut self,
        captured: i128,
        arrived: Arrived,
        reports: Option<(i128, &Reports)>,
    ) -> Known {
        let Arrived { mono, wall } = arrived;
        if let Some((asked, reports)) = reports {
            if self.asked != Some(asked) {
                *self = Offset { asked: Some(asked), sets: reports.sets, ..Offset::default() };
                self.spent = 0 < reports.sets;
            } else if self.sets != reports.sets {
                self.forget();
                self.sets = reports.sets;
                self.settled = mono + nanos(SETTLING);
            }
        }
        let this = At { offset: captured - mono, mono };
        self.bound(this, reports);
        let least = self.least.filter(|it| self.settled <= mono && this.offset < it.least(mono));
        let least = *self.least.insert(least.unwrap_or(this));
        let from_mono = wall - mono;
        let slack = reports.map_or(0, |it| nanos(it.1.slack));
        let late = LATE_MAX < least.offset - this.offset;
        let taken = self.most.filter(|_| !late).map(|most| {
            let earliest = captured - most.most(mono) - slack;
            let latest = captured - least.least(mono) + slack;
            (earliest + from_mono, latest.min(mono) + from_mono)
        });
        Known { offset: least.offset - from_mono, taken }
    }

    /// Brings the most that the offset can be up to date.
    fn bound(&mut self, this: At, reports: Option<(i128, &Reports)>) {
        let now = this.mono;
        if self.most.is_none()
            && !self.spent
            && let Some((asked, reports)) = reports
        {
            self.most = Some(At { offset: since_1970(reports.first) - asked, mono: asked });
            (self.way, self.fastest, self.since) = (i128::MAX, None, now);
            self.measured = false;
        }
        let Some(most) = self.most else { return };
        let ahead = this.offset - most.most(now);
        if nanos(WRONG_MIN) < ahead {
            // It would have come before it was taken: its timestamps are wrong, or the first report.
            return self.forget();
        }
        if 0 < ahead {
            self.most = Some(this);
        }
        let fastest = self.fastest.filter(|it| this.offset < it.least(now));
        let fastest = *self.fastest.insert(fastest.unwrap_or(this));
        if !self.measured {
            self.way = self.way.min((most.most(now) - this.offset).max(0));
        }
        if nanos(ROUND) <= now - self.since {
            let offset = most.most(now).min(fastest.most(now) + self.way);
            self.most = Some(At { offset, mono: now });
            (self.fastest, self.since, self.measured) = (None, now, true);
        }
    }
}

fn drift(elapsed: i128) -> i128 {
    elapsed.max(0) / DRIFT_DIVISOR
}

/// A duration in nanoseconds.
pub fn nanos(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).expect("a duration of less than 10^22 years")
}

/// A moment in nanoseconds since the Unix epoch.
pub fn since_1970(time: SystemTime) -> i128 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => nanos(after),
        Err(before) => -nanos(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i128 = 1_000_000;

    /// A camera whose clock is `ahead` of ours; all in milliseconds. Our clocks start at 0.
    struct Camera {
        ahead: i128,
        offset: Offset,
        reports: Reports,
    }

    /// Asked at 0, with a first report that was sent at `first` and tells the camera's time then.
    fn camera(ahead: i128, first: i128) -> Camera {
        let told = Duration::from_nanos_u128(((first + ahead) * MS).unsigned_abs());
        let first = SystemTime::UNIX_EPOCH + told;
        let reports = Reports { asked: Instant::now(), first, slack: Duration::ZERO, sets: 0 };
        Camera { ahead, offset: Offset::default(), reports }
    }

    impl Camera {
        /// A picture that is taken at `taken` and needs `way`.
        fn picture(&mut self, taken: i128, way: i128) -> Known {
            let mono = (taken + way) * MS;
            let captured = (taken + self.ahead) * MS;
            let arrived = Arrived { mono, wall: mono };
            let known = self.offset.see(captured, arrived, Some((0, &self.reports)));
            if let Some((earliest, latest)) = known.taken {
                assert!(earliest <= taken * MS && taken * MS <= latest, "{taken}: {known:?}");
                assert!(latest <= arrived.wall, "{taken}: {known:?}");
            }
            known
        }
    }

    fn ms(known: Known) -> (i128, Option<i128>) {
        (known.offset / MS, known.taken.map(|it| (it.1 - it.0) / MS))
    }

    #[test]
    fn the_fastest_picture_gives_the_offset_and_the_first_report_how_wrong_it_can_be() {
        for ahead in [0, 1_500, 3_600_000] {
            let mut it = camera(ahead, 100);
            // The offset is off by the way of the fastest; and as it was 100 ms from the question to
            // the report, that way can be 100 ms longer than it is.
            assert_eq!(ms(it.picture(200, 60)), (ahead - 60, Some(160)));
            assert_eq!(ms(it.picture(240, 40)), (ahead - 40, Some(140)), "a shorter way");
            assert_eq!(ms(it.picture(280, 90)), (ahead - 40, Some(140)), "a longer way");
        }
    }

    #[test]
    fn without_a_report_only_the_offset_is_known() {
        let arrived = Arrived { mono: 60 * MS, wall: 60 * MS };
        let known = Offset::default().see(20 * MS, arrived, None);
        assert_eq!(known, Known { offset: -40 * MS, taken: None });
    }

    #[test]
    fn clocks_that_drift_stay_within_the_bound_for_a_day() {
        for part in [-4_000, 4_000] {
            let mut it = camera(0, 50);
            let mut last = None;
            for i in 0..5 * 86_400 {
                it.ahead = i * 200 / part;
                let way = 40 + i * 7_919 % 100;
                last = Some(it.picture(i * 200, way));
            }
            let (offset, width) = ms(last.unwrap());
            assert!((offset - 86_400_000 / part + 40).abs() < 30, "{offset}");
            assert!((50..100).contains(&width.unwrap()), "{width:?}");
        }
    }

    #[test]
    fn a_clock_that_was_set_is_measured_anew_and_nothing_bounds_it() {
        let mut it = camera(0, 100);
        it.picture(200, 40);
        it.reports.sets = 1;
        // One that was on its way as the report came still tells the time before.
        it.picture(240, 40);
        it.ahead = -500;
        assert_eq!(ms(it.picture(280, 60)), (-560, None));
        assert_eq!(ms(it.picture(2_000, 45)), (-545, None));
        assert_eq!(ms(it.picture(2_040, 60)), (-545, None));
        it.reports.asked += Duration::from_secs(1);
        let (asked, reports) = (3_000 * MS, it.reports);
        let arrived = Arrived { mono: 3_100 * MS, wall: 3_100 * MS };
        let reports = Reports { first: SystemTime::UNIX_EPOCH + Duration::from_secs(3), ..reports };
        let known = it.offset.see(3_000 * MS, arrived, Some((asked, &reports)));
        assert_eq!(known.taken, None, "set in this connection too");
        let reports = Reports { sets: 0, ..reports };
        let known = it.offset.see(3_000 * MS, arrived, Some((asked + 1, &reports)));
        assert!(known.taken.is_some(), "a new connection");
    }

    #[test]
    fn what_cannot_be_true_bounds_nothing() {
        let mut it = camera(0, 100);
        assert!(it.picture(200, 40).taken.is_some());
        // By its timestamp this one was taken after it came, as after a jump.
        let arrived = Arrived { mono: 280 * MS, wall: 280 * MS };
        let known = it.offset.see(780 * MS, arrived, Some((0, &it.reports)));
        assert_eq!((known.offset, known.taken), (500 * MS, None));
        // A jump back looks like a picture that is very late.
        let mut it = camera(0, 100);
        assert!(it.picture(200, 40).taken.is_some());
        let arrived = Arrived { mono: 2_000 * MS, wall: 2_000 * MS };
        assert_eq!(it.offset.see(900 * MS, arrived, Some((0, &it.reports))).taken, None);
        it.offset.forget();
        assert_eq!(it.picture(2_040, 40).taken, None, "not by the report of before");
    }

    #[test]
    fn a_step_of_our_own_clock_is_seen_in_the_offset_at_once() {
        let mut it = camera(0, 100);
        it.picture(200, 40);
        let hour = 3_600_000 * MS;
        for step in [hour, -hour, 0] {
            let arrived = Arrived { mono: 280 * MS, wall: 280 * MS + step };
            let known = it.offset.see(240 * MS, arrived, Some((0, &it.reports)));
            assert_eq!(known.offset, -40 * MS - step);
            let (earliest, latest) = known.taken.unwrap();
            assert!(earliest - step <= 240 * MS && 240 * MS <= latest - step);
        }
    }
}
