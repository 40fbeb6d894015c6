//! `tail`: events from the journal, old and new, as lines for people or as NDJSON.
//!
//! It reads the journal itself; the daemon may be writing to it at the same time.

use std::{
    io::{self, BufWriter, Write},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::{
    cli::text::{self, Clock},
    event::Kind,
    journal::{
        JournalError,
        filter::Filter,
        read::{Page, Reader},
    },
};

/// Events looked at in one read transaction.
const PAGE: u32 = 512;
/// The journal is looked at this often even if the writer's bell was not heard.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What to show and how.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where to start: the oldest event, only new ones, after an event's sequence number, or with
    /// the last N that pass the filters [default: -10, with --follow latest]
    #[arg(long, value_name = "earliest|latest|SEQ|-N", allow_hyphen_values = true, value_parser = From::parse)]
    pub from: Option<From>,
    /// Go on with new events as they come
    #[arg(long, short)]
    pub follow: bool,
    /// Only events of this stream; can be given more than once
    #[arg(long = "stream", value_name = "S")]
    pub streams: Vec<String>,
    /// Only frames whose best label is this name or WordNet id
    #[arg(long, value_name = "L")]
    pub label: Option<String>,
    /// Only frames whose best label has at least this confidence, 0 to 1
    #[arg(long, value_name = "P", value_parser = confidence)]
    pub min_confidence: Option<f32>,
    /// Only events of this type, such as io.ghostwatch.stream.state.v1 or just stream.state
    #[arg(long = "type", value_name = "T", value_parser = kind)]
    pub kind: Option<Kind>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Show times in UTC instead of local time
    #[arg(long)]
    pub utc: bool,
}

/// Where to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// With the oldest event that is there.
    Earliest,
    /// With what comes from now on.
    Latest,
    /// After the event with this sequence number.
    After(u64),
    /// With the last so many.
    Last(u64),
}

impl From {
    fn parse(text: &str) -> Result<From, String> {
        let number = |it: &str| it.parse::<u64>().ok().filter(|_| !it.starts_with('+'));
        match (text, text.strip_prefix('-')) {
            ("earliest", _) => Some(From::Earliest),
            ("latest", _) => Some(From::Latest),
            (_, Some(count)) => number(count).map(From::Last),
            _ => number(text).map(From::After),
        }
        .ok_or_else(|| "expected earliest, latest, a sequence number or -N".to_owned())
    }
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A line for people.
    Text,
    /// The event itself, one JSON object per line.
    Ndjson,
}

