//! When it is told that a camera's clock and ours differ too much.

use std::time::{Duration, Instant};

use tracing::{info, warn};

/// That clocks differ is told again at most this often.
pub const QUIET: Duration = Duration::from_secs(3_600);

/// Whether the clocks of a camera and of this host differ by more than `max`. A `max` of 0 says that the
/// camera's is not to be followed, and then it may show what it likes.
pub fn differ(offset_ns: i64, max: Duration) -> bool {
    !max.is_zero() && max.as_nanos() < u128::from(offset_ns.unsigned_abs())
}

/// What one stream has told.
#[derive(Debug)]
pub struct Agree {
    max: Duration,
    /// What was told last: that the clocks differ, or that they agree.
    wrong: bool,
    /// When it was told last that they differ.
    at: Option<Instant>,
}

impl Agree {
    /// Clocks that may differ by at most `max`.
    pub fn new(max: Duration) -> Agree {
        Agree { max, wrong: false, at: None }
    }

    /// Logs that the clocks of a stream's camera and of this host differ too much, or agree again.
    pub fn log(&mut self, stream: &str, offset_ns: Option<i64>, now: Instant) {
        let offset_s = offset_ns.unwrap_or(0) as f64 / 1e9;
        match self.news(offset_ns, now) {
            Some(true) => warn!(
                stream,
                offset_s,
                max_clock_offset = ?self.max,
                "the clocks of camera and host differ too much, so pictures are dated by their \
                 arrival; set the camera's clock"
            ),
            Some(false) => info!(stream, offset_s, "the clocks of camera and host agree again"),
            None => {}
        }
    }

    /// Whether it is news that the clocks differ too much (`true`), or agree again. Clocks that go
    /// apart again within an hour are told of after it. No offset says nothing.
    fn news(&mut self, offset_ns: Option<i64>, now: Instant) -> Option<bool> {
        let wrong = differ(offset_ns?, self.max);
        let early = self.at.is_some_and(|it| now.saturating_duration_since(it) < QUIET);
        if wrong == self.wrong || (wrong && early) {
            return None;
        }
        self.wrong = wrong;
        if wrong {
            self.at = Some(now);
        }
        Some(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_differ_by_more_than_the_limit_and_never_where_none_is_followed() {
        let (limit, off) = (Duration::from_millis(2), Duration::ZERO);
        let offsets = [0, 2_000_000, -2_000_000, 2_000_001, -2_000_001, i64::MIN];
        let expected = [false, false, false, true, true, true];
        assert_eq!(offsets.map(|it| differ(it, limit)), expected);
        assert_eq!(offsets.map(|it| differ(it, off)), [false; 6]);
    }

    #[test]
    fn clocks_that_differ_are_told_once_an_hour_and_when_they_agree_again() {
        let (mut clocks, start) = (Agree::new(Duration::from_secs(2)), Instant::now());
        let mut at = |minute: u64, offset_ms: Option<i64>| {
            let offset_ns = offset_ms.map(|it| it * 1_000_000);
            clocks.news(offset_ns, start + Duration::from_secs(60 * minute))
        };
        assert_eq!([at(0, None), at(0, Some(2_000)), at(0, Some(-2_000))], [None, None, None]);
        assert_eq!([at(1, Some(-2_001)), at(2, Some(-2_001))], [Some(true), None]);
        assert_eq!([at(2, None), at(3, Some(0)), at(3, Some(0))], [None, Some(false), None]);
        let (early, late) = (at(60, Some(2_001)), at(61, Some(2_001)));
        assert_eq!([early, late, at(62, Some(2_001))], [None, Some(true), None]);
    }
}
