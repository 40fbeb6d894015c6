//! How much of the past a journal keeps.

use std::time::Duration;

/// How much the journal keeps. The oldest events go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retain {
    /// At most about this many bytes in the file, if given.
    pub bytes: Option<u64>,
    /// Nothing older than this, if given.
    pub age: Option<Duration>,
    /// This many bytes of the file system stay free for others.
    pub keep_free: u64,
}
