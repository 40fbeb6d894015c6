//! The promises of a journal inside one process; those across processes are integration tests.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::{
    event::{GapReason, Kind},
    journal::{
        LAYOUT,
        filter::Filter,
        open::ulid,
        read::{Gap, Reader},
    },
};

pub(super) fn folder() -> (TempDir, PathBuf) {
    let it = tempfile::tempdir().unwrap();
    let path = it.path().join("sub/journal.db");
    (it, path)
}

fn expired(first: u64, last: u64) -> Option<Gap> {
    Some(Gap { first, last, reason: GapReason::Expired })
}

fn event(bytes: usize) -> Event {
    Event {
        kind: Kind::FrameClassified,
        stream: Some("front".into()),
        epoch: Some(0),
        source: "/ghostwatch/t/streams/front".into(),
        time: SystemTime::now(),
        data: format!("{{\"pad\":\"{}\"}}", "x".repeat(bytes)),
    }
}

pub(super) fn append(writer: &mut Writer, count: usize) -> Committed {
    let mut events = vec![event(900); count];
    let it = writer.append(&mut events).unwrap();
    assert!(events.is_empty());
    it
}

fn open(path: &Path) -> Writer {
    Writer::open(path, Retain::default()).unwrap()
}

pub(super) fn page(path: &Path, after: u64) -> crate::journal::read::Page {
    Reader::open(path).unwrap().page(after, &Filter::default(), 1000).unwrap()
}

#[test]
fn numbers_are_contiguous_from_one_and_go_on_after_a_restart() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    assert_eq!(append(&mut writer, 3), Committed { first: 1, last: 3 });
    assert_eq!(append(&mut writer, 1), Committed { first: 4, last: 4 });
    let id = writer.id().to_owned();
    drop(writer);
    let mut writer = open(&path);
    assert_eq!(writer.id(), id);
    assert_eq!(append(&mut writer, 2), Committed { first: 5, last: 6 });
    let page = page(&path, 0);
    assert_eq!(page.records.iter().map(|it| it.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!((page.cursor, page.gap), (6, None));
    assert!(page.records[4].json.contains(&format!("\"id\":\"{id}-00000000000000000005\"")));
}

#[test]
fn numbers_never_repeat_after_all_events_have_expired() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 100);
    writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
    while writer.maintain().unwrap() {}
    assert_eq!((writer.stats().oldest, writer.stats().next, writer.stats().lost), (101, 101, 0));
    drop(writer);
    let reader = Reader::open(&path).unwrap();
    assert_eq!((reader.oldest().unwrap(), reader.latest().unwrap()), (101, 100));
    assert_eq!(
        page(&path, 40),
        crate::journal::read::Page { records: vec![], cursor: 100, gap: expired(41, 100) }
    );
    let mut writer = open(&path);
    assert_eq!(append(&mut writer, 1), Committed { first: 101, last: 101 });
    assert_eq!(page(&path, 100).gap, None);
}

#[test]
fn retention_by_bytes_bounds_the_file_and_reports_what_expired() {
    let (_folder, path) = folder();
    let bytes = 2 << 20;
    let mut writer =
        Writer::open(&path, Retain { bytes: Some(bytes), ..Retain::default() }).unwrap();
    for _ in 0..100 {
        append(&mut writer, 100);
    }
    let stats = writer.stats();
    assert!(stats.size_bytes <= bytes + 200 * 1024, "{stats:?}");
    assert_eq!(stats.next, 10_001);
    assert_eq!(stats.lost, 0, "no sink wanted them");
    assert!(stats.next - stats.oldest > 1000, "{stats:?} keeps what fits");
    let page = page(&path, 7);
    assert_eq!(page.gap, expired(8, stats.oldest - 1));
    assert_eq!(page.records[0].seq, stats.oldest);
    drop(writer);
    assert!(fs::metadata(&path).unwrap().len() <= bytes + 512 * 1024);
}

#[test]
fn a_full_disk_refuses_events_and_takes_them_again_when_there_is_space() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 10);
    let pages = pragma(&writer.connection, "page_count").unwrap();
    writer.connection.execute_batch(&format!("PRAGMA max_page_count={}", pages + 2)).unwrap();
    let mut events = vec![event(900); 100];
    let error = writer.append(&mut events).unwrap_err();
    assert!(matches!(error, JournalError::Full { .. }), "{error}");
    assert!(error.is_temporary());
    assert_eq!(events.len(), 100, "the caller keeps what was refused");
    assert_eq!(page(&path, 0).cursor, 10);
    writer.connection.execute_batch("PRAGMA max_page_count=1000000").unwrap();
    assert_eq!(writer.append(&mut events).unwrap(), Committed { first: 11, last: 110 });
}

