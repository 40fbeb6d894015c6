//! What opening a journal does with damage, with an older layout, and with a journal that is gone.

use std::{os::unix::fs::FileExt as _, path::PathBuf};

use tempfile::TempDir;

use super::*;
use crate::{
    event::{Event, GapReason, Kind},
    journal::{
        filter::Filter,
        read::{Gap, Page, Reader},
        retain::Retain,
        writer::Writer,
    },
};

fn folder() -> (TempDir, PathBuf) {
    let it = tempfile::tempdir().unwrap();
    let path = it.path().join("journal.db");
    (it, path)
}

fn open(path: &Path) -> Writer {
    Writer::open(path, Retain::default()).unwrap()
}

fn event(bytes: usize) -> Event {
    Event {
        kind: Kind::FrameClassified,
        stream: Some("front".into()),
        epoch: Some(0),
        source: "/ghostwatch/t/streams/front".into(),
        time: std::time::SystemTime::now(),
        data: format!("{{\"epoch\":7,\"pad\":\"{}\"}}", "x".repeat(bytes)),
    }
}

fn change(path: &Path, sql: &str) {
    Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

fn page(path: &Path, after: u64) -> Page {
    Reader::open(path).unwrap().page(after, &Filter::default(), 1000).unwrap()
}

fn seqs(page: &Page) -> Vec<u64> {
    page.records.iter().map(|it| it.seq).collect()
}

fn damaged(first: u64, last: u64) -> Option<Gap> {
    Some(Gap { first, last, reason: GapReason::Damaged })
}

const DOWNGRADE: &str = "DROP TABLE epoch; DROP TABLE cursor; ALTER TABLE event DROP COLUMN crc;
                         PRAGMA user_version = 1;";

#[test]
fn a_journal_of_layout_1_with_an_event_that_is_not_json_is_upgraded_and_the_event_is_a_gap() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    writer.append(&mut vec![event(10), event(10), event(10)]).unwrap();
    drop(writer);
    change(&path, DOWNGRADE);
    change(&path, "UPDATE event SET json = substr(json, 1, 40) WHERE seq = 2");
    let mut writer = open(&path);
    assert_eq!(writer.take_loss(), None, "the rest of it is good");
    assert_eq!(Reader::open(&path).unwrap().last_epoch("front").unwrap(), Some(7));
    let it = page(&path, 0);
    assert_eq!((seqs(&it), it.cursor, it.gap), (vec![1], 1, None));
    let it = page(&path, 1);
    assert_eq!((seqs(&it), it.gap), (vec![3], damaged(2, 2)));
}

#[test]
fn a_journal_of_layout_1_that_cannot_be_upgraded_is_moved_away() {
    let (_folder, path) = folder();
    open(&path).append(&mut vec![event(10)]).unwrap();
    change(&path, DOWNGRADE);
    change(&path, "CREATE TABLE cursor (it)");
    let mut writer = open(&path);
    let detail = writer.take_loss().expect("it is moved away").detail;
    assert!(detail.contains("layout 1") && detail.contains("cursor"), "{detail}");
    assert_eq!(writer.append(&mut vec![event(10)]).unwrap().first, 1);
}

/// A journal above the size that is checked completely: 66 large events, then 1100 small ones.
fn large() -> (TempDir, PathBuf) {
    let (folder, path) = folder();
    let mut writer = open(&path);
    let cursor = writer.cursor("nats").unwrap();
    for _ in 0..66 {
        writer.append(&mut vec![event(1 << 20)]).unwrap();
    }
    cursor.advance(3);
    writer.append(&mut vec![event(100); 1100]).unwrap();
    drop(writer);
    assert!(CHECK_BYTES < fs::metadata(&path).unwrap().len());
    (folder, path)
}

/// Writes garbage over a page, counted from 1 as SQLite does.
fn spoil(path: &Path, page: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0xa5; PAGE_BYTES as usize], (page - 1) * PAGE_BYTES).unwrap();
}

#[test]
fn a_large_journal_whose_table_of_epochs_or_cursors_is_damaged_is_moved_away() {
    for table in ["epoch", "cursor"] {
        let (_folder, path) = large();
        let root = "SELECT rootpage FROM sqlite_schema WHERE name = ?1";
        let connection = Connection::open(&path).unwrap();
        let root: i64 = connection.query_row(root, [table], |row| row.get(0)).unwrap();
        drop(connection);
        spoil(&path, root as u64);
        let mut writer = open(&path);
        assert!(writer.take_loss().is_some(), "{table}: noticed at open");
        assert_eq!(writer.cursor("nats").unwrap().get(), 0, "{table}");
        assert_eq!(writer.append(&mut vec![event(10)]).unwrap().first, 1, "{table}");
    }
}

