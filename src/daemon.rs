//! The life of the daemon: start, reload, watch, drain.

mod sinks;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    cli::{Exit, code},
    config::{
        diff,
        plan::{Plan, StreamPlan},
    },
    daemon::sinks::Outlets,
    edge,
    event::Context,
    http,
    infer::{
        Model,
        batch::{Batching, Selftest},
        device::{Engine, GpuStatus},
        load::{self, Choice, Loaded},
        wanted::{Use, Wanted},
    },
    journal::{JournalError, read::Reader, writer::Writer},
    ledger::Stream,
    log,
    observe::Observer,
    pipeline::{Added, Parts, Pipeline, Unread},
    publish::{Order, Publisher},
    source::{self, Spec, gate::Gate, gst::GstOpener},
    systemd,
};

/// Reads the configuration again.
pub type Reread = Box<dyn Fn() -> anyhow::Result<Plan>>;

/// How the daemon is run.
pub struct Options {
    /// End when all files have ended.
    pub once: bool,
    /// Print labels on standard output.
    pub print: bool,
    /// Reads the configuration again; `None` iff there is no file.
    pub reread: Option<Reread>,
    /// Changes the log's level.
    pub log: log::Handle,
}

/// How long a drain may take.
const DRAIN: Duration = Duration::from_secs(10);
/// A lane with nothing to do repeats the golden self-test this often.
const SELFTEST_EVERY: Duration = Duration::from_secs(300);
/// How often signals and stages are looked at.
const TICK: Duration = Duration::from_millis(100);

/// Signals that have come.
struct Signals {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
}

impl Signals {
    fn install() -> anyhow::Result<Signals> {
        use signal_hook::{consts, flag};
        let (stop, reload) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        for signal in [consts::SIGTERM, consts::SIGINT] {
            // The order matters: the first signal only sets the flag, the second finds it set.
            flag::register_conditional_shutdown(signal, code::SIGNAL, stop.clone())?;
            flag::register(signal, stop.clone())?;
        }
        flag::register(consts::SIGHUP, reload.clone())?;
        Ok(Signals { stop, reload })
    }
}

/// A stream that is running.
struct Running {
    stream: Arc<Stream>,
    added: Added,
}

struct Daemon {
    plan: Plan,
    options: Options,
    pipeline: Pipeline,
    observer: Arc<Observer>,
    streams: BTreeMap<String, Running>,
    /// Streams that were taken out and may still have something on its way to the journal.
    removed: Vec<Arc<Stream>>,
    /// Streams that start once their namesakes in `removed` have settled.
    waiting: BTreeMap<String, StreamPlan>,
    /// Who may connect now, over all streams.
    gate: Arc<Gate>,
    sinks: Outlets,
    /// Comes back once its stage has ended.
    journal: mpsc::Receiver<Writer>,
    notify: systemd::Notifier,
    /// It was told that frames are taken.
    ready: bool,
}

/// Runs until a signal, the end of all files with `once`, or a failure.
///
/// # Errors
/// Something could not be started, a stage failed, or the drain did not finish in time.
pub fn run(plan: Plan, options: Options) -> anyhow::Result<()> {
    let signals = Signals::install()?;
    if let Some(reason) = plan.endless().filter(|_| options.once) {
        return Err(Exit::wrong(reason));
    }
    // Before the model, which takes a second: a broken or foreign journal is then told at once.
    let mut journal = open_journal(&plan)?;
    let gpu = match plan.device.device {
        Use::Cpu => GpuStatus::Absent,
        _ => GpuStatus::find(plan.device.cuda.as_deref()),
    };
    let loaded = load_model(&plan, &gpu)?;
    let observer = Observer::new(&loaded, lanes(&plan, &loaded), &gpu);
    let _http = serve(&plan, &observer)?;
    let (sinks, orders) = Outlets::start(&plan, options.print, &mut journal, &observer)?;
    let (journal_back, journal_rx) = mpsc::sync_channel(1);
    let journal = (journal, orders, journal_back);
    let pipeline = start_pipeline(&plan, loaded, journal, &observer)?;
    observer.pipeline(&pipeline);
    let notify = systemd::Notifier::from_env()?;
    let streams = BTreeMap::new();
    let (removed, waiting) = (Vec::new(), BTreeMap::new());
    let mut daemon = Daemon {
        plan,
        options,
        pipeline,
        observer,
        streams,
        removed,
        waiting,
        gate: Arc::default(),
        sinks,
        journal: journal_rx,
        notify,
        ready: false,
    };
    daemon.add_all()?;
    daemon.observer.reloaded(true);
    daemon.life(&signals)
}

