//! The embedded event log: what its parts share, and how it is laid out in SQLite.
//!
//! One [`writer`] (a lock keeps a second daemon out) appends; any number of [`read`]ers in any
//! process page through it and are woken by the [`bell`]. A reader sees an event only after it
//! has been synced to disk. Sequence numbers are contiguous from 1 and never given twice, even
//! after retention has removed the events that had them.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, ErrorCode, OptionalExtension};

pub mod backup;
pub mod bell;
pub mod cursor;
pub mod filter;
pub mod loss;
pub mod open;
pub mod read;
pub mod retain;
pub mod side;
pub mod summary;
pub mod verify;
pub mod writer;

/// Marks the file as a ghostwatch journal (`PRAGMA application_id`): "GhWj".
const APPLICATION: i64 = 0x4768_576a;
/// The layout this version writes (`PRAGMA user_version`). Migrations go from one to the next.
const LAYOUT: i64 = 2;

/// The layout, version 2. `appended_us` is our own clock's time of appending, by which retention
/// goes: the event's own time may be a file's that was recorded years ago.
const SCHEMA: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE event (
    seq INTEGER PRIMARY KEY,
    appended_us INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    stream TEXT,
    json TEXT NOT NULL,
    crc INTEGER
);
CREATE TABLE epoch (stream TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE cursor (sink TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX state ON event (stream, seq) WHERE kind = 2;";

/// From layout 1 to 2: epochs had to be searched for, sinks had no cursors, events no checksum. An
/// event that is not JSON any more has no epoch to tell.
const UPGRADE: &str = "
ALTER TABLE event ADD COLUMN crc INTEGER;
CREATE TABLE epoch (stream TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE cursor (sink TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO epoch SELECT stream, max(json_extract(json, '$.data.epoch')) FROM event
    WHERE stream IS NOT NULL
    AND CASE WHEN json_valid(json) THEN json_type(json, '$.data.epoch') = 'integer' ELSE 0 END
    GROUP BY stream;";

/// Beside a journal in which damage was met while it was open, so that the next opening looks at
/// all of it.
const SUSPECT: &str = ".suspect";

/// Why the journal could not be opened, read or appended to.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process writes to it.
    #[error("journal {path} is in use by process {pid}; stop it or choose another journal.path")]
    Owned {
        /// The journal.
        path: PathBuf,
        /// The owner's process id, as it wrote it.
        pid: String,
    },
    /// There is no journal.
    #[error("journal {path} does not exist; has the daemon run with this path?")]
    Missing {
        /// The journal.
        path: PathBuf,
    },
    /// A later version wrote it.
    #[error(
        "journal {path} has layout {found}, this version knows up to {LAYOUT}; use a newer ghostwatch"
    )]
    TooNew {
        /// The journal.
        path: PathBuf,
        /// Its layout.
        found: i64,
    },
    /// The file is a database of something else.
    #[error("journal {path} is a database of something else; choose another journal.path")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a database, or its content is damaged.
    #[error("journal {path} is damaged: {detail}; move it away to start a new one")]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// What was noticed.
        detail: String,
    },
    /// No space, quota used up, or free space below `keep_free`. Appending may work again later.
    #[error("journal {path} cannot grow: {detail}; appending resumes when there is space")]
    Full {
        /// The journal.
        path: PathBuf,
        /// What was noticed.
        detail: String,
    },
    /// It cannot be written at the moment (read-only, permission, locked, out of descriptors).
    /// Appending may work again later.
    #[error("journal {path} cannot be used now: {detail}")]
    Blocked {
        /// The journal.
        path: PathBuf,
        /// What was noticed.
        detail: String,
    },
    /// Reading or writing failed in a way that leaves open what is on the disk. The process must
    /// stop claiming durability; opening the journal again recovers it.
    #[error("journal {path} failed: {detail}; restart to recover what is on the disk")]
    Fatal {
        /// The journal.
        path: PathBuf,
        /// What was noticed.
        detail: String,
    },
}

impl JournalError {
    /// Whether the same call may succeed later, so that the caller drops what it has and goes on.
    pub fn is_temporary(&self) -> bool {
        matches!(self, JournalError::Full { .. } | JournalError::Blocked { .. })
    }

    /// What it means for a process that has the journal in use: damage is noted beside the journal,
    /// so that the next start looks at all of it and moves it away, and this process must end. A
    /// part of the journal was good enough for the last opening.
    #[must_use]
    pub fn in_use(self) -> JournalError {
        let JournalError::Damaged { path, detail } = self else { return self };
        // Without the mark the process ends all the same, and its log has the reason.
        std::fs::write(beside(&path, SUSPECT), &detail).ok();
        let detail = format!("it is damaged, the next start looks at all of it: {detail}");
        JournalError::Fatal { path, detail }
    }

    /// The exit code of a process that ends because of it.
    pub fn exit_code(&self) -> u8 {
        match self {
            JournalError::TooNew { .. }
            | JournalError::Foreign { .. }
            | JournalError::Damaged { .. } => 4,
            _ => 1,
        }
    }

