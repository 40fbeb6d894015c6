//! The program as its user starts it: real clips and streams in, events out, every frame accounted.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    source,
    support::{size, wait_until, within},
    support_rtsp::{Media, Server},
};

pub(crate) const FRAME: &str = "io.ghostwatch.frame.classified.v1";
pub(crate) const STATE: &str = "io.ghostwatch.stream.state.v1";

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn clip(name: &str) -> String {
    format!("file://{}", source::clip(name).display())
}

pub(crate) fn ghostwatch(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ghostwatch"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Writes a configuration with these streams; gives the address of its metrics.
pub(crate) fn configure(folder: &Path, streams: &str) -> String {
    let listen = format!("127.0.0.1:{}", free_port());
    let weights = root().join("weights/ghostnet-1x-demo.safetensors");
    let text = format!(
        "version: 1\nstreams:\n{streams}model: {{weights: {weights:?}}}\n\
         journal: {{path: journal.db, retain: {{keep_free: 0B}}}}\nhttp: {{listen: \"{listen}\"}}\n"
    );
    fs::write(folder.join("config.yaml"), text).unwrap();
    listen
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every event of the journal in `folder`, validated against the printed schema.
pub(crate) fn events(folder: &Path) -> Vec<Value> {
    let output =
        ghostwatch(folder).args(["tail", "--from", "earliest", "--format", "ndjson"]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let schema = ghostwatch(folder).args(["schema", "event"]).output().unwrap();
    let schema: Value = serde_json::from_slice(&schema.stdout).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let events: Vec<Value> = lines.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
    for event in &events {
        let error = validator.iter_errors(event).next();
        assert!(error.is_none(), "{event}: {}", error.unwrap());
    }
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence"], format!("{:020}", i + 1), "no hole, no repeated number");
    }
    events
}

/// Checks `frame = previous + 1 + skipped` in every epoch; gives the frames decoded and published
/// of each stream.
pub(crate) fn account(events: &[Value]) -> BTreeMap<String, (u64, u64)> {
    let mut next = BTreeMap::<(String, u64), u64>::new();
    let mut published = BTreeMap::<String, u64>::new();
    for event in events {
        let data = &event["data"];
        let (is_frame, is_end) = (event["type"] == FRAME, data.get("skipped").is_some());
        if !(is_frame || event["type"] == STATE && is_end) {
            continue;
        }
        let stream = data["stream"].as_str().unwrap().to_owned();
        let key = (stream.clone(), data["epoch"].as_u64().unwrap());
        let skipped: u64 =
            data["skipped"].as_object().unwrap().values().map(|it| it.as_u64().unwrap()).sum();
        let at = next.entry(key).or_default();
        let after = data["frame"].as_u64().unwrap() + 1;
        assert_eq!(after, *at + skipped + u64::from(is_frame), "{event}");
        *at = after;
        *published.entry(stream).or_default() += u64::from(is_frame);
    }
    let mut all = BTreeMap::<String, (u64, u64)>::new();
    for ((stream, _), decoded) in next {
        all.entry(stream).or_default().0 += decoded;
    }
    for (stream, published) in published {
        all.entry(stream).or_default().1 = published;
    }
    all
}

pub(crate) fn start(folder: &Path) -> Child {
    let log = fs::File::create(folder.join("log")).unwrap();
    ghostwatch(folder).arg("run").stderr(log).stdout(Stdio::null()).spawn().unwrap()
}

pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

/// Ends a daemon as an operator does; it must account for everything in time.
pub(crate) fn drain(mut child: Child, folder: &Path) {
    signal(&child, "TERM");
    let deadline = within(10_500);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "the drain takes longer than 10 s");
        std::thread::sleep(Duration::from_millis(5));
    };
    let log = fs::read_to_string(folder.join("log")).unwrap();
    assert!(status.success(), "{status}: {log}");
}

pub(crate) fn get(listen: &str, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect(listen).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    Some(answer)
}

pub(crate) fn published(listen: &str, stream: &str) -> u64 {
    let text = get(listen, "/metrics").unwrap_or_default();
    let name = format!("ghostwatch_frames_published_total{{stream=\"{stream}\"}} ");
    let value = text.lines().find_map(|it| it.strip_prefix(&name));
    value.map_or(0, |it| it.parse::<f64>().unwrap() as u64)
}

