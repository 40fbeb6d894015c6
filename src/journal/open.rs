//! Opening a journal to append to: its owner, its layout, its id, and what is done with damage.

use std::{collections::HashMap, fs, io, os::unix::fs::MetadataExt, path::Path, time::Duration};

use rusqlite::{Connection, ErrorCode, OpenFlags, params};

use crate::journal::{
    APPLICATION, JournalError, LAYOUT, SCHEMA, SUSPECT, UPGRADE, bell::Owner, beside, bounds,
    check_layout, layout, loss::Loss, meta, pragma, writer::micros_now,
};

/// Seven to eight frame events fit a page; with 4096 bytes a quarter of each would stay empty.
pub(super) const PAGE_BYTES: u64 = 8192;
/// A journal up to this size is checked completely when it is opened (below 0.2 s).
const CHECK_BYTES: u64 = 64 << 20;

/// A journal that can be appended to.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) id: String,
    /// The last epoch of each stream.
    pub(super) epochs: HashMap<String, u64>,
    /// What is gone with a journal that this one took the place of.
    pub(super) loss: Option<Loss>,
}

/// Opens a journal, or makes a new one. One that is damaged is moved away with all that belongs to
/// it, so that the cameras' events of today are not lost for those of yesterday.
pub(super) fn open(path: &Path) -> Result<(Owner, Opened), JournalError> {
    if let Some(parent) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        let blocked = |it: io::Error| JournalError::Blocked {
            path: path.to_owned(),
            detail: format!("folder {}: {it}", parent.display()),
        };
        fs::create_dir_all(parent).map_err(blocked)?;
    }
    let owner = Owner::take(path)?;
    let opened = match open_at(path, &owner, None) {
        Err(JournalError::Damaged { detail, .. }) => {
            let loss = set_aside(path, &owner, detail)?;
            tracing::error!(
                journal = %path.display(),
                "the journal is damaged; it was moved away and a new one begun; {loss}"
            );
            open_at(path, &owner, Some(loss))?
        }
        other => other?,
    };
    Ok((owner, opened))
}

/// Opens what is there, or makes a new journal, which notes the loss. All that is read when it is
/// opened is read here, so that damage to any of it is met here.
fn open_at(path: &Path, owner: &Owner, loss: Option<Loss>) -> Result<Opened, JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let mut connection = connect(path)?;
    check_content(&connection, path)?;
    let (_, next) = bounds(&connection).map_err(of)?;
    let epochs = numbers(&connection, "SELECT stream, epoch FROM epoch").map_err(of)?;
    // Whoever registers a sink looks for its cursor later.
    numbers(&connection, "SELECT sink, seq FROM cursor").map_err(of)?;
    let id = identify(&mut connection, path, (owner, next), loss)?;
    let loss = Loss::noted(&connection).map_err(of)?;
    Ok(Opened { connection, id, epochs, loss })
}

/// All rows of a name and a number.
fn numbers(connection: &Connection, sql: &str) -> rusqlite::Result<HashMap<String, u64>> {
    let mut statement = connection.prepare(sql)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
    rows.collect()
}

/// Moves the database and what SQLite keeps beside it. Tells what is gone with it.
fn set_aside(path: &Path, owner: &Owner, detail: String) -> Result<Loss, JournalError> {
    let (journal, events) = match &owner.last {
        Some(it) => (Some(it.id.clone()), it.events()),
        None => remains(path),
    };
    let mark = format!(".damaged-{}", micros_now() / 1_000_000);
    let free = |it: &u32| !beside(path, &format!("{mark}.{it}")).exists();
    let n = (0..).find(free).expect("a folder has fewer than 2^32 files");
    let to = beside(path, &format!("{mark}.{n}"));
    for suffix in ["", "-wal", "-shm"] {
        match fs::rename(beside(path, suffix), beside(&to, suffix)) {
            Err(it) if it.kind() != io::ErrorKind::NotFound => {
                let detail = format!("it is damaged and cannot be moved to {}: {it}", to.display());
                return Err(JournalError::Blocked { path: path.to_owned(), detail });
            }
            _ => {}
        }
    }
    fs::remove_file(beside(path, SUSPECT)).ok();
    // For readers elsewhere, who do not know our working directory.
    let to = std::path::absolute(&to).unwrap_or(to);
    Ok(Loss { journal, events, moved_to: Some(to.display().to_string()), detail })
}

/// The id of a damaged journal and its first and last event, as far as they can be read.
fn remains(path: &Path) -> (Option<String>, Option<(u64, u64)>) {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let Ok(connection) = Connection::open_with_flags(path, flags) else { return (None, None) };
    let events = bounds(&connection).ok().filter(|it| it.0 < it.1);
    let id = meta(&connection, "id").ok().flatten();
    (id, events.map(|(oldest, next)| (oldest, next - 1)))
}

/// Opens the database, makes or upgrades the layout, and asserts what durability rests on.
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
    let upgrade = !new && layout(&connection).map_err(of)? < LAYOUT;
    let pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;
                   PRAGMA journal_size_limit=67108864; PRAGMA cache_size=-2048;";
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
    if new || upgrade {
        let transaction = connection.transaction().map_err(of)?;
        match new {
            true => transaction.execute_batch(SCHEMA).map_err(of)?,
            false => to_layout_2(&transaction, path)?,
        }
        transaction.pragma_update(None, "application_id", APPLICATION).map_err(of)?;
        transaction.pragma_update(None, "user_version", LAYOUT).map_err(of)?;
        transaction.commit().map_err(of)?;
    }
    Ok(connection)
}

