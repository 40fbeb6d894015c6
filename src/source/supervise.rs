//! When to try a stream again. Pure: the caller brings the random number.

use std::time::Duration;

use crate::frame::Code;

/// Pictures must have come for this long before a failure counts as a new one.
pub const GOOD_AFTER: Duration = Duration::from_secs(30);

/// How long to wait before the next try. Waits double while a stream keeps failing.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Forgets the failures. For a stream that was good for [`GOOD_AFTER`]; a connection alone
    /// does not count, or a camera that connects and breaks would be tried without end.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure. `random` in 0.0..1.0.
    ///
    /// Full jitter, so that 64 cameras behind one switch do not come back at once; except after a
    /// refused password, where trying early can lock the account.
    pub fn next(&mut self, code: Code, random: f64) -> Duration {
        let doubled =
            |first: f64, last: f64| (first * 2_f64.powi(self.failures.min(16) as i32)).min(last);
        let seconds = match code {
            Code::Auth => 300.0 + 30.0 * random,
            Code::Codec | Code::NotFound => doubled(5.0, 60.0) * random,
            _ => doubled(0.5, 4.0) * random,
        };
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(code: Code) -> [f64; 6] {
        let mut backoff = Backoff::default();
        std::array::from_fn(|_| backoff.next(code, 1.0).as_secs_f64())
    }

    #[test]
    fn waits_double_up_to_their_limit_and_start_over_after_a_good_time() {
        assert_eq!(waits(Code::Refused), [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]);
        assert_eq!(waits(Code::Codec), [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]);
        assert_eq!(waits(Code::Auth), [330.0; 6]);
        let mut backoff = Backoff::default();
        backoff.next(Code::Stall, 0.5);
        backoff.reset();
        assert_eq!(backoff.next(Code::Stall, 0.5), Duration::from_millis(250));
        for _ in 0..1_000 {
            assert!(backoff.next(Code::Stall, 0.999) < Duration::from_secs(4));
        }
    }

    #[test]
    fn a_refused_password_is_not_tried_again_within_five_minutes() {
        assert_eq!(Backoff::default().next(Code::Auth, 0.0), Duration::from_secs(300));
    }
}
