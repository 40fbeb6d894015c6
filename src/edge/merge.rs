//! Many edges read as one, each in its turn, with an eye on when more is due.

use std::time::{Duration, Instant};

use crossbeam_channel as channel;

use crate::edge::{Closed, Receiver, Sender};

/// Something that knows when it came to be, so that a merge can learn how often more will come.
pub trait Timed {
    /// When it came to be; `None` for what comes out of turn.
    fn moment(&self) -> Option<Instant>;
}

/// Where new edges are handed to a [`Merge`]. Dropping the last one lets the merge end.
#[derive(Clone, Debug)]
pub struct Joining<T>(channel::Sender<Joined<T>>);

#[derive(Debug)]
struct Joined<T> {
    edge: Receiver<T>,
    weight: u32,
}

/// Many edges read as one, each in its turn, so that a busy source cannot starve a quiet one.
#[derive(Debug)]
pub struct Merge<T> {
    joining: channel::Receiver<Joined<T>>,
    edges: Vec<Lane<T>>,
    /// Index of the edge whose turn it is.
    turn: usize,
    /// How many more items that edge may give before its turn is over.
    credit: u32,
    /// Whether an edge can still join.
    open: bool,
}

/// One edge of a merge, and how often it gives something.
#[derive(Debug)]
struct Lane<T> {
    edge: Receiver<T>,
    weight: u32,
    last: Option<Instant>,
    /// Smoothed time between two items. `None` until two came.
    period: Option<Duration>,
}

/// How long after its first frame a stream is expected to give its second.
const FIRST_PERIOD_MAX: Duration = Duration::from_secs(1);

/// Makes a merge with no edges yet.
#[expect(clippy::disallowed_methods, reason = "one item per source; see the comment")]
pub fn merge<T>() -> (Joining<T>, Merge<T>) {
    // Not bounded: crossbeam's bounded channel keeps what is queued until the last sender goes,
    // even when nobody can receive it. An edge left in there would look alive to its source.
    let (tx, joining) = channel::unbounded();
    (Joining(tx), Merge { joining, edges: Vec::new(), turn: 0, credit: 0, open: true })
}

impl<T> Joining<T> {
    /// Adds an edge to the merge; per round it gives up to `weight` items.
    ///
    /// # Errors
    /// [`Closed`] if the merge is gone.
    pub fn join(&self, edge: Receiver<T>, weight: u32) -> Result<(), Closed> {
        self.0.send(Joined { edge, weight: weight.max(1) }).map_err(|_| Closed)
    }
}

impl<T: Timed> Merge<T> {
    /// Takes the next item if there is one, each edge in its turn.
    pub fn take(&mut self) -> Option<T> {
        self.let_join();
        let mut tries = self.edges.len() + 1;
        while 0 < tries && !self.edges.is_empty() {
            tries -= 1;
            if self.edges.len() <= self.turn {
                self.turn = 0;
                self.credit = 0;
            }
            if self.credit == 0 {
                self.credit = self.edges[self.turn].weight;
            }
            match self.edges[self.turn].edge.queue.try_recv() {
                Ok(item) => {
                    self.edges[self.turn].took(&item);
                    self.credit -= 1;
                    if self.credit == 0 {
                        self.turn += 1;
                    }
                    return Some(item);
                }
                Err(channel::TryRecvError::Empty) => self.turn += 1,
                Err(channel::TryRecvError::Disconnected) => drop(self.edges.remove(self.turn)),
            }
            self.credit = 0;
        }
        None
    }

    /// Whether no edge is left and none can join.
    pub fn ended(&mut self) -> bool {
        self.let_join();
        self.edges.is_empty() && !self.open
    }

    /// When the last item is due that an edge will give until `by`, judged by how often each gave
    /// one; `None` if none is due. An edge that gave nothing yet is not expected, nor is one that is
    /// late by more than a period; after its first item the second may come at any time.
    pub fn due(&self, now: Instant, by: Instant) -> Option<Instant> {
        self.edges.iter().filter_map(|it| it.due(now, by)).max()
    }

    /// Blocks until an edge has an item or closes, an edge joins or none can any more, `output` has
    /// a receiver waiting, or `deadline` has passed.
    pub fn wait<O>(&self, output: Option<&Sender<O>>, deadline: Option<Instant>) {
        let mut select = channel::Select::new();
        for it in &self.edges {
            select.recv(&it.edge.queue);
        }
        if self.open {
            select.recv(&self.joining);
        }
        if let Some(output) = output {
            select.send(&output.queue);
        }
        // A timeout is as good an answer as any: the caller looks again.
        match deadline {
            Some(deadline) => select.ready_deadline(deadline).ok(),
            None => Some(select.ready()),
        };
    }

