//! A password is nowhere but in the connection: not in a log, event, metric, answer or argument,
//! whatever happens to the stream and however loud the log is.

use std::{fs, path::Path, process::Stdio};

use crate::{
    end_to_end::{configure, drain, free_port, get, ghostwatch, published},
    source,
    support::within,
    support_http::{Content, Server as Http},
    support_rtsp::{Media, Server},
};

/// With every character that URLs, YAML, shells and headers treat in a way of their own.
const CANARY: &str = "cAn:@/?#%&'\"\\rÿ✓y";

fn encoded(text: &str, upper: bool) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric();
    let byte = |it: u8| match (plain(it), upper) {
        (true, _) => char::from(it).to_string(),
        (_, true) => format!("%{it:02X}"),
        (_, false) => format!("%{it:02x}"),
    };
    text.bytes().map(byte).collect()
}

fn base64(text: &str) -> String {
    gio::glib::base64_encode(text.as_bytes()).trim_end_matches('=').to_owned()
}

fn in_structure(text: &str) -> String {
    let byte = |it: u8| match it {
        it if it.is_ascii_alphanumeric() || b"_-+/:.".contains(&it) => char::from(it).to_string(),
        0x20..0x7f => format!("\\{}", char::from(it)),
        _ => format!("\\{it:03o}"),
    };
    text.bytes().map(byte).collect()
}

/// Every form in which the canary could come out.
fn forms() -> Vec<String> {
    let mut forms = vec![CANARY.to_owned(), encoded(CANARY, true), encoded(CANARY, false)];
    // With what stands before it in a header, at each of the three alignments.
    forms.push(base64(&format!("viewer:{CANARY}")));
    for pad in ["", "x", "xy"] {
        let coded = base64(&format!("{pad}{CANARY}"));
        // The first and last digits mix with what is beside it.
        forms.push(coded[4..coded.len() - 2].to_owned());
    }
    // As JSON and Rust's `{:?}` write it.
    forms.push(CANARY.replace('\\', "\\\\").replace('"', "\\\""));
    // As GStreamer writes a string into a structure, and that one into another.
    for secret in [CANARY.to_owned(), encoded(CANARY, true)] {
        let once = in_structure(&secret);
        forms.extend([in_structure(&once), once]);
    }
    // The parts that no escaping changes.
    forms.push("rÿ✓y".to_owned());
    forms
}

fn check(where_: &str, text: &str) {
    for form in forms() {
        if let Some(at) = text.find(&form) {
            let start = text[..at].rfind('\n').map_or(0, |it| it + 1);
            let line = text[start..].lines().next().unwrap();
            panic!("{where_} has {form:?}: {line}");
        }
    }
}

#[test]
fn a_password_with_every_awkward_character_comes_out_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let media = Media::Pattern { size: (320, 240), fps: 5 };
    let right = Server::start(&media, 0, Some(("viewer", CANARY)));
    let other = Server::start(&media, 0, Some(("viewer", "another")));
    let http = Http::start(Content::Status("401 Unauthorized"));
    let canary = encoded(CANARY, true);
    let user = "username: viewer, password_file: password";
    let streams = format!(
        "  right: {{url: \"{}?token={canary}\", {user}}}\n  \
           wrong: {{url: \"{}?password={canary}&x=1\", {user}}}\n  \
           written: {{url: \"rtsp://viewer:{canary}@127.0.0.1:{}/a\"}}\n  \
           web: {{url: \"{}?password={canary}\", {user}}}\n  \
           unknown: {{url: \"rtsp://nowhere.invalid/user=a_password={canary}\", {user}}}\n",
        right.url(),
        other.url(),
        free_port(),
        http.url()
    );
    fs::write(folder.path().join("password"), format!("{CANARY}\n")).unwrap();
    let listen = configure(folder.path(), &streams);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text + "log: {level: trace, format: text}\n").unwrap();
    let file = |name: &str| fs::File::create(folder.path().join(name)).unwrap();
    let child = ghostwatch(folder.path())
        .args(["run", "--print"])
        .env("GST_DEBUG", "*:6")
        .env("RUST_BACKTRACE", "full")
        .stderr(file("log"))
        .stdout(file("labels"))
        .spawn()
        .unwrap();
    let process = format!("/proc/{}", child.id());
    let deadline = within(90_000);
    let ended = |metrics: &str, id: &str| {
        let failed = format!("stream_connects_total{{result=\"failed\",stream=\"{id}\"}} ");
        let value = metrics.lines().find_map(|it| it.split_once(&failed));
        value.is_some_and(|it| it.1 != "0")
    };
    loop {
        let metrics = get(&listen, "/metrics").unwrap_or_default();
        let failed = ["wrong", "written", "web", "unknown"].iter().all(|it| ended(&metrics, it));
        if failed && 3 < published(&listen, "right") {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{metrics}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    for path in ["/metrics", "/livez", "/readyz?verbose", "/api/v1/streams", "/"] {
        check(path, &get(&listen, path).unwrap());
    }
    for name in ["cmdline", "environ"] {
        check(name, &String::from_utf8_lossy(&fs::read(format!("{process}/{name}")).unwrap()));
    }
    check_commands(folder.path());
    drain(child, folder.path());
    for name in ["log", "labels"] {
        let text = String::from_utf8(fs::read(folder.path().join(name)).unwrap()).unwrap();
        check(name, &text);
    }
    let journal = fs::read(folder.path().join("journal.db")).unwrap();
    check("journal", &String::from_utf8_lossy(&journal));
    // The log was as loud as it was told to be, and hid what it should.
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("LOG rtspsrc") && log.contains("/stream?***"), "GST_DEBUG is shown");
}

