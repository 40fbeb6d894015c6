//! `ghostwatch events` on a journal that another process is writing, and on damaged ones.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use ghostwatch::journal::{filter::Filter, read::Reader, retain::Retain, writer::Writer};
use serde_json::Value;

use crate::{
    journal::{event, open_reader, start_writer},
    support::{size, wait_until},
    support_server::Server,
};

const FRAMES: &str = "ghostwatch:frames";

/// A writer process that is killed with the test.
struct Busy(Child);

impl Busy {
    /// Appends at this rate; there are events when this returns.
    fn start(path: &Path, rate: f64) -> Busy {
        let mut busy = Busy(start_writer(path, rate));
        // What it prints is not wanted, but a full pipe would stop it.
        let mut output = busy.0.stdout.take().expect("piped");
        let drain = move || std::io::copy(&mut output, &mut std::io::sink());
        let drain = std::thread::Builder::new().name("drain".into()).spawn(drain);
        // It ends with the pipe, when the process is killed.
        drop(drain.expect("a thread"));
        drop(open_reader(path));
        let latest = || Reader::open(path).and_then(|it| it.latest()).is_ok_and(|it| 100 < it);
        wait_until("the writer process has written", latest);
        busy
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("it has ended");
    }
}

fn command(journal: &Path, arguments: &[&str]) -> Command {
    let mut it = Command::new(env!("CARGO_BIN_EXE_ghostwatch"));
    it.args(["events", "--journal"]).arg(journal).args(arguments).current_dir("/");
    it.env_remove("GHOSTWATCH_CONFIG");
    it
}

/// Runs it and checks its exit code. Gives what it printed to both.
fn events(journal: &Path, arguments: &[&str], code: i32) -> (String, String) {
    let Output { status, stdout, stderr } = command(journal, arguments).output().unwrap();
    let text = |it| String::from_utf8(it).unwrap();
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert_eq!(status.code(), Some(code), "{arguments:?}\n{stdout}\n{stderr}");
    (stdout, stderr)
}

fn json(text: &str) -> Vec<Value> {
    text.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
}

fn number(event: &Value) -> u64 {
    event["sequence"].as_str().unwrap().parse().unwrap()
}

fn journal(count: u64) -> (tempfile::TempDir, PathBuf, Writer) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let mut writer = Writer::open(&path, Retain::default()).unwrap();
    for start in (0..count).step_by(100) {
        writer.append(&mut (start..count.min(start + 100)).map(event).collect()).unwrap();
    }
    (folder, path, writer)
}

#[test]
fn all_of_them_work_while_another_process_appends_and_it_never_stops_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let _busy = Busy::start(&path, 1000.0);
    let mut reader = Reader::open(&path).unwrap();
    let (start, first) = (Instant::now(), reader.latest().unwrap());
    let rounds = size(3, 30);
    for round in 0..rounds {
        let (verdict, _) = events(&path, &["verify"], 0);
        assert!(verdict.contains(" events are good\n"), "{verdict}");
        let copy = folder.path().join(format!("copy-{round}.db"));
        let before = reader.latest().unwrap();
        let (said, _) = events(&path, &["backup", copy.to_str().unwrap()], 0);
        assert!(said.ends_with(" events, verified\n"), "{said}");
        let copied = Reader::open(&copy).unwrap().latest().unwrap();
        assert!(before <= copied && copied <= reader.latest().unwrap(), "{before} {copied}");
        let exported = json(&events(&path, &["export"], 0).0);
        let expected: Vec<u64> = (1..=exported.len() as u64).collect();
        assert_eq!(exported.iter().map(number).collect::<Vec<_>>(), expected);
        let stats = &json(&events(&path, &["stats", "--format", "json"], 0).0)[0];
        assert!(copied < stats["next_sequence"].as_u64().unwrap(), "{stats}");
        assert_eq!(stats["streams"]["front"]["first"], 1);
    }
    let appended = reader.latest().unwrap() - first;
    let rate = appended as f64 / start.elapsed().as_secs_f64();
    println!("{rounds} rounds, meanwhile {appended} events were appended, {rate:.0}/s");
    assert!(500.0 <= rate, "{rate} events/s");
    // What was appended meanwhile is whole, and the reader had it in order.
    let page = reader.page(first, &Filter::default(), 1000).unwrap();
    assert_eq!(page.gap, None);
}

