//! Edges: the bounded queues between stages, and the only place where frames wait or are replaced.
//!
//! An edge counts what passes through it, so that stages need no metrics code of their own.

mod counts;
pub mod merge;

pub use counts::Counts;

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use crate::pulse::TURN;

/// What a source does when its frame edge is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// The new frame takes the place of the one that waits.
    Latest,
    /// The source waits: no frame is lost.
    Block,
}

/// The stage after this edge is gone.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the receiving end of the edge is gone")]
pub struct Closed;

/// Why an item was not sent in time; the item comes back.
#[derive(Debug)]
pub enum NotSent<T> {
    /// There was no room, or nobody was waiting for it.
    Full(T),
    /// The stage after is gone.
    Closed(T),
}

/// The sending end. Clones feed the same edge; it closes when the last clone is dropped.
#[derive(Debug)]
pub struct Sender<T> {
    queue: channel::Sender<T>,
    /// Our own receiving end, to take the waiting item out.
    waiting: channel::Receiver<T>,
    /// Dead once every `Receiver` is gone. Needed because `waiting` keeps the channel connected.
    receiver: Weak<()>,
    counts: Arc<Counts>,
}

/// The receiving end. Clones share the items.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: channel::Receiver<T>,
    alive: Arc<()>,
    counts: Arc<Counts>,
}

/// How often a sender that waits for room looks whether anyone is still there to make some.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Makes an edge that holds at most `capacity` items. With 0, an item is handed over only to a
/// receiver that is waiting for it.
pub fn edge<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (tx, rx) = channel::bounded(capacity);
    let alive = Arc::new(());
    let counts = Arc::new(Counts::new(capacity));
    let sender = Sender {
        queue: tx,
        waiting: rx.clone(),
        receiver: Arc::downgrade(&alive),
        counts: counts.clone(),
    };
    (sender, Receiver { queue: rx, alive, counts })
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender {
            queue: self.queue.clone(),
            waiting: self.waiting.clone(),
            receiver: self.receiver.clone(),
            counts: self.counts.clone(),
        }
    }
}

impl<T> Sender<T> {
    /// Puts `item` on the edge, waiting for room.
    ///
    /// # Errors
    /// [`Closed`] if the stage after is gone; the item is lost.
    pub fn send(&self, item: T) -> Result<(), Closed> {
        self.send_unless(item, || false).map_err(|_| Closed)
    }

    /// Puts `item` on the edge, waiting for room until `stop` says so; `stop` is asked 20 times a
    /// second.
    ///
    /// # Errors
    /// The item, if it was not sent.
    pub fn send_unless(&self, mut item: T, stop: impl Fn() -> bool) -> Result<(), NotSent<T>> {
        loop {
            if self.receiver.strong_count() == 0 {
                return Err(NotSent::Closed(item));
            }
            match self.queue.send_timeout(item, LOOK_EVERY) {
                Ok(()) => {
                    self.counts.count_sent();
                    return Ok(());
                }
                Err(back) => item = back.into_inner(),
            }
            if stop() {
                return Err(NotSent::Full(item));
            }
        }
    }

    /// Puts `item` on the edge if there is room for it now.
    ///
    /// # Errors
    /// The item, if it was not sent.
    pub fn try_send(&self, item: T) -> Result<(), NotSent<T>> {
        if self.receiver.strong_count() == 0 {
            return Err(NotSent::Closed(item));
        }
        match self.queue.try_send(item) {
            Ok(()) => {
                self.counts.count_sent();
                Ok(())
            }
            Err(back) => Err(NotSent::Full(back.into_inner())),
        }
    }

    /// Puts `item` on the edge without waiting: where there is no room, the item that has waited
    /// longest goes into the new one by `absorb(new, old)`.
    ///
    /// # Errors
    /// [`Closed`] if the stage after is gone; the item is lost.
    pub fn replace(&self, mut item: T, absorb: impl Fn(&mut T, T)) -> Result<(), Closed> {
        loop {
            match self.try_send(item) {
                Ok(()) => return Ok(()),
                Err(NotSent::Closed(_)) => return Err(Closed),
                Err(NotSent::Full(back)) => item = back,
            }
            if let Ok(old) = self.waiting.try_recv() {
                self.counts.count_replaced();
                absorb(&mut item, old);
            }
        }
    }