fn confidence(text: &str) -> Result<f32, String> {
    let it = text.parse().ok().filter(|it| (0.0..=1.0).contains(it));
    it.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

pub(crate) fn kind(text: &str) -> Result<Kind, String> {
    Kind::from_name(text).ok_or_else(|| {
        let names: Vec<_> = Kind::ALL.into_iter().map(Kind::name).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// Prints what the arguments ask for to standard output. Ends quietly when the reader of the
/// output has gone.
///
/// # Errors
/// The journal cannot be read (a `JournalError` is in the chain), or the output not be written.
pub fn run(args: &Args, journal: &Path) -> anyhow::Result<()> {
    let mut reader = Reader::open(journal)?;
    let output = BufWriter::new(io::stdout().lock());
    match print(args, &mut reader, output) {
        Err(error) if gone(&error) => Ok(()),
        it => it,
    }
}

fn gone(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|it| it.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints what the arguments ask for, and with `follow` goes on until writing fails.
///
/// # Errors
/// As [`run`], and also when the reader of the output has gone.
pub fn print(args: &Args, reader: &mut Reader, mut output: impl Write) -> anyhow::Result<()> {
    let filter = Filter {
        streams: args.streams.clone(),
        label: args.label.clone(),
        min_confidence: args.min_confidence,
        kind: args.kind,
    };
    let from = args.from.unwrap_or(if args.follow { From::Latest } else { From::Last(10) });
    let mut cursor = match from {
        // What expired before the oldest event was not asked for, so it is no gap.
        From::Earliest => reader.oldest()?.saturating_sub(1),
        From::Latest => reader.latest()?,
        From::After(it) => it,
        From::Last(count) => reader.back(count, &filter)?,
    };
    let clock = if args.utc { Clock::Utc } else { Clock::Local };
    let mut at_begin = false;
    loop {
        let page = match at_begin {
            true => begin(reader, cursor, &filter),
            false => reader.page(cursor, &filter, PAGE),
        };
        let page = match page {
            // It may be that one because of which it was moved away.
            Err(error) if !(args.follow && reader.is_replaced()) => return Err(error.into()),
            it => it.unwrap_or(Page { cursor, ..Page::default() }),
        };
        if let Some(it) = page.gap {
            let json = reader.gap_event(&it).context("making a gap event")?;
            line(&mut output, args.format, &json, clock)?;
        }
        for record in &page.records {
            line(&mut output, args.format, &record.json, clock)?;
        }
        let more = cursor != page.cursor;
        cursor = page.cursor;
        if more {
            at_begin = false;
            continue;
        }
        output.flush()?;
        if !args.follow {
            return Ok(());
        }
        if let Some((new, before)) = replacement(reader)? {
            (*reader, cursor, at_begin) = (new, before.unwrap_or(cursor), before.is_some());
        }
        reader.wait(LOOK_EVERY);
    }
}

/// The first event of a journal that took the place of another: a gap event that tells what is gone
/// with that one passes every filter, as the gaps do that are found while reading.
fn begin(reader: &mut Reader, cursor: u64, filter: &Filter) -> Result<Page, JournalError> {
    let mut page = reader.page(cursor, &Filter::default(), 1)?;
    page.records.retain(|it| {
        it.kind == Some(Kind::JournalGap) || filter.matches(it.kind, it.stream.as_deref(), &it.json)
    });
    Ok(page)
}

/// The journal that took the place of the one that is read, if one did, and the cursor before its
/// first event; `None` if it is the same one in another file.
fn replacement(reader: &Reader) -> anyhow::Result<Option<(Reader, Option<u64>)>> {
    if !reader.is_replaced() {
        return Ok(None);
    }
    let new = match Reader::open(reader.path()) {
        Err(error) if matches!(error, JournalError::Missing { .. }) || error.is_temporary() => {
            return Ok(None);
        }
        other => other?,
    };
    // Without an id it is being made at this moment.
    let Ok(id) = new.id() else { return Ok(None) };
    // The one that was moved away may not be readable any more.
    let is_same = reader.id().is_ok_and(|it| it == id);
    let before = if is_same { None } else { Some(new.begin()? - 1) };
    Ok(Some((new, before)))
}

fn line(output: &mut impl Write, format: Format, json: &str, clock: Clock) -> io::Result<()> {
    match format {
        Format::Ndjson => writeln!(output, "{json}"),
        Format::Text => writeln!(output, "{}", text::event(json, clock)),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;
    use crate::{
        event::Event,
        journal::{retain::Retain, writer::Writer},
    };

    fn parse(line: &str) -> Result<Args, clap::Error> {
        let words = std::iter::once("tail").chain(line.split_whitespace());
        let matches = Args::augment_args(clap::Command::new("tail")).try_get_matches_from(words)?;
        Args::from_arg_matches(&matches)
    }

    #[test]
    fn every_start_can_be_said_and_nothing_else() {
        let from = |it: &str| parse(&format!("--from {it}")).ok().and_then(|it| it.from);
        assert_eq!(from("earliest"), Some(From::Earliest));
        assert_eq!(from("latest"), Some(From::Latest));
        assert_eq!(from("42"), Some(From::After(42)));
        assert_eq!(from("00000000000000000042"), Some(From::After(42)), "as in the event");
        assert_eq!(from("-5"), Some(From::Last(5)));
        for it in ["", "-", "x", "-x", "1.5", "+1", "-+1"] {
            assert_eq!(from(it), None, "{it}");
        }
        assert!(parse("--min-confidence 1.1").is_err());
        assert!(parse("--min-confidence nan").is_err());
        assert!(parse("--type frame").is_err());
        let all = parse("--stream a --stream b --type stream.state --format ndjson --utc -f");
        assert_eq!(all.unwrap().streams, ["a", "b"]);
    }

    #[test]
    fn it_prints_what_was_asked_for_and_names_what_has_expired() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let mut writer = Writer::open(&path, Retain::default()).unwrap();
        let started = crate::event::DaemonState::Started;
        let mut append = |count| {
            writer.append(&mut vec![Event::daemon("t", started, None); count]).unwrap();
        };
        append(20);
        let sequences = |line: &str| {
            let args = parse(&format!("--format ndjson {line}")).unwrap();
            let mut output = Vec::new();
            print(&args, &mut Reader::open(&path).unwrap(), &mut output).unwrap();
            let event = |it: &str| serde_json::from_str::<serde_json::Value>(it).unwrap();
            let text = String::from_utf8(output).unwrap();
            let number = |it: &serde_json::Value| it.as_str().unwrap().parse::<u64>().unwrap();
            text.lines().map(|it| number(&event(it)["sequence"])).collect::<Vec<_>>()
        };
        assert_eq!(sequences(""), Vec::from_iter(11..=20));
        assert_eq!(sequences("--from earliest"), Vec::from_iter(1..=20));
        assert_eq!(sequences("--from latest"), [0u64; 0]);
        assert_eq!(sequences("--from 18"), [19, 20]);
        assert_eq!(sequences("--from -3 --type daemon"), [18, 19, 20]);
        assert_eq!(sequences("--from earliest --stream front"), [0u64; 0]);
        writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
        while writer.maintain().unwrap() {}
        writer.set_retain(Retain::default());
        writer.append(&mut vec![Event::daemon("t", started, None)]).unwrap();
        assert_eq!(sequences("--from 5"), [20, 21], "a gap event, then what is there");
        assert_eq!(sequences("--from earliest"), [21]);
    }

    /// Sends what is flushed; fails once nobody receives it any more.
    struct Lines(std::sync::mpsc::SyncSender<String>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8(bytes.to_owned()).expect("whole lines");
            self.0.send(text).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.send(String::new()).map_err(|_| io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn following_goes_on_with_a_new_journal_and_tells_what_is_gone_with_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let mut writer = Writer::open(&path, Retain::default()).unwrap();
        let old = writer.id().to_owned();
        let started = || Event::daemon("t", crate::event::DaemonState::Started, None);
        writer.append(&mut vec![started(); 3]).unwrap();
        let (lines_tx, lines_rx) = std::sync::mpsc::sync_channel(1000);
        let mut reader = Reader::open(&path).unwrap();
        let follow = move || {
            let args = parse("--follow --from 1 --type daemon --format ndjson").unwrap();
            print(&args, &mut reader, BufWriter::new(Lines(lines_tx)))
        };
        let following = std::thread::Builder::new().name("tail".into()).spawn(follow).unwrap();
        let mut got = String::new();
        let mut wait_for = |count: usize| {
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while got.lines().count() < count {
                assert!(std::time::Instant::now() < deadline, "it is silent after {got}");
                got += &lines_rx.recv_timeout(Duration::from_secs(20)).expect("it has not ended");
            }
            got.clone()
        };
        wait_for(2);
        drop(writer);
        for it in ["", "-wal", "-shm"] {
            let name = |base: &Path| format!("{}{it}", base.display());
            std::fs::rename(name(&path), name(&folder.path().join("away"))).ok();
        }
        let mut writer = Writer::open(&path, Retain::default()).unwrap();
        let loss = writer.take_loss().expect("its lock file tells of it");
        writer.append(&mut vec![loss.event("t"), started(), started()]).unwrap();
        let text = wait_for(5);
        drop(lines_rx);
        let ended = following.join().expect("it does not panic");
        assert!(ended.is_err_and(|it| gone(&it)));
        let events: Vec<serde_json::Value> =
            text.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
        let told = |at: usize| {
            let (id, sequence) = (&events[at]["id"], &events[at]["sequence"]);
            let journal = id.as_str().unwrap().split('-').next().unwrap().to_owned();
            (journal, sequence.as_str().unwrap().parse::<u64>().unwrap())
        };
        let new = writer.id().to_owned();
        let all: Vec<_> = (0..events.len()).map(told).collect();
        let expected = [(&old, 2), (&old, 3), (&new, 1), (&new, 2), (&new, 3)];
        assert_eq!(all, expected.map(|it| (it.0.clone(), it.1)));
        assert_eq!(events[2]["data"]["journal"], *old, "the gap passes the filter");
    }
}