    /// Sorts an error of SQLite into what it means for us.
    fn of(path: &Path, error: &rusqlite::Error) -> JournalError {
        let (path, detail) = (path.to_owned(), error.to_string());
        let Some(sqlite) = error.sqlite_error() else {
            // A value of the wrong type, or a row that must be there and is not.
            return JournalError::Damaged { path, detail };
        };
        match sqlite.code {
            ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt => {
                JournalError::Damaged { path, detail }
            }
            ErrorCode::DiskFull => JournalError::Full { path, detail },
            ErrorCode::ReadOnly
            | ErrorCode::PermissionDenied
            | ErrorCode::CannotOpen
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked => JournalError::Blocked { path, detail },
            ErrorCode::SystemIoFailure if out_of_space(&path, sqlite.extended_code) => {
                JournalError::Full { path, detail }
            }
            _ => JournalError::Fatal { path, detail },
        }
    }
}

/// Whether a failed write of SQLite means that space or quota ran out. SQLite tells ENOSPC from
/// other failures, but not EDQUOT, so a write of our own asks the file system once more.
fn out_of_space(path: &Path, extended_code: i32) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_WRITE};
    match extended_code {
        SQLITE_IOERR_SHMSIZE => true,
        SQLITE_IOERR_WRITE => {
            let probe = beside(path, ".probe");
            let written = std::fs::write(&probe, [0u8; 1 << 16]);
            let full = written.is_err_and(|it| {
                use std::io::ErrorKind::{QuotaExceeded, StorageFull};
                matches!(it.kind(), QuotaExceeded | StorageFull)
            });
            // It may not exist, if it could not even be made.
            std::fs::remove_file(&probe).ok();
            full
        }
        _ => false,
    }
}

/// The path with something appended to its file name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Whether a file is the journal, by whatever name, or one of the files that lie beside it. Nothing
/// may be written there, and those that are missing can come at any moment.
pub fn is_of(file: &Path, journal: &Path) -> bool {
    let inode = |it: &Path| std::fs::metadata(it).map(|it| (it.dev(), it.ino())).ok();
    // Links are followed in the folder; the file itself may not be there.
    let place = |it: &Path| {
        let folder = it.parent().filter(|it| !it.as_os_str().is_empty());
        Some((inode(folder.unwrap_or(Path::new(".")))?, it.file_name()?.to_owned()))
    };
    let same = |it: &Path| place(it).is_some_and(|it| place(file) == Some(it));
    let is_journal = inode(file).is_some_and(|it| inode(journal) == Some(it));
    is_journal
        || ["", "-wal", "-shm", "-journal", ".lock"].iter().any(|it| same(&beside(journal, it)))
        || side::KINDS.iter().any(|it| same(&side::path_of(journal, it)))
}

/// Reads one value of the `meta` table.
fn meta<T: rusqlite::types::FromSql>(
    connection: &Connection,
    key: &str,
) -> rusqlite::Result<Option<T>> {
    let mut statement = connection.prepare_cached("SELECT value FROM meta WHERE key = ?1")?;
    statement.query_row([key], |row| row.get(0)).optional()
}

/// The sequence numbers in the journal: the oldest that is there and the next to be given.
/// They are equal iff no event is there.
fn bounds(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    let mut statement = connection
        .prepare_cached("SELECT (SELECT min(seq) FROM event), (SELECT max(seq) FROM event)")?;
    let (min, max) = statement
        .query_row([], |row| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?)))?;
    // Retention notes the number after what it removed, so that it outlives the last event.
    let noted = meta::<i64>(connection, "next")?.unwrap_or(1);
    let next = max.map_or(noted, |it| noted.max(it + 1));
    Ok((min.unwrap_or(next) as u64, next as u64))
}

/// Whether the opened file is a journal that this version can use.
fn check_layout(connection: &Connection, path: &Path) -> Result<(), JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    if pragma(connection, "application_id").map_err(of)? as i64 != APPLICATION {
        return Err(JournalError::Foreign { path: path.to_owned() });
    }
    match pragma(connection, "user_version").map_err(of)? as i64 {
        found if LAYOUT < found => Err(JournalError::TooNew { path: path.to_owned(), found }),
        1..=LAYOUT => Ok(()),
        found => {
            let detail = format!("layout {found} was never in use");
            Err(JournalError::Damaged { path: path.to_owned(), detail })
        }
    }
}

/// The layout of the opened journal.
fn layout(connection: &Connection) -> rusqlite::Result<i64> {
    pragma(connection, "user_version").map(|it| it as i64)
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(&format!("PRAGMA {name}"))?
        .query_row([], |row| Ok(row.get::<_, i64>(0)? as u64))
}

/// The checksum of an event, over everything that is told of it. SQLite notices damage to its own
/// structure, but not to a text.
fn crc(seq: u64, kind: i64, stream: Option<&[u8]>, json: &[u8]) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&seq.to_le_bytes());
    hasher.update(&kind.to_le_bytes());
    hasher.update(stream.unwrap_or_default());
    hasher.update(json);
    i64::from(hasher.finalize())
}
