//! Where events go besides the journal: readers of it, each with its own cursor.

pub mod broker;
pub mod file;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod mqtt;
pub mod tls;

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::text::{self, Clock},
    journal::{
        filter::Filter,
        read::{Reader, Record},
    },
    sink::file::{RotatingFile, Rotation},
};

/// Events looked at in one read transaction.
const PAGE: u32 = 512;
/// How soon a stop is seen.
const WAIT: Duration = Duration::from_millis(200);

/// What a sink writes to.
pub enum Target {
    /// Lines for people on standard output.
    Text(Clock),
    /// NDJSON on standard output.
    Stdout,
    /// NDJSON in a file that is moved aside when it has grown.
    File(PathBuf, Rotation),
}

/// Writes every event after `cursor` until `stop`; what was committed before the stop is still
/// written.
///
/// # Errors
/// The journal cannot be read, or the target cannot be written.
pub fn run(
    journal: &Path,
    mut cursor: u64,
    target: &Target,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut reader = Reader::open(journal)?;
    let mut file = match target {
        Target::File(path, rotation) => {
            let open = RotatingFile::open(path, *rotation);
            Some(open.with_context(|| format!("opening {}", path.display()))?)
        }
        Target::Text(_) | Target::Stdout => None,
    };
    let filter = Filter::default();
    loop {
        // Asked before the look, so that the last look is after the stop.
        let last = stop.is_cancelled();
        let page = reader.page(cursor, &filter, PAGE)?;
        cursor = page.cursor;
        match &mut file {
            Some(file) => {
                for record in &page.records {
                    file.write_line(&record.json)?;
                }
                file.flush()?;
            }
            None => print(&page.records, target)?,
        }
        if page.records.is_empty() {
            if last {
                return Ok(());
            }
            reader.wait(WAIT);
        }
    }
}

fn print(records: &[Record], target: &Target) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for record in records {
        match target {
            Target::Text(clock) => writeln!(out, "{}", text::event(&record.json, *clock))?,
            Target::Stdout | Target::File(..) => writeln!(out, "{}", record.json)?,
        }
    }
    out.flush()
}
