//! Readers of a journal, in any process: page by page, forward from a cursor.
//!
//! A reader holds no transaction between pages, so it never keeps the write-ahead log from being
//! reused. What retention removed before the reader came is reported, never skipped silently.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, params, types::ValueRef};

use crate::{
    event::{Event, GapReason, Kind, sequence},
    journal::{
        JournalError, bell::Listener, bounds, check_layout, crc, filter::Filter, layout, meta,
    },
};

/// One event in the journal.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its place: the cursor of a reader that has read it.
    pub seq: u64,
    /// What it is about; `None` iff a later version wrote it.
    pub kind: Option<Kind>,
    /// The stream it belongs to, if to one.
    pub stream: Option<String>,
    /// The complete JSON object, on one line.
    pub json: String,
    /// When it was appended, by the wall clock.
    pub appended: SystemTime,
}

/// What one look at the journal gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// In order; those that the filter lets through.
    pub records: Vec<Record>,
    /// Where to go on: the last event that was looked at, or the cursor that was given.
    pub cursor: u64,
    /// Events after the given cursor that this reader will never get, if any. They come before
    /// `records`.
    pub gap: Option<Gap>,
}

/// Events that a reader will never get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first of them.
    pub first: u64,
    /// The last of them.
    pub last: u64,
    /// Why.
    pub reason: GapReason,
}

impl Gap {
    /// The id of the event that tells of it: the same for every reader that has come as far.
    pub fn id(&self, journal: &str) -> String {
        format!("{journal}-{}-gap", sequence(self.last))
    }

    /// The complete event that tells of it. `source` is the daemon's, as in its own events.
    pub fn event(&self, journal: &str, source: &str) -> String {
        let mut event = Event::gap("", (self.first, self.last), self.reason, None);
        source.clone_into(&mut event.source);
        event.envelope_with(&self.id(journal), self.last)
    }
}

impl Page {
    /// Everything after the cursor up to `last` is missing. Gives false if that must begin the next
    /// page, because gaps come before the records of a page and have one reason.
    fn lacks(&mut self, last: u64, reason: GapReason) -> bool {
        let first = match self.gap {
            None if self.records.is_empty() => self.cursor + 1,
            Some(it) if it.reason == reason && it.last == self.cursor => it.first,
            _ => return false,
        };
        self.gap = Some(Gap { first, last, reason });
        self.cursor = last;
        true
    }
}

/// A reader of a journal that another process may be writing.
pub struct Reader {
    pub(super) connection: Connection,
    /// Whether the layout has them.
    pub(super) checksums: bool,
    pub(super) path: PathBuf,
    /// Which file it is, looked at before it was opened.
    place: Option<(u64, u64)>,
    listener: Listener,
}

impl Reader {
    /// Opens an existing journal.
    ///
    /// # Errors
    /// [`JournalError::Missing`], `TooNew`, `Damaged`, or `Blocked` where it cannot be read.
    pub fn open(path: &Path) -> Result<Reader, JournalError> {
        if !path.exists() {
            return Err(JournalError::Missing { path: path.to_owned() });
        }
        let place = place(path);
        let of = |it: rusqlite::Error| JournalError::of(path, &it);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(of)?;
        connection.busy_timeout(Duration::from_secs(1)).map_err(of)?;
        let tables = "SELECT count(*) FROM sqlite_schema";
        let tables: i64 = connection.query_row(tables, [], |row| row.get(0)).map_err(of)?;
        if tables == 0 {
            // A daemon is making it at this moment, or was killed while it did.
            return Err(JournalError::Missing { path: path.to_owned() });
        }
        check_layout(&connection, path)?;
        let checksums = 2 <= layout(&connection).map_err(of)?;
        // Listening starts before the first look, so nothing can happen unheard between the two.
        let listener = Listener::new(path);
        Ok(Reader { connection, checksums, path: path.to_owned(), place, listener })
    }

