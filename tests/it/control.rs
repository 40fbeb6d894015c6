//! Orders to the running daemon: streams are restarted, disabled and enabled without the others
//! noticing; and what crashes the daemon is held back.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        process::ExitStatusExt as _,
    },
    path::Path,
    process::{Child, Output, Stdio},
    time::{Duration, Instant, SystemTime},
};

use serde_json::Value;

use crate::{
    end_to_end::{
        FRAME, STATE, account, clip, configure, drain, events, get, ghostwatch, published, said,
        signal, start,
    },
    support::{wait_until, within},
    support_proxy::{Mode, Proxy},
    support_rtsp::{Media, Server},
};

fn order(folder: &Path, words: &[&str]) -> Output {
    ghostwatch(folder).arg("streams").args(words).output().unwrap()
}

/// Gives an order that must be carried out; gives what is answered.
fn ordered(folder: &Path, words: &[&str]) -> String {
    let output = order(folder, words);
    assert!(output.status.success(), "{words:?}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Gives an order that must not be carried out; gives the exit code and why.
fn refused(folder: &Path, words: &[&str]) -> (Option<i32>, String) {
    let output = order(folder, words);
    assert!(output.stdout.is_empty(), "{words:?}: {output:?}");
    (output.status.code(), said(&output))
}

fn is_in(listen: &str, stream: &str, state: &str) -> bool {
    let line = format!("ghostwatch_stream_state{{state=\"{state}\",stream=\"{stream}\"}} 1");
    get(listen, "/metrics").is_some_and(|it| it.lines().any(|it| it == line))
}

/// The states of a stream in order, without what changed within one.
fn states<'a>(events: &'a [Value], stream: &str) -> Vec<&'a str> {
    let mine = events.iter().filter(|it| it["type"] == STATE && it["subject"] == stream);
    let mine = mine.filter(|it| it["data"]["previous"] != it["data"]["state"]);
    mine.map(|it| it["data"]["state"].as_str().unwrap()).collect()
}

#[test]
fn a_stream_that_waits_to_be_opened_again_says_in_a_drain_that_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let camera = Server::start(&Media::Pattern { size: (320, 240), fps: 10 }, 0, None);
    let proxy = Proxy::start(camera.port());
    let streams =
        format!("  hung: {{url: \"{}\"}}\n  fine: {{url: \"{}\"}}\n", proxy.url(), camera.url());
    let listen = configure(path, &streams);
    let child = start(path);
    for stream in ["hung", "fine"] {
        wait_until(stream, || 5 < published(&listen, stream));
    }
    // The old source takes until the limit of two seconds to end, and the new one waits for it.
    proxy.set(Mode::Silent);
    assert_eq!(ordered(path, &["restart", "hung"]), "hung is opened anew\n");
    drain(child, path);
    let events = events(path);
    account(&events);
    assert_eq!(states(&events, "hung"), ["connecting", "up", "connecting", "removed"]);
    assert_eq!(states(&events, "fine"), ["connecting", "up", "removed"]);
}

