//! The one writer of a journal: open, append in group commits, retention, checkpoints.
//!
//! Group commit is the caller's loop: take one event, take what else is queued up to
//! [`COMMIT_MAX`], [`Writer::append`], again. Each commit starts as soon as the one before has
//! returned, so an idle stream waits for nothing and under load the commits grow. Once a second,
//! busy or idle, the loop calls [`Writer::maintain`], and again as long as it says so.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use crate::{
    event::Event,
    journal::{
        JournalError,
        bell::Owner,
        bounds, crc,
        cursor::Cursor,
        loss::Loss,
        open::{self, PAGE_BYTES},
        pragma,
        retain::{Ages, Retain, Steps, first_younger},
    },
};

/// No commit gets larger than this many events.
pub const COMMIT_MAX: usize = 256;
/// The write-ahead log is copied into the database when it has this many pages (8 MiB).
const CHECKPOINT_PAGES: u64 = 1024;
/// Readers kept the log from starting over until it had this many pages: then they must wait.
const RESTART_PAGES: u64 = 4 * CHECKPOINT_PAGES;
/// Pages given back to the file system at once; each may have to be moved.
const VACUUM_PAGES: u64 = 256;
/// Age and free space are looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The sequence numbers of one commit, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The first event's.
    pub first: u64,
    /// The last event's.
    pub last: u64,
}

/// What the metrics want to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes in use in the database file.
    pub size_bytes: u64,
    /// The sequence number of the oldest event that is there.
    pub oldest: u64,
    /// The sequence number that the next event gets.
    pub next: u64,
    /// Events appended since opening.
    pub appended: u64,
    /// Events that retention removed since opening though a sink had not delivered them.
    pub lost: u64,
}

mod follow;

/// A sink's cursor, and what of it is in the journal.
struct Tracked {
    cursor: Arc<Cursor>,
    saved: u64,
}

/// The one writer of a journal.
pub struct Writer {
    connection: Connection,
    owner: Owner,
    path: PathBuf,
    id: String,
    /// What is gone and has not been told.
    loss: Option<Loss>,
    /// The next append tells of what is gone.
    telling: bool,
    retain: Retain,
    /// How old events are, though the wall clock may be set.
    ages: Arc<Ages>,
    stats: Stats,
    /// The last epoch of each stream.
    epochs: HashMap<String, u64>,
    /// Of the sinks that are configured.
    cursors: Vec<Tracked>,
    /// Pages written to the log since copying it was last tried; an estimate from above.
    log_pages: u64,
    /// When age and free space were last looked at.
    looked: Option<Instant>,
    /// There is less free space than `keep_free`.
    low: bool,
    /// The oldest events are too old.
    old: bool,
    /// Bytes that the file system of a path has free. A field so that tests can fill the disk.
    free_space: fn(&Path) -> io::Result<u64>,
    /// The wall clock. A field so that tests can set it.
    wall: fn() -> i64,
    /// A checkpoint failed in a way that forbids to go on.
    failed: Option<String>,
}

impl Writer {
    /// Opens a journal to append to, or makes a new one.
    ///
    /// # Errors
    /// Each kind of [`JournalError`] except `Missing`.
    pub fn open(path: &Path, retain: Retain) -> Result<Writer, JournalError> {
        let (owner, opened) = open::open(path)?;
        let of = |it: rusqlite::Error| JournalError::of(path, &it);
        let (oldest, next) = bounds(&opened.connection).map_err(of)?;
        let size_bytes = used_bytes(&opened.connection).map_err(of)?;
        let steps = Steps::noted(&opened.connection).map_err(of)?;
        let writer = Writer {
            ages: Arc::new(Ages::new(steps)),
            connection: opened.connection,
            owner,
            path: path.to_owned(),
            id: opened.id,
            loss: opened.loss,
            telling: false,
            retain,
            stats: Stats { oldest, next, size_bytes, ..Stats::default() },
            epochs: opened.epochs,
            cursors: Vec::new(),
            log_pages: CHECKPOINT_PAGES,
            looked: None,
            low: false,
            old: false,
            free_space,
            wall: micros_now,
            failed: None,
        };
        writer.ring();
        Ok(writer)
    }

    /// The journal's id: a ULID, made when the journal was made (or found to be a copy).
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How old events are, for cursors that are made elsewhere.
    pub fn ages(&self) -> Arc<Ages> {
        self.ages.clone()
    }

    /// What the metrics want to know.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Changes what is kept, from the next append on.
    pub fn set_retain(&mut self, retain: Retain) {
        self.retain = retain;
        self.looked = None;
    }

