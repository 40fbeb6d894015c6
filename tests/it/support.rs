//! Fakes for what the user or the outside chooses, and waiting.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    edge::Receiver,
    edge::WhenFull,
    frame::{Colour, Item, Layout, Matrix, Picture, Planes, Siting, StateChange},
    infer::{
        Model,
        batch::{Batching, CloseReason, Selftest, Watch},
        selftest::Agreement,
    },
    label::Labelled,
    ledger::Stream,
    pipeline::{Parts, Pipeline},
    preprocess::Geometry,
    source::{Decoded, Next, Opener, Settings, Source, SourceError},
};

/// The size of the fakes' pictures and model inputs.
pub(crate) const SIDE: usize = 16;

/// A model whose logits are [mean of the picture / 255, 0], after `pause`.
pub(crate) struct Mean(pub(crate) Duration);

impl Model for Mean {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        thread::sleep(self.0);
        let mean = |it: &[u8]| it.iter().map(|it| f32::from(*it)).sum::<f32>() / it.len() as f32;
        Ok(batch.iter().map(|it| vec![mean(it) / 255.0, 0.0]).collect())
    }
}

/// A model that fails, or panics, after some batches.
pub(crate) struct Failing(pub(crate) u64, pub(crate) bool);

impl Model for Failing {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        if self.0 == 0 {
            if self.1 { panic!("model bug") } else { anyhow::bail!("device lost") }
        }
        self.0 -= 1;
        Mean(Duration::ZERO).forward(batch)
    }
}

/// A source of grey pictures: `frames` of them, one every `period`.
#[derive(Clone)]
pub(crate) struct Grey {
    pub(crate) frames: u64,
    pub(crate) period: Duration,
    pub(crate) live: bool,
    pub(crate) given: Arc<AtomicU64>,
}

impl Grey {
    pub(crate) fn file(frames: u64) -> Grey {
        Grey { frames, period: Duration::ZERO, live: false, given: Arc::default() }
    }

    pub(crate) fn camera(period: Duration) -> Grey {
        Grey { frames: u64::MAX, period, live: true, given: Arc::default() }
    }
}

struct Plane(Vec<u8>);

impl Planes for Plane {
    fn plane(&self, _index: usize) -> &[u8] {
        &self.0
    }
}

pub(crate) fn grey_picture(value: u8) -> Picture {
    Picture {
        layout: Layout::Gray8,
        colour: Colour {
            matrix: Matrix::Bt601,
            full_range: true,
            siting_x: Siting::Centre,
            siting_y: Siting::Centre,
        },
        width: SIDE,
        height: SIDE,
        strides: [SIDE; 3],
        planes: Box::new(Plane(vec![value; SIDE * SIDE])),
    }
}

impl Source for Grey {
    fn next(&mut self) -> Result<Next, SourceError> {
        let n = self.given.load(SeqCst);
        if n == self.frames {
            return Ok(Next::Eos);
        }
        thread::sleep(self.period);
        self.given.store(n + 1, SeqCst);
        let now = Instant::now();
        Ok(Next::Picture(Decoded {
            picture: grey_picture(51),
            pts: Some(Duration::from_millis(40 * n)),
            arrived: now,
            arrived_wall: SystemTime::now(),
            decoded: now,
            captured: None,
            reports: None,
            corrupt: false,
            label: None,
        }))
    }
}

impl Opener for Grey {
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError> {
        Ok(Box::new(self.clone()))
    }

    fn is_live(&self) -> bool {
        self.live
    }
}

/// One thing that reached the end of the pipeline.
#[derive(Debug)]
pub(crate) enum Got {
    /// stream, frame, frames skipped before it
    Frame(String, u64, u64),
    State(Box<StateChange>),
}

/// Takes what the pipeline publishes, as a journal would.
#[derive(Clone, Default)]
pub(crate) struct Collect {
    pub(crate) got: Arc<Mutex<Vec<Got>>>,
    /// While set, nothing is taken.
    pub(crate) closed: Arc<AtomicBool>,
    /// Frames taken.
    pub(crate) frames: Arc<AtomicU64>,
}

impl Collect {
    pub(crate) fn run(self, input: Receiver<Item<Labelled>>) -> anyhow::Result<()> {
        let mut carried = std::collections::HashMap::<String, u64>::new();
        while let Some(item) = input.recv() {
            while self.closed.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            let mut got = self.got.lock().unwrap();
            match item {
                Item::Frame(mut it) => {
                    let id = it.meta.stream.id.clone();
                    let carry = carried.remove(&id).unwrap_or(0);
                    let skipped = it.meta.skipped.total() + carry;
                    got.push(Got::Frame(id, it.meta.frame, skipped));
                    it.meta.stream.published();
                    self.frames.fetch_add(1, SeqCst);
                }
                Item::Dropped(meta, _) => {
                    *carried.entry(meta.stream.id.clone()).or_default() += 1 + meta.skipped.total();
                }
                Item::State(change) => got.push(Got::State(change)),
            }
        }
        Ok(())
    }

