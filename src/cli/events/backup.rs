//! `events backup`: a consistent copy.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    cli::{Exit, events::bar},
    journal::backup::{self, BackupError},
};

/// Where to.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The copy. It appears whole and verified, or not at all. Put to use as a journal it takes a
    /// new id before its first event. While it is made the daemon goes on, and the write-ahead log
    /// grows by what is written meanwhile.
    file: PathBuf,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
}

/// Copies the journal and says how the copy is.
///
/// # Errors
/// The journal is damaged (exit code 4), something is in the way (2), or the copy cannot be written.
pub fn run(args: &Args, journal: &Path) -> anyhow::Result<()> {
    let bar = bar("copying pages");
    let done = backup::backup(journal, &args.file, args.force, |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let verdict = done.map_err(|it| match it {
        BackupError::Exists { .. } | BackupError::InUse { .. } => Exit::wrong(it.to_string()),
        BackupError::Damaged { .. } => Exit::journal(it.to_string()),
        BackupError::Journal(it) => it.into(),
        BackupError::Write { .. } => it.into(),
    })?;
    let (file, events) = (args.file.display(), verdict.events);
    writeln!(io::stdout(), "{file}: {events} events, verified")?;
    Ok(())
}