    /// The journal's id, the first part of the ids of the events appended now.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn id(&self) -> Result<String, JournalError> {
        let id = meta(&self.connection, "id").map_err(|it| JournalError::of(&self.path, &it))?;
        id.ok_or_else(|| JournalError::Damaged {
            path: self.path.clone(),
            detail: "it has no id".to_owned(),
        })
    }

    /// The sequence number of the first event that has the journal's id. A copy took a new id when it
    /// was first written to; what lies before that has the ids of the journal that it was.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn begin(&self) -> Result<u64, JournalError> {
        let begin = meta::<i64>(&self.connection, "begin");
        Ok(begin.map_err(|it| JournalError::of(&self.path, &it))?.unwrap_or(1) as u64)
    }

    /// The complete event that tells of a gap in this journal.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn gap_event(&self, gap: &Gap) -> Result<String, JournalError> {
        Ok(gap.event(&self.id()?, &self.source()?))
    }

    /// The daemon's source, as the newest event has it.
    fn source(&self) -> Result<String, JournalError> {
        let sql = "SELECT json FROM event ORDER BY seq DESC LIMIT 1";
        // It may be the one that is damaged.
        let bytes = |row: &Row<'_>| Ok(row.get_ref(0)?.as_bytes().unwrap_or_default().to_vec());
        let json = self.connection.query_row(sql, [], bytes).optional();
        let json = json.map_err(|it| JournalError::of(&self.path, &it))?.unwrap_or_default();
        let event: serde_json::Value = serde_json::from_slice(&json).unwrap_or_default();
        let source = event["source"].as_str().unwrap_or("/ghostwatch/unknown");
        Ok(source.split("/streams/").next().unwrap_or_default().to_owned())
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether another journal lies where this one was opened. This one can still be read.
    pub fn is_replaced(&self) -> bool {
        // While a new one is made there may be none for a moment.
        place(&self.path).is_some_and(|it| Some(it) != self.place)
    }

    /// The last event's sequence number, 0 before the first; also the cursor that skips all.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn latest(&self) -> Result<u64, JournalError> {
        Ok(self.bounds()?.1 - 1)
    }

    /// The last event that a sink has delivered, as far as it is saved; `None` for an unknown sink.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn cursor(&self, sink: &str) -> Result<Option<u64>, JournalError> {
        let sql = "SELECT seq FROM cursor WHERE sink = ?1";
        let found = self.connection.query_row(sql, [sink], |row| row.get::<_, i64>(0)).optional();
        Ok(found.map_err(|it| JournalError::of(&self.path, &it))?.map(|it| it as u64))
    }

    /// The oldest sequence number that is there; that of the next event if none is.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn oldest(&self) -> Result<u64, JournalError> {
        Ok(self.bounds()?.0)
    }

    /// Looks at up to `limit` events after the cursor `after`.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn page(&mut self, after: u64, filter: &Filter, limit: u32) -> Result<Page, JournalError> {
        self.look(after, filter, limit).map_err(|it| JournalError::of(&self.path, &it))
    }

    /// The last state event of each stream, as JSON.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn last_states(&self) -> Result<Vec<String>, JournalError> {
        let sql = "SELECT json FROM event WHERE seq IN
            (SELECT max(seq) FROM event WHERE kind = 2 GROUP BY stream) ORDER BY stream";
        let states = || -> rusqlite::Result<Vec<String>> {
            self.connection.prepare_cached(sql)?.query_map([], |row| row.get(0))?.collect()
        };
        states().map_err(|it| JournalError::of(&self.path, &it))
    }

    /// The last epoch of a stream; `None` if the journal never had one of it. Known even if all its
    /// events have expired.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn last_epoch(&self, stream: &str) -> Result<Option<u64>, JournalError> {
        let sql = "SELECT epoch FROM epoch WHERE stream = ?1";
        let row = self.connection.query_row(sql, [stream], |row| row.get::<_, i64>(0));
        row.optional()
            .map(|it| it.map(|it| it as u64))
            .map_err(|it| JournalError::of(&self.path, &it))
    }

    /// The cursor from which the last `count` events that the filter lets through follow.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn back(&mut self, count: u64, filter: &Filter) -> Result<u64, JournalError> {
        let (oldest, next) = self.bounds()?;
        if count == 0 {
            return Ok(next - 1);
        }
        let (mut before, mut found) = (next, 0);
        while oldest < before {
            let start = oldest.max(before.saturating_sub(256));
            for it in self.between(start - 1, before, filter)?.iter().rev() {
                found += 1;
                if found == count {
                    return Ok(it.seq - 1);
                }
            }
            before = start;
        }
        Ok(oldest - 1)
    }

    /// The events after `after` and before `before` that the filter lets through.
    fn between(
        &mut self,
        after: u64,
        before: u64,
        filter: &Filter,
    ) -> Result<Vec<Record>, JournalError> {
        let (mut records, mut cursor) = (Vec::new(), after);
        while cursor + 1 < before {
            let page = self.page(cursor, filter, (before - 1 - cursor) as u32)?;
            if page.cursor == cursor {
                break;
            }
            cursor = page.cursor;
            records.extend(page.records.into_iter().filter(|it| it.seq < before));
        }
        Ok(records)
    }

    /// Waits until something may have been appended, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        self.listener.wait(timeout);
    }

    /// The oldest sequence number that is there and the next to be given; equal iff none is there.
    pub(super) fn bounds(&self) -> Result<(u64, u64), JournalError> {
        bounds(&self.connection).map_err(|it| JournalError::of(&self.path, &it))
    }

    fn look(&mut self, after: u64, filter: &Filter, limit: u32) -> rusqlite::Result<Page> {
        // A cursor beyond every possible number waits for ever, it does not wrap around.
        let after = after.min(i64::MAX as u64 - 1);
        let crc = if self.checksums { "crc" } else { "NULL" };
        let transaction = self.connection.transaction()?;
        let mut page = Page { cursor: after, ..Page::default() };
        {
            let mut statement = transaction.prepare_cached(&format!(
                "SELECT seq, kind, stream, json, {crc}, appended_us FROM event WHERE ?1 < seq ORDER BY seq LIMIT ?2",
            ))?;
            let mut rows = statement.query(params![after as i64, limit])?;
            let mut left = limit;
            let more = loop {
                let Some(row) = rows.next()? else { break left == 0 };
                left -= 1;
                let seq = row.get::<_, i64>(0)? as u64;
                let hole = page.cursor + 1 < seq;
                if hole && !page.lacks(seq - 1, why_missing(&transaction, page.cursor)?) {
                    break true;
                }
                if damage(row, seq)?.is_none() {
                    page.records.extend(wanted(row, seq, filter)?);
                    page.cursor = seq;
                } else if !page.lacks(seq, GapReason::Damaged) {
                    break true;
                }
            };
            // The newest may be missing, or all of them.
            let next = if more { 0 } else { bounds(&transaction)?.1 };
            if page.cursor + 1 < next {
                page.lacks(next - 1, why_missing(&transaction, page.cursor)?);
            }
        }
        transaction.finish()?;
        Ok(page)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({})", self.path.display())
    }
}

