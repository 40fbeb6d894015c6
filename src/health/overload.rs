//! Whether a stream gets fewer labels than it wants because there is too much to do. Pure.

use std::{collections::VecDeque, time::Duration};

/// What is looked at.
const WINDOW_SECONDS: u64 = 10;
/// A stream is not judged before so much of it is known.
const KNOWN_SECONDS: u64 = 5;
/// One in so many frames is lost: that is too much.
const RAISE_ONE_IN: u32 = 20;
/// One in so many, or fewer: that is good again. Far from the other, so that it does not flap.
const CLEAR_ONE_IN: u32 = 100;

/// How many labels a stream gets, and how many it wants: in thousandths of a frame per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Frames that went on.
    pub effective_mfps: u64,
    /// Those, and those that gave way.
    pub wanted_mfps: u64,
}

/// Frames in one second.
#[derive(Clone, Copy, Debug)]
struct Second {
    number: u64,
    kept: u32,
    lost: u32,
}

/// The last seconds of one stream.
#[derive(Clone, Debug, Default)]
pub struct Overload {
    seconds: VecDeque<Second>,
    /// As they were when it was raised. `None` iff all is well.
    degraded: Option<Rates>,
}

impl Overload {
    /// A frame goes on, before which `lost` gave way; `now` is the stream's own time. Gives the rates
    /// iff there is too much to do.
    pub fn see(&mut self, now: Duration, lost: u32) -> Option<Rates> {
        let number = now.as_secs();
        match self.seconds.back_mut() {
            Some(last) if last.number == number => {
                last.kept += 1;
                last.lost += lost;
                return self.degraded;
            }
            _ => {}
        }
        // A second is over, so this happens once a second at most.
        self.seconds.retain(|it| number <= it.number + WINDOW_SECONDS);
        self.judge(number);
        self.seconds.push_back(Second { number, kept: 1, lost });
        self.degraded
    }

    /// Looks at the whole seconds before this one.
    fn judge(&mut self, number: u64) {
        let Some(first) = self.seconds.front() else { return };
        let span = number - first.number;
        let (kept, lost) =
            self.seconds.iter().fold((0, 0), |sum, it| (sum.0 + it.kept, sum.1 + it.lost));
        let one_in = |many: u32| (kept + lost) / many;
        if self.degraded.is_none() && KNOWN_SECONDS <= span && one_in(RAISE_ONE_IN) < lost {
            let rate = |count: u32| u64::from(count) * 1000 / span;
            let (effective_mfps, wanted_mfps) = (rate(kept), rate(kept + lost));
            self.degraded = Some(Rates { effective_mfps, wanted_mfps });
        } else if lost <= one_in(CLEAR_ONE_IN) {
            self.degraded = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that is given `fps` frames a second, of which one in `kept_one_in` goes on, for so
    /// many seconds from `from` on; gives when the answer changed, and to what.
    fn run(it: &mut Overload, from: u64, seconds: u64, one_in: u32) -> Vec<(u64, Option<Rates>)> {
        let fps = 20;
        let mut changes = Vec::new();
        let mut before = it.degraded;
        for i in (0..seconds * u64::from(fps)).step_by(one_in as usize) {
            let now = Duration::from_secs(from) + Duration::from_secs(1) / fps * i as u32;
            let answer = it.see(now, one_in - 1);
            if answer != before {
                changes.push((now.as_secs(), answer));
                before = answer;
            }
        }
        changes
    }

    #[test]
    fn a_stream_that_loses_many_is_degraded_until_it_loses_none() {
        let mut it = Overload::default();
        assert_eq!(run(&mut it, 0, 60, 1), []);
        let changes = run(&mut it, 60, 60, 4);
        assert_eq!(changes.len(), 1, "{changes:?}");
        assert!((61..=65).contains(&changes[0].0), "{changes:?}");
        let given = changes[0].1.unwrap();
        assert_eq!(given.wanted_mfps / 1000, 20, "{given:?}");
        assert!(given.effective_mfps < 19_000, "{given:?}");
        let cleared = run(&mut it, 120, 60, 1);
        assert_eq!(cleared, [(130, None)], "once ten good seconds are over");
    }

    #[test]
    fn its_rates_are_those_of_the_time_that_is_known() {
        let mut it = Overload::default();
        let changes = run(&mut it, 0, 60, 4);
        let rates = Rates { effective_mfps: 5_000, wanted_mfps: 20_000 };
        assert_eq!(changes, [(5, Some(rates))]);
    }

    #[test]
    fn a_frame_that_gives_way_now_and_then_is_no_overload() {
        let mut it = Overload::default();
        for i in 0..1200_u32 {
            let now = Duration::from_millis(50) * i;
            assert_eq!(it.see(now, u32::from(i % 25 == 0)), None, "{i}");
        }
    }
}