#[test]
fn a_backup_that_is_put_to_use_gives_new_ids_and_keeps_the_old_ones() {
    let (folder, path, writer) = journal(250);
    let copy = folder.path().join("copy.db");
    let copy_name = copy.to_str().unwrap();
    events(&path, &["backup", copy_name], 0);
    let (_, refused) = events(&path, &["backup", copy_name], 2);
    assert!(refused.contains("exists") && refused.contains("--force"), "{refused}");
    let (_, refused) = events(&path, &["backup", "--force", path.to_str().unwrap()], 2);
    assert!(refused.contains("in use"), "{refused}");
    let old = events(&path, &["export"], 0).0;
    let busy = Busy::start(&copy, 1000.0);
    let latest = || Reader::open(&copy).unwrap().latest().unwrap();
    wait_until("the copy is written to", || 300 < latest());
    let (_, refused) = events(&path, &["backup", "--force", copy_name], 2);
    assert!(refused.contains("in use"), "{refused}");
    drop(busy);
    let all = events(&copy, &["export"], 0).0;
    assert!(all.starts_with(&old), "old events are as they were");
    let id = |it: &Value| it["id"].as_str().unwrap().split('-').next().unwrap().to_owned();
    let new: Vec<_> = json(&all).iter().skip(250).map(id).collect();
    assert!(50 < new.len() && new.iter().all(|it| it == &new[0] && it != writer.id()));
    events(&copy, &["verify"], 0);
    events(&path, &["backup", "--force", copy_name], 0);
    assert_eq!(events(&copy, &["export"], 0).0, old);
}

#[test]
fn damage_is_named_with_its_event_and_exits_with_4() {
    let (folder, path, writer) = journal(3000);
    drop(writer);
    let good = fs::read(&path).unwrap();
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let copy = folder.path().join("damaged.db");
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(&copy, bytes).unwrap();
        copy
    };
    // One bit in the text of one event.
    let at = good.windows(14).position(|it| it == br#""number":1717,"#).unwrap();
    let flipped = damaged(&|it| it[at + 10] ^= 1);
    for it in [&["verify"][..], &["verify", "--quick"]] {
        let (said, error) = events(&flipped, it, 4);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.starts_with("damage: event ") && said.contains("checksum"), "{said}");
        assert!(error.contains("is damaged: 1 findings"), "{error}");
    }
    let to = folder.path().join("copy.db");
    events(&flipped, &["backup", to.to_str().unwrap()], 4);
    assert!(!to.exists());
    let exported = json(&events(&flipped, &["export"], 0).0);
    let gaps: Vec<_> = exported.iter().filter(|it| it["data"]["reason"] == "damaged").collect();
    assert_eq!((exported.len(), gaps.len()), (3000, 1), "a gap event stands for the damaged one");
    let page = good.len() / 8192 / 2 * 8192;
    let garbage = damaged(&|it| it[page..page + 8192].fill(0xa5));
    let (said, _) = events(&garbage, &["verify"], 4);
    assert!(said.contains("damage: structure: "), "{said}");
    assert!(said.contains("cannot be read, the page that holds them is damaged"), "{said}");
    let zeros = damaged(&|it| it[page..].fill(0));
    events(&zeros, &["verify"], 4);
    for change in [
        &(|it: &mut Vec<u8>| it.fill(b'x')) as &dyn Fn(&mut Vec<u8>),
        &|it| it[60..64].copy_from_slice(&99_i32.to_be_bytes()),
        &|it| it[68..72].fill(0),
    ] {
        let file = damaged(change);
        for it in [&["verify"][..], &["stats"], &["export"]] {
            events(&file, it, 4);
        }
    }
    events(Path::new("/nonexistent/journal.db"), &["stats"], 1);
}

