//! librdkafka: how it is set up, what is asked of it and what its errors mean.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use rdkafka::{
    ClientConfig, ClientContext, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer},
};
use tokio::{sync::mpsc, time::Instant};
use tracing::debug;

use crate::sink::{
    broker::{Code, Fault, Message},
    kafka::fault,
    settings::{Kafka as Settings, Mechanism},
};

/// How long one question blocks its thread.
const QUESTION: Duration = Duration::from_secs(1);

/// Which message of a delivery, and why it failed, if it did.
pub(super) type Report = (usize, Option<RDKafkaErrorCode>);

/// Hears what the library says, on the library's own thread.
pub(super) struct Ear {
    reports: mpsc::Sender<Report>,
    /// The last thing that went wrong with a connection.
    last: Mutex<Option<(RDKafkaErrorCode, String)>>,
}

impl Ear {
    /// `reports` has room for everything that is in flight at once.
    pub(super) fn new(reports: mpsc::Sender<Report>) -> Ear {
        Ear { reports, last: Mutex::new(None) }
    }

    pub(super) fn forget_errors(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The fault of something that was waited for in vain: what went wrong meanwhile explains it.
    pub(super) fn why(&self, what: &str) -> Fault {
        match &*self.last.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((code, reason)) => {
                Fault::new(code_of_connection(*code, reason), anyhow!("{what}: {reason}"))
            }
            None => Fault::new(Code::Timeout, anyhow!("{what}")),
        }
    }

    /// Whether waiting longer makes no sense.
    fn is_hopeless(&self) -> bool {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let code = last.as_ref().map(|(code, reason)| code_of_connection(*code, reason));
        matches!(code, Some(Code::Auth | Code::Tls | Code::Dns | Code::Refused))
    }
}

impl ClientContext for Ear {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, text: &str) {
        // What matters comes back as a fault, and is told once, by the sink.
        debug!(facility, text, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let Some(code) = error.rdkafka_error_code() else { return };
        debug!(%code, reason, "librdkafka");
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // It follows a reason, and has none of its own.
        if code != RDKafkaErrorCode::AllBrokersDown || last.is_none() {
            *last = Some((code, reason.to_owned()));
        }
    }
}

impl ProducerContext for Ear {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        let error = match result {
            Ok(_) => None,
            Err((error, message)) => {
                debug!(%error, topic = message.topic(), "librdkafka");
                Some(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail))
            }
        };
        // It fails only when nobody waits any more.
        self.reports.try_send((index, error)).ok();
    }
}

/// A client that only asks.
struct Silent;

impl ClientContext for Silent {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, text: &str) {
        debug!(facility, text, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(%error, reason, "librdkafka");
    }
}

fn config(settings: &Settings) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", settings.servers.join(","))
        .set("client.id", &settings.client_id)
        .set("socket.keepalive.enable", "true")
        .set("reconnect.backoff.max.ms", "1000");
    let login = &settings.login;
    let protocol = match (&settings.tls, &login.username) {
        (None, None) => "plaintext",
        (None, Some(_)) => "sasl_plaintext",
        (Some(_), None) => "ssl",
        (Some(_), Some(_)) => "sasl_ssl",
    };
    config.set("security.protocol", protocol);
    if let Some(tls) = &settings.tls {
        let files = [
            ("ssl.ca.location", &tls.ca_file),
            ("ssl.certificate.location", &tls.cert_file),
            ("ssl.key.location", &tls.key_file),
        ];
        for (name, file) in files {
            if let Some(file) = file {
                config.set(name, file.to_string_lossy());
            }
        }
    }
    if let Some(user) = &login.username {
        let mechanism = match settings.mechanism {
            Mechanism::Plain => "PLAIN",
            Mechanism::ScramSha256 => "SCRAM-SHA-256",
            Mechanism::ScramSha512 => "SCRAM-SHA-512",
        };
        config.set("sasl.mechanism", mechanism).set("sasl.username", user);
        config.set("sasl.password", login.password.as_ref().map_or("", |it| it.expose()));
    }
    config
}

pub(super) fn producer(settings: &Settings, ear: Ear) -> Result<ThreadedProducer<Ear>, Fault> {
    let wait = settings.ack_timeout.as_millis().max(1_000).to_string();
    config(settings)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // The most with which the broker still keeps the order.
        .set("max.in.flight.requests.per.connection", "5")
        // The same partition for a key that the Java client chooses.
        .set("partitioner", "murmur2_random")
        .set("message.max.bytes", settings.message_bytes_max.to_string())
        // Messages do not expire one by one: a broker that is slow but goes on is waited for.
        .set("message.timeout.ms", "0")
        .set("request.timeout.ms", &wait)
        .set("topic.metadata.propagation.max.ms", &wait)
        .create_with_context(ear)
        .map_err(|it| {
            let tls = it.to_string().contains("ssl.");
            Fault::new(if tls { Code::Tls } else { Code::Error }, it)
        })
}