/// Why events after the cursor are missing: retention takes the oldest only, so where older ones are
/// there, something else took them.
fn why_missing(connection: &Connection, cursor: u64) -> rusqlite::Result<GapReason> {
    let oldest = bounds(connection)?.0;
    Ok(if oldest <= cursor { GapReason::Damaged } else { GapReason::Expired })
}

/// In which way a row (sequence, kind, stream, JSON, checksum, …) is not what was appended, if it is
/// not.
pub(super) fn damage(row: &Row<'_>, seq: u64) -> rusqlite::Result<Option<&'static str>> {
    let bytes = |at: usize| -> rusqlite::Result<Option<&[u8]>> {
        let value = row.get_ref(at)?;
        Ok(match value {
            ValueRef::Text(it) => Some(it),
            _ => None,
        })
    };
    let is_text = |it: &[u8]| str::from_utf8(it).is_ok();
    let (stream, json) = (bytes(2)?, bytes(3)?);
    let (Some(json), true) = (json, stream.is_none_or(is_text)) else {
        return Ok(Some("not what was appended, it is no text"));
    };
    let (kind, sum) = (row.get_ref(1)?, row.get_ref(4)?);
    let is_good = match (kind, sum) {
        (ValueRef::Integer(kind), ValueRef::Integer(sum)) => sum == crc(seq, kind, stream, json),
        // Layout 1 had no checksums, but what was appended was JSON.
        (ValueRef::Integer(_), ValueRef::Null) => {
            let json = serde_json::from_slice::<serde::de::IgnoredAny>(json);
            return Ok(json.is_err().then_some("not what was appended, it is no JSON"));
        }
        _ => false,
    };
    Ok((!is_good || !is_text(json)).then_some("not what was appended, its checksum differs"))
}

fn place(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|it| (it.dev(), it.ino()))
}

/// The row as a record, if the filter lets it through; the JSON is copied only then.
fn wanted(row: &Row<'_>, seq: u64, filter: &Filter) -> rusqlite::Result<Option<Record>> {
    let kind = Kind::from_code(row.get(1)?);
    let text = |at: usize| {
        let value = row.get_ref(at)?;
        value.as_str_or_null().map_err(|it| {
            rusqlite::Error::FromSqlConversionFailure(at, value.data_type(), Box::new(it))
        })
    };
    let stream = text(2)?;
    let json = text(3)?.unwrap_or_default();
    // Only retention goes by it, and an event is not less true without.
    let appended = row.get_ref(5)?.as_i64().unwrap_or_default().unsigned_abs();
    let record = || Record {
        seq,
        kind,
        stream: stream.map(str::to_owned),
        json: json.to_owned(),
        appended: SystemTime::UNIX_EPOCH + Duration::from_micros(appended),
    };
    Ok(filter.matches(kind, stream, json).then(record))
}
