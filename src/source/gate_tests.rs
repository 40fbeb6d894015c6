//! The gate's rules, with time brought by the tests.

use super::*;

fn peer(host: &str, account: Option<u64>) -> Peer {
    Peer { host: host.to_owned(), account }
}

/// What a newcomer is told that does not wait.
fn turn(rules: &mut Rules, peer: &Peer, now: Instant) -> Answer {
    let ticket = rules.line_up(peer);
    let answer = rules.turn(ticket, now);
    rules.leave_line(ticket);
    answer
}

#[test]
fn a_host_is_contacted_eight_times_at_once_and_then_twice_a_second() {
    let (mut rules, start) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", None);
    let mut begun = Vec::new();
    let mut now = start;
    while begun.len() < 64 {
        match turn(&mut rules, &recorder, now) {
            Answer::Go => begun.push(now - start),
            Answer::Wait(pause) => now += pause.max(Duration::from_millis(1)),
            Answer::Refused(_) => unreachable!("nobody has an account"),
        }
    }
    assert_eq!(begun[7], Duration::ZERO);
    assert!((499..560).contains(&begun[8].as_millis()), "{:?}", begun[8]);
    assert!((27_900..28_500).contains(&begun[63].as_millis()), "{:?}", begun[63]);
    assert_eq!(turn(&mut rules, &peer("camera", None), start), Answer::Go, "another host");
}

#[test]
fn a_host_is_contacted_in_the_order_of_asking_whoever_looks_first() {
    let (mut rules, start) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", None);
    let mut waiting: Vec<u64> = (0..40).map(|_| rules.line_up(&recorder)).collect();
    let mut went = Vec::new();
    for step in 0..2_000 {
        let now = start + Duration::from_millis(10 * step);
        // The last one looks first, and some have left.
        waiting.reverse();
        waiting.retain(|ticket| {
            if *ticket == 20 && 300 < step {
                rules.leave_line(*ticket);
                return false;
            }
            let goes = rules.turn(*ticket, now) == Answer::Go;
            went.extend(goes.then_some(*ticket));
            !goes
        });
        waiting.sort_unstable();
    }
    let expected: Vec<u64> = (1..=40).filter(|it| *it != 20).collect();
    assert_eq!(went, expected);
    assert!(rules.line.is_empty());
}

#[test]
fn eight_streams_connect_at_the_same_time_and_no_more() {
    let (mut rules, now) = (Rules::default(), Instant::now());
    let hosts: Vec<_> = (0..64).map(|it| peer(&format!("camera-{it}"), None)).collect();
    let tickets: Vec<_> = hosts.iter().map(|it| rules.queue(it)).collect();
    let answers: Vec<_> = tickets.iter().map(|it| rules.permit(*it, now)).collect();
    assert_eq!(answers.iter().filter(|it| **it == Answer::Go).count(), CONNECTING_MAX);
    rules.left(&hosts[3], false);
    assert_eq!(rules.permit(tickets[63], now), Answer::Wait(Duration::MAX), "not its turn");
    assert_eq!(rules.permit(tickets[8], now), Answer::Go);
    // Whoever is stopped is not waited for.
    rules.leave_queue(tickets[9]);
    rules.left(&hosts[4], false);
    assert_eq!(rules.permit(tickets[11], now), Answer::Wait(Duration::MAX));
    assert_eq!(rules.permit(tickets[10], now), Answer::Go);
}

#[test]
fn of_32_channels_of_a_recorder_one_tries_a_wrong_password_every_five_minutes() {
    let (mut rules, mut now) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", Some(1));
    let ask = |rules: &mut Rules, now| {
        let ticket = rules.queue(&recorder);
        let answer = rules.permit(ticket, now);
        rules.leave_queue(ticket);
        answer
    };
    for _ in 0..3 {
        let answers: Vec<_> = (0..32).map(|_| ask(&mut rules, now)).collect();
        assert_eq!(answers.iter().filter(|it| **it == Answer::Go).count(), 1);
        rules.refused(&recorder, None, now);
        rules.left(&recorder, false);
        now += AUTH_PAUSE - Duration::from_millis(1);
        for _ in 0..32 {
            assert!(matches!(ask(&mut rules, now), Answer::Refused(_)));
            assert!(matches!(turn(&mut rules, &recorder, now), Answer::Refused(_)));
        }
        now += Duration::from_millis(1);
    }
    // Another password, and a camera behind the same address, are not punished for it.
    rules.refused(&recorder, None, now);
    for other in [peer("recorder", Some(2)), peer("recorder", None)] {
        let ticket = rules.queue(&other);
        assert_eq!(rules.permit(ticket, now), Answer::Go);
    }
}

