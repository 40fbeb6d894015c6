//! Batches frames from every stream, runs the model, and hands each answer back to its frame.
//!
//! Two loops: [`Batcher`] fills a batch while the device runs the one before; [`Lane`] owns one
//! model and runs batches. Whoever waits for an answer holds a ticket, an edge of one item, so that
//! answers come in the order of the batches whatever lane is first.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::RecvTimeoutError;

use crate::{
    edge::{
        NotSent, Receiver, Sender, edge,
        merge::{Merge, Timed},
    },
    frame::{Frame, Input, Item, Scores, StateChange},
    infer::{
        Model,
        selftest::{Agreement, Golden},
    },
    ledger::dropped,
    pulse::{Pulse, TURN},
    stage::{Reason, StageName},
};

/// When a batch is handed to the device.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// At most this many frames.
    pub max_size: usize,
    /// At most this long after its oldest frame was taken.
    pub max_wait: Duration,
}

/// Why a batch was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// It had the largest size.
    Full,
    /// Its oldest frame had waited `max_wait`.
    Deadline,
    /// No stream was due to add to it in time.
    Idle,
    /// No stream is left.
    Drain,
}

impl CloseReason {
    /// Every reason.
    pub const ALL: [CloseReason; 4] =
        [CloseReason::Full, CloseReason::Deadline, CloseReason::Idle, CloseReason::Drain];

    /// The metric label.
    pub fn name(self) -> &'static str {
        match self {
            CloseReason::Full => "full",
            CloseReason::Deadline => "deadline",
            CloseReason::Idle => "idle",
            CloseReason::Drain => "drain",
        }
    }
}

/// What the loops tell about themselves.
pub trait Watch: Send + Sync {
    /// A batch was handed over.
    fn batch(&self, size: usize, reason: CloseReason);
    /// The model failed.
    fn failed(&self, error: &anyhow::Error);
    /// A lane is ready for its first batch.
    fn warm(&self, lane: usize);
    /// A lane with nothing to do has repeated the golden self-test.
    fn selftest(&self, lane: usize, agreement: &Agreement, passed: bool);
}

/// What a source puts on its frame edge: at most one frame, and what happened before it.
#[derive(Debug, Default)]
pub struct Offer {
    /// In order, all before `frame`.
    pub states: Vec<StateChange>,
    /// The newest frame.
    pub frame: Option<Frame>,
}

impl Timed for Offer {
    fn moment(&self) -> Option<Instant> {
        self.frame.as_ref().map(|it| it.meta.timing.decoded)
    }
}

/// A frame on its way through a preprocess worker, and where the worker puts the result.
#[derive(Debug)]
pub struct Job {
    /// The frame.
    pub frame: Frame,
    /// The ticket's other end.
    pub reply: Sender<Item<Input>>,
}

/// The scores of one batch, in order, once a lane has them.
pub type Ticket = Receiver<Vec<Item<Scores>>>;

/// One batch on its way to a lane.
#[derive(Debug)]
pub struct Batch {
    entries: Vec<Entry>,
    frames: usize,
    /// When its oldest frame was taken.
    since: Option<Instant>,
}

#[derive(Debug)]
enum Entry {
    Frame(Receiver<Item<Input>>),
    State(Box<StateChange>),
}

/// The batcher's ends: from the streams, to the preprocess workers, lanes and postprocess.
pub struct Batcher {
    /// All streams.
    pub frames: Merge<Offer>,
    /// To the preprocess workers.
    pub jobs: Sender<Job>,
    /// To the lanes; holds nothing, so that a send succeeds iff a lane waits.
    pub batches: Sender<Work>,
    /// To postprocess, in the order of the batches.
    pub tickets: Sender<Ticket>,
    /// When a batch is closed.
    pub batching: Batching,
    /// Told of every batch.
    pub watch: Arc<dyn Watch>,
    /// The loop's.
    pub pulse: Arc<Pulse>,
}

