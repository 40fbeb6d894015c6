//! Publishes events to Apache Kafka, or whatever speaks its protocol, with librdkafka's idempotent
//! producer: one topic per class of events, the stream as the key, the event's id as a header.
//!
//! What an acknowledgement is worth: `acks=all` says that every replica in sync has the event, in
//! memory unless the topic sets `flush.messages`; `min.insync.replicas` says how many that are at
//! least. The producer's sequence numbers keep retries of one connection from doubling or
//! reordering anything within a partition; a new connection can repeat what was in flight.
//!
//! The cargo feature `kafka` brings TLS and SASL with PLAIN and SCRAM, from librdkafka with the
//! system's OpenSSL; not Kerberos and not OAuth.

mod client;

use std::{collections::VecDeque, time::Duration};

use anyhow::anyhow;
use rdkafka::{
    error::RDKafkaErrorCode,
    producer::{Producer as _, ThreadedProducer},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

use crate::sink::{
    broker::{Acks, Broker, Code, Fault, Message, Topic},
    kafka::client::{Ear, Report, code_of},
    settings::Kafka as Settings,
};

/// How long a good-bye may take.
const CLOSE: Duration = Duration::from_secs(2);

/// A cluster that speaks Kafka's protocol.
pub struct Kafka {
    settings: Settings,
    /// `None` iff not connected.
    link: Option<Link>,
    /// A batch was refused as too large, which does not say which message was.
    one_by_one: bool,
    /// A delivery is going on, or was dropped in its middle.
    delivering: bool,
}

struct Link {
    producer: ThreadedProducer<Ear>,
    reports: mpsc::Receiver<Report>,
}

impl Kafka {
    /// A cluster that is not connected yet.
    ///
    /// # Errors
    /// [`Settings::check`] says what.
    pub fn new(settings: Settings) -> anyhow::Result<Kafka> {
        settings.check()?;
        Ok(Kafka { settings, link: None, one_by_one: false, delivering: false })
    }

    /// Lets go of the connection. On a thread of its own: the library waits for its threads.
    fn forget(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        let link = self.link.take()?;
        Some(tokio::task::spawn_blocking(move || drop(link)))
    }

    async fn dial(&mut self) -> Result<(), Fault> {
        let deadline = Instant::now() + self.settings.connect_timeout;
        let (to, reports) = mpsc::channel(self.settings.max_inflight);
        let producer = client::producer(&self.settings, Ear::new(to))?;
        // Kept at once, so that a failure lets go of it where waiting is allowed.
        let link = self.link.insert(Link { producer, reports });
        let mut missing = Vec::new();
        for topic in Topic::ALL {
            let name = self.settings.topic(topic);
            if !client::has_topic(&link.producer, &name, deadline).await? {
                missing.push(name);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        client::create_topics(&self.settings, &missing, deadline).await
    }

    async fn deliver_all(
        &mut self,
        messages: &[Message],
        acks: &mut Acks<'_>,
    ) -> Result<(), Fault> {
        let Kafka { settings, link, one_by_one, .. } = self;
        let link =
            link.as_mut().ok_or_else(|| Fault::new(Code::Error, anyhow!("not connected")))?;
        link.producer.client().context().forget_errors();
        let most = if *one_by_one { 1 } else { settings.max_inflight };
        // Whether each message in flight is acknowledged: partitions do so in their own order.
        let mut flying = VecDeque::new();
        let mut sent = 0;
        let mut refused = None;
        let mut deadline = Instant::now() + settings.ack_timeout;
        loop {
            while refused.is_none() && flying.len() < most && sent < messages.len() {
                let topic = settings.topic(messages[sent].topic);
                match client::send(&link.producer, &topic, &messages[sent], sent) {
                    Ok(()) => {
                        flying.push_back(false);
                        sent += 1;
                    }
                    Err(fault) if fault.code == Code::TooLarge => refused = Some(fault),
                    Err(fault) => return Err(fault),
                }
            }
            if flying.is_empty() {
                *one_by_one = false;
                return refused.map_or(Ok(()), Err);
            }
            let Ok(report) = timeout_at(deadline, link.reports.recv()).await else {
                let waited = settings.ack_timeout;
                return Err(link
                    .producer
                    .client()
                    .context()
                    .why(&format!("no acknowledgement for {waited:?}")));
            };
            let (index, error) = report.expect("the producer, which has the sender, is still here");
            if let Some(error) = error {
                let what = anyhow!("event {}: {error}", messages[index].id);
                match code_of(error) {
                    Code::TooLarge if most == 1 => {
                        flying.clear();
                        refused = Some(Fault::new(Code::TooLarge, what));
                    }
                    Code::TooLarge => {
                        *one_by_one = true;
                        let what = what.context("a batch is too large; sending one by one");
                        return Err(Fault::new(Code::Error, what));
                    }
                    code => return Err(Fault::new(code, what)),
                }
                continue;
            }
            flying[index - acks.count()] = true;
            while flying.pop_front_if(|it| *it).is_some() {
                acks.next(false);
                deadline = Instant::now() + settings.ack_timeout;
            }
        }
    }
}

impl Broker for Kafka {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.forget();
        self.delivering = false;
        let dialled = self.dial().await;
        if dialled.is_err() {
            self.forget();
        }
        dialled
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        if self.delivering {
            // What came of a delivery that was dropped is not known any more.
            self.forget();
        }
        self.delivering = true;
        let delivered = self.deliver_all(messages, acks).await;
        self.delivering = false;
        if delivered.as_ref().is_err_and(|it| it.code != Code::TooLarge) {
            self.forget();
        }
        delivered
    }

    /// The library mends its connections itself, and says nothing useful of idle ones.
    async fn lost(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn close(&mut self) {
        if let Some(gone) = self.forget() {
            // Past that the process ends without it.
            timeout(CLOSE, gone).await.ok();
        }
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        // Outside a runtime it is dropped here, and waits.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.forget();
        }
    }
}

/// Messages for both: the library's name of an error and what it is to us.
fn fault(error: RDKafkaErrorCode, what: &str) -> Fault {
    Fault::new(code_of(error), anyhow!("{what}: {error}"))
}
