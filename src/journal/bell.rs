//! Who owns a journal, and the bell that the owner rings after each commit.
//!
//! Both are one small file beside the journal, `<journal>.lock`: the writer holds its lock and
//! writes `PID JOURNAL-ID NEXT-SEQUENCE OLDEST-SEQUENCE` into it after each commit; readers are told
//! of that by inotify. Watching the write-ahead log instead would wake a reader before the commit is synced
//! and visible, and asking SQLite every 2 ms costs CPU all day.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};

use crate::journal::{JournalError, beside};

/// Without inotify (its instances may be used up) a reader looks this often.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The writer's end: holds the lock until it is dropped or its process ends, however it ends.
#[derive(Debug)]
pub struct Owner {
    file: File,
    /// What the owner before wrote, if it did.
    pub last: Option<Last>,
}

/// How far the owner before came.
#[derive(Debug)]
pub struct Last {
    /// The journal's id.
    pub id: String,
    /// The next sequence number.
    pub next: u64,
    /// The oldest one that was there.
    pub oldest: u64,
}

impl Last {
    /// The first and the last event that were there; `None` iff there was none.
    pub fn events(&self) -> Option<(u64, u64)> {
        (self.oldest < self.next).then(|| (self.oldest, self.next - 1))
    }
}

impl Owner {
    /// Takes the journal.
    ///
    /// # Errors
    /// [`JournalError::Owned`] if another process has it; [`JournalError::Blocked`] if the lock
    /// file cannot be made.
    pub fn take(path: &Path) -> Result<Owner, JournalError> {
        let name = beside(path, ".lock");
        let blocked = |it: io::Error| JournalError::Blocked {
            path: path.to_owned(),
            detail: format!("lock file {}: {it}", name.display()),
        };
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&name)
            .map_err(blocked)?;
        let locked = file.try_lock();
        let mut text = String::new();
        // Whatever else may lie in it is not ours: then nothing is known of the owner before.
        if file.read_to_string(&mut text).is_err() {
            text.clear();
        }
        let mut words = text.split_whitespace();
        let pid = words.next().unwrap_or("unknown").to_owned();
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::Owned { path: path.to_owned(), pid });
            }
            Err(TryLockError::Error(it)) => return Err(blocked(it)),
        }
        let (id, mut numbers) = (words.next(), words.map_while(|it| it.parse().ok()));
        let last = id.zip(numbers.next()).map(|(id, next)| {
            // The first versions did not write it.
            let oldest = numbers.next().unwrap_or(1);
            Last { id: id.to_owned(), next, oldest }
        });
        Ok(Owner { file, last })
    }

    /// Tells all readers that there is something new, and the next owner how far this one came.
    ///
    /// # Errors
    /// What the file system says. Readers then see the news a second later.
    pub fn ring(&self, id: &str, next: u64, oldest: u64) -> io::Result<()> {
        let line = format!("{:<10} {id} {next:020} {oldest:020}\n", std::process::id());
        self.file.write_all_at(line.as_bytes(), 0)
    }
}

/// The process that writes to a journal at this moment, as far as its lock tells; `None` if none
/// does.
pub fn owner(path: &Path) -> Option<String> {
    let mut file = File::open(beside(path, ".lock")).ok()?;
    // Shared, so that two who ask do not take each other for the owner. It is given back at once.
    if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
        return None;
    }
    let mut text = String::new();
    // The lock alone says that there is one.
    file.read_to_string(&mut text).ok();
    Some(text.split_whitespace().next().unwrap_or("unknown").to_owned())
}

/// A reader's end.
#[derive(Debug)]
pub struct Listener {
    /// `None` iff the system had no inotify instance left or there is no file to watch.
    inotify: Option<OwnedFd>,
}

impl Listener {
    /// Listens from now on; what rang before is not heard, so look at the journal after this.
    pub fn new(path: &Path) -> Listener {
        let watch = || {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&fd, beside(path, ".lock"), WatchFlags::MODIFY)?;
            Ok::<_, Errno>(fd)
        };
        Listener { inotify: watch().ok() }
    }

    /// Waits for the bell, at most `timeout`. It may return early with nothing new.
    pub fn wait(&self, timeout: Duration) {
        let Some(fd) = &self.inotify else {
            wait_for(&mut [], timeout.min(LOOK_EVERY));
            return;
        };
        wait_for(&mut [PollFd::new(fd, PollFlags::IN)], timeout);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(fd, &mut buffer);
        // Each event says the same, so all that are there are taken at once.
        while reader.next().is_ok() {}
    }
}

/// Waits until one of the descriptors is ready or the time is over.
fn wait_for(fds: &mut [PollFd<'_>], timeout: Duration) {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(fds, Some(&timeout)) {
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}
