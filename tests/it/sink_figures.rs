//! How many events a second the sinks deliver, beside what the same server takes from a client
//! that does nothing else. Run `cargo test --test it sink_figures -- --ignored --nocapture`.

use std::{
    collections::VecDeque,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, message::PublishMessage, stream::Config};
use ghostwatch::sink::{
    broker::{Broker, Message},
    nats::Nats,
    redis::Redis,
    settings::{self, Login, NatsStream as Create},
};

use crate::support_server::{Server, deliver, messages, run};

const EVENTS: u64 = 20_000;
const ROUNDS: usize = 5;

/// Events a second of one delivery, as the loop delivers: a page of 2048 at a time.
async fn rate(broker: &mut impl Broker, messages: &[Message]) -> f64 {
    let start = Instant::now();
    for page in messages.chunks(2048) {
        let (acked, result) = deliver(broker, page).await;
        result.unwrap();
        assert_eq!(acked, vec![false; page.len()]);
    }
    messages.len() as f64 / start.elapsed().as_secs_f64()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn print(what: &str, ours: Vec<f64>, other: &str, theirs: Vec<f64>) {
    let (ours, theirs) = (median(ours), median(theirs));
    println!("{what}: {ours:.0} events/s; {other}: {theirs:.0}; ratio {:.2}", ours / theirs);
}

/// New events for each round: no broker has them yet.
fn round(number: usize) -> Vec<Message> {
    let start = number as u64 * EVENTS;
    messages(start + 1..=start + EVENTS)
}

#[test]
#[ignore = "measures, promises nothing"]
fn redis_beside_redis_benchmark() {
    for fsync in ["everysec", "always"] {
        let server = Server::new("redis-server", |port, folder| {
            let (port, folder) = (port.to_string(), folder.display().to_string());
            let all = ["--port", &port, "--dir", &folder, "--bind", "127.0.0.1", "--save", ""];
            let log = ["--appendonly", "yes", "--appendfsync", fsync];
            all.iter().chain(&log).map(|it| (*it).to_owned()).collect()
        })
        .started();
        let mut broker = Redis::new(settings::Redis {
            host: "127.0.0.1".to_owned(),
            port: server.port(),
            database: 0,
            key_prefix: "ghostwatch".to_owned(),
            max_entries: None,
            tls: None,
            login: Login::default(),
            timeout: Duration::from_secs(5),
        });
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for number in 0..ROUNDS {
            let sent = round(number);
            ours.push(run(async {
                broker.connect().await.unwrap();
                rate(&mut broker, &sent).await
            }));
            theirs.push(redis_benchmark(server.port()));
        }
        let other = "redis-benchmark -c 1 -P 256 XADD";
        print(&format!("redis, appendfsync {fsync}"), ours, other, theirs);
    }
}

fn redis_benchmark(port: u16) -> f64 {
    let event = "x".repeat(700);
    let (port, events) = (port.to_string(), EVENTS.to_string());
    let fixed = ["-c", "1", "-P", "256", "--csv", "-p", &port, "-n", &events];
    let command = ["XADD", "bench", "*", "event", &event];
    let run = Command::new("redis-benchmark").args(fixed).args(command).output().unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    let last = text.lines().last().unwrap();
    let field = last.split("\",\"").nth(1).unwrap_or_else(|| panic!("no rate in {text}"));
    field.parse().unwrap_or_else(|_| panic!("no rate in {last}"))
}

#[test]
#[ignore = "measures, promises nothing"]
fn nats_beside_a_minimal_client() {
    let newest = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/nats-server-2.15.1");
    for (name, program) in [("2.9", Path::new("/usr/sbin/nats-server")), ("2.15", &newest)] {
        let server = Server::new(program, |port, folder| {
            let config = folder.join("nats.conf");
            let store = folder.join("store");
            let text = format!("listen: 127.0.0.1:{port}\njetstream {{ store_dir: {store:?} }}\n");
            fs::write(&config, text).unwrap();
            vec!["-c".to_owned(), config.display().to_string()]
        })
        .started();
        let url = format!("nats://127.0.0.1:{}", server.port());
        let mut broker = Nats::new(settings::Nats {
            servers: vec![url.clone()],
            subject_prefix: "ghostwatch.v1".to_owned(),
            stream: "GHOSTWATCH".to_owned(),
            create: Create::default(),
            tls: None,
            login: Login::default(),
            timeout: Duration::from_secs(5),
        });
        let (mut ours, mut named, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..ROUNDS {
            let sent = round(number);
            ours.push(run(async {
                broker.connect().await.unwrap();
                rate(&mut broker, &sent).await
            }));
            named.push(run(minimal(&url, &sent, true)));
            bare.push(run(minimal(&url, &sent, false)));
        }
        let what = format!("nats {name}");
        print(&what, ours.clone(), "minimal client with Nats-Msg-Id, 256 in flight", named);
        print(&what, ours, "the same without an id", bare);
    }
}

/// Publishes without order or recovery, 256 at a time in flight.
async fn minimal(url: &str, messages: &[Message], named: bool) -> f64 {
    let context = jetstream::new(async_nats::connect(url).await.unwrap());
    let config =
        Config { name: "BENCH".into(), subjects: vec!["bench".into()], ..Config::default() };
    context.get_or_create_stream(config).await.unwrap();
    let start = Instant::now();
    let mut flying = VecDeque::new();
    for it in messages {
        if flying.len() == 256 {
            let oldest: jetstream::context::PublishAckFuture = flying.pop_front().unwrap();
            oldest.await.unwrap();
        }
        let mut publish = PublishMessage::build().payload(it.json.clone().into());
        if named {
            publish = publish.message_id(&it.id);
        }
        flying.push_back(context.send_publish("bench", publish).await.unwrap());
    }
    for it in flying {
        it.await.unwrap();
    }
    messages.len() as f64 / start.elapsed().as_secs_f64()
}
