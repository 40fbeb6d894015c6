//! How a sink stands: counted by the loop that delivers, read when somebody scrapes.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use crate::{
    journal::cursor::Cursor,
    sink::broker::{Code, Fault, Message},
};

/// The counts of one sink.
#[derive(Debug)]
pub struct Progress {
    /// How far it has come.
    pub cursor: Arc<Cursor>,
    /// Whether it is connected.
    pub up: AtomicBool,
    /// Messages handed to the broker's client, again if they had to be.
    pub sent: AtomicU64,
    /// Messages acknowledged.
    pub acked: AtomicU64,
    /// Of those, the ones that the broker said it had already.
    pub duplicates: AtomicU64,
    /// Deliveries that were broken off and begun again.
    pub retries: AtomicU64,
    /// Messages that the broker will never take, written to the dead-letter file.
    pub dead: AtomicU64,
    /// Events that were gone from the journal before this sink had them.
    pub lost: AtomicU64,
    errors: [AtomicU64; Code::ALL.len()],
    /// Why it is not connected; `None` while it is, and before the first try.
    trouble: Mutex<Option<String>>,
    /// The oldest message in hand: its number and when it was appended.
    oldest: Mutex<Option<(u64, SystemTime)>>,
}

impl Progress {
    /// Of a sink that begins at `cursor`.
    pub fn new(cursor: Arc<Cursor>) -> Arc<Progress> {
        Arc::new(Progress {
            cursor,
            up: AtomicBool::default(),
            sent: AtomicU64::default(),
            acked: AtomicU64::default(),
            duplicates: AtomicU64::default(),
            retries: AtomicU64::default(),
            dead: AtomicU64::default(),
            lost: AtomicU64::default(),
            errors: Default::default(),
            trouble: Mutex::default(),
            oldest: Mutex::default(),
        })
    }

    /// It is connected.
    pub fn connected(&self) {
        self.up.store(true, Relaxed);
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The connection is lost, or there was none to be had.
    pub fn broken(&self, fault: &Fault) {
        self.up.store(false, Relaxed);
        self.failed(fault.code);
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(fault.to_string());
    }

    /// The last failure, without secrets, if nothing has gone well since.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a failure.
    pub fn failed(&self, code: Code) {
        self.errors[code as usize].fetch_add(1, Relaxed);
    }

    /// Failures so far.
    pub fn errors(&self, code: Code) -> u64 {
        self.errors[code as usize].load(Relaxed)
    }

    /// The oldest message in hand; `None` if there is none.
    pub fn waiting(&self, oldest: Option<&Message>) {
        let mut it = self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        *it = oldest.map(|it| (it.seq, it.appended));
    }

    /// How long the oldest message in hand has been in the journal.
    pub fn oldest_unacked(&self) -> Duration {
        let oldest = *self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        oldest.map_or(Duration::ZERO, |(seq, appended)| self.cursor.age(seq, appended))
    }
}