/// Checks what the commands say of the running daemon and its configuration.
fn check_commands(folder: &Path) {
    let commands: [&[&str]; 9] = [
        &["doctor"],
        &["doctor", "--format", "json"],
        &["check", "--probe", "--probe-time", "1"],
        &["check", "--probe", "--probe-time", "1", "--format", "json"],
        &["streams"],
        &["check"],
        &["check", "--format", "json"],
        &["tail", "--from", "earliest"],
        &["tail", "--from", "earliest", "--format", "ndjson"],
    ];
    for arguments in commands {
        let mut command = ghostwatch(folder);
        command.args(arguments).stdin(Stdio::null()).env("GST_DEBUG", "*:6");
        let output = command.output().unwrap();
        check(&arguments.join(" "), &String::from_utf8_lossy(&output.stdout));
        check(&arguments.join(" "), &String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_password_that_http_basic_sends_is_in_no_log_however_gstreamer_writes_it() {
    const RIGHT: &str = "viewer:cAn:@/?#%&'\"\\rÿ✓y";
    assert_eq!(RIGHT, format!("viewer:{CANARY}"));
    let folder = tempfile::tempdir().unwrap();
    let clip = fs::read(source::clip("carphone_pristine.mp4")).unwrap();
    let right = Http::start(Content::Protected(clip, RIGHT));
    let wrong = Http::start(Content::Status("401 Unauthorized"));
    fs::write(folder.path().join("password"), format!("{CANARY}\n")).unwrap();
    let user = "username: viewer, password_file: password";
    let canary = encoded(CANARY, true);
    let streams = format!(
        "  right: {{url: \"{}\", {user}}}\n  written: {{url: \"{}\"}}\n  wrong: {{url: \"{}\", {user}}}\n",
        right.url(),
        right.url().replace("//", &format!("//viewer:{canary}@")),
        wrong.url(),
    );
    let listen = configure(folder.path(), &streams);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text + "log: {level: trace, format: text}\n").unwrap();
    let log = || fs::read_to_string(folder.path().join("log")).unwrap();
    let child = ghostwatch(folder.path())
        .arg("run")
        .env("GST_DEBUG", "*:6")
        .stderr(fs::File::create(folder.path().join("log")).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = within(60_000);
    let refused = "ghostwatch_stream_connects_total{result=\"failed\",stream=\"wrong\"} 1";
    while published(&listen, "right") == 0
        || published(&listen, "written") == 0
        || !get(&listen, "/metrics").unwrap().contains(refused)
    {
        assert!(std::time::Instant::now() < deadline, "{}", get(&listen, "/metrics").unwrap());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    drain(child, folder.path());
    let log = log();
    check("log", &log);
    assert!(log.contains("LOG souphttpsrc") && log.contains("***"), "GST_DEBUG is shown");
}