#[test]
fn a_good_password_lets_one_channel_in_after_the_other() {
    let (mut rules, now) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", Some(1));
    let tickets: Vec<_> = (0..32).map(|_| rules.queue(&recorder)).collect();
    let camera = peer("camera", None);
    let other = rules.queue(&camera);
    assert_eq!(rules.permit(tickets[0], now), Answer::Go);
    assert_eq!(rules.permit(other, now), Answer::Go, "those that cannot go hold up nobody");
    rules.left(&camera, false);
    rules.left(&recorder, false);
    for ticket in &tickets[1..] {
        assert_eq!(rules.permit(*ticket, now), Answer::Go);
        rules.left(&recorder, false);
    }
    assert!(rules.accounts.values().all(|it| !it.signing_in) && rules.connecting == 0);
}

#[test]
fn a_channel_that_is_forbidden_does_not_lock_out_those_whose_password_was_taken() {
    let (mut rules, now) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", Some(1));
    let ask = |rules: &mut Rules| {
        let ticket = rules.queue(&recorder);
        rules.permit(ticket, now)
    };
    assert_eq!(ask(&mut rules), Answer::Go);
    rules.signed_in(&recorder);
    assert_eq!(ask(&mut rules), Answer::Go, "before the first has data");
    rules.refused(&recorder, None, now);
    rules.left(&recorder, false);
    rules.left(&recorder, true);
    assert_eq!(ask(&mut rules), Answer::Go);
    // Twice in a row it is the password.
    rules.refused(&recorder, None, now);
    rules.left(&recorder, false);
    assert_eq!(ask(&mut rules), Answer::Refused(AUTH_PAUSE));
}

#[test]
fn a_channel_that_is_always_forbidden_never_locks_out_the_others() {
    let (mut rules, mut now) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", Some(1));
    // Before any other has shown that the password is right, and again and again after it.
    rules.refused(&recorder, Some("office"), now);
    assert_eq!(turn(&mut rules, &recorder, now), Answer::Go);
    let ticket = rules.queue(&recorder);
    assert_eq!(rules.permit(ticket, now), Answer::Go);
    rules.signed_in(&recorder);
    rules.left(&recorder, true);
    for _ in 0..10 {
        now += AUTH_PAUSE;
        rules.refused(&recorder, Some("office"), now);
        assert_eq!(turn(&mut rules, &recorder, now), Answer::Go);
    }
}

#[test]
fn a_recorder_that_forbids_every_channel_is_asked_twice_and_then_every_five_minutes() {
    let (mut rules, mut now) = (Rules::default(), Instant::now());
    let recorder = peer("recorder", Some(1));
    let mut tries = 0;
    let end = now + 3 * AUTH_PAUSE;
    while now < end {
        for channel in 0..32 {
            if turn(&mut rules, &recorder, now) == Answer::Go {
                rules.refused(&recorder, Some(&format!("c{channel}")), now);
                tries += 1;
            }
        }
        // By then the host may be contacted again.
        now += Duration::from_secs(10);
    }
    assert_eq!(tries, 4);
}

#[test]
fn passwords_are_told_apart_without_being_kept() {
    let gate = Gate::default();
    let [user, good, same, bad] = ["viewer", "a", "a", "b"].map(Secret::new);
    let peer = |password| gate.peer(("Recorder", 554), [Some(&user), Some(password), None]);
    assert_eq!(peer(&good), peer(&same));
    assert_ne!(peer(&good), peer(&bad));
    assert_eq!(peer(&good).host, "recorder");
    assert!(!format!("{:?}", peer(&good)).contains("viewer"));
}

#[test]
fn whoever_waits_is_let_in_when_another_leaves_and_stops_when_told() {
    let gate = Arc::new(Gate::default());
    let stop = CancellationToken::new();
    let peer = gate.peer(("recorder", 554), [Some(&Secret::new("u")), None, None]);
    let first = gate.permit(&peer, &stop).unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(|| gate.permit(&peer, &stop).map(drop));
        drop(first);
        assert_eq!(second.join().unwrap(), Ok(()));
        let held = gate.permit(&peer, &stop).unwrap();
        let third = scope.spawn(|| gate.permit(&peer, &stop).map(drop));
        stop.cancel();
        assert_eq!(third.join().unwrap(), Err(Denied::Stopped));
        drop(held);
    });
    assert_eq!(gate.connecting(), 0);
}
