//! `check --probe` says what each stream sends or why it does not, `doctor` what is missing.

use std::{
    fs::{self, Permissions},
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Output,
};

use serde_json::Value;

use crate::{
    end_to_end::{clip, configure, drain, free_port, ghostwatch, published, start},
    support::wait_until,
    support_rtsp::{Media, Server},
};

fn run(folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = ghostwatch(folder).args(arguments).output().unwrap();
    assert!(!stdout.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    (status.code(), String::from_utf8(stdout).unwrap())
}

fn number(it: &Value) -> f64 {
    it.as_f64().unwrap_or_else(|| panic!("{it} is a number"))
}

#[test]
fn a_probe_says_what_comes_of_every_stream_and_what_to_do_about_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let media = Media::Pattern { size: (320, 240), fps: 10 };
    let camera = Server::start(&media, 0, Some(("viewer", "right")));
    let wrong = Server::start(&media, 0, Some(("viewer", "right")));
    let gone = free_port();
    configure(
        folder.path(),
        &format!(
            "  camera: {{url: \"{0}\", username: viewer, password: right}}\n  \
               clip: {{url: \"{1}\"}}\n  \
               gone: {{url: \"rtsp://127.0.0.1:{gone}/a\"}}\n  \
               pattern: {{url: \"test:?size=64x48&fps=20&frames=40\"}}\n  \
               wrong1: {{url: \"{2}\", username: viewer, password: wrong}}\n  \
               wrong2: {{url: \"{2}?channel=2\", username: viewer, password: wrong}}\n",
            camera.url(),
            clip("bikes.mp4"),
            wrong.url(),
        ),
    );
    let (code, json) = run(folder.path(), &["check", "--probe", "--format", "json"]);
    assert_eq!(code, Some(3), "{json}");
    let json: Value = serde_json::from_str(&json).unwrap();
    let probes = &json["probes"];
    let it = &probes["camera"];
    assert_eq!((&it["ok"], &it["failure"]), (&true.into(), &Value::Null), "{it}");
    for (name, expected) in [("transport", "tcp"), ("codec", "h264"), ("decoder", "avdec_h264")] {
        assert_eq!(it[name], expected, "{it}");
    }
    assert!(it["server"].as_str().is_some_and(|it| it.contains("GStreamer")), "{it}");
    assert_eq!((&it["width"], &it["height"]), (&320.into(), &240.into()));
    // It is the server's own clock that makes the pictures, on a machine that does more.
    assert!((9.0..11.0).contains(&number(&it["measured_fps"])), "{it}");
    assert_eq!(it["keyframe_pictures"], 10, "{it}");
    assert_eq!(it["b_frames"], false, "{it}");
    assert_eq!(it["sender_reports"], true, "{it}");
    assert!(number(&it["clock_offset_seconds"]).abs() < 1.0, "{it}");

    let it = &probes["clip"];
    assert_eq!((&it["ok"], &it["width"], &it["height"]), (&true.into(), &640.into(), &272.into()));
    assert!((24.9..25.1).contains(&number(&it["announced_fps"])), "{it}");
    assert!((24.5..25.5).contains(&number(&it["measured_fps"])), "{it}");
    let it = &probes["pattern"];
    assert_eq!((&it["pictures"], &it["codec"]), (&40.into(), &"raw".into()), "{it}");

    assert_eq!(probes["gone"]["failure"]["code"], "refused");
    assert!(probes["gone"]["failure"]["advice"].as_str().is_some_and(|it| it.contains("port")));
    let details = ["wrong1", "wrong2"].map(|it| {
        assert_eq!(probes[it]["failure"]["code"], "auth");
        probes[it]["failure"]["detail"].as_str().unwrap().to_owned()
    });
    let untried = details.iter().filter(|it| it.starts_with("not tried: another stream"));
    assert_eq!(untried.count(), 1, "{details:?}");
}

