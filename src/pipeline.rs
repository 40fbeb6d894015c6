//! The whole graph, in one function, and how it stops.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Instant,
};

use anyhow::Context as _;
use crossbeam_channel as channel;
use tokio_util::sync::CancellationToken;

use crate::{
    edge::{
        Counts, NotSent, Receiver, Sender, WhenFull, edge,
        merge::{Joining, merge},
    },
    frame::{Frame, Item, Skipped, StateChange},
    infer::{
        Model,
        batch::{Batcher, Batching, Lane, Offer, Selftest, Watch},
    },
    label::{self, Labelled},
    ledger::Stream,
    preprocess::{Geometry, worker},
    pulse::Pulse,
    source::{self, End, Opener, Output},
    stage::{Reason, StageName},
};

/// What the graph is made of.
pub struct Parts {
    /// How a picture becomes an input.
    pub geometry: Geometry,
    /// One for each lane; all the same network.
    pub models: Vec<Box<dyn Model>>,
    /// What they should answer to the self-test's pictures; `None` for models without a reference.
    pub selftest: Option<Selftest>,
    /// Threads that turn pictures into inputs.
    pub preprocess_workers: usize,
    /// When a batch is closed.
    pub batching: Batching,
    /// Labels per frame.
    pub top: usize,
    /// Told of every batch.
    pub watch: Arc<dyn Watch>,
    /// The last stage: publishes labels until its input is closed.
    pub publish: Publish,
}

/// The loop of the last stage.
pub type Publish = Box<dyn FnOnce(Receiver<Item<Labelled>>, &Pulse) -> anyhow::Result<()> + Send>;

/// How many frames of a source that waits for room may wait themselves. More would only hold more
/// decoded pictures; fewer would let the decoder run dry while a batch is taken.
const BLOCKING_FRAMES: usize = 4;

/// What the names of the sources' threads start with; a thread's name has 15 bytes, so it is short.
pub const SOURCE: &str = "src-";

/// A file could not be read, and its stream is down. The other streams go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unread(pub String);

/// How one stage ended.
#[derive(Debug)]
pub struct Exit {
    /// The thread's name.
    pub stage: String,
    /// `Err` if the stage failed or panicked; [`Unread`] for a source whose file was not read.
    pub result: anyhow::Result<()>,
}

/// A running pipeline. Of the queues it holds only `joining`, so that closing runs from the
/// sources to the journal.
pub struct Pipeline {
    /// Parent of every source's token.
    stop: CancellationToken,
    joining: Joining<Offer>,
    threads: Threads,
    /// Every queue after the frame edges, by name, with its capacity.
    queues: Vec<(&'static str, usize, Arc<Counts>)>,
}

/// A source that was added.
pub struct Added {
    /// Cancel it to take the source out again.
    pub stop: CancellationToken,
    /// The counts of its frame edge, and how many frames it holds.
    pub queue: (usize, Arc<Counts>),
}

impl Pipeline {
    /// Starts one thread per stage. No source yet: see [`Pipeline::add_source`].
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub fn start(parts: Parts) -> anyhow::Result<Pipeline> {
        let (lanes, workers) = (parts.models.len(), parts.preprocess_workers);
        let (joining, frames) = merge();
        let (jobs, jobs_rx) = edge(workers);
        let (batches, batches_rx) = edge(0);
        let (tickets, tickets_rx) = edge(lanes + 1);
        let (labels, labels_rx) = edge(4 * parts.batching.max_size);
        let spares = (lanes + 1) * parts.batching.max_size;
        let (spare, spare_rx) = edge(spares);
        let queues = vec![
            ("preprocess", workers, jobs.counts()),
            ("postprocess", lanes + 1, tickets.counts()),
            ("journal", 4 * parts.batching.max_size, labels.counts()),
        ];

        let mut threads = Threads::new();
        let (batching, watch) = (parts.batching, parts.watch.clone());
        let pulse = threads.pulse("batch");
        let batcher = Batcher { frames, jobs, batches, tickets, batching, watch, pulse };
        threads.spawn("batch", move || batcher.run())?;
        for i in 0..workers {
            let (geometry, jobs, spare) = (parts.geometry, jobs_rx.clone(), spare_rx.clone());
            let name = format!("preprocess-{i}");
            let pulse = threads.pulse(&name);
            threads.spawn(&name, move || worker::run(geometry, jobs, spare, &pulse))?;
        }
        for (i, model) in parts.models.into_iter().enumerate() {
            let (batches, spare, watch) = (batches_rx.clone(), spare.clone(), parts.watch.clone());
            let name = format!("infer-{i}");
            let (selftest, pulse) = (parts.selftest.clone(), threads.pulse(&name));
            let lane = Lane { number: i, model, selftest, batches, spare, watch, pulse };
            threads.spawn(&name, move || lane.run())?;
        }
        let top = parts.top;
        let pulse = threads.pulse("postprocess");
        threads.spawn("postprocess", move || label::run(top, tickets_rx, labels, &pulse))?;
        let (publish, pulse) = (parts.publish, threads.pulse("journal"));
        threads.spawn("journal", move || publish(labels_rx, &pulse))?;
        Ok(Pipeline { stop: CancellationToken::new(), joining, threads, queues })
    }