#[test]
fn every_frame_of_a_file_becomes_one_event() {
    let folder = tempfile::tempdir().unwrap();
    let streams = format!(
        "  bikes: {{url: \"{}\"}}\n  bunny: {{url: \"{}\"}}\n",
        clip("bikes.mp4"),
        clip("bigbuckbunny.mp4")
    );
    configure(folder.path(), &streams);
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let events = events(folder.path());
    let account = account(&events);
    // As ffprobe counts them, see `source`.
    assert_eq!(account["bikes"], (250, 250));
    assert_eq!(account["bunny"], (132, 132));
    let frame = events.iter().find(|it| it["type"] == FRAME).unwrap();
    assert_eq!(frame["data"]["top"].as_array().unwrap().len(), 5);
    let last = |stream: &str| {
        let mine = |it: &&Value| it["subject"] == stream;
        events.iter().rfind(mine).unwrap()["data"]["state"].clone()
    };
    assert_eq!((last("bikes"), last("bunny")), ("ended".into(), "ended".into()));
}

#[test]
fn a_live_camera_is_labelled_until_the_daemon_is_told_to_stop_and_nothing_is_unaccounted() {
    let folder = tempfile::tempdir().unwrap();
    let camera = Server::start(&Media::Pattern { size: (320, 240), fps: 25 }, 0, None);
    let streams = format!(
        "  camera: {{url: \"{}\"}}\n  slow: {{url: \"{}\", max_fps: 5}}\n  pattern: {{url: \"test:?size=64x48&fps=100\", realtime: true}}\n",
        camera.url(),
        camera.url()
    );
    let listen = configure(folder.path(), &streams);
    let child = start(folder.path());
    wait_until("the daemon is ready", || {
        get(&listen, "/readyz").is_some_and(|it| it.starts_with("HTTP/1.1 200"))
    });
    for stream in ["camera", "slow", "pattern"] {
        wait_until(stream, || 10 < published(&listen, stream));
    }
    let metrics = get(&listen, "/metrics").unwrap();
    assert!(metrics.contains("\nghostwatch_frames_unaccounted 0\n"), "{metrics}");
    let table = ghostwatch(folder.path()).arg("streams").output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    for stream in ["camera", "slow", "pattern"] {
        let line = table.lines().find(|it| it.starts_with(stream)).unwrap();
        assert_eq!(line.split_whitespace().nth(1), Some("up"), "{table}");
    }
    drain(child, folder.path());
    let account = account(&events(folder.path()));
    let (decoded, published) = account["slow"];
    assert!(published * 4 <= decoded, "a fifth of the frames: {account:?}");
    assert!(0 < account["camera"].1 && 0 < account["pattern"].1);
}

#[test]
fn after_kill_9_the_journal_goes_on_without_a_hole_and_in_a_new_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let streams = "  pattern: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";
    let mut seen = 0;
    let starts = size(2, 30);
    for _ in 0..starts {
        let listen = configure(folder.path(), streams);
        let mut child = start(folder.path());
        wait_until("some frames", || 20 < published(&listen, "pattern"));
        signal(&child, "KILL");
        child.wait().unwrap();
        let now = events(folder.path()).len();
        assert!(seen + 20 < now, "what was committed is there");
        seen = now;
    }
    let events = events(folder.path());
    let epochs: Vec<_> = events
        .iter()
        .filter(|it| it["type"] == FRAME)
        .map(|it| it["data"]["epoch"].as_u64().unwrap())
        .collect();
    assert_eq!((epochs.first(), epochs.last()), (Some(&0), Some(&(starts - 1))));
}

#[test]
fn a_second_daemon_on_one_journal_names_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let listen =
        configure(folder.path(), "  p: {url: \"test:?size=64x48&fps=5\", realtime: true}\n");
    let child = start(folder.path());
    wait_until("some frames", || 0 < published(&listen, "p"));
    let second = ghostwatch(folder.path()).arg("run").output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains(&format!("process {}", child.id())), "{}", said(&second));
    drain(child, folder.path());
}