    /// Blocks until there is room or a receiver waits, but not past `deadline`.
    pub fn wait_for_receiver(&self, deadline: Instant) {
        let mut select = channel::Select::new();
        select.send(&self.queue);
        // A timeout is as good an answer as any: the caller looks again.
        select.ready_deadline(deadline).ok();
    }

    /// The edge's counts, to register with the metrics.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Receiver {
            queue: self.queue.clone(),
            alive: self.alive.clone(),
            counts: self.counts.clone(),
        }
    }
}

impl<T> Receiver<T> {
    /// Takes the next item; `None` when the edge is closed and empty.
    pub fn recv(&self) -> Option<T> {
        let item = self.queue.recv().ok()?;
        self.counts.count_received();
        Some(item)
    }

    /// Waits for the next item as [`Receiver::recv`] does, and calls `turn` at once and whenever
    /// it has waited for a [`TURN`].
    pub fn recv_turning(&self, mut turn: impl FnMut()) -> Option<T> {
        loop {
            turn();
            match self.recv_deadline(Instant::now() + TURN) {
                Ok(item) => return Some(item),
                Err(channel::RecvTimeoutError::Timeout) => {}
                Err(channel::RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Takes the next item if there is one now.
    pub fn try_recv(&self) -> Option<T> {
        let item = self.queue.try_recv().ok()?;
        self.counts.count_received();
        Some(item)
    }

    /// Takes the next item if one comes before `deadline`.
    ///
    /// # Errors
    /// Timeout, or disconnected when the edge is closed and empty.
    pub fn recv_deadline(&self, deadline: Instant) -> Result<T, channel::RecvTimeoutError> {
        let item = self.queue.recv_deadline(deadline)?;
        self.counts.count_received();
        Ok(item)
    }
}

impl<T> Drop for Receiver<T> {
    /// Lets go of what nobody will take: a bounded channel would keep it, and with it the
    /// decoder's buffers, until the last sender is gone.
    fn drop(&mut self) {
        if Arc::strong_count(&self.alive) == 1 {
            // The weak count must not be upgradable while we drain, or a sender could add more.
            self.alive = Arc::new(());
            while self.queue.try_recv().is_ok() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_keeps_the_newest_and_hands_over_what_it_replaced() {
        let (tx, rx) = edge(1);
        for i in 0..10 {
            tx.replace(vec![i], |new, old| new.extend(old)).unwrap();
        }
        let counts = tx.counts();
        drop(tx);
        assert_eq!(rx.recv(), Some(vec![9, 8, 7, 6, 5, 4, 3, 2, 1, 0]));
        assert_eq!(rx.recv(), None);
        assert_eq!((counts.replaced(), counts.depth()), (9, 0));
    }

    #[test]
    fn every_way_of_sending_reports_a_dead_receiver() {
        let (tx, rx) = edge(1);
        drop(rx);
        assert_eq!(tx.send(0), Err(Closed));
        assert_eq!(tx.replace(0, |_, _| ()), Err(Closed));
        assert!(matches!(tx.try_send(0), Err(NotSent::Closed(0))));
    }

    #[test]
    fn a_sender_that_waits_for_room_sees_the_stop_and_the_dead_receiver() {
        let (tx, rx) = edge(1);
        tx.send(0).unwrap();
        assert!(matches!(tx.send_unless(1, || true), Err(NotSent::Full(1))));
        drop(rx);
        assert!(matches!(tx.send_unless(1, || false), Err(NotSent::Closed(1))));
    }

    #[test]
    fn a_dead_receiver_frees_what_was_waiting() {
        let item = Arc::new(());
        let (tx, rx) = edge(1);
        tx.send(item.clone()).unwrap();
        drop(rx);
        assert_eq!(Arc::strong_count(&item), 1);
        drop(tx);
    }

    #[test]
    fn a_bare_receiver_clone_hides_the_dead_receiver() {
        // Why `Sender::receiver` exists: with crossbeam alone, a producer that keeps a clone of
        // the receiver to replace with never sees `Disconnected`.
        let (tx, rx) = channel::bounded(1);
        let own = rx.clone();
        drop(rx);
        assert!(tx.try_send(0).is_ok());
        assert!(matches!(tx.try_send(1), Err(channel::TrySendError::Full(1))));
        drop(own);
        assert!(matches!(tx.try_send(1), Err(channel::TrySendError::Disconnected(1))));
    }
}
