//! The one writer of a journal: open, append in group commits, retention, checkpoints.
//!
//! Group commit is the caller's loop: take one event, take what else is queued up to
//! [`COMMIT_MAX`], [`Writer::append`], again. Each commit starts as soon as the one before has
//! returned, so an idle stream waits for nothing and under load the commits grow. Once a second,
//! busy or idle, the loop calls [`Writer::maintain`], and again as long as it says so.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};

use crate::{
    event::Event,
    journal::{
        APPLICATION, JournalError, LAYOUT, Retain, SCHEMA, bell::Owner, bounds, check_layout, meta,
    },
};

/// No commit gets larger than this many events.
pub const COMMIT_MAX: usize = 256;
/// Seven to eight frame events fit a page; with 4096 bytes a quarter of each would stay empty.
const PAGE_BYTES: u64 = 8192;
/// The write-ahead log is copied into the database when it has this many pages (8 MiB).
const CHECKPOINT_PAGES: u64 = 1024;
/// Readers kept the log from starting over until it had this many pages: then they must wait.
const RESTART_PAGES: u64 = 4 * CHECKPOINT_PAGES;
/// Pages given back to the file system at once; each may have to be moved.
const VACUUM_PAGES: u64 = 256;
/// Age and free space are looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A journal up to this size is checked completely when it is opened (below 0.2 s).
const CHECK_BYTES: u64 = 64 << 20;

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
    /// Events that retention removed since opening.
    pub expired: u64,
}

/// The one writer of a journal.
pub struct Writer {
    connection: Connection,
    owner: Owner,
    path: PathBuf,
    id: String,
    retain: Retain,
    stats: Stats,
    /// Pages written to the log since it was last copied completely; an estimate from above.
    log_pages: u64,
    /// When age and free space were last looked at.
    looked: Option<Instant>,
    /// There is less free space than `keep_free`.
    low: bool,
    /// The oldest events are too old.
    old: bool,
    /// Bytes that the file system of a path has free. A field so that tests can fill the disk.
    free_space: fn(&Path) -> io::Result<u64>,
    /// A checkpoint failed in a way that forbids to go on.
    failed: Option<String>,
}

impl Writer {
    /// Opens a journal to append to, or makes a new one.
    ///
    /// # Errors
    /// Each kind of [`JournalError`] except `Missing`.
    pub fn open(path: &Path, retain: Retain) -> Result<Writer, JournalError> {
        if let Some(parent) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            let blocked = |it: io::Error| JournalError::Blocked {
                path: path.to_owned(),
                detail: format!("folder {}: {it}", parent.display()),
            };
            fs::create_dir_all(parent).map_err(blocked)?;
        }
        let owner = Owner::take(path)?;
        let mut connection = connect(path)?;
        let of = |it: rusqlite::Error| JournalError::of(path, &it);
        check_content(&connection, path)?;
        let (oldest, next) = bounds(&connection).map_err(of)?;
        let id = identify(&mut connection, path, &owner, next)?;
        let stats = Stats { oldest, next, ..Stats::default() };
        let mut writer = Writer {
            connection,
            owner,
            path: path.to_owned(),
            id,
            retain,
            stats,
            log_pages: CHECKPOINT_PAGES,
            looked: None,
            low: false,
            old: false,
            free_space,
            failed: None,
        };
        writer.stats.size_bytes = used_bytes(&writer.connection).map_err(of)?;
        writer.ring();
        Ok(writer)
    }

    /// The journal's id: a ULID, made when the journal was made (or found to be a copy).
    pub fn id(&self) -> &str {
        &self.id
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
        let (oldest, size_bytes) = done.map_err(|it| JournalError::of(&self.path, &it))?;
        let bytes: u64 = events.iter().map(|it| it.data.len() as u64 + 600).sum();
        self.log_pages += 4 + 2 * bytes / PAGE_BYTES;
        self.stats.expired += oldest - self.stats.oldest;
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
            true => self.vacuum().map_err(|it| JournalError::of(&self.path, &it))?,
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
        if self.over() {
            let done = self.transact(&[], 512);
            let (oldest, size_bytes) = done.map_err(|it| JournalError::of(&self.path, &it))?;
            self.stats.expired += oldest - before;
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
        let (mut oldest, next, now) = (self.stats.oldest, self.stats.next, micros_now());
        let cutoff = now.saturating_sub_unsigned(self.retain.age.map_or(u64::MAX, micros));
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if over {
            let mut end = next.min(oldest + chunk.clamp(64, 512));
            if by_age {
                end = first_younger(&transaction, oldest, end, cutoff)?;
                self.old = end == oldest + chunk.clamp(64, 512);
            }
            if oldest < end {
                expire(&transaction, end, next)?;
            }
            oldest = end;
        }
        let mut insert = transaction.prepare_cached(
            "INSERT INTO event (seq, appended_us, kind, stream, json) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for (seq, event) in (next..).zip(events) {
            let json = event.envelope(&self.id, seq);
            insert.execute(params![seq as i64, now, event.kind as i64, event.stream, json])?;
        }
        drop(insert);
        let size = used_bytes(&transaction)?;
        transaction.commit()?;
        Ok((oldest, size))
    }

    /// Looks at age and free space, if it is time to.
    fn look(&mut self) -> Result<(), JournalError> {
        let path = self.path.clone();
        if let Some(detail) = self.failed.clone() {
            return Err(JournalError::Fatal { path, detail });
        }
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
        let done = checkpoint(&self.connection, "PASSIVE").and_then(|(log, copied)| {
            // Every reader holds a page of results at most, so the wait is short; meanwhile new
            // ones read from the database alone and the log can start over.
            if RESTART_PAGES <= log {
                return checkpoint(&self.connection, "RESTART");
            }
            Ok((log, copied))
        });
        match done {
            Ok((log, copied)) => self.log_pages = if copied < log { log } else { 0 },
            Err(error) => {
                let error = JournalError::of(&self.path, &error);
                // Try again after as many pages more; the events are safe in the log.
                self.log_pages = 0;
                if error.is_temporary() {
                    tracing::warn!(%error, "the journal's log could not be copied");
                } else {
                    self.failed = Some(format!("checkpoint: {error}"));
                }
            }
        }
    }

    fn ring(&self) {
        if let Err(error) = self.owner.ring(&self.id, self.stats.next) {
            tracing::debug!(%error, "could not ring the journal's bell");
        }
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({} {} {:?})", self.path.display(), self.id, self.stats)
    }
}