fn serve(plan: &Plan, observer: &Arc<Observer>) -> anyhow::Result<http::Handle> {
    let token = plan.http.token.as_ref().map(|it| http::Token::new(it.expose())).transpose();
    let access = http::Access::new(token.context("http.token_file")?, &plan.http.hosts);
    http::serve(plan.http.listen, access, observer.state())
}

fn open_journal(plan: &Plan) -> anyhow::Result<Writer> {
    Writer::open(&plan.journal.path, plan.journal.retain).map_err(|error| {
        if error.exit_code() == 4 { Exit::journal(error.to_string()) } else { error.into() }
    })
}

fn load_model(plan: &Plan, gpu: &GpuStatus) -> anyhow::Result<Loaded> {
    if let GpuStatus::Unusable(reason) = gpu {
        tracing::warn!(reason, "there is a GPU, but it cannot be used");
    }
    let wanted = Wanted {
        device: plan.device.device,
        precision: plan.device.precision,
        max_batch: plan.batch.max_size,
        buckets: plan.batch.buckets.clone(),
    };
    let model = &plan.model;
    let choice = Choice {
        weights: model.weights.clone(),
        labels: model.labels.clone(),
        resize: model.resize.map(|it| it as usize),
        input: model.input.map(|it| it as usize),
        mean: model.mean,
        std: model.std,
    };
    let loaded = load::load(&choice, &wanted, gpu)?;
    if !loaded.passes() {
        bail!("the golden self-test failed on {}: {:?}", loaded.engine.device(), loaded.agreement);
    }
    tracing::info!(
        device = loaded.engine.device(),
        precision = loaded.engine.precision().name(),
        error = loaded.agreement.max_error,
        "the golden self-test agrees with {}",
        loaded.golden.reference.by
    );
    if loaded.demonstration {
        tracing::warn!(
            "this is the demonstration checkpoint: it knows 200 of the 1000 classes (top-1 32.8 % on those); `ghostwatch weights fetch` gets the published one"
        );
    }
    Ok(loaded)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn lanes(plan: &Plan, loaded: &Loaded) -> usize {
    let on_gpu = loaded.engine.device() != "cpu";
    plan.device.lanes.unwrap_or(if on_gpu { 1 } else { cores() })
}

fn start_pipeline(
    plan: &Plan,
    loaded: Loaded,
    (journal, orders, journal_back): (Writer, edge::Receiver<Order>, mpsc::SyncSender<Writer>),
    observer: &Arc<Observer>,
) -> anyhow::Result<Pipeline> {
    let context = Context {
        instance: plan.instance.clone(),
        model: plan.model.name.clone().unwrap_or_else(|| loaded.model.clone()),
        weights: loaded.sha256.clone(),
        label_set: loaded.label_set.clone(),
        precision: loaded.engine.precision().name().to_owned(),
        device: loaded.engine.device(),
        labels: loaded.labels.entries.iter().map(|it| (it.wnid.clone(), it.name.clone())).collect(),
    };
    let mut models: Vec<Box<dyn Model>> = Vec::new();
    for _ in 1..lanes(plan, &loaded) {
        let lane: Engine = loaded.engine.lane()?;
        models.push(Box::new(lane));
    }
    models.push(Box::new(loaded.engine));
    let every = plan.journal.commit_every;
    let publisher = Publisher::new((journal, orders), context, every, observer.clone());
    Pipeline::start(Parts {
        geometry: loaded.golden.geometry,
        models,
        selftest: Some(Selftest { golden: Arc::new(loaded.golden), every: SELFTEST_EVERY }),
        preprocess_workers: cores(),
        batching: Batching { max_size: plan.batch.max_size, max_wait: plan.batch.max_wait },
        top: 5,
        watch: observer.clone(),
        publish: Box::new(move |input, pulse| {
            // Nobody takes it iff the daemon ends because of a failure elsewhere.
            drop(journal_back.send(publisher.run(input, pulse)?));
            Ok(())
        }),
    })
}

impl Daemon {
    fn add_all(&mut self) -> anyhow::Result<()> {
        let plans: Vec<_> =
            self.plan.streams.iter().map(|it| (it.0.clone(), it.1.clone())).collect();
        for (id, plan) in plans {
            self.add(&id, plan)?;
        }
        Ok(())
    }

    fn add(&mut self, id: &str, plan: StreamPlan) -> anyhow::Result<()> {
        let spec = spec(&plan, &self.plan)?;
        let stream = Arc::new(Stream::watched(id, plan.health));
        let first_epoch = next_epoch(&self.plan.journal.path, id)?;
        let gate = self.gate.clone();
        let settings = source::Settings { gate, ..source::Settings::new(&spec, first_epoch) };
        let opener = GstOpener::new(spec, stream.clone())?;
        let observer = &self.observer;
        let added = self.pipeline.add_source(
            Box::new(opener),
            stream.clone(),
            settings,
            (plan.when_full, plan.weight),
            |added| observer.add(&stream, &plan, added),
        );
        let added = added.inspect_err(|_| observer.remove(&stream))?;
        self.streams.insert(id.to_owned(), Running { stream, added });
        Ok(())
    }

    fn remove(&mut self, id: &str) {
        let Some(running) = self.streams.remove(id) else { return };
        running.added.stop.cancel();
        self.removed.push(running.stream);
    }

    fn life(mut self, signals: &Signals) -> anyhow::Result<()> {
        let mut failed = None;
        // With `once` the whole is no success if a file was not read.
        let mut unread = None;
        while !signals.stop.load(Relaxed) && failed.is_none() {
            if signals.reload.swap(false, Relaxed) {
                self.reload();
            }
            if let Some(exit) = self.pipeline.next_exit(Instant::now() + TICK) {
                match exit.result {
                    Err(error) if error.is::<Unread>() => {
                        unread = unread.or(self.options.once.then_some(error));
                    }
                    Err(error) => failed = Some(error),
                    Ok(()) if !exit.stage.starts_with("src-") => {
                        failed = Some(anyhow::anyhow!("stage {} ended by itself", exit.stage));
                    }
                    Ok(()) => tracing::debug!(stage = exit.stage, "ended"),
                }
            }
            if self.options.once && self.pipeline.sources() == 0 && self.waiting.is_empty() {
                break;
            }
            if failed.is_none()
                && let Some(name) = self.sinks.ended()
            {
                failed = Some(anyhow::anyhow!("sink {name} ended by itself"));
            }
            self.tick();
        }
        let finish = self.options.once && !signals.stop.load(Relaxed) && failed.is_none();
        self.drain(failed.or(unread), finish)
    }

    /// Says when every lane is warm, feeds the watchdog while all loops turn, and forgets streams
    /// whose last frame is published.
    fn tick(&mut self) {
        if !self.ready && self.observer.is_warm() {
            self.ready = true;
            self.observer.ready(true);
            self.notify.ready();
        }
        if self.observer.alive() {
            self.notify.watchdog();
        }
        let (observer, pipeline) = (&self.observer, &self.pipeline);
        self.removed.retain(|it| {
            let settled = !pipeline.is_running(&it.id) && it.is_settled();
            if settled {
                observer.remove(it);
            }
            !settled
        });
        let settled = |id: &String| !self.removed.iter().any(|it| it.id == *id);
        let ready: Vec<_> = self.waiting.keys().filter(|it| settled(it)).cloned().collect();
        for id in ready {
            let plan = self.waiting.remove(&id).expect("the key was just seen");
            if let Err(error) = self.add(&id, plan) {
                tracing::error!(stream = id, "cannot be started: {error:#}");
                // The next reload sees it as new and tries again.
                self.plan.streams.remove(&id);
            }
        }
        let failed = self.sinks.tick(&self.plan);
        self.plan.sinks.retain(|it| !failed.contains(&it.name));
    }

    /// Follows a changed configuration as far as it can be followed; anything else is refused and
    /// the old one stays.
    fn reload(&mut self) {
        let Some(reread) = &self.options.reread else {
            tracing::warn!("there is no configuration file to read again");
            return;
        };
        self.notify.reloading();
        let result = reread().and_then(|plan| self.apply(plan));
        self.observer.reloaded(result.is_ok());
        match result {
            Ok(()) => tracing::info!("configuration reloaded"),
            Err(error) => {
                tracing::error!("configuration refused, the old one stays in force: {error:#}");
            }
        }
        self.notify.ready();
    }

    fn apply(&mut self, plan: Plan) -> anyhow::Result<()> {
        let diff = diff::diff(&self.plan, &plan);
        let mut restart = diff.restart;
        restart.extend(diff.http_access.then_some("http.token_file, http.hosts"));
        if !restart.is_empty() {
            bail!("a restart is needed to change {}", restart.join(", "));
        }
        if let Some(reason) = plan.endless().filter(|_| self.options.once) {
            bail!(reason);
        }
        if diff.log_level {
            self.options.log.set_level(plan.log.level)?;
        }
        self.plan = plan;
        if diff.retain {
            self.sinks.retain(self.plan.journal.retain);
        }
        self.sinks.apply(&diff.sinks, &self.plan);
        let streams = diff.streams;
        for id in streams.removed.iter().chain(&streams.changed) {
            self.waiting.remove(id);
            self.remove(id);
        }
        // They start with the next tick, or once what runs under their name has settled.
        for id in streams.changed.iter().chain(&streams.added) {
            self.waiting.insert(id.clone(), self.plan.streams[id].clone());
        }
        Ok(())
    }

    /// Stops the sources and lets every frame find its outcome, and with `finish` every event its
    /// way to the sinks.
    fn drain(self, failed: Option<anyhow::Error>, finish: bool) -> anyhow::Result<()> {
        tracing::info!("draining");
        self.observer.ready(false);
        self.notify.stopping();
        let deadline = Instant::now() + DRAIN;
        let streams: Vec<_> =
            self.streams.into_values().map(|it| it.stream).chain(self.removed).collect();
        let exits = self.pipeline.stop(deadline).map_err(|stuck| {
            anyhow::anyhow!("still running after {} s: {}", DRAIN.as_secs(), stuck.join(", "))
        });
        // Everything is committed: the sinks can finish.
        let mut journal = self.journal.try_recv().ok();
        let sinks = match &journal {
            Some(it) if finish => self.sinks.finish(it.stats().next - 1, deadline),
            _ => self.sinks.stop(deadline),
        };
        if let Some(journal) = &mut journal {
            // Saves how far the sinks have come since.
            journal.maintain()?;
        }
        if let Some(error) = failed {
            // What a sink said when it ended is the better reason.
            return sinks.and(Err(error));
        }
        for exit in exits? {
            exit.result.or_else(|it| if it.is::<Unread>() { Ok(()) } else { Err(it) })?;
        }
        for stream in streams {
            let (decoded, unaccounted) = (stream.decoded.load(Relaxed), stream.unaccounted());
            if unaccounted != 0 {
                bail!("stream {}: {unaccounted} of {decoded} frames unaccounted", stream.id);
            }
        }
        sinks
    }
}

/// What the source needs, from what is configured.
fn spec(plan: &StreamPlan, all: &Plan) -> anyhow::Result<Spec> {
    Ok(Spec {
        username: plan.username.clone(),
        password: plan.password.clone(),
        transport: plan.transport,
        latency: plan.latency,
        stall_after: plan.stall_after,
        max_fps: plan.max_fps,
        realtime: plan.realtime,
        looped: plan.looped,
        limits: (all.limits.max_width, all.limits.max_height),
        start_time: plan.start_time,
        tls: source::Tls {
            verify: plan.tls.verify,
            ca_file: plan.tls.ca_file.clone(),
            fingerprint: plan.tls.fingerprint,
        },
        ..Spec::parse(plan.url.expose())?
    })
}

/// The epoch after the last one that the journal knows of a stream: epochs outlive restarts.
fn next_epoch(journal: &std::path::Path, id: &str) -> anyhow::Result<u64> {
    let last = Reader::open(journal).and_then(|it| it.last_epoch(id));
    Ok(last.map_err(JournalError::in_use)?.map_or(0, |it| it + 1))
}
