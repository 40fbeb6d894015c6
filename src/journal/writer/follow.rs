//! Sinks that come and go while the journal is written: whose cursors are saved with the commits.

use std::sync::Arc;

use rusqlite::params;

use super::{Tracked, Writer};
use crate::journal::{JournalError, cursor::Cursor};

impl Writer {
    /// Saves a sink's place with every commit from now on. One that is followed already is followed
    /// by its new cursor.
    pub fn follow(&mut self, cursor: Arc<Cursor>) {
        self.cursors.retain(|it| it.cursor.sink() != cursor.sink());
        // Not saved as it is: a new sink's place is noted with the next commit.
        self.cursors.push(Tracked { cursor, saved: u64::MAX });
    }

    /// Saves a sink's place for the last time. Retention counts nothing as lost to it any more.
    ///
    /// # Errors
    /// As [`Writer::append`]; the sink is then followed as before.
    pub fn release(&mut self, sink: &str) -> Result<(), JournalError> {
        let Some(at) = self.cursors.iter().position(|it| it.cursor.sink() == sink) else {
            return Ok(());
        };
        let Tracked { cursor, saved } = &self.cursors[at];
        let place = cursor.get();
        if place != *saved {
            let sql = "INSERT OR REPLACE INTO cursor VALUES (?1, ?2)";
            let done = self.connection.execute(sql, params![sink, place as i64]);
            done.map_err(|it| self.error(&it))?;
        }
        self.cursors.remove(at);
        Ok(())
    }
}
