//! Files that appear whole or not at all: written beside their place, then renamed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A file on its way. Removed when dropped before [`Atomic::commit`].
#[derive(Debug)]
pub struct Atomic {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Atomic {
    /// Starts a file that shall become `path`.
    ///
    /// The temporary name is fixed, so that a killed process leaves one file at most and the next
    /// try takes it over; a lock keeps two processes apart.
    ///
    /// # Errors
    /// If the file cannot be made, or another process is writing it.
    pub fn create(path: &Path) -> io::Result<Atomic> {
        let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".part");
        let temporary = path.with_file_name(hidden);
        loop {
            // Not truncated yet: until the lock is held it may be another's.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&temporary)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(io::Error::other("another process is writing it"));
                }
                Err(TryLockError::Error(e)) => return Err(e),
            }
            // Between open and lock another may have renamed or removed it; then try again.
            let ours = file.metadata()?;
            match fs::metadata(&temporary) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
                Ok(_) => continue,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            }
            file.set_len(0)?;
            return Ok(Atomic { file, temporary, path: path.to_owned(), done: false });
        }
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is until then.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// If the disk or the folder does not take it; the file is removed then.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.done = true;
        let folder = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Atomic {
    fn drop(&mut self) {
        if !self.done {
            // Nothing can be done about a failure here, and the next try takes the file over.
            drop(fs::remove_file(&self.temporary));
        }
    }
}