    /// Appends all events in one transaction and empties `events`. When it returns they are
    /// synced to disk and readers can see them. Without events it does nothing.
    ///
    /// # Errors
    /// `events` is untouched and nothing was appended. If [`JournalError::is_temporary`] a later
    /// call may succeed; otherwise the process must end.
    pub fn append(&mut self, events: &mut Vec<Event>) -> Result<Committed, JournalError> {
        let first = self.stats.next;
        if events.is_empty() {
            return Ok(Committed { first, last: first - 1 });
        }
        self.look()?;
        let next = first + events.len() as u64;
        let done = self.transact(events, 2 * events.len() as u64);
        let (oldest, size_bytes) = done.map_err(|it| self.error(&it))?;
        let bytes: u64 = events.iter().map(|it| it.data.len() as u64 + 600).sum();
        self.log_pages += 4 + 2 * bytes / PAGE_BYTES;
        self.expired(oldest);
        self.stats = Stats { oldest, next, size_bytes, ..self.stats };
        self.stats.appended += events.len() as u64;
        events.clear();
        self.ring();
        self.checkpoint();
        Ok(Committed { first, last: next - 1 })
    }

    /// Does one piece of what is due without events: removes what has expired, gives space back.
    /// Returns whether more is due at once.
    ///
    /// # Errors
    /// As [`Writer::append`].
    pub fn maintain(&mut self) -> Result<bool, JournalError> {
        let freed = match self.low {
            true => self.vacuum().map_err(|it| self.error(&it))?,
            false => 0,
        };
        if self.low {
            // The space given back comes free with the checkpoint. Look again after each piece, or
            // more history would go than has to.
            self.checkpoint();
            self.looked = None;
        }
        let kept = self.look();
        let before = self.stats.oldest;
        if self.over() || self.moved() {
            let done = self.transact(&[], 512);
            let (oldest, size_bytes) = done.map_err(|it| self.error(&it))?;
            self.expired(oldest);
            self.stats = Stats { oldest, size_bytes, ..self.stats };
            self.log_pages += 64 + (oldest - before) / 4;
        }
        self.checkpoint();
        // Being short of space is not an error of this call; there may be nothing to append.
        match kept {
            Err(error) if !error.is_temporary() => Err(error),
            _ => Ok(0 < freed || before < self.stats.oldest),
        }
    }

    /// Registers a sink: its cursor stands where it stood when the journal was last written, or
    /// after everything that is there if the sink is new. It is saved with every commit.
    ///
    /// # Errors
    /// As [`Writer::append`].
    pub fn cursor(&mut self, sink: &str) -> Result<Arc<Cursor>, JournalError> {
        let sql = "SELECT seq FROM cursor WHERE sink = ?1";
        let saved = self.connection.query_row(sql, [sink], |row| row.get::<_, i64>(0));
        let saved = saved.optional().map_err(|it| self.error(&it))?;
        // A journal that was put back from a copy may be behind what a sink has delivered.
        let last = self.stats.next - 1;
        let at = saved.map_or(last, |it| (it as u64).min(last));
        let cursor = Arc::new(Cursor::new(sink, at).beside(self.ages.clone()));
        // Not saved as it is: a new sink's place is noted with the next commit.
        let saved = saved.map_or(u64::MAX, |it| it as u64);
        self.cursors.push(Tracked { cursor: cursor.clone(), saved });
        Ok(cursor)
    }

    /// The sinks that retention has come close to since the last look: what they have still to
    /// deliver begins in the oldest fifth of what is kept, and the journal is nearly full or old.
    pub fn newly_at_risk(&self) -> Vec<Arc<Cursor>> {
        let Stats { oldest, next, size_bytes, .. } = self.stats;
        let full = self.low || self.retain.bytes.is_some_and(|it| it / 5 * 4 < size_bytes);
        let fifth = oldest + (next - oldest) / 5;
        let is_new = |it: &&Tracked| {
            let first = it.cursor.get() + 1;
            // Each removal makes room for a while; what comes next is in danger all the same.
            let full = full || it.cursor.is_at_risk();
            let close = (full && first <= fifth) || self.is_old(first);
            let at_risk = first < next && close;
            !it.cursor.set_at_risk(at_risk) && at_risk
        };
        self.cursors.iter().filter(is_new).map(|it| it.cursor.clone()).collect()
    }

