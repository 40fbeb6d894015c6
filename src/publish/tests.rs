//! How many commits a backlog takes, and what becomes of it when the journal takes nothing for long.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::SystemTime,
};

use super::*;
use crate::{edge::edge, frame::State, journal::retain::Retain, ledger::Stream};

/// Counts commits and lost events.
#[derive(Default)]
struct Counted {
    commits: AtomicUsize,
    lost: AtomicUsize,
}

impl Watch for Counted {
    fn published(&self, _meta: &Meta, _labelled: Instant, _committed: Instant) {}
    fn committed(&self, _took: Duration, _stats: Stats) {
        self.commits.fetch_add(1, Relaxed);
    }
    fn lost(&self, events: usize) {
        self.lost.fetch_add(events, Relaxed);
    }
    fn gone(&self, _events: u64) {}
    fn changed(&self, _change: &StateChange) {}
    fn writable(&self, _writable: bool) {}
}

fn change(stream: &Arc<Stream>, attempt: u32) -> StateChange {
    StateChange {
        stream: stream.clone(),
        state: State::Connecting,
        code: None,
        detail: None,
        log: Vec::new(),
        attempt,
        retry_in: None,
        at: SystemTime::now(),
        since: SystemTime::now(),
        flags: Default::default(),
        ended: None,
    }
}

#[test]
fn a_longer_commit_every_takes_a_backlog_in_fewer_commits() {
    let context = Context {
        instance: "t".into(),
        model: "m".into(),
        weights: "5f2b9c41aa07".into(),
        label_set: "l".into(),
        precision: "fp32".into(),
        device: "cpu".into(),
        labels: Vec::new(),
    };
    let commits = |commit_every| {
        let folder = tempfile::tempdir().unwrap();
        let journal = Writer::open(&folder.path().join("journal.db"), Retain::default()).unwrap();
        let (queue, queue_rx) = edge(300);
        let stream = Arc::new(Stream::new("front"));
        for attempt in 0..300 {
            stream.state_sent();
            queue.send(Item::State(Box::new(change(&stream, attempt)))).unwrap();
        }
        drop(queue);
        let watch = Arc::new(Counted::default());
        let (_orders, orders) = edge(1);
        let publisher =
            Publisher::new((journal, orders), context.clone(), commit_every, watch.clone());
        let journal = publisher.run(queue_rx, &Pulse::new("publish")).unwrap();
        assert_eq!(journal.stats().next, 303, "all of them, and that it has started and stopped");
        watch.commits.load(Relaxed)
    };
    assert_eq!(commits(Duration::ZERO), 302, "one for each");
    assert_eq!(commits(Duration::from_secs(60)), 4, "256 at once, then the rest");
}

#[test]
fn changes_of_state_beyond_those_that_wait_are_lost_but_settled() {
    let folder = tempfile::tempdir().unwrap();
    // No file system has so much free, so nothing is taken.
    let full = Retain { keep_free: u64::MAX, ..Retain::default() };
    let journal = Writer::open(&folder.path().join("journal.db"), full).unwrap();
    let context = Context {
        instance: "t".into(),
        model: String::new(),
        weights: String::new(),
        label_set: String::new(),
        precision: String::new(),
        device: String::new(),
        labels: Vec::new(),
    };
    let (orders, orders_rx) = edge(1);
    let watch = Arc::new(Counted::default());
    let every = Duration::from_millis(100);
    let mut publisher = Publisher::new((journal, orders_rx), context, every, watch.clone());
    let stream = Arc::new(Stream::new("a"));
    for attempt in 0..HELD_MAX as u32 + 50 {
        stream.state_sent();
        publisher.add(Item::State(Box::new(change(&stream, attempt))));
    }
    publisher.commit().unwrap();
    assert_eq!((publisher.group.len(), watch.lost.load(Relaxed)), (HELD_MAX, 50));
    assert!(!stream.is_settled(), "the rest waits");
    orders.send(Order::Retain(Retain::default())).unwrap();
    publisher.obey().unwrap();
    publisher.commit().unwrap();
    assert!(publisher.group.is_empty());
    assert!(stream.is_settled(), "nothing of it is on its way");
}
