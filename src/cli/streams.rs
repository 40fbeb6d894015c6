//! `ghostwatch streams`: what each stream is doing, as the journal tells it, and orders to the daemon.
//!
//! The table is read from the journal itself, so it answers whether a daemon runs or not. Orders need
//! one: see [`control`].

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    cli::{Exit, text::escape},
    config::{
        build::{ID, is_id},
        plan::Plan,
    },
    control::{self, Action, Answer},
    event::rfc3339,
    journal::{filter::Filter, read::Reader},
    source::{agree::differ, spec::MAX_CLOCK_OFFSET},
};

/// How to show, or what to do.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Show again every second.
    #[arg(long)]
    watch: bool,
    #[command(subcommand)]
    order: Option<Order>,
}

/// What the running daemon is to do to a stream.
#[derive(clap::Subcommand, Clone, Debug)]
enum Order {
    /// Close a stream and open it again, at once.
    Restart {
        /// Its id in the configuration.
        id: String,
    },
    /// Open a stream again that was disabled or quarantined.
    Enable {
        /// Its id in the configuration.
        id: String,
    },
    /// Close a stream until it is enabled again, also over restarts of the daemon.
    Disable {
        /// Its id in the configuration.
        id: String,
    },
}

/// Frames are counted over this long.
const WINDOW: Duration = Duration::from_secs(10);
/// At most so many of the last events are looked at: 10 s of 60 cameras at 30 fps.
const EVENTS: u64 = 18_000;
/// Events of one read transaction.
const PAGE: u32 = 512;

/// One line of the table.
#[derive(Debug, Default)]
struct Row {
    state: String,
    code: String,
    /// Code and time of the last failure in the window of events.
    failure: Option<(String, OffsetDateTime)>,
    flags: Vec<String>,
    /// By how many milliseconds the camera's clock is ahead. `None` iff that is not known, or no more
    /// than the configuration allows.
    wrong_clock_ms: Option<i64>,
    frames: u32,
    latency_us: u64,
    skipped: BTreeMap<String, u64>,
    label: String,
    /// The decoder and why it was chosen.
    decoder: String,
}

/// Prints the table, or gives an order. `insist`: the configuration was named, so the daemon with
/// its journal is meant, also at a socket that was named.
///
/// # Errors
/// The journal cannot be read, or the output not be written; or the daemon is not there, or refuses.
pub fn run(args: &Args, plan: &Plan, socket: Option<&Path>, insist: bool) -> anyhow::Result<()> {
    let journal = &*plan.journal.path;
    let (action, id) = match &args.order {
        None => return show(args, plan),
        Some(Order::Restart { id }) => (Action::Restart, id),
        Some(Order::Enable { id }) => (Action::Enable, id),
        Some(Order::Disable { id }) => (Action::Disable, id),
    };
    if !is_id(id) {
        return Err(Exit::wrong(format!("{:?} is no stream id: {ID}", escape(id))));
    }
    let places = socket.map_or_else(|| control::places(journal), |it| vec![it.to_owned()]);
    // A journal that only happens to lie in this folder says nothing of a socket that was named.
    let meant = (socket.is_none() || insist).then_some(journal);
    match control::order(&places, meant, action, id)? {
        Answer::Done(text) => writeln!(io::stdout(), "{}", escape(&text))?,
        Answer::Unknown(text) => return Err(Exit::wrong(escape(&text))),
        Answer::Refused(text) => return Err(Exit::failed(escape(&text))),
    }
    Ok(())
}

fn show(args: &Args, plan: &Plan) -> anyhow::Result<()> {
    let journal = &*plan.journal.path;
    let mut reader = Reader::open(journal)?;
    loop {
        let rows = rows(&mut reader, plan)?;
        let mut text = table(&rows);
        if args.watch && io::stdout().is_terminal() {
            text.insert_str(0, "\x1b[2J\x1b[H");
        }
        io::stdout().write_all(text.as_bytes())?;
        if !args.watch {
            return Ok(());
        }
        thread::sleep(Duration::from_secs(1));
        // A new one that is not ready yet is looked at the next time.
        if reader.is_replaced()
            && let Ok(new) = Reader::open(journal)
        {
            reader = new;
        }
    }
}

fn rows(reader: &mut Reader, plan: &Plan) -> anyhow::Result<BTreeMap<String, Row>> {
    let mut rows = BTreeMap::<String, Row>::new();
    for json in reader.last_states()? {
        let event: Value = serde_json::from_str(&json)?;
        let data = &event["data"];
        let row = rows.entry(text(&data["stream"])).or_default();
        row.state = text(&data["state"]);
        row.code = text(&data["code"]);
        let flags = data["flags"].as_array().into_iter().flatten();
        row.decoder = decoder(&data["decoder"]);
        row.flags = flags.map(|it| text(&it["name"])).collect();
    }
    rows.retain(|_, it| it.state != "removed");
    let since = rfc3339(SystemTime::now() - WINDOW);
    let mut cursor = reader.latest()?.saturating_sub(EVENTS);
    loop {
        let page = reader.page(cursor, &Filter::default(), PAGE)?;
        for record in &page.records {
            let event: Value = serde_json::from_str(&record.json)?;
            let data = &event["data"];
            if data["state"].is_string() {
                failure(&mut rows, data);
            } else {
                let planned = data["stream"].as_str().and_then(|it| plan.streams.get(it));
                let max = planned.map_or(MAX_CLOCK_OFFSET, |it| it.max_clock_offset);
                frame(&mut rows, data, &since, max);
            }
        }
        if page.cursor == cursor {
            return Ok(rows);
        }
        cursor = page.cursor;
    }
}