    /// Whether the event is older than four fifths of the age that is kept.
    fn is_old(&self, seq: u64) -> bool {
        let Some(age) = self.retain.age else { return false };
        let sql = "SELECT appended_us FROM event WHERE ?1 <= seq ORDER BY seq LIMIT 1";
        let appended = self.connection.prepare_cached(sql);
        let appended =
            appended.and_then(|mut it| it.query_row([seq as i64], |row| row.get::<_, i64>(0)));
        let (set, _) = self.ages.steps().since(seq);
        let limit = (self.wall)().saturating_sub(set).saturating_sub_unsigned(micros(age / 5 * 4));
        appended.is_ok_and(|it| it < limit)
    }

    /// What is gone with a journal that this one took the place of. Given once: the events appended
    /// next must tell of it.
    pub fn take_loss(&mut self) -> Option<Loss> {
        self.telling |= self.loss.is_some();
        self.loss.take()
    }

    /// Counts what was removed before every sink had delivered it.
    fn expired(&mut self, oldest: u64) {
        let slowest = self.cursors.iter().map(|it| it.cursor.get()).min();
        let delivered = slowest.map_or(u64::MAX, |it| it + 1).max(self.stats.oldest);
        self.stats.lost += oldest.saturating_sub(delivered);
    }

    /// Whether something should be removed.
    fn over(&self) -> bool {
        let over = self.retain.bytes.is_some_and(|it| it < self.stats.size_bytes);
        (over || self.low || self.old) && self.stats.oldest < self.stats.next
    }

    /// Removes up to `chunk` of the oldest events if something should go, and appends, in one
    /// transaction: the pages that become free take the new events, and there is one sync, not
    /// two. Returns the oldest sequence number and the size after it.
    fn transact(&mut self, events: &[Event], chunk: u64) -> rusqlite::Result<(u64, u64)> {
        let over = self.over();
        let by_age =
            over && !self.low && self.retain.bytes.is_none_or(|it| self.stats.size_bytes <= it);
        let (mut oldest, next, now) = (self.stats.oldest, self.stats.next, (self.wall)());
        let (set, until) = self.ages.steps().since(oldest);
        let age = self.retain.age.map_or(u64::MAX, micros);
        let cutoff = now.saturating_sub(set).saturating_sub_unsigned(age);
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if over {
            let mut end = next.min(oldest + chunk.clamp(64, 512));
            if by_age {
                let last = until.min(oldest + chunk.clamp(64, 512));
                end = first_younger(&transaction, oldest, end.min(until), cutoff)?;
                self.old = end == last;
            }
            if oldest < end {
                expire(&transaction, end, next)?;
            }
            oldest = end;
        }
        let mut insert = transaction.prepare_cached(
            "INSERT INTO event (seq, appended_us, kind, stream, json, crc)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        let mut epochs = HashMap::new();
        for (seq, event) in (next..).zip(events) {
            let json = event.envelope(&self.id, seq);
            let crc = crc(
                seq,
                event.kind as i64,
                event.stream.as_deref().map(str::as_bytes),
                json.as_bytes(),
            );
            insert.execute(params![seq as i64, now, event.kind as i64, event.stream, json, crc])?;
            if let (Some(stream), Some(epoch)) = (&event.stream, event.epoch)
                && self.epochs.get(stream) != Some(&epoch)
            {
                epochs.insert(stream.clone(), epoch);
            }
        }
        drop(insert);
        let cursors: Vec<u64> = self.cursors.iter().map(|it| it.cursor.get()).collect();
        save(&transaction, &epochs, self.cursors.iter().zip(&cursors))?;
        self.ages.steps().note(&transaction)?;
        let tells = self.telling && !events.is_empty();
        if tells {
            Loss::forget(&transaction)?;
        }
        let size = used_bytes(&transaction)?;
        transaction.commit()?;
        self.ages.steps().is_noted = true;
        self.telling &= !tells;
        self.epochs.extend(epochs);
        for (it, saved) in self.cursors.iter_mut().zip(cursors) {
            it.saved = saved;
        }
        Ok((oldest, size))
    }

    /// Whether a sink has come further, or the clock was set, and the journal does not know.
    fn moved(&self) -> bool {
        !self.ages.steps().is_noted || self.cursors.iter().any(|it| it.cursor.get() != it.saved)
    }

    /// Looks at age and free space, if it is time to.
    fn look(&mut self) -> Result<(), JournalError> {
        let path = self.path.clone();
        if let Some(detail) = self.failed.clone() {
            return Err(JournalError::Fatal { path, detail });
        }
        let bounds = (self.stats.oldest, self.stats.next);
        self.ages.steps().look((self.wall)(), self.ages.mono(), bounds);
        if self.looked.is_none_or(|it| LOOK_EVERY <= it.elapsed()) {
            self.looked = Some(Instant::now());
            self.old = self.retain.age.is_some();
            // A file system that cannot say how much is free is taken to have enough.
            let free = (self.free_space)(&self.path).unwrap_or(u64::MAX);
            self.low = free < self.retain.keep_free;
        }
        // While there are events left, their pages can be used again and the file need not grow.
        if self.low && self.stats.next - self.stats.oldest < COMMIT_MAX as u64 {
            let keep = self.retain.keep_free;
            let detail = format!("the file system has less than keep_free = {keep} bytes free");
            return Err(JournalError::Full { path, detail });
        }
        Ok(())
    }

    /// Gives free pages back to the file system. Returns how many.
    fn vacuum(&mut self) -> rusqlite::Result<u64> {
        let free = pragma(&self.connection, "freelist_count")?.min(VACUUM_PAGES);
        if 0 < free {
            self.connection.execute_batch(&format!("PRAGMA incremental_vacuum({free})"))?;
            self.log_pages = RESTART_PAGES;
        }
        Ok(free)
    }

    /// Copies the write-ahead log into the database when it has grown. Readers have the events
    /// already, so this comes after the bell, and a failure is no failure of the append.
    fn checkpoint(&mut self) {
        if self.log_pages < CHECKPOINT_PAGES {
            return;
        }
        // Whatever comes of it, it is tried again after as many pages more. The events are safe in
        // the log, and a reader that stays would make every append wait.
        self.log_pages = 0;
        let done = checkpoint(&self.connection, "PASSIVE").and_then(|log| {
            // Every reader holds a page of results at most, so the wait is short; meanwhile new
            // ones read from the database alone and the log can start over.
            if RESTART_PAGES <= log { checkpoint(&self.connection, "RESTART") } else { Ok(log) }
        });
        if let Err(error) = done {
            let error = self.error(&error);
            if error.is_temporary() {
                tracing::warn!(%error, "the journal's log could not be copied");
            } else {
                self.failed = Some(format!("checkpoint: {error}"));
            }
        }
    }

    /// What an error means for the one who writes.
    fn error(&self, error: &rusqlite::Error) -> JournalError {
        JournalError::of(&self.path, error).in_use()
    }

    fn ring(&self) {
        if let Err(error) = self.owner.ring(&self.id, self.stats.next, self.stats.oldest) {
            tracing::debug!(%error, "could not ring the journal's bell");
        }
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({} {} {:?})", self.path.display(), self.id, self.stats)
    }
}

/// Notes the epochs, and the cursors that have moved.
fn save<'a>(
    transaction: &Transaction<'_>,
    epochs: &HashMap<String, u64>,
    cursors: impl Iterator<Item = (&'a Tracked, &'a u64)>,
) -> rusqlite::Result<()> {
    let mut set = transaction.prepare_cached("INSERT OR REPLACE INTO epoch VALUES (?1, ?2)")?;
    for (stream, epoch) in epochs {
        set.execute(params![stream, *epoch as i64])?;
    }
    let mut set = transaction.prepare_cached("INSERT OR REPLACE INTO cursor VALUES (?1, ?2)")?;
    for (it, seq) in cursors.filter(|it| it.0.saved != *it.1) {
        set.execute(params![it.cursor.sink(), *seq as i64])?;
    }
    Ok(())
}

