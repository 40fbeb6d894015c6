//! What the Kafka sink promises: with Tansu, a broker that speaks Kafka's protocol and keeps
//! everything in memory, and with librdkafka's mock cluster for errors of a broker. Neither is
//! Apache Kafka.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    path::Path,
    time::{Duration, Instant},
};

use ghostwatch::sink::{
    broker::{Acks, Broker, Code, Fault, Message, Topic},
    kafka::Kafka,
    settings::{Kafka as Settings, Tls},
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use tempfile::TempDir;

use crate::{
    mqtt,
    support_broker::{Server, free_port},
    support_tls::certificates,
};

const PARTITIONS: i32 = 3;

pub(crate) fn tansu(folder: &TempDir, more: &[&str]) -> Server {
    let port = free_port();
    tansu_at(folder, port, port, more)
}

/// One that tells its clients another port than its own.
pub(crate) fn tansu_at(folder: &TempDir, port: u16, told: u16, more: &[&str]) -> Server {
    let url = |port: u16| format!("tcp://127.0.0.1:{port}");
    let (url, told) = (url(port), url(told));
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/tansu");
    let mut args = vec!["broker", "--listener-url", &url, "--advertised-listener-url", &told];
    args.extend(["--storage-engine", "memory://tansu/"]);
    args.extend(more);
    Server::start("tansu", program, args, port, folder.path())
}

pub(crate) fn settings(server: impl std::fmt::Display) -> Settings {
    let mut it = Settings::new(vec![server.to_string()], "host-a-kafka");
    it.connect_timeout = Duration::from_secs(5);
    it.ack_timeout = Duration::from_secs(5);
    it.partitions = PARTITIONS;
    it.replicas = 1;
    it
}

pub(crate) fn at(server: &Server) -> Settings {
    settings(format!("127.0.0.1:{}", server.port))
}

pub(crate) fn broker(settings: Settings) -> Kafka {
    Kafka::new(settings).unwrap()
}

pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// The events `from..to` of five streams in turn, about 700 bytes each.
pub(crate) fn frames(from: u64, to: u64) -> Vec<Message> {
    let frame = |seq| {
        let id = format!("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-{seq:020}");
        let json = format!(r#"{{"id":"{id}","pad":"{}"}}"#, "x".repeat(640));
        Message {
            seq,
            id,
            topic: Topic::Frames,
            stream: Some(format!("s{}", seq % 5)),
            json,
            appended: std::time::SystemTime::now(),
        }
    };
    (from..to).map(frame).collect()
}

pub(crate) async fn deliver(
    broker: &mut Kafka,
    messages: &[Message],
) -> (usize, Result<(), Fault>) {
    let mut told = |_, _| ();
    let mut acks = Acks::new(&mut told);
    let result = broker.deliver(messages, &mut acks).await;
    (acks.count(), result)
}

/// Everything in the topic of frames: for each key the ids in order, repetitions left out.
fn read(servers: &str, least: usize) -> HashMap<String, Vec<String>> {
    read_with(ClientConfig::new().set("bootstrap.servers", servers), least)
}

/// As [`read`], by a client that is set up with what the broker asks for.
pub(crate) fn read_with(client: &mut ClientConfig, least: usize) -> HashMap<String, Vec<String>> {
    let consumer: BaseConsumer = client.set("group.id", "reader").create().unwrap();
    let mut all = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        all.add_partition_offset("ghostwatch.v1.frames", partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&all).unwrap();
    let started = Instant::now();
    let mut seen = HashSet::new();
    let mut came: HashMap<String, Vec<String>> = HashMap::new();
    while seen.len() < least {
        assert!(started.elapsed() < Duration::from_secs(20), "{} of {least} came", seen.len());
        let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let text = |it: Option<&[u8]>| String::from_utf8(it.unwrap().to_vec()).unwrap();
        let header = message.headers().unwrap().get(0);
        assert_eq!(header.key, "id");
        let id = text(header.value);
        assert!(text(message.payload()).contains(&id));
        if seen.insert(id.clone()) {
            came.entry(text(message.key())).or_default().push(id);
        }
    }
    came
}

pub(crate) fn by_stream(messages: &[Message]) -> HashMap<String, Vec<String>> {
    let mut by: HashMap<String, Vec<String>> = HashMap::new();
    for it in messages {
        by.entry(it.stream.clone().unwrap()).or_default().push(it.id.clone());
    }
    by
}

#[test]
fn topics_are_made_and_events_come_in_order_with_key_and_id() {
    let folder = TempDir::new().unwrap();
    let server = tansu(&folder, &[]);
    let all = frames(1, 3_000);
    run(async {
        let mut broker = broker(at(&server));
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all).await;
        result.unwrap();
        assert_eq!(count, all.len());
        broker.close().await;
    });
    let came = read(&format!("127.0.0.1:{}", server.port), all.len());
    assert_eq!(came, by_stream(&all));
}

#[test]
fn a_broker_that_is_down_at_the_start_is_refused_and_used_later() {
    let folder = TempDir::new().unwrap();
    let mut server = tansu(&folder, &[]);
    server.kill();
    run(async {
        let mut broker = broker(at(&server));
        let fault = broker.connect().await.unwrap_err();
        assert_eq!(fault.code, Code::Refused, "{fault}");
        server.restart();
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &frames(1, 100)).await.0, 99);
        broker.close().await;
    });
}