    /// Starts a source, with its own edge. `before` is told of it first, so that nothing that the
    /// source does is missed.
    ///
    /// # Errors
    /// The pipeline has ended, or the operating system refused a thread.
    pub fn add_source(
        &mut self,
        mut opener: Box<dyn Opener>,
        stream: Arc<Stream>,
        settings: source::Settings,
        (when_full, weight): (WhenFull, u32),
        before: impl FnOnce(&Added),
    ) -> anyhow::Result<Added> {
        let capacity = if when_full == WhenFull::Block { BLOCKING_FRAMES } else { 1 };
        let (frames_tx, frames) = edge(capacity);
        let queue = (capacity, frames_tx.counts());
        let stop = self.stop.child_token();
        let token = stop.clone();
        self.joining.join(frames, weight).with_context(|| format!("adding {}", stream.id))?;
        let name = format!("{SOURCE}{}", stream.id);
        let (lost, failure) = (Skipped::default(), None);
        let mut output = FrameEdge { edge: frames_tx, when_full, lost, failure };
        let added = Added { stop: token, queue };
        before(&added);
        self.threads.spawn(&name, move || {
            let end = source::run(opener.as_mut(), stream, settings, &mut output, &stop);
            if end == End::Failed {
                return Err(Unread(output.failure.unwrap_or_default()).into());
            }
            Ok(())
        })?;
        Ok(added)
    }