#[test]
fn a_stream_is_disabled_enabled_and_restarted_and_the_others_lose_no_frame() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let camera = Server::start(&Media::Pattern { size: (320, 240), fps: 10 }, 0, None);
    let streams = format!(
        "  front: {{url: \"{0}\"}}\n  yard: {{url: \"{0}\", when_full: block}}\n  clip: {{url: \"{1}\"}}\n",
        camera.url(),
        clip("carphone_pristine.mp4")
    );
    let listen = configure(path, &streams);
    let (code, why) = refused(path, &["restart", "front"]);
    assert!(code == Some(1) && why.contains("no daemon listens at"), "{code:?} {why}");
    let child = start(path);
    for stream in ["front", "yard", "clip"] {
        wait_until(stream, || 5 < published(&listen, stream));
    }
    wait_until("the end of the clip", || is_in(&listen, "clip", "ended"));
    let mode = fs::metadata(path.join("journal.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else may give orders");

    assert_eq!(
        ordered(path, &["disable", "front"]),
        "front is disabled, until it is enabled again\n"
    );
    wait_until("front is disabled", || is_in(&listen, "front", "disabled"));
    assert_eq!(ordered(path, &["disable", "front"]), "front is disabled already\n");
    let (code, why) = refused(path, &["restart", "front"]);
    assert!(code == Some(1) && why.contains("front is disabled"), "{code:?} {why}");
    ordered(path, &["disable", "clip"]);
    wait_until("clip is disabled after its end", || is_in(&listen, "clip", "disabled"));
    assert_eq!(ordered(path, &["enable", "yard"]), "yard is enabled already\n");
    let (code, why) = refused(path, &["disable", "back"]);
    assert!(code == Some(2) && why.contains("configured: clip, front, yard"), "{code:?} {why}");
    let (code, why) = refused(path, &["disable", "../front"]);
    assert!(code == Some(2) && why.contains("is no stream id"), "{code:?} {why}");
    let table = ordered(path, &[]);
    let line = table.lines().find(|it| it.starts_with("front")).unwrap();
    assert_eq!(line.split_whitespace().nth(1), Some("disabled"), "{table}");
    let yard = published(&listen, "yard");
    wait_until("yard goes on", || yard + 10 < published(&listen, "yard"));
    drain(child, path);

    let child = start(path);
    wait_until("yard is up", || 5 < published(&listen, "yard"));
    assert!(is_in(&listen, "front", "disabled"), "a restart does not enable it");
    assert_eq!(ordered(path, &["enable", "front"]), "front is opened again\n");
    wait_until("front is up again", || 5 < published(&listen, "front"));
    assert_eq!(ordered(path, &["restart", "front"]), "front is opened anew\n");
    // Its metrics may still be those of before.
    wait_until("front is up after the restart", || 8 == states(&events(path), "front").len());
    drain(child, path);

    let events = events(path);
    account(&events);
    let expected = [
        "connecting",
        "up",
        "disabled",
        "disabled",
        "connecting",
        "up",
        "connecting",
        "up",
        "removed",
    ];
    assert_eq!(states(&events, "front"), expected);
    assert_eq!(states(&events, "clip")[..3], ["connecting", "up", "ended"]);
    assert_eq!(states(&events, "clip")[3..], ["disabled", "disabled"]);
    assert_eq!(states(&events, "yard"), ["connecting", "up", "removed"].repeat(2));
    let lost = events.iter().filter(|it| it["subject"] == "yard" && it["type"] == FRAME);
    let lost: Vec<_> = lost.filter(|it| it["data"]["skipped"] != serde_json::json!({})).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

/// The threads of a stream in a running daemon.
fn threads(child: &Child, stream: &str) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let mine = tasks.filter_map(|it| {
        let task = it.unwrap();
        // It may have ended meanwhile.
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let (number, id) = name.trim_end().strip_prefix('v')?.split_once(':')?;
        let is_mine = number.parse::<u32>().is_ok() && id == stream;
        is_mine.then(|| task.file_name().to_string_lossy().parse().unwrap())
    });
    mine.collect()
}

