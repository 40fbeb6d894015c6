//! Finds frames that were lost without an outcome, while frames move.
//!
//! [`Stream`] counts without locks, so its counters cannot be read at one moment. A reading counts
//! only if neither *decoded* nor the outcomes moved around it; then it is off by at most the frames
//! that some thread is counting right now (between its two additions). Such a difference is gone as
//! soon as that thread goes on, and a lost frame stays lost: so readings are repeated until one is
//! 0 or [`PATIENCE`] is over, and the one closest to 0 counts. Thus a loss is never hidden by
//! waiting, and a busy daemon without losses reads 0.

use std::{
    sync::atomic::{Ordering, Ordering::Relaxed, fence},
    thread,
    time::{Duration, Instant},
};

use crate::ledger::Stream;

/// How long one scrape may look for a reading of 0, over all streams. Longer than the operating
/// system keeps a thread waiting between two additions on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_millis(50);
/// The pause after a reading that is not 0, so that the thread that is counting can go on.
const PAUSE: Duration = Duration::from_millis(1);

/// Frames of a stream without an outcome that exist no more. 0 unless a stage lost one.
pub(crate) fn unaccounted(stream: &Stream, deadline: Instant) -> i64 {
    let mut best: Option<i64> = None;
    loop {
        let steady = reading(stream);
        if let Some(now) = steady {
            best = match best {
                Some(best) if best.abs() <= now.abs() => Some(best),
                _ => Some(now),
            };
        }
        match best {
            Some(0) => return 0,
            Some(best) if deadline <= Instant::now() => return best,
            // Frames move too fast for a steady reading, so they move: nothing is known, and a
            // loss is found by the next scrape.
            None if deadline <= Instant::now() => return 0,
            _ => thread::sleep(PAUSE),
        }
    }
}

/// What is missing now; `None` if frames moved meanwhile.
fn reading(stream: &Stream) -> Option<i64> {
    let sums = || {
        let ended = stream.published.load(Relaxed) + stream.dropped_total();
        (stream.decoded.load(Relaxed), ended)
    };
    let before = sums();
    fence(Ordering::SeqCst);
    let in_flight = stream.in_flight();
    fence(Ordering::SeqCst);
    let after = sums();
    (before == after).then(|| before.0 as i64 - before.1 as i64 - in_flight)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    };

    use super::*;
    use crate::{
        ledger::InFlight,
        stage::{Reason, StageName},
    };

    /// Far later than needed: these threads do nothing but count, on a machine that may be busy.
    fn later() -> Instant {
        Instant::now() + 100 * PATIENCE
    }

    #[test]
    fn nothing_is_unaccounted_while_frames_move_fast_and_each_loss_is_found() {
        let stream = Arc::new(Stream::new("a"));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Relaxed) {
                        let mut first = InFlight::decoded(stream.clone());
                        let mut second = InFlight::decoded(stream.clone());
                        first.published();
                        second.dropped(StageName::Queue, Reason::Overload);
                        thread::yield_now();
                    }
                });
            }
            for _ in 0..200 {
                assert_eq!(unaccounted(&stream, later()), 0);
            }
            stop.store(true, Relaxed);
        });
        drop(InFlight::decoded(stream.clone()));
        assert_eq!(unaccounted(&stream, Instant::now()), 1);
    }

    #[test]
    fn a_frame_whose_counting_was_interrupted_is_waited_for() {
        let stream = Stream::new("a");
        // As if its thread had lost the processor before it could count the frame as in flight.
        stream.decoded.fetch_add(1, Relaxed);
        assert_eq!(unaccounted(&stream, Instant::now()), 1);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(5 * PAUSE);
                stream.published.fetch_add(1, Relaxed);
            });
            assert_eq!(unaccounted(&stream, later()), 0);
        });
    }
}
