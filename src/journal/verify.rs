//! Looks for damage in all of a journal, while another process may be writing it.
//!
//! SQLite checks its own structure; then every event is read, page by page, and compared with its
//! checksum, its number and its neighbours. Damage is what storage has done to the journal. A break
//! in a stream's frame arithmetic is told too, but is no damage: then the daemon miscounted.

use std::{collections::BTreeMap, fmt, path::Path};

use rusqlite::{Row, params};
use serde_json::Value;

use crate::{
    event::{Kind, sequence},
    journal::{
        JournalError, layout,
        read::{self, Reader},
    },
};

/// Events read in one read transaction.
const PAGE: u64 = 512;
/// As much as SQLite tells of its structure.
const STRUCTURE_MAX: u32 = 100;

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// SQLite's quick check, and every event's checksum and number.
    Quick,
    /// SQLite's integrity check, and the content of every event as well.
    Full,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The events that it is about, both inclusive; `None` iff it is about none in particular.
    pub events: Option<(u64, u64)>,
    /// Whether something was damaged or is missing.
    pub damage: bool,
    /// What it is.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.events {
            Some((first, last)) if first == last => write!(f, "event {first}: {}", self.what),
            Some((first, last)) => write!(f, "events {first} to {last}: {}", self.what),
            None => write!(f, "{}", self.what),
        }
    }
}

/// What was looked at and how it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Events read.
    pub events: u64,
    /// Findings of damage.
    pub damage: u64,
    /// Other findings.
    pub notes: u64,
}

/// Looks at a journal and tells each finding. `told` hears how many of how many events are done.
///
/// # Errors
/// It cannot be read at all, so there are no findings.
pub fn verify(
    path: &Path,
    depth: Depth,
    mut told: impl FnMut(u64, u64),
    found: impl FnMut(Finding),
) -> Result<Verdict, JournalError> {
    let reader = Reader::open(path)?;
    let of = |it: rusqlite::Error| JournalError::of(path, &it);
    let mut report = Report { verdict: Verdict::default(), found };
    if layout(&reader.connection).map_err(of)? < 2 {
        report.note(None, "its layout has no checksums, so damage inside a text is not seen");
    }
    structure(&reader, depth, &mut report)?;
    reader.id()?;
    let (oldest, next) = reader.bounds()?;
    let mut walk = Walk { after: oldest - 1, unreadable: None, frames: Frames::default(), depth };
    while walk.after < next - 1 {
        walk.page(&reader, next - 1, &mut report)?;
        told(walk.after + 1 - oldest, next - oldest);
    }
    walk.tell_unreadable(&mut report);
    if reader.checksums {
        walk.frames.compare(&reader, &mut report).map_err(of)?;
    }
    Ok(report.verdict)
}

struct Report<F> {
    verdict: Verdict,
    found: F,
}

impl<F: FnMut(Finding)> Report<F> {
    fn damage(&mut self, events: Option<(u64, u64)>, what: impl Into<String>) {
        self.verdict.damage += 1;
        (self.found)(Finding { events, damage: true, what: what.into() });
    }

    fn note(&mut self, events: Option<(u64, u64)>, what: impl Into<String>) {
        self.verdict.notes += 1;
        (self.found)(Finding { events, damage: false, what: what.into() });
    }
}

/// What SQLite says of its own structure.
fn structure(
    reader: &Reader,
    depth: Depth,
    report: &mut Report<impl FnMut(Finding)>,
) -> Result<(), JournalError> {
    let name = if depth == Depth::Quick { "quick_check" } else { "integrity_check" };
    let mut lines = Vec::new();
    let mut ask = || -> rusqlite::Result<()> {
        let sql = format!("PRAGMA {name}({STRUCTURE_MAX})");
        let mut statement = reader.connection.prepare(&sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            lines.push(row.get::<_, String>(0)?);
        }
        Ok(())
    };
    let asked = ask();
    for line in lines.iter().filter(|it| *it != "ok") {
        report.damage(None, format!("structure: {line}"));
    }
    match asked.map_err(|it| JournalError::of(&reader.path, &it)) {
        Err(JournalError::Damaged { detail, .. }) => {
            report.damage(None, format!("structure: {detail}"));
            Ok(())
        }
        other => other,
    }
}

