//! A stream's life by a simulated clock.

use super::*;

fn waits(code: Code) -> [f64; 6] {
    let mut backoff = Backoff::default();
    std::array::from_fn(|_| backoff.next(code, 1.0).as_secs_f64())
}

fn failed(code: Code) -> Broke {
    Broke::Failed(SourceError { code, detail: "it broke".to_owned() })
}

const NO_TELL: Option<Tell> = None;

#[test]
fn waits_double_up_to_their_limit_and_start_over_after_a_good_time() {
    assert_eq!(waits(Code::Refused), [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]);
    assert_eq!(waits(Code::Codec), [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]);
    assert_eq!(waits(Code::Auth), [330.0; 6]);
    let mut backoff = Backoff::default();
    backoff.next(Code::Stall, 0.5);
    backoff.reset();
    assert_eq!(backoff.next(Code::Stall, 0.5), Duration::from_millis(250));
    for _ in 0..1_000 {
        assert!(backoff.next(Code::Stall, 0.999) < Duration::from_secs(4));
    }
}

#[test]
fn a_refused_password_is_not_tried_again_within_five_minutes() {
    assert_eq!(Backoff::default().next(Code::Auth, 0.0), Duration::from_secs(300));
    let mut it = Supervisor::new(false);
    it.opening();
    for random in [0.0, 0.5, 0.999] {
        let (tell, then) = it.broke(Broke::Refused(AUTH_PAUSE), true, random);
        assert!(matches!(then, Then::Wait(pause) if AUTH_PAUSE <= pause), "{then:?}");
        assert_eq!(tell.error.map(|it| it.code), Some(Code::Auth));
    }
}

#[test]
fn a_camera_that_comes_and_goes_is_tried_for_ever_and_told_once_per_change() {
    let start = Instant::now();
    let mut it = Supervisor::new(false);
    assert_eq!(it.opening().unwrap().state, State::Connecting);
    let mut seen = Vec::new();
    for outage in 0..3_u64 {
        let now = start + Duration::from_secs(60 * outage);
        assert_eq!(it.picture(now).unwrap().state, State::Up);
        assert_eq!(it.picture(now + GOOD_AFTER), NO_TELL, "up is told once");
        let (tell, then) = it.broke(failed(Code::Stall), true, 1.0);
        seen.push((tell.state, tell.retry_in, then));
        for attempt in 1..=50 {
            let told = it.opening().map(|it| it.state);
            assert_eq!(told, (attempt == 1).then_some(State::Connecting), "try {attempt}");
            let (tell, then) = it.broke(failed(Code::Refused), true, 1.0);
            assert_eq!(tell.state, State::Down);
            assert!(matches!(then, Then::Wait(pause) if pause <= Duration::from_secs(4)));
        }
        assert_eq!(it.opening(), NO_TELL);
    }
    let half = Duration::from_millis(500);
    assert_eq!(seen, [(State::Stalled, Some(half), Then::Wait(half)); 3], "each counts as new");
}

#[test]
fn a_camera_that_connects_and_breaks_is_not_tried_ever_faster() {
    let now = Instant::now();
    let mut it = Supervisor::new(false);
    let mut last = Duration::ZERO;
    for _ in 0..8 {
        it.opening();
        it.picture(now);
        it.picture(now + GOOD_AFTER - Duration::from_millis(1));
        let (_, then) = it.broke(Broke::Eos, true, 1.0);
        let Then::Wait(pause) = then else { panic!("{then:?}") };
        assert!(last <= pause);
        last = pause;
    }
    assert_eq!(last, Duration::from_secs(4));
}

#[test]
fn attempts_count_from_the_last_time_the_stream_was_up() {
    let mut it = Supervisor::new(false);
    let mut attempts = Vec::new();
    for up in [false, false, true, false, false] {
        it.opening();
        if up {
            attempts.push(it.picture(Instant::now()).unwrap().attempt);
        }
        attempts.push(it.broke(failed(Code::Timeout), true, 0.0).0.attempt);
    }
    assert_eq!(attempts, [1, 2, 3, 3, 1, 2]);
}

#[test]
fn a_file_ends_fails_or_starts_over_but_never_spins() {
    let mut plain = Supervisor::new(false);
    plain.opening();
    plain.picture(Instant::now());
    assert_eq!(plain.broke(Broke::Eos, false, 0.5).1, Then::Over(End::Ended));

    let mut broken = Supervisor::new(true);
    broken.opening();
    let (tell, then) = broken.broke(failed(Code::Codec), false, 0.5);
    assert_eq!((tell.state, then), (State::Down, Then::Over(End::Failed)));

    let mut looped = Supervisor::new(true);
    looped.opening();
    for _ in 0..3 {
        looped.picture(Instant::now());
        let (tell, then) = looped.broke(Broke::Eos, false, 0.5);
        assert_eq!((tell.state, then), (State::Up, Then::Open));
        assert_eq!(looped.opening(), NO_TELL, "it is up all the time");
    }
    let (tell, then) = looped.broke(Broke::Eos, false, 0.5);
    assert_eq!((tell.state, then), (State::Ended, Then::Over(End::Ended)), "no picture: no loop");
}

#[test]
fn whatever_happens_a_live_stream_waits_within_its_bounds_and_ends_only_when_stopped() {
    let mut now = Instant::now();
    let mut it = Supervisor::new(false);
    let mut random = 12_345_u64;
    let mut dice = move |sides: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % sides
    };
    for _ in 0..10_000 {
        it.opening();
        for _ in 0..dice(3) {
            it.picture(now);
            now += Duration::from_secs(dice(40));
        }
        let code = Code::ALL[dice(Code::ALL.len() as u64) as usize];
        let broke = if code == Code::Eos { Broke::Eos } else { failed(code) };
        let (tell, then) = it.broke(broke, true, dice(1_000) as f64 / 1_000.0);
        let Then::Wait(pause) = then else { panic!("{then:?} after {code:?}") };
        let (least, most) = match code {
            Code::Auth => (300, 330),
            Code::NotFound | Code::Codec => (0, 60),
            _ => (0, 4),
        };
        assert!(Duration::from_secs(least) <= pause && pause <= Duration::from_secs(most));
        assert_eq!(tell.retry_in, Some(pause));
        assert_eq!(tell.state == State::Stalled, code == Code::Stall);
        assert!(1 <= tell.attempt);
    }
    assert_eq!(it.broke(Broke::Stopped, true, 0.5).1, Then::Over(End::Stopped));
}