    /// The numbers of a stream's frames, in order.
    pub(crate) fn frames_of(&self, id: &str) -> Vec<u64> {
        let got = self.got.lock().unwrap();
        let frame = |it: &Got| match it {
            Got::Frame(stream, frame, _) => (stream == id).then_some(*frame),
            Got::State(_) => None,
        };
        got.iter().filter_map(frame).collect()
    }

    /// Checks `frame = previous + 1 + skipped` in every epoch of a stream, its end included.
    pub(crate) fn check_arithmetic(&self, id: &str) {
        let mut next = 0;
        for it in &*self.got.lock().unwrap() {
            match it {
                Got::Frame(stream, frame, skipped) if stream == id => {
                    assert_eq!(*frame, next + skipped, "{id}");
                    next = frame + 1;
                }
                Got::State(change) if change.stream.id == id => {
                    let Some(ended) = change.ended else { continue };
                    assert_eq!(ended.frames, next + ended.skipped.total(), "{id}: {change:?}");
                    next = 0;
                }
                Got::Frame(..) | Got::State(_) => (),
            }
        }
        assert_eq!(next, 0, "{id}: the last epoch was ended");
    }
}

/// Remembers the batches, which lanes are warm, and the self-tests of each lane.
#[derive(Default)]
pub(crate) struct Batches(
    pub(crate) Mutex<Vec<(usize, CloseReason)>>,
    pub(crate) Mutex<Vec<usize>>,
    pub(crate) Mutex<Vec<(usize, bool)>>,
);

impl Watch for Batches {
    fn batch(&self, size: usize, reason: CloseReason) {
        self.0.lock().unwrap().push((size, reason));
    }

    fn failed(&self, _error: &anyhow::Error) {}

    fn warm(&self, lane: usize) {
        self.1.lock().unwrap().push(lane);
    }

    fn selftest(&self, lane: usize, _agreement: &Agreement, passed: bool) {
        self.2.lock().unwrap().push((lane, passed));
    }
}

pub(crate) const BATCHING: Batching = Batching { max_size: 4, max_wait: Duration::from_millis(5) };

/// A pipeline with these models that ends in `sink`.
pub(crate) fn start(
    models: Vec<Box<dyn Model>>,
    sink: &Collect,
    batching: Batching,
) -> (Pipeline, Arc<Batches>) {
    start_tested(models, None, sink, batching)
}

/// A pipeline whose idle lanes are tested now and then.
pub(crate) fn start_tested(
    models: Vec<Box<dyn Model>>,
    selftest: Option<Selftest>,
    sink: &Collect,
    batching: Batching,
) -> (Pipeline, Arc<Batches>) {
    let watch = Arc::new(Batches::default());
    let sink = sink.clone();
    let parts = Parts {
        geometry: Geometry { resize: SIDE, crop: SIDE },
        models,
        selftest,
        preprocess_workers: 1,
        batching,
        top: 2,
        watch: watch.clone(),
        publish: Box::new(|input, _pulse| sink.run(input)),
    };
    (Pipeline::start(parts).unwrap(), watch)
}

/// Adds a source; gives its stream.
pub(crate) fn add(p: &mut Pipeline, id: &str, source: Grey, when_full: WhenFull) -> Arc<Stream> {
    let stream = Arc::new(Stream::new(id));
    let settings = Settings {
        max_fps: None,
        looped: false,
        start_time: None,
        max_clock_offset: Duration::from_secs(2),
        first_epoch: 0,
        gate: Default::default(),
        leave: Default::default(),
    };
    p.add_source(Box::new(source), stream.clone(), settings, (when_full, 1), |_| ()).unwrap();
    stream
}

/// The size of a promise: `small` as a rule, `long` in `scripts/test --long`.
pub(crate) fn size<T>(small: T, long: T) -> T {
    match std::env::var("GHOSTWATCH_TEST_SIZE") {
        Err(_) => small,
        Ok(it) if it == "long" => long,
        Ok(it) => panic!("GHOSTWATCH_TEST_SIZE is {it:?}; it is `long` or not set"),
    }
}

pub(crate) fn within(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

pub(crate) fn wait_until(what: &str, f: impl Fn() -> bool) {
    let deadline = within(10_000);
    while !f() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