#[test]
fn a_broker_that_hangs_is_given_up_in_time_and_used_again_when_it_goes_on() {
    let folder = TempDir::new().unwrap();
    let server = tansu(&folder, &[]);
    let all = frames(1, 1_000);
    run(async {
        let mut settings = at(&server);
        settings.ack_timeout = Duration::from_secs(2);
        settings.connect_timeout = Duration::from_secs(3);
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &all[..100]).await.0, 100);
        server.pause();
        let started = Instant::now();
        let (count, result) = deliver(&mut broker, &all[100..]).await;
        let fault = result.unwrap_err();
        assert_eq!((count, fault.code), (0, Code::Timeout), "{fault}");
        let fault = broker.connect().await.unwrap_err();
        assert_eq!(fault.code, Code::Timeout, "{fault}");
        let took = started.elapsed().as_secs_f64();
        assert!((5.0..8.0).contains(&took), "{took} s");
        server.resume();
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all[100..]).await;
        result.unwrap();
        assert_eq!(count, 899);
        broker.close().await;
    });
    let came = read(&format!("127.0.0.1:{}", server.port), all.len());
    assert_eq!(came, by_stream(&all));
}

#[test]
fn a_killed_broker_gets_everything_that_it_had_not_acknowledged() {
    let folder = TempDir::new().unwrap();
    let mut server = tansu(&folder, &[]);
    let all = frames(1, 2_000);
    let acked = run(async {
        let mut settings = at(&server);
        settings.ack_timeout = Duration::from_secs(2);
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        let (acked, _) = deliver(&mut broker, &all[..500]).await;
        server.kill();
        let (none, result) = deliver(&mut broker, &all[acked..]).await;
        let fault = result.unwrap_err();
        assert_eq!((none, fault.code), (0, Code::Refused), "{fault}");
        // It has lost everything, the topics too.
        server.restart();
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all[acked..]).await;
        result.unwrap();
        assert_eq!(acked + count, all.len());
        broker.close().await;
        acked
    });
    let came = read(&format!("127.0.0.1:{}", server.port), all.len() - acked);
    assert_eq!(came, by_stream(&all[acked..]));
}

#[test]
fn an_event_that_is_too_large_is_refused_alone() {
    let folder = TempDir::new().unwrap();
    let server = tansu(&folder, &[]);
    let mut all = frames(1, 21);
    all[10].json.push_str(&" ".repeat(5_000));
    run(async {
        let mut settings = at(&server);
        settings.message_bytes_max = 5_000;
        let mut broker = broker(settings);
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all).await;
        assert_eq!((count, result.unwrap_err().code), (10, Code::TooLarge));
        let (count, result) = deliver(&mut broker, &all[11..]).await;
        result.unwrap();
        assert_eq!(count, 9);
        broker.close().await;
    });
    all.remove(10);
    assert_eq!(read(&format!("127.0.0.1:{}", server.port), all.len()), by_stream(&all));
}

/// Tansu 0.6 takes no certificate together with its key, so a Mosquitto with TLS stands for a
/// broker up to the end of the handshake.
#[test]
fn a_broker_that_cannot_be_trusted_is_refused() {
    let folder = TempDir::new().unwrap();
    let tls = certificates(folder.path());
    let dir = folder.path().display();
    let server =
        mqtt::mosquitto(&folder, &format!("certfile {dir}/server.pem\nkeyfile {dir}/server.key\n"));
    run(async {
        let refused = [
            ("the system does not know that authority", Tls { ca_file: None, ..tls.clone() }),
            ("no such file", Tls { ca_file: Some("missing.pem".into()), ..tls.clone() }),
        ];
        for (why, tls) in refused {
            let mut settings = at(&server);
            settings.tls = Some(tls);
            let fault = broker(settings).connect().await.unwrap_err();
            assert_eq!(fault.code, Code::Tls, "{why}: {fault}");
        }
    });
}

