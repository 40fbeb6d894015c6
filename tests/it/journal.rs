//! The journal across processes: a killed writer, a cut power cord, a reader elsewhere.
//!
//! The writer process is this test binary once more, told by the environment to write.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    event::{Event, Kind},
    journal::{
        JournalError,
        filter::Filter,
        read::{Reader, Record},
        retain::Retain,
        writer::Writer,
    },
};

use crate::support::size;

const JOURNAL: &str = "GHOSTWATCH_TEST_JOURNAL";
const RATE: &str = "GHOSTWATCH_TEST_RATE";

pub(crate) fn event(number: u64) -> Event {
    Event {
        kind: Kind::FrameClassified,
        stream: Some("front".into()),
        epoch: Some(0),
        source: "/ghostwatch/t/streams/front".into(),
        time: SystemTime::now(),
        data: format!("{{\"number\":{number},\"pad\":\"{}\"}}", "x".repeat(800)),
    }
}

/// Not a test but the writer process, when the environment says so: appends commits of 1 to 7
/// events at about the given rate until it is killed, and reports each commit on standard output.
#[test]
fn writer_process() {
    let Some(path) = env::var_os(JOURNAL) else {
        return;
    };
    let rate: f64 = env::var(RATE).expect("a rate").parse().expect("a number");
    let mut writer = Writer::open(Path::new(&path), Retain::default()).expect("opens");
    let start = Instant::now();
    let (mut appended, mut count) = (0, 0);
    loop {
        count = count % 7 + 1;
        let mut events: Vec<_> = (0..count).map(event).collect();
        println!("appending {count}");
        let done = writer.append(&mut events).expect("appends");
        appended += count;
        println!("committed {} {}", done.last, nanos());
        let due = Duration::from_secs_f64(appended as f64 / rate);
        // This is the rate of a source, not waiting for something to happen.
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
}

fn nanos() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos()
}

pub(crate) fn start_writer(path: &Path, rate: f64) -> Child {
    Command::new(env::current_exe().expect("the test binary"))
        .args(["writer_process", "--nocapture", "--test-threads=1"])
        .env(JOURNAL, path)
        .env(RATE, rate.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the writer process starts")
}

pub(crate) fn open_reader(path: &Path) -> Reader {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Reader::open(path) {
            Ok(it) => return it,
            // The writer process is still making the file.
            Err(error) => assert!(Instant::now() < deadline, "no journal: {error}"),
        }
        std::thread::yield_now();
    }
}

fn id(record: &Record) -> String {
    let event: serde_json::Value = serde_json::from_str(&record.json).expect("JSON");
    event["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_killed_writer_loses_nothing_that_a_reader_has_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("journal.db");
    let mut seen: Vec<Record> = Vec::new();
    let mut cursor = 0;
    let (rounds, mut in_commit, mut slowest) = (size(20, 1000u64), 0, Duration::ZERO);
    for round in 0..rounds {
        let begin = Instant::now();
        let mut writer = start_writer(&path, 1000.0);
        let mut reader = open_reader(&path);
        if cursor == 0 || reader.latest().expect("readable") <= cursor {
            // The writer process is up and the journal open when something new is there.
            while reader.page(cursor, &Filter::default(), 1).expect("a page").records.is_empty() {
                reader.wait(Duration::from_millis(10));
            }
        }
        slowest = slowest.max(begin.elapsed());
        // As many events as it takes, then a moment that differs from round to round.
        let enough = seen.len() + 50 + (round * 7919 % 97) as usize;
        let end = Instant::now() + Duration::from_millis(round * 7919 % 200);
        while seen.len() < enough || Instant::now() < end {
            reader.wait(Duration::from_millis(100));
            let page = reader.page(cursor, &Filter::default(), 100).expect("a page");
            assert_eq!(page.gap, None, "round {round}");
            cursor = page.cursor;
            seen.extend(page.records);
        }
        writer.kill().expect("the writer can be killed");
        let output = writer.wait_with_output().expect("the writer has ended").stdout;
        let output = String::from_utf8_lossy(&output);
        in_commit += u64::from(output.lines().last().is_some_and(|it| it.contains("appending")));
    }
    drop(Writer::open(&path, Retain::default()).expect("opens after the last kill"));
    let mut reader = Reader::open(&path).expect("opens");
    let mut after = Vec::new();
    let mut at = 0;
    loop {
        let page = reader.page(at, &Filter::default(), 1000).expect("a page");
        if page.cursor == at {
            break;
        }
        at = page.cursor;
        after.extend(page.records);
    }
    assert!(seen.len() <= after.len() && after[..seen.len()] == seen[..], "a seen event changed");
    let mut ids = HashMap::new();
    for (it, seq) in after.iter().zip(1..) {
        assert_eq!(it.seq, seq, "no hole, in order");
        assert_eq!(ids.insert(id(it), seq), None, "an id was given twice");
    }
    println!(
        "{rounds} kills, {in_commit} of them inside an append; {} events seen, {} there; the first \
         event after a start came after at most {} ms",
        seen.len(),
        after.len(),
        slowest.as_millis(),
    );
    assert!(50 * rounds <= seen.len() as u64, "only {} events were seen", seen.len());
    assert!(rounds * 3 / 100 <= in_commit, "{in_commit} of {rounds} kills met an append");
}

#[test]
fn an_event_is_visible_to_another_process_within_5_ms() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("journal.db");
    let mut writer = start_writer(&path, 100.0);
    let mut reader = open_reader(&path);
    let mut cursor = reader.latest().expect("readable");
    let mut arrived = HashMap::new();
    while arrived.len() < size(60, 1000) {
        reader.wait(Duration::from_secs(1));
        let page = reader.page(cursor, &Filter::default(), 100).expect("a page");
        cursor = page.cursor;
        if let Some(it) = page.records.last() {
            arrived.insert(it.seq, nanos());
        }
    }
    writer.kill().expect("the writer can be killed");
    writer.wait().expect("the writer has ended");
    let output = BufReader::new(writer.stdout.take().expect("piped"));
    let mut late: Vec<f64> = Vec::new();
    for line in output.lines() {
        let line = line.expect("text");
        let words: Vec<_> = line.split_whitespace().collect();
        if let [.., "committed", last, at] = words[..]
            && let Some(seen) = arrived.get(&last.parse::<u64>().expect("a number"))
        {
            late.push((*seen as f64 - at.parse::<f64>().expect("a number")) / 1e6);
        }
    }
    late.sort_by(f64::total_cmp);
    let median = late[late.len() / 2];
    println!("{} commits, visible after the commit: median {median:.2} ms", late.len());
    assert!(30 <= late.len(), "{} commits were matched", late.len());
    assert!(median <= 5.0, "the median is {median} ms");
}

