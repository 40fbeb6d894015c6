//! What the MQTT sink promises, with a real Mosquitto.

pub(crate) mod proxy;
pub(crate) mod reader;

use std::{
    collections::HashMap,
    fs,
    future::Future,
    process::Command,
    time::{Duration, Instant},
};

use ghostwatch::{
    secret::Secret,
    sink::{
        broker::{Acks, Broker, Code, Fault, Message, Topic},
        mqtt::Mqtt,
        settings::{Address, Login, Mqtt as Settings, Tls},
    },
};
use tempfile::TempDir;

use crate::{
    mqtt::{proxy::Proxy, reader::Reader},
    support::wait_until,
    support_broker::{Server, free_port},
    support_tls::certificates,
};

/// Debian puts it where only root's PATH looks.
const MOSQUITTO: &str = "/usr/sbin/mosquitto";

/// Mosquitto as the README says to run it: everything is kept for a subscriber that is away, and
/// a SIGTERM writes it to disk (as the user who runs the tests, or it could not).
pub(crate) fn mosquitto(folder: &TempDir, more: &str) -> Server {
    mosquitto_on(folder, free_port(), "allow_anonymous true\n", more)
}

/// The same on a port that something waits for already.
pub(crate) fn mosquitto_at(folder: &TempDir, port: u16) -> Server {
    mosquitto_on(folder, port, "allow_anonymous true\n", "")
}

/// Keeps nothing and says nothing.
pub(crate) fn quiet_mosquitto(folder: &TempDir) -> Server {
    let port = free_port();
    let file = folder.path().join("mosquitto.conf");
    let conf = format!("listener {port} 127.0.0.1\nallow_anonymous true\nlog_type none\n");
    fs::write(&file, conf).unwrap();
    Server::start("mosquitto", MOSQUITTO, ["-c", file.to_str().unwrap()], port, folder.path())
}

fn mosquitto_on(folder: &TempDir, port: u16, who: &str, more: &str) -> Server {
    let dir = folder.path().display();
    let conf = format!(
        "user root\nlistener {port} 127.0.0.1\nmax_queued_messages 0\nmax_inflight_messages 0\n\
         persistence true\npersistence_location {dir}/\n{who}{more}"
    );
    let file = folder.path().join("mosquitto.conf");
    fs::write(&file, conf).unwrap();
    Server::start("mosquitto", MOSQUITTO, ["-c", file.to_str().unwrap(), "-v"], port, folder.path())
}

pub(crate) fn settings(port: u16) -> Settings {
    let address = Address { tls: false, host: "127.0.0.1".into(), port };
    let mut it = Settings::new(address, "host-a-mqtt");
    it.connect_timeout = Duration::from_secs(5);
    it.ack_timeout = Duration::from_secs(5);
    it
}

pub(crate) fn broker(settings: Settings) -> Mqtt {
    Mqtt::new(settings).unwrap()
}

/// Runs on a thread of its own, as a sink does.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// The events `from..to` of two streams in turn, about 700 bytes each.
pub(crate) fn frames(from: u64, to: u64) -> Vec<Message> {
    (from..to).map(|seq| frame(seq, if seq % 2 == 0 { "front" } else { "yard" }, 656)).collect()
}

pub(crate) fn frame(seq: u64, stream: &str, label_id: u32) -> Message {
    let id = format!("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-{seq:020}");
    let pad = "x".repeat(400);
    let json = format!(
        r#"{{"specversion":"1.0","id":"{id}","time":"2026-11-24T01:55:12.301234Z","data":{{"stream":"{stream}","top":[{{"rank":1,"label_id":{label_id},"wnid":"n03770679","label":"label {label_id}","confidence":0.612345}}],"pad":"{pad}"}}}}"#
    );
    Message {
        seq,
        id,
        topic: Topic::Frames,
        stream: Some(stream.into()),
        json,
        appended: std::time::SystemTime::now(),
    }
}

/// Delivers once; gives how many were acknowledged.
async fn deliver(broker: &mut Mqtt, messages: &[Message]) -> (usize, Result<(), Fault>) {
    let mut told = |_, _| ();
    let mut acks = Acks::new(&mut told);
    let result = broker.deliver(messages, &mut acks).await;
    (acks.count(), result)
}

