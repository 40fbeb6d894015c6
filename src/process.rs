//! What the process asks of glibc: how many heaps it may make, and how it ends.

use std::{
    env,
    io::{self, Write as _},
    thread,
};

/// Bounds glibc's heaps to one per core.
///
/// It makes up to eight per core, and gives them out to threads in turn. Each connection of a stream has
/// new threads, so a camera that comes and goes leaves a little in all of them, and none is ever given
/// back: 500 reconnects of ten cameras cost 5.6 MiB in their second half with the default of 16 heaps,
/// and nothing with two. What an operator says in `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` counts instead. To
/// be called before the first thread starts.
pub fn bound_heaps() {
    let tunables = env::var("GLIBC_TUNABLES").unwrap_or_default();
    if env::var_os("MALLOC_ARENA_MAX").is_some() || tunables.contains("arena_max") {
        return;
    }
    let cores = thread::available_parallelism().map_or(1, |it| it.get());
    // SAFETY: takes two numbers. One that it does not like it ignores.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, i32::try_from(cores).unwrap_or(i32::MAX)) };
}

/// Ends the process, once what was printed is out.
///
/// Without the farewell of `exit`, which takes libraries apart that threads may still use: a lane whose
/// drain took too long computed with kernels of oneDNN that were gone, and the exit code was that of
/// SIGSEGV. All that must last is on disk before.
pub fn end(code: u8) -> ! {
    // Nobody reads it any more if this fails.
    io::stdout().flush().ok();
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(i32::from(code)) }
}
