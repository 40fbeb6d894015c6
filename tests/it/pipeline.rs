//! Promises about batching, order and fairness.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use ghostwatch::{
    edge::WhenFull,
    infer::{
        Model,
        batch::{Batching, CloseReason, Selftest},
        selftest::{Golden, Reference},
    },
    ledger::Stream,
    pipeline::Added,
    preprocess::Geometry,
    pulse::TURN,
    source::{Opener, Settings, Source, SourceError},
};

use crate::support::{
    BATCHING, Collect, Grey, Mean, SIDE, add, size, start, start_tested, wait_until, within,
};

fn lanes(n: usize, pause: Duration) -> Vec<Box<dyn Model>> {
    (0..n).map(|_| Box::new(Mean(pause)) as Box<dyn Model>).collect()
}

#[test]
fn every_streams_order_is_kept_with_several_lanes() {
    for _ in 0..size(1, 50) {
        let sink = Collect::default();
        let (mut p, _) = start(lanes(3, Duration::from_micros(300)), &sink, BATCHING);
        for id in ["a", "b"] {
            add(&mut p, id, Grey::file(500), WhenFull::Block);
        }
        wait_until("all frames", || sink.frames.load(SeqCst) == 1000);
        p.stop(within(2000)).unwrap();
        for id in ["a", "b"] {
            assert_eq!(sink.frames_of(id), (0..500).collect::<Vec<u64>>());
        }
    }
}

#[test]
fn equal_streams_get_equal_shares_even_if_one_offers_ten_times_as_much() {
    for streams in [4, 16] {
        let sink = Collect::default();
        // 4 frames per 8 ms: 500 a second, where the streams offer at least 1,000 each.
        let (mut p, _) = start(lanes(1, Duration::from_millis(8)), &sink, BATCHING);
        let ids: Vec<_> = (0..streams).map(|i| format!("s{i}")).collect();
        let all: Vec<_> = (0..streams)
            .map(|i| {
                let period = Duration::from_micros(if i == 0 { 100 } else { 1000 });
                add(&mut p, &ids[i], Grey::camera(period), WhenFull::Latest)
            })
            .collect();
        for enough in (1..=size(1, 20)).map(|it| it * 1000) {
            wait_until("a thousand frames more", || enough < sink.frames.load(SeqCst));
        }
        p.stop(within(5000)).unwrap();
        let shares: Vec<_> = all.iter().map(|it| it.published.load(Relaxed)).collect();
        let (min, max) = (*shares.iter().min().unwrap(), *shares.iter().max().unwrap());
        // The promise is 1.5. A source that the machine does not let run offers nothing: 1.11 was seen
        // beside the other tests.
        assert!(max as f64 <= 1.25 * min as f64, "{streams} streams: {shares:?}");
        for stream in all {
            assert_eq!(stream.unaccounted(), 0);
            sink.check_arithmetic(&stream.id);
        }
    }
}

#[test]
fn one_slow_stream_does_not_wait_for_company() {
    let sink = Collect::default();
    let batching = Batching { max_size: 32, max_wait: Duration::from_millis(500) };
    let (mut p, watch) = start(lanes(1, Duration::ZERO), &sink, batching);
    add(&mut p, "a", Grey::camera(Duration::from_millis(40)), WhenFull::Latest);
    wait_until("some frames", || 10 < sink.frames.load(SeqCst));
    p.stop(within(2000)).unwrap();
    let batches = watch.0.lock().unwrap();
    // Until two frames came nobody knows how often they will come.
    let later = &batches[2..];
    assert!(later.iter().all(|it| it.0 == 1), "{batches:?}");
    assert!(later.iter().filter(|it| it.1 == CloseReason::Idle).count() + 1 >= later.len());
}

#[test]
fn many_streams_fill_a_batch_while_the_device_is_busy() {
    let sink = Collect::default();
    let batching = Batching { max_size: 32, max_wait: Duration::from_millis(5) };
    let (mut p, watch) = start(lanes(1, Duration::from_millis(30)), &sink, batching);
    for i in 0..16 {
        add(&mut p, &format!("s{i}"), Grey::camera(Duration::from_millis(40)), WhenFull::Latest);
    }
    wait_until("some frames", || 300 < sink.frames.load(SeqCst));
    p.stop(within(2000)).unwrap();
    let batches = watch.0.lock().unwrap();
    let mean = batches.iter().map(|it| it.0).sum::<usize>() as f64 / batches.len() as f64;
    assert!(4.0 <= mean, "mean batch {mean}: {batches:?}");
}

/// A model that hangs until it is let go.
struct Hanging(crossbeam_channel::Receiver<()>);

impl Model for Hanging {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        self.0.recv().unwrap_err();
        Ok(vec![vec![0.0, 1.0]; batch.len()])
    }
}

