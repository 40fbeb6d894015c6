//! What is in flight, in the order of sending, and which of it is acknowledged.

use std::collections::VecDeque;

use crate::sink::broker::Acks;

/// Packets between sending and acknowledgement.
#[derive(Default)]
pub(super) struct Window {
    flying: VecDeque<Flying>,
    /// The first ones, whose packets have an identifier: the library gives it when it sends.
    named: usize,
}

struct Flying {
    /// 0 until it is sent.
    packet: u16,
    acked: bool,
    /// Whether it is one of the messages, whose acknowledgement is told.
    told: bool,
}

impl Window {
    pub(super) fn len(&self) -> usize {
        self.flying.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty()
    }

    /// One more was handed to the library.
    pub(super) fn push(&mut self, told: bool) {
        self.flying.push_back(Flying { packet: 0, acked: false, told });
    }

    /// The next in order was sent under this identifier.
    pub(super) fn sent(&mut self, packet: u16) {
        if let Some(it) = self.flying.get_mut(self.named) {
            it.packet = packet;
            self.named += 1;
        }
    }

    /// Tells of every message that is acknowledged and has nothing unacknowledged before it.
    /// Returns whether the oldest one was among them.
    pub(super) fn acked(&mut self, packet: u16, acks: &mut Acks<'_>) -> bool {
        // Identifiers come round again, so the oldest with this one is meant.
        if let Some(it) = self.flying.iter_mut().find(|it| it.packet == packet && !it.acked) {
            it.acked = true;
        }
        let mut moved = false;
        while let Some(it) = self.flying.pop_front_if(|it| it.acked) {
            self.named -= 1;
            moved = true;
            if it.told {
                acks.next(false);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends packets with these identifiers, acknowledges those; gives what was told after each.
    fn told(sent: &[u16], acked: &[u16]) -> Vec<usize> {
        let mut window = Window::default();
        for it in sent {
            window.push(true);
            window.sent(*it);
        }
        let mut all = |_, _| ();
        let mut acks = Acks::new(&mut all);
        acked
            .iter()
            .map(|it| {
                window.acked(*it, &mut acks);
                acks.count()
            })
            .collect()
    }

    #[test]
    fn only_the_acknowledged_prefix_is_told() {
        assert_eq!(told(&[1, 2, 3], &[1, 2, 3]), [1, 2, 3]);
        assert_eq!(told(&[1, 2, 3], &[3, 2, 1]), [0, 0, 3]);
        assert_eq!(told(&[1, 2, 3], &[2, 1, 3]), [0, 2, 3]);
    }

    #[test]
    fn an_identifier_that_came_round_again_means_the_older_packet() {
        assert_eq!(told(&[1, 2, 1], &[1, 1, 2]), [1, 1, 3]);
    }

    #[test]
    fn an_unknown_identifier_acknowledges_nothing() {
        assert_eq!(told(&[1, 2], &[7, 0]), [0, 0]);
    }

    #[test]
    fn what_was_not_sent_yet_is_not_acknowledged() {
        let mut window = Window::default();
        window.push(true);
        let mut all = |_, _| ();
        let mut acks = Acks::new(&mut all);
        assert!(!window.acked(1, &mut acks));
        window.sent(1);
        assert!(window.acked(1, &mut acks));
        assert!(window.is_empty());
    }
}
