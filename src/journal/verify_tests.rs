//! Each kind of damage is found, with the event that it is in, and nothing is found in a good journal.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rusqlite::Connection;

use super::*;
use crate::{
    event::Event,
    journal::{
        backup::{BackupError, backup},
        filter::Filter,
        retain::Retain,
        summary::{Tally, summary},
        writer::Writer,
    },
};

fn journal() -> (tempfile::TempDir, PathBuf, Writer) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let writer = Writer::open(&path, Retain::default()).unwrap();
    (folder, path, writer)
}

fn frame(stream: &str, epoch: u64, frame: u64, skipped: u64) -> Event {
    Event {
        kind: Kind::FrameClassified,
        stream: Some(stream.into()),
        epoch: Some(epoch),
        source: "/ghostwatch/t".into(),
        time: SystemTime::now(),
        data: format!(
            r#"{{"stream":"{stream}","region":"default","epoch":{epoch},"frame":{frame},"skipped":{{"rate":{skipped}}},"pad":"{}"}}"#,
            "x".repeat(700)
        ),
    }
}

fn ended(stream: &str, epoch: u64, frame: u64, skipped: u64) -> Event {
    let data = format!(
        r#"{{"stream":"{stream}","state":"down","epoch":{epoch},"frame":{frame},"skipped":{{"rate":{skipped}}}}}"#
    );
    Event { kind: Kind::StreamState, data, ..self::frame(stream, epoch, 0, 0) }
}

fn findings(path: &Path, depth: Depth) -> (Verdict, Vec<String>) {
    let mut all = Vec::new();
    let verdict = verify(path, depth, |_, _| (), |it| all.push(it.to_string())).unwrap();
    (verdict, all)
}