#[test]
fn keep_free_gives_history_back_and_then_refuses() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    for _ in 0..20 {
        append(&mut writer, 256);
    }
    let before = fs::metadata(&path).unwrap().len();
    writer.free_space = |_| Ok(1000);
    writer.set_retain(Retain { keep_free: 1001, ..Retain::default() });
    while writer.maintain().unwrap() {}
    assert!(fs::metadata(&path).unwrap().len() < before / 10);
    let error = writer.append(&mut vec![event(10)]).unwrap_err();
    assert!(error.to_string().contains("keep_free = 1001"), "{error}");
    writer.free_space = |_| Ok(1001);
    writer.looked = None;
    assert_eq!(append(&mut writer, 1).first, 20 * 256 + 1);
}

#[test]
fn a_second_writer_is_refused_with_the_owner_s_process_id() {
    let (_folder, path) = folder();
    let writer = open(&path);
    let error = Writer::open(&path, Retain::default()).unwrap_err();
    assert!(error.to_string().contains(&format!("process {};", std::process::id())), "{error}");
    assert_eq!(error.exit_code(), 1);
    drop(writer);
    open(&path);
}

#[test]
fn a_copied_or_restored_journal_takes_a_new_id() {
    let (folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 3);
    let id = writer.id().to_owned();
    drop(writer);
    let copy = folder.path().join("copy.db");
    fs::copy(&path, &copy).unwrap();
    let mut writer = open(&copy);
    assert_ne!(writer.id(), id);
    assert_eq!(append(&mut writer, 1).first, 4);
    assert!(page(&copy, 2).records[0].json.contains(&id), "old events keep their ids");
    drop(writer);

    let backup = fs::read(&path).unwrap();
    append(&mut open(&path), 1);
    fs::write(&path, backup).unwrap();
    assert_ne!(open(&path).id(), id, "put back in place");
}

#[test]
fn a_later_layout_and_a_database_of_others_are_refused_with_exit_code_4() {
    let (_folder, path) = folder();
    drop(open(&path));
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    for error in
        [Writer::open(&path, Retain::default()).unwrap_err(), Reader::open(&path).unwrap_err()]
    {
        assert!(matches!(error, JournalError::TooNew { found: 99, .. }), "{error}");
        assert_eq!(error.exit_code(), 4);
    }
    fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE notes (it)").unwrap();
    let before = fs::read(&path).unwrap();
    let error = Writer::open(&path, Retain::default()).unwrap_err();
    assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
    assert_eq!(error.exit_code(), 4);
    assert!(fs::read(&path).unwrap() == before, "it is left as it was");
}

#[test]
fn a_damaged_journal_is_moved_away_and_a_new_one_begun() {
    let (folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 256);
    let id = writer.id().to_owned();
    drop(writer);
    let whole = fs::read(&path).unwrap();
    let check = |what: &str, round: usize, content: &[u8]| {
        fs::write(&path, content).unwrap();
        let mut writer = open(&path);
        let loss = writer.take_loss().unwrap_or_else(|| panic!("{what}: noticed at open"));
        assert_eq!(fs::read(loss.moved_to.unwrap()).unwrap(), content, "{what}: kept as it was");
        assert_ne!(writer.id(), id, "{what}: the numbers begin anew, so the id must");
        assert_eq!(append(&mut writer, 1).first, 1, "{what}");
        assert_eq!(page(&path, 0).records.len(), 1, "{what}");
        drop(writer);
        let files = fs::read_dir(folder.path().join("sub")).unwrap();
        let aside = files
            .filter(|it| it.as_ref().unwrap().file_name().to_string_lossy().contains("damaged"));
        assert_eq!(aside.count(), round, "{what}: each is kept");
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut it = whole.clone();
        it[at..at + bytes.len()].copy_from_slice(bytes);
        it
    };
    let middle = whole.len() / PAGE_BYTES as usize / 2 * PAGE_BYTES as usize;
    check("garbage in the middle", 1, &with(middle, &[0xa5; PAGE_BYTES as usize]));
    check("a tail of zeros", 2, &with(middle, &vec![0; whole.len() - middle]));
    check("text", 3, "not a database at all, but long enough to look at. ".repeat(100).as_bytes());
}

#[test]
fn an_event_with_a_flipped_bit_is_a_gap_and_its_neighbours_are_not() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 6);
    drop(writer);
    // SQLite has no checksums: this is what a flipped bit looks like to it.
    let flip = "UPDATE event SET json = replace(json, 'xxxx', 'xxxy') WHERE seq IN (1, 2, 4)";
    Connection::open(&path).unwrap().execute_batch(flip).unwrap();
    let damaged = |first, last| Some(Gap { first, last, reason: GapReason::Damaged });
    let look = |after| {
        let it = page(&path, after);
        (it.gap, it.records.iter().map(|it| it.seq).collect::<Vec<_>>(), it.cursor)
    };
    assert_eq!(look(0), (damaged(1, 2), vec![3], 3));
    assert_eq!(look(3), (damaged(4, 4), vec![5, 6], 6));
    assert_eq!(look(4), (None, vec![5, 6], 6));
    assert_eq!(open(&path).take_loss(), None, "the rest of it is good");
}

