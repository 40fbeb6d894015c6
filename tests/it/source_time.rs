//! When pictures were taken, by a camera whose clock is known and wrong; and what faults of RTP do.

use std::{
    sync::atomic::Ordering::{Relaxed, SeqCst},
    time::{Duration, SystemTime},
};

use ghostwatch::{
    frame::{Meta, TimeSource},
    metrics::Metrics,
    source::{Spec, url::Transport},
    stage::{Reason, StageName},
};

use crate::{
    source::{Out, Ran, frames_of, run_until, spec},
    support_proxy::Damage,
    support_rtp_camera::{Camera, GOOD, Knobs, RATE},
};

/// Reads `frames` pictures; `then` is told how many there are, after each.
fn read(spec: &Spec, frames: usize, mut then: impl FnMut(usize)) -> Ran {
    let mut told = 0;
    run_until(spec, |out: &[Out]| {
        let n = frames_of(out);
        if told < n {
            told = n;
            then(n);
        }
        frames <= n
    })
}

/// `a` less `b` in milliseconds.
fn ms(a: SystemTime, b: SystemTime) -> f64 {
    match a.duration_since(b) {
        Ok(it) => it.as_secs_f64() * 1e3,
        Err(it) => it.duration().as_secs_f64() * -1e3,
    }
}

/// One picture in a line, for when a test fails.
fn shown(meta: &Meta, taken: SystemTime) -> String {
    format!(
        "epoch {} frame {} pts {:?} {:?}: time {:.3} ms, arrival {:.3} ms after it was taken",
        meta.epoch,
        meta.frame,
        meta.pts,
        meta.dated,
        ms(meta.time, taken),
        ms(meta.ingest_time, taken)
    )
}

/// One connection, one epoch, and every picture in it; each was taken as its event says.
fn check(camera: &Camera, ran: &Ran) {
    assert_eq!(ran.stream.connects.load(Relaxed), 1);
    let taken = camera.taken();
    for (k, meta) in ran.metas().enumerate() {
        let shown = shown(meta, taken[k]);
        println!("{shown}");
        assert_eq!((meta.epoch, meta.frame), (0, k as u64), "{shown}");
        if let Some(error) = meta.dated.error {
            assert!(ms(meta.time, taken[k]).abs() <= error.as_secs_f64() * 1e3 + 0.1, "{shown}");
        }
    }
}

/// Within one epoch, `time` runs at most a tenth faster or slower than the pictures, and not back.
fn check_pace(ran: &Ran) {
    for (a, b) in ran.metas().zip(ran.metas().skip(1)).filter(|it| it.0.epoch == it.1.epoch) {
        let (ran, passed) = (ms(b.time, a.time), (b.pts - a.pts).as_secs_f64() * 1e3);
        assert!(0.0 <= ran, "{a:?} {b:?}");
        // From arrival to the camera's clock and back the measure changes, too.
        if a.dated.source == TimeSource::Rtcp && b.dated.source == TimeSource::Rtcp {
            assert!((ran - passed).abs() <= passed / 10.0 + 0.01, "{ran} ms in {passed} ms");
        }
    }
}

fn over(camera: &Camera, transport: Transport) -> Spec {
    Spec { transport, ..spec(camera.url()) }
}

#[test]
fn a_camera_with_a_right_clock_dates_its_pictures_within_the_bound() {
    for transport in [Transport::Tcp, Transport::Udp] {
        let camera = Camera::start(GOOD);
        let ran = read(&over(&camera, transport), 75, |_| ());
        check(&camera, &ran);
        check_pace(&ran);
        let first = ran.metas().position(|it| it.dated.source == TimeSource::Rtcp).unwrap();
        println!("{transport:?}: dated by the camera from picture {first} on");
        assert!(first <= 26, "the second report comes after half a second: {first}");
        let (last, taken) = (ran.metas().last().unwrap(), camera.taken()[74]);
        let shown = shown(last, taken);
        assert!(ms(last.time, taken).abs() < 5.0, "{shown}");
        let offset = last.dated.clock_offset_ns.unwrap() as f64 / 1e6;
        assert!((-60.0..=-29.0).contains(&offset), "its way is 30 ms: {shown}");
        assert!(last.dated.error.unwrap() < Duration::from_millis(250), "{shown}");
    }
}

#[test]
fn a_clock_that_is_off_by_less_than_the_limit_is_followed_and_told() {
    for ahead_ms in [1_500, -1_500] {
        let camera = Camera::start(Knobs { ahead_ms, ..GOOD });
        let ran = read(&spec(camera.url()), 50, |_| ());
        check(&camera, &ran);
        check_pace(&ran);
        let last = ran.metas().last().unwrap();
        let shown = shown(last, camera.taken()[49]);
        assert_eq!(last.dated.source, TimeSource::Rtcp, "{shown}");
        let offset = last.dated.clock_offset_ns.unwrap() as f64 / 1e6;
        assert!((offset - ahead_ms as f64 + 45.0).abs() < 16.0, "{shown}");
        assert!(Duration::from_millis(30) < last.dated.error.unwrap(), "{shown}");
    }
}

