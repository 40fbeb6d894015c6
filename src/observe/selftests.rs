//! What the golden self-test found last, lane by lane: the worst lane is what counts.

use std::collections::BTreeMap;

use crate::{
    http::{Check, Health},
    infer::selftest::Agreement,
};

/// The last result of each lane.
#[derive(Clone, Debug)]
pub(super) struct Selftests {
    /// Whose answers they are compared with.
    by: String,
    /// When the network was loaded; holds for a lane until it has a result of its own.
    first: (Agreement, bool),
    lanes: BTreeMap<usize, (Agreement, bool)>,
}

impl Selftests {
    pub(super) fn new(by: &str, first: Agreement, passed: bool) -> Selftests {
        Selftests { by: by.to_owned(), first: (first, passed), lanes: BTreeMap::new() }
    }

    pub(super) fn tell(&mut self, lane: usize, agreement: Agreement, passed: bool) {
        self.lanes.insert(lane, (agreement, passed));
    }

    /// The lane that is worst, if one has been asked yet; its result, and whether it is good enough.
    pub(super) fn worst(&self) -> (Option<usize>, Agreement, bool) {
        let worse = |a: &(Agreement, bool), b: &(Agreement, bool)| {
            let failed = (!a.1).cmp(&!b.1);
            failed.then(a.0.max_error.total_cmp(&b.0.max_error))
        };
        let worst = self.lanes.iter().max_by(|a, b| worse(a.1, b.1));
        match worst {
            Some((lane, it)) => (Some(*lane), it.0, it.1),
            None => (None, self.first.0, self.first.1),
        }
    }

    pub(super) fn check(&self) -> Check {
        let (lane, Agreement { max_error, same_top1, pictures }, passed) = self.worst();
        let at = lane.map_or_else(String::new, |it| format!("lane {it}: "));
        let by = &self.by;
        let detail = format!(
            "{at}largest error {max_error:.1e}, {same_top1} of {pictures} labels as {by} has them"
        );
        let health = if passed { Health::Ok } else { Health::Failed };
        Check { name: "selftest".into(), health, detail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreement(max_error: f64, same_top1: usize) -> Agreement {
        Agreement { max_error, same_top1, pictures: 3 }
    }

    #[test]
    fn the_worst_lane_counts_whoever_comes_last() {
        let mut it = Selftests::new("PyTorch", agreement(1e-7, 3), true);
        assert_eq!(it.check().detail, "largest error 1.0e-7, 3 of 3 labels as PyTorch has them");
        it.tell(1, agreement(0.5, 2), false);
        it.tell(0, agreement(2e-7, 3), true);
        let check = it.check();
        assert_eq!(check.health, Health::Failed);
        assert_eq!(check.detail, "lane 1: largest error 5.0e-1, 2 of 3 labels as PyTorch has them");
        // A wrong label is worse than a larger error that is still allowed.
        it.tell(0, agreement(0.6, 3), true);
        assert_eq!(it.worst().0, Some(1));
        it.tell(1, agreement(1e-7, 3), true);
        assert_eq!((it.check().health, it.worst().0), (Health::Ok, Some(0)));
    }
}
