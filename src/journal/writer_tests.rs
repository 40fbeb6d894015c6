//! The promises of a journal inside one process; those across processes are integration tests.

use std::os::unix::fs::FileExt;

use tempfile::TempDir;

use super::*;
use crate::{
    event::Kind,
    journal::{filter::Filter, read::Reader},
};

fn folder() -> (TempDir, PathBuf) {
    let it = tempfile::tempdir().unwrap();
    let path = it.path().join("sub/journal.db");
    (it, path)
}

fn event(bytes: usize) -> Event {
    Event {
        kind: Kind::FrameClassified,
        stream: Some("front".into()),
        source: "/ghostwatch/t/streams/front".into(),
        time: SystemTime::now(),
        data: format!("{{\"pad\":\"{}\"}}", "x".repeat(bytes)),
    }
}

fn append(writer: &mut Writer, count: usize) -> Committed {
    let mut events = vec![event(900); count];
    let it = writer.append(&mut events).unwrap();
    assert!(events.is_empty());
    it
}

fn open(path: &Path) -> Writer {
    Writer::open(path, Retain::default()).unwrap()
}

fn page(path: &Path, after: u64) -> crate::journal::read::Page {
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
    assert_eq!((page.cursor, page.expired), (6, None));
    assert!(page.records[4].json.contains(&format!("\"id\":\"{id}-00000000000000000005\"")));
}

#[test]
fn numbers_never_repeat_after_all_events_have_expired() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 100);
    writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
    while writer.maintain().unwrap() {}
    assert_eq!(
        (writer.stats().oldest, writer.stats().next, writer.stats().expired),
        (101, 101, 100)
    );
    drop(writer);
    let reader = Reader::open(&path).unwrap();
    assert_eq!((reader.oldest().unwrap(), reader.latest().unwrap()), (101, 100));
    assert_eq!(
        page(&path, 40),
        crate::journal::read::Page { records: vec![], cursor: 100, expired: Some((41, 100)) }
    );
    let mut writer = open(&path);
    assert_eq!(append(&mut writer, 1), Committed { first: 101, last: 101 });
    assert_eq!(page(&path, 100).expired, None);
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
    assert_eq!(stats.expired, stats.oldest - 1);
    assert!(stats.next - stats.oldest > 1000, "{stats:?} keeps what fits");
    let page = page(&path, 7);
    assert_eq!(page.expired, Some((8, stats.oldest - 1)));
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
fn a_later_layout_and_foreign_files_are_refused_with_exit_code_4() {
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
    let check = |what: &str| {
        let error = Writer::open(&path, Retain::default()).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{what}: {error}");
        assert_eq!(error.exit_code(), 4);
    };
    check("a database of something else");
    assert!(fs::read(&path).unwrap() == before, "it is left as it was");
    fs::write(&path, "not a database at all, but long enough to look at. ".repeat(100)).unwrap();
    check("text");
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
fn garbage_in_the_middle_is_noticed_at_open() {
    let (_folder, path) = folder();
    let mut writer = open(&path);
    append(&mut writer, 256);
    drop(writer);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let middle = file.metadata().unwrap().len() / PAGE_BYTES / 2 * PAGE_BYTES;
    file.write_all_at(&[0xa5; PAGE_BYTES as usize], middle).unwrap();
    let error = Writer::open(&path, Retain::default()).unwrap_err();
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
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
