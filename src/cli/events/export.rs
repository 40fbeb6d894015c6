//! `events export`: a range of the journal as NDJSON.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context as _;
use clap::ValueEnum;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    cli::{
        Exit,
        events::{bar, number},
        tail::kind,
    },
    config::units,
    event::Kind,
    infer::weights::atomic::Atomic,
    journal::{
        self,
        filter::Filter,
        read::{Gap, Reader},
    },
};

/// Events looked at in one read transaction.
const PAGE: u64 = 512;

/// Which events, and where to.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The first event [default: earliest].
    #[arg(long, value_name = "SEQ|earliest", value_parser = from)]
    from: Option<From>,
    /// The last event [default: the last one that is there now].
    #[arg(long, value_name = "SEQ", value_parser = number)]
    to: Option<u64>,
    /// Only events of this stream; can be given more than once.
    #[arg(long = "stream", value_name = "S")]
    streams: Vec<String>,
    /// Only events of this type, such as io.ghostwatch.stream.state.v1 or just stream.state.
    #[arg(long = "type", value_name = "T", value_parser = kind)]
    kind: Option<Kind>,
    /// Only events appended at or after this time: RFC 3339, or so long ago, as in 90m or 2d.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<SystemTime>,
    /// Only events appended before this time.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<SystemTime>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Ndjson)]
    format: Format,
    /// Write to this file, which is replaced when all is written, instead of standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Where to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Earliest,
    At(u64),
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One JSON object per line.
    Ndjson,
}

fn from(text: &str) -> Result<From, String> {
    if text == "earliest" {
        return Ok(From::Earliest);
    }
    number(text).map(From::At).map_err(|_| "expected earliest or a sequence number".to_owned())
}

fn moment(text: &str) -> Result<SystemTime, String> {
    let ago = || SystemTime::now().checked_sub(units::duration(text)?);
    let time = OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from);
    time.or_else(ago).ok_or_else(|| {
        "expected a time such as 2026-11-24T01:55:12Z, or how long ago, such as 90m".to_owned()
    })
}

/// Writes the events, and a gap event where some are missing. A reader of standard output that has
/// gone is no error.
///
/// # Errors
/// The journal cannot be read, or the output not be written; then the file is as it was.
pub fn run(args: &Args, journal: &Path) -> anyhow::Result<()> {
    let mut reader = Reader::open(journal)?;
    let Some(path) = &args.output else {
        return export(args, &mut reader, BufWriter::new(io::stdout().lock()));
    };
    refuse(path, journal)?;
    let at = || format!("writing {}", path.display());
    let file = Atomic::create(path).with_context(at)?;
    export(args, &mut reader, BufWriter::new(file.file())).with_context(at)?;
    file.commit().with_context(at)
}

/// Whether the output would take the place of something that an export must not replace.
fn refuse(output: &Path, journal: &Path) -> anyhow::Result<()> {
    let shown = output.display();
    if journal::is_of(output, journal) {
        return Err(Exit::wrong(format!(
            "--output {shown} belongs to the journal that is exported; choose another name"
        )));
    }
    // A pipe or device would be replaced by a file of its name, not written to.
    if output.metadata().is_ok_and(|it| !it.is_file()) {
        return Err(Exit::wrong(format!(
            "--output {shown} is no regular file; leave --output out and redirect standard output \
             to it"
        )));
    }
    Ok(())
}

fn export(args: &Args, reader: &mut Reader, mut output: impl Write) -> anyhow::Result<()> {
    let filter = Filter { streams: args.streams.clone(), kind: args.kind, ..Filter::default() };
    let latest = reader.latest()?;
    let last = args.to.unwrap_or(latest).min(latest);
    let first = match args.from {
        // What expired before the oldest event was not asked for, so it is no gap.
        None | Some(From::Earliest) => reader.oldest()?,
        Some(From::At(it)) => it,
    };
    let bar = bar("exporting");
    bar.set_length((last + 1).saturating_sub(first));
    let mut cursor = first.saturating_sub(1);
    while cursor < last {
        let page = reader.page(cursor, &filter, PAGE.min(last - cursor) as u32)?;
        if page.cursor == cursor {
            break;
        }
        // What has expired may reach beyond the range.
        if let Some(it) = page.gap.filter(|it| it.first <= last) {
            let gap = Gap { last: it.last.min(last), ..it };
            let json = reader.gap_event(&gap).context("making a gap event")?;
            writeln!(output, "{json}")?;
        }
        for it in page.records.iter().filter(|it| it.seq <= last) {
            let early = args.since.is_some_and(|since| it.appended < since);
            let late = args.until.is_some_and(|until| until <= it.appended);
            if !early && !late {
                writeln!(output, "{}", it.json)?;
            }
        }
        cursor = page.cursor;
        bar.set_position((cursor + 1).saturating_sub(first));
    }
    bar.finish_and_clear();
    output.flush()?;
    Ok(())
}
