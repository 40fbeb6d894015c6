//! A consistent copy of a journal, taken while another process may be writing it.
//!
//! SQLite's backup begins anew whenever another process commits between two of its steps, which
//! under a busy writer is for ever. So the copy holds one read transaction: it is the journal as it
//! was when the copy began. The writer goes on appending meanwhile; its write-ahead log cannot
//! start over until the copy is done, and grows by what is written.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, backup::StepResult};

use crate::journal::{
    JournalError, bell, beside, is_of,
    read::Reader,
    verify::{self, Depth, Verdict},
};

/// Pages copied between two looks at the progress (8 MiB).
const STEP: i32 = 1024;

/// What can go wrong with a copy.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There is something of this name.
    #[error("{path} exists; choose another name, or give --force to replace it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It is a journal in use, or belongs to the one to be copied.
    #[error("{path} is a journal in use or one of its files; choose another name")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The copy cannot be written.
    #[error("backup {path}: {detail}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was noticed.
        detail: String,
    },
    /// What was copied is damaged, so the copy was not kept.
    #[error(
        "the copy has {findings} findings and was not kept, the first: {first}; look at the journal \
         with `events verify`"
    )]
    Damaged {
        /// How many.
        findings: u64,
        /// The first.
        first: String,
    },
}

/// Copies a journal to `to`, which appears whole and verified or not at all. Gives what the
/// verification of the copy found. `told` hears how much of how much is done.
///
/// # Errors
/// Each kind of [`BackupError`].
pub fn backup(
    journal: &Path,
    to: &Path,
    force: bool,
    mut told: impl FnMut(u64, u64),
) -> Result<Verdict, BackupError> {
    let reader = Reader::open(journal)?;
    let write = |detail: String| BackupError::Write { path: to.to_owned(), detail };
    refuse(journal, to, force)?;
    let part = Part::new(to).map_err(|it| write(it.to_string()))?;
    copy(&reader, &part.path, &mut told).map_err(|it| match it {
        Side::Journal(it) => BackupError::Journal(JournalError::of(journal, &it)),
        Side::Copy(it) => write(it.to_string()),
    })?;
    let mut first = None;
    let verdict = verify::verify(
        &part.path,
        Depth::Full,
        |_, _| (),
        |it| {
            if it.damage {
                first.get_or_insert_with(|| it.to_string());
            }
        },
    )?;
    if let Some(first) = first {
        return Err(BackupError::Damaged { findings: verdict.damage, first });
    }
    part.commit(to).map_err(|it| write(it.to_string()))?;
    Ok(verdict)
}

/// Whether something is in the way.
fn refuse(journal: &Path, to: &Path, force: bool) -> Result<(), BackupError> {
    if is_of(to, journal) {
        return Err(BackupError::InUse { path: to.to_owned() });
    }
    if to.symlink_metadata().is_err() {
        return Ok(());
    }
    if !force {
        return Err(BackupError::Exists { path: to.to_owned() });
    }
    if bell::owner(to).is_some() {
        return Err(BackupError::InUse { path: to.to_owned() });
    }
    Ok(())
}

/// On which side copying failed.
enum Side {
    Journal(rusqlite::Error),
    Copy(rusqlite::Error),
}

fn copy(reader: &Reader, to: &Path, told: &mut dyn FnMut(u64, u64)) -> Result<(), Side> {
    let from = &reader.connection;
    // Only a read makes the transaction hold the moment.
    let hold = from.unchecked_transaction().map_err(Side::Journal)?;
    let read = hold.query_row("SELECT count(*) FROM meta", [], |row| row.get::<_, i64>(0));
    read.map_err(Side::Journal)?;
    let mut copy = Connection::open(to).map_err(Side::Copy)?;
    {
        let backup = rusqlite::backup::Backup::new(from, &mut copy).map_err(Side::Copy)?;
        loop {
            let step = backup.step(STEP).map_err(Side::Copy)?;
            let at = backup.progress();
            let (total, left) = (at.pagecount.max(0) as u64, at.remaining.max(0) as u64);
            told(total.saturating_sub(left), total);
            match step {
                StepResult::Done => break,
                // Nobody else has the copy, and a reader of a log waits for nobody.
                StepResult::Busy | StepResult::Locked => return Err(Side::Copy(busy())),
                _ => {}
            }
        }
    }
    hold.finish().map_err(Side::Journal)?;
    // A journal knows a copy by its inode; on another file system that could be the same by chance.
    copy.execute("UPDATE meta SET value = 0 WHERE key = 'inode'", []).map_err(Side::Copy)?;
    // The last one to close a database copies its log into it and removes it.
    copy.close().map_err(|it| Side::Copy(it.1))
}

fn busy() -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
    rusqlite::Error::SqliteFailure(code, Some("another process is writing the copy".to_owned()))
}

/// The copy on its way, under a name of its own; removed when dropped before [`Part::commit`].
struct Part {
    path: PathBuf,
    // The lock keeps two copies to one place apart; it is not on the database, which SQLite locks.
    _lock: File,
}

impl Part {
    fn new(to: &Path) -> io::Result<Part> {
        let path = beside(to, ".part");
        let lock = File::create(beside(&path, ".lock"))?;
        lock.try_lock().map_err(|_| io::Error::other("another process is writing it"))?;
        let part = Part { path, _lock: lock };
        // What a killed process left.
        part.remove();
        File::create(&part.path)?;
        Ok(part)
    }

    fn remove(&self) {
        for it in ["", "-wal", "-shm", "-journal"] {
            // Most of them are not there, and what stays is taken over by the next try.
            fs::remove_file(beside(&self.path, it)).ok();
        }
    }

    fn commit(self, to: &Path) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        for it in ["-wal", "-shm"] {
            // The log of the file that was there would be taken for the copy's.
            match fs::remove_file(beside(to, it)) {
                Err(it) if it.kind() != io::ErrorKind::NotFound => return Err(it),
                _ => {}
            }
        }
        fs::rename(&self.path, to)?;
        let folder = to.parent().filter(|it| !it.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.remove();
        fs::remove_file(beside(&self.path, ".lock")).ok();
    }
}