/// Removes all events before `end`, and notes that `next` comes next in case none is left.
fn expire(transaction: &Transaction<'_>, end: u64, next: u64) -> rusqlite::Result<()> {
    transaction.prepare_cached("DELETE FROM event WHERE seq < ?1")?.execute([end as i64])?;
    transaction
        .prepare_cached("INSERT OR REPLACE INTO meta VALUES ('next', ?1)")?
        .execute([next as i64])?;
    Ok(())
}

/// Copies the log into the database, as far as readers allow. Gives the pages in the log.
fn checkpoint(connection: &Connection, how: &str) -> rusqlite::Result<u64> {
    let sql = format!("PRAGMA wal_checkpoint({how})");
    connection.query_row(&sql, [], |row| Ok(row.get::<_, i64>(1)?.max(0) as u64))
}

fn used_bytes(connection: &Connection) -> rusqlite::Result<u64> {
    let pages = pragma(connection, "page_count")? - pragma(connection, "freelist_count")?;
    Ok(pages * PAGE_BYTES)
}

fn free_space(path: &Path) -> io::Result<u64> {
    let it = rustix::fs::statvfs(path)?;
    Ok(it.f_bavail * it.f_frsize)
}

fn micros(it: Duration) -> u64 {
    u64::try_from(it.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn micros_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "writer_clock_tests.rs"]
mod clock_tests;
#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
