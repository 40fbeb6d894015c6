//! What opening a journal does with damage, with an older layout, and with a journal that is gone.

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
    assert_eq!(writer.take_aside(), None, "the rest of it is good");
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
    let detail = writer.take_aside().expect("it is moved away").detail;
    assert!(detail.contains("layout 1") && detail.contains("cursor"), "{detail}");
    assert_eq!(writer.append(&mut vec![event(10)]).unwrap().first, 1);
}
