//! The handler of the deadly signals. What it calls takes no lock and no memory.
//!
//! Not the crate `crash-handler`: it puts itself before every `pthread_create` of the process, those of
//! libtorch and GStreamer too, for a case that is not met here: a crash by an overflown stack.

use std::{
    fs::File,
    io, mem, ptr,
    sync::{
        OnceLock,
        atomic::{AtomicI32, Ordering::SeqCst},
    },
    time::Duration,
};

use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP, c_int, c_void, siginfo_t};

const DEADLY: [(c_int, &str); 6] = [
    (SIGSEGV, "SIGSEGV"),
    (SIGBUS, "SIGBUS"),
    (SIGILL, "SIGILL"),
    (SIGFPE, "SIGFPE"),
    (SIGABRT, "SIGABRT"),
    // GLib ends by it after an error that it calls fatal.
    (SIGTRAP, "SIGTRAP"),
];

static FILE: OnceLock<File> = OnceLock::new();
/// One crash, one line: the first signal is the reason, and others may follow from it.
static FIRST: First = First::new();
/// What was done about each before.
static BEFORE: [OnceLock<libc::sigaction>; DEADLY.len()] =
    [const { OnceLock::new() }; DEADLY.len()];

/// What the first of several threads does, while the others wait: any of them would end the process
/// when it goes on, whether the line is written or not.
struct First(AtomicI32);

/// Nobody was here yet; any other value is the thread that is at it.
const NOBODY: i32 = 0;
/// It is done.
const DONE: i32 = -1;
/// A disk that takes longer to write a line would keep the process from ending.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one wait is. Only sleeping is left: a lock is nothing for a signal handler.
const PAUSE: Duration = Duration::from_millis(1);

impl First {
    const fn new() -> First {
        First(AtomicI32::new(NOBODY))
    }

    /// Does it if this is the first thread, and else waits until that is done. A thread that is at it
    /// itself, and met another signal in the middle, must not wait for itself.
    fn does(&self, thread: i32, it: impl FnOnce()) {
        match self.0.compare_exchange(NOBODY, thread, SeqCst, SeqCst) {
            Ok(_) => {
                it();
                self.0.store(DONE, SeqCst);
            }
            Err(other) => {
                let mut left = PATIENCE.as_millis() / PAUSE.as_millis();
                while other != thread && self.0.load(SeqCst) != DONE && 0 < left {
                    std::thread::sleep(PAUSE);
                    left -= 1;
                }
            }
        }
    }
}

/// Installs the handler; a second time does nothing.
pub(super) fn install(file: File) -> io::Result<()> {
    if FILE.set(file).is_err() {
        return Ok(());
    }
    for ((signal, _), before) in DEADLY.iter().zip(&BEFORE) {
        // SAFETY: all-zero is a valid `sigaction`: the default action, no flags, an empty mask.
        let (mut action, mut old) = unsafe { mem::zeroed::<(libc::sigaction, libc::sigaction)>() };
        action.sa_sigaction = handle as *const () as usize;
        // On the stack that the standard library gives its threads for this; others use their own.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both point to live structures, and the handler has the signature that SA_SIGINFO
        // asks for.
        if unsafe { libc::sigaction(*signal, &raw const action, &raw mut old) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Set once only, as the file is.
        before.set(old).ok();
    }
    Ok(())
}

extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    let at = DEADLY.iter().position(|it| it.0 == signal);
    if let (Some(at), Some(file)) = (at, FILE.get()) {
        FIRST.does(rustix::thread::gettid().as_raw_nonzero().get(), || {
            super::write(file, DEADLY[at].1);
        });
    }
    // SAFETY: with SA_SIGINFO the kernel hands over a valid structure.
    let sent = signal == SIGTRAP || unsafe { info.as_ref() }.is_none_or(|it| it.si_code <= 0);
    // A fault happens again once this returns, and meets what was there before: the standard library,
    // which says so if a stack has overflown. What was sent does not, nor does a trap: it is sent once
    // more.
    let before = at.and_then(|it| BEFORE[it].get()).filter(|_| !sent);
    // SAFETY: all-zero is the default action.
    let default = unsafe { mem::zeroed::<libc::sigaction>() };
    let action = ptr::from_ref(before.unwrap_or(&default));
    // SAFETY: `action` points to a live structure; both functions may be called by a handler.
    unsafe {
        libc::sigaction(signal, action, ptr::null_mut());
        if sent {
            libc::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{atomic::AtomicBool, mpsc},
        thread,
    };

    use super::*;

    #[test]
    fn of_two_threads_that_crash_at_once_the_second_waits_for_the_line_of_the_first() {
        let (first, written) = (First::new(), AtomicBool::new(false));
        let (begun_tx, begun) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                first.does(1, || {
                    begun_tx.send(()).unwrap();
                    // As long as a slow disk takes.
                    thread::sleep(Duration::from_millis(100));
                    written.store(true, SeqCst);
                });
            });
            begun.recv().unwrap();
            first.does(2, || panic!("a second line"));
            assert!(written.load(SeqCst), "it would have ended the process before");
        });
        first.does(3, || panic!("a third line"));
    }

    #[test]
    fn a_thread_that_crashes_while_it_writes_does_not_wait_for_itself() {
        let first = First::new();
        let mut again = false;
        let begun = std::time::Instant::now();
        first.does(1, || {
            first.does(1, || panic!("a second line"));
            again = true;
        });
        assert!(again && begun.elapsed() < PATIENCE);
    }
}