/// Delivers all, from the first that is not acknowledged after each failure, as the loop of a
/// sink does. Gives the failures.
async fn deliver_all(broker: &mut Mqtt, messages: &[Message], window: usize) -> Vec<Code> {
    let started = Instant::now();
    let mut faults = Vec::new();
    let mut done = 0;
    let mut connected = false;
    while done < messages.len() {
        assert!(started.elapsed() < Duration::from_secs(60), "{done} delivered: {faults:?}");
        let result = if connected {
            let to = messages.len().min(done + window);
            let (count, result) = deliver(broker, &messages[done..to]).await;
            done += count;
            result
        } else {
            broker.connect().await
        };
        connected = result.is_ok();
        if let Err(fault) = result {
            faults.push(fault.code);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    faults
}

fn ids(messages: &[Message]) -> Vec<String> {
    messages.iter().map(|it| it.id.clone()).collect()
}

/// Checks that each stream's events came, in order, once their repetitions are left out, and that
/// a repetition repeats what was there.
fn check_all_came(reader: &Reader, sent: &[Message]) {
    wait_until("all events came", || {
        let got: std::collections::HashSet<_> =
            reader.events().into_iter().map(|it| it.1).collect();
        sent.iter().all(|it| got.contains(&it.id))
    });
    let mut got: HashMap<String, Vec<String>> = HashMap::new();
    let mut payloads = HashMap::new();
    for (topic, id, payload) in reader.events() {
        let first = payloads.entry(id.clone()).or_insert_with(|| {
            got.entry(topic).or_default().push(id);
            payload.clone()
        });
        assert_eq!(*first, payload);
    }
    for stream in ["front", "yard"] {
        let of = |it: &&Message| it.stream.as_deref() == Some(stream);
        let sent: Vec<_> = sent.iter().filter(of).map(|it| it.id.clone()).collect();
        assert_eq!(got.remove(&format!("ghostwatch/{stream}/frames")).unwrap_or_default(), sent);
    }
}

#[test]
fn events_come_in_order_under_the_topics_of_their_streams() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    let mut all = frames(1, 500);
    let daemon = Message { stream: None, topic: Topic::Daemon, ..frame(500, "-", 1) };
    let state = Message { topic: Topic::State, ..frame(501, "front", 1) };
    run(async {
        let mut broker = broker(settings(server.port));
        broker.connect().await.unwrap();
        let more = [daemon, state];
        assert_eq!(deliver(&mut broker, &all).await.0, 499);
        assert_eq!(deliver(&mut broker, &more).await.0, 2);
        broker.close().await;
        all.extend(more);
    });
    check_all_came(&reader, &all[..499]);
    wait_until("the last came", || reader.events().len() == 501);
    let topics: Vec<_> = reader.events().into_iter().skip(499).map(|it| (it.0, it.1)).collect();
    let expected = ["ghostwatch/_/daemon", "ghostwatch/front/state"];
    let expected: Vec<_> =
        expected.iter().map(|it| (*it).to_owned()).zip(ids(&all[499..])).collect();
    assert_eq!(topics, expected);
}

#[test]
fn the_last_label_of_each_stream_is_kept_and_changes_only_with_it() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    let labels = [("front", 1), ("front", 1), ("yard", 1), ("front", 2), ("front", 2), ("yard", 1)];
    let all: Vec<_> =
        labels.iter().zip(1..).map(|((stream, label), seq)| frame(seq, stream, *label)).collect();
    run(async {
        let mut broker = broker(settings(server.port));
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &all).await.0, 6);
        broker.close().await;
    });
    wait_until("the label of yard came", || {
        reader.lines().iter().any(|it| it.contains("yard/label"))
    });
    wait_until("the good-bye came", || reader.words() == ["online", "offline"]);
    let changes = reader.lines().iter().filter(|it| it.contains("/label ")).count();
    assert_eq!(changes, 3, "front 1, yard 1, front 2");
    let late = Reader::named("late", &server, folder.path());
    let kept = |stream: &str| {
        let start = format!("1 ghostwatch/{stream}/label ");
        late.lines().iter().find_map(|it| it.strip_prefix(&start).map(str::to_owned))
    };
    wait_until("labels were kept", || kept("front").is_some() && kept("yard").is_some());
    assert_eq!(
        kept("front").unwrap(),
        format!(
            r#"{{"stream":"front","label_id":2,"label":"label 2","confidence":0.612345,"time":"2026-11-24T01:55:12.301234Z","id":"{}"}}"#,
            all[3].id
        )
    );
    assert_eq!(late.words(), ["offline"], "the last word was kept");
}