/// Sends a signal to one thread of a process, as a fault in it does.
#[allow(unsafe_code, reason = "a system call that no library offers")]
fn hit(child: &Child, thread: i32, signal: i32) {
    let process = i32::try_from(child.id()).unwrap();
    // SAFETY: the call takes numbers only.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn ended_by(mut child: Child) -> Option<i32> {
    let deadline = within(10_000);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.signal();
        }
        assert!(Instant::now() < deadline, "it did not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_stream_that_crashes_the_daemon_three_times_is_quarantined_and_the_others_label_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let camera = Server::start(&Media::Pattern { size: (320, 240), fps: 10 }, 0, None);
    let streams = format!("  good: {{url: \"{0}\"}}\n  evil: {{url: \"{0}\"}}\n", camera.url());
    let listen = configure(path, &streams);
    for (signal, name) in
        [(libc::SIGSEGV, "SIGSEGV"), (libc::SIGABRT, "SIGABRT"), (libc::SIGTRAP, "SIGTRAP")]
    {
        let started = Instant::now();
        let child = start(path);
        wait_until("good labels", || 0 < published(&listen, "good"));
        // With a keyframe interval of a second.
        assert!(started.elapsed() < Duration::from_secs(11), "{:?}", started.elapsed());
        wait_until("evil labels", || 0 < published(&listen, "evil"));
        let threads = threads(&child, "evil");
        assert!(!threads.is_empty(), "no thread has its stream's name");
        hit(&child, threads[0], signal);
        assert_eq!(ended_by(child), Some(signal), "it dies of the signal all the same");
        let text = fs::read_to_string(path.join("journal.crashes")).unwrap();
        assert!(text.trim_end().ends_with(&format!("{name} evil")), "{text}");
    }
    let child = start(path);
    wait_until("good labels", || 0 < published(&listen, "good"));
    wait_until("evil is quarantined", || is_in(&listen, "evil", "quarantined"));
    let log = fs::read_to_string(path.join("log")).unwrap();
    assert!(log.contains("the last run crashed in a thread of this stream"), "{log}");
    let ready = get(&listen, "/readyz?verbose").unwrap();
    assert!(ready.contains("crashed the daemon 3 times within an hour"), "{ready}");
    let (code, why) = refused(path, &["restart", "evil"]);
    assert!(code == Some(1) && why.contains("evil is quarantined"), "{code:?} {why}");
    assert_eq!(ordered(path, &["enable", "evil"]), "evil is opened again\n");
    wait_until("evil labels again", || 0 < published(&listen, "evil"));
    drain(child, path);

    let child = start(path);
    wait_until("evil labels after a restart", || 0 < published(&listen, "evil"));
    drain(child, path);
    let events = events(path);
    account(&events);
    let held = events.iter().find(|it| it["data"]["state"] == "quarantined").unwrap();
    assert_eq!((&held["subject"], &held["data"]["code"]), (&"evil".into(), &"error".into()));
    let detail = held["data"]["detail"].as_str().unwrap();
    assert!(detail.contains("ghostwatch streams enable evil"), "{detail}");
}

fn ready(listen: &str) {
    wait_until("the daemon is ready", || {
        get(listen, "/readyz").is_some_and(|it| it.starts_with("HTTP/1.1 200"))
    });
}

/// A stream of a test pattern.
fn pattern(id: &str, size: &str) -> String {
    format!("  {id}: {{url: \"test:?size={size}&fps=20\", realtime: true}}\n")
}

/// What the daemon finds that crashed three times in the threads of this stream just now.
fn crashed(folder: &Path, stream: &str) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let line = format!("{} SIGSEGV {stream}\n", now - 5);
    fs::write(folder.join("journal.crashes"), line.repeat(3)).unwrap();
}

#[test]
fn a_quarantine_ends_with_what_it_was_for_also_if_that_was_changed_while_the_daemon_was_down() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let both = |size| pattern("evil", size) + &pattern("off", size);
    let listen = configure(path, &both("64x48"));
    crashed(path, "evil");
    let child = start(path);
    wait_until("evil is quarantined", || is_in(&listen, "evil", "quarantined"));
    ordered(path, &["disable", "off"]);
    drain(child, path);

    let listen = configure(path, &both("64x48"));
    let child = start(path);
    wait_until("it is quarantined still", || is_in(&listen, "evil", "quarantined"));
    drain(child, path);

    let listen = configure(path, &both("80x48"));
    let child = start(path);
    wait_until("evil labels", || 0 < published(&listen, "evil"));
    wait_until("what an operator said holds for any", || is_in(&listen, "off", "disabled"));
    let log = fs::read_to_string(path.join("log")).unwrap();
    assert!(log.contains("it was quarantined and is configured otherwise now"), "{log}");
    drain(child, path);

    let listen = configure(path, &both("64x48"));
    let child = start(path);
    wait_until("the crashes do not count any more", || 0 < published(&listen, "evil"));
    drain(child, path);
}

