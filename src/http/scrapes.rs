//! Answers to `/metrics`, a few of which may be held by readers that are slow to take them.
//!
//! With hundreds of streams one answer has megabytes. When [`HELD_MAX`] are held, whoever comes
//! next gets the last one again for up to [`SHARED_FOR`], so that a thousand slow readers cannot
//! use the memory up and a scrape is still answered.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hyper::body::Bytes;

use crate::metrics::Metrics;

/// From this many answers in memory on, they are shared.
const HELD_MAX: usize = 8;
/// How old an answer that is shared can be.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// The answers that are in memory.
#[derive(Default)]
pub(crate) struct Scrapes {
    held: Arc<AtomicUsize>,
    /// `None` unless the last answer is being shared.
    shared: Mutex<Option<(Instant, Bytes)>>,
}

/// One answer; counted for as long as somebody holds it.
struct Held(String, Arc<AtomicUsize>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Relaxed);
    }
}

impl Scrapes {
    /// The metrics as they are now; as they were a moment ago if too many answers are held.
    pub(crate) fn take(&self, metrics: &Metrics) -> anyhow::Result<Bytes> {
        let mut shared = self.shared.lock().expect("nothing panics while it holds the answer");
        let crowded = HELD_MAX <= self.held.load(Relaxed);
        match &*shared {
            Some((made, text)) if crowded && made.elapsed() < SHARED_FOR => {
                return Ok(text.clone());
            }
            _ => *shared = None,
        }
        let text = metrics.text()?;
        self.held.fetch_add(1, Relaxed);
        let text = Bytes::from_owner(Held(text, self.held.clone()));
        if crowded {
            *shared = Some((Instant::now(), text.clone()));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_slow_readers_share_one_answer_and_a_lone_one_gets_a_fresh_one() {
        let (scrapes, metrics) = (Scrapes::default(), Metrics::new());
        let take = || scrapes.take(&metrics).unwrap();
        let mut slow: Vec<Bytes> = (0..1000).map(|_| take()).collect();
        let distinct = |slow: &[Bytes]| {
            let mut places: Vec<_> = slow.iter().map(|it| it.as_ptr()).collect();
            places.sort();
            places.dedup();
            places.len()
        };
        // More only if these took longer than `SHARED_FOR` on a busy machine.
        assert!((HELD_MAX + 1..HELD_MAX + 10).contains(&distinct(&slow)), "{}", distinct(&slow));
        slow.clear();
        metrics.selftest(true, 0.0);
        let fresh = take();
        assert!(String::from_utf8_lossy(&fresh).contains("ghostwatch_selftest_ok 1\n"));
        drop(fresh);
        assert_eq!(scrapes.held.load(Relaxed), 0);
    }
}