/// The journal's files as the disk might hold them after a power cut: the log is cut somewhere.
struct Cut {
    database: Vec<u8>,
    log: Vec<u8>,
}

impl Cut {
    fn open(&self, folder: &Path) -> Result<Vec<Record>, JournalError> {
        let path = folder.join("cut.db");
        for it in ["", "-wal", "-shm", ".lock"] {
            let name = PathBuf::from(format!("{}{it}", path.display()));
            match it {
                "" => fs::write(name, &self.database).expect("written"),
                "-wal" => fs::write(name, &self.log).expect("written"),
                _ => drop(fs::remove_file(name)),
            }
        }
        let mut writer = Writer::open(&path, Retain::default())?;
        let next = writer.stats().next;
        let done = writer.append(&mut vec![event(0)])?;
        assert_eq!(done.first, next, "it goes on after what is left");
        let page = Reader::open(&path)?.page(0, &Filter::default(), 10_000)?;
        assert_eq!(page.gap, None);
        Ok(page.records.into_iter().filter(|it| it.seq < next).collect())
    }
}

#[test]
fn after_a_power_cut_the_journal_opens_to_whole_commits() {
    const COMMIT: usize = 3;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("journal.db");
    let mut writer = Writer::open(&path, Retain::default()).expect("opens");
    for number in 0..40 {
        writer.append(&mut vec![event(number); COMMIT]).expect("appends");
    }
    let mut reader = Reader::open(&path).expect("opens");
    let all = reader.page(0, &Filter::default(), 10_000).expect("a page").records;
    assert_eq!(all.len(), 40 * COMMIT);
    // The writer is still open, so the log has not been copied and deleted.
    let read = |it: &str| fs::read(format!("{}{it}", path.display())).expect("readable");
    let (database, log) = (read(""), read("-wal"));
    let elsewhere = tempfile::tempdir().expect("a folder");
    let mut sizes = Vec::new();
    // Every 37th border of 512 bytes keeps the test short and meets frames at all offsets.
    for border in (0..log.len()).step_by(512 * size(37, 1)) {
        for zeros in [0, log.len() - border] {
            let mut cut = log[..border].to_vec();
            cut.resize(border + zeros, 0);
            let left = Cut { database: database.clone(), log: cut }.open(elsewhere.path());
            let left = left.unwrap_or_else(|it| panic!("cut at {border} of {}: {it}", log.len()));
            assert_eq!(left.len() % COMMIT, 0, "cut at {border}: a commit in part");
            assert!(left[..] == all[..left.len()], "cut at {border}: not a prefix");
            sizes.push(left.len());
        }
    }
    // The first append copied the log, so without any log the first commit is still there.
    assert!(sizes.contains(&COMMIT) && sizes.iter().any(|it| 100 < *it), "{sizes:?}");
}
