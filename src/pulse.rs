//! When each stage's loop turned last: what the watchdog and `/livez` go by.
//!
//! A loop that waits looks up every [`TURN`], so a pulse that stands still means that the stage
//! hangs in its work: in a driver, on a disk, or waiting for another stage that does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Idle or not, every loop turns at least this often.
pub const TURN: Duration = Duration::from_millis(500);

/// The pulse of one stage's loop.
#[derive(Debug)]
pub struct Pulse {
    name: String,
    start: Instant,
    /// Milliseconds since `start`.
    last: AtomicU64,
}

impl Pulse {
    /// Of a stage that starts now.
    pub fn new(name: &str) -> Arc<Pulse> {
        Arc::new(Pulse { name: name.to_owned(), start: Instant::now(), last: AtomicU64::new(0) })
    }

    /// The stage.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How long the stage has run.
    pub fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// The loop has turned.
    pub fn beat(&self) {
        self.last.store(self.start.elapsed().as_millis() as u64, Relaxed);
    }

    /// How long it has not.
    pub fn still(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.last.load(Relaxed)))
    }
}
