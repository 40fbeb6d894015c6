//! When a connection that says nothing counts as broken. Pure: the caller brings the time.
//!
//! A stream is watched at two points, before the depayloader and after the decoder, by the monotonic
//! clock. Silence is measured in the stream's own periods, so that a camera with one picture a second
//! is not taken for a dead one.

use std::{
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use crate::frame::Code;

/// A live stream that gives no picture for this long after it was opened has failed; so has one
/// that gives only one, as long as its period is not known and what it announces is doubted.
pub const FIRST_PICTURE_MAX: Duration = Duration::from_secs(15);

/// One that gives data but no picture, as before the first keyframe of a camera that sends one a
/// minute, after this.
pub const FIRST_KEYFRAME_MAX: Duration = Duration::from_secs(90);

/// A stream slower than one picture in `stall_after` is given this many of its own periods.
const STALL_PERIODS: u32 = 5;

/// After a loss the depayloader waits for a keyframe: data without pictures is given this many of
/// the stream's keyframe intervals.
const KEYFRAME_INTERVALS: u32 = 3;

/// Periods that the usual one is taken of.
const PERIODS: usize = 9;

/// Rates that a stream may announce: beyond, it is a slip of whoever wrote it.
const ANNOUNCED_FPS: RangeInclusive<f64> = 0.05..=1000.0;

/// What has come in before the decoder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network {
    /// When the last data came.
    pub last: Option<Instant>,
    /// When the last keyframe came.
    pub last_keyframe: Option<Instant>,
    /// The longest time between two keyframes.
    pub keyframe_interval: Duration,
    /// The usual time between two pictures, where not all of them are decoded.
    pub period: Option<Duration>,
}

impl Network {
    /// Data has come.
    pub fn data(&mut self, now: Instant) {
        self.last = Some(now);
    }

    /// An encoded picture that needs no other has come.
    pub fn keyframe(&mut self, now: Instant) {
        if let Some(before) = self.last_keyframe.replace(now) {
            let interval = now.saturating_duration_since(before);
            self.keyframe_interval = self.keyframe_interval.max(interval);
        }
    }
}

/// So many connections in a row that fall silent after one picture say that the stream has become
/// slower than it was, or never was as fast as it announces.
const LONELY_MAX: u32 = 2;

/// What is known of a stream from its connections before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    period: Option<Duration>,
    /// Connections in a row that fell silent after one picture.
    lonely: u32,
}

impl Known {
    /// A connection is over; `silent`: because nothing came any more.
    pub fn learn(&mut self, watch: &Watch, silent: bool) {
        match watch.pictures {
            0 => {}
            1 if !silent && watch.period().is_none() => {}
            1 if watch.period().is_none() => {
                self.lonely += 1;
                if LONELY_MAX <= self.lonely {
                    *self = Known { period: None, lonely: LONELY_MAX };
                }
            }
            _ => *self = Known { period: watch.period(), lonely: 0 },
        }
    }
}

/// What a stream is watched by.
#[derive(Debug)]
pub struct Watch {
    stall_after: Duration,
    /// The period that the connection before had.
    expected: Option<Duration>,
    /// Whether what the stream announces has turned out to be wrong.
    doubted: bool,
    /// The period before the decoder, where not all pictures are decoded.
    measured: Option<Duration>,
    /// The longest time between two pictures that are left over where not all are decoded.
    spacing: Duration,
    opened: Instant,
    pictures: u64,
    last_picture: Instant,
    last_pts: Option<Duration>,
    /// The last periods, in the order of their places, not of time.
    periods: Vec<Duration>,
}

/// Why a connection counts as broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// [`Code::Timeout`] before the first picture, [`Code::Stall`] after.
    pub code: Code,
    /// What has come and what not.
    pub detail: String,
}

impl Watch {
    /// Watches a connection from its opening on.
    pub fn new(stall_after: Duration, now: Instant) -> Watch {
        Watch {
            stall_after,
            expected: None,
            doubted: false,
            measured: None,
            spacing: Duration::ZERO,
            opened: now,
            pictures: 0,
            last_picture: now,
            last_pts: None,
            periods: Vec::with_capacity(PERIODS),
        }
    }

    /// The same, of a stream that was connected before: its period holds until it has one of its own.
    pub fn expecting(self, known: Known) -> Watch {
        Watch { expected: known.period, doubted: LONELY_MAX <= known.lonely, ..self }
    }

    /// The same, of a stream of which not all pictures are decoded, but one at least this often.
    pub fn spaced(self, spacing: Duration) -> Watch {
        Watch { spacing, ..self }
    }

    /// The usual time between two pictures before the decoder, where not all are decoded.
    pub fn measured(&mut self, period: Option<Duration>) {
        self.measured = period;
    }