#[test]
fn an_export_is_a_range_with_filters_and_its_file_is_never_half() {
    let (folder, path, mut writer) = journal(1000);
    let numbers = |arguments: &[&str]| -> Vec<u64> {
        let arguments = [&["export"], arguments].concat();
        json(&events(&path, &arguments, 0).0).iter().map(number).collect()
    };
    assert_eq!(numbers(&["--from", "990"]), Vec::from_iter(990..=1000));
    assert_eq!(numbers(&["--from", "00000000000000000600", "--to", "1200"]).len(), 401);
    assert_eq!(
        numbers(&["--to", "3", "--stream", "front", "--type", "frame.classified"]),
        [1, 2, 3]
    );
    assert_eq!(numbers(&["--stream", "yard"]), [0u64; 0]);
    assert_eq!(numbers(&["--from", "2000"]), [0u64; 0]);
    assert_eq!(numbers(&["--since", "1h"]).len(), 1000);
    assert_eq!(numbers(&["--until", "1h"]), [0u64; 0]);
    assert_eq!(numbers(&["--since", "2001-01-01T00:00:00Z", "--to", "2"]), [1, 2]);
    for it in [["--since", "yesterday"], ["--from", "x"], ["--type", "frame"]] {
        events(&path, &["export", it[0], it[1]], 2);
    }
    let file = folder.path().join("out.ndjson");
    fs::write(&file, "before").unwrap();
    events(&path, &["export", "--to", "5", "-o", file.to_str().unwrap()], 0);
    assert_eq!(json(&fs::read_to_string(&file).unwrap()).len(), 5);
    fs::write(&file, "before").unwrap();
    events(Path::new("/nonexistent/journal.db"), &["export", "-o", file.to_str().unwrap()], 1);
    assert_eq!(fs::read_to_string(&file).unwrap(), "before");
    // A reader that goes away after the first line is no failure.
    let mut head = command(&path, &["export"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(head.stdout.take());
    assert_eq!(head.wait().unwrap().code(), Some(0));
    writer.set_retain(Retain { age: Some(Duration::ZERO), ..Retain::default() });
    while writer.maintain().unwrap() {}
    writer.set_retain(Retain::default());
    writer.append(&mut vec![event(0)]).unwrap();
    let after = json(&events(&path, &["export", "--from", "900", "--to", "950"], 0).0);
    assert_eq!((after.len(), &after[0]["data"]["events"]), (1, &Value::from(51)), "{after:?}");
    assert_eq!(numbers(&["--from", "900"]), [1000, 1001], "a gap event, then what is there");
    assert_eq!(numbers(&[]), [1001]);
}

#[test]
fn neither_an_export_nor_a_backup_replaces_the_journal_its_files_or_a_pipe() {
    let (folder, path, _writer) = journal(300);
    let name = |it: &str| folder.path().join(it).to_str().unwrap().to_owned();
    std::os::unix::fs::symlink(&path, name("link.db")).unwrap();
    let before = fs::read(&path).unwrap();
    let names = ["journal.db", "journal.db-wal", "journal.db-shm", "journal.db.lock", "link.db"];
    for it in names.map(name) {
        let (_, refused) = events(&path, &["export", "-o", &it], 2);
        assert!(refused.contains("belongs to the journal that is exported"), "{refused}");
        let (_, refused) = events(&path, &["backup", "--force", &it], 2);
        assert!(refused.contains("a journal in use or one of its files"), "{refused}");
    }
    // A device would be replaced too; a pipe shows the same and is only ours.
    let pipe = name("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (_, refused) = events(&path, &["export", "-o", &pipe], 2);
    assert!(refused.contains("is no regular file"), "{refused}");
    assert!(!fs::metadata(&pipe).unwrap().is_file());
    assert!(fs::read(&path).unwrap() == before);
    events(&path, &["verify"], 0);
}

/// A journal, and a configuration with a Redis sink that does not know of it yet.
fn with_redis(server: &Server) -> (tempfile::TempDir, PathBuf, Writer) {
    let (folder, path, mut writer) = journal(600);
    // A new sink begins after what is there, so it has one event to deliver.
    writer.cursor("queue").unwrap();
    writer.append(&mut vec![event(600)]).unwrap();
    let config = format!(
        "version: 1\nstreams: {{t: {{url: \"test:\"}}}}\njournal: {{path: {}}}\nsinks:\n  - {{type: redis, name: queue, url: \"redis://127.0.0.1:{}\"}}\n",
        path.display(),
        server.port()
    );
    fs::write(folder.path().join("config.yaml"), config).unwrap();
    (folder, path, writer)
}

fn replay(folder: &Path, arguments: &[&str]) -> Command {
    let mut it = Command::new(env!("CARGO_BIN_EXE_ghostwatch"));
    it.arg("--config").arg(folder.join("config.yaml")).args(["events", "replay"]).args(arguments);
    it
}

fn redis_server() -> Server {
    Server::new("redis-server", |port, folder| {
        let (port, folder) = (port.to_string(), folder.display().to_string());
        let base = ["--port", &port, "--dir", &folder, "--bind", "127.0.0.1", "--save", ""];
        base.iter().map(|it| (*it).to_owned()).collect()
    })
}

#[test]
fn a_replay_sends_a_range_with_the_same_ids_and_moves_no_cursor() {
    let server = redis_server().started();
    let (folder, path, writer) = with_redis(&server);
    let run = |arguments: &[&str], code: i32| {
        let Output { status, stdout, stderr } = replay(folder.path(), arguments).output().unwrap();
        let text = |it| String::from_utf8(it).unwrap();
        let (stdout, stderr) = (text(stdout), text(stderr));
        assert_eq!(status.code(), Some(code), "{arguments:?}\n{stdout}\n{stderr}");
        (stdout, stderr)
    };
    let range = ["--from", "11", "--sink", "queue"];
    let said = run(&range, 0).0;
    assert!(said.contains(": 591 acknowledged, 0 of them duplicates; 0 dead letters"), "{said}");
    let client = redis::Client::open(format!("redis://127.0.0.1:{}", server.port())).unwrap();
    let mut client = client.get_connection().unwrap();
    let key = FRAMES.replace(':', &format!(":{}:", writer.id()));
    let all: redis::streams::StreamRangeReply =
        redis::cmd("XRANGE").arg(&key).arg("-").arg("+").query(&mut client).unwrap();
    let got: Vec<(String, String)> =
        all.ids.iter().map(|it| (it.id.clone(), it.get("event").unwrap())).collect();
    let page = Reader::open(&path).unwrap().page(10, &Filter::default(), 591).unwrap();
    let expected: Vec<_> =
        page.records.into_iter().map(|it| (format!("{}-0", it.seq), it.json)).collect();
    assert!(got == expected, "{} of {} events", got.len(), expected.len());
    let said = run(&range, 0).0;
    assert!(said.contains(": 591 acknowledged, 591 of them duplicates"), "{said}");
    let stats = &json(&events(&path, &["stats", "--format", "json"], 0).0)[0];
    assert_eq!(stats["sinks"], serde_json::json!({"queue": {"cursor": 600, "lag": 1}}));
    let (_, refused) = run(&["--from", "1", "--sink", "other"], 2);
    assert!(refused.contains("no such sink; configured: queue"), "{refused}");
    let said = run(&["--from", "5", "--to", "9", "--sink", "queue"], 0).0;
    assert!(said.contains("events 5 to 9 to sink queue: 5 acknowledged, 5 of them"), "{said}");
    run(&["--from", "602", "--sink", "queue"], 2);
}

#[test]
fn a_replay_that_cannot_finish_or_is_interrupted_says_where_to_go_on() {
    let server = redis_server();
    let (folder, _path, _writer) = with_redis(&server);
    let range = ["--from", "11", "--sink", "queue"];
    let impatient = [&range[..], &["--patience", "1s"]].concat();
    let Output { status, stderr, .. } = replay(folder.path(), &impatient).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    let why = "nothing was acknowledged for 1s; go on with --from 11";
    assert!(stderr.contains(why), "{stderr}");
    let mut child = replay(folder.path(), &range)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first complaint says that it runs, and has its signal handlers.
    let mut line = String::new();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    std::io::Read::read_to_string(&mut stderr, &mut line).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{line}");
    assert!(line.contains("stopped by a signal; go on with --from 11"), "{line}");
}

#[test]
fn a_file_that_could_not_grow_has_each_event_on_a_line_of_its_own_once_it_can() {
    let (folder, path, writer) = journal(600);
    drop(writer);
    let out = folder.path().join("out.ndjson");
    let config = format!(
        "version: 1\nstreams: {{t: {{url: \"test:\"}}}}\njournal: {{path: {}}}\nsinks:\n  - {{type: file, name: out, path: {}}}\n",
        path.display(),
        out.display()
    );
    fs::write(folder.path().join("config.yaml"), config).unwrap();
    // A limit of 50 KiB for a file stands for the full disk: a write stops in the middle of a line,
    // the next one fails.
    let limited = "trap '' XFSZ; ulimit -S -f 100; exec \"$0\" \"$@\"";
    let replay = replay(folder.path(), &["--from", "1", "--sink", "out"]);
    let mut child = Command::new("sh")
        .args(["-c", limited])
        .arg(replay.get_program())
        .args(replay.get_args())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut stderr, &mut said).unwrap();
    assert!(said.contains("events wait in the journal"), "{said}");
    let pid = child.id().to_string();
    let raised = Command::new("prlimit").args(["--pid", &pid, "--fsize=unlimited"]).status();
    assert!(raised.unwrap().success());
    std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
    let got: Vec<u64> = json(&fs::read_to_string(&out).unwrap()).iter().map(number).collect();
    assert_eq!(got, Vec::from_iter(1..=600));
}
