//! From the journal to what a sink is to deliver, part by part.
//!
//! It runs on a thread of its own, because SQLite blocks, and reads one part ahead: the broker
//! never waits for the disk, and a broker that is away for hours costs three parts of memory.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    event::source,
    journal::{
        filter::Filter,
        read::{Gap, Page, Reader},
    },
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

/// Reads everything after `cursor` until `stop`, and what was committed before the stop; of all that
/// nothing beyond the event `end`, at which it ends by itself.
///
/// # Errors
/// The journal cannot be read any more.
pub fn run(
    mut reader: Reader,
    (mut cursor, end): (u64, u64),
    (select, instance): (&Select, &str),
    parts: &mpsc::Sender<Part>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let (journal, source) = (reader.id()?, source(instance, None));
    let mut said = None;
    loop {
        // Asked before the look, so that the last look is after the stop.
        let last = stop.is_cancelled();
        if end <= cursor {
            return Ok(());
        }
        let most = u64::from(PART).min(end - cursor) as u32;
        let page = match reader.page(cursor, &Filter::default(), most) {
            Ok(page) => until(page, end),
            Err(error) if error.is_temporary() && !last => {
                if said.is_none_or(|it: Instant| SAY_EVERY <= it.elapsed()) {
                    tracing::error!(%error, "a sink cannot read the journal");
                    said = Some(Instant::now());
                }
                reader.wait(RETRY);
                continue;
            }
            Err(error) => return Err(error.in_use().into()),
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
        let gap = page.gap.and_then(|it| select.gap(&it, &journal, &source));
        let events = page.records.into_iter().filter_map(|it| select.message(it));
        let messages = gap.into_iter().chain(events).collect();
        if parts.blocking_send(Part { messages, cursor, lost }).is_err() {
            // Whoever delivers has ended, and says why itself.
            return Ok(());
        }
    }
}

/// What of a page is not beyond `end`; a gap may reach over it, and what follows one.
fn until(page: Page, end: u64) -> Page {
    let within = |it: &Gap| it.first <= end;
    let gap = page.gap.filter(within).map(|it| Gap { last: it.last.min(end), ..it });
    let records = page.records.into_iter().filter(|it| it.seq <= end).collect();
    Page { records, cursor: page.cursor.min(end), gap }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        event::{DaemonState, Event, GapReason},
        journal::{JournalError, retain::Retain, writer::Writer},
    };

    #[test]
    fn damage_that_a_sink_meets_ends_the_process_and_makes_the_next_start_look_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let mut writer = Writer::open(&path, Retain::default()).unwrap();
        let event = Event::daemon("t", DaemonState::Started, None);
        for _ in 0..20 {
            writer.append(&mut vec![event.clone(); 200]).unwrap();
        }
        drop(writer);
        let mut bytes = fs::read(&path).unwrap();
        let page = bytes.len() / 8192 / 2 * 8192;
        bytes[page..page + 8192].fill(0xa5);
        fs::write(&path, bytes).unwrap();
        let (parts, _parts_rx) = mpsc::channel(100);
        let (reader, select) = (Reader::open(&path).unwrap(), Select::default());
        let stop = CancellationToken::new();
        let error = run(reader, (0, u64::MAX), (&select, "t"), &parts, &stop).unwrap_err();
        assert_eq!(error.downcast_ref::<JournalError>().map(JournalError::exit_code), Some(1));
        assert!(folder.path().join("journal.db.suspect").exists(), "{error}");
        let mut writer = Writer::open(&path, Retain::default()).unwrap();
        assert!(writer.take_loss().is_some());
    }

    #[test]
    fn a_gap_that_reaches_beyond_the_end_is_cut_and_what_follows_it_is_left_out() {
        let gap = |first, last| Some(Gap { first, last, reason: GapReason::Expired });
        let check = |page: (Option<Gap>, u64), end, expected: (Option<Gap>, u64)| {
            let page = until(Page { gap: page.0, cursor: page.1, records: vec![] }, end);
            assert_eq!((page.gap, page.cursor), expected);
        };
        check((gap(3, 9), 12), 20, (gap(3, 9), 12));
        check((gap(3, 9), 12), 5, (gap(3, 5), 5));
        check((gap(6, 9), 12), 5, (None, 5));
    }
}