#[test]
fn a_probe_of_streams_that_are_all_good_is_a_success_and_a_wrong_configuration_is_not_probed() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), "  p: {url: \"test:?size=64x48&fps=20&frames=40\"}\n");
    let (code, text) = run(folder.path(), &["check", "--probe"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("\np: ok\n") && text.ends_with("\n1 probed, all ok\n"), "{text}");
    fs::write(folder.path().join("config.yaml"), "version: 2\n").unwrap();
    let (code, text) = run(folder.path(), &["check", "--probe", "--format", "json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &json["probes"]), (Some(2), &Value::Null));
}

/// The level and text of what `doctor` found.
fn found(json: &Value, what: &str) -> Vec<(String, String)> {
    let all = json["findings"].as_array().unwrap().iter().filter(|it| it["what"] == what);
    let text = |it: &Value| it.as_str().unwrap().to_owned();
    all.map(|it| (text(&it["level"]), text(&it["found"]))).collect()
}

fn doctor(folder: &Path) -> (Option<i32>, Value) {
    let (code, text) = run(folder, &["doctor", "--format", "json"]);
    (code, serde_json::from_str(&text).unwrap())
}

#[test]
fn doctor_tells_the_running_daemon_from_whoever_is_in_its_way() {
    let folder = tempfile::tempdir().unwrap();
    let pattern = "  p: {url: \"test:?size=64x48&fps=20\", realtime: true}\n";
    let stream = format!("{pattern}  gone: {{url: \"rtsp://127.0.0.1:{}/a\"}}\n", free_port());
    let listen = configure(folder.path(), &stream);
    let (code, json) = doctor(folder.path());
    assert_eq!(code, Some(0), "{json}");
    assert_eq!(found(&json, "http.listen"), [("ok".into(), format!("{listen} is free"))]);
    assert!(found(&json, "journal")[0].1.ends_with("not there yet"), "{json}");
    assert!(found(&json, "decoder of H.264")[0].1.starts_with("avdec_h264 (software"), "{json}");

    let child = start(folder.path());
    wait_until("it runs", || 0 < published(&listen, "p"));
    let told = || !found(&doctor(folder.path()).1, "stream gone").is_empty();
    wait_until("a stream is down", told);
    let (code, json) = doctor(folder.path());
    assert_eq!(code, Some(0), "{json}");
    let daemon = format!("process {} writes this journal", child.id());
    assert_eq!(found(&json, "daemon"), [("ok".into(), daemon)]);
    let held = format!("{listen} is held by the running daemon");
    assert_eq!(found(&json, "http.listen"), [("ok".into(), held)]);
    let gone = &found(&json, "stream gone")[0];
    assert!(gone.0 == "warn" && gone.1.contains("(refused)"), "{gone:?}");
    drain(child, folder.path());

    let listener = TcpListener::bind(&listen).unwrap();
    let (code, json) = doctor(folder.path());
    let name = fs::read_to_string("/proc/self/comm").unwrap();
    let taken = format!("{listen} is taken by process {} ({})", std::process::id(), name.trim());
    assert_eq!((code, found(&json, "http.listen")), (Some(1), vec![("fail".into(), taken)]));
    drop(listener);
}

#[test]
fn doctor_tells_who_may_read_a_password_and_what_is_wrong_with_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let password = folder.path().join("password");
    fs::write(&password, "canary\n").unwrap();
    let stream = "  c: {url: \"rtsp://127.0.0.1:1/\", username: u, password_file: password}\n";
    configure(folder.path(), stream);
    let mode = |mode| fs::set_permissions(&password, Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let levels = || {
        let (code, json) = doctor(folder.path());
        let secrets = found(&json, "secret");
        assert!(!json.to_string().contains("canary"), "{json}");
        (code, secrets.into_iter().map(|it| it.0).collect::<Vec<_>>())
    };
    assert_eq!(levels(), (Some(0), vec!["warn".to_owned()]));
    mode(0o640);
    assert_eq!(levels(), (Some(0), vec!["ok".to_owned()]));
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("password_file: password", "password_file: gone")).unwrap();
    let (code, json) = doctor(folder.path());
    assert_eq!(code, Some(1), "{json}");
    let (level, said) = &found(&json, "configuration")[0];
    assert!(level == "fail" && said.contains("password_file"), "{said}");
}