/// Opens the database, makes the layout if it is new, and asserts what durability rests on.
fn connect(path: &Path) -> Result<Connection, JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(of)?;
    connection.busy_timeout(Duration::from_millis(100)).map_err(of)?;
    // A process killed between making the file and making the layout leaves an empty database.
    let tables = "SELECT count(*) FROM sqlite_schema";
    let tables: i64 = connection.query_row(tables, [], |row| row.get(0)).map_err(of)?;
    let new = tables == 0 && pragma(&connection, "user_version").map_err(of)? == 0;
    if new {
        let first = format!("PRAGMA page_size={PAGE_BYTES}; PRAGMA auto_vacuum=INCREMENTAL;");
        connection.execute_batch(&first).map_err(of)?;
    } else {
        // Before anything is set: a file that is not ours stays as it is.
        check_layout(&connection, path)?;
    }
    let pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;
                   PRAGMA journal_size_limit=67108864; PRAGMA cache_size=-8192;";
    connection.execute_batch(pragmas).map_err(of)?;
    let mode: String =
        connection.pragma_query_value(None, "journal_mode", |row| row.get(0)).map_err(of)?;
    let level = pragma(&connection, "synchronous").map_err(of)?;
    if mode != "wal" || level != 2 {
        let detail = format!(
            "journal_mode is {mode} and synchronous {level} where wal and 2 were set; put the \
             journal on a local file system"
        );
        return Err(JournalError::Fatal { path: path.to_owned(), detail });
    }
    if new {
        let transaction = connection.transaction().map_err(of)?;
        transaction.execute_batch(SCHEMA).map_err(of)?;
        transaction.pragma_update(None, "application_id", APPLICATION).map_err(of)?;
        transaction.pragma_update(None, "user_version", LAYOUT).map_err(of)?;
        transaction.commit().map_err(of)?;
    }
    Ok(connection)
}

