//! Where events go besides the journal: independent readers of it, each with its own cursor.
//!
//! Every sink has a thread that reads the journal ([`feed`]) and one that delivers ([`deliver`]) to
//! its broker ([`broker`]), so that no sink waits for another and inference waits for none.

pub mod broker;
pub mod dead;
pub mod deliver;
pub mod feed;
pub mod file;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod lines;
pub mod mqtt;
pub mod nats;
pub mod progress;
pub mod redis;
pub mod select;
pub mod settings;
pub(crate) mod tls;
pub mod webhook;

use std::{
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    journal::read::Reader,
    sink::{
        broker::Broker,
        dead::DeadLetters,
        deliver::{Delivery, Watch},
        lines::{File, Stdout},
        progress::Progress,
        settings::{Select, Target},
    },
};

/// One sink that is to run.
pub struct Sink {
    /// What it writes to.
    pub target: Target,
    /// Which events it gets.
    pub select: Select,
    /// How it stands.
    pub progress: Arc<Progress>,
}

/// The sinks that run.
pub struct Sinks {
    stop: CancellationToken,
    threads: Vec<(String, JoinHandle<anyhow::Result<()>>)>,
}

impl Sinks {
    /// Starts them. Each begins where its cursor stands.
    ///
    /// # Errors
    /// The journal cannot be read, or the operating system refused a thread. A broker that is away
    /// is no error: what it should get waits in the journal.
    pub fn start(
        sinks: Vec<Sink>,
        journal: &Path,
        instance: &str,
        watch: &Arc<dyn Watch>,
    ) -> anyhow::Result<Sinks> {
        Sinks::start_until(sinks, u64::MAX, (journal, instance), watch)
    }

    /// Starts them, to end by themselves when they have delivered everything up to the event `end`.
    ///
    /// # Errors
    /// As [`Sinks::start`].
    pub fn start_until(
        sinks: Vec<Sink>,
        end: u64,
        (journal, instance): (&Path, &str),
        watch: &Arc<dyn Watch>,
    ) -> anyhow::Result<Sinks> {
        let stop = CancellationToken::new();
        let mut threads = Vec::new();
        for Sink { target, select, progress } in sinks {
            let name = progress.cursor.sink().to_owned();
            let reader = Reader::open(journal).with_context(|| format!("sink {name}"))?;
            let (range, instance, ended) =
                ((progress.cursor.get(), end), instance.to_owned(), stop.clone());
            // One part lies ready while one is delivered.
            let (parts, parts_rx) = mpsc::channel(1);
            let feed = move || feed::run(reader, range, (&select, &instance), &parts, &ended);
            threads.push((format!("sink {name}"), spawn(&format!("feed-{name}"), feed)?));
            let dead = DeadLetters::new(journal, &name);
            let delivery = Delivery { progress, dead, watch: watch.clone(), stop: stop.clone() };
            let deliver = move || deliver(target, delivery, parts_rx);
            threads.push((format!("sink {name}"), spawn(&format!("sink-{name}"), deliver)?));
        }
        Ok(Sinks { stop, threads })
    }

    /// Whether all of them have ended.
    pub fn is_done(&self) -> bool {
        self.threads.iter().all(|it| it.1.is_finished())
    }

    /// A sink that ended though nobody told it to.
    pub fn ended(&self) -> Option<&str> {
        self.threads.iter().find(|it| it.1.is_finished()).map(|it| it.0.as_str())
    }

    /// Lets the sinks deliver what is committed, until `deadline`.
    ///
    /// # Errors
    /// Why a sink failed, or that it hangs.
    pub fn stop(self, deadline: Instant) -> anyhow::Result<()> {
        self.stop.cancel();
        let mut result = Ok(());
        for (name, thread) in self.threads {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
            let ended = if thread.is_finished() {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
            } else {
                Err(anyhow::anyhow!("still writing at the deadline"))
            };
            result = result.and(ended.context(name));
        }
        result
    }
}

/// Runs the loop of a sink that writes to `target`.
fn deliver(
    target: Target,
    delivery: Delivery,
    parts: mpsc::Receiver<feed::Part>,
) -> anyhow::Result<()> {
    match target {
        Target::Text(clock) => run(delivery, Stdout { text: Some(clock) }, parts),
        Target::Stdout => run(delivery, Stdout { text: None }, parts),
        Target::File(path, rotation) => run(delivery, File { path, rotation, file: None }, parts),
        Target::Nats(it) => run(delivery, nats::Nats::new(it), parts),
        Target::Redis(it) => run(delivery, redis::Redis::new(it), parts),
        Target::Mqtt(it) => run(delivery, mqtt::Mqtt::new(it)?, parts),
        Target::Webhook(it) => run(delivery, webhook::Webhook::new(it)?, parts),
        #[cfg(feature = "kafka")]
        Target::Kafka(it) => run(delivery, kafka::Kafka::new(it)?, parts),
        #[cfg(not(feature = "kafka"))]
        Target::Kafka(_) => anyhow::bail!("this build has no Kafka: its feature is `kafka`"),
    }
}

/// Runs one sink's loop with a runtime of its own.
fn run(
    delivery: Delivery,
    broker: impl Broker,
    parts: mpsc::Receiver<feed::Part>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(delivery.run(broker, parts))
}

fn spawn(
    name: &str,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread.with_context(|| format!("starting thread {name}"))
}
