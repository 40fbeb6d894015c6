//! What is in a journal, counted, while another process may be writing it.
//!
//! Sequence numbers are contiguous, so the number of events and the rates cost a few look-ups, however
//! large the journal is. Only the counts by kind and stream have to read events, and only as many
//! of the newest as the caller allows.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, SystemTime},
};

use rusqlite::{OptionalExtension, params};

use crate::{
    event::Kind,
    journal::{JournalError, beside, layout, pragma, read::Reader, writer::micros_now},
};

/// Events read in one read transaction.
const PAGE: u64 = 4096;

/// How many events of a sort there are, and between which sequence numbers they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub count: u64,
    /// The first one's sequence number.
    pub first: u64,
    /// The last one's.
    pub last: u64,
}

/// How far a sink has come, as the journal has noted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sink's name.
    pub sink: String,
    /// The last event that it has delivered.
    pub cursor: u64,
    /// Events after that.
    pub lag: u64,
}

/// What is in a journal.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The journal's id.
    pub id: String,
    /// Its layout.
    pub layout: u64,
    /// The oldest sequence number that is there; that of the next event if none is.
    pub oldest: u64,
    /// The sequence number that the next event gets.
    pub next: u64,
    /// Bytes of the database file.
    pub file_bytes: u64,
    /// Bytes of the write-ahead log beside it.
    pub log_bytes: u64,
    /// Bytes of pages in the file that are free for new events.
    pub free_bytes: u64,
    /// When the oldest and the newest event were appended; `None` iff there is none.
    pub appended: Option<(SystemTime, SystemTime)>,
    /// Events appended in the last minute.
    pub last_minute: u64,
    /// Events appended in the last hour.
    pub last_hour: u64,
    /// The first sequence number that `kinds` and `streams` count.
    pub counted_from: u64,
    /// By type.
    pub kinds: BTreeMap<String, Tally>,
    /// By stream.
    pub streams: BTreeMap<String, Tally>,
    /// Of each sink that ever registered.
    pub sinks: Vec<Place>,
}

/// Counts what is in a journal: kinds and streams among its newest `most` events. Reports how many
/// of how many have been read.
///
/// # Errors
/// A [`JournalError`] if it cannot be read.
pub fn summary(
    reader: &Reader,
    most: u64,
    mut told: impl FnMut(u64, u64),
) -> Result<Summary, JournalError> {
    let (oldest, next) = reader.bounds()?;
    let id = reader.id()?;
    let bytes = |suffix| fs::metadata(beside(&reader.path, suffix)).map_or(0, |it| it.len());
    let of = |it: rusqlite::Error| JournalError::of(&reader.path, &it);
    let connection = &reader.connection;
    let counted_from = oldest.max(next.saturating_sub(most));
    let mut summary = Summary {
        id,
        layout: layout(connection).map_err(of)? as u64,
        oldest,
        next,
        file_bytes: bytes(""),
        log_bytes: bytes("-wal"),
        free_bytes: pragma(connection, "freelist_count").map_err(of)?
            * pragma(connection, "page_size").map_err(of)?,
        appended: ends(reader, oldest, next).map_err(of)?,
        last_minute: next - since(reader, oldest, next, Duration::from_secs(60)).map_err(of)?,
        last_hour: next - since(reader, oldest, next, Duration::from_secs(3600)).map_err(of)?,
        counted_from,
        kinds: BTreeMap::new(),
        streams: BTreeMap::new(),
        sinks: if reader.checksums { places(reader, next).map_err(of)? } else { Vec::new() },
    };
    let mut at = counted_from;
    while at < next {
        let end = next.min(at + PAGE);
        count(reader, at, end, &mut summary).map_err(of)?;
        at = end;
        told(at - counted_from, next - counted_from);
    }
    Ok(summary)
}

/// Counts the events in `from..end`.
fn count(reader: &Reader, from: u64, end: u64, summary: &mut Summary) -> rusqlite::Result<()> {
    let sql = "SELECT seq, kind, stream FROM event WHERE ?1 <= seq AND seq < ?2 ORDER BY seq";
    let mut statement = reader.connection.prepare_cached(sql)?;
    let mut rows = statement.query(params![from as i64, end as i64])?;
    while let Some(row) = rows.next()? {
        let (seq, kind): (i64, i64) = (row.get(0)?, row.get(1)?);
        let name = match Kind::from_code(kind) {
            Some(it) => it.name().to_owned(),
            None => format!("kind {kind} of a later version"),
        };
        add(&mut summary.kinds, name, seq as u64);
        if let Some(stream) = row.get::<_, Option<String>>(2)? {
            add(&mut summary.streams, stream, seq as u64);
        }
    }
    Ok(())
}

fn add(tallies: &mut BTreeMap<String, Tally>, name: String, seq: u64) {
    let it = tallies.entry(name).or_insert(Tally { count: 0, first: seq, last: seq });
    it.count += 1;
    it.last = seq;
}

/// The first event at or after `seq`: its number and when it was appended.
fn at(reader: &Reader, seq: u64) -> rusqlite::Result<Option<(u64, i64)>> {
    let sql = "SELECT seq, appended_us FROM event WHERE ?1 <= seq ORDER BY seq LIMIT 1";
    let mut statement = reader.connection.prepare_cached(sql)?;
    let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)? as u64, row.get(1)?));
    statement.query_row([seq as i64], row).optional()
}

fn ends(
    reader: &Reader,
    oldest: u64,
    next: u64,
) -> rusqlite::Result<Option<(SystemTime, SystemTime)>> {
    let time = |it: (u64, i64)| {
        SystemTime::UNIX_EPOCH + Duration::from_micros(u64::try_from(it.1).unwrap_or(0))
    };
    let first = at(reader, oldest)?.map(time);
    Ok(first.zip(at(reader, next.saturating_sub(1))?.map(time)))
}

/// The first event appended within the last `age`, or `next`. A search by halves: exact unless the
/// clock was put back meanwhile.
fn since(reader: &Reader, oldest: u64, next: u64, age: Duration) -> rusqlite::Result<u64> {
    let cutoff = micros_now() - age.as_micros() as i64;
    let (mut low, mut high) = (oldest, next);
    while low < high {
        let middle = low + (high - low) / 2;
        match at(reader, middle)? {
            Some((_, appended)) if appended < cutoff => low = middle + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}

fn places(reader: &Reader, next: u64) -> rusqlite::Result<Vec<Place>> {
    let mut statement = reader.connection.prepare("SELECT sink, seq FROM cursor ORDER BY sink")?;
    let place = |row: &rusqlite::Row<'_>| {
        let cursor = row.get::<_, i64>(1)? as u64;
        Ok(Place { sink: row.get(0)?, cursor, lag: (next - 1).saturating_sub(cursor) })
    };
    statement.query_map([], place)?.collect()
}
