//! A changed configuration is followed where it changed, and nowhere else; and how a daemon ends.

use std::{fs, path::Path, process::Child, time::Duration};

use serde_json::{Value, json};

use crate::{
    end_to_end::{FRAME, account, configure, drain, events, get, published, signal, start},
    support::{size, wait_until, within},
    support_proxy::{Mode, Proxy},
    support_rtsp::{Media, Server},
};

fn pattern() -> Media {
    Media::Pattern { size: (320, 240), fps: 10 }
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap()
}

/// Reloads, and waits until that is done.
fn reload(child: &Child, folder: &Path) {
    let done = |log: &str| log.matches("configuration reloaded").count();
    let before = done(&log(folder));
    signal(child, "HUP");
    wait_until("the reload", || before < done(&log(folder)));
}

/// The epochs of a stream, and whether every decoded frame has an event.
fn whole(events: &[Value], stream: &str) -> (Vec<u64>, bool) {
    let mine: Vec<_> =
        events.iter().filter(|it| it["type"] == FRAME && it["subject"] == stream).collect();
    let mut epochs: Vec<_> = mine.iter().map(|it| it["data"]["epoch"].as_u64().unwrap()).collect();
    epochs.dedup();
    (epochs, mine.iter().all(|it| it["data"]["skipped"] == json!({})))
}

#[test]
fn streams_that_did_not_change_lose_no_frame_over_many_reloads() {
    let folder = tempfile::tempdir().unwrap();
    let camera = Server::start(&pattern(), 0, None);
    let text = |i: usize| {
        let (width, level) = (64 + 16 * (i % 2), ["info", "debug"][i / 2 % 2]);
        let other =
            if i.is_multiple_of(3) { "  third: {url: \"test:\", realtime: true}\n" } else { "" };
        let streams = format!(
            "  front: {{url: \"{}\", when_full: block}}\n  changed: {{url: \"test:?size={width}x48\", realtime: \
             true, max_fps: 5}}\n{other}",
            camera.url()
        );
        (streams, format!("log: {{level: {level}}}\n"))
    };
    let listen = configure(folder.path(), &text(1).0);
    let path = folder.path().join("config.yaml");
    let first = fs::read_to_string(&path).unwrap();
    let rest = first.split_once("model:").unwrap().1;
    let child = start(folder.path());
    wait_until("the camera", || 5 < published(&listen, "front"));
    for i in 0..size(100, 1_000) {
        let (streams, level) = text(i);
        fs::write(&path, format!("version: 1\nstreams:\n{streams}model:{rest}{level}")).unwrap();
        reload(&child, folder.path());
    }
    let before = published(&listen, "front");
    wait_until("the camera goes on", || before + 5 < published(&listen, "front"));
    let metrics = get(&listen, "/metrics").unwrap();
    let connects = "ghostwatch_stream_connects_total{result=\"ok\",stream=\"front\"} 1\n";
    assert!(metrics.contains(connects), "{metrics}");
    drain(child, folder.path());
    let events = events(folder.path());
    account(&events);
    assert!(whole(&events, "front").1, "a frame of the stream that did not change is lost");
    assert!(1 < whole(&events, "changed").0.len(), "the other one did change");
}

#[test]
fn a_password_that_is_put_right_is_tried_at_once_and_the_other_streams_do_not_notice() {
    let folder = tempfile::tempdir().unwrap();
    let camera = Server::start(&pattern(), 0, Some(("viewer", "right")));
    let other = Server::start(&pattern(), 0, None);
    let file = folder.path().join("password");
    fs::write(&file, "wrong\n").unwrap();
    let streams = format!(
        "  guarded: {{url: \"{}\", username: viewer, password_file: password, \
         when_full: block}}\n  open: {{url: \"{}\", when_full: block}}\n",
        camera.url(),
        other.url()
    );
    let listen = configure(folder.path(), &streams);
    let child = start(folder.path());
    wait_until("the password is refused", || log(folder.path()).contains("\"code\":\"auth\""));
    wait_until("the other", || 5 < published(&listen, "open"));
    fs::write(&file, "right\n").unwrap();
    reload(&child, folder.path());
    // And not after the five minutes that a refused password waits.
    wait_until("the guarded stream", || 5 < published(&listen, "guarded"));
    let before = published(&listen, "guarded");
    // The same again: nothing has changed.
    reload(&child, folder.path());
    wait_until("it goes on", || before + 5 < published(&listen, "guarded"));
    drain(child, folder.path());
    let events = events(folder.path());
    account(&events);
    for stream in ["open", "guarded"] {
        let (epochs, all) = whole(&events, stream);
        assert!(epochs.len() == 1 && all, "{stream}: {epochs:?}");
    }
}

#[test]
fn a_camera_that_hangs_does_not_hold_up_the_drain() {
    let folder = tempfile::tempdir().unwrap();
    let camera = Server::start(&pattern(), 0, None);
    let proxy = Proxy::start(camera.port());
    let streams =
        format!("  hung: {{url: \"{}\"}}\n  fine: {{url: \"{}\"}}\n", proxy.url(), camera.url());
    let listen = configure(folder.path(), &streams);
    let child = start(folder.path());
    wait_until("both", || 5 < published(&listen, "hung") && 5 < published(&listen, "fine"));
    proxy.set(Mode::Silent);
    drain(child, folder.path());
    account(&events(folder.path()));
}

#[test]
fn a_second_signal_ends_it_at_once_with_130() {
    let folder = tempfile::tempdir().unwrap();
    let camera = Server::start(&pattern(), 0, None);
    let proxy = Proxy::start(camera.port());
    let listen = configure(folder.path(), &format!("  hung: {{url: \"{}\"}}\n", proxy.url()));
    let mut child = start(folder.path());
    wait_until("pictures", || 5 < published(&listen, "hung"));
    // Its teardown takes until the limit of two seconds, so that the second signal meets a drain.
    proxy.set(Mode::Silent);
    signal(&child, "TERM");
    wait_until("the drain", || log(folder.path()).contains("draining"));
    signal(&child, "INT");
    let deadline = within(1_000);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "it goes on");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(status.code(), Some(130));
}
