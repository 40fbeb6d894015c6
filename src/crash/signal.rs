//! The handler of the deadly signals. What it calls takes no lock and no memory.
//!
//! Not the crate `crash-handler`: it puts itself before every `pthread_create` of the process, those of
//! libtorch and GStreamer too, for a case that is not met here: a crash by an overflown stack.

use std::{
    fs::File,
    io, mem, ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
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
static WRITTEN: AtomicBool = AtomicBool::new(false);
/// What was done about each before.
static BEFORE: [OnceLock<libc::sigaction>; DEADLY.len()] =
    [const { OnceLock::new() }; DEADLY.len()];

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
    if let (Some(at), Some(file)) = (at, FILE.get())
        && !WRITTEN.swap(true, SeqCst)
    {
        super::write(file, DEADLY[at].1);
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