#[test]
fn a_name_that_is_not_known_is_told_from_a_broker_that_is_down() {
    run(async {
        let fault = broker(settings("broker.invalid:9092")).connect().await.unwrap_err();
        assert_eq!(fault.code, Code::Dns, "{fault}");
    });
}

const FRAMES: &str = "ghostwatch.v1.frames";

fn mock() -> MockCluster<'static, rdkafka::producer::DefaultProducerContext> {
    let mock = MockCluster::new(1).unwrap();
    for topic in Topic::ALL {
        let name = format!("ghostwatch.v1.{}", topic.name());
        mock.create_topic(&name, PARTITIONS, 1).unwrap();
    }
    mock
}

#[test]
fn errors_that_pass_are_retried_without_repetitions() {
    use RDKafkaRespErr as E;
    let mock = mock();
    let all = frames(1, 2_000);
    run(async {
        let mut broker = broker(settings(mock.bootstrap_servers()));
        broker.connect().await.unwrap();
        let errors = [
            E::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
            E::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
            E::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
            E::RD_KAFKA_RESP_ERR__TRANSPORT,
        ];
        mock.request_errors(RDKafkaApiKey::Produce, &errors);
        let (count, result) = deliver(&mut broker, &all).await;
        result.unwrap();
        assert_eq!(count, all.len());
        broker.close().await;
    });
    assert_eq!(read(&mock.bootstrap_servers(), all.len()), by_stream(&all));
}

#[test]
fn errors_that_stay_end_the_delivery_with_their_code() {
    use RDKafkaRespErr as E;
    let mock = mock();
    let all = frames(1, 100);
    run(async {
        let errors = [
            (E::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED, Code::Auth),
            (E::RD_KAFKA_RESP_ERR_INVALID_REQUIRED_ACKS, Code::Error),
        ];
        for (error, code) in errors {
            let mut broker = broker(settings(mock.bootstrap_servers()));
            broker.connect().await.unwrap();
            // Each of the partitions gets it.
            mock.request_errors(RDKafkaApiKey::Produce, &[error; 30]);
            let (count, result) = deliver(&mut broker, &all).await;
            let fault = result.unwrap_err();
            assert_eq!((count, fault.code), (0, code), "{fault}");
            mock.clear_request_errors(RDKafkaApiKey::Produce);
            broker.connect().await.unwrap();
            let (count, result) = deliver(&mut broker, &all).await;
            result.unwrap();
            assert_eq!(count, all.len());
            broker.close().await;
        }
    });
}

#[test]
fn a_batch_that_the_broker_finds_too_large_is_sent_one_by_one() {
    use RDKafkaRespErr as E;
    let mock = mock();
    let all = frames(1, 10);
    run(async {
        let mut broker = broker(settings(mock.bootstrap_servers()));
        broker.connect().await.unwrap();
        let too_large = [E::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE; 30];
        mock.request_errors(RDKafkaApiKey::Produce, &too_large);
        let (count, result) = deliver(&mut broker, &all).await;
        assert_eq!((count, result.unwrap_err().code), (0, Code::Error), "which one is not known");
        broker.connect().await.unwrap();
        let (count, result) = deliver(&mut broker, &all).await;
        assert_eq!((count, result.unwrap_err().code), (0, Code::TooLarge), "now it is");
        mock.clear_request_errors(RDKafkaApiKey::Produce);
        let (count, result) = deliver(&mut broker, &all[1..]).await;
        result.unwrap();
        assert_eq!(count, 8, "the same connection is used on");
        broker.close().await;
    });
    assert_eq!(read(&mock.bootstrap_servers(), 8), by_stream(&all[1..]));
}

#[test]
fn a_topic_that_is_not_there_and_cannot_be_made_is_told() {
    let mock = mock();
    let gone = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    mock.topic_error(FRAMES, gone).unwrap();
    run(async {
        let mut broker = broker(settings(mock.bootstrap_servers()));
        // The mock cluster makes no topics.
        let fault = broker.connect().await.unwrap_err();
        assert_eq!(fault.code, Code::NotFound, "{fault}");
    });
}
