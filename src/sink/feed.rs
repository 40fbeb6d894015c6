//! From the journal to what a sink is to deliver, part by part.
//!
//! It runs on a thread of its own, because SQLite blocks, and reads one part ahead: the broker
//! never waits for the disk, and a broker that is away for hours costs three parts of memory.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    journal::{filter::Filter, read::Reader},
    sink::{broker::Message, settings::Select},
};

/// Events looked at in one read transaction, and at most in flight to a broker at once.
const PART: u32 = 256;
/// How soon a stop is seen.
const WAIT: Duration = Duration::from_millis(200);
/// How soon a journal that cannot be read for now is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the same trouble is logged.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What a sink is to deliver next.
#[derive(Debug)]
pub struct Part {
    /// In order.
    pub messages: Vec<Message>,
    /// Where the sink stands once all of them are delivered.
    pub cursor: u64,
    /// Events before them that it will never get.
    pub lost: u64,
}

/// Reads everything after `cursor` until `stop`, and what was committed before the stop.
///
/// # Errors
/// The journal cannot be read any more.
pub fn run(
    mut reader: Reader,
    mut cursor: u64,
    (select, instance): (&Select, &str),
    parts: &mpsc::Sender<Part>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let journal = reader.id()?;
    let mut said = None;
    loop {
        // Asked before the look, so that the last look is after the stop.
        let last = stop.is_cancelled();
        let page = match reader.page(cursor, &Filter::default(), PART) {
            Ok(page) => page,
            Err(error) if error.is_temporary() && !last => {
                if said.is_none_or(|it: Instant| SAY_EVERY <= it.elapsed()) {
                    tracing::error!(%error, "a sink cannot read the journal");
                    said = Some(Instant::now());
                }
                reader.wait(RETRY);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if page.cursor == cursor {
            if last {
                return Ok(());
            }
            reader.wait(WAIT);
            continue;
        }
        cursor = page.cursor;
        let lost = page.gap.map_or(0, |it| it.last + 1 - it.first);
        let gap = page.gap.and_then(|it| select.gap(&it, &journal, instance));
        let events = page.records.into_iter().filter_map(|it| select.message(it));
        let messages = gap.into_iter().chain(events).collect();
        if parts.blocking_send(Part { messages, cursor, lost }).is_err() {
            // Whoever delivers has ended, and says why itself.
            return Ok(());
        }
    }
}