    /// Before the items: on a full pipeline there is always an item.
    fn let_join(&mut self) {
        while self.open {
            match self.joining.try_recv() {
                Ok(Joined { edge, weight }) => {
                    self.edges.push(Lane { edge, weight, last: None, period: None });
                }
                Err(channel::TryRecvError::Empty) => return,
                Err(channel::TryRecvError::Disconnected) => self.open = false,
            }
        }
    }
}

impl<T: Timed> Lane<T> {
    fn took(&mut self, item: &T) {
        self.edge.counts.count_received();
        let Some(moment) = item.moment() else { return };
        if let Some(last) = self.last {
            let gap = moment.saturating_duration_since(last);
            // A quarter of the new value: jitter is smoothed, a new rate is learnt in a few frames.
            self.period = Some(self.period.map_or(gap, |it| it * 3 / 4 + gap / 4));
        }
        self.last = Some(moment);
    }

    fn due(&self, now: Instant, by: Instant) -> Option<Instant> {
        // A stream that never gave anything may never do; after its first frame the second may
        // come at any time.
        let last = self.last?;
        let Some(period) = self.period else {
            return (now <= last + FIRST_PERIOD_MAX).then_some(by);
        };
        let due = last + period;
        (due <= by && now <= due + period).then_some(due.max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::edge;

    impl Timed for (i32, i32) {
        fn moment(&self) -> Option<Instant> {
            None
        }
    }

    fn all(merge: &mut Merge<(i32, i32)>) -> Vec<(i32, i32)> {
        std::iter::from_fn(|| merge.take()).collect()
    }

    #[test]
    fn merge_serves_each_edge_in_turn_by_its_weight() {
        let (joining, mut merge) = merge();
        for (id, weight) in [(0, 1), (1, 2), (2, 1)] {
            let (tx, rx) = edge(9);
            (0..4).for_each(|i| tx.send((id, i)).unwrap());
            joining.join(rx, weight).unwrap();
        }
        drop(joining);
        let got = all(&mut merge);
        assert_eq!(got[..4], [(0, 0), (1, 0), (1, 1), (2, 0)]);
        assert_eq!(got[4..8], [(0, 1), (1, 2), (1, 3), (2, 1)]);
        assert_eq!(got[8..], [(0, 2), (2, 2), (0, 3), (2, 3)]);
        assert!(merge.ended());
    }

    #[test]
    fn a_merge_lets_an_edge_join_while_the_others_are_always_full() {
        let (joining, mut merge) = merge();
        let (busy, rx) = edge(1);
        joining.join(rx, 1).unwrap();
        busy.send((0, 0)).unwrap();
        assert_eq!(merge.take(), Some((0, 0)));
        let (late, rx) = edge(1);
        late.send((1, 0)).unwrap();
        joining.join(rx, 1).unwrap();
        let got: Vec<_> = (0..3)
            .filter_map(|i| {
                busy.replace((0, i), |_, _| ()).unwrap();
                merge.take()
            })
            .collect();
        assert!(got.contains(&(1, 0)), "{got:?}");
    }

    #[test]
    fn a_dead_merge_frees_the_edges_that_had_not_joined_yet() {
        let (joining, merge) = merge();
        let (tx, rx) = edge(1);
        joining.join(rx, 1).unwrap();
        drop(merge);
        assert_eq!(tx.send((0, 0)), Err(Closed));
        assert_eq!(joining.join(edge::<(i32, i32)>(1).1, 1), Err(Closed));
    }

    #[test]
    fn a_stream_is_expected_only_when_its_period_says_so() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (_tx, rx) = edge::<(i32, i32)>(1);
        let lane = |last, period| Lane {
            edge: rx.clone(),
            weight: 1,
            last: Some(at(last)),
            period: Some(Duration::from_millis(period)),
        };
        assert_eq!(lane(1000, 40).due(at(1001), at(1005)), None, "not yet");
        assert_eq!(lane(1000, 4).due(at(1001), at(1005)), Some(at(1004)), "in time");
        assert_eq!(lane(1000, 40).due(at(1042), at(1047)), Some(at(1042)), "a little late");
        assert_eq!(lane(1000, 40).due(at(1200), at(1205)), None, "gone");
    }
}
