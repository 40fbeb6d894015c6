//! How many heaps glibc may make.

use std::{env, thread};

/// Bounds glibc's heaps to one per core.
///
/// It makes up to eight per core, and gives them out to threads in turn. Each connection of a stream has
/// new threads, so a camera that comes and goes leaves a little in all of them, and none is ever given
/// back: 500 reconnects of ten cameras cost 5.6 MiB in their second half with the default of 16 heaps,
/// and nothing with two. What an operator says in `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` counts instead. To
/// be called before the first thread starts.
pub fn bound() {
    let tunables = env::var("GLIBC_TUNABLES").unwrap_or_default();
    if env::var_os("MALLOC_ARENA_MAX").is_some() || tunables.contains("arena_max") {
        return;
    }
    let cores = thread::available_parallelism().map_or(1, |it| it.get());
    // SAFETY: takes two numbers. One that it does not like it ignores.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, i32::try_from(cores).unwrap_or(i32::MAX)) };
}