/// Whether the cluster has the topic, as soon as it answers.
pub(super) async fn has_topic(
    producer: &ThreadedProducer<Ear>,
    name: &str,
    deadline: Instant,
) -> Result<bool, Fault> {
    let ear = producer.client().context();
    loop {
        let (asker, topic) = (producer.clone(), name.to_owned());
        let asked = tokio::task::spawn_blocking(move || {
            let metadata = asker.client().fetch_metadata(Some(&topic), QUESTION)?;
            let error = metadata.topics().first().and_then(|it| it.error());
            Ok::<_, KafkaError>(error.map(RDKafkaErrorCode::from))
        });
        match asked.await.expect("asking does not panic") {
            Ok(None | Some(RDKafkaErrorCode::LeaderNotAvailable)) => return Ok(true),
            Ok(Some(
                RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic,
            )) => {
                return Ok(false);
            }
            Ok(Some(error)) => return Err(fault(error, name)),
            Err(error) if deadline <= Instant::now() || ear.is_hopeless() => {
                return Err(ear.why(&format!("asking for topic {name}: {error}")));
            }
            Err(_) => (),
        }
    }
}

pub(super) async fn create_topics(
    settings: &Settings,
    names: &[String],
    deadline: Instant,
) -> Result<(), Fault> {
    let admin: AdminClient<Silent> =
        config(settings).create_with_context(Silent).map_err(|it| Fault::new(Code::Error, it))?;
    let new = |name| {
        let replicas = TopicReplication::Fixed(settings.replicas);
        NewTopic::new(name, settings.partitions, replicas)
    };
    let topics: Vec<_> = names.iter().map(|it| new(it.as_str())).collect();
    let left = deadline.saturating_duration_since(Instant::now()).max(QUESTION);
    let options = AdminOptions::new().request_timeout(Some(left)).operation_timeout(Some(left));
    let created = admin.create_topics(&topics, &options).await;
    tokio::task::spawn_blocking(move || drop(admin));
    let missing = |name: &str, error: RDKafkaErrorCode| {
        let code = if code_of(error) == Code::Auth { Code::Auth } else { Code::NotFound };
        let what = anyhow!("topic {name} is not there and could not be made: {error}");
        Err(Fault::new(code, what))
    };
    match created {
        Ok(results) => {
            for it in results {
                match it {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => (),
                    Err((name, error)) => return missing(&name, error),
                }
            }
            Ok(())
        }
        Err(error) => {
            missing(&names.join(", "), error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail))
        }
    }
}

/// Puts a message on its way; never waits.
pub(super) fn send(
    producer: &ThreadedProducer<Ear>,
    topic: &str,
    message: &Message,
    index: usize,
) -> Result<(), Fault> {
    let id = Header { key: "id", value: Some(&message.id) };
    let record = BaseRecord::with_opaque_to(topic, index)
        .key(message.stream_or_none())
        .payload(message.json.as_str())
        .headers(OwnedHeaders::new_with_capacity(1).insert(id));
    producer.send(record).map_err(|(error, _)| {
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
        fault(code, &format!("event {}", message.id))
    })
}

/// What an error of the library is to us.
pub(super) fn code_of(error: RDKafkaErrorCode) -> Code {
    use RDKafkaErrorCode as E;
    match error {
        E::UnknownTopic | E::UnknownTopicOrPartition | E::UnknownPartition | E::InvalidTopic => {
            Code::NotFound
        }
        E::MessageSizeTooLarge | E::MessageBatchTooLarge => Code::TooLarge,
        E::Authentication
        | E::SaslAuthenticationFailed
        | E::TopicAuthorizationFailed
        | E::ClusterAuthorizationFailed
        | E::UnsupportedSASLMechanism
        | E::IllegalSASLState => Code::Auth,
        E::SSL => Code::Tls,
        E::Resolve => Code::Dns,
        E::OperationTimedOut | E::MessageTimedOut | E::RequestTimedOut => Code::Timeout,
        E::QueueFull | E::KafkaStorageError | E::ThrottlingQuotaExceeded => Code::Full,
        _ => Code::Error,
    }
}

/// A failed transport has one code for everything; only its text says more.
fn code_of_connection(error: RDKafkaErrorCode, reason: &str) -> Code {
    match code_of(error) {
        Code::Error if reason.contains("refused") => Code::Refused,
        Code::Error if reason.contains("timed out") => Code::Timeout,
        code => code,
    }
}
