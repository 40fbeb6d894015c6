//! `ghostwatch events`: look at the journal, copy from it and send from it again.
//!
//! All of them open the journal themselves and only read it, so the daemon may be writing to it at
//! the same time.

pub mod backup;
pub mod export;
pub mod replay;
pub mod stats;
pub mod verify;

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::journal_path;

/// What to do with the journal.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The journal, instead of the one that the configuration names; a backup of one, for example.
    #[arg(long, global = true, value_name = "FILE")]
    journal: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Say what is in the journal: numbers, rates, kinds, streams, sinks.
    Stats(stats::Args),
    /// Print a range of events, one JSON object per line.
    Export(export::Args),
    // Its description is longer, and stands there.
    Replay(replay::Args),
    /// Look for damage in all of the journal. Exits with 4 if there is some.
    Verify(verify::Args),
    /// Copy the journal while the daemon runs, and verify the copy.
    Backup(backup::Args),
}

/// Runs the subcommand.
///
/// # Errors
/// Each subcommand's; a journal that is damaged is an `Exit` or a `JournalError` with code 4.
pub fn run(args: &Args, config: Option<&Path>) -> anyhow::Result<()> {
    let journal = || args.journal.clone().map_or_else(|| journal_path(config), Ok);
    match &args.command {
        Command::Stats(it) => stats::run(it, &journal()?),
        Command::Export(it) => export::run(it, &journal()?),
        Command::Replay(it) => replay::run(it, args.journal.as_deref(), config),
        Command::Verify(it) => verify::run(it, &journal()?),
        Command::Backup(it) => backup::run(it, &journal()?),
    }
}

/// A progress bar on standard error, if that is a terminal.
fn bar(what: &'static str) -> ProgressBar {
    let style = "{msg} {human_pos}/{human_len} {wide_bar} {eta}";
    let style = ProgressStyle::with_template(style).expect("the template is well formed");
    ProgressBar::no_length().with_style(style).with_message(what)
}

/// A sequence number as events write it, with or without the zeros before it.
fn number(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|_| !text.starts_with('+'));
    number.ok_or_else(|| "expected a sequence number".to_owned())
}