    /// Pictures so far.
    pub fn pictures(&self) -> u64 {
        self.pictures
    }

    /// A picture has left the decoder.
    pub fn picture(&mut self, now: Instant, pts: Option<Duration>) {
        if 0 < self.pictures {
            // By PTS, as cameras begin with a burst; by the clock where there is none.
            let period = match (self.last_pts, pts) {
                (Some(before), Some(pts)) => pts.saturating_sub(before),
                _ => now.saturating_duration_since(self.last_picture),
            };
            if self.periods.len() < PERIODS {
                self.periods.push(period);
            } else {
                self.periods[(self.pictures % PERIODS as u64) as usize] = period;
            }
        }
        (self.pictures, self.last_picture, self.last_pts) = (self.pictures + 1, now, pts);
    }

    /// The usual time between two pictures: a gap or a jump of the PTS does not count.
    pub fn period(&self) -> Option<Duration> {
        if self.measured.is_some() {
            return self.measured;
        }
        let mut sorted = self.periods.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    /// Whether a live connection counts as broken. `announced`: pictures per second that the stream
    /// says it has, which holds until its period is known.
    pub fn check(
        &self,
        network: &Network,
        announced: Option<f64>,
        now: Instant,
    ) -> Option<Silence> {
        let since = |at: Instant| now.saturating_duration_since(at);
        let data = match network.last {
            None => "no data has come".to_owned(),
            Some(at) => format!("the last data came {:.1} s ago", since(at).as_secs_f64()),
        };
        if self.pictures == 0 {
            // What comes may be waiting for its first keyframe.
            let coming = network.last.is_some_and(|it| since(it) < self.stall_after);
            let limit = if coming { FIRST_KEYFRAME_MAX } else { FIRST_PICTURE_MAX };
            let detail = format!("no picture within {} s: {data}", limit.as_secs());
            let silent = limit <= since(self.opened);
            return silent.then_some(Silence { code: Code::Timeout, detail });
        }
        let announced = announced
            .filter(|it| !self.doubted && ANNOUNCED_FPS.contains(it))
            .map(|it| Duration::from_secs_f64(it.recip()));
        let limit = match self.period().or(self.expected).or(announced) {
            Some(period) => self.stall_after.max(period * STALL_PERIODS),
            None => self.stall_after.max(FIRST_PICTURE_MAX),
        };
        let last_data = network.last.map_or(self.last_picture, |it| it.max(self.last_picture));
        let (what, limit) = if limit <= since(last_data) {
            ("", limit)
        } else {
            let keyframes = match network.keyframe_interval {
                Duration::ZERO => FIRST_PICTURE_MAX,
                interval => interval * KEYFRAME_INTERVALS,
            };
            (", though data comes", limit.max(keyframes) + self.spacing)
        };
        let silence = since(self.last_picture);
        (limit <= silence).then(|| Silence {
            code: Code::Stall,
            detail: format!(
                "no picture for {:.1} s after {} pictures{what}: {data}",
                silence.as_secs_f64(),
                self.pictures
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(4);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A camera with a picture every `period`, a keyframe every tenth, for `pictures`; then the
    /// watch, what came in, and when the last picture did.
    fn camera(period: Duration, pictures: u32) -> (Watch, Network, Instant) {
        let start = Instant::now();
        let (mut watch, mut network) = (Watch::new(STALL, start), Network::default());
        for i in 0..pictures {
            let now = start + period * i;
            network.data(now);
            if i % 10 == 0 {
                network.keyframe(now);
            }
            assert_eq!(watch.check(&network, None, now), None, "picture {i}");
            watch.picture(now, Some(period * i));
        }
        (watch, network, start + period * (pictures - 1))
    }

    /// After how many milliseconds of silence the connection counts as broken, looking every 250.
    fn noticed(watch: &Watch, network: &Network, from: Instant) -> (u64, Silence) {
        let mut looks = (0..).map(|it| it * 250);
        looks.find_map(|it| Some((it, watch.check(network, None, from + ms(it))?))).unwrap()
    }

    #[test]
    fn silence_is_noticed_within_a_second_after_stall_after() {
        for fps in [2, 5, 15, 25, 60] {
            let (watch, network, last) = camera(Duration::from_secs(1) / fps, 300);
            let (after, silence) = noticed(&watch, &network, last);
            assert_eq!((after, silence.code), (4_000, Code::Stall), "{fps} fps: {silence:?}");
            assert!(silence.detail.contains("the last data came 4.0 s ago"), "{silence:?}");
        }
    }

    #[test]
    fn a_slow_camera_is_given_five_of_its_periods() {
        let (watch, network, last) = camera(ms(1_000), 3);
        assert_eq!(noticed(&watch, &network, last).0, 5_000);
        let (watch, network, last) = camera(ms(10_000), 3);
        assert_eq!(noticed(&watch, &network, last).0, 50_000);
    }

    #[test]
    fn one_long_gap_or_a_burst_does_not_change_what_is_usual() {
        let (mut watch, mut network, mut last) = camera(ms(40), 100);
        for gap in [3_900, 40, 40, 0, 0, 40] {
            last += ms(gap);
            network.data(last);
            watch.picture(last, watch.last_pts.map(|it| it + ms(gap)));
        }
        assert_eq!(watch.period(), Some(ms(40)));
        assert_eq!(noticed(&watch, &network, last).0, 4_000);
    }

    #[test]
    fn a_stream_that_was_known_before_is_watched_from_its_first_picture_on() {
        let mut known = Known::default();
        known.learn(&camera(ms(40), 100).0, false);
        let noticed = |known: Known, period, pictures| {
            let (watch, network, last) = camera(period, pictures);
            noticed(&watch.expecting(known), &network, last).0
        };
        assert_eq!(noticed(known, ms(40), 1), 4_000);
        assert_eq!(noticed(known, ms(2_000), 3), 10_000, "its own period counts");
        // It may have become slower: then its second picture must be waited for.
        let one = camera(ms(40), 1).0;
        known.learn(&one, true);
        known.learn(&one, false);
        assert_eq!(noticed(known, ms(40), 1), 4_000, "silent once is an outage");
        known.learn(&one, true);
        assert_eq!(noticed(known, ms(40), 1), 15_000);
    }

    #[test]
    fn what_a_stream_announces_holds_until_it_has_twice_been_silent_after_one_picture() {
        let noticed = |known: Known, announced: f64| {
            let (watch, network, last) = camera(ms(40), 1);
            let watch = watch.expecting(known);
            let silent = |ms_after: &u64| {
                watch.check(&network, Some(announced), last + ms(*ms_after)).is_some()
            };
            (0..).map(|it| it * 250).find(silent).unwrap()
        };
        let mut known = Known::default();
        assert_eq!(noticed(known, 25.0), 4_000);
        assert_eq!(noticed(known, 0.5), 10_000, "five of its periods");
        for nonsense in [0.0, -25.0, f64::NAN, f64::INFINITY, 1e-19, 1e-4, 90_000.0] {
            assert_eq!(noticed(known, nonsense), 15_000, "{nonsense}");
        }
        // One that announces 25 pictures a second and sends one in ten seconds.
        let one = camera(ms(40), 1).0;
        for expected in [4_000, 15_000, 15_000] {
            known.learn(&one, true);
            assert_eq!(noticed(known, 25.0), expected);
        }
        known.learn(&camera(ms(10_000), 2).0, false);
        assert_eq!(
            noticed(known, 25.0),
            50_000,
            "what was measured comes before what is announced"
        );
    }

    #[test]
    fn a_stream_without_pts_is_measured_by_the_clock() {
        let start = Instant::now();
        let mut watch = Watch::new(STALL, start);
        (0..5).for_each(|i| watch.picture(start + ms(2_000 * i), None));
        assert_eq!(watch.period(), Some(ms(2_000)));
    }

    #[test]
    fn data_without_pictures_is_given_three_keyframe_intervals() {
        let (watch, mut network, last) = camera(ms(200), 60);
        assert_eq!(network.keyframe_interval, ms(2_000));
        let after = (0..100).map(|it| it * 250).find(|it| {
            network.data(last + ms(*it));
            watch.check(&network, None, last + ms(*it)).is_some()
        });
        assert_eq!(after, Some(6_000));
        network.data(last + ms(6_000));
        let silence = watch.check(&network, None, last + ms(6_000)).unwrap();
        assert!(silence.detail.contains("though data comes"), "{silence:?}");
    }

    #[test]
    fn a_stream_that_never_starts_is_given_fifteen_seconds() {
        let start = Instant::now();
        let (watch, network) = (Watch::new(STALL, start), Network::default());
        let (after, silence) = noticed(&watch, &network, start);
        assert_eq!((after, silence.code), (15_000, Code::Timeout));
        assert_eq!(silence.detail, "no picture within 15 s: no data has come");
        let mut waiting = Network::default();
        let after = (0..100).find(|it| {
            waiting.data(start + ms(it * 1_000));
            watch.check(&waiting, None, start + ms(it * 1_000)).is_some()
        });
        assert_eq!(after, Some(90), "data comes, and a keyframe may yet");
        let (watch, network, last) = camera(ms(40), 1);
        assert_eq!(noticed(&watch, &network, last).0, 15_000, "its period is not known yet");
    }
}