fn change(path: &Path, sql: &str) {
    Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn a_good_journal_has_no_findings() {
    let (_folder, path, mut writer) = journal();
    let mut events = vec![frame("a", 0, 0, 0), frame("a", 0, 3, 2), frame("b", 7, 1, 1)];
    events.extend([frame("a", 0, 4, 0), ended("a", 0, 6, 2), frame("a", 1, 1, 1)]);
    writer.append(&mut events).unwrap();
    for depth in [Depth::Quick, Depth::Full] {
        let good = Verdict { events: 6, damage: 0, notes: 0 };
        assert_eq!(findings(&path, depth), (good, vec![]));
    }
}

#[test]
fn an_empty_journal_and_one_whose_events_have_expired_are_good() {
    let (_folder, path, mut writer) = journal();
    assert_eq!(findings(&path, Depth::Full).0, Verdict::default());
    writer.append(&mut vec![frame("a", 0, 0, 0); 20]).unwrap();
    writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
    while writer.maintain().unwrap() {}
    writer.set_retain(Retain::default());
    assert_eq!(findings(&path, Depth::Full).0, Verdict::default());
    writer.append(&mut vec![frame("a", 0, 9, 0)]).unwrap();
    assert_eq!(findings(&path, Depth::Full).0, Verdict { events: 1, damage: 0, notes: 0 });
}

#[test]
fn frames_that_do_not_add_up_are_told_but_are_no_damage() {
    let (_folder, path, mut writer) = journal();
    let mut events = vec![frame("a", 1, 0, 0), frame("a", 1, 2, 0), frame("a", 1, 3, 0)];
    events.extend([ended("a", 1, 5, 1), frame("a", 2, 1, 0), frame("a", 1, 6, 0)]);
    writer.append(&mut events).unwrap();
    let (verdict, all) = findings(&path, Depth::Full);
    assert_eq!((verdict.damage, verdict.notes), (0, 4), "{all:?}");
    assert!(all[0].starts_with("event 2: stream a, epoch 1: frame 2 after 1 frames"), "{all:?}");
    assert!(all[1].starts_with("event 4: ") && all[2].starts_with("event 5: "), "{all:?}");
    assert_eq!(all[3], "event 6: epoch 1 comes after epoch 2");
}

#[test]
fn every_change_of_a_row_is_found_with_its_number() {
    let check = |sql: &str, depth, expected: &str| {
        let (_folder, path, mut writer) = journal();
        let mut events: Vec<_> = (0..30).map(|it| frame("a", 0, it, 0)).collect();
        writer.append(&mut events).unwrap();
        drop(writer);
        change(&path, sql);
        let (verdict, all) = findings(&path, depth);
        assert_eq!((verdict.damage, verdict.notes), (1, 0), "{sql}: {all:?}");
        assert_eq!(all[0], expected, "{sql}");
    };
    let sum = "not what was appended, its checksum differs";
    let text = "UPDATE event SET json = replace(json, 'xxx', 'xyx') WHERE seq = 7";
    check(text, Depth::Quick, &format!("event 7: {sum}"));
    check("UPDATE event SET stream = 'b' WHERE seq = 8", Depth::Full, &format!("event 8: {sum}"));
    check("UPDATE event SET kind = 2 WHERE seq = 9", Depth::Full, &format!("event 9: {sum}"));
    let hole = "events 11 to 13: missing from the sequence";
    check("DELETE FROM event WHERE seq BETWEEN 11 AND 13", Depth::Full, hole);
    let other = "stream a has events of epoch 0, the table of epochs says nothing";
    check("DELETE FROM epoch", Depth::Full, other);
}

#[test]
fn what_the_writer_itself_got_wrong_is_found_although_its_checksum_is_right() {
    let (_folder, path, mut writer) = journal();
    writer
        .append(&mut vec![frame("a", 0, 0, 0), frame("a", 0, 1, 0), frame("a", 0, 2, 0)])
        .unwrap();
    drop(writer);
    let connection = Connection::open(&path).unwrap();
    let put = |seq: u64, json: &str| {
        let sum = crate::journal::crc(seq, 1, Some(b"a"), json.as_bytes());
        let set = "UPDATE event SET json = ?2, crc = ?3 WHERE seq = ?1";
        connection.execute(set, params![seq as i64, json, sum]).unwrap();
    };
    put(2, "{not json");
    put(
        3,
        r#"{"id":"x-00000000000000000003","sequence":"00000000000000000004","subject":"b","type":"t","data":{}}"#,
    );
    let (_, all) = findings(&path, Depth::Full);
    assert!(all[0].starts_with("event 2: not JSON"), "{all:?}");
    for (at, name) in
        [(1, "its sequence is"), (2, "its subject is"), (3, "its type is"), (4, "its id")]
    {
        assert!(all[at].starts_with(&format!("event 3: {name}")), "{all:?}");
    }
    assert_eq!(all.len(), 5, "{all:?}");
}

#[test]
fn garbage_in_a_page_is_found_and_the_rest_is_read() {
    let (_folder, path, mut writer) = journal();
    for start in (0..2000).step_by(200) {
        writer.append(&mut (start..start + 200).map(|it| frame("a", 0, it, 0)).collect()).unwrap();
    }
    drop(writer);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 8192 / 2 * 8192;
    bytes[middle..middle + 8192].fill(0xa5);
    fs::write(&path, bytes).unwrap();
    let (verdict, all) = findings(&path, Depth::Full);
    assert!(all.iter().any(|it| it.starts_with("structure: ")), "{all:?}");
    assert!(all.iter().any(|it| it.contains("cannot be read, the page")), "{all:?}");
    assert!(1900 < verdict.events && verdict.events < 2000, "{verdict:?}");
}

#[test]
fn a_backup_is_whole_replaces_nothing_unasked_and_takes_a_new_id_when_it_is_written_to() {
    let (folder, path, mut writer) = journal();
    writer.append(&mut (0..3000).map(|it| frame("a", 0, it, 0)).collect()).unwrap();
    let to = folder.path().join("copy.db");
    let verdict = backup(&path, &to, false, |_, _| ()).unwrap();
    assert_eq!(verdict, Verdict { events: 3000, damage: 0, notes: 0 });
    let again = backup(&path, &to, false, |_, _| ());
    assert!(matches!(again, Err(BackupError::Exists { .. })), "{again:?}");
    let itself = backup(&path, &path, true, |_, _| ());
    assert!(matches!(itself, Err(BackupError::InUse { .. })), "{itself:?}");
    // The original goes on; the copy is put to use on its own.
    writer.append(&mut vec![frame("a", 0, 3000, 0)]).unwrap();
    let mut copy = Writer::open(&to, Retain::default()).unwrap();
    assert_ne!(copy.id(), writer.id());
    copy.append(&mut vec![frame("a", 1, 0, 0)]).unwrap();
    let in_use = backup(&path, &to, true, |_, _| ());
    assert!(matches!(in_use, Err(BackupError::InUse { .. })), "{in_use:?}");
    let id = |path: &Path, after| {
        let page = Reader::open(path).unwrap().page(after, &Filter::default(), 1).unwrap();
        let event: Value = serde_json::from_str(&page.records[0].json).unwrap();
        event["id"].as_str().unwrap().to_owned()
    };
    assert_eq!(id(&to, 2999), id(&path, 2999), "an old event keeps its id");
    assert!(id(&to, 3000).starts_with(copy.id()) && id(&path, 3000).starts_with(writer.id()));
    assert_eq!(findings(&to, Depth::Full).0.damage, 0);
    drop(copy);
    backup(&path, &to, true, |_, _| ()).unwrap();
    assert_eq!(Reader::open(&to).unwrap().latest().unwrap(), 3001);
    let names = fs::read_dir(folder.path()).unwrap();
    let part = |it: &String| it.contains(".part");
    let left = names.map(|it| it.unwrap().file_name().into_string().unwrap()).find(part);
    assert_eq!(left, None);
}

#[test]
fn a_damaged_journal_gives_no_backup() {
    let (folder, path, mut writer) = journal();
    writer.append(&mut (0..30).map(|it| frame("a", 0, it, 0)).collect()).unwrap();
    change(&path, "UPDATE event SET json = replace(json, 'xxx', 'xyx') WHERE seq = 7");
    let to = folder.path().join("copy.db");
    let error = backup(&path, &to, false, |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("event 7: "), "{error}");
    assert!(!to.exists());
}

#[test]
fn a_summary_counts_what_is_there() {
    let (_folder, path, mut writer) = journal();
    let cursor = writer.cursor("nats").unwrap();
    writer.append(&mut (0..5000).map(|it| frame("a", 0, it, 0)).collect()).unwrap();
    cursor.advance(4000);
    writer.append(&mut vec![ended("b", 0, 0, 1), frame("b", 1, 0, 0)]).unwrap();
    let reader = Reader::open(&path).unwrap();
    let it = summary(&reader, u64::MAX, |_, _| ()).unwrap();
    assert_eq!((it.oldest, it.next, it.counted_from, it.layout), (1, 5003, 1, 2));
    assert_eq!((it.last_minute, it.last_hour), (5002, 5002));
    assert_eq!(it.streams["a"], Tally { count: 5000, first: 1, last: 5000 });
    assert_eq!(it.streams["b"], Tally { count: 2, first: 5001, last: 5002 });
    let states = Tally { count: 1, first: 5001, last: 5001 };
    assert_eq!(it.kinds["io.ghostwatch.stream.state.v1"], states);
    assert_eq!((it.sinks[0].cursor, it.sinks[0].lag), (4000, 1002));
    let newest = summary(&reader, 2, |_, _| ()).unwrap();
    assert_eq!((newest.counted_from, newest.streams.len()), (5001, 1));
    drop(writer);
    // Half of the events become two minutes old, the others stay.
    change(&path, "UPDATE event SET appended_us = appended_us - 120000000 WHERE seq <= 2500");
    let it = summary(&Reader::open(&path).unwrap(), 0, |_, _| ()).unwrap();
    assert_eq!((it.last_minute, it.last_hour, it.kinds.len()), (2502, 5002, 0));
}
