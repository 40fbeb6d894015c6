//! What the sinks promise, by the real program: stopped, killed, started twice, with bad brokers.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    end_to_end::{
        FRAME, clip, configure, drain, events, ghostwatch, published, said, signal, start,
    },
    redis as redis_server,
    support::{size, wait_until},
    support_server::Server,
    support_sinks::{
        check_complete, id, in_nats, in_redis, metric, nats_server, parsed, read_all, wait_long,
    },
    webhook::{Do, Receiver, ok},
};

const STREAM: &str = "  p: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";

/// As [`configure`], with sinks.
pub(crate) fn with_sinks(folder: &Path, streams: &str, sinks: &str) -> String {
    let listen = configure(folder, streams);
    let path = folder.join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, format!("{text}sinks:\n{sinks}")).unwrap();
    listen
}

fn nats_sink(server: &Server, more: &str) -> String {
    format!("  - {{type: nats, servers: [\"nats://127.0.0.1:{}\"]{more}}}\n", server.port())
}

fn redis_sink(server: &Server, more: &str) -> String {
    format!("  - {{type: redis, url: \"redis://127.0.0.1:{}\"{more}}}\n", server.port())
}

fn hook_sink(receiver: &Receiver) -> String {
    format!("  - {{type: webhook, url: \"http://127.0.0.1:{}/\"}}\n", receiver.port)
}

/// What a receiver of webhooks got, in order.
fn hooked(receiver: &Receiver) -> Vec<String> {
    let lines = receiver.seen().iter().map(|it| it.body.clone()).collect::<String>();
    lines.lines().map(str::to_owned).collect()
}

#[test]
fn stopped_and_started_again_and_tried_twice_nothing_is_sent_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (nats, receiver) = (nats_server("").started(), Receiver::start(None, |_, _| ok()));
    let file = "  - {type: file, path: all.ndjson}\n";
    let sinks = format!("{}{}{file}", nats_sink(&nats, ""), hook_sink(&receiver));
    let listen = with_sinks(folder.path(), STREAM, &sinks);
    for _ in 0..size(3, 20) {
        let child = start(folder.path());
        wait_long("some frames", || 20 < published(&listen, "p"));
        // A second one has nothing to do with the journal nor with what waits in it.
        let second = ghostwatch(folder.path()).arg("run").output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        assert!(said(&second).contains(&format!("process {}", child.id())), "{}", said(&second));
        drain(child, folder.path());
    }
    events(folder.path());
    let journal = read_all(&folder.path().join("journal.db"));
    let text = fs::read_to_string(folder.path().join("all.ndjson")).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), journal);
    assert!(hooked(&receiver) == journal, "the webhook got something else, or twice");
    assert!(in_nats(&nats) == journal, "NATS got something else, or twice");
}

#[test]
fn killed_again_and_again_every_sink_has_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let (nats, redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let sinks =
        nats_sink(&nats, "") + &redis_sink(&redis, "") + "  - {type: file, path: all.ndjson}\n";
    let listen = with_sinks(folder.path(), STREAM, &sinks);
    let cycles = size(5, 1_000);
    for cycle in 0..cycles {
        let mut child = start(folder.path());
        // Somewhere in the first second after the first frame.
        let frames = 1 + cycle * 7 % 40;
        wait_long("some frames", || frames <= published(&listen, "p"));
        signal(&child, "KILL");
        child.wait().unwrap();
    }
    let child = start(folder.path());
    wait_long("some frames", || 0 < published(&listen, "p"));
    drain(child, folder.path());
    events(folder.path());
    let journal = read_all(&folder.path().join("journal.db"));
    let in_nats = check_complete(&in_nats(&nats), &journal, "nats");
    let in_redis = check_complete(&in_redis(&redis), &journal, "redis");
    let text = fs::read_to_string(folder.path().join("all.ndjson")).unwrap();
    // Half a line, as a kill leaves it, is cut off at the next start.
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let in_file = check_complete(&lines, &journal, "file");
    println!(
        "{cycles} kills, {} events; twice in NATS {in_nats}, Redis {in_redis}, file {in_file}",
        journal.len()
    );
}

