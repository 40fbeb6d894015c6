//! Promises about stopping, failing and waiting.

use std::{
    sync::atomic::Ordering::{Relaxed, SeqCst},
    time::Duration,
};

use ghostwatch::{edge::WhenFull, infer::Model};

use crate::support::{
    BATCHING, Collect, Failing, Grey, Mean, add, size, start, wait_until, within,
};

fn mean() -> Vec<Box<dyn Model>> {
    vec![Box::new(Mean(Duration::ZERO))]
}

#[test]
fn end_of_stream_drains_everything() {
    (0..size(1, 200)).for_each(|_| drain_three_files());
}

fn drain_three_files() {
    let sink = Collect::default();
    let (mut p, _) = start(mean(), &sink, BATCHING);
    let streams = ["a", "b", "c"].map(|id| add(&mut p, id, Grey::file(100), WhenFull::Block));
    for _ in 0..3 {
        let exit = p.next_exit(within(5000)).unwrap();
        assert!(exit.stage.starts_with("src-") && exit.result.is_ok(), "{exit:?}");
    }
    // batch, preprocess, infer, postprocess, journal
    assert_eq!(p.stop(within(2000)).unwrap().len(), 5);
    for stream in streams {
        assert_eq!(sink.frames_of(&stream.id), (0..100).collect::<Vec<u64>>());
        assert_eq!((stream.unaccounted(), stream.in_flight()), (0, 0));
        sink.check_arithmetic(&stream.id);
    }
}

#[test]
fn stop_ends_sources_first_and_accounts_for_every_decoded_frame() {
    for when_full in [WhenFull::Block, WhenFull::Latest].repeat(size(1, 200)) {
        let sink = Collect::default();
        let (mut p, _) = start(mean(), &sink, BATCHING);
        let source = Grey::camera(Duration::ZERO);
        let given = source.given.clone();
        let stream = add(&mut p, "a", source, when_full);
        wait_until("some frames", || 50 < sink.frames.load(SeqCst));
        p.stop(within(2000)).unwrap();
        assert_eq!(stream.decoded.load(Relaxed), given.load(SeqCst));
        assert_eq!((stream.unaccounted(), stream.in_flight()), (0, 0), "{when_full:?}");
        sink.check_arithmetic("a");
    }
}

#[test]
fn a_stuck_journal_is_named_at_the_deadline() {
    let sink = Collect::default();
    sink.closed.store(true, SeqCst);
    let (mut p, _) = start(mean(), &sink, BATCHING);
    let stream = add(&mut p, "a", Grey::camera(Duration::ZERO), WhenFull::Latest);
    wait_until("frames are replaced", || 1000 < stream.dropped_total());
    let stuck = p.stop(within(200)).unwrap_err();
    assert!(stuck.iter().any(|it| it == "journal"), "{stuck:?}");
    sink.closed.store(false, SeqCst);
}

#[test]
fn back_pressure_bounds_the_frames_in_flight() {
    // Labels edge 16 + one in the journal's hand + postprocess: one batch of 4 + tickets 2 of 4
    // + the lane's 4, which waits in no edge of its own but in a ticket + the batcher's 4
    // + frames edge 4 + 1 in the source's hand.
    let most = 16 + 1 + 4 + 2 * 4 + 4 + 4 + 4 + 1;
    let sink = Collect::default();
    sink.closed.store(true, SeqCst);
    let (mut p, _) = start(mean(), &sink, BATCHING);
    let stream = add(&mut p, "a", Grey::file(u64::MAX), WhenFull::Block);
    wait_until("the pipeline is full", || 20 <= stream.in_flight());
    let mut last = 0;
    wait_until("nothing moves", || {
        let now = stream.decoded.load(Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        now == stream.decoded.load(Relaxed)
    });
    last = last.max(stream.in_flight());
    assert!(last <= most, "{last} of at most {most}");
    sink.closed.store(false, SeqCst);
    p.stop(within(2000)).unwrap();
    assert_eq!(stream.unaccounted(), 0);
}

#[test]
fn a_failed_or_panicked_model_is_reported_with_its_name_and_the_rest_ends() {
    for panics in [false, true].repeat(size(1, 50)) {
        for when_full in [WhenFull::Block, WhenFull::Latest] {
            let sink = Collect::default();
            let (mut p, _) = start(vec![Box::new(Failing(3, panics))], &sink, BATCHING);
            for id in ["a", "b"] {
                add(&mut p, id, Grey::camera(Duration::ZERO), when_full);
            }
            // No one calls `stop`: closing runs both ways from the dead stage.
            let mut failed = Vec::new();
            for _ in 0..7 {
                let exit = p.next_exit(within(5000));
                let exit = exit.unwrap_or_else(|| panic!("{when_full:?} {panics}: still running"));
                if let Err(error) = exit.result {
                    failed.push(format!("{error:#}"));
                }
            }
            let said = if panics { "stage infer-0: panicked" } else { "device lost" };
            assert!(failed.iter().any(|it| it.contains(said)), "{failed:?}");
        }
    }
}
