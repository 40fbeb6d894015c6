//! HTTP and metrics: what promtool says, what strangers get, and what a flood does.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    frame::{Code, Dated, Meta, Skipped, State as StreamState, StateChange, TimeSource, Timing},
    health::{Flags, Quality},
    http::{self, Access, CONNECTIONS_MAX, Check, HEADER_TIMEOUT, Handle, Health, State, Token},
    infer::batch::CloseReason,
    journal::writer::Stats,
    ledger::{InFlight, Stream},
    metrics::{BuildInfo, GpuTrouble, InferenceError, JournalLoss, Metrics, ModelInfo, QueueNow},
    stage::{Reason, StageName},
};

const TOKEN: &str = "correct-horse-battery";
/// `user:` and [`TOKEN`] in base64.
const BASIC: &str = "dXNlcjpjb3JyZWN0LWhvcnNlLWJhdHRlcnk=";

fn check(name: &'static str, health: Health, detail: &str) -> Check {
    Check { name: name.into(), health, detail: detail.to_owned() }
}

fn start(listen: IpAddr, access: Access) -> anyhow::Result<(Handle, Arc<Metrics>)> {
    let metrics = Arc::new(Metrics::new());
    let state = State {
        metrics: metrics.clone(),
        live: Box::new(|| vec![check("loops", Health::Ok, "")]),
        ready: Box::new(|| {
            vec![
                check("model", Health::Ok, "ghostnet"),
                check("gpu", Health::Degraded, "no driver\nloaded"),
            ]
        }),
    };
    Ok((http::serve(SocketAddr::new(listen, 0), access, Arc::new(state))?, metrics))
}

fn start_local() -> (Handle, Arc<Metrics>) {
    start(Ipv4Addr::LOCALHOST.into(), Access::new(None, &[])).unwrap()
}

fn connect(server: &Handle) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", server.addr().port())).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// Sends bytes and reads until the server closes; the status is 0 if it has said nothing.
fn exchange(server: &Handle, request: &[u8]) -> (u16, String) {
    let mut stream = connect(server);
    // The server may refuse before it has read all.
    match stream.write_all(request) {
        Err(error)
            if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
        {
            panic!("{error}")
        }
        _ => {}
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => {}
    }
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).map_or(0, |it| it.parse().unwrap());
    (status, answer)
}