/// The error lines about a sink.
pub(crate) fn errors(folder: &Path, sink: &str) -> Vec<String> {
    let log = fs::read_to_string(folder.join("log")).unwrap();
    let mine = |it: &&str| it.contains("ERROR") && it.contains(&format!("sink={sink} "));
    let mine_json =
        |it: &&str| it.contains(&format!("\"sink\":\"{sink}\"")) && it.contains("ERROR");
    log.lines().filter(|it| mine(it) || mine_json(it)).map(str::to_owned).collect()
}

#[test]
fn a_sink_in_trouble_says_so_every_ten_seconds_and_troubles_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let nats = nats_server("").started();
    let redis = redis_server::server(&["--requirepass", "right"]).started();
    fs::write(folder.path().join("password"), "wrong").unwrap();
    let broken = |_: usize, _: &_| Do::Answer("500 Internal Server Error", String::new());
    let receiver = Receiver::start(None, broken);
    let sinks = [
        redis_sink(&redis, ", password_file: password"),
        nats_sink(&nats, ""),
        hook_sink(&receiver),
        format!(
            "  - {{type: mqtt, url: \"mqtt://127.0.0.1:{}\"}}\n",
            crate::support_broker::free_port()
        ),
    ];
    let listen = with_sinks(folder.path(), STREAM, &sinks.concat());
    let child = start(folder.path());
    wait_long("it is refused", || {
        metric(&listen, "sink_errors_total{code=\"auth\",sink=\"redis\"}")
            .is_some_and(|it| 0.0 < it)
    });
    let first = Instant::now();
    assert_eq!(metric(&listen, "sink_up{sink=\"redis\"}"), Some(0.0));
    let acked = || metric(&listen, "sink_acked_total{sink=\"nats\"}").unwrap_or_default();
    wait_long("12 seconds", || Duration::from_secs(12) < first.elapsed());
    let before = acked();
    wait_until("NATS goes on", || before + 10.0 < acked());
    let most = 1 + first.elapsed().as_secs() as usize / 10 + 1;
    for sink in ["redis", "webhook", "mqtt"] {
        let lines = errors(folder.path(), sink);
        println!("{sink}: {} lines; {}", lines.len(), lines.first().map_or("", |it| it));
        assert!((1..=most).contains(&lines.len()), "{sink}: {lines:#?}");
        assert_eq!(metric(&listen, &format!("sink_acked_total{{sink=\"{sink}\"}}")), Some(0.0));
    }
    assert!(5 < receiver.seen().len(), "it is tried again and again");
    drain(child, folder.path());
}

#[test]
fn a_sink_that_retention_comes_close_to_is_in_the_events_and_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let (mut nats, streams) = (nats_server(""), STREAM.replace("fps=50", "fps=200"));
    let sinks = nats_sink(&nats, "") + "  - {type: file, path: all.ndjson}\n";
    let listen = with_sinks(folder.path(), &streams, &sinks);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("keep_free: 0B", "keep_free: 0B, bytes: 3MiB")).unwrap();
    let child = start(folder.path());
    let value = |series: &str| metric(&listen, series).unwrap_or_default();
    let lost = || value("journal_lost_events_total{reason=\"retention\"}");
    wait_long("it is at risk", || value("sink_at_risk{sink=\"nats\"}") == 1.0);
    assert_eq!(lost(), 0.0, "announced before");
    wait_long("something is lost", || 100.0 < lost());
    nats.start();
    let told = || value("sink_lost_events_total{sink=\"nats\"}");
    wait_long("the sink knows", || 0.0 < told());
    wait_long("it has caught up", || value("sink_lag_events{sink=\"nats\"}") < 300.0);
    assert_eq!(value("sink_lost_events_total{sink=\"file\"}"), 0.0);
    wait_long("it is out of danger", || value("sink_at_risk{sink=\"nats\"}") == 0.0);
    let (told, lost) = (told(), lost());
    drain(child, folder.path());
    println!("{lost} counted when they were removed, {told} missing in NATS");
    let text = fs::read_to_string(folder.path().join("all.ndjson")).unwrap();
    let risky: Vec<&str> = text.lines().filter(|it| it.contains("\"sink_at_risk\"")).collect();
    assert_eq!(risky.len(), 1, "{risky:?}");
    assert!(risky[0].contains("sink nats has still to deliver"), "{}", risky[0]);
    let stored = in_nats(&nats);
    let (mut next, mut missing) = (1, 0);
    for event in stored.iter().map(|it| parsed(it)) {
        let number = |it: &Value| it.as_str().unwrap().parse::<u64>().unwrap();
        let sequence = number(&event["sequence"]);
        if event["type"] == "io.ghostwatch.journal.gap.v1" {
            assert_eq!(number(&event["data"]["first"]), next);
            missing += event["data"]["events"].as_u64().unwrap();
        } else {
            assert_eq!(sequence, next, "no hole that no gap tells of");
        }
        next = sequence + 1;
    }
    assert_eq!(missing as f64, told);
    assert_eq!(next as usize, 1 + text.lines().count(), "NATS ends where the file ends");
}