#[test]
fn a_full_disk_stops_no_start_but_an_order_that_cannot_be_written_down_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let streams = pattern("evil", "64x48") + &pattern("front", "64x48");
    let listen = configure(path, &streams);
    crashed(path, "evil");
    // What is written first is written here, and the device says that no space is left.
    let full = ["journal.held.new", "journal.crashes.new"].map(|it| path.join(it));
    let fill = || full.iter().for_each(|it| symlink("/dev/full", it).unwrap());
    fill();
    let child = start(path);
    wait_until("front labels", || 0 < published(&listen, "front"));
    wait_until("evil is quarantined", || is_in(&listen, "evil", "quarantined"));
    let log = fs::read_to_string(path.join("log")).unwrap();
    for said in [
        "the record of crashes cannot be written anew",
        "the list of held streams cannot be written",
    ] {
        assert!(log.contains(said), "{log}");
    }
    let refused = |action: &str, id: &str| {
        let (code, why) = refused(path, &[action, id]);
        assert!(code == Some(1) && why.contains("No space left"), "{code:?} {why}");
    };
    refused("disable", "front");
    refused("disable", "evil");
    refused("enable", "evil");
    let crashes = fs::read_to_string(path.join("journal.crashes")).unwrap();
    assert!(!crashes.contains("forgiven"), "the next start would open it: {crashes}");
    let count = published(&listen, "front");
    wait_until("front goes on", || count + 5 < published(&listen, "front"));
    assert!(is_in(&listen, "evil", "quarantined"));
    full.iter().for_each(|it| fs::remove_file(it).unwrap());
    ordered(path, &["disable", "front"]);
    wait_until("front is disabled", || is_in(&listen, "front", "disabled"));
    fill();
    refused("enable", "front");
    assert_eq!(ordered(path, &["disable", "front"]), "front is disabled already\n");
    drain(child, path);
}

#[test]
fn a_held_stream_that_is_taken_out_says_that_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let clip = format!("  clip: {{url: \"{}\"}}\n", clip("carphone_pristine.mp4"));
    let ids = ["evil", "front", "later"];
    let streams = ids.map(|it| pattern(it, "64x48")).concat() + &pattern("good", "64x48") + &clip;
    let listen = configure(path, &streams);
    crashed(path, "evil");
    let child = start(path);
    wait_until("evil is quarantined", || is_in(&listen, "evil", "quarantined"));
    for id in ["front", "later"] {
        ordered(path, &["disable", id]);
        wait_until("it is disabled", || is_in(&listen, id, "disabled"));
    }
    wait_until("the end of the clip", || is_in(&listen, "clip", "ended"));
    // While the daemon runs.
    let text = fs::read_to_string(path.join("config.yaml")).unwrap();
    let without = |text: &str, ids: &[&str]| {
        let is_kept = |line: &&str| !ids.iter().any(|it| line.starts_with(&format!("  {it}:")));
        text.lines().filter(is_kept).map(|it| format!("{it}\n")).collect::<String>()
    };
    let text = without(&text, &["evil", "front", "clip"]);
    fs::write(path.join("config.yaml"), &text).unwrap();
    signal(&child, "HUP");
    let gone = |id: &str| states(&events(path), id).last() == Some(&"removed");
    for id in ["evil", "front", "clip"] {
        wait_until(id, || gone(id));
    }
    let metrics = get(&listen, "/metrics").unwrap();
    assert!(!metrics.contains("stream=\"front\""), "{metrics}");
    drain(child, path);
    // And while it does not.
    assert!(!gone("later"));
    fs::write(path.join("config.yaml"), without(&text, &["later"])).unwrap();
    let child = start(path);
    wait_until("later", || gone("later"));
    let table = ordered(path, &[]);
    let shown: Vec<_> = table.lines().filter_map(|it| it.split_whitespace().next()).collect();
    assert_eq!(shown, ["STREAM", "good"], "{table}");
    drain(child, path);
    let once = |id: &str| states(&events(path), id).iter().filter(|it| **it == "removed").count();
    assert_eq!(["evil", "front", "clip", "later"].map(once), [1, 1, 1, 1]);
}

#[test]
fn a_stream_that_is_taken_out_after_the_daemon_was_killed_says_that_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let good = pattern("good", "64x48");
    let listen = configure(path, &(pattern("front", "64x48") + &good));
    let child = start(path);
    wait_until("front labels", || 0 < published(&listen, "front"));
    signal(&child, "KILL");
    assert_eq!(ended_by(child), Some(libc::SIGKILL));
    assert_eq!(states(&events(path), "front"), ["connecting", "up"]);
    configure(path, &good);
    let child = start(path);
    wait_until("front is gone", || {
        states(&events(path), "front") == ["connecting", "up", "removed"]
    });
    drain(child, path);
}