    /// Every queue after the frame edges: its name, capacity and counts.
    pub fn queues(&self) -> &[(&'static str, usize, Arc<Counts>)] {
        &self.queues
    }

    /// The pulse of every stage but the sources: those may wait for a camera for hours.
    pub fn pulses(&self) -> &[Arc<Pulse>] {
        &self.threads.pulses
    }

    /// Whether the source of a stream is running.
    pub fn is_running(&self, id: &str) -> bool {
        self.threads.running.iter().any(|it| it.strip_prefix(SOURCE) == Some(id))
    }

    /// Sources that are running.
    pub fn sources(&self) -> usize {
        self.threads.running.iter().filter(|it| it.starts_with(SOURCE)).count()
    }

    /// The next stage to end, if one does before `deadline`.
    pub fn next_exit(&mut self, deadline: Instant) -> Option<Exit> {
        let exit = self.threads.exits.recv_deadline(deadline).ok()?;
        self.threads.ended(&exit);
        Some(exit)
    }

    /// Stops the sources and waits for the rest to drain.
    ///
    /// # Errors
    /// The names of the stages still running at `deadline`.
    pub fn stop(self, deadline: Instant) -> Result<Vec<Exit>, Vec<String>> {
        let Pipeline { stop, joining, mut threads, .. } = self;
        stop.cancel();
        drop(joining);
        let mut exits = Vec::new();
        while !threads.running.is_empty() {
            let Ok(exit) = threads.exits.recv_deadline(deadline) else {
                return Err(threads.running);
            };
            threads.ended(&exit);
            exits.push(exit);
        }
        Ok(exits)
    }
}

/// The sending end of a frame edge, as its source sees it.
struct FrameEdge {
    edge: Sender<Offer>,
    when_full: WhenFull,
    /// Frames that ended here while stopping, since the last one that went out.
    lost: Skipped,
    /// Why the stream failed last.
    failure: Option<String>,
}

impl FrameEdge {
    /// An older offer gives way: what happened before its frame still comes before the new one,
    /// which also accounts for it.
    fn absorb(new: &mut Offer, old: Offer) {
        let states = std::mem::take(&mut new.states);
        new.states = old.states;
        new.states.extend(states);
        let Some(old) = old.frame else { return };
        let meta = &mut new.frame.as_mut().expect("only frames replace frames").meta;
        let mut gone = old.meta;
        meta.skipped.merge(gone.skipped);
        meta.skipped.add(Reason::Overload);
        gone.stream.dropped(StageName::Queue, Reason::Overload);
    }
}

impl Output for FrameEdge {
    fn frame(&mut self, frame: Frame, stop: &CancellationToken) -> Result<(), source::Closed> {
        let offer = Offer { states: Vec::new(), frame: Some(frame) };
        match self.when_full {
            WhenFull::Latest => {
                self.edge.replace(offer, FrameEdge::absorb).map_err(|_| source::Closed)
            }
            WhenFull::Block => match self.edge.send_unless(offer, || stop.is_cancelled()) {
                Ok(()) => Ok(()),
                Err(NotSent::Closed(_)) => Err(source::Closed),
                Err(NotSent::Full(offer)) => {
                    let mut meta = offer.frame.expect("the offer was made with a frame").meta;
                    meta.stream.dropped(StageName::Queue, Reason::Shutdown);
                    self.lost.merge(meta.skipped);
                    self.lost.add(Reason::Shutdown);
                    Ok(())
                }
            },
        }
    }

    /// Waits for room, stopping or not: the account of an epoch must not be lost, and whoever
    /// empties the edge runs until it is closed.
    fn state(
        &mut self,
        mut change: StateChange,
        _stop: &CancellationToken,
    ) -> Result<(), source::Closed> {
        if let Some(ended) = &mut change.ended {
            ended.skipped.merge(std::mem::take(&mut self.lost));
        }
        if change.detail.is_some() {
            self.failure.clone_from(&change.detail);
        }
        change.stream.state_sent();
        let offer = Offer { states: vec![change], frame: None };
        self.edge.send(offer).map_err(|_| source::Closed)
    }
}

struct Threads {
    running: Vec<String>,
    exits: channel::Receiver<Exit>,
    exits_tx: channel::Sender<Exit>,
    pulses: Vec<Arc<Pulse>>,
}

/// More threads than a daemon with the largest allowed number of streams has.
const EXITS_MAX: usize = 4096;

impl Threads {
    fn new() -> Threads {
        let (exits_tx, exits) = channel::bounded(EXITS_MAX);
        Threads { running: Vec::new(), exits, exits_tx, pulses: Vec::new() }
    }

    fn ended(&mut self, exit: &Exit) {
        if let Some(i) = self.running.iter().position(|it| *it == exit.stage) {
            self.running.swap_remove(i);
        }
    }

    fn pulse(&mut self, name: &str) -> Arc<Pulse> {
        self.pulses.push(Pulse::new(name));
        self.pulses.last().expect("it was just pushed").clone()
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let exits = self.exits_tx.clone();
        let stage = name.to_owned();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(body))
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
                    .with_context(|| format!("stage {stage}"));
                // Nobody listens once the pipeline was given up at its deadline.
                drop(exits.send(Exit { stage, result }));
            })
            .with_context(|| format!("starting thread {name}"))?;
        self.running.push(name.to_owned());
        Ok(())
    }
}
