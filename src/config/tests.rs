//! A configuration's promises: every problem at once, in its place, no secrets, in little time.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use expect_test::{Expect, expect};

use super::{
    raw::{Absent, Field, Kind},
    *,
};
use crate::{
    edge::WhenFull,
    infer::wanted::Use,
    sink::settings::{Rotation, Target},
    source::url::Transport,
};

const ALONE: Options = Options { env: fake_env, secrets: true, files: false };

fn fake_env(name: &str) -> Option<String> {
    match name {
        "CAM" => Some("from-env".to_owned()),
        "STATE_DIRECTORY" => None,
        _ => None,
    }
}

fn read(text: &str) -> Result<Loaded, Problems> {
    load_text(text, Path::new("config.yaml"), Path::new("/etc/gw"), &ALONE)
}

fn plan(text: &str) -> Plan {
    match read(&format!("version: 1\n{text}")) {
        Ok(loaded) => loaded.plan,
        Err(problems) => panic!("{problems}"),
    }
}

fn check(text: &str, expected: &Expect) {
    expected.assert_eq(&read(text).unwrap_err().to_string());
}

#[test]
fn ten_planted_mistakes_give_exactly_ten_lines() {
    let text = r#"version: 1
instance: "a b"
defaults: {latency: 200, transport: tpc}
streams:
  Front: {url: "rtsp://cam/1"}
  yard: {url: "exec:rm -rf", max_fsp: 5}
batch: {max_size: 300}
journal:
  retain: {bytes: 20}
http: {listen: "0.0.0.0:9464"}
sinks: [{type: nat}]
"#;
    let problems = read(text).unwrap_err();
    assert_eq!(problems.list.len(), 10, "{problems}");
    check(
        text,
        &expect![[r#"
            config.yaml:2:11: instance: `a b` has other characters; allowed: a-z, A-Z, 0-9, `.`, `_`, `-`
            config.yaml:3:21: defaults.latency: expected a duration with its unit, found the number 200; allowed: 0ms to 10s, in us, ms, s, m, h or d
            config.yaml:3:37: defaults.transport: `tpc` is unknown; did you mean `tcp`?; allowed: tcp, udp, auto
            config.yaml:5:3: streams.Front: the id is not valid; allowed: 1 to 63 of a-z, 0-9, `_`, `-`, a letter or digit first
            config.yaml:6:15: streams.yard.url: unknown scheme `exec`; expected file, rtsp, rtsps, http, https or test
            config.yaml:6:30: streams.yard.max_fsp: unknown field; did you mean `max_fps`?; allowed: url, username, password, password_file, password_credential, max_fps, transport, latency, stall_after, max_clock_offset, when_full, decode, health, loop, realtime, start_time, weight, tls
            config.yaml:7:19: batch.max_size: 300 is out of range; allowed: 1 to 256
            config.yaml:9:19: journal.retain.bytes: expected a size with its unit, found the number 20; allowed: null, or 1MiB to 1024TiB, in B, KiB, MiB, GiB, TiB, kB, MB, GB or TB
            config.yaml:10:16: http.listen: 0.0.0.0:9464 can be reached from outside, and http.token_file is not set; allowed: a loopback address, or any with http.token_file
            config.yaml:11:16: sinks[0].type: `nat` is unknown; did you mean `nats`?; allowed: stdout, file, nats, redis, mqtt, kafka, webhook"#]],
    );
}

#[test]
fn every_kind_of_mistake_has_its_message() {
    let text = r#"version: 2
surprise: 1
defaults: [1]
streams:
  a: {}
  b: 5
  c: {url: 5, weight: 0}
  d: {url: "test:", start_time: yesterday, username: u}
  d: {url: "test:"}
  e: {url: "rtsp://u:canary@cam/", password: x, tls: {verify: yes}}
  f: {url: "rtsp://cam/", password_file: /nonexistent, password: x, password: y}
  g: {url: "rtsp://cam/", password: "${env:NOPE}", max_fps: 0}
  h: {url: "rtsp://canary@canary:canary/"}
  i: {url: "rtsps://cam/", tls: {fingerprint: "sha256:00"}}
  j: {url: "https://cam/", tls: {fingerprint: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}}
  <<: {url: "test:"}
model: {mean: [0.5, 0.5], std: [0, 1, 1], resize: 224, input: 256}
device: {use: gpu, precision: int8, lanes: none}
batch: {max_size: 8, buckets: [1, 16]}
sinks: [{type: file}, {type: stdout, keep: 2}, {type: stdout}]
http: {listen: 9464}
"#;
    check(
        text,
        &expect![[r#"
            config.yaml:1:10: version: 2 is out of range; allowed: 1
            config.yaml:2:1: surprise: unknown field; allowed: version, instance, defaults, streams, model, device, batch, journal, sinks, http, log, limits
            config.yaml:3:11: defaults: expected a mapping, found a list
            config.yaml:5:6: streams.a: `url` is missing; allowed: A path, or a file:, rtsp:, rtsps:, http:, https: or test: URL, such as `test:?size=640x360&fps=15`
            config.yaml:6:6: streams.b: expected a mapping, found the number 5
            config.yaml:7:12: streams.c.url: expected text, found a word without quotes; allowed: text of 1 to 4096 bytes, in quotes if it looks like something else
            config.yaml:7:23: streams.c.weight: 0 is out of range; allowed: 1 to 100
            config.yaml:8:33: streams.d.start_time: expected a time, found `yesterday`; allowed: null, or RFC 3339, such as 2026-11-24T01:55:12Z
            config.yaml:8:54: streams.d.username: only an rtsp, rtsps, http or https stream can have this
            config.yaml:9:3: streams.d: is there twice
            config.yaml:10:46: streams.e.password: there is a password in the URL too
            config.yaml:10:63: streams.e.tls.verify: expected true or false, found `yes`; allowed: true, false
            config.yaml:11:42: streams.f.password_file: there is `password` too
            config.yaml:11:69: streams.f.password: is there twice
            config.yaml:12:37: streams.g.password: the environment variable NOPE is not set
            config.yaml:12:61: streams.g.max_fps: 0 is out of range; allowed: null, or 0.001 to 1000
            config.yaml:13:12: streams.h.url: the port is not a number from 1 to 65535; if the URL has a password, write its @ : / ? # percent-encoded, or better use password_file
            config.yaml:14:47: streams.i.tls.fingerprint: this is no fingerprint; allowed: `sha256:` and 64 hex digits
            config.yaml:15:47: streams.j.tls.fingerprint: only an rtsps stream can have this; for https put the certificate itself into a `ca_file`
            config.yaml:16:3: streams: merge keys are not supported; write what streams share under `defaults`
            config.yaml:17:15: model.mean: the list has 2 entries; allowed: null, or a list of 3, each 0 to 1
            config.yaml:17:33: model.std[0]: 0 is out of range; allowed: 0.001 to 10
            config.yaml:17:63: model.input: 256 is more than `resize`, 224; allowed: at most 224
            config.yaml:18:15: device.use: `gpu` is unknown; allowed: auto, cpu, native, cuda:N with N from 0 to 255
            config.yaml:18:31: device.precision: `int8` is unknown; allowed: auto, fp32, bf16, fp16
            config.yaml:18:44: device.lanes: expected a whole number, found `none`; allowed: auto, or 1 to 256
            config.yaml:19:31: batch.buckets: the largest is 16; allowed: 8 (batch.max_size) as the largest
            config.yaml:20:9: sinks[0].path: a file sink needs it
            config.yaml:20:44: sinks[1].keep: only a file sink can have this
            config.yaml:20:48: sinks[2].name: another sink is called stdout too; give each a name of its own
            config.yaml:21:16: http.listen: expected text, found the number 9464; allowed: text of 1 to 64 bytes, in quotes if it looks like something else"#]],
    );
}

#[test]
fn text_that_is_no_yaml_has_its_place() {
    let texts = [
        "version: 1\nstreams: {a: [}\n",
        "version: 1\n\tlog: {}\n",
        "version: 1\n---\nversion: 1\n",
        "a: *b\n",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "version: \"1\n",
        "",
        "- 1\n",
    ];
    let messages: Vec<_> = texts.map(|it| read(it).unwrap_err().to_string()).into();
    expect![[r#"
        config.yaml:2:14: mismatched bracket '[' closed by '}'
        config.yaml:1:10: while scanning a plain scalar, found a tab
        config.yaml:2:1: there is more than one document in the file
        config.yaml:1:4: alias references unknown anchor
        config.yaml:1:25: recursion limit exceeded
        config.yaml:1:10: unclosed quote
        config.yaml:1:1: `version` is missing; allowed: The version of this format
        config.yaml:1:1: expected a mapping, found a list"#]]
    .assert_eq(&messages.join("\n"));
}

/// Memory is bounded by the budget that is asserted here through time: there is no room for a
/// second's work in what fits.
fn hostile(what: &str, text: &str, expected: &str) {
    let start = Instant::now();
    let problems = read(text).map(|it| it.plan.streams.len()).expect_err(what);
    let took = start.elapsed();
    let message = problems.to_string();
    assert!(message.contains(expected), "{what}: {message}");
    assert!(message.len() < 20_000, "{what}: {} bytes of message", message.len());
    // The limit is 100 ms; a machine that is shared gets a factor.
    assert!(took < Duration::from_millis(400), "{what}: {took:?}");
    println!("{what}: {took:?}");
}

#[test]
fn hostile_input_is_refused_in_little_time_and_with_its_place() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let alias = format!("*a{}, ", i - 1).repeat(10);
        bomb += &format!("a{i}: &a{i} [{alias}]\n");
    }
    hostile("alias bomb", &bomb, "config.yaml:");
    hostile("200k brackets", &"[".repeat(200_000), "config.yaml:1:");
    hostile("2000 flow levels", &format!("a: {}", "{a: ".repeat(2000)), "config.yaml:1:");
    let levels: String = (0..1_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    hostile("1000 block levels", &levels, "config.yaml:");
    let dashes = "- ".repeat(2000);
    hostile("2000 block lists", &dashes, "config.yaml:");
    hostile("NUL", "version: 1\nlog: {level: \"a\0b\"}\n", "config.yaml:2:");
    hostile("control character", "version: 1\nlog: {level: a\u{7}b}\n", "config.yaml:2:");
    hostile("tab", "version: 1\nlog:\n\tlevel: info\n", "config.yaml:3:");
    hostile("tag", "version: 1\nlog: !!python/object:os.system {level: info}\n", "config.yaml:2:");
    hostile("binary", "version: 1\ninstance: !!binary aGk\n", "config.yaml:2:");
    hostile(
        "duplicate key",
        "version: 1\nversion: 1\n",
        "config.yaml:2:1: version: is there twice",
    );
    hostile("merge", "version: 1\nlog:\n  <<: {level: info}\n", "config.yaml:3:3: log: merge keys");
    hostile("numbers", &format!("version: {}", "9".repeat(500_000)), "config.yaml:1:");
    hostile("nodes", &"- a\n".repeat(200_000), "config.yaml:");
    let few: String = (0..9_000).map(|i| format!("k{i}: 1\n")).collect();
    hostile("few keys", &few, "there are 9000 entries");
    hostile("keys", &(0..90_000).map(|i| format!("k{i}: 1\n")).collect::<String>(), "config.yaml:");
    hostile("long key", &format!("{}: 1", "k".repeat(1_000_000)), "config.yaml:1:");
    hostile("long text", &format!("version: 1\ninstance: {}", "k".repeat(1_000_000)), "bytes");
    let stream = |i| format!("  s{i}: {{url: 'test:', max_fps: 1}}\n");
    let streams: String = (0..10_000).map(stream).collect();
    let expected = "there is more in it than in any configuration";
    hostile("10,000 streams", &format!("version: 1\nstreams:\n{streams}"), expected);
    let streams: String = (0..2_000).map(stream).collect();
    let expected = "there are 2000 entries; allowed: at most 1024";
    hostile("2,000 streams", &format!("version: 1\nstreams:\n{streams}"), expected);
    let streams: String = (0..300).map(stream).collect();
    hostile("300 streams", &format!("version: 1\nstreams:\n{streams}"), "at most 256");
    hostile("wrong ids", &format!("version: 1\nstreams:\n{}", streams.replace(" s", " S")), "more");
}

#[test]
fn a_byte_order_mark_does_no_harm() {
    assert!(read("\u{feff}version: 1\n").is_ok());
}

#[test]
fn a_file_that_is_too_large_or_no_text_or_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    let check = |bytes: &[u8], expected: &str| {
        fs::write(&path, bytes).unwrap();
        let message = load(&path, &ALONE).map(|_| ()).unwrap_err().to_string();
        assert!(message.ends_with(expected), "{message}");
    };
    let mut scalar = b"version: 1\ninstance: ".to_vec();
    scalar.resize(20 << 20, b'a');
    check(&scalar, "it is larger than 1 MiB");
    check(b"version: \xff", "the file is not UTF-8 text");
    assert!(load(folder.path(), &ALONE).unwrap_err().to_string().ends_with("it is a folder"));
    let missing = load(&folder.path().join("x"), &ALONE).unwrap_err().to_string();
    assert!(missing.contains("No such file"), "{missing}");
}

#[test]
fn ids_that_could_leave_their_place_are_refused() {
    let long = "a".repeat(64);
    let ids = [
        "../../x",
        "a/b",
        "A B",
        "a\\nb",
        "é",
        long.as_str(),
        "+",
        "#",
        "a.b",
        "*",
        ">",
        "a\\\"b",
        "",
        "-a",
        "_a",
        "A",
    ];
    for id in ids {
        let text = format!("version: 1\nstreams: {{\"{id}\": {{url: 'test:'}}}}");
        let problems = read(&text).map(|_| ()).expect_err(id);
        assert_eq!(problems.list.len(), 1, "{problems}");
        let message = problems.to_string();
        assert!(message.contains("the id is not valid; allowed: 1 to 63 of"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    for id in ["a", "0", "front-1_x", &"a".repeat(63)] {
        assert!(plan(&format!("streams: {{\"{id}\": {{url: 'test:'}}}}")).streams.contains_key(id));
    }
}

#[test]
fn schemes_that_could_run_something_are_refused() {
    for url in ["exec:id", "pipe:0", "javascript:x", "rtmp://x/", "gst-launch:x", "EXEC:id"] {
        let text = format!("version: 1\nstreams: {{a: {{url: \"{url}\"}}}}");
        let message = read(&text).map(|_| ()).expect_err(url).to_string();
        let scheme = url.split(':').next().unwrap().to_lowercase();
        assert!(message.contains(&format!("unknown scheme `{scheme}`")), "{message}");
    }
    let it = plan("streams: {a: {url: 'videotestsrc ! fakesink'}}");
    let path = "file:/etc/gw/videotestsrc ! fakesink";
    assert_eq!(it.streams["a"].url.expose(), path, "a file's name, whatever it looks like");
}

#[test]
fn the_plan_is_complete_and_its_paths_are_the_file_s() {
    let it = plan("");
    assert_eq!(it.model.weights, Path::new("/etc/gw/weights/ghostnet-1x-demo.safetensors"));
    assert_eq!(it.journal.path, Path::new("/etc/gw/data/journal.db"));
    assert_eq!(it.journal.retain.bytes, Some(20 << 30));
    assert_eq!(it.journal.retain.age, Some(Duration::from_secs(7 * 86_400)));
    assert_eq!(it.batch.max_wait, Duration::from_millis(5));
    assert_eq!(it.http.listen.to_string(), "127.0.0.1:9464");
    assert!(it.device.device == Use::Auto && !it.instance.is_empty());

    // What a build without libtorch refuses.
    let cuda = cfg!(feature = "libtorch");
    let (device, wanted) = if cuda { ("cuda:1", Use::Cuda(1)) } else { ("native", Use::Native) };
    let it = plan(&format!(
        "defaults: {{max_fps: 5, transport: udp}}\n\
         streams:\n  \
           a: {{url: 'rtsp://cam/', max_fps: null}}\n  \
           b: {{url: clips/a b.mp4, start_time: '2026-11-24T01:55:12Z', weight: 3}}\n  \
           c: {{url: 'test:', when_full: latest}}\n\
         device: {{use: '{device}', lanes: 2}}\n\
         batch: {{buckets: [32, 8, 8]}}\n\
         sinks: [{{type: stdout}}, {{type: file, name: all, path: out.ndjson, keep: 2}}]\n"
    ));
    let (a, b, c) = (&it.streams["a"], &it.streams["b"], &it.streams["c"]);
    assert_eq!((a.max_fps, b.max_fps, c.max_fps), (None, Some(5.0), Some(5.0)));
    assert_eq!((a.when_full, b.when_full), (WhenFull::Latest, WhenFull::Block));
    assert_eq!((c.when_full, c.transport), (WhenFull::Latest, Transport::Udp));
    assert_eq!(b.url.expose(), "file:/etc/gw/clips/a b.mp4");
    assert_eq!((b.weight, it.device.device), (3, wanted));
    assert_eq!(it.batch.buckets, Some(vec![8, 32]));
    let path = Path::new("/etc/gw/out.ndjson").to_owned();
    let target = Target::File(path, Rotation { bytes: 100 << 20, keep: 2, sync: false });
    assert_eq!((it.sinks[1].name.as_str(), &it.sinks[1].target), ("all", &target));
}

#[test]
fn under_systemd_the_journal_is_in_the_state_directory() {
    let env = |name: &str| (name == "STATE_DIRECTORY").then(|| "/var/lib/gw:/x".to_owned());
    let options = Options { env, secrets: false, files: false };
    let journal = |text: &str| {
        let loaded = load_text(text, Path::new("c"), Path::new("/etc/gw"), &options).unwrap();
        loaded.plan.journal.path
    };
    assert_eq!(journal("version: 1"), Path::new("/var/lib/gw/journal.db"));
    assert_eq!(journal("version: 1\njournal: {path: a.db}"), Path::new("/etc/gw/a.db"));
}

#[test]
fn secrets_come_from_where_they_are_named_and_are_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("pw"), "canary:@/?#%&'\"\\é\n").unwrap();
    let text = "version: 1\n\
        http: {listen: '0.0.0.0:1', token_file: pw}\n\
        streams:\n  \
          a: {url: 'rtsp://u:canary@%40@cam:8554/x?token=canary'}\n  \
          b: {url: 'rtsp://cam/', username: canary, password_file: pw}\n  \
          c: {url: 'rtsp://cam/', password: '${env:CAM}'}\n  \
          d: {url: 'rtsp://u:${env:CAM}@cam/'}\n";
    let loaded = load_text(text, Path::new("c.yaml"), folder.path(), &ALONE).unwrap();
    let stream = |id: &str| &loaded.plan.streams[id];
    let password = |id: &str| stream(id).password.as_ref().map(|it| it.expose().to_owned());
    assert_eq!(stream("a").url.expose(), "rtsp://cam:8554/x?token=canary");
    assert_eq!(password("a").as_deref(), Some("canary@@"));
    assert_eq!(password("b").as_deref(), Some("canary:@/?#%&'\"\\é"));
    assert_eq!(password("c").as_deref(), Some("from-env"));
    assert_eq!(password("d").as_deref(), Some("from-env"));
    assert_eq!(loaded.plan.http.token.as_ref().map(|it| it.expose().len()), Some(18));
    assert_eq!(loaded.warnings.list.len(), 1, "only `a` is written in the file");
    let printed = format!("{loaded:?}{}{}", loaded.warnings, stream("a").shown());
    assert!(!printed.contains("canary") && !printed.contains("from-env"), "{printed}");
    assert!(printed.contains("rtsp://cam:8554/x?***"), "{printed}");
}

#[test]
fn what_the_environment_says_is_not_quoted() {
    let env = |name: &str| (name == "PW").then(|| "canary !".to_owned());
    let options = Options { env, ..ALONE };
    let text = "version: 1\ninstance: ${env:PW}\nhttp: {listen: '${env:PW}'}\n\
        streams: {a: {url: 'rtsp://u:${env:PW}@cam/'}}\n\
        device: {use: '${env:PW}'}";
    let problems = load_text(text, Path::new("c.yaml"), Path::new(""), &options).unwrap_err();
    assert_eq!(problems.list.len(), 4, "{problems}");
    assert!(!problems.to_string().contains("canary"), "{problems}");
    assert_eq!(scalar::found(&Tree::Text("canary".to_owned()), true), "text");
}

#[test]
fn systemd_credentials_are_read_and_missing_ones_named() {
    let text = "version: 1\nstreams: {a: {url: 'rtsp://cam/', password_credential: cam-1}}";
    let message = read(text).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("$CREDENTIALS_DIRECTORY is not set"), "{message}");
    let without = Options { secrets: false, ..ALONE };
    assert!(load_text(text, Path::new("c"), Path::new(""), &without).is_ok());
    let real = Options { env: |_| Some(env!("CARGO_MANIFEST_DIR").to_owned()), ..ALONE };
    let named = text.replace("cam-1", "Cargo.toml");
    let loaded = load_text(&named, Path::new("c"), Path::new(""), &real).unwrap();
    let password = loaded.plan.streams["a"].password.as_ref().unwrap().expose().to_owned();
    assert!(password.starts_with("[package]") && !password.ends_with('\n'));
    let text = text.replace("cam-1", "../cam");
    let message = read(&text).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("this is no credential's name"), "{message}");
}

#[test]
fn a_password_in_a_file_that_all_may_read_gets_a_stronger_warning() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    fs::write(&path, "version: 1\nstreams: {a: {url: 'rtsp://u:canary@cam/'}}\n").unwrap();
    let warning = |mode| {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        load(&path, &ALONE).unwrap().warnings.to_string()
    };
    assert!(warning(0o644).contains("everyone on this machine may read"));
    let private = warning(0o600);
    assert!(
        private.contains(":2:20: streams.a.url: a password is written in this file"),
        "{private}"
    );
    assert!(!private.contains("everyone"), "{private}");
}

#[test]
fn files_that_are_named_must_be_there_unless_nobody_needs_them() {
    let options = Options { files: true, ..ALONE };
    let text = "version: 1\nstreams: {a: {url: x.mp4}}\nmodel: {weights: w, labels: l}";
    let load = |options| load_text(text, Path::new("c.yaml"), Path::new("/nowhere"), options);
    let problems = load(&options).map(|_| ()).unwrap_err();
    expect![[r#"
        c.yaml:3:18: model.weights: /nowhere/w: no such file
        c.yaml:3:29: model.labels: /nowhere/l: no such file"#]]
    .assert_eq(&problems.to_string());
    assert!(load(&ALONE).is_ok());
}

fn shipped() -> (std::path::PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    (path, text)
}

#[test]
fn the_shipped_file_is_right_and_says_the_defaults() {
    let (path, text) = shipped();
    let loaded = load(&path, &ALONE).unwrap();
    assert_eq!(loaded.warnings.list, []);
    let base = path.parent().unwrap();
    let bare = load_text("version: 1", &path, base, &ALONE).unwrap().plan;
    assert_eq!(Plan { streams: bare.streams.clone(), ..loaded.plan.clone() }, bare);
    let stream = "version: 1\n\
        streams: {pattern: {url: 'test:?size=640x360&fps=15', max_fps: 5, realtime: true, \
          health: {frozen_after: off}}}";
    let stream = load_text(stream, &path, base, &ALONE).unwrap().plan;
    assert_eq!(loaded.plan, stream);
    assert!(text.lines().all(|it| it.chars().count() <= 100));
}

/// Every field of the table, by its name and level.
fn names(fields: &'static [Field], above: &str, out: &mut BTreeSet<String>) {
    for field in fields {
        let path = format!("{above}.{}", field.name);
        let mut kind = &field.kind;
        while let Kind::Or(_, inner) | Kind::List(inner, ..) = kind {
            kind = inner;
        }
        if let Kind::Map(fields) | Kind::Entries(fields) = kind {
            names(fields, &path, out);
        }
        assert!(
            !field.doc.is_empty() && field.doc.ends_with(['.', ']', '…']),
            "{path}: {}",
            field.doc
        );
        out.insert(path);
    }
}

#[test]
fn the_shipped_file_has_every_field_with_a_comment() {
    let (_, text) = shipped();
    let mut all = BTreeSet::new();
    names(raw::ROOT, "", &mut all);
    for path in all {
        let name = path.rsplit('.').next().unwrap();
        let is_there = text
            .lines()
            .any(|it| it.trim_start_matches([' ', '#', '-']).starts_with(&format!("{name}:")));
        assert!(is_there, "{path} is not in config.yaml");
    }
    assert!(matches!(raw::ROOT[0].default, Absent::Required));
}

#[test]
fn the_schema_describes_what_is_read() {
    let schema = schema::json();
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["required"], serde_json::json!(["version"]));
    let stream = &schema["properties"]["streams"]["additionalProperties"];
    assert_eq!(stream["required"], serde_json::json!(["url"]));
    let latency = &schema["properties"]["defaults"]["properties"]["latency"];
    assert_eq!(latency["default"], "200ms");
    assert_eq!(latency["type"], "string");
    let mut all = BTreeSet::new();
    names(raw::ROOT, "", &mut all);
    assert_eq!(schema.to_string().matches("\"description\"").count(), all.len());
}