#[test]
fn a_stream_that_cannot_be_started_again_is_tried_until_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let streams = pattern("front", "64x48") + &pattern("good", "64x48");
    let listen = configure(path, &streams);
    let child = start(path);
    wait_until("front labels", || 0 < published(&listen, "front"));
    // A stream's epoch is looked up in the journal, which is not found now.
    fs::rename(path.join("journal.db"), path.join("away.db")).unwrap();
    assert_eq!(ordered(path, &["restart", "front"]), "front is opened anew\n");
    let why = "stream front: down, error: cannot be started";
    wait_until("it is told", || get(&listen, "/readyz?verbose").is_some_and(|it| it.contains(why)));
    assert!(is_in(&listen, "front", "down"), "its metrics stay");
    let log = fs::read_to_string(path.join("log")).unwrap();
    assert!(log.contains("cannot be started, tried again every 5 s"), "{log}");
    fs::rename(path.join("away.db"), path.join("journal.db")).unwrap();
    wait_until("front labels again", || 0 < published(&listen, "front"));
    assert!(!get(&listen, "/readyz?verbose").unwrap().contains(why));
    drain(child, path);
    let events = events(path);
    account(&events);
    let states = states(&events, "front");
    assert_eq!(states[2..], ["connecting", "down", "connecting", "up", "removed"]);
    let down = events.iter().find(|it| it["data"]["state"] == "down").unwrap();
    assert_eq!((&down["subject"], &down["data"]["code"]), (&"front".into(), &"error".into()));
}

#[test]
fn once_fails_if_a_file_was_not_classified_because_it_is_held_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let file = |id: &str| format!("  {id}: {{url: \"{}\"}}\n", clip("carphone_pristine.mp4"));
    let other = pattern("other", "64x48");
    let listen = configure(path, &(file("off") + &other));
    let child = start(path);
    ready(&listen);
    ordered(path, &["disable", "off"]);
    drain(child, path);
    let once = |streams: &str| {
        configure(path, streams);
        let output = ghostwatch(path).args(["run", "--once"]).output().unwrap();
        (output.status.code(), said(&output))
    };
    let (code, why) = once(&(file("good") + &file("off")));
    assert!(code == Some(1) && why.contains("not classified: off is disabled"), "{code:?} {why}");
    crashed(path, "evil");
    let (code, why) = once(&(file("evil") + &file("good") + &file("off")));
    let expected = "ghostwatch: not classified: evil is quarantined, off is disabled\n";
    assert!(code == Some(1) && why.ends_with(expected), "{code:?} {why}");
    let (code, why) = once(&file("good"));
    assert_eq!(code, Some(0), "{why}");
    let events = events(path);
    let (decoded, published) = account(&events)["good"];
    assert!(0 < decoded && decoded == published, "{published} of {decoded}");
}

#[test]
fn once_ends_though_a_file_cannot_be_started_and_counts_what_was_read_before_it_was_disabled() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let clip = clip("carphone_pristine.mp4");
    // Two minutes, of which the orders need a part.
    let slow = "{url: \"test:?size=320x240&fps=5&frames=600\", realtime: true}";
    let streams = format!("  done: {{url: \"{clip}\"}}\n  slow: {slow}\n");
    let listen = configure(path, &streams);
    let log = fs::File::create(path.join("log")).unwrap();
    let mut run = ghostwatch(path);
    let mut child = run.args(["run", "--once"]).stderr(log).stdout(Stdio::null()).spawn().unwrap();
    wait_until("slow labels", || 0 < published(&listen, "slow"));
    // A stream's epoch is looked up in the journal, which is not found now.
    fs::rename(path.join("journal.db"), path.join("away.db")).unwrap();
    ordered(path, &["restart", "slow"]);
    wait_until("slow is down", || is_in(&listen, "slow", "down"));
    wait_until("the end of done", || is_in(&listen, "done", "ended"));
    ordered(path, &["disable", "done"]);
    let deadline = within(30_000);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    let log = fs::read_to_string(path.join("log")).unwrap();
    let why = log.lines().last().unwrap();
    let expected = "ghostwatch: not classified: slow cannot be started: ";
    assert!(status.code() == Some(1) && why.starts_with(expected), "{status} {why}");
    assert!(!why.contains("done"), "it was read to its end: {why}");
}