#[test]
fn a_hole_is_a_gap_with_its_range_and_the_journal_is_kept() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 10);
    drop(writer);
    // Rows that are gone, one that is damaged beside them, and new ones that were lost at the end.
    let spoil = "DELETE FROM event WHERE seq IN (4, 5);
                 UPDATE event SET kind = 'x', json = replace(json, 'xxxx', 'xxxy') WHERE seq = 6;
                 DELETE FROM event WHERE seq = 9;
                 INSERT OR REPLACE INTO meta VALUES ('next', 13)";
    Connection::open(&path).unwrap().execute_batch(spoil).unwrap();
    let damaged = |first, last| Some(Gap { first, last, reason: GapReason::Damaged });
    let look = |after, filter: &Filter| {
        let it = Reader::open(&path).unwrap().page(after, filter, 1000).unwrap();
        (it.gap, it.records.iter().map(|it| it.seq).collect::<Vec<_>>(), it.cursor)
    };
    let all = Filter::default();
    assert_eq!(look(0, &all), (None, vec![1, 2, 3], 3));
    assert_eq!(look(3, &all), (damaged(4, 6), vec![7, 8], 8));
    assert_eq!(look(8, &all), (damaged(9, 9), vec![10], 10));
    assert_eq!(look(10, &all), (damaged(11, 12), vec![], 12));
    let json = Reader::open(&path).unwrap().gap_event(&damaged(4, 6).unwrap()).unwrap();
    assert!(json.contains("\"source\":\"/ghostwatch/t\""), "as the daemon's own events: {json}");
    let other = Filter { streams: vec!["yard".into()], ..Filter::default() };
    assert_eq!(look(0, &other), (damaged(4, 6), vec![], 8), "what is filtered out is no gap");
    assert_eq!(Reader::open(&path).unwrap().back(5, &all).unwrap(), 1, "2, 3, 7, 8 and 10");
    let mut writer = open(&path);
    assert_eq!(writer.take_loss(), None, "it is kept");
    assert_eq!(append(&mut writer, 1).first, 13);
    assert_eq!(look(10, &all), (damaged(11, 12), vec![13], 13));
}

#[test]
fn a_journal_of_layout_1_is_upgraded_and_keeps_its_events_and_epochs() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    let id = writer.id().to_owned();
    let mut first = event(10);
    first.data = "{\"epoch\":7}".to_owned();
    writer.append(&mut vec![first, event(10)]).unwrap();
    drop(writer);
    let downgrade = "DROP TABLE epoch; DROP TABLE cursor; ALTER TABLE event DROP COLUMN crc;
                     PRAGMA user_version = 1";
    Connection::open(&path).unwrap().execute_batch(downgrade).unwrap();
    assert_eq!(page(&path, 0).records.len(), 2, "it can be read as it is");
    let mut writer = open(&path);
    assert_eq!(writer.id(), id);
    assert_eq!(writer.take_loss(), None);
    append(&mut writer, 1);
    let reader = Reader::open(&path).unwrap();
    assert_eq!(pragma(&writer.connection, "user_version").unwrap() as i64, LAYOUT);
    assert_eq!(reader.last_epoch("front").unwrap(), Some(0), "the one appended last");
    assert_eq!(page(&path, 0).records.len(), 3);
}

#[test]
fn a_sinks_cursor_outlives_the_writer_and_never_passes_the_last_event() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 10);
    let cursor = writer.cursor("nats").unwrap();
    assert_eq!(cursor.get(), 10, "a new sink begins after what is there");
    append(&mut writer, 10);
    cursor.advance(15);
    cursor.advance(12);
    assert!(!writer.maintain().unwrap(), "saved, and nothing is left to do");
    drop(writer);
    let mut writer = open(&path);
    let cursor = writer.cursor("nats").unwrap();
    assert_eq!(cursor.get(), 15);
    cursor.advance(20);
    append(&mut writer, 1);
    drop(writer);
    // As if the newest events had been lost, which a copy put back looks like.
    Connection::open(&path).unwrap().execute_batch("DELETE FROM event WHERE 18 < seq").unwrap();
    assert_eq!(open(&path).cursor("nats").unwrap().get(), 18);
}

