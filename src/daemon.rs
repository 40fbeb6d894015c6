//! The life of the daemon: start, reload, watch, drain.

mod holds;
mod mute;
mod sinks;
mod streams;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};

use crate::{
    cli::{Exit, code},
    config::{
        diff,
        plan::{Plan, StreamPlan},
    },
    control::{self, Control},
    crash,
    daemon::{
        holds::Holds,
        sinks::Outlets,
        streams::{Streams, World},
    },
    edge,
    event::Context,
    http,
    infer::{
        Model,
        batch::{Batching, Selftest},
        device::GpuStatus,
        engine::Engine,
        load::{self, Choice, Loaded},
        wanted::Wanted,
    },
    journal::{
        side::{self, Side},
        writer::Writer,
    },
    log,
    observe::Observer,
    pipeline::{Parts, Pipeline, Unread},
    publish::{Order, Publisher},
    stage::{Reason, StageName},
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
    /// Where orders are taken; `None` for the usual place.
    pub socket: Option<PathBuf>,
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

struct Daemon {
    plan: Plan,
    options: Options,
    pipeline: Pipeline,
    observer: Arc<Observer>,
    streams: Streams,
    sinks: Outlets,
    /// `None` iff there is no socket for orders.
    control: Option<Control>,
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
    let known = side::is_known(&plan.journal.path);
    let mut journal = open_journal(&plan)?;
    let beside = |kind| Side::new(&plan.journal.path, kind, known);
    let (crashes, report) = crashes(&beside(side::CRASHES), &plan);
    let holds = Holds::open(beside(side::HELD)).context("the list of disabled streams")?;
    let gpu = GpuStatus::find(plan.device.device, plan.device.cuda.as_deref());
    let loaded = load_model(&plan, &gpu)?;
    let observer = Observer::new(&loaded, lanes(&plan, &loaded), &gpu);
    let _http = serve(&plan, &observer)?;
    let (sinks, orders) = Outlets::start(&plan, options.print, &mut journal, &observer)?;
    let (journal_back, journal_rx) = mpsc::sync_channel(1);
    let journal = (journal, orders, journal_back);
    let pipeline = start_pipeline(&plan, loaded, journal, &observer)?;
    observer.pipeline(&pipeline);
    let notify = systemd::Notifier::from_env()?;
    let streams = Streams::new(&plan, holds, crashes, &report.dangerous);
    let control = control(options.socket.as_deref(), &plan)?;
    let mut daemon = Daemon {
        plan,
        options,
        pipeline,
        observer,
        streams,
        sinks,
        control,
        journal: journal_rx,
        notify,
        ready: false,
    };
    let Daemon { streams, pipeline, observer, plan, .. } = &mut daemon;
    streams.start(&mut World { pipeline, observer, plan })?;
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

/// Says how the last run ended, if it crashed, and watches this one. Gives where that is written down,
/// and what it says about the streams. It is only a record: a full disk must not keep the daemon from
/// starting.
fn crashes(side: &Side, plan: &Plan) -> (PathBuf, crash::log::Report) {
    let path = side.path().to_owned();
    let digest = |(id, it): (&String, &StreamPlan)| (id.clone(), it.digest(&plan.limits));
    let plans = plan.streams.iter().map(digest).collect();
    let (report, written) = crash::log::start(side, &plans, SystemTime::now());
    if let Err(error) = written {
        tracing::error!(%error, file = %path.display(), "the record of crashes cannot be written anew");
    }
    if let Some(last) = &report.last {
        let (signal, stream) = (&last.what, last.stream.as_deref().unwrap_or("not known"));
        tracing::error!(signal, stream, "the last run crashed in a thread of this stream");
    }
    if let Err(error) = crash::watch(&path) {
        tracing::error!("if a decoder crashes, nobody will know whose: {error:#}");
    }
    (path, report)
}

/// Listens for orders. By itself a place for the socket is looked for, but not insisted on.
fn control(socket: Option<&Path>, plan: &Plan) -> anyhow::Result<Option<Control>> {
    if let Some(path) = socket {
        return Control::listen(path, &plan.journal.path).map(Some);
    }
    match Control::listen(&control::path_of(&plan.journal.path), &plan.journal.path) {
        Ok(control) => Ok(Some(control)),
        Err(error) => {
            tracing::warn!("no orders can be given to this daemon: {error:#}; see --socket");
            Ok(None)
        }
    }
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
        engine = loaded.engine.name(),
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
    fn life(mut self, signals: &Signals) -> anyhow::Result<()> {
        let mut failed = None;
        // With `once` the whole is no success if a file was not read.
        let mut unread = None;
        while !signals.stop.load(Relaxed) && failed.is_none() {
            if signals.reload.swap(false, Relaxed) {
                self.reload();
            }
            while let Some(order) = self.control.as_ref().and_then(Control::next) {
                self.streams.obey(order, &self.plan);
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
            if self.options.once && self.pipeline.sources() == 0 && !self.streams.is_starting() {
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
        if let Some(streams) = self.streams.unread(&self.plan).filter(|_| finish) {
            // Also after an operator's order: whoever goes by the exit code takes 0 for all files.
            unread = unread.or_else(|| Some(Exit::failed(format!("not classified: {streams}"))));
            tracing::warn!(
                "not classified: {streams}; `ghostwatch streams enable` opens what is held back"
            );
        }
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
        let Daemon { streams, pipeline, observer, plan, .. } = self;
        streams.tick(&mut World { pipeline, observer, plan });
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
        self.streams.apply(&diff.streams, &self.plan);
        Ok(())
    }

    /// Stops the sources and lets every frame find its outcome, and with `finish` every event its
    /// way to the sinks.
    fn drain(mut self, failed: Option<anyhow::Error>, finish: bool) -> anyhow::Result<()> {
        tracing::info!("draining");
        self.observer.ready(false);
        self.notify.stopping();
        let deadline = Instant::now() + DRAIN;
        let Daemon { streams, pipeline, observer, plan, .. } = &mut self;
        let early = streams.end(&mut World { pipeline, observer, plan });
        let streams = self.streams.into_accounts();
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
        for exit in early.into_iter().chain(exits?) {
            exit.result.or_else(|it| if it.is::<Unread>() { Ok(()) } else { Err(it) })?;
        }
        for stream in streams {
            let (decoded, unaccounted) = (stream.decoded.load(Relaxed), stream.unaccounted());
            if unaccounted != 0 {
                bail!("stream {}: {unaccounted} of {decoded} frames unaccounted", stream.id);
            }
            let unwritten = stream.dropped(StageName::Journal, Reason::Journal);
            if finish && 0 < unwritten {
                let id = &stream.id;
                bail!("stream {id}: the journal did not take {unwritten} of {decoded} frames");
            }
        }
        sinks
    }
}
