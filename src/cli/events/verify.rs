//! `events verify`: looks for damage.

use std::{
    io::{self, Write},
    path::Path,
};

use crate::{
    cli::{Exit, events::bar, text},
    journal::verify::{Depth, verify},
};

/// As many findings are printed; the rest are counted.
const PRINTED_MAX: u64 = 1000;

/// How closely to look.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Leave out the content of the events and SQLite's check of its indexes; checksums and numbers
    /// are looked at all the same.
    #[arg(long)]
    quick: bool,
}

/// Prints each finding, then how the journal is.
///
/// # Errors
/// It is damaged (exit code 4), or cannot be read.
pub fn run(args: &Args, journal: &Path) -> anyhow::Result<()> {
    let bar = bar("verifying");
    let (mut count, mut failed) = (0, None);
    let depth = if args.quick { Depth::Quick } else { Depth::Full };
    let told = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let verdict = verify(journal, depth, told, |it| {
        count += 1;
        let what = text::escape(&it.to_string());
        let sort = if it.damage { "damage" } else { "note" };
        if count <= PRINTED_MAX && failed.is_none() {
            failed = bar.suspend(|| writeln!(io::stdout(), "{sort}: {what}")).err();
        }
    });
    bar.finish_and_clear();
    let verdict = verdict?;
    if PRINTED_MAX < count {
        eprintln!("ghostwatch: {} more findings are not shown", count - PRINTED_MAX);
    }
    if 0 < verdict.damage {
        return Err(Exit::journal(format!(
            "journal {} is damaged: {} findings in {} events; what is good can be had with `events export`",
            journal.display(),
            verdict.damage,
            verdict.events
        )));
    }
    if let Some(it) = failed {
        return Err(it.into());
    }
    let notes = match verdict.notes {
        0 => String::new(),
        it => format!(", {it} notes"),
    };
    writeln!(io::stdout(), "{}: {} events are good{notes}", journal.display(), verdict.events)?;
    Ok(())
}
