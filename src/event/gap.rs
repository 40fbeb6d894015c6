//! What a gap event says: which events a reader will never get, and why.

use std::time::SystemTime;

use serde::Serialize;

use super::{Event, Kind, json, sequence, source};

/// Why a reader will never get some events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// Retention removed them first.
    Expired,
    /// The journal was damaged.
    Damaged,
}

impl GapReason {
    /// The name in events.
    pub fn name(self) -> &'static str {
        match self {
            GapReason::Expired => "expired",
            GapReason::Damaged => "damaged",
        }
    }
}

/// Another journal, in which the missing events were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere<'a> {
    /// Its id, if it is known.
    pub journal: Option<&'a str>,
    /// Where it is now, if it was moved away.
    pub moved_to: Option<&'a str>,
    /// What happened to it.
    pub detail: &'a str,
}

impl Event {
    /// The events `first..=last` that a reader will never get. They were in this journal, or
    /// elsewhere; then `last` is before `first` iff nobody knows how many there were.
    pub fn gap(
        instance: &str,
        (first, last): (u64, u64),
        reason: GapReason,
        elsewhere: Option<Elsewhere<'_>>,
    ) -> Event {
        let data = GapData {
            first: sequence(first),
            last: sequence(last),
            events: (last + 1).saturating_sub(first),
            reason: reason.name(),
            journal: elsewhere.and_then(|it| it.journal),
            moved_to: elsewhere.and_then(|it| it.moved_to),
            detail: elsewhere.map(|it| it.detail),
        };
        Event {
            kind: Kind::JournalGap,
            stream: None,
            epoch: None,
            source: source(instance, None),
            time: SystemTime::now(),
            data: json(&data),
        }
    }
}

#[derive(Serialize)]
struct GapData<'a> {
    first: String,
    last: String,
    events: u64,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    journal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    moved_to: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
}