impl Batcher {
    /// Runs until no stream is left.
    ///
    /// # Errors
    /// Never: a stage after it that is gone has told why itself.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut batch = self.next();
        loop {
            self.pulse.beat();
            while batch.frames < self.batching.max_size {
                let Some(offer) = self.frames.take() else { break };
                if self.add(&mut batch, offer).is_err() {
                    return Ok(());
                }
            }
            let now = Instant::now();
            match self.close(&batch, now) {
                Err(look_again) => self.frames.wait::<()>(None, Some(look_again)),
                Ok(reason) if batch.entries.is_empty() && reason == CloseReason::Drain => {
                    return Ok(());
                }
                Ok(reason) => match self.hand_over(batch, reason) {
                    Ok(()) => batch = self.next(),
                    Err(NotSent::Closed(_)) => return Ok(()),
                    Err(NotSent::Full(back)) => {
                        batch = back;
                        self.wait_for_lane(&batch, now);
                    }
                },
            }
        }
    }

    fn next(&self) -> Batch {
        Batch { entries: Vec::with_capacity(self.batching.max_size), frames: 0, since: None }
    }

    fn add(&self, batch: &mut Batch, offer: Offer) -> Result<(), crate::edge::Closed> {
        let Offer { states, frame } = offer;
        batch.entries.extend(states.into_iter().map(|it| Entry::State(Box::new(it))));
        let Some(mut frame) = frame else { return Ok(()) };
        let now = Instant::now();
        frame.meta.timing.taken = now;
        batch.since.get_or_insert(now);
        batch.frames += 1;
        let (reply, ticket) = edge(1);
        batch.entries.push(Entry::Frame(ticket));
        self.jobs.send(Job { frame, reply })
    }

    /// Whether the batch should be handed over now, or when to look again.
    fn close(&mut self, batch: &Batch, now: Instant) -> Result<CloseReason, Instant> {
        if batch.frames == self.batching.max_size {
            return Ok(CloseReason::Full);
        }
        if self.frames.ended() {
            return Ok(CloseReason::Drain);
        }
        let Some(since) = batch.since else {
            // What happened to a stream need not wait for frames.
            return if batch.entries.is_empty() { Err(now + TURN) } else { Ok(CloseReason::Idle) };
        };
        let deadline = since + self.batching.max_wait;
        if deadline <= now {
            return Ok(CloseReason::Deadline);
        }
        self.frames.due(now, deadline).map_or(Ok(CloseReason::Idle), |_| Err(deadline))
    }

    /// Gives the batch to a lane that waits for one.
    fn hand_over(&self, batch: Batch, reason: CloseReason) -> Result<(), NotSent<Batch>> {
        let frames = batch.frames;
        let (reply, ticket) = edge(1);
        if frames == 0 {
            // Nothing for a lane to do: the answer is there already.
            drop(reply.send(batch.entries.into_iter().map(Entry::state).collect()));
        } else if let Err(back) = self.batches.try_send((batch, reply)) {
            return Err(match back {
                NotSent::Full((batch, _)) => NotSent::Full(batch),
                NotSent::Closed((batch, _)) => NotSent::Closed(batch),
            });
        } else {
            self.watch.batch(frames, reason);
        }
        self.tickets.send(ticket).map_err(|_| NotSent::Closed(self.next()))
    }

    /// All lanes are busy: the batch goes on filling until one is free.
    fn wait_for_lane(&self, batch: &Batch, now: Instant) {
        if batch.frames == self.batching.max_size {
            self.batches.wait_for_receiver(now + TURN);
        } else {
            self.frames.wait(Some(&self.batches), Some(now + TURN));
        }
    }
}

/// What an idle lane is asked now and then.
#[derive(Clone, Debug)]
pub struct Selftest {
    /// The pictures, and what they should give.
    pub golden: Arc<Golden>,
    /// How often.
    pub every: Duration,
}

/// A batch on its way to a lane, with its ticket's other end.
pub type Work = (Batch, Sender<Vec<Item<Scores>>>);

/// One thread's model, and its ends: from the batcher, to whoever holds the tickets.
pub struct Lane {
    /// From 0.
    pub number: usize,
    /// The model.
    pub model: Box<dyn Model>,
    /// What it should answer; `None` for a model without a reference.
    pub selftest: Option<Selftest>,
    /// From the batcher.
    pub batches: Receiver<Work>,
    /// Back to the preprocess workers.
    pub spare: Sender<Box<[u8]>>,
    /// Told of failures.
    pub watch: Arc<dyn Watch>,
    /// The loop's.
    pub pulse: Arc<Pulse>,
}

