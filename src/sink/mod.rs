//! Where events go besides the journal: independent readers of it, each with its own cursor.
//!
//! Every sink has a thread that reads the journal ([`feed`]) and one that delivers ([`mod@deliver`]) to
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
    path::{Path, PathBuf},
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

/// The sinks that run. They come and go one by one, each without a trace in the others.
pub struct Sinks {
    journal: PathBuf,
    instance: String,
    watch: Arc<dyn Watch>,
    running: Vec<Run>,
    /// Told to stop, and not at their end yet.
    leaving: Vec<Run>,
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
        let mut all = Sinks {
            journal: journal.to_owned(),
            instance: instance.to_owned(),
            watch: watch.clone(),
            running: Vec::new(),
            leaving: Vec::new(),
        };
        for sink in sinks {
            all.add_until(sink, end)?;
        }
        Ok(all)
    }

    /// Starts one more. It begins where its cursor stands.
    ///
    /// # Errors
    /// As [`Sinks::start`].
    pub fn add(&mut self, sink: Sink) -> anyhow::Result<()> {
        self.add_until(sink, u64::MAX)
    }

    fn add_until(&mut self, sink: Sink, end: u64) -> anyhow::Result<()> {
        let Sink { target, select, progress } = sink;
        let name = progress.cursor.sink().to_owned();
        let reader = Reader::open(&self.journal).with_context(|| format!("sink {name}"))?;
        let stop = CancellationToken::new();
        let (range, instance, ended) =
            ((progress.cursor.get(), end), self.instance.clone(), stop.clone());
        // One part lies ready while one is delivered.
        let (parts, parts_rx) = mpsc::channel(1);
        let dead = DeadLetters::new(&self.journal, &name);
        let delivery = Delivery { progress, dead, watch: self.watch.clone(), stop: stop.clone() };
        // The one that delivers comes first: it ends by itself if the other cannot be started.
        let deliver = move || deliver(target, delivery, parts_rx);
        let deliver = spawn(&format!("sink-{name}"), deliver)?;
        let feed = move || feed::run(reader, range, (&select, &instance), &parts, &ended);
        let feed = spawn(&format!("feed-{name}"), feed)?;
        self.running.push(Run { name, stop, threads: [feed, deliver] });
        Ok(())
    }

    /// Tells one to deliver what is there and end; nobody waits for it. See [`Sinks::left`].
    pub fn remove(&mut self, name: &str) {
        let of_this_name = |it: &mut Run| it.name == name;
        for run in self.running.extract_if(.., of_this_name) {
            run.stop.cancel();
            self.leaving.push(run);
        }
    }

    /// The removed ones that have ended since the last call, and how.
    pub fn left(&mut self) -> Vec<(String, anyhow::Result<()>)> {
        self.leaving.extract_if(.., |it| it.is_finished()).map(Run::join).collect()
    }

    /// Whether one of this name runs or has not ended yet.
    pub fn has(&self, name: &str) -> bool {
        self.running.iter().chain(&self.leaving).any(|it| it.name == name)
    }

    /// Whether all of them have ended.
    pub fn is_done(&self) -> bool {
        self.running.iter().all(Run::is_finished)
    }

    /// A sink that ended though nobody told it to.
    pub fn ended(&self) -> Option<&str> {
        let has_ended = |it: &&Run| it.threads.iter().any(JoinHandle::is_finished);
        self.running.iter().find(has_ended).map(|it| it.name.as_str())
    }

    /// Lets the sinks deliver what is committed, until `deadline`.
    ///
    /// # Errors
    /// Why a sink failed, or that it hangs.
    pub fn stop(self, deadline: Instant) -> anyhow::Result<()> {
        let runs: Vec<Run> = self.running.into_iter().chain(self.leaving).collect();
        runs.iter().for_each(|it| it.stop.cancel());
        let mut result = Ok(());
        for run in runs {
            while !run.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
            let (name, ended) = run.join();
            result = result.and(ended.with_context(|| format!("sink {name}")));
        }
        result
    }
}

/// The threads of one sink: the one that reads and the one that delivers.
struct Run {
    name: String,
    stop: CancellationToken,
    threads: [JoinHandle<anyhow::Result<()>>; 2],
}

impl Run {
    fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// How it ended; waits for nothing.
    fn join(self) -> (String, anyhow::Result<()>) {
        let mut result = Ok(());
        for thread in self.threads {
            let ended = if thread.is_finished() {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
            } else {
                Err(anyhow::anyhow!("still writing at the deadline"))
            };
            result = result.and(ended);
        }
        (self.name, result)
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