fn request(server: &Handle, line: &str, headers: &str) -> (u16, String) {
    let text = format!("{line} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
    exchange(server, text.as_bytes())
}

fn get(server: &Handle, path: &str) -> (u16, String) {
    request(server, &format!("GET {path}"), "host: localhost\r\n")
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

/// The value of a series.
fn value(metrics: &Metrics, series: &str) -> Option<f64> {
    let text = metrics.text().unwrap();
    text.lines().find_map(|it| it.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

fn frame(stream: &Arc<Stream>) -> Meta {
    let now = Instant::now();
    Meta {
        stream: InFlight::decoded(stream.clone()),
        epoch: 1,
        frame: 0,
        pts: Duration::ZERO,
        time: SystemTime::now(),
        dated: Dated { source: TimeSource::Arrival, error: None, clock_offset_ns: None },
        ingest_time: SystemTime::now(),
        size: (640, 360),
        timing: Timing::at(now, now + Duration::from_millis(4)),
        skipped: Skipped::default(),
        quality: Quality::default(),
    }
}

fn change(stream: &Arc<Stream>, state: StreamState, code: Option<Code>) -> StateChange {
    stream.set_state(state);
    StateChange {
        stream: stream.clone(),
        state,
        code,
        detail: None,
        log: Vec::new(),
        attempt: 1,
        retry_in: None,
        at: SystemTime::now(),
        since: SystemTime::now(),
        flags: Flags::default(),
        ended: None,
    }
}

/// Something in every metric, with one frame published, one dropped, one in flight and one lost.
fn populate(metrics: &Metrics) -> (Arc<Stream>, Meta) {
    metrics.set_build_info(BuildInfo {
        version: "0.1.0",
        revision: "abc",
        torch: "2.11.0",
        gstreamer: "1.22.0",
    });
    metrics.set_model_info(ModelInfo {
        name: "ghostnet_100",
        weights: "1f2e",
        precision: "fp32",
        device: "cpu",
        engine: "native",
    });
    let stream = Arc::new(Stream::new("front"));
    metrics.add_stream(stream.clone(), Some(5.0));
    stream.set_codec("h264".to_owned());
    stream.set_size((640, 360));
    metrics.stream_changed(&change(&stream, StreamState::Up, None));
    metrics.stream_changed(&change(&stream, StreamState::Stalled, Some(Code::Stall)));
    metrics.stream_changed(&change(&stream, StreamState::Down, Some(Code::Refused)));
    metrics.stream_changed(&change(&stream, StreamState::Up, None));
    stream.connects.fetch_add(2, Relaxed);
    stream.received.fetch_add(5, Relaxed);
    stream.received_bytes.fetch_add(5000, Relaxed);
    stream.last_frame_ms.store(1_700_000_000_500, Relaxed);
    stream.set_dated(Some(Dated {
        source: TimeSource::Rtcp,
        error: Some(Duration::from_millis(70)),
        clock_offset_ns: Some(-1_500_000_000),
    }));
    stream.set_max_clock_offset(Duration::from_secs(2));
    let (mut published, mut dropped) = (frame(&stream), frame(&stream));
    let labelled = published.timing.inferred + Duration::from_millis(1);
    published.stream.published();
    metrics.frame_published(&published, labelled, labelled + Duration::from_millis(2));
    dropped.stream.dropped(StageName::Queue, Reason::Stale);
    drop(frame(&stream));
    metrics.add_queue("journal", 128, || QueueNow {
        length: 3,
        oldest_age: Duration::from_millis(250),
    });
    let (sender, _receiver) = ghostwatch::edge::edge(4);
    sender.send(()).unwrap();
    metrics.add_edge("preprocess", 4, sender.counts());
    metrics.batch(3, CloseReason::Deadline);
    metrics.inference_failed(InferenceError::Device);
    metrics.selftest(true, 1e-6);
    metrics.set_gpu_trouble(Some(GpuTrouble::NoDriver));
    let stats = Stats { size_bytes: 8192, oldest: 2, next: 12, appended: 10, lost: 1 };
    metrics.journal_stats(stats);
    metrics.journal_stats(Stats { appended: 11, ..stats });
    metrics.journal_committed(Duration::from_millis(3));
    metrics.journal_lost(JournalLoss::DiskFull, 7);
    metrics.config_reloaded(true, SystemTime::now());
    let in_flight = frame(&stream);
    (stream, in_flight)
}

#[test]
fn promtool_finds_nothing_wrong_with_metrics_that_all_have_a_value() {
    let (server, metrics) = start_local();
    let (_stream, _in_flight) = populate(&metrics);
    assert_eq!(get(&server, "/readyz").0, 200);
    let (status, answer) = get(&server, "/metrics");
    assert_eq!(status, 200);
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is there (Debian package prometheus)");
    promtool.stdin.take().unwrap().write_all(body(&answer).as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn the_metrics_read_what_the_stages_have_counted() {
    let metrics = Metrics::new();
    let (_stream, _in_flight) = populate(&metrics);
    for (series, want) in [
        ("stream_up{stream=\"front\"}", 1.0),
        ("stream_state{state=\"up\",stream=\"front\"}", 1.0),
        ("stream_state{state=\"down\",stream=\"front\"}", 0.0),
        ("stream_last_frame_timestamp_seconds{stream=\"front\"}", 1_700_000_000.5),
        ("stream_clock_offset_seconds{stream=\"front\"}", -1.5),
        ("stream_clock_wrong{stream=\"front\"}", 0.0),
        ("stream_time_error_seconds{stream=\"front\"}", 0.07),
        ("stream_time_source{source=\"rtcp\",stream=\"front\"}", 1.0),
        ("stream_time_source{source=\"arrival\",stream=\"front\"}", 0.0),
        ("stream_connects_total{result=\"ok\",stream=\"front\"}", 2.0),
        // Refused came when it was no longer up.
        ("stream_disconnects_total{reason=\"stall\",stream=\"front\"}", 1.0),
        ("stream_received_bytes_total{stream=\"front\"}", 5000.0),
        ("stream_wanted_fps{stream=\"front\"}", 5.0),
        ("stream_flag{flag=\"dark\",stream=\"front\"}", 0.0),
        ("stream_frozen{stream=\"front\"}", 0.0),
        ("frames_received_total{stream=\"front\"}", 5.0),
        ("frames_decoded_total{stream=\"front\"}", 4.0),
        ("frames_published_total{stream=\"front\"}", 1.0),
        ("frames_dropped_total{reason=\"stale\",stage=\"queue\",stream=\"front\"}", 1.0),
        ("frames_dropped_total{reason=\"rate\",stage=\"source\",stream=\"front\"}", 0.0),
        ("frames_unaccounted", 1.0),
        ("frame_latency_seconds_bucket{stream=\"front\",le=\"0.005\"}", 0.0),
        ("frame_latency_seconds_bucket{stream=\"front\",le=\"0.01\"}", 1.0),
        ("stage_duration_seconds_count{stage=\"batch_wait\",stream=\"front\"}", 1.0),
        ("queue_length{queue=\"journal\"}", 3.0),
        ("queue_oldest_age_seconds{queue=\"journal\"}", 0.25),
        ("queue_length{queue=\"preprocess\"}", 1.0),
        ("queue_capacity{queue=\"preprocess\"}", 4.0),
        ("batch_size_bucket{le=\"4\"}", 1.0),
        ("batch_closed_total{reason=\"deadline\"}", 1.0),
        ("inference_errors_total{kind=\"device\"}", 1.0),
        ("inference_errors_total{kind=\"oom\"}", 0.0),
        ("gpu_unusable{reason=\"no_driver\"}", 1.0),
        ("journal_appended_events_total", 11.0),
        ("journal_lost_events_total{reason=\"retention\"}", 1.0),
        ("journal_lost_events_total{reason=\"disk_full\"}", 7.0),
        ("journal_next_sequence", 12.0),
        ("config_last_reload_successful", 1.0),
    ] {
        assert_eq!(value(&metrics, &format!("ghostwatch_{series}")), Some(want), "{series}");
    }
    assert!(value(&metrics, "process_open_fds").is_some_and(|it| 0.0 < it));
}

#[test]
fn series_of_a_removed_stream_disappear_and_its_losses_stay_counted() {
    let metrics = Metrics::new();
    let (stream, in_flight) = populate(&metrics);
    metrics.remove_stream("front");
    metrics.remove_queue("journal");
    let text = metrics.text().unwrap();
    assert!(!text.contains("front") && !text.contains("queue=\"journal\""), "{text}");
    // The last holder of the stream loses one more frame.
    drop((stream, in_flight));
    for _ in 0..2 {
        assert_eq!(value(&metrics, "ghostwatch_frames_unaccounted"), Some(2.0));
    }
    metrics.add_stream(Arc::new(Stream::new("front")), None);
    let decoded = value(&metrics, "ghostwatch_frames_decoded_total{stream=\"front\"}");
    assert_eq!(decoded, Some(0.0));
}

#[test]
fn health_tells_each_check_in_one_line_and_fails_if_one_fails() {
    let (server, _) = start_local();
    assert_eq!(body(&get(&server, "/livez").1), "ok\n");
    let (status, answer) = get(&server, "/readyz");
    assert_eq!((status, body(&answer)), (200, "degraded\n"));
    let (_, answer) = get(&server, "/readyz?verbose");
    assert_eq!(body(&answer), "[+] model: ghostnet\n[~] gpu: no driver loaded\ndegraded\n");
    let state = State {
        metrics: Arc::new(Metrics::new()),
        live: Box::new(Vec::new),
        ready: Box::new(|| vec![check("journal", Health::Failed, "disk full")]),
    };
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = http::serve(listen, Access::new(None, &[]), Arc::new(state)).unwrap();
    let (status, answer) = get(&server, "/readyz");
    assert_eq!((status, body(&answer)), (503, "[-] journal: disk full\nfailed\n"));
}

#[test]
fn only_get_and_head_of_what_is_there_are_answered() {
    let (server, _) = start_local();
    let host = "host: localhost\r\n";
    assert_eq!(get(&server, "/").0, 404);
    assert_eq!(get(&server, "/metrics/").0, 404);
    assert_eq!(get(&server, "/%2e%2e/etc/passwd").0, 404);
    let (status, answer) = request(&server, "HEAD /livez", host);
    assert_eq!((status, body(&answer)), (200, ""));
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let (status, answer) = request(&server, &format!("{method} /metrics"), host);
        assert_eq!(status, 405, "{method}");
        assert!(answer.contains("allow: GET, HEAD"), "{answer}");
        assert!(!answer.to_lowercase().contains("access-control"), "{answer}");
    }
}

#[test]
fn a_host_that_is_not_listed_gets_nothing() {
    let access = Access::new(None, &["cams.example".to_owned()]);
    let (server, _) = start(Ipv4Addr::LOCALHOST.into(), access).unwrap();
    let check = |line: &str, headers: &str, want: u16| {
        assert_eq!(request(&server, line, headers).0, want, "{line} {headers}");
    };
    check("GET /metrics", "host: localhost\r\n", 200);
    check("GET /metrics", "host: 127.0.0.1:9464\r\n", 200);
    check("GET /metrics", "host: [::1]:1\r\n", 200);
    check("GET /metrics", "host: Cams.Example:443\r\n", 200);
    check("GET http://localhost/metrics", "host: localhost\r\n", 200);
    check("GET /metrics", "host: evil.example\r\n", 403);
    check("GET /metrics", "host: localhost.evil.example\r\n", 403);
    check("GET http://evil.example/metrics", "host: localhost\r\n", 403);
    check("GET /metrics", "host: localhost\r\nhost: evil.example\r\n", 403);
    check("GET /metrics", "host: \r\n", 403);
    check("GET /metrics", "", 400);
}

#[test]
fn off_loopback_nothing_is_told_without_the_token() {
    let open = Ipv4Addr::UNSPECIFIED.into();
    let error = start(open, Access::new(None, &[])).map(drop).unwrap_err();
    assert!(error.to_string().contains("http.token_file"), "{error}");
    let (server, _) = start(open, Access::new(Some(Token::new(TOKEN).unwrap()), &[])).unwrap();
    let check = |authorization: &str, want: u16| {
        let headers = format!("host: localhost\r\n{authorization}");
        for path in ["/metrics", "/livez", "/readyz"] {
            let got = request(&server, &format!("GET {path}"), &headers);
            assert_eq!(got.0, want, "{authorization}");
        }
        let (status, answer) = request(&server, "GET /nothing", &headers);
        assert_eq!(status, if want == 200 { 404 } else { want });
        assert_eq!(answer.contains("www-authenticate: Basic"), want == 401);
    };
    check("", 401);
    check("authorization: Bearer correct-horse-batterz\r\n", 401);
    check("authorization: Bearer\r\n", 401);
    check("authorization: Basic ????\r\n", 401);
    check(&format!("authorization: Digest {TOKEN}\r\n"), 401);
    check(&format!("authorization: Bearer {TOKEN}\r\n"), 200);
    check(&format!("authorization: Basic {BASIC}\r\n"), 200);
}

/// Names of the series of a metric, without their values.
fn series(metrics: &Metrics) -> BTreeSet<String> {
    let text = metrics.text().unwrap();
    let lines = text.lines().filter(|it| !it.starts_with('#'));
    lines.map(|it| it.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

#[test]
fn a_thousand_random_requests_add_no_series() {
    let (server, metrics) = start_local();
    for path in ["/metrics", "/livez", "/readyz", "/x"] {
        for method in ["GET", "HEAD", "POST"] {
            for host in ["host: localhost\r\n", "host: evil\r\n", ""] {
                request(&server, &format!("{method} {path}"), host);
            }
        }
    }
    let before = series(&metrics);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let methods = ["GET", "HEAD", "POST", "PATCH", "TRACE"];
    let paths = ["/metrics", "/livez", "/readyz", "/api/v1", "/metrics/"];
    for i in 0..1000 {
        let odd = format!("M{:X}", next());
        let method = methods.get(next() as usize % 6).map_or(odd.as_str(), |it| it);
        let odd = format!("/{:x}?stream={:x}", next(), next());
        let path = paths.get(next() as usize % 6).map_or(odd.as_str(), |it| it);
        let host = match next() % 3 {
            0 => "localhost".to_owned(),
            1 => format!("{:x}.example", next()),
            _ => format!("127.0.0.1:{}", next() % 65536),
        };
        let (status, _) =
            request(&server, &format!("{method} {path}"), &format!("host: {host}\r\n"));
        assert!([200, 403, 404, 405].contains(&status), "{i}: {status}");
    }
    assert_eq!(series(&metrics), before);
}

#[test]
fn large_headers_and_bodies_are_refused_and_small_bodies_are_not_read() {
    let (server, _) = start_local();
    let huge = format!("host: localhost\r\nx: {}\r\n", "a".repeat(1 << 20));
    let (status, _) = request(&server, "GET /livez", &huge);
    assert!([0, 431].contains(&status), "{status}");
    let many = "x: y\r\n".repeat(10_000);
    let (status, _) = request(&server, "GET /livez", &many);
    assert!([0, 431].contains(&status), "{status}");
    let large = "host: localhost\r\ncontent-length: 65537\r\n";
    assert_eq!(request(&server, "GET /livez", large).0, 413);
    // The body never comes, and nobody waits for it.
    let start = Instant::now();
    let small = "host: localhost\r\ncontent-length: 65536\r\n";
    assert_eq!(request(&server, "GET /livez", small).0, 200);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn who_sends_a_header_byte_by_byte_is_cut_off_while_others_are_served() {
    let (server, _) = start_local();
    let mut silent = connect(&server);
    let mut kept_alive = connect(&server);
    kept_alive.write_all(b"HEAD /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let start = Instant::now();
    let mut slow = connect(&server);
    slow.write_all(b"GET /livez HTTP/1.1\r\nx: ").unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut served = 0;
    // One byte for each read that times out, until the server hangs up.
    while matches!(slow.read(&mut [0]), Err(it) if it.kind() == ErrorKind::WouldBlock) {
        let asked = Instant::now();
        assert_eq!(get(&server, "/metrics").0, 200);
        assert!(asked.elapsed() < IN_TIME);
        served += 1;
        if slow.write_all(b"a").is_err() {
            break;
        }
        assert!(start.elapsed() < HEADER_TIMEOUT * 2, "the slow sender was never cut off");
    }
    assert!(HEADER_TIMEOUT - Duration::from_secs(1) <= start.elapsed());
    assert!(10 <= served);
    // So are those that say nothing, at first or after an answer.
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    let mut answer = String::new();
    kept_alive.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    assert!(start.elapsed() < HEADER_TIMEOUT * 2, "{:?}", start.elapsed());
}

/// An answer to a scrape; alone on the machine it takes milliseconds, but the other tests run
/// models beside it.
const IN_TIME: Duration = Duration::from_secs(5);

/// Lets this process have twice as many connections open as the server accepts.
fn allow_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.unwrap_or(1 << 20).min(1 << 20));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

#[test]
fn a_flood_of_connections_pushes_out_itself_and_a_scrape_gets_in() {
    const MORE: usize = 100;
    allow_descriptors();
    let (server, metrics) = start_local();
    let mut flood: Vec<TcpStream> = Vec::new();
    for i in 0..CONNECTIONS_MAX + MORE {
        flood.push(connect(&server));
        if i % 256 == 255 {
            let asked = Instant::now();
            assert_eq!(get(&server, "/metrics").0, 200, "after {i} connections");
            assert!(asked.elapsed() < IN_TIME);
        }
    }
    let asked = Instant::now();
    assert_eq!(get(&server, "/livez").0, 200);
    // What is neither metrics nor health must not take the last places.
    assert_eq!(get(&server, "/nothing").0, 503);
    assert!(asked.elapsed() < IN_TIME);
    let open = value(&metrics, "ghostwatch_http_clients{kind=\"idle\"}").unwrap();
    assert!(open <= CONNECTIONS_MAX as f64, "{open}");
    for stream in &mut flood[..MORE] {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer:?}");
    }
    // The youngest are still there and can ask.
    let youngest = flood.last_mut().unwrap();
    youngest
        .write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    youngest.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
}

#[test]
fn a_dropped_server_frees_its_address() {
    let (server, _) = start_local();
    let addr = server.addr();
    let idle = connect(&server);
    assert!(server.is_running());
    let state = || State {
        metrics: Arc::new(Metrics::new()),
        live: Box::new(Vec::new),
        ready: Box::new(Vec::new),
    };
    let again = || http::serve(addr, Access::new(None, &[]), Arc::new(state()));
    let error = again().map(drop).unwrap_err();
    assert!(error.to_string().contains("is in use"), "{error}");
    drop((server, idle));
    assert_eq!(get(&again().unwrap(), "/livez").0, 200);
}