#[test]
fn a_lane_that_hangs_is_told_from_those_that_wait_for_it() {
    let (go, held) = crossbeam_channel::bounded::<()>(0);
    let sink = Collect::default();
    let (mut p, _) = start(vec![Box::new(Hanging(held))], &sink, BATCHING);
    // Idle loops turn too.
    let still = |p: &ghostwatch::pipeline::Pipeline, over: Duration| -> Vec<String> {
        // The last stage is the test's own, without a pulse.
        let stages = p.pulses().iter().filter(|it| it.name() != "journal");
        let still = stages.filter(|it| over < it.still());
        still.map(|it| it.name().to_owned()).collect()
    };
    let names: Vec<_> = p.pulses().iter().map(|it| it.name().to_owned()).collect();
    assert_eq!(names, ["batch", "preprocess-0", "infer-0", "postprocess", "journal"]);
    wait_until("some turns", || Duration::from_millis(1200) < p.pulses()[0].age());
    assert_eq!(still(&p, 2 * TURN), Vec::<String>::new());
    add(&mut p, "a", Grey::camera(Duration::from_millis(5)), WhenFull::Latest);
    wait_until("the lane stands still", || still(&p, 4 * TURN) == ["infer-0"]);
    drop(go);
    wait_until("it turns again", || still(&p, 2 * TURN).is_empty());
    p.stop(within(2000)).unwrap();
}

/// Answers as [`Mean`] does until it breaks; counts how often it is warmed up.
struct Breaking(Arc<AtomicBool>, Arc<AtomicU64>);

impl Model for Breaking {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        let mut answers = Mean(Duration::ZERO).forward(batch)?;
        if self.0.load(SeqCst) {
            answers.iter_mut().for_each(|it| it[0] += 1.0);
        }
        Ok(answers)
    }

    fn warm_up(&mut self) -> anyhow::Result<()> {
        self.1.fetch_add(1, SeqCst);
        Ok(())
    }
}

#[test]
fn idle_lanes_repeat_the_self_test_and_each_tells_of_itself() {
    let reference = Reference::of(&mut Mean(Duration::ZERO), SIDE).unwrap();
    let geometry = Geometry { resize: SIDE, crop: SIDE };
    let golden = Arc::new(Golden { geometry, reference, allowed_error: 1e-6 });
    let selftest = Selftest { golden, every: Duration::from_millis(20) };
    let (broken, warmed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let models: Vec<Box<dyn Model>> =
        vec![Box::new(Mean(Duration::ZERO)), Box::new(Breaking(broken.clone(), warmed.clone()))];
    let sink = Collect::default();
    let (p, watch) = start_tested(models, Some(selftest), &sink, BATCHING);
    let count = |result| watch.2.lock().unwrap().iter().filter(|it| **it == result).count();
    for round in 1..=3 {
        wait_until("both lanes", || round <= count((0, true)) && round <= count((1, true)));
    }
    assert_eq!(count((0, false)) + count((1, false)), 0);
    broken.store(true, SeqCst);
    wait_until("the lane that is wrong", || 1 < count((1, false)));
    let before = count((0, true));
    wait_until("the other is right", || before < count((0, true)));
    assert_eq!(count((0, false)), 0);
    p.stop(within(2000)).unwrap();
    let mut warm = watch.1.lock().unwrap().clone();
    warm.sort_unstable();
    assert_eq!((warm, warmed.load(SeqCst)), (vec![0, 1], 1), "each lane is warmed up once");
}

/// Notes when it is opened.
struct Noting(Grey, Arc<Mutex<Vec<&'static str>>>);

impl Opener for Noting {
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError> {
        self.1.lock().unwrap().push("opened");
        self.0.open()
    }

    fn is_live(&self) -> bool {
        self.0.is_live()
    }
}

#[test]
fn whoever_adds_a_source_hears_of_it_before_it_starts() {
    let sink = Collect::default();
    let (mut p, _) = start(lanes(1, Duration::ZERO), &sink, BATCHING);
    let notes = Arc::new(Mutex::new(Vec::new()));
    let rounds = 50;
    for i in 0..rounds {
        let opener = Box::new(Noting(Grey::file(1), notes.clone()));
        let stream = Arc::new(Stream::new(format!("s{i}")));
        let settings = Settings {
            max_fps: None,
            looped: false,
            start_time: None,
            max_clock_offset: Duration::from_secs(2),
            first_epoch: 0,
            gate: Default::default(),
            leave: Default::default(),
        };
        let told = notes.clone();
        let before = |_: &Added| {
            assert!(told.lock().unwrap().is_empty(), "it runs already");
            std::thread::yield_now();
            told.lock().unwrap().push("told");
        };
        p.add_source(opener, stream, settings, (WhenFull::Block, 1), before).unwrap();
        wait_until("it is opened", || notes.lock().unwrap().len() == 2);
        assert_eq!(std::mem::take(&mut *notes.lock().unwrap()), ["told", "opened"]);
    }
    p.stop(within(2000)).unwrap();
}
