//! Every way in which a stream fails has a code, and the code is in the event, the metrics, the log
//! and the table of streams, with the last lines of what GStreamer said.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use ghostwatch::{
    frame::{Code, State},
    source::Spec,
};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    end_to_end::{configure, drain, events, free_port, get, ghostwatch, published, start},
    source::{Out, clip, first_failure, frames_of, run_until, spec},
    support::within,
    support_camera::{H264, SDP, camera, described},
    support_http::{Content, Server as Http},
    support_proxy::{Damage, Mode, Proxy},
    support_rtsp::{Media, Server},
};

fn pattern() -> Media {
    Media::Pattern { size: (320, 240), fps: 10 }
}

/// An address that takes no connection and refuses none, as one that is not routed: a listener
/// whose queue is full.
struct Unreachable {
    listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl Unreachable {
    fn new() -> Unreachable {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let limit = Duration::from_millis(300);
        let queued = std::iter::from_fn(|| TcpStream::connect_timeout(&address, limit).ok());
        let queued = queued.take(100).collect::<Vec<_>>();
        assert!(queued.len() < 100, "the queue is never full");
        Unreachable { listener, _queued: queued }
    }

    fn url(&self) -> String {
        format!("rtsp://{}/stream", self.listener.local_addr().unwrap())
    }
}

pub(crate) fn wait_for(what: &str, seconds: u64, mut is: impl FnMut() -> bool) {
    let deadline = within(1_000 * seconds);
    while !is() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The log's lines that say that a stream failed: stream, code, when.
fn failures_in(log: &str) -> Vec<(String, String, OffsetDateTime)> {
    let lines = log.lines().map(|it| serde_json::from_str::<Value>(it).expect("a line of JSON"));
    let failed = lines
        .filter(|it| it["message"].as_str().is_some_and(|it| it.starts_with("the stream failed")));
    let text = |it: &Value| it.as_str().expect("a text").to_owned();
    failed
        .map(|it| {
            let at = OffsetDateTime::parse(&text(&it["timestamp"]), &Rfc3339).unwrap();
            (text(&it["stream"]), text(&it["code"]), at)
        })
        .collect()
}

fn table(folder: &Path) -> String {
    let output = ghostwatch(folder).arg("streams").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Checks one stream's failure in the four places; `was_up` says that it had pictures before.
fn check(folder: &Path, listen: &str, (stream, code, was_up): (&str, &str, bool)) {
    let metrics = get(listen, "/metrics").unwrap();
    let series = if was_up {
        format!("ghostwatch_stream_disconnects_total{{reason=\"{code}\",stream=\"{stream}\"}} ")
    } else {
        format!("ghostwatch_stream_connects_total{{result=\"failed\",stream=\"{stream}\"}} ")
    };
    let value = metrics.lines().find_map(|it| it.strip_prefix(&series));
    assert!(value.is_some_and(|it| it != "0"), "{series}{value:?}");
    let log = fs::read_to_string(folder.join("log")).unwrap();
    let logged = failures_in(&log).iter().any(|it| (&*it.0, &*it.1) == (stream, code));
    assert!(logged, "{stream}: {code} is not in the log");
    let table = table(folder);
    let line = table.lines().find(|it| it.split_whitespace().next() == Some(stream)).unwrap();
    assert!(line.contains(&format!(" {code} ")), "{stream}: {code} is not in {line}");
}

#[test]
fn every_code_is_in_the_event_the_metrics_the_log_and_the_table_with_what_gstreamer_said() {
    let folder = tempfile::tempdir().unwrap();
    let plain = Server::start(&pattern(), 0, None);
    let guarded = Server::start(&pattern(), 0, Some(("viewer", "password")));
    let short = Media::File { path: clip("carphone_pristine.mp4"), times: 1 };
    let short = Server::start(&short, 0, None);
    let broken = Http::start(Content::Status("500 Internal Server Error"));
    let proxy = Proxy::start(plain.port());
    let unreachable = Unreachable::new();
    let no_video = camera(|method| match method {
        "DESCRIBE" => Some(described(SDP)),
        _ => Some("200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned()),
    });
    let plan = [
        ("auth", guarded.url(), Code::Auth, false),
        ("tls", plain.url().replace("rtsp:", "rtsps:"), Code::Tls, false),
        ("timeout", unreachable.url(), Code::Timeout, false),
        ("dns", "rtsp://nowhere.invalid/a".to_owned(), Code::Dns, false),
        ("refused", format!("rtsp://127.0.0.1:{}/a", free_port()), Code::Refused, false),
        ("notfound", plain.url().replace("/stream", "/other"), Code::NotFound, false),
        ("codec", no_video, Code::Codec, false),
        ("eos", short.url(), Code::Eos, true),
        ("stall", proxy.url(), Code::Stall, true),
        ("error", broken.url(), Code::Error, false),
    ];
    let codes: Vec<_> = plan.iter().map(|it| it.2).collect();
    assert!(Code::ALL.iter().all(|it| codes.contains(it)), "a code without a stream");
    let mut streams = String::new();
    for (id, url, ..) in &plan {
        writeln!(streams, "  {id}: {{url: \"{url}\"}}").unwrap();
    }
    let listen = configure(folder.path(), &streams);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text + "log: {level: debug, format: json}\n").unwrap();
    let child = start(folder.path());
    wait_for("pictures of the stream that will stall", 30, || 5 < published(&listen, "stall"));
    proxy.set(Mode::Silent);
    // At once: the next try of a silent host fails in another way.
    wait_for("the stall", 30, || table(folder.path()).contains(" stall "));
    check(folder.path(), &listen, ("stall", "stall", true));
    let log = || fs::read_to_string(folder.path().join("log")).unwrap();
    wait_for("every failure", 60, || {
        let log = log();
        // The last line may be half written.
        let whole = log.rfind('\n').map_or("", |it| &log[..it]);
        let seen = failures_in(whole);
        plan.iter()
            .all(|(id, _, code, _)| seen.iter().any(|it| (&*it.0, &*it.1) == (*id, code.name())))
    });
    for (id, _, code, was_up) in plan.iter().filter(|it| it.2 != Code::Stall) {
        check(folder.path(), &listen, (*id, code.name(), *was_up));
    }
    proxy.set(Mode::Pass);
    drain(child, folder.path());
    check_events(&events(folder.path()), &plan.map(|it| (it.0, it.2)));
    check_quiet(&failures_in(&log()));
}

fn check_events(events: &[Value], plan: &[(&str, Code)]) {
    for (id, code) in plan {
        let event =
            events.iter().find(|it| it["subject"] == *id && it["data"]["code"] == code.name());
        let data =
            &event.unwrap_or_else(|| panic!("no event says that {id} is {}", code.name()))["data"];
        assert!(data["detail"].as_str().is_some_and(|it| !it.is_empty()), "{data}");
        let log = data["log"].as_array().map_or(&[][..], Vec::as_slice);
        // An end and a silence are what GStreamer does not complain about, and of a host that does
        // not answer it does not hear.
        let unheard = matches!(code, Code::Dns | Code::Refused | Code::Timeout);
        let quiet = unheard || matches!(code, Code::Eos | Code::Stall);
        assert!(quiet || !log.is_empty(), "GStreamer said nothing of {id}: {data}");
        for line in log {
            let line = line.as_str().unwrap();
            assert!(!line.contains(char::is_control), "{line:?}");
        }
    }
}

/// The same failure of a stream is logged at most once in ten seconds.
fn check_quiet(failures: &[(String, String, OffsetDateTime)]) {
    let mut last = BTreeMap::new();
    for (stream, code, at) in failures {
        if let Some(before) = last.insert((stream, code), *at) {
            let apart = *at - before;
            assert!(Duration::from_millis(9_900) < apart, "{stream}: {code} after {apart}");
        }
    }
}

#[test]
fn what_a_camera_answers_wrongly_has_a_code() {
    fn ok() -> Option<String> {
        Some("200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned())
    }
    let cases = [
        (
            "454",
            camera(|it| match it {
                "DESCRIBE" => Some(described(&format!("{SDP}{H264}"))),
                "SETUP" => Some("454 Session Not Found\r\n\r\n".to_owned()),
                _ => ok(),
            }),
            Code::Error,
        ),
        (
            "garbage",
            camera(|it| match it {
                "DESCRIBE" => Some(described("\x01\x02\x7f garbage\r\n\0\0=\r\nm=\r\n")),
                _ => ok(),
            }),
            Code::Codec,
        ),
        (
            "no track",
            camera(|it| match it {
                "DESCRIBE" => Some(described(SDP)),
                _ => ok(),
            }),
            Code::Codec,
        ),
        (
            "audio only",
            camera(|it| match it {
                "DESCRIBE" => {
                    Some(described(&format!("{SDP}m=audio 0 RTP/AVP 0\r\na=control:track1\r\n")))
                }
                _ => ok(),
            }),
            Code::Codec,
        ),
        ("no answer", camera(|_| None), Code::Timeout),
    ];
    let mut wrong = Vec::new();
    for (what, url, expected) in &cases {
        let (_, code, detail) = first_failure(&spec(url));
        if code != *expected {
            wrong.push(format!("{what}: {} instead of {}: {detail}", code.name(), expected.name()));
        }
        assert!(!detail.contains(char::is_control), "{detail:?}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_hostile_camera_is_given_up_soon() {
    let redirects = camera(|_| Some("302 Found\r\nLocation: {url}/more\r\n\r\n".to_owned()));
    let started = Instant::now();
    let (_, code, detail) = first_failure(&spec(redirects));
    assert_eq!(code, Code::Error, "{detail}");
    assert!(detail.contains("requests"), "{detail}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let tracks = camera(|it| match it {
        "DESCRIBE" => Some(described(&format!("{SDP}{}", H264.repeat(100_000)))),
        "SETUP" => Some("461 Unsupported Transport\r\n\r\n".to_owned()),
        _ => Some("200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned()),
    });
    let started = Instant::now();
    first_failure(&spec(tracks));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Waits for pictures through a proxy, does `harm`, and gives the failure that comes of it, with
/// how long it took.
fn harmed(harm: impl Fn(&Proxy)) -> (State, Code, Duration) {
    let server = Server::start(&pattern(), 0, None);
    let proxy = Proxy::start(server.port());
    let (mut at, mut took) = (None, None);
    let ran = run_until(&spec(proxy.url()), |out| {
        if at.is_none() && frames_of(out) == 10 {
            harm(&proxy);
            at = Some(Instant::now());
        }
        // When it is told, not when the connection is shut down, which can take two seconds more.
        let failed = matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
        took = took.or(at.filter(|_| failed).map(|it| it.elapsed()));
        failed
    });
    let took = took.expect("there were pictures, and a failure after them");
    let failure = ran.changes().find(|it| it.code.is_some()).unwrap();
    (failure.state, failure.code.unwrap(), took)
}

#[test]
fn a_connection_that_breaks_is_noticed_at_once_and_one_that_is_silent_in_time() {
    let (state, code, took) = harmed(|it| it.cut());
    assert_eq!(state, State::Down);
    assert!(matches!(code, Code::Error | Code::Eos), "RST: {code:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    let (state, code, took) = harmed(|it| it.finish());
    assert_eq!(state, State::Down);
    assert!(matches!(code, Code::Error | Code::Eos), "FIN: {code:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    for mode in [Mode::Silent, Mode::Slow(1)] {
        let (state, code, took) = harmed(|it| it.set(mode));
        assert_eq!((state, code), (State::Stalled, Code::Stall), "{mode:?}");
        // `stall_after` is 4 s.
        assert!(took < Duration::from_secs(5), "{mode:?}: {took:?}");
    }
}

#[test]
fn lost_doubled_late_and_swapped_packets_never_break_a_connection() {
    let server = Server::start(&pattern(), 0, None);
    for damage in [
        Damage { loss: 0.05, ..Damage::default() },
        Damage { duplicate: 0.2, reorder: 0.2, ..Damage::default() },
        Damage { delay: Duration::from_millis(50), ..Damage::default() },
    ] {
        let proxy = Proxy::start(server.port());
        proxy.set(Mode::Damage(Damage { seed: 4, ..damage }));
        let it = Spec { latency: Duration::from_millis(300), ..spec(proxy.url()) };
        let started = Instant::now();
        let ran = run_until(&it, |out| {
            let failed = matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
            50 <= frames_of(out) || failed || 40 < started.elapsed().as_secs()
        });
        let changes: Vec<_> = ran.changes().collect();
        assert!(50 <= ran.frames().count(), "{damage:?}: {changes:?}");
    }
}
