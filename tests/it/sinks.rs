//! What the sinks promise together: on a real journal, with real servers that are hurt.

use std::{
    fs,
    process::Command,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use ghostwatch::{
    journal::retain::Retain,
    secret::Secret,
    sink::{
        broker::{Code, Topic},
        settings::{Login, Select, Target},
    },
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    mqtt::{self, reader::Reader},
    redis as redis_server,
    support::size,
    support_broker,
    support_sinks::{
        Journal, check_complete, id, ids, in_nats, in_redis, nats_server, nats_target, parsed,
        redis_target, wait_long,
    },
    webhook::{self, Do, Receiver, ok},
};

fn all() -> Select {
    Select::default()
}

#[test]
fn brokers_that_are_down_at_the_start_get_everything_in_order_and_once() {
    let (mut nats, mut redis) = (nats_server(""), redis_server::server(&[]));
    let folder = TempDir::new().unwrap();
    let mqtt_port = support_broker::free_port();
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal.start(vec![
        ("nats", nats_target(&nats), all()),
        ("redis", redis_target(&redis), all()),
        ("mqtt", Target::Mqtt(mqtt::settings(mqtt_port)), all()),
    ]);
    journal.append(1_000);
    for it in &progress {
        wait_long("it was tried", || 0 < it.errors(Code::Refused));
        assert_eq!((it.cursor.get(), it.acked.load(Relaxed)), (0, 0));
    }
    nats.start();
    redis.start();
    let mosquitto = mqtt::mosquitto_at(&folder, mqtt_port);
    let reader = Reader::start(&mosquitto, folder.path());
    journal.append(1_000);
    journal.finish(sinks, &progress);
    let events = journal.events();
    assert_eq!(in_nats(&nats), events);
    assert_eq!(in_redis(&redis), events);
    wait_long("the subscriber has the last", || {
        reader.events().last().is_some_and(|it| it.1 == id(&events[1_999]))
    });
    // Before it had subscribed nothing was kept for it; what it has is in order and once.
    let read: Vec<String> = reader.events().into_iter().map(|it| it.1).collect();
    assert!(1_000 <= read.len(), "{}", read.len());
    assert_eq!(read, ids(&events)[2_000 - read.len()..]);
}

fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|it| it.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

const ALONE: &str = "GHOSTWATCH_TEST_ALONE";

/// Runs in a process of its own, because the memory of this one is that of many tests.
#[test]
fn an_hour_of_events_waits_in_the_journal_and_not_in_memory() {
    if std::env::var_os(ALONE).is_some() {
        return an_hour_of_events();
    }
    let me = std::env::current_exe().unwrap();
    let name = "sinks::an_hour_of_events_waits_in_the_journal_and_not_in_memory";
    let mut command = Command::new(me);
    let done = command.args([name, "--exact", "--nocapture"]).env(ALONE, "yes").output().unwrap();
    println!("{}", String::from_utf8_lossy(&done.stdout));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn an_hour_of_events() {
    let (mut nats, mut redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal
        .start(vec![("nats", nats_target(&nats), all()), ("redis", redis_target(&redis), all())]);
    journal.append(2_000);
    wait_long("all is well", || progress.iter().all(|it| it.cursor.get() == 2_000));
    nats.kill();
    redis.kill();
    // What the first thousands cost stays the same.
    journal.append(2_000);
    let before = resident_bytes();
    let count = size(20_000, 200_000);
    journal.append(count);
    wait_long("they are noticed", || progress.iter().all(|it| !it.up.load(Relaxed)));
    let grown = resident_bytes().saturating_sub(before);
    println!("{count} events while the brokers were away: {grown} bytes more memory");
    assert!(grown < 8 << 20, "{grown} bytes more: the events are in memory");
    let last = 4_000 + count;
    let back = |it: usize, what: &str| {
        let reached = |seq| wait_long(what, || seq <= progress[it].cursor.get());
        reached(2_001);
        let (start, from) = (Instant::now(), progress[it].cursor.get());
        reached(last);
        let rate = (last - from) as f64 / start.elapsed().as_secs_f64();
        println!("{what}: catches up at {rate:.0} events/s");
    };
    nats.start();
    back(0, "nats");
    redis.start();
    back(1, "redis");
    journal.finish(sinks, &progress);
    let events = journal.events();
    assert_eq!(events.len() as u64, last);
    check_complete(&in_nats(&nats), &events, "nats");
    check_complete(&in_redis(&redis), &events, "redis");
}

#[test]
fn brokers_killed_while_they_are_published_to_have_everything_in_order() {
    let (mut nats, mut redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal
        .start(vec![("nats", nats_target(&nats), all()), ("redis", redis_target(&redis), all())]);
    for cycle in 1..=size(5, 200) {
        journal.append(2_000);
        let reached = 2_000 * (cycle - 1) + 137 * cycle % 1_500;
        wait_long("nats is in the middle", || reached <= progress[0].cursor.get());
        nats.kill();
        wait_long("redis is in the middle", || reached <= progress[1].cursor.get());
        redis.kill();
        nats.start();
        redis.start();
    }
    journal.finish(sinks, &progress);
    let events = journal.events();
    let twice = check_complete(&in_nats(&nats), &events, "nats");
    check_complete(&in_redis(&redis), &events, "redis");
    println!("{} events, {twice} of them twice in NATS", events.len());
}

#[test]
fn a_slow_receiver_slows_nobody_else() {
    let nats = nats_server("").started();
    let folder = TempDir::new().unwrap();
    let mosquitto = mqtt::quiet_mosquitto(&folder);
    let slow = Receiver::start(None, |_, _| Do::Late(Duration::from_secs(1)));
    let mut settings = webhook::settings(&format!("http://127.0.0.1:{}", slow.port));
    settings.batch_events = 1;
    settings.timeout = Duration::from_secs(10);
    let lagging = mqtt::proxy::slow(mosquitto.port, Duration::from_secs(1));
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal.start(vec![
        ("nats", nats_target(&nats), all()),
        ("slow", Target::Webhook(settings), all()),
        ("mqtt", Target::Mqtt(mqtt::settings(lagging)), all()),
    ]);
    let start = Instant::now();
    journal.append(5_000);
    let appended = start.elapsed();
    wait_long("nats has everything", || progress[0].cursor.get() == 5_000);
    let took = start.elapsed();
    println!(
        "5000 events: appended in {appended:?}, in NATS after {took:?}; webhook {}, mqtt {}",
        progress[1].cursor.get(),
        progress[2].cursor.get()
    );
    for it in &progress[1..] {
        let most = took.as_secs() + 2;
        assert!(it.cursor.get() <= most, "{}: {most}", it.cursor.sink());
    }
    wait_long("the slow ones move", || progress[1..].iter().all(|it| 3 <= it.cursor.get()));
    assert!(progress[1..].iter().all(|it| it.up.load(Relaxed)), "slow is not down");
    assert_eq!(in_nats(&nats), journal.events());
    // A stop does not wait for thousands of seconds either; the rest stays in the journal.
    let start = Instant::now();
    sinks.stop(start + Duration::from_secs(8)).unwrap();
    println!("stopped after {:?}", start.elapsed());
}

#[test]
fn a_refused_password_is_the_trouble_of_one_sink() {
    let nats = nats_server("").started();
    let redis = redis_server::server(&["--requirepass", "right"]).started();
    let mut wrong = redis_server::settings(&redis);
    let password = Some(Secret::new("wrong"));
    wrong.login = Login { username: None, password, token: None };
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal
        .start(vec![("redis", Target::Redis(wrong), all()), ("nats", nats_target(&nats), all())]);
    journal.append(1_000);
    wait_long("it is refused", || 0 < progress[0].errors(Code::Auth));
    wait_long("the other has everything", || progress[1].cursor.get() == 1_000);
    assert!(!progress[0].up.load(Relaxed) && progress[0].cursor.get() == 0);
    assert_eq!(progress[0].errors(Code::Auth), 1, "an account is not locked by many tries");
    sinks.stop(Instant::now() + Duration::from_secs(8)).unwrap();
}

/// Keeps a journal small for as long as its writer has something to do.
fn retained() -> Journal {
    Journal::new(Retain { bytes: Some(2 << 20), ..Retain::default() })
}

#[test]
fn what_retention_takes_from_a_lagging_sink_is_announced_counted_and_told_in_its_place() {
    let (mut nats, redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let mut journal = retained();
    let (sinks, progress) = journal
        .start(vec![("nats", nats_target(&nats), all()), ("redis", redis_target(&redis), all())]);
    journal.append(100);
    wait_long("both have the first", || progress.iter().all(|it| it.cursor.get() == 100));
    nats.kill();
    let (mut announced_at, mut appended) = (None, 100);
    while journal.writer.stats().lost < 1_000 {
        journal.append(50);
        appended += 50;
        wait_long("the other follows", || progress[1].cursor.get() == appended);
        let before = journal.writer.stats();
        while journal.writer.maintain().unwrap() {}
        for it in journal.writer.newly_at_risk() {
            assert_eq!((it.sink(), before.lost, announced_at), ("nats", 0, None));
            announced_at = Some(before.next);
        }
        assert!(before.lost == 0 || announced_at.is_some(), "lost before it was announced");
    }
    assert!(progress[0].cursor.is_at_risk() && !progress[1].cursor.is_at_risk());
    nats.start();
    journal.finish(sinks, &progress);
    while journal.writer.maintain().unwrap() {}
    assert!(journal.writer.newly_at_risk().is_empty() && !progress[0].cursor.is_at_risk());
    let found: Vec<Value> = in_nats(&nats).iter().map(|it| parsed(it)).collect();
    let number = |it: &Value| it.as_str().unwrap().parse::<u64>().unwrap();
    let (mut next, mut lost) = (1, 0);
    for it in &found {
        let sequence = number(&it["sequence"]);
        if it["type"] == "io.ghostwatch.journal.gap.v1" {
            assert_eq!(
                (number(&it["data"]["first"]), it["data"]["reason"].as_str()),
                (next, Some("expired"))
            );
            assert_eq!(number(&it["data"]["last"]), sequence);
            lost += it["data"]["events"].as_u64().unwrap();
        } else {
            assert_eq!(sequence, next, "no hole that no gap tells of");
        }
        next = sequence + 1;
    }
    assert_eq!(next, appended + 1);
    assert_eq!(progress[0].lost.load(Relaxed), lost);
    // What was in hand when retention took it was delivered all the same.
    let counted = journal.writer.stats().lost;
    println!("{counted} counted when removed, {lost} missing, announced at {announced_at:?}");
    assert!(0 < lost && lost <= counted && counted <= lost + 3 * 256);
    // The other sink has all, and was told of nothing.
    let place = |it: &String| number(&parsed(it)["sequence"]);
    let redis: Vec<u64> = in_redis(&redis).iter().map(place).collect();
    assert_eq!((redis, progress[1].lost.load(Relaxed)), ((1..=appended).collect(), 0));
}

#[test]
fn what_every_sink_has_expires_in_silence() {
    let redis = redis_server::server(&[]).started();
    let mut journal = retained();
    let (sinks, progress) = journal.start(vec![("redis", redis_target(&redis), all())]);
    for commit in 1..=100 {
        journal.append(100);
        wait_long("it follows", || progress[0].cursor.get() == 100 * commit);
        while journal.writer.maintain().unwrap() {}
        assert!(journal.writer.newly_at_risk().is_empty());
    }
    let stats = journal.writer.stats();
    assert!(5_000 < stats.oldest && stats.lost == 0, "{stats:?}");
    journal.finish(sinks, &progress);
    assert_eq!(progress[0].lost.load(Relaxed), 0);
    let types: Vec<_> = in_redis(&redis).iter().map(|it| parsed(it)["type"].clone()).collect();
    assert_eq!(types.len(), 10_000);
    assert!(types.iter().all(|it| it != "io.ghostwatch.journal.gap.v1"));
}

#[test]
fn an_event_that_is_too_large_is_set_aside_and_the_rest_goes_on() {
    let nats = nats_server("max_payload: 4096\n").started();
    let folder = TempDir::new().unwrap();
    let mosquitto = mqtt::mosquitto(&folder, "");
    let reader = Reader::start(&mosquitto, folder.path());
    let mut settings = mqtt::settings(mosquitto.port);
    settings.packet_bytes_max = 4096;
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal
        .start(vec![("nats", nats_target(&nats), all()), ("mqtt", Target::Mqtt(settings), all())]);
    journal.append(300);
    journal.append_sized(2, 5_000);
    journal.append(300);
    journal.finish(sinks, &progress);
    let mut rest = journal.events();
    let large: Vec<String> = rest.drain(300..302).collect();
    for it in &progress {
        let sink = it.cursor.sink();
        let file = format!("{}.{sink}.dead.ndjson", journal.path().display());
        let dead = fs::read_to_string(file).unwrap();
        assert_eq!(dead.lines().collect::<Vec<_>>(), large, "{sink}");
        let counts = (it.dead.load(Relaxed), it.errors(Code::TooLarge), it.acked.load(Relaxed));
        assert_eq!(counts, (2, 2, 600), "{sink}");
    }
    assert_eq!(in_nats(&nats), rest);
    wait_long("the subscriber has the rest", || reader.events().len() == 600);
    assert_eq!(reader.events().into_iter().map(|it| it.1).collect::<Vec<_>>(), ids(&rest));
}

#[test]
fn each_sink_gets_what_is_configured_for_it() {
    let (nats, redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let receiver = Receiver::start(None, |_, _| ok());
    let sure = Select {
        topics: vec![Topic::Frames],
        streams: vec!["front".to_owned()],
        min_confidence: Some(0.5),
        top: Some(1),
    };
    let states = Select { topics: vec![Topic::State], ..all() };
    let two = Select { streams: vec!["yard".to_owned(), "gate".to_owned()], ..all() };
    let hook = webhook::settings(&format!("http://127.0.0.1:{}", receiver.port));
    let mut journal = Journal::new(Retain::default());
    let (sinks, progress) = journal.start(vec![
        ("nats", nats_target(&nats), sure),
        ("redis", redis_target(&redis), states),
        ("hook", Target::Webhook(hook), two),
    ]);
    journal.append(3_000);
    journal.finish(sinks, &progress);
    let events: Vec<Value> = journal.events().iter().map(|it| parsed(it)).collect();
    let wanted = |wants: &dyn Fn(&Value) -> bool| -> Vec<Value> {
        events.iter().filter(|it| wants(it)).cloned().collect()
    };
    let is_frame = |it: &Value| it["type"] == "io.ghostwatch.frame.classified.v1";
    let mut sure = wanted(&|it| {
        let best = it["data"]["top"][0]["confidence"].as_f64().unwrap();
        is_frame(it) && it["subject"] == "front" && 0.5 <= best
    });
    assert_eq!(sure.len(), 400);
    sure.iter_mut().for_each(|it| it["data"]["top"].as_array_mut().unwrap().truncate(1));
    let found = |all: Vec<String>| all.iter().map(|it| parsed(it)).collect::<Vec<Value>>();
    assert_eq!(found(in_nats(&nats)), sure);
    let states = wanted(&|it| !is_frame(it));
    assert_eq!((states.len(), found(in_redis(&redis))), (300, states));
    let lines = receiver.seen().iter().map(|it| it.body.as_str()).collect::<String>();
    let hooked = found(lines.lines().map(str::to_owned).collect());
    assert_eq!(hooked, wanted(&|it| it["subject"] != "front"));
}
