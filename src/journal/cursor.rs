//! How far a sink has come: shared by the sink, which moves it, and the writer, which saves it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// The place of one sink. Everything up to it is delivered: acknowledged, set aside with a note, or
/// not wanted.
#[derive(Debug)]
pub struct Cursor {
    sink: String,
    seq: AtomicU64,
    at_risk: AtomicBool,
}

impl Cursor {
    /// Of a sink that has everything up to `seq`.
    pub fn new(sink: &str, seq: u64) -> Cursor {
        Cursor { sink: sink.to_owned(), seq: AtomicU64::new(seq), at_risk: AtomicBool::new(false) }
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