#[test]
fn damage_met_while_it_is_in_use_ends_the_process_and_the_next_start_moves_the_journal_away() {
    let (_folder, path) = large();
    // The page in which one of the older events begins, which opening does not look at.
    let (bytes, begin) = (fs::read(&path).unwrap(), b"-00000000000000000030\",\"source\"");
    let at = bytes.windows(begin.len()).position(|it| it == begin).unwrap();
    spoil(&path, at as u64 / PAGE_BYTES + 1);
    let mut writer = open(&path);
    assert_eq!(writer.take_loss(), None, "not noticed at open");
    writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
    let error = loop {
        match writer.maintain() {
            Ok(more) => assert!(more, "retention met the damage"),
            Err(it) => break it,
        }
    };
    assert_eq!((error.is_temporary(), error.exit_code()), (false, 1), "{error}");
    assert!(beside(&path, SUSPECT).exists(), "{error}");
    drop(writer);
    let loss = open(&path).take_loss();
    assert!(loss.is_some(), "noticed now");
    assert!(!beside(&path, SUSPECT).exists());
    assert_eq!(open(&path).take_loss(), loss, "still to be told, and the new one is good");
}

fn page_in_the_middle(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len() / PAGE_BYTES / 2
}

#[test]
fn what_is_gone_with_a_damaged_journal_is_told_until_it_is_written_down() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    let id = writer.id().to_owned();
    writer.set_retain(Retain { bytes: Some(1 << 20), ..Retain::default() });
    for _ in 0..20 {
        writer.append(&mut vec![event(900); 100]).unwrap();
    }
    let (oldest, next) = (writer.stats().oldest, writer.stats().next);
    assert!(1 < oldest, "the first ones have expired and are not gone");
    drop(writer);
    spoil(&path, page_in_the_middle(&path));
    let loss = open(&path).take_loss().expect("noticed");
    assert_eq!((loss.journal.as_ref(), loss.events), (Some(&id), Some((oldest, next - 1))));
    // That one ended before it had appended anything, and so does this one.
    assert_eq!(open(&path).take_loss().as_ref(), Some(&loss));
    let mut writer = open(&path);
    let again = writer.take_loss().unwrap();
    writer.append(&mut vec![again.event("t")]).unwrap();
    drop(writer);
    assert_eq!(open(&path).take_loss(), None, "told");
    let event = &page(&path, 0).records[0].json;
    let event: serde_json::Value = serde_json::from_str(event).unwrap();
    let data = &event["data"];
    assert_eq!((&data["journal"], &data["events"]), (&id.into(), &(next - oldest).into()));
    assert_eq!((&data["reason"], &data["detail"]), (&"damaged".into(), &loss.detail.into()));
    assert!(Path::new(data["moved_to"].as_str().unwrap()).exists());
}

#[test]
fn without_a_trace_of_the_owner_before_as_much_is_told_as_can_still_be_read() {
    for (spoilt_whole, known) in [(false, true), (true, false)] {
        let (_folder, path) = folder();
        let mut writer = open(&path);
        let id = writer.id().to_owned();
        writer.append(&mut vec![event(900); 200]).unwrap();
        drop(writer);
        fs::remove_file(beside(&path, ".lock")).unwrap();
        match spoilt_whole {
            true => fs::write(&path, "x".repeat(100_000)).unwrap(),
            false => spoil(&path, page_in_the_middle(&path)),
        }
        let loss = open(&path).take_loss().expect("noticed");
        assert_eq!(loss.journal, known.then_some(id));
        assert_eq!(loss.events, known.then_some((1, 200)));
        assert_eq!(loss.event("t").data.contains("\"events\":0"), !known, "{loss}");
    }
}

#[test]
fn a_journal_that_was_removed_emptied_or_exchanged_is_missed() {
    let (folder, path) = folder();
    let other = folder.path().join("other.db");
    open(&other).append(&mut vec![event(10); 3]).unwrap();
    let mut writer = open(&path);
    assert_eq!(writer.take_loss(), None, "the first one");
    writer.append(&mut vec![event(10); 5]).unwrap();
    drop(writer);
    let older = fs::read(&path).unwrap();
    let check = |what: &str, change: &dyn Fn(), lost: (u64, u64), next: u64| {
        let mut writer = open(&path);
        if let Some(loss) = writer.take_loss() {
            writer.append(&mut vec![loss.event("t")]).unwrap();
        }
        while writer.stats().next < 10 {
            writer.append(&mut vec![event(10)]).unwrap();
        }
        let id = writer.id().to_owned();
        drop(writer);
        change();
        let mut writer = open(&path);
        let loss = writer.take_loss().unwrap_or_else(|| panic!("{what}: missed"));
        assert_eq!((loss.journal, loss.events), (Some(id.clone()), Some(lost)), "{what}");
        assert_eq!((loss.moved_to, loss.detail.contains(what)), (None, true), "{}", loss.detail);
        assert_ne!(writer.id(), id, "{what}");
        assert_eq!(writer.stats().next, next, "{what}");
        assert_eq!(Reader::open(&path).unwrap().begin().unwrap(), next, "{what}");
    };
    check("older copy", &|| fs::write(&path, &older).unwrap(), (6, 9), 6);
    check("removed", &|| fs::remove_file(&path).unwrap(), (1, 9), 1);
    check("emptied", &|| fs::write(&path, "").unwrap(), (1, 9), 1);
    let exchange = || assert!(0 < fs::copy(&other, &path).unwrap());
    check("another", &exchange, (1, 9), 4);
}