/// Looks for damage: everywhere in a small journal; in a large one, where it would take minutes,
/// in the table of the ids and among the newest events.
fn check_content(connection: &Connection, path: &Path) -> Result<(), JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let small = fs::metadata(path).map_or(0, |it| it.len()) <= CHECK_BYTES;
    let check = if small { "PRAGMA quick_check(1)" } else { "PRAGMA quick_check('meta')" };
    let verdict: String = connection.query_row(check, [], |row| row.get(0)).map_err(of)?;
    if verdict != "ok" {
        return Err(JournalError::Damaged { path: path.to_owned(), detail: verdict });
    }
    let newest = "SELECT total(length(CAST(json AS BLOB))), count(*), min(seq), max(seq)
                  FROM (SELECT seq, json FROM event ORDER BY seq DESC LIMIT 1000)";
    let (count, min, max): (i64, Option<i64>, Option<i64>) = connection
        .query_row(newest, [], |row| Ok((row.get(1)?, row.get(2)?, row.get(3)?)))
        .map_err(of)?;
    let span = min.zip(max).map_or(0, |(min, max)| max - min + 1);
    if count != span {
        let detail = format!("{count} events lie in a place of {span}");
        return Err(JournalError::Damaged { path: path.to_owned(), detail });
    }
    Ok(())
}

/// The journal's id. A journal that was copied, or put back from an older copy, takes a new one
/// before its first append, or different events would carry the same id.
fn identify(
    connection: &mut Connection,
    path: &Path,
    owner: &Owner,
    next: u64,
) -> Result<String, JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let inode = fs::metadata(path).map_or(0, |it| it.ino()) as i64;
    let id: Option<String> = meta(connection, "id").map_err(of)?;
    let known: Option<i64> = meta(connection, "inode").map_err(of)?;
    if let (Some(id), Some(known)) = (id, known) {
        // The lock file is written after each commit, so it never runs ahead of the journal.
        let behind = owner.last.as_ref().is_some_and(|it| it.0 == id && next < it.1);
        if known == inode && !behind {
            return Ok(id);
        }
        tracing::warn!(journal = %path.display(), "the journal is a copy, it takes a new id");
    }
    let id = ulid().map_err(|it| JournalError::Blocked {
        path: path.to_owned(),
        detail: format!("no random numbers for a journal id: {it}"),
    })?;
    let transaction = connection.transaction().map_err(of)?;
    let set = "INSERT OR REPLACE INTO meta VALUES (?1, ?2)";
    transaction.execute(set, params!["id", id]).map_err(of)?;
    transaction.execute(set, params!["inode", inode]).map_err(of)?;
    transaction.execute(set, params!["next", next as i64]).map_err(of)?;
    transaction.commit().map_err(of)?;
    Ok(id)
}

/// A ULID: 48 bits of milliseconds, 80 random bits, in Crockford's base 32.
fn ulid() -> io::Result<String> {
    use std::io::Read;
    let mut random = [0u8; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut random[6..])?;
    let millis = u128::from(micros_now().unsigned_abs() / 1000);
    let number = (millis << 80) | u128::from_be_bytes(random);
    let digit = |at: u32| b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"[(number >> (5 * at)) as usize % 32];
    Ok((0..26).rev().map(|at| char::from(digit(at))).collect())
}

/// The first event in `oldest..end` that was appended at or after the cut-off, or `end`.
fn first_younger(
    transaction: &Transaction<'_>,
    oldest: u64,
    end: u64,
    cutoff: i64,
) -> rusqlite::Result<u64> {
    let mut statement = transaction.prepare_cached(
        "SELECT min(seq) FROM event WHERE ?1 <= seq AND seq < ?2 AND ?3 <= appended_us",
    )?;
    let found: Option<i64> =
        statement.query_row(params![oldest as i64, end as i64, cutoff], |row| row.get(0))?;
    Ok(found.map_or(end, |it| it as u64))
}

/// Removes all events before `end`, and notes that `next` comes next in case none is left.
fn expire(transaction: &Transaction<'_>, end: u64, next: u64) -> rusqlite::Result<()> {
    transaction.prepare_cached("DELETE FROM event WHERE seq < ?1")?.execute([end as i64])?;
    transaction
        .prepare_cached("INSERT OR REPLACE INTO meta VALUES ('next', ?1)")?
        .execute([next as i64])?;
    Ok(())
}

/// Pages in the log, and how many of them are now in the database too.
fn checkpoint(connection: &Connection, how: &str) -> rusqlite::Result<(u64, u64)> {
    connection.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |row| {
        Ok((row.get::<_, i64>(1)?.max(0) as u64, row.get::<_, i64>(2)?.max(0) as u64))
    })
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(&format!("PRAGMA {name}"))?
        .query_row([], |row| Ok(row.get::<_, i64>(0)? as u64))
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

fn micros_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