/// A way through all events.
struct Walk {
    /// The last event that was looked at.
    after: u64,
    /// Events just before that could not be read.
    unreadable: Option<(u64, u64)>,
    frames: Frames,
    depth: Depth,
}

impl Walk {
    /// Looks at the next page, or at the next event alone where a page cannot be read.
    fn page<F: FnMut(Finding)>(
        &mut self,
        reader: &Reader,
        last: u64,
        report: &mut Report<F>,
    ) -> Result<(), JournalError> {
        let before = self.after;
        let end = last.min(before + PAGE);
        let of = |it: rusqlite::Error| JournalError::of(&reader.path, &it);
        match self.events(reader, end, report).map_err(of) {
            Ok(()) => {}
            Err(JournalError::Damaged { .. }) if before < self.after => return Ok(()),
            Err(JournalError::Damaged { .. }) => {
                // Nothing of the page could be read: go on behind the first event.
                let seq = before + 1;
                self.unreadable = Some((self.unreadable.map_or(seq, |it| it.0), seq));
                self.after = seq;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        if self.after < end {
            self.missing(reader, end, report)?;
            self.after = end;
        }
        Ok(())
    }

    /// Looks at the events up to `end`.
    fn events<F: FnMut(Finding)>(
        &mut self,
        reader: &Reader,
        end: u64,
        report: &mut Report<F>,
    ) -> rusqlite::Result<()> {
        let crc = if reader.checksums { "crc" } else { "NULL" };
        let mut statement = reader.connection.prepare_cached(&format!(
            "SELECT seq, kind, stream, json, {crc} FROM event WHERE ?1 < seq AND seq <= ?2 ORDER BY seq"
        ))?;
        let mut rows = statement.query(params![self.after as i64, end as i64])?;
        while let Some(row) = rows.next()? {
            let seq = row.get::<_, i64>(0)? as u64;
            if self.after + 1 < seq {
                // Retention may have come past; a second look outside this transaction would not
                // tell of this one, and inside it what is missing here is missing.
                let oldest = "SELECT min(seq) FROM event";
                let oldest: i64 = reader.connection.query_row(oldest, [], |row| row.get(0))?;
                self.hole(seq - 1, oldest as u64, report);
            }
            self.tell_unreadable(report);
            self.event(row, seq, report)?;
            self.after = seq;
        }
        Ok(())
    }

    /// None of the events up to `end` is there.
    fn missing<F: FnMut(Finding)>(
        &mut self,
        reader: &Reader,
        end: u64,
        report: &mut Report<F>,
    ) -> Result<(), JournalError> {
        let oldest = reader.oldest()?;
        self.hole(end, oldest, report);
        Ok(())
    }

    fn hole<F: FnMut(Finding)>(&mut self, last: u64, oldest: u64, report: &mut Report<F>) {
        // What could be missing here could be a frame of any stream.
        self.frames.streams.clear();
        let first = (self.after + 1).max(oldest);
        if first <= last {
            report.damage(Some((first, last)), "missing from the sequence");
        }
    }

    fn tell_unreadable<F: FnMut(Finding)>(&mut self, report: &mut Report<F>) {
        if let Some(range) = self.unreadable.take() {
            report.damage(Some(range), "cannot be read, the page that holds them is damaged");
            self.frames.streams.clear();
        }
    }

    fn event<F: FnMut(Finding)>(
        &mut self,
        row: &Row<'_>,
        seq: u64,
        report: &mut Report<F>,
    ) -> rusqlite::Result<()> {
        report.verdict.events += 1;
        let at = Some((seq, seq));
        if let Some(what) = read::damage(row, seq)? {
            report.damage(at, what);
            self.frames.streams.clear();
            return Ok(());
        }
        if self.depth == Depth::Quick {
            return Ok(());
        }
        let (kind, stream): (i64, Option<String>) = (row.get(1)?, row.get(2)?);
        let json = row.get_ref(3)?.as_str().unwrap_or_default();
        let event: Value = match serde_json::from_str(json) {
            Ok(it) => it,
            Err(error) => {
                report.damage(at, format!("not JSON: {error}"));
                return Ok(());
            }
        };
        let mut said = |name, is: &Value, expected: Option<&str>| {
            if is.as_str() != expected {
                let expected = expected.unwrap_or("nothing");
                report.damage(at, format!("its {name} is {is} where its row says {expected}"));
            }
        };
        let number = sequence(seq);
        said("sequence", &event["sequence"], Some(&number));
        said("subject", &event["subject"], stream.as_deref());
        let kind = Kind::from_code(kind);
        if let Some(kind) = kind {
            said("type", &event["type"], Some(kind.name()));
        }
        let id = event["id"].as_str().unwrap_or_default();
        if id.split_once('-').is_none_or(|it| it.0.len() != 26 || it.1 != number) {
            let what = format!("its id {} does not end with its sequence {number}", event["id"]);
            report.damage(at, what);
        }
        if let (Some(kind), Some(stream)) = (kind, stream)
            && let Some(what) = self.frames.add(kind, &stream, &event["data"])
        {
            report.note(at, what);
        }
        Ok(())
    }
}

/// Where each stream's count of frames stands.
#[derive(Default)]
struct Frames {
    /// By stream and region: the epoch, and the number of the next frame in it.
    streams: BTreeMap<(String, String), (u64, u64)>,
    /// The last epoch of each stream.
    epochs: BTreeMap<String, u64>,
}

impl Frames {
    /// Follows one event. Gives what does not add up.
    fn add(&mut self, kind: Kind, stream: &str, data: &Value) -> Option<String> {
        let epoch = data["epoch"].as_u64()?;
        let last = self.epochs.insert(stream.to_owned(), epoch).unwrap_or(epoch);
        let fell = (epoch < last).then(|| format!("epoch {epoch} comes after epoch {last}"));
        let frame = data["frame"].as_u64()?;
        let skipped = data["skipped"].as_object();
        let skipped: u64 = skipped.into_iter().flatten().filter_map(|it| it.1.as_u64()).sum();
        // A state event ends the epoch: its `frame` is the last one, skipped or not.
        let ends = kind == Kind::StreamState;
        let regions: Vec<String> = match data["region"].as_str() {
            Some(it) => vec![it.to_owned()],
            None => {
                self.streams.keys().filter(|it| it.0 == stream).map(|it| it.1.clone()).collect()
            }
        };
        let mut wrong = fell;
        for region in regions {
            let key = (stream.to_owned(), region);
            // The first event that is there follows some that have expired.
            let known = self.streams.get(&key).copied();
            let next = known.map(|it| if it.0 == epoch { it.1 } else { 0 });
            let next_frame = frame + 1;
            let expected = next.map(|it| it + skipped + u64::from(!ends));
            if let Some(expected) = expected.filter(|it| *it != next_frame) {
                let before = next.unwrap_or_default();
                wrong.get_or_insert_with(|| format!(
                    "stream {stream}, epoch {epoch}: frame {frame} after {before} frames and {skipped} skipped, frame {} was due",
                    expected.saturating_sub(1)
                ));
            }
            self.streams.insert(key, (epoch, next_frame));
        }
        wrong
    }

    /// The journal's own note of the last epochs must not be behind.
    fn compare<F: FnMut(Finding)>(
        &self,
        reader: &Reader,
        report: &mut Report<F>,
    ) -> rusqlite::Result<()> {
        let mut statement = reader.connection.prepare("SELECT stream, epoch FROM epoch")?;
        let row = |row: &Row<'_>| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)? as u64));
        let noted: BTreeMap<String, u64> =
            statement.query_map([], row)?.collect::<rusqlite::Result<_>>()?;
        for (stream, epoch) in &self.epochs {
            let noted = noted.get(stream);
            if noted.is_none_or(|it| it < epoch) {
                let what = format!(
                    "stream {stream} has events of epoch {epoch}, the table of epochs says {}",
                    noted.map_or_else(|| "nothing".to_owned(), u64::to_string)
                );
                report.damage(None, what);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
