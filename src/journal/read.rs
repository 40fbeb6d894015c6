//! Readers of a journal, in any process: page by page, forward from a cursor.
//!
//! A reader holds no transaction between pages, so it never keeps the write-ahead log from being
//! reused. What retention removed before the reader came is reported, never skipped silently.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, Row, params};

use crate::{
    event::Kind,
    journal::{JournalError, bell::Listener, bounds, check_layout, filter::Filter, meta},
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
}

/// What one look at the journal gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// In order; those that the filter lets through.
    pub records: Vec<Record>,
    /// Where to go on: the last event that was looked at, or the cursor that was given.
    pub cursor: u64,
    /// The first and last event after the given cursor that are no longer there, if any. They
    /// come before `records`.
    pub expired: Option<(u64, u64)>,
}

/// A reader of a journal that another process may be writing.
pub struct Reader {
    connection: Connection,
    path: PathBuf,
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
        // Listening starts before the first look, so nothing can happen unheard between the two.
        let listener = Listener::new(path);
        Ok(Reader { connection, path: path.to_owned(), listener })
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

    /// The last event's sequence number, 0 before the first; also the cursor that skips all.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn latest(&self) -> Result<u64, JournalError> {
        Ok(self.bounds()?.1 - 1)
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

    /// The epoch of a stream's last event; `None` if the journal has none of it.
    ///
    /// # Errors
    /// A [`JournalError`] if it cannot be read.
    pub fn last_epoch(&self, stream: &str) -> Result<Option<u64>, JournalError> {
        let sql = "SELECT json_extract(json, '$.data.epoch') FROM event
            WHERE stream = ?1 AND json_extract(json, '$.data.epoch') IS NOT NULL
            ORDER BY seq DESC LIMIT 1";
        let row = self.connection.query_row(sql, [stream], |row| row.get::<_, i64>(0));
        let epoch = rusqlite::OptionalExtension::optional(row);
        epoch.map(|it| it.map(|it| it as u64)).map_err(|it| JournalError::of(&self.path, &it))
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
            let page = self.page(start - 1, filter, (before - start) as u32)?;
            for it in page.records.iter().rev() {
                found += 1;
                if found == count {
                    return Ok(it.seq - 1);
                }
            }
            before = start;
        }
        Ok(oldest - 1)
    }

    /// Waits until something may have been appended, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        self.listener.wait(timeout);
    }

    fn bounds(&self) -> Result<(u64, u64), JournalError> {
        bounds(&self.connection).map_err(|it| JournalError::of(&self.path, &it))
    }

    fn look(&mut self, after: u64, filter: &Filter, limit: u32) -> rusqlite::Result<Page> {
        // A cursor beyond every possible number waits for ever, it does not wrap around.
        let after = after.min(i64::MAX as u64 - 1);
        let transaction = self.connection.transaction()?;
        let mut page = Page { cursor: after, ..Page::default() };
        {
            let mut statement = transaction.prepare_cached(
                "SELECT seq, kind, stream, json FROM event WHERE ?1 < seq ORDER BY seq LIMIT ?2",
            )?;
            let mut rows = statement.query(params![after as i64, limit])?;
            let mut first = None;
            while let Some(row) = rows.next()? {
                let seq = row.get::<_, i64>(0)? as u64;
                first.get_or_insert(seq);
                page.cursor = seq;
                page.records.extend(wanted(row, seq, filter)?);
            }
            drop(rows);
            let there = match first {
                Some(it) => it,
                None if limit == 0 => after + 1,
                // Retention may have removed everything, the event just after the cursor too.
                None => bounds(&transaction)?.1,
            };
            if after + 1 < there {
                page.expired = Some((after + 1, there - 1));
                page.cursor = page.cursor.max(there - 1);
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
    let record = || Record { seq, kind, stream: stream.map(str::to_owned), json: json.to_owned() };
    Ok(filter.matches(kind, stream, json).then(record))
}