#[test]
fn a_clock_that_is_off_by_an_hour_is_not_followed_but_told() {
    let camera = Camera::start(Knobs { ahead_ms: 3_600_000, ..GOOD });
    let mut shown = String::new();
    let metrics = Metrics::new();
    let ran = run_until(&spec(camera.url()), |out| {
        let Some(Out::Frame(frame)) = out.last() else { return false };
        if frames_of(out) == 50 {
            metrics.add_stream(frame.meta.stream.stream().clone(), None);
            shown = metrics.text().unwrap();
        }
        frames_of(out) == 50
    });
    check(&camera, &ran);
    for meta in ran.metas() {
        assert_eq!(meta.dated.source, TimeSource::Arrival);
        assert!(ms(meta.time, meta.ingest_time).abs() < 1.0, "{meta:?}");
    }
    let last = ran.metas().last().unwrap().dated;
    assert!(last.error.unwrap() < Duration::from_millis(250), "{last:?}");
    let name = "ghostwatch_stream_clock_offset_seconds{stream=\"test\"} ";
    let value = shown.lines().find_map(|it| it.strip_prefix(name)).unwrap();
    let value: f64 = value.parse().unwrap();
    assert!((3_599.94..=3_599.971).contains(&value), "{value}");
    let wrong = "ghostwatch_stream_clock_wrong{stream=\"test\"} 1";
    assert!(shown.lines().any(|it| it == wrong), "{shown}");
}

#[test]
fn a_clock_that_is_set_in_mid_stream_makes_no_step() {
    for (to, source) in
        [(1_500, TimeSource::Rtcp), (-1_500, TimeSource::Rtcp), (3_600_000, TimeSource::Arrival)]
    {
        let camera = Camera::start(GOOD);
        let ran = read(&spec(camera.url()), 150, |n| {
            if n == 50 {
                camera.set(|it| it.ahead_ms = to);
            }
        });
        check(&camera, &ran);
        check_pace(&ran);
        let (before, last) = (ran.metas().nth(49).unwrap(), ran.metas().last().unwrap());
        assert_eq!(last.dated.source, source);
        let offset = last.dated.clock_offset_ns.unwrap() as f64 / 1e6;
        assert!((offset - to as f64 + 45.0).abs() < 16.0, "{last:?}");
        assert_eq!(last.dated.error, None, "nothing bounds a clock that was set");
        let ran = ms(last.time, before.time);
        assert!((3_600.0..=4_400.0).contains(&ran), "100 pictures take 4 s: {ran}");
    }
}

#[test]
fn timestamps_that_wrap_change_nothing() {
    let camera = Camera::start_at(GOOD, u32::MAX - RATE as u32);
    let ran = read(&spec(camera.url()), 75, |_| ());
    check(&camera, &ran);
    check_pace(&ran);
    let last = ran.metas().last().unwrap();
    assert_eq!(last.dated.source, TimeSource::Rtcp);
    assert!(ms(last.time, camera.taken()[74]).abs() < 5.0, "{last:?}");
}

/// A fault after 30 pictures: the stream goes on, in the same connection. Gives the epochs.
fn goes_on(name: &str, fault: impl Fn(&mut Knobs)) -> u64 {
    let camera = Camera::start(GOOD);
    let ran = read(&spec(camera.url()), 130, |n| {
        if n == 30 {
            camera.set(&fault);
        }
    });
    assert_eq!(ran.stream.connects.load(Relaxed), 1, "{name}");
    assert!(ran.changes().all(|it| it.code.is_none()), "{name}: {:?}", ran.states());
    assert!(camera.taken().len() < 130 + 40, "{name}: {} were sent", camera.taken().len());
    check_pace(&ran);
    let last = ran.metas().last().unwrap();
    println!("{name}: {:?}", last.dated);
    last.epoch
}

#[test]
fn timestamps_that_jump_are_no_failure() {
    for seconds in [3_600, -3_600, 20, 1, -1] {
        // The jitter buffer keeps the PTS going, so it is not even a new epoch.
        let name = format!("a jump of {seconds} s");
        assert_eq!(goes_on(&name, |it| it.shift = seconds * RATE), 0, "{name}");
    }
}

#[test]
fn a_new_source_new_numbers_no_marks_and_equal_timestamps_are_no_failure() {
    for (name, fault) in [
        ("sequence", (|it| it.sequence = Some(30_000)) as fn(&mut Knobs)),
        ("marks", |it| it.marks = false),
        ("equal", |it| it.equal = 10),
        ("source", |it| it.source = 77),
    ] {
        assert_eq!(goes_on(name, fault), 0, "{name}");
    }
}

#[test]
fn what_udp_does_to_packets_ends_no_stream_and_everything_adds_up() {
    let none = Damage { seed: 7, ..Damage::default() };
    for damage in [
        Damage { loss: 0.01, ..none },
        Damage { loss: 0.05, ..none },
        Damage { loss: 0.2, ..none },
        Damage { reorder: 0.2, ..none },
        Damage { duplicate: 0.2, ..none },
        Damage { delay: Duration::from_millis(500), ..none },
        Damage {
            loss: 0.05,
            duplicate: 0.05,
            reorder: 0.05,
            delay: Duration::from_millis(500),
            ..none
        },
    ] {
        let camera = Camera::start(Knobs { damage, ..GOOD });
        let started = std::time::Instant::now();
        let ran = run_until(&over(&camera, Transport::Udp), |out| {
            50 <= frames_of(out) || Duration::from_secs(10) < started.elapsed() && !out.is_empty()
        });
        let (done, stream) = (camera.done(), &ran.stream);
        let corrupt = stream.dropped(StageName::Source, Reason::Corrupt);
        println!(
            "{damage:?}: {} packets, {} lost, {} pictures sent, {} received, {} decoded, {corrupt} \
             corrupt",
            done.packets.load(SeqCst),
            done.lost.load(SeqCst),
            camera.taken().len(),
            stream.received.load(Relaxed),
            stream.decoded.load(Relaxed)
        );
        assert_eq!(stream.connects.load(Relaxed), 1, "{damage:?}");
        assert!(ran.changes().all(|it| it.code.is_none()), "{:?}", ran.states());
        assert!(0 < ran.frames().count(), "{damage:?}");
        if damage.loss == 0.0 && damage.reorder == 0.0 {
            check(&camera, &ran);
        }
    }
}
