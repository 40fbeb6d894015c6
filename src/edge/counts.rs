//! What an edge counts: how much passed it, and how long the first item in it has waited.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Counts of one edge. The depth is `sent - received - replaced`.
///
/// Items are taken in the order in which they were sent, so the one that waits longest is the
/// number `received + replaced`; when it was sent stands in a ring. All of it moves without locks.
#[derive(Debug)]
pub struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    replaced: AtomicU64,
    start: Instant,
    /// When each of the last items was sent: milliseconds since `start`, above the lowest bits of
    /// its number, so that a moment that was not written yet is not taken for the one before it.
    moments: Box<[AtomicU64]>,
}

/// Bits of a moment that tell whose it is.
const TAG_BITS: u32 = 20;
const TAG: u64 = (1 << TAG_BITS) - 1;

/// More moments than items fit into the edge: an item is counted a little later than it moves.
const SPARE: usize = 8;

impl Counts {
    /// For an edge that holds so many items.
    pub(super) fn new(capacity: usize) -> Counts {
        Counts {
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            replaced: AtomicU64::new(0),
            start: Instant::now(),
            moments: (0..capacity + SPARE).map(|_| AtomicU64::new(TAG)).collect(),
        }
    }

    /// Items waiting now.
    pub fn depth(&self) -> u64 {
        self.sent.load(Relaxed).saturating_sub(self.gone())
    }

    /// Items that a newer one took the place of.
    pub fn replaced(&self) -> u64 {
        self.replaced.load(Relaxed)
    }

    /// How long the first of the items has waited; 0 if none waits.
    pub fn oldest_age(&self) -> Duration {
        let first = self.gone();
        let moment = self.moment(first).load(Relaxed);
        if self.sent.load(Relaxed) <= first || moment & TAG != first & TAG {
            return Duration::ZERO;
        }
        self.start.elapsed().saturating_sub(Duration::from_millis(moment >> TAG_BITS))
    }

    /// An item was sent.
    pub(super) fn count_sent(&self) {
        let number = self.sent.fetch_add(1, Relaxed);
        let ms = self.start.elapsed().as_millis() as u64;
        self.moment(number).store(ms << TAG_BITS | number & TAG, Relaxed);
    }

    /// An item was received.
    pub(super) fn count_received(&self) {
        self.received.fetch_add(1, Relaxed);
    }

    /// An item was taken out for a newer one.
    pub(super) fn count_replaced(&self) {
        self.replaced.fetch_add(1, Relaxed);
    }

    fn gone(&self) -> u64 {
        self.received.load(Relaxed) + self.replaced.load(Relaxed)
    }

    fn moment(&self, number: u64) -> &AtomicU64 {
        &self.moments[(number % self.moments.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::edge::edge;

    /// What a moment is rounded to.
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_age_is_that_of_the_item_that_waits_longest_and_0_when_none_does() {
        let (tx, rx) = edge(2);
        let counts = tx.counts();
        assert_eq!(counts.oldest_age(), Duration::ZERO);
        // Several times around the ring.
        for _ in 0..50 {
            tx.send(()).unwrap();
            let first_sent = Instant::now();
            thread::sleep(4 * MS);
            let second_sent = Instant::now();
            tx.send(()).unwrap();
            let least = first_sent.elapsed();
            assert!(least <= counts.oldest_age());
            rx.recv().unwrap();
            let age = counts.oldest_age();
            assert!(age <= second_sent.elapsed() + MS, "{age:?}: that of the first");
            rx.recv().unwrap();
            assert_eq!((counts.depth(), counts.oldest_age()), (0, Duration::ZERO));
        }
    }

    #[test]
    fn an_item_that_takes_the_place_of_another_is_as_young_as_it_is() {
        let (tx, _rx) = edge(1);
        tx.send(1).unwrap();
        thread::sleep(20 * MS);
        let sent = Instant::now();
        tx.replace(2, |_, _| ()).unwrap();
        let age = tx.counts().oldest_age();
        assert!(age <= sent.elapsed() + MS, "{age:?}");
    }

    #[test]
    fn a_moment_that_was_not_written_yet_is_no_age() {
        let counts = Counts::new(0);
        for _ in 0..SPARE {
            counts.count_sent();
            counts.count_received();
        }
        thread::sleep(5 * MS);
        // As if its thread had lost the processor between the count and the moment.
        counts.sent.fetch_add(1, Relaxed);
        assert_eq!((counts.depth(), counts.oldest_age()), (1, Duration::ZERO));
    }
}