#[test]
fn what_retention_takes_from_a_sink_is_told_before_and_counted_after() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    let (quick, slow) = (writer.cursor("quick").unwrap(), writer.cursor("slow").unwrap());
    append(&mut writer, 100);
    quick.advance(100);
    slow.advance(40);
    let names = |it: &Writer| -> Vec<String> {
        it.newly_at_risk().iter().map(|it| it.sink().to_owned()).collect()
    };
    let age = |it| Retain { age: Some(it), ..Retain::default() };
    writer.set_retain(age(Duration::from_secs(3600)));
    assert_eq!(names(&writer), Vec::<String>::new());
    writer.set_retain(age(Duration::from_nanos(1)));
    assert_eq!(names(&writer), ["slow"]);
    assert!(slow.is_at_risk() && !quick.is_at_risk());
    assert_eq!(names(&writer), Vec::<String>::new(), "told once");
    while writer.maintain().unwrap() {}
    assert_eq!((writer.stats().oldest, writer.stats().lost), (101, 60));
}

#[test]
fn each_failure_of_sqlite_says_whether_to_go_on() {
    use rusqlite::ffi;
    let (folder, _) = folder();
    let check = |code, temporary, exit_code| {
        let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
        let error = JournalError::of(&folder.path().join("journal.db"), &error);
        assert_eq!((error.is_temporary(), error.exit_code()), (temporary, exit_code), "{error:?}");
    };
    check(ffi::SQLITE_FULL, true, 1);
    check(ffi::SQLITE_READONLY, true, 1);
    check(ffi::SQLITE_CANTOPEN, true, 1);
    check(ffi::SQLITE_BUSY, true, 1);
    check(ffi::SQLITE_IOERR_SHMSIZE, true, 1);
    check(ffi::SQLITE_IOERR_FSYNC, false, 1);
    check(ffi::SQLITE_IOERR_READ, false, 1);
    check(ffi::SQLITE_IOERR_WRITE, false, 1);
    check(ffi::SQLITE_CORRUPT, false, 4);
    check(ffi::SQLITE_NOTADB, false, 4);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the probe is gone");
}

#[test]
fn a_reader_of_what_is_not_there_yet_says_so() {
    let (folder, path) = folder();
    let empty = folder.path().join("empty.db");
    fs::write(&empty, "").unwrap();
    for it in [path, empty] {
        let error = Reader::open(&it).unwrap_err();
        assert!(matches!(error, JournalError::Missing { .. }), "{error}");
    }
}

#[test]
fn the_log_stays_bounded_under_readers_that_never_pause() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 1);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut reader = Reader::open(&path).unwrap();
                let mut cursor = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let page = reader.page(cursor, &Filter::default(), 100).unwrap();
                    cursor = if page.records.is_empty() { 0 } else { page.cursor };
                }
            });
        }
        for _ in 0..250 {
            append(&mut writer, 256);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let log = fs::metadata(crate::journal::beside(&path, "-wal")).unwrap().len();
    assert!(log <= 2 * RESTART_PAGES * (PAGE_BYTES + 24), "the log has {log} bytes");
}

#[test]
fn a_reader_that_stays_makes_one_append_in_many_wait_and_the_log_starts_over_after_it() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 1);
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    let log = |it: &Writer| checkpoint(&it.connection, "PASSIVE").unwrap();
    while log(&writer) < RESTART_PAGES + CHECKPOINT_PAGES {
        append(&mut writer, 256);
        let pages = writer.log_pages;
        assert!(pages < CHECKPOINT_PAGES, "the next append waits too: {pages} pages");
    }
    other.execute_batch("COMMIT").unwrap();
    while RESTART_PAGES <= log(&writer) {
        assert!(log(&writer) < RESTART_PAGES + 4 * CHECKPOINT_PAGES, "it never starts over");
        append(&mut writer, 256);
    }
}

#[test]
fn back_finds_the_last_events_that_the_filter_lets_through() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 600);
    let mut other = event(1);
    other.stream = Some("yard".into());
    writer.append(&mut vec![other]).unwrap();
    append(&mut writer, 300);
    let mut reader = Reader::open(&path).unwrap();
    let yard = Filter { streams: vec!["yard".into()], ..Filter::default() };
    assert_eq!(reader.back(0, &Filter::default()).unwrap(), 901);
    assert_eq!(reader.back(10, &Filter::default()).unwrap(), 891);
    assert_eq!(reader.back(10_000, &Filter::default()).unwrap(), 0);
    assert_eq!(reader.back(1, &yard).unwrap(), 600);
    assert_eq!(reader.back(2, &yard).unwrap(), 0);
}

#[test]
fn journal_ids_are_ulids_that_differ() {
    let (a, b) = (ulid().unwrap(), ulid().unwrap());
    assert_ne!(a, b);
    assert_eq!(a.len(), 26);
    assert_eq!(a[..8], b[..8], "the time comes first");
    assert!(a.starts_with("01"), "{a}: this century");
}
