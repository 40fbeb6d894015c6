//! How the Kafka sink logs in (SASL), shown with Tansu behind a door that asks for a password as
//! Apache Kafka does, and refused by Tansu's own SASL.

use std::{
    collections::HashMap,
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use ghostwatch::{
    secret::Secret,
    sink::{
        broker::{Broker as _, Code},
        settings::{Kafka as Settings, Login as Ours, Mechanism, Tls},
    },
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use tempfile::TempDir;

use crate::{
    end_to_end::{drain, events, ghostwatch, published, signal},
    kafka::{broker, by_stream, deliver, frames, read_with, run, settings, tansu},
    sinks_daemon::{errors, with_sinks},
    support::wait_until,
    support_kafka::{Door, Login},
    support_sinks::{id, metric, parsed, read_all, wait_long},
    support_tls::certificates,
};

const STREAM: &str = "  p: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";
/// The user has the two characters that SCRAM writes in a way of its own.
const LOGIN: Login = Login {
    mechanisms: &["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"],
    user: "view,er=1",
    password: "cAn:@/?#%&'\"\\,=rest",
};

fn at(port: u16, mechanism: Mechanism, user: &str, password: &str) -> Settings {
    let mut it = settings(format!("127.0.0.1:{port}"));
    it.mechanism = mechanism;
    let password = Some(Secret::new(password));
    it.login = Ours { username: Some(user.to_owned()), password, token: None };
    it
}

/// A client of the same library that logs in with the right password.
fn client(door: &Door, mechanism: &str, tls: Option<&Tls>) -> ClientConfig {
    let mut it = ClientConfig::new();
    it.set("bootstrap.servers", format!("127.0.0.1:{}", door.port))
        .set("security.protocol", if tls.is_some() { "sasl_ssl" } else { "sasl_plaintext" })
        .set("sasl.mechanism", mechanism)
        .set("sasl.username", LOGIN.user)
        .set("sasl.password", LOGIN.password)
        .set("group.id", "reader");
    if let Some(file) = tls.and_then(|it| it.ca_file.as_ref()) {
        it.set("ssl.ca.location", file.to_string_lossy());
    }
    it
}

const MECHANISMS: [(Mechanism, &str); 3] = [
    (Mechanism::Plain, "PLAIN"),
    (Mechanism::ScramSha256, "SCRAM-SHA-256"),
    (Mechanism::ScramSha512, "SCRAM-SHA-512"),
];

/// Delivers with each mechanism in turn; `tls` iff the door has it.
fn each_mechanism_delivers(folder: &TempDir, tls: Option<&Tls>) {
    let door = Door::start(folder, LOGIN);
    let all = frames(1, 301);
    run(async {
        for (nth, (mechanism, name)) in MECHANISMS.into_iter().enumerate() {
            let mut settings = at(door.port, mechanism, LOGIN.user, LOGIN.password);
            settings.tls = tls.cloned();
            let mut broker = broker(settings);
            let connected = broker.connect().await;
            connected.unwrap_or_else(|fault| panic!("{name}: {fault}"));
            let part = &all[nth * 100..(nth + 1) * 100];
            let (count, result) = deliver(&mut broker, part).await;
            result.unwrap();
            assert_eq!(count, 100, "{name}");
            broker.close().await;
        }
    });
    assert_eq!(door.refused(), 0);
    let came = read_with(&mut client(&door, "SCRAM-SHA-256", tls), all.len());
    assert_eq!(came, by_stream(&all));
}

#[test]
fn the_right_password_delivers_in_order_with_each_mechanism() {
    each_mechanism_delivers(&TempDir::new().unwrap(), None);
}

#[test]
fn the_right_password_delivers_over_tls_with_each_mechanism() {
    let folder = TempDir::new().unwrap();
    let tls = certificates(folder.path());
    each_mechanism_delivers(&folder, Some(&Tls { cert_file: None, key_file: None, ..tls }));
}

#[test]
fn a_refused_login_is_told_as_one_at_once_with_each_mechanism() {
    let folder = TempDir::new().unwrap();
    let login = Login { mechanisms: &["PLAIN", "SCRAM-SHA-256"], ..LOGIN };
    let door = Door::start(&folder, login);
    let rows = [
        (Mechanism::Plain, LOGIN.user, "wrong"),
        (Mechanism::Plain, "other", LOGIN.password),
        (Mechanism::ScramSha256, LOGIN.user, "wrong"),
        (Mechanism::ScramSha256, "other", LOGIN.password),
        // The door does not offer it.
        (Mechanism::ScramSha512, LOGIN.user, LOGIN.password),
    ];
    run(async {
        for (mechanism, user, password) in rows {
            let row = format!("{mechanism:?} {user} {password}");
            let started = Instant::now();
            let refused = broker(at(door.port, mechanism, user, password)).connect().await;
            let fault = refused.expect_err(&row);
            println!("{row}: {:.1} s: {fault}", started.elapsed().as_secs_f64());
            assert_eq!(fault.code, Code::Auth, "{row}: {fault}");
            assert!(!fault.to_string().contains(LOGIN.password), "{row}: {fault}");
            // Before `connect_timeout`, which is 5 s.
            assert!(started.elapsed() < Duration::from_secs(3), "{row}: {:?}", started.elapsed());
        }
    });
    assert_eq!(door.let_in(), 0);
}

/// Tansu with `--authentication` has no users: everybody is refused, by another server's SASL.
#[test]
fn a_login_that_tansu_refuses_is_told_as_one() {
    let folder = TempDir::new().unwrap();
    let server = tansu(&folder, &["--authentication"]);
    run(async {
        for mechanism in [Mechanism::ScramSha256, Mechanism::ScramSha512] {
            let settings = at(server.port, mechanism, LOGIN.user, LOGIN.password);
            let fault = broker(settings).connect().await.unwrap_err();
            println!("{mechanism:?}: {fault}");
            assert_eq!(fault.code, Code::Auth, "{mechanism:?}: {fault}");
        }
    });
}

/// What the topics hold: for each topic and key the events in order.
fn in_kafka(config: &ClientConfig, count: usize) -> HashMap<(String, Option<String>), Vec<String>> {
    let consumer: BaseConsumer = config.create().unwrap();
    let mut all = TopicPartitionList::new();
    let metadata = consumer.fetch_metadata(None, Duration::from_secs(10)).unwrap();
    for topic in metadata.topics() {
        for partition in topic.partitions() {
            let from = Offset::Beginning;
            all.add_partition_offset(topic.name(), partition.id(), from).unwrap();
        }
    }
    consumer.assign(&all).unwrap();
    let (started, mut came, mut number) = (Instant::now(), HashMap::new(), 0);
    while number < count {
        assert!(started.elapsed() < Duration::from_secs(30), "{number} of {count} came");
        let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let text = |it: &[u8]| String::from_utf8(it.to_vec()).unwrap();
        let place = (message.topic().to_owned(), message.key().map(text));
        came.entry(place).or_insert_with(Vec::new).push(text(message.payload().unwrap()));
        number += 1;
    }
    came
}

/// What the topics should hold.
fn expected(journal: &[String]) -> HashMap<(String, Option<String>), Vec<String>> {
    let mut all = HashMap::new();
    for json in journal {
        let event = parsed(json);
        let kind = event["type"].as_str().unwrap();
        let topic = match kind.strip_prefix("io.ghostwatch.").unwrap() {
            "frame.classified.v1" => "frames",
            it if it.starts_with("stream.") => "state",
            it if it.starts_with("daemon.") => "daemon",
            other => panic!("{other}"),
        };
        // Events of no stream have `_`.
        let key = Some(event["data"]["stream"].as_str().unwrap_or("_").to_owned());
        let place = (format!("ghostwatch.v1.{topic}"), key);
        all.entry(place).or_insert_with(Vec::new).push(json.clone());
    }
    all
}

#[test]
fn a_wrong_password_keeps_everything_in_the_journal_until_the_file_is_corrected() {
    let folder = TempDir::new().unwrap();
    let tls = certificates(folder.path());
    let door = Door::start(&folder, LOGIN);
    let wrong = format!("not-{}", LOGIN.password);
    fs::write(folder.path().join("password"), format!("{wrong}\n")).unwrap();
    let sinks = format!(
        "  - {{type: kafka, servers: [\"127.0.0.1:{}\"], username: \"{}\", password_file: password, tls: {{ca_file: ca.pem}}}}\n",
        door.port, LOGIN.user
    );
    let listen = with_sinks(folder.path(), STREAM, &sinks);
    let config = folder.path().join("config.yaml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + "log: {level: trace, format: text}\n").unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let child =
        ghostwatch(folder.path()).arg("run").stderr(log).stdout(Stdio::null()).spawn().unwrap();
    let value = |series: &str| metric(&listen, series).unwrap_or_default();
    wait_long("it is refused", || 0.0 < value("sink_errors_total{code=\"auth\",sink=\"kafka\"}"));
    let first = Instant::now();
    assert_eq!(value("sink_up{sink=\"kafka\"}"), 0.0);
    wait_long("12 seconds", || Duration::from_secs(12) < first.elapsed());
    let lines = errors(folder.path(), "kafka");
    let most = 1 + first.elapsed().as_secs() as usize / 10 + 1;
    println!("{} lines; {}", lines.len(), lines[0]);
    assert!((1..=most).contains(&lines.len()), "{lines:#?}");
    assert_eq!((door.let_in(), value("sink_acked_total{sink=\"kafka\"}")), (0, 0.0));
    let waiting = value("sink_lag_events{sink=\"kafka\"}");
    assert!(100.0 < waiting, "{waiting} events wait");

    fs::write(folder.path().join("password"), LOGIN.password).unwrap();
    signal(&child, "HUP");
    wait_until("it has everything", || {
        waiting < value("sink_acked_total{sink=\"kafka\"}")
            && value("sink_lag_events{sink=\"kafka\"}") < 100.0
    });
    assert_eq!(value("sink_up{sink=\"kafka\"}"), 1.0);
    let before = published(&listen, "p");
    wait_until("frames come and go", || before + 20 < published(&listen, "p"));
    drain(child, folder.path());
    events(folder.path());
    let journal = read_all(&folder.path().join("journal.db"));
    let came = in_kafka(&client(&door, "SCRAM-SHA-512", Some(&tls)), journal.len());
    assert!(came == expected(&journal), "something else came, twice, or in another order");
    let said = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(said.contains("librdkafka"), "the log is as loud as it was told to be");
    for it in [&wrong, LOGIN.password, "rest\\\"", "cAn:@"] {
        let line = said.lines().find(|line| line.contains(it));
        assert_eq!(line, None, "the password is in the log");
    }
    println!("{} events, the last {}", journal.len(), id(journal.last().unwrap()));
}
