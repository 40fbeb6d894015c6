//! How often a failure is logged: the same one at most once in ten seconds. Pure: the caller brings
//! the time.

use std::time::{Duration, Instant};

use crate::frame::Code;

/// A failure with the same code is not logged again before this.
pub const QUIET: Duration = Duration::from_secs(10);

/// What one stream has logged.
#[derive(Debug, Default)]
pub struct Quiet(Vec<Logged>);

#[derive(Debug)]
struct Logged {
    code: Code,
    at: Instant,
    left_out: u32,
    /// Whether something new was among what was left out.
    owed: bool,
}

/// How a failure is to be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Say {
    /// It is new, or one that was left out since was.
    pub loud: bool,
    /// How many with this code were left out since the last one that was logged.
    pub left_out: u32,
}

impl Quiet {
    /// Whether a failure may be logged, and how. `news` says that the stream was in another state
    /// before. `None` counts it as left out.
    pub fn may_say(&mut self, code: Code, news: bool, now: Instant) -> Option<Say> {
        let Some(last) = self.0.iter_mut().find(|it| it.code == code) else {
            self.0.push(Logged { code, at: now, left_out: 0, owed: false });
            return Some(Say { loud: news, left_out: 0 });
        };
        if now.saturating_duration_since(last.at) < QUIET {
            last.left_out = last.left_out.saturating_add(1);
            last.owed |= news;
            return None;
        }
        let say = Say { loud: news || last.owed, left_out: last.left_out };
        *last = Logged { code, at: now, left_out: 0, owed: false };
        Some(say)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_failure_is_said_once_in_ten_seconds_and_then_how_many_were_left_out() {
        let (mut quiet, start) = (Quiet::default(), Instant::now());
        let mut at = |ms: u64, code, news| {
            let say = quiet.may_say(code, news, start + Duration::from_millis(ms));
            say.map(|it| (it.loud, it.left_out))
        };
        assert_eq!(at(0, Code::Refused, true), Some((true, 0)));
        for ms in 1..=99 {
            assert_eq!(at(100 * ms, Code::Refused, false), None, "{ms}");
        }
        assert_eq!(at(5_000, Code::Dns, true), Some((true, 0)), "another code has its own time");
        assert_eq!(at(10_000, Code::Refused, false), Some((false, 99)));
        assert_eq!(at(20_000, Code::Refused, true), Some((true, 0)));
    }

    #[test]
    fn news_that_was_left_out_is_made_up_for() {
        let (mut quiet, start) = (Quiet::default(), Instant::now());
        quiet.may_say(Code::Stall, true, start);
        let soon = start + Duration::from_secs(3);
        assert_eq!(quiet.may_say(Code::Stall, true, soon), None);
        let say = quiet.may_say(Code::Stall, false, start + QUIET);
        assert_eq!(say, Some(Say { loud: true, left_out: 1 }));
    }
}
