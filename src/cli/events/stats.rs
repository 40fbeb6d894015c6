//! `events stats`: what is in the journal.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    time::SystemTime,
};

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::{
    cli::{
        events::bar,
        text::{self, Clock},
    },
    config::units::show_size,
    event::rfc3339,
    journal::{
        read::Reader,
        summary::{Summary, Tally, summary},
    },
};

/// How to say it.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Count kinds and streams among so many of the newest events; 0 for none. All other figures
    /// are found without reading the events.
    #[arg(long, value_name = "N", default_value_t = 500_000)]
    count: u64,
    /// Show times in UTC instead of local time.
    #[arg(long)]
    utc: bool,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table for people.
    Text,
    /// One JSON object.
    Json,
}

/// Prints what is in the journal.
///
/// # Errors
/// The journal cannot be read, or the output not be written.
pub fn run(args: &Args, journal: &Path) -> anyhow::Result<()> {
    let reader = Reader::open(journal)?;
    let bar = bar("counting");
    let it = summary(&reader, args.count, |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let it = it?;
    let clock = if args.utc { Clock::Utc } else { Clock::Local };
    let shown = match args.format {
        Format::Text => table(&it, &journal.display().to_string(), clock),
        Format::Json => format!("{}\n", object(&it, &journal.display().to_string())),
    };
    io::stdout().lock().write_all(shown.as_bytes())?;
    Ok(())
}

fn table(it: &Summary, path: &str, clock: Clock) -> String {
    let time = |it: SystemTime| text::time(&rfc3339(it), clock);
    let mut lines = vec![
        format!("journal   {}", text::escape(path)),
        format!("id        {}, layout {}", it.id, it.layout),
        match it.next - it.oldest {
            0 => format!("events    none; the next gets sequence number {}", it.next),
            count => format!("events    {count}, from {} to {}", it.oldest, it.next - 1),
        },
    ];
    if let Some((oldest, newest)) = it.appended {
        lines.push(format!("appended  {} to {}", time(oldest), time(newest)));
    }
    lines.push(format!(
        "rate      {:.1}/s over the last minute, {:.1}/s over the last hour",
        it.last_minute as f64 / 60.0,
        it.last_hour as f64 / 3600.0
    ));
    lines.push(format!(
        "size      {} ({} of it free for new events), and a log of {}",
        show_size(it.file_bytes),
        show_size(it.free_bytes),
        show_size(it.log_bytes)
    ));
    let part = if it.counted_from == it.oldest {
        String::new()
    } else {
        format!(" (from {} on)", it.counted_from)
    };
    tallies(&mut lines, &format!("type{part}"), &it.kinds);
    tallies(&mut lines, &format!("stream{part}"), &it.streams);
    if !it.sinks.is_empty() {
        lines.push(format!("\n{:<40} {:>12} {:>12}", "sink", "delivered to", "behind"));
    }
    for sink in &it.sinks {
        let name = text::escape(&sink.sink);
        lines.push(format!("{name:<40} {:>12} {:>12}", sink.cursor, sink.lag));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn tallies(lines: &mut Vec<String>, title: &str, tallies: &BTreeMap<String, Tally>) {
    if tallies.is_empty() {
        return;
    }
    lines.push(format!("\n{title:<40} {:>12} {:>12} {:>12}", "events", "first", "last"));
    for (name, it) in tallies {
        let name = text::escape(name);
        lines.push(format!("{name:<40} {:>12} {:>12} {:>12}", it.count, it.first, it.last));
    }
}

fn object(it: &Summary, path: &str) -> Value {
    let tallies = |all: &BTreeMap<String, Tally>| -> Value {
        let one = |(name, it): (&String, &Tally)| {
            (name.clone(), json!({"events": it.count, "first": it.first, "last": it.last}))
        };
        Value::Object(all.iter().map(one).collect())
    };
    let sink = |it: &crate::journal::summary::Place| {
        (it.sink.clone(), json!({"cursor": it.cursor, "lag": it.lag}))
    };
    json!({
        "journal": path,
        "id": it.id,
        "layout": it.layout,
        "events": it.next - it.oldest,
        "oldest_sequence": it.oldest,
        "next_sequence": it.next,
        "oldest_appended": it.appended.map(|it| rfc3339(it.0)),
        "newest_appended": it.appended.map(|it| rfc3339(it.1)),
        "events_last_minute": it.last_minute,
        "events_last_hour": it.last_hour,
        "file_bytes": it.file_bytes,
        "free_bytes": it.free_bytes,
        "log_bytes": it.log_bytes,
        "counted_from": it.counted_from,
        "types": tallies(&it.kinds),
        "streams": tallies(&it.streams),
        "sinks": Value::Object(it.sinks.iter().map(sink).collect()),
    })
}