#[test]
fn each_sink_gets_what_its_configuration_says() {
    let (first, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (nats, redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let streams = format!(
        "  bikes: {{url: {:?}}}\n  bunny: {{url: {:?}}}\n",
        clip("bikes.mp4"),
        clip("bigbuckbunny.mp4")
    );
    // A first run without sinks tells which confidence parts the frames.
    configure(first.path(), &streams);
    let best = |it: &Value| it["data"]["top"][0]["confidence"].as_f64().unwrap();
    let is_mine = |it: &&Value| it["type"] == FRAME && it["subject"] == "bikes";
    let run_once = |folder: &Path| {
        let output = ghostwatch(folder).args(["run", "--once"]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        events(folder)
    };
    let mut sure: Vec<f64> = run_once(first.path()).iter().filter(is_mine).map(best).collect();
    sure.sort_by(f64::total_cmp);
    let least = (sure[125] * 1e4).round() / 1e4;
    let select = format!(", types: [frames], streams: [bikes], min_confidence: {least}, top: 1");
    let sinks = nats_sink(&nats, &select) + &redis_sink(&redis, ", types: [state, daemon]");
    with_sinks(folder.path(), &streams, &sinks);
    let all = run_once(folder.path());
    let mine = |it: &&Value| is_mine(it) && least <= best(it);
    let mut wanted: Vec<Value> = all.iter().filter(mine).cloned().collect();
    println!("{} of 250 frames have a label of {least} or more", wanted.len());
    assert!(!wanted.is_empty() && wanted.len() < 250);
    wanted.iter_mut().for_each(|it| it["data"]["top"].as_array_mut().unwrap().truncate(1));
    let found: Vec<Value> = in_nats(&nats).iter().map(|it| parsed(it)).collect();
    assert_eq!(found, wanted);
    let others: Vec<&Value> = all.iter().filter(|it| it["type"] != FRAME).collect();
    let found: Vec<String> = in_redis(&redis).iter().map(|it| id(it)).collect();
    let wanted: Vec<&str> = others.iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert_eq!(found, wanted);
}

/// Runs a clip to its end with a webhook that answers as `plan` says.
fn once(receiver: &Receiver) -> (tempfile::TempDir, std::process::Output) {
    let folder = tempfile::tempdir().unwrap();
    let sinks = hook_sink(receiver) + "  - {type: file, path: all.ndjson}\n";
    with_sinks(folder.path(), "  p: {url: \"test:?size=64x48&frames=30\"}\n", &sinks);
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    (folder, output)
}

#[test]
fn once_waits_for_a_sink_that_is_behind() {
    let first = std::sync::OnceLock::new();
    let receiver = Receiver::start(None, move |_, _| {
        // Short enough for the tries that follow, at most 0.5, 1 and 2 s apart, to come in time.
        let down = first.get_or_init(Instant::now).elapsed() < Duration::from_millis(300);
        if down { Do::Answer("503 Service Unavailable", String::new()) } else { ok() }
    });
    let (folder, output) = once(&receiver);
    assert!(output.status.success(), "{}", said(&output));
    let journal = read_all(&folder.path().join("journal.db"));
    check_complete(&hooked(&receiver)[..], &journal, "the webhook");
}

#[test]
fn once_tells_of_a_sink_that_stays_behind_and_the_next_run_sends_the_rest() {
    let down = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_down = down.clone();
    let receiver = Receiver::start(None, move |_, _| {
        if is_down.load(std::sync::atomic::Ordering::Relaxed) {
            return Do::Answer("503 Service Unavailable", String::new());
        }
        ok()
    });
    let start = Instant::now();
    let (folder, output) = once(&receiver);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    println!("gave up after {:.1} s", start.elapsed().as_secs_f64());
    let journal = read_all(&folder.path().join("journal.db"));
    let told = format!(
        "sink webhook is {} events behind; they are kept in the journal and sent at the next run",
        journal.len()
    );
    let last = said(&output).lines().last().unwrap().to_owned();
    assert!(last.ends_with(&told) && !last.contains("sink file"), "{last}\n{told}");
    down.store(false, std::sync::atomic::Ordering::Relaxed);
    let refused = receiver.seen().len();
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let sent = receiver.seen()[refused..].iter().map(|it| it.body.clone()).collect::<String>();
    let sent: Vec<String> = sent.lines().map(str::to_owned).collect();
    assert!(sent == read_all(&folder.path().join("journal.db")), "everything, once");
}

#[test]
fn readyz_names_the_sinks_and_the_streams_that_do_not_run_and_stays_ready() {
    let folder = tempfile::tempdir().unwrap();
    let broken = |_: usize, _: &_| Do::Answer("500 Internal Server Error", String::new());
    let receiver = Receiver::start(None, broken);
    let sinks = hook_sink(&receiver) + "  - {type: file, path: all.ndjson}\n";
    let streams = format!("{STREAM}  gone: {{url: \"file:///no/such/clip.mp4\"}}\n");
    let listen = with_sinks(folder.path(), &streams, &sinks);
    let child = start(folder.path());
    wait_long("some frames", || 20 < published(&listen, "p"));
    let line = |start: &str| {
        let answer = crate::end_to_end::get(&listen, "/readyz?verbose").unwrap_or_default();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("degraded\n"), "{answer}");
        answer.lines().find(|it| it.starts_with(start)).unwrap_or_default().to_owned()
    };
    wait_until("the webhook is down", || {
        let said = line("[~] sink webhook: down, ");
        let behind = said.split(' ').nth(4).and_then(|it| it.parse::<u64>().ok());
        said.contains(" events behind: error: webhook 127.0.0.1:")
            && said.contains("answered 500")
            && behind.is_some_and(|it| 20 < it)
    });
    wait_until("the file is up", || line("[+] sink file: up, ").ends_with(" events behind"));
    wait_until("a stream is down", || {
        line("[~] stream gone: down, not_found: ").contains("/no/such/clip.mp4")
    });
    assert_eq!(line("[~] stream p"), "", "a stream that runs is no news");
    drain(child, folder.path());
}

#[test]
fn a_sink_called_print_and_the_terminal_do_not_share_a_place() {
    let folder = tempfile::tempdir().unwrap();
    let listen =
        with_sinks(folder.path(), STREAM, "  - {type: file, name: print, path: all.ndjson}\n");
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut command = ghostwatch(folder.path());
    let child = command.args(["run", "--print"]).stderr(log).stdout(Stdio::null()).spawn().unwrap();
    for sink in ["print", "--print"] {
        let series = format!("sink_acked_total{{sink=\"{sink}\"}}");
        wait_long(sink, || 10.0 < metric(&listen, &series).unwrap_or_default());
    }
    drain(child, folder.path());
    let journal = read_all(&folder.path().join("journal.db"));
    let text = fs::read_to_string(folder.path().join("all.ndjson")).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), journal);
}
