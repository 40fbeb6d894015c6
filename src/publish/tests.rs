//! How many commits the events of a backlog take.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::SystemTime,
};

use super::*;
use crate::{edge::edge, frame::State, journal::retain::Retain, ledger::Stream};

/// Counts commits.
#[derive(Default)]
struct Commits(AtomicUsize);

impl Watch for Commits {
    fn published(&self, _meta: &Meta, _labelled: Instant, _committed: Instant) {}
    fn committed(&self, _took: Duration, _stats: Stats) {
        self.0.fetch_add(1, Relaxed);
    }
    fn lost(&self, _events: usize) {}
    fn gone(&self, _events: u64) {}
    fn changed(&self, _change: &StateChange) {}
    fn writable(&self, _writable: bool) {}
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
            let change = StateChange {
                stream: stream.clone(),
                state: State::Connecting,
                code: None,
                detail: None,
                attempt,
                retry_in: None,
                at: SystemTime::now(),
                ended: None,
            };
            stream.state_sent();
            queue.send(Item::State(Box::new(change))).unwrap();
        }
        drop(queue);
        let watch = Arc::new(Commits::default());
        let publisher = Publisher::new(journal, context.clone(), commit_every, watch.clone());
        let journal = publisher.run(queue_rx, &Pulse::new("publish")).unwrap();
        assert_eq!(journal.stats().next, 303, "all of them, and that it has started and stopped");
        watch.0.load(Relaxed)
    };
    assert_eq!(commits(Duration::ZERO), 302, "one for each");
    assert_eq!(commits(Duration::from_secs(60)), 4, "256 at once, then the rest");
}
