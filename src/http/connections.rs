//! How many connections there are, and who makes room for whom.
//!
//! When all places are taken, the connection that has been idle for longest makes room: a flood of
//! connections that ask nothing pushes out itself, and a scrape always gets in.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// No more connections than this are open, but for those that are just being closed.
pub const CONNECTIONS_MAX: usize = 1024;
/// So many of them only serve metrics and health.
pub const CONNECTIONS_KEPT: usize = 8;

/// All open connections.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Table {
    /// Grows with each change, so that a larger one is younger.
    moment: u64,
    /// By when they fell idle.
    idle: BTreeMap<u64, CancellationToken>,
    busy: usize,
}

/// Where a connection stands in the table.
#[derive(Clone, Copy)]
enum Place {
    Idle(u64),
    Busy,
}

/// One open connection.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    place: Mutex<Place>,
    out: CancellationToken,
    asked: AtomicBool,
    last_answer: CancellationToken,
}

/// A connection that is being answered.
pub(crate) struct Answering<'a> {
    connection: &'a Connection,
    /// Whether only the places for metrics and health are left.
    pub(crate) crowded: bool,
}

/// What a poisoned lock would mean.
const LOCK: &str = "nothing panics while it holds the table of connections";

impl Connections {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Connections {
        Connections(Arc::new(Shared { table: Mutex::default(), metrics }))
    }

    /// A place for a new connection; `None` if all are taken by connections that are being
    /// answered.
    pub(crate) fn enter(&self) -> Option<Connection> {
        let out = CancellationToken::new();
        let mut table = self.0.lock();
        if CONNECTIONS_MAX <= table.open() {
            table.idle.pop_first()?.1.cancel();
        }
        let place = table.fall_idle(&out);
        self.0.tell(&table);
        let (shared, place) = (self.0.clone(), Mutex::new(place));
        let (asked, last_answer) = (AtomicBool::new(false), CancellationToken::new());
        Some(Connection { shared, place, out, asked, last_answer })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect(LOCK)
    }

    fn tell(&self, table: &Table) {
        self.metrics.http_clients(table.idle.len(), table.busy);
    }
}

impl Table {
    fn open(&self) -> usize {
        self.idle.len() + self.busy
    }

    fn fall_idle(&mut self, out: &CancellationToken) -> Place {
        self.moment += 1;
        self.idle.insert(self.moment, out.clone());
        Place::Idle(self.moment)
    }

    fn leave(&mut self, place: Place) {
        match place {
            // Not there if it was pushed out.
            Place::Idle(moment) => drop(self.idle.remove(&moment)),
            Place::Busy => self.busy -= 1,
        }
    }
}

impl Connection {
    /// Takes the connection out of the idle ones while it is being answered.
    pub(crate) fn ask(&self) -> Answering<'_> {
        self.asked.store(true, Relaxed);
        let mut table = self.shared.lock();
        let mut place = self.place.lock().expect(LOCK);
        table.leave(*place);
        table.busy += 1;
        *place = Place::Busy;
        self.shared.tell(&table);
        Answering { connection: self, crowded: CONNECTIONS_MAX - CONNECTIONS_KEPT < table.open() }
    }

    /// Whether it has sent a request.
    pub(crate) fn has_asked(&self) -> bool {
        self.asked.load(Relaxed)
    }

    /// Ends the connection when the answer that is being given was read, or was not read in time:
    /// a large one must not be held for as long as a connection may live.
    pub(crate) fn end_with_this_answer(&self) {
        self.last_answer.cancel();
    }

    /// Waits until the last answer is being given.
    pub(crate) async fn is_last_answer(&self) {
        self.last_answer.cancelled().await;
    }

    /// Waits until it has to make room.
    pub(crate) async fn is_pushed_out(&self) {
        self.out.cancelled().await;
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        let it = self.connection;
        let mut table = it.shared.lock();
        let mut place = it.place.lock().expect(LOCK);
        table.leave(*place);
        *place = table.fall_idle(&it.out);
        it.shared.tell(&table);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        let place = *self.place.lock().expect(LOCK);
        table.leave(place);
        self.shared.tell(&table);
    }
}