impl Lane {
    /// Runs batches until the batcher is gone.
    ///
    /// # Errors
    /// Whatever [`Model::forward`] failed with. The daemon cannot go on without its model.
    pub fn run(mut self) -> anyhow::Result<()> {
        self.model.warm_up()?;
        self.watch.warm(self.number);
        let mut tested = Instant::now();
        while let Some((batch, reply)) = self.next(&mut tested)? {
            self.batch(batch, &reply)?;
        }
        Ok(())
    }

    /// The next batch. While there is none, what the device computes is looked at now and then.
    fn next(&mut self, tested: &mut Instant) -> anyhow::Result<Option<Work>> {
        loop {
            self.pulse.beat();
            let turn = self.selftest.as_ref().map_or(TURN, |it| it.every.min(TURN));
            match self.batches.recv_deadline(Instant::now() + turn) {
                Ok(it) => return Ok(Some(it)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(Selftest { golden, every }) = &self.selftest
                && *every <= tested.elapsed()
            {
                let agreement = golden.run(self.model.as_mut())?;
                self.watch.selftest(self.number, &agreement, golden.passes(&agreement));
                *tested = Instant::now();
            }
        }
    }

    fn batch(&mut self, batch: Batch, reply: &Sender<Vec<Item<Scores>>>) -> anyhow::Result<()> {
        let mut items: Vec<_> = batch.entries.into_iter().map(Entry::wait).collect();
        let started = Instant::now();
        let answer = {
            let pixels: Vec<&[u8]> = items.iter().filter_map(pixels).collect();
            if pixels.is_empty() { Ok(Vec::new()) } else { self.model.forward(&pixels) }
        };
        let times = (started, Instant::now());
        let (logits, failed) = match answer {
            Ok(logits) => (logits, None),
            Err(error) => {
                self.watch.failed(&error);
                (Vec::new(), Some(error))
            }
        };
        let size = u32::try_from(logits.len()).expect("a batch is small");
        let mut logits = logits.into_iter();
        let scores = items
            .drain(..)
            .map(|it| match it {
                Item::State(change) => Item::State(change),
                Item::Dropped(meta, reason) => Item::Dropped(meta, reason),
                Item::Frame(input) => score(input, logits.next(), times, (size, &self.spare)),
            })
            .collect();
        // Postprocess being gone is its own report; the batcher will see it too.
        drop(reply.send(scores));
        failed.map_or(Ok(()), |it| Err(it.context("the model failed")))
    }
}

fn pixels(item: &Item<Input>) -> Option<&[u8]> {
    match item {
        Item::Frame(input) => Some(&input.pixels),
        Item::Dropped(..) | Item::State(_) => None,
    }
}

/// Joins a frame with its logits; its pixel buffer goes back to the preprocess workers.
fn score(
    input: Input,
    logits: Option<Vec<f32>>,
    (started, inferred): (Instant, Instant),
    (batch_size, spare): (u32, &Sender<Box<[u8]>>),
) -> Item<Scores> {
    let Input { mut meta, pixels } = input;
    // When the pool is full the buffer is simply freed.
    drop(spare.try_send(pixels));
    meta.timing.started = started;
    meta.timing.inferred = inferred;
    match logits {
        Some(logits) => Item::Frame(Scores { meta, logits, batch_size }),
        None => dropped(meta, StageName::Inference, Reason::Error),
    }
}

impl Entry {
    fn state<T>(self) -> Item<T> {
        match self {
            Entry::State(change) => Item::State(change),
            Entry::Frame(_) => unreachable!("a batch without frames has only states"),
        }
    }

    /// The frame's input once it is ready, or what happened instead.
    fn wait(self) -> Item<Input> {
        match self {
            Entry::State(change) => Item::State(change),
            Entry::Frame(ticket) => ticket.recv().expect("a preprocess worker answers every job"),
        }
    }
}