/// Remembers a state that is a failure. The daemon's own state names no stream.
fn failure(rows: &mut BTreeMap<String, Row>, data: &Value) {
    let Some(row) = rows.get_mut(data["stream"].as_str().unwrap_or_default()) else { return };
    let since = data["since"].as_str().and_then(|it| OffsetDateTime::parse(it, &Rfc3339).ok());
    if let (Some(code), Some(since)) = (data["code"].as_str(), since) {
        row.failure = Some((escape(code), since));
    }
}

/// `max_clock_offset`: that of the stream.
fn frame(rows: &mut BTreeMap<String, Row>, data: &Value, since: &str, max_clock_offset: Duration) {
    let Some(row) = rows.get_mut(data["stream"].as_str().unwrap_or_default()) else { return };
    let top = &data["top"][0];
    let confidence = top["confidence"].as_f64().unwrap_or_default();
    row.label = format!("{} {:.0} %", text(&top["label"]), confidence * 100.0);
    // A picture that was long on its way is dated by its arrival too, so the clock is looked at.
    let offset = data["clock_offset_ms"].as_i64().filter(|_| data["time_source"] == "arrival");
    let is_wrong = |ms: &i64| differ(ms.saturating_mul(1_000_000), max_clock_offset);
    row.wrong_clock_ms = offset.filter(is_wrong);
    // Both are RFC 3339 in UTC with as many digits, so they sort as text.
    if data["ingest_time"].as_str().is_none_or(|it| it < since) {
        return;
    }
    row.frames += 1;
    row.latency_us += data["latency_us"]["total"].as_u64().unwrap_or_default();
    for (reason, count) in data["skipped"].as_object().into_iter().flatten() {
        *row.skipped.entry(reason.clone()).or_default() += count.as_u64().unwrap_or_default();
    }
}

fn decoder(value: &Value) -> String {
    match (value["name"].as_str(), value["why"].as_str()) {
        (Some(name), Some(why)) => escape(&format!("{name} ({why})")),
        _ => String::new(),
    }
}

fn text(value: &Value) -> String {
    escape(value.as_str().unwrap_or_default())
}

/// The state with what goes with it: why it failed, or what is wrong with the pictures or the camera's
/// clock.
fn state(row: &Row) -> String {
    let code = Some(&row.code).filter(|it| !it.is_empty());
    let clock = row.wrong_clock_ms.filter(|_| row.state == "up");
    let clock = clock.map(|it| format!("clock {:+.1} s", it as f64 / 1000.0));
    let notes: Vec<_> =
        code.into_iter().chain(&row.flags).chain(&clock).map(String::as_str).collect();
    if notes.is_empty() {
        row.state.clone()
    } else {
        format!("{} ({})", row.state, notes.join(", "))
    }
}

fn table(rows: &BTreeMap<String, Row>) -> String {
    let mut lines = vec![
        [
            "STREAM",
            "STATE",
            "FPS",
            "LATENCY",
            "DROPPED IN 10 S",
            "LAST FAILURE",
            "LAST LABEL",
            "DECODER",
        ]
        .map(str::to_owned),
    ];
    let now = OffsetDateTime::now_utc();
    for (id, row) in rows {
        let mean_ms = row.latency_us as f64 / 1000.0 / f64::from(row.frames.max(1));
        let skipped: Vec<_> = row.skipped.iter().map(|it| format!("{} {}", it.0, it.1)).collect();
        lines.push([
            id.clone(),
            state(row),
            format!("{:.1}", f64::from(row.frames) / WINDOW.as_secs_f64()),
            if row.frames == 0 { "-".to_owned() } else { format!("{mean_ms:.1} ms") },
            if skipped.is_empty() { "-".to_owned() } else { skipped.join(", ") },
            row.failure.as_ref().map_or("-".to_owned(), |(code, since)| {
                format!("{code} {} s ago", (now - *since).whole_seconds().max(0))
            }),
            if row.label.is_empty() { "-".to_owned() } else { row.label.clone() },
            if row.decoder.is_empty() { "-".to_owned() } else { row.decoder.clone() },
        ]);
    }
    let width = |i: usize| lines.iter().map(|it| it[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..8).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<_> =
            line.iter().zip(&widths).map(|(it, width)| format!("{it:<width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_camera_whose_clock_is_not_followed_is_shown_with_how_far_it_is_off() {
        let within = |max, state: &str, source: &str, offset: Value, expected: &str| {
            let row = Row { state: state.to_owned(), ..Row::default() };
            let mut rows = BTreeMap::from([("front".to_owned(), row)]);
            let mut data = json!({"stream": "front", "time_source": source, "top": []});
            data["clock_offset_ms"] = offset;
            frame(&mut rows, &data, "", max);
            assert_eq!(super::state(&rows["front"]), expected);
        };
        let off = Duration::ZERO;
        within(off, "up", "arrival", json!(3_600_012), "up");
        let check = |state: &str, source: &str, offset: Value, expected: &str| {
            within(MAX_CLOCK_OFFSET, state, source, offset, expected);
        };
        check("up", "arrival", json!(1_500), "up");
        check("up", "arrival", json!(3_600_012), "up (clock +3600.0 s)");
        check("up", "arrival", json!(-2_200), "up (clock -2.2 s)");
        check("up", "arrival", Value::Null, "up");
        check("up", "rtcp", json!(1_500), "up");
        check("down", "arrival", json!(3_600_012), "down");
    }
}
