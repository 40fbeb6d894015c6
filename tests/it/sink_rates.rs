//! How many events per second reach a broker, beside the same client library without our code in
//! the same run. `cargo test --features kafka --test it sink_rates -- --ignored --nocapture`

use std::time::Instant;
#[cfg(feature = "kafka")]
use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use ghostwatch::sink::broker::{Acks, Broker, Message};
use rumqttc::{AsyncClient, Event, Incoming, MqttOptions, NetworkOptions, QoS};
use tempfile::TempDir;

use crate::mqtt;

const EVENTS: usize = 50_000;
/// What the loop of a sink hands over at once.
const PAGE: usize = 512;

/// Delivers all in pages; gives events per second.
async fn ours(broker: &mut impl Broker, all: &[Message]) -> f64 {
    broker.connect().await.unwrap();
    let started = Instant::now();
    let mut count = 0;
    for page in all.chunks(PAGE) {
        let mut told = |_, _| count += 1;
        broker.deliver(page, &mut Acks::new(&mut told)).await.unwrap();
    }
    assert_eq!(count, all.len());
    let rate = all.len() as f64 / started.elapsed().as_secs_f64();
    broker.close().await;
    rate
}

fn print(what: &str, ours: f64, bare: f64) {
    let bytes = mqtt::frame(1, "front", 656).json.len();
    println!(
        "{what}: {ours:.0} events/s of {bytes} bytes; the client alone {bare:.0}; {:.2}",
        ours / bare
    );
}

async fn bare_mqtt(port: u16, all: &[Message]) -> f64 {
    let mut options = MqttOptions::new("bare", "127.0.0.1", port);
    options.set_inflight(100);
    let (client, mut event_loop) = AsyncClient::new(options, 100);
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    event_loop.set_network_options(network);
    event_loop.poll().await.unwrap();
    let started = Instant::now();
    let (mut sent, mut acked) = (0, 0);
    while acked < all.len() {
        while sent < all.len() && sent - acked < 100 {
            let payload = all[sent].json.as_str();
            client.try_publish("bare/frames", QoS::AtLeastOnce, false, payload).unwrap();
            sent += 1;
        }
        if let Event::Incoming(Incoming::PubAck(_)) = event_loop.poll().await.unwrap() {
            acked += 1;
        }
    }
    all.len() as f64 / started.elapsed().as_secs_f64()
}

#[test]
#[ignore = "prints figures"]
fn mqtt_events_per_second() {
    let folder = TempDir::new().unwrap();
    // Without the log, whose writing would be measured.
    let server = mqtt::quiet_mosquitto(&folder);
    let all = mqtt::frames(0, EVENTS as u64);
    for retain_label in [true, false, true, false] {
        let mut settings = mqtt::settings(server.port);
        settings.retain_label = retain_label;
        let mut broker = mqtt::broker(settings);
        let ours = mqtt::run(ours(&mut broker, &all));
        let what = if retain_label { "mqtt" } else { "mqtt without labels" };
        print(what, ours, mqtt::run(bare_mqtt(server.port, &all)));
    }
}

#[cfg(feature = "kafka")]
struct Count(AtomicUsize);

#[cfg(feature = "kafka")]
impl rdkafka::ClientContext for Count {}

#[cfg(feature = "kafka")]
impl rdkafka::producer::ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &rdkafka::producer::DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok());
        self.0.fetch_add(1, SeqCst);
    }
}

/// The same settings where they matter: the window, idempotence, linger.
#[cfg(feature = "kafka")]
fn bare_kafka(port: u16, all: &[Message]) -> f64 {
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
    let producer: BaseProducer<Count> = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", format!("127.0.0.1:{port}"))
        .set("enable.idempotence", "true")
        .create_with_context(Count(AtomicUsize::new(0)))
        .unwrap();
    producer.client().fetch_metadata(Some("ghostwatch.v1.frames"), Duration::from_secs(5)).unwrap();
    let started = Instant::now();
    let mut sent = 0;
    let mut acked = 0;
    while acked < all.len() {
        while sent < all.len() && sent - acked < 1_000 {
            let stream = all[sent].stream.as_ref().unwrap();
            let record = BaseRecord::to("ghostwatch.v1.frames").key(stream);
            producer.send(record.payload(&all[sent].json)).map_err(|it| it.0).unwrap();
            sent += 1;
        }
        producer.poll(Duration::ZERO);
        acked = producer.client().context().0.load(SeqCst);
    }
    all.len() as f64 / started.elapsed().as_secs_f64()
}

#[cfg(feature = "kafka")]
#[test]
#[ignore = "prints figures"]
fn kafka_events_per_second() {
    let folder = TempDir::new().unwrap();
    let server = crate::kafka::tansu(&folder, &[]);
    let all = mqtt::frames(0, EVENTS as u64);
    for _ in 0..3 {
        let mut broker = crate::kafka::broker(crate::kafka::at(&server));
        let ours = mqtt::run(ours(&mut broker, &all));
        print("kafka", ours, bare_kafka(server.port, &all));
    }
}
