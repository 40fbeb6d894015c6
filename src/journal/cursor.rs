//! How far a sink has come: shared by the sink, which moves it, and the writer, which saves it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use crate::journal::retain::Ages;

/// The place of one sink. Everything up to it is delivered: acknowledged, set aside with a note, or
/// not wanted.
#[derive(Debug)]
pub struct Cursor {
    sink: String,
    seq: AtomicU64,
    at_risk: AtomicBool,
    /// Of the journal that is written to in this process.
    ages: Option<Arc<Ages>>,
}

impl Cursor {
    /// Of a sink that has everything up to `seq`.
    pub fn new(sink: &str, seq: u64) -> Cursor {
        let (seq, at_risk) = (AtomicU64::new(seq), AtomicBool::new(false));
        Cursor { sink: sink.to_owned(), seq, at_risk, ages: None }
    }

    /// The same, beside the journal's writer, which knows when the wall clock was set.
    pub fn beside(self, ages: Arc<Ages>) -> Cursor {
        Cursor { ages: Some(ages), ..self }
    }

    /// How long an event has been in the journal, which has it since `appended`. Not touched by a
    /// wall clock that is set, if the journal is written to in this process.
    pub fn age(&self, seq: u64, appended: SystemTime) -> Duration {
        let us = |it: SystemTime| {
            let since = it.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
        };
        match &self.ages {
            Some(ages) => ages.of(seq, us(appended), us(SystemTime::now())),
            None => appended.elapsed().unwrap_or_default(),
        }
    }

    /// The sink's name.
    pub fn sink(&self) -> &str {
        &self.sink
    }

    /// The last event that it has delivered.
    pub fn get(&self) -> u64 {
        self.seq.load(Relaxed)
    }

    /// Whether retention will soon remove events that it has not delivered.
    pub fn is_at_risk(&self) -> bool {
        self.at_risk.load(Relaxed)
    }

    /// Notes whether it will; gives whether that was known.
    pub(super) fn set_at_risk(&self, at_risk: bool) -> bool {
        self.at_risk.swap(at_risk, Relaxed) == at_risk
    }

    /// It has delivered everything up to `seq`.
    pub fn advance(&self, seq: u64) {
        self.seq.fetch_max(seq, Relaxed);
    }
}
