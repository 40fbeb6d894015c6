//! Events that are gone with the journal that they were in, and how everybody is told.
//!
//! What was lost is noted in the new journal together with its id, and the note goes in the
//! transaction that appends the event which tells of it. So it is told once, however often the
//! daemon ends in between.

use std::fmt;

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

use crate::{
    event::{Elsewhere, Event, GapReason},
    journal::meta,
};

/// Events that are gone with the journal that they were in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The journal's id, as far as it is known.
    pub journal: Option<String>,
    /// The first and the last of them, as far as they are known.
    pub events: Option<(u64, u64)>,
    /// Where the journal is now, if it was moved away.
    pub moved_to: Option<String>,
    /// What happened.
    pub detail: String,
}

impl Loss {
    /// How many they are; 0 if nobody knows.
    pub fn count(&self) -> u64 {
        self.events.map_or(0, |(first, last)| (last + 1).saturating_sub(first))
    }

    /// The event that tells of it. `instance` names whose journal it was.
    pub fn event(&self, instance: &str) -> Event {
        let elsewhere = Elsewhere {
            journal: self.journal.as_deref(),
            moved_to: self.moved_to.as_deref(),
            detail: &self.detail,
        };
        let events = self.events.unwrap_or((1, 0));
        Event::gap(instance, events, GapReason::Damaged, Some(elsewhere))
    }

    /// What was noted in this journal and has not been told.
    pub(super) fn noted(connection: &Connection) -> rusqlite::Result<Option<Loss>> {
        let json: Option<String> = meta(connection, "loss")?;
        // A note that cannot be read has nothing to tell; the log had it when it was written.
        Ok(json.and_then(|it| serde_json::from_str(&it).ok()))
    }

    /// Notes it in the journal that begins.
    pub(super) fn note(&self, connection: &Connection) -> rusqlite::Result<()> {
        let json = serde_json::to_string(self).expect("text and numbers can be written as JSON");
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('loss', ?1)", params![json])?;
        Ok(())
    }

    /// It has been told.
    pub(super) fn forget(connection: &Connection) -> rusqlite::Result<()> {
        connection.execute("DELETE FROM meta WHERE key = 'loss'", [])?;
        Ok(())
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.events {
            Some((first, last)) => {
                write!(f, "{} events ({first} to {last}) are gone", self.count())?;
            }
            None => write!(f, "events are gone, nobody knows how many")?,
        }
        if let Some(journal) = &self.journal {
            write!(f, " with journal {journal}")?;
        }
        if let Some(to) = &self.moved_to {
            write!(f, ", which was moved to {to}")?;
        }
        write!(f, ": {}", self.detail)
    }
}