#[test]
fn a_daemon_that_dies_is_offline_and_one_that_comes_back_is_online() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    run(async {
        let mut broker = broker(settings(server.port));
        broker.connect().await.unwrap();
        // What is left of a process that was killed: its sockets are closed, nothing is said.
        drop(broker);
    });
    wait_until("the last will came", || reader.words() == ["online", "offline"]);
    run(async {
        let mut broker = broker(settings(server.port));
        broker.connect().await.unwrap();
        wait_until("it is online", || reader.words().len() == 3);
        // A connection of the same name takes over: the broker ends the old one first.
        let mut second = crate::mqtt::broker(settings(server.port));
        second.connect().await.unwrap();
        let fault = broker.lost().await;
        assert_eq!(fault.code, Code::Error, "{fault}");
        wait_until("it is online again", || reader.words().last().unwrap() == "online");
        second.close().await;
    });
    wait_until("it said good-bye", || reader.words().last().unwrap() == "offline");
}

#[test]
fn a_broker_that_is_down_at_the_start_gets_everything_later() {
    let folder = TempDir::new().unwrap();
    let mut server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    server.stop();
    run(async {
        let mut broker = broker(settings(server.port));
        assert_eq!(broker.connect().await.unwrap_err().code, Code::Refused);
        server.restart();
        let all = frames(1, 200);
        deliver_all(&mut broker, &all, 50).await;
        check_all_came(&reader, &all);
    });
}

#[test]
fn restarts_while_publishing_lose_nothing() {
    let folder = TempDir::new().unwrap();
    let mut server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    let all = frames(1, 100_000);
    let sent = all.clone();
    let port = server.port;
    let sink = std::thread::Builder::new().spawn(move || {
        run(async {
            let mut broker = broker(settings(port));
            deliver_all(&mut broker, &sent, 200).await
        })
    });
    let sink = sink.unwrap();
    for part in 1..=3 {
        wait_until("events came", || part * 3_000 < reader.count());
        server.stop();
        server.restart();
    }
    let faults = sink.join().unwrap();
    assert!(3 <= faults.len(), "each restart was noticed: {faults:?}");
    check_all_came(&reader, &all);
}

#[test]
fn a_broker_that_hangs_is_given_up_in_time_and_used_again_when_it_goes_on() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    let all = frames(1, 1_000);
    run(async {
        let mut settings = settings(server.port);
        settings.ack_timeout = Duration::from_secs(1);
        settings.connect_timeout = Duration::from_secs(1);
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &all[..100]).await.0, 100);
        server.pause();
        let started = Instant::now();
        let (count, result) = deliver(&mut broker, &all[100..]).await;
        assert_eq!((count, result.unwrap_err().code), (0, Code::Timeout));
        assert_eq!(broker.connect().await.unwrap_err().code, Code::Timeout);
        let took = started.elapsed().as_secs_f64();
        assert!((2.0..3.0).contains(&took), "{took} s");
        server.resume();
        deliver_all(&mut broker, &all[100..], 100).await;
    });
    check_all_came(&reader, &all);
}

#[test]
fn the_end_of_a_part_does_not_wait_for_delayed_acknowledgements() {
    let folder = TempDir::new().unwrap();
    let server = quiet_mosquitto(&folder);
    let mut broker = broker(settings(server.port));
    let sent = frames(0, 500);
    run(async {
        broker.connect().await.unwrap();
        let started = Instant::now();
        for part in sent.chunks(10) {
            assert_eq!(deliver(&mut broker, part).await.0, part.len());
        }
        // Systems delay an acknowledgement by 40 ms: 2 s for the 50 parts.
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    });
}

#[test]
fn a_silent_connection_is_tried_while_there_is_nothing_to_deliver() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    run(async {
        let mut settings = settings(server.port);
        settings.keep_alive = Duration::from_secs(1);
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        // Mosquitto ends a connection after one and a half times its keep-alive without a word.
        let idle = tokio::time::timeout(Duration::from_secs(4), broker.lost()).await;
        assert!(idle.is_err(), "{idle:?}");
        assert!(3 <= server.printed().matches("PINGREQ from host-a-mqtt").count());
        assert_eq!(deliver(&mut broker, &frames(1, 10)).await.0, 9);
        server.pause();
        let started = Instant::now();
        assert_eq!(broker.lost().await.code, Code::Timeout);
        let took = started.elapsed().as_secs_f64();
        assert!(took < 3.0, "two keep-alives, but {took} s");
    });
}