#[test]
fn a_reload_adds_and_removes_streams_and_refuses_a_bad_file() {
    let folder = tempfile::tempdir().unwrap();
    let pattern =
        |id: &str| format!("  {id}: {{url: \"test:?size=64x48&fps=20\", realtime: true}}\n");
    let listen = configure(folder.path(), &(pattern("a") + &pattern("b")));
    let path = folder.path().join("config.yaml");
    let child = start(folder.path());
    wait_until("both streams", || 5 < published(&listen, "a") && 5 < published(&listen, "b"));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("  b:", "  c:")).unwrap();
    signal(&child, "HUP");
    wait_until("the new stream", || 5 < published(&listen, "c"));
    wait_until("the series of the old one are gone", || {
        !get(&listen, "/metrics").unwrap_or_default().contains("stream=\"b\"")
    });
    let changed = text.replace("  b:", "  c:").replace("64x48", "96x48");
    fs::write(&path, changed.replacen("96x48", "64x48", 1)).unwrap();
    signal(&child, "HUP");
    let widths = || -> Vec<u64> {
        let width = |it: &Value| it["data"]["width"].as_u64();
        let mine = |it: &&Value| it["subject"] == "c" && it["type"] == FRAME;
        let output = ghostwatch(folder.path())
            .args(["tail", "--from", "earliest", "--format", "ndjson", "--stream", "c"])
            .output()
            .unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        let events: Vec<Value> =
            lines.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
        events.iter().filter(mine).filter_map(width).collect()
    };
    wait_until("the changed stream", || widths().contains(&96));
    wait_until("its series", || 5 < published(&listen, "c"));
    fs::write(&path, "streams: [").unwrap();
    signal(&child, "HUP");
    let before = published(&listen, "a");
    wait_until("the old plan stays", || before + 5 < published(&listen, "a"));
    assert!(get(&listen, "/metrics").unwrap().contains("config_last_reload_successful 0\n"));
    fs::write(&path, text).unwrap();
    drain(child, folder.path());
    let account = account(&events(folder.path()));
    assert_eq!(account.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    // An unchanged stream loses no frame.
    assert_eq!(account["a"].0, account["a"].1);
}

#[test]
fn a_file_that_is_missing_is_down_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let streams = "  gone: {url: \"file:///no/such/clip.mp4\"}\n  there: {url: \"test:?size=64x48&fps=30&frames=30\"}\n";
    configure(folder.path(), streams);
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let last = said(&output).lines().last().unwrap().to_owned();
    assert!(last.contains("gone") && last.contains("/no/such/clip.mp4"), "{last}");
    let events = events(folder.path());
    assert_eq!(account(&events)["there"], (30, 30));
    let down = events.iter().find(|it| it["data"]["state"] == "down").unwrap();
    assert_eq!((&down["subject"], &down["data"]["code"]), (&"gone".into(), &"not_found".into()));
}

#[test]
fn without_once_a_daemon_goes_on_when_a_file_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let streams = "  gone: {url: \"file:///no/such/clip.mp4\"}\n  there: {url: \"test:?size=64x48&fps=20\", realtime: true}\n";
    let listen = configure(folder.path(), streams);
    let child = start(folder.path());
    wait_until("the file is down", || {
        let metrics = get(&listen, "/metrics").unwrap_or_default();
        metrics.contains("stream_state{state=\"down\",stream=\"gone\"} 1")
    });
    let before = published(&listen, "there");
    wait_until("the other goes on", || before + 5 < published(&listen, "there"));
    drain(child, folder.path());
}

#[test]
fn once_refuses_a_reload_that_would_never_end() {
    let folder = tempfile::tempdir().unwrap();
    let one = |frames: u32, more: &str| {
        format!("  a: {{url: \"test:?size=64x48&fps=20&frames={frames}\", realtime: true{more}}}\n")
    };
    let listen = configure(folder.path(), &one(100, ""));
    let mut child =
        ghostwatch(folder.path()).args(["run", "--once"]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it runs", || 0 < published(&listen, "a"));
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(&one(100, ""), &one(100, ", loop: true"))).unwrap();
    signal(&child, "HUP");
    wait_until("it is refused", || {
        let metrics = get(&listen, "/metrics").unwrap_or_default();
        metrics.contains("config_last_reload_successful 0\n")
    });
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(said.contains("--once would never end: stream a is live or looped"), "{said}");
}

#[test]
fn once_refuses_what_never_ends_and_a_wrong_configuration_is_a_usage_error() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), "  p: {url: \"rtsp://127.0.0.1:1/x\"}\n");
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    fs::write(folder.path().join("config.yaml"), "version: 2\nstraems: {}\n").unwrap();
    let output = ghostwatch(folder.path()).arg("check").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}

#[test]
fn classify_prints_the_same_labels_for_a_picture_alone_and_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let weights = root().join("weights/ghostnet-1x-demo.safetensors");
    let pictures = root().join("tests/golden/pictures");
    let mut files: Vec<PathBuf> = fs::read_dir(&pictures)
        .unwrap()
        .map(|it| it.unwrap().path())
        .filter(|it| it.extension().is_some_and(|it| it == "jpg"))
        .take(3)
        .collect();
    files.sort();
    let run = |inputs: &[&Path]| -> Vec<Value> {
        let output = ghostwatch(folder.path())
            .args(["classify", "--format", "ndjson", "--weights"])
            .arg(&weights)
            .args(inputs)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
    };
    let together = run(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    assert_eq!(together.len(), 3);
    for (file, one) in files.iter().zip(&together) {
        assert_eq!(run(&[file])[0]["data"]["top"], one["data"]["top"]);
        assert_eq!(one["data"]["top"].as_array().unwrap().len(), 5);
    }
}