/// Brings the tables to layout 2. Tables that SQLite can read and that still cannot be brought there
/// are not those of layout 1, so the journal is damaged.
fn to_layout_2(connection: &Connection, path: &Path) -> Result<(), JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    connection.execute_batch(UPGRADE).map_err(|error| match error.sqlite_error_code() {
        None | Some(ErrorCode::Unknown | ErrorCode::ConstraintViolation) => {
            let detail = format!("it cannot be upgraded from layout 1: {error}");
            JournalError::Damaged { path: path.to_owned(), detail }
        }
        _ => of(error),
    })?;
    let unreadable = "SELECT count(*) FROM event WHERE NOT json_valid(json)";
    let events: i64 = connection.query_row(unreadable, [], |row| row.get(0)).map_err(of)?;
    if 0 < events {
        tracing::warn!(
            journal = %path.display(), events,
            "the journal of layout 1 was upgraded; some of its events are damaged, readers are told of a gap in their place"
        );
    }
    Ok(())
}

/// Looks for damage: everywhere in a small journal; in a large one, where it would take minutes,
/// everywhere but among the older events.
fn check_content(connection: &Connection, path: &Path) -> Result<(), JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let small = fs::metadata(path).map_or(0, |it| it.len()) <= CHECK_BYTES;
    // The daemon before this one met damage while it ran.
    let suspect = beside(path, SUSPECT).exists();
    let parts = if small || suspect { &["1"][..] } else { &["'meta'", "'epoch'", "'cursor'"] };
    for part in parts {
        let check = format!("PRAGMA quick_check({part})");
        let verdict: String = connection.query_row(&check, [], |row| row.get(0)).map_err(of)?;
        if verdict != "ok" {
            return Err(JournalError::Damaged { path: path.to_owned(), detail: verdict });
        }
    }
    let newest = "SELECT total(length(CAST(json AS BLOB))), max(seq) - min(seq) + 1 - count(*)
                  FROM (SELECT seq, json FROM event ORDER BY seq DESC LIMIT 1000)";
    let missing: Option<i64> = connection.query_row(newest, [], |row| row.get(1)).map_err(of)?;
    if missing.is_some_and(|it| 0 < it) {
        // The rest of it is good, and readers are told of the hole.
        tracing::error!(journal = %path.display(), missing, "events are missing among the newest ones");
    }
    if suspect {
        fs::remove_file(beside(path, SUSPECT)).ok();
    }
    Ok(())
}

/// The journal's id. A journal that was copied, or put back from an older copy, takes a new one
/// before its first append, or different events would carry the same id. What is gone with the
/// journal before is noted together with a new id.
fn identify(
    connection: &mut Connection,
    path: &Path,
    (owner, next): (&Owner, u64),
    loss: Option<Loss>,
) -> Result<String, JournalError> {
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let inode = fs::metadata(path).map_or(0, |it| it.ino()) as i64;
    let id: Option<String> = meta(connection, "id").map_err(of)?;
    let known: Option<i64> = meta(connection, "inode").map_err(of)?;
    if let (Some(id), Some(known)) = (&id, known) {
        // The lock file is written after each commit, so it never runs ahead of the journal.
        let behind = owner.last.as_ref().is_some_and(|it| it.id == *id && next < it.next);
        if known == inode && !behind {
            return Ok(id.clone());
        }
        tracing::warn!(journal = %path.display(), "the journal is a copy, it takes a new id");
    }
    let loss = loss.or_else(|| replaced(owner, id.as_deref(), next));
    let id = ulid().map_err(|it| JournalError::Blocked {
        path: path.to_owned(),
        detail: format!("no random numbers for a journal id: {it}"),
    })?;
    let transaction = connection.transaction().map_err(of)?;
    let set = "INSERT OR REPLACE INTO meta VALUES (?1, ?2)";
    transaction.execute(set, params!["id", id]).map_err(of)?;
    transaction.execute(set, params!["inode", inode]).map_err(of)?;
    transaction.execute(set, params!["next", next as i64]).map_err(of)?;
    // Where the events with this id begin.
    transaction.execute(set, params!["begin", next as i64]).map_err(of)?;
    if let Some(loss) = loss {
        loss.note(&transaction).map_err(of)?;
    }
    transaction.commit().map_err(of)?;
    Ok(id)
}

/// What is gone with the journal that was written here last, when this one with the id `id` (none
/// if it is new) lies in its place: the lock file is the trace that it has left.
fn replaced(owner: &Owner, id: Option<&str>, next: u64) -> Option<Loss> {
    let last = owner.last.as_ref()?;
    let (events, detail) = match id {
        None => (last.events()?, "the journal was removed or emptied, and a new one begun"),
        Some(id) if id == last.id => {
            // A copy that was made elsewhere and is ahead or level lacks nothing.
            let lacks = next < last.next;
            (
                lacks.then(|| (next, last.next - 1))?,
                "an older copy of the journal was put in its place",
            )
        }
        Some(_) => (last.events()?, "another journal was put in its place"),
    };
    let journal = Some(last.id.clone());
    let loss = Loss { journal, events: Some(events), moved_to: None, detail: detail.to_owned() };
    tracing::warn!("{loss}");
    Some(loss)
}

/// A ULID: 48 bits of milliseconds, 80 random bits, in Crockford's base 32.
pub(super) fn ulid() -> io::Result<String> {
    use std::io::Read;
    let mut random = [0u8; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut random[6..])?;
    let millis = u128::from(micros_now().unsigned_abs() / 1000);
    let number = (millis << 80) | u128::from_be_bytes(random);
    let digit = |at: u32| b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"[(number >> (5 * at)) as usize % 32];
    Ok((0..26).rev().map(|at| char::from(digit(at))).collect())
}

#[cfg(test)]
#[path = "open_tests.rs"]
mod tests;