#[test]
fn acknowledgements_that_never_come_are_noticed_and_everything_is_sent_again() {
    let folder = TempDir::new().unwrap();
    let server = mosquitto(&folder, "");
    let reader = Reader::start(&server, folder.path());
    let all = frames(1, 1_000);
    assert_eq!(settings_of_nobody().ack_timeout, Duration::from_secs(30), "R10");
    run(async {
        let proxy = Proxy::start(server.port).await;
        let mut settings = settings(proxy.port);
        settings.ack_timeout = Duration::from_secs(1);
        // Pings are answered all the time: only the missing acknowledgements give it away.
        settings.keep_alive = Duration::from_secs(1);
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        proxy.swallow_after(300);
        let (count, result) = deliver(&mut broker, &all[..500]).await;
        assert_eq!((count, result.unwrap_err().code), (298, Code::Timeout), "and two labels");
        proxy.swallow_after(usize::MAX);
        deliver_all(&mut broker, &all[count..], 500).await;
    });
    check_all_came(&reader, &all);
    let came = reader.events().len();
    assert!(999 < came && came <= 999 + 100, "one window was sent twice: {came}");
}

/// What the configuration leaves alone.
fn settings_of_nobody() -> Settings {
    Settings::new(Address::parse("mqtt://broker.example").unwrap(), "name")
}

#[test]
fn a_wrong_password_is_refused_and_a_right_one_is_taken() {
    let folder = TempDir::new().unwrap();
    let users = folder.path().join("users");
    let made = Command::new("mosquitto_passwd")
        .args(["-b", "-c", users.to_str().unwrap(), "writer", "s3cret"])
        .status();
    assert!(made.unwrap().success());
    let who = format!("allow_anonymous false\npassword_file {}\n", users.display());
    let server = mosquitto_on(&folder, free_port(), &who, "");
    run(async {
        for password in [None, Some("wrong")] {
            let mut settings = settings(server.port);
            settings.login = Login {
                username: password.map(|_| "writer".into()),
                password: password.map(Secret::new),
                token: None,
            };
            let fault = broker(settings).connect().await.unwrap_err();
            assert_eq!(fault.code, Code::Auth, "{fault}");
        }
        let mut settings = settings(server.port);
        settings.login.username = Some("writer".into());
        settings.login.password = Some(Secret::new("s3cret"));
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &frames(1, 3)).await.0, 2);
        broker.close().await;
    });
}

#[test]
fn tls_is_checked_on_both_sides() {
    let folder = TempDir::new().unwrap();
    let tls = certificates(folder.path());
    let dir = folder.path().display();
    let more = format!(
        "cafile {dir}/ca.pem\ncertfile {dir}/server.pem\nkeyfile {dir}/server.key\n\
         require_certificate true\n"
    );
    let server = mosquitto(&folder, &more);
    let with = |tls: Tls| {
        let mut settings = settings(server.port);
        settings.address.tls = true;
        settings.tls = tls;
        broker(settings)
    };
    run(async {
        let mut trusted = with(tls.clone());
        trusted.connect().await.unwrap();
        assert_eq!(deliver(&mut trusted, &frames(1, 300)).await.0, 299);
        trusted.close().await;
        let refused = [
            ("the system does not know that authority", Tls { ca_file: None, ..tls.clone() }),
            ("no certificate shown", Tls { cert_file: None, key_file: None, ..tls.clone() }),
            ("no such file", Tls { ca_file: Some("missing.pem".into()), ..tls.clone() }),
            ("not a certificate", Tls { ca_file: tls.key_file.clone(), ..tls.clone() }),
        ];
        for (why, tls) in refused {
            let fault = with(tls).connect().await.unwrap_err();
            assert_eq!(fault.code, Code::Tls, "{why}: {fault}");
        }
    });
}

#[test]
fn an_event_that_is_too_large_is_refused_alone() {
    let folder = TempDir::new().unwrap();
    // Over this limit Mosquitto ends the connection; the sink must not get there.
    let server = mosquitto(&folder, "max_packet_size 2000\n");
    let reader = Reader::start(&server, folder.path());
    let mut all = frames(1, 21);
    all[10].json.push_str(&" ".repeat(2_000));
    run(async {
        let mut settings = settings(server.port);
        settings.packet_bytes_max = 2_000;
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all).await;
        assert_eq!((count, result.unwrap_err().code), (10, Code::TooLarge));
        // The connection is used on.
        let (count, result) = deliver(&mut broker, &all[11..]).await;
        result.unwrap();
        assert_eq!(count, 9);
        broker.close().await;
    });
    all.remove(10);
    check_all_came(&reader, &all);
    wait_until("there was one connection", || reader.words() == ["online", "offline"]);
}

#[test]
fn a_name_that_is_not_known_is_told_from_a_broker_that_is_down() {
    run(async {
        let mut settings = settings(1);
        settings.address.host = "broker.invalid".into();
        let fault = broker(settings).connect().await.unwrap_err();
        assert_eq!(fault.code, Code::Dns, "{fault}");
    });
}
