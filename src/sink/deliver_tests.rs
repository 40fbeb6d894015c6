//! The loop's promises against a broker that fails on cue; the real ones are integration tests.

use std::{cell::RefCell, collections::VecDeque, rc::Rc, time::SystemTime};

use super::*;
use crate::{journal::cursor::Cursor, sink::broker::Topic};

/// What the broker does with one call of `deliver`.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Acknowledges so many, then fails with this code.
    Fail(usize, Code),
    /// Acknowledges so many, then says that it is done.
    Done(usize),
}

#[derive(Clone, Default)]
struct Scripted {
    acts: Rc<RefCell<VecDeque<Act>>>,
    /// The first and last message of each call.
    calls: Rc<RefCell<Vec<(u64, u64)>>>,
    connects: Rc<RefCell<u32>>,
    refuse: bool,
}

impl Broker for Scripted {
    async fn connect(&mut self) -> Result<(), Fault> {
        *self.connects.borrow_mut() += 1;
        let refused = || Fault::new(Code::Refused, anyhow::anyhow!("nobody there"));
        if self.refuse { Err(refused()) } else { Ok(()) }
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let ends = (messages[0].seq, messages[messages.len() - 1].seq);
        self.calls.borrow_mut().push(ends);
        let act = self.acts.borrow_mut().pop_front().unwrap_or(Act::Done(messages.len()));
        let (Act::Fail(count, _) | Act::Done(count)) = act;
        (0..count).for_each(|it| acks.next(it == 0));
        match act {
            Act::Fail(_, code) => {
                let mut fault = Fault::new(code, anyhow::anyhow!("on cue"));
                fault.retry_after = Some(Duration::from_millis(1));
                Err(fault)
            }
            Act::Done(_) => Ok(()),
        }
    }

    async fn lost(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn close(&mut self) {}
}

struct Nobody;

impl Watch for Nobody {
    fn acked(&self, _sink: &str, _took: Duration, _since_arrival: Option<Duration>) {}
}

fn part(first: u64, last: u64, cursor: u64) -> Part {
    let message = |seq| Message {
        seq,
        id: format!("J-{seq}"),
        topic: Topic::Frames,
        stream: Some("a".into()),
        json: format!("{{\"seq\":{seq}}}"),
        appended: SystemTime::now(),
    };
    Part { messages: (first..=last).map(message).collect(), cursor, lost: 0 }
}

struct Ran {
    result: anyhow::Result<()>,
    calls: Vec<(u64, u64)>,
    connects: u32,
    progress: Arc<Progress>,
    dead: String,
}

/// Runs the loop over these parts; with `stop` the stop is there from the beginning.
fn run(broker: Scripted, all: Vec<Part>, stop: bool) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal.db");
    let progress = Progress::new(Arc::new(Cursor::new("s", 0)));
    let token = CancellationToken::new();
    let delivery = Delivery {
        progress: progress.clone(),
        dead: DeadLetters::new(&journal, "s"),
        watch: Arc::new(Nobody),
        stop: token.clone(),
    };
    if stop {
        token.cancel();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(async {
        let (parts, parts_rx) = mpsc::channel(all.len().max(1));
        for part in all {
            parts.send(part).await.unwrap();
        }
        drop(parts);
        delivery.run(broker.clone(), parts_rx).await
    });
    let dead = std::fs::read_to_string(folder.path().join("journal.db.s.dead.ndjson"));
    Ran {
        result,
        calls: broker.calls.borrow().clone(),
        connects: *broker.connects.borrow(),
        progress,
        dead: dead.unwrap_or_default(),
    }
}

fn scripted(acts: &[Act]) -> Scripted {
    Scripted { acts: Rc::new(RefCell::new(acts.iter().copied().collect())), ..Scripted::default() }
}

#[test]
fn after_a_failure_it_goes_on_with_the_first_message_that_was_not_acknowledged() {
    let acts = [Act::Fail(3, Code::Timeout), Act::Fail(0, Code::Error), Act::Done(7)];
    let ran = run(scripted(&acts), vec![part(1, 10, 12), part(13, 14, 14)], false);
    ran.result.unwrap();
    assert_eq!(ran.calls, [(1, 10), (4, 10), (4, 10), (13, 14)]);
    assert_eq!(ran.connects, 3, "each failure but the first connection makes a new one");
    let it = &ran.progress;
    assert_eq!(it.cursor.get(), 14);
    let counts = [&it.sent, &it.acked, &it.duplicates, &it.retries, &it.dead];
    assert_eq!(counts.map(|it| it.load(Relaxed)), [26, 12, 3, 2, 0]);
    assert_eq!((it.errors(Code::Timeout), it.errors(Code::Error)), (1, 1));
    assert_eq!(it.oldest_unacked(), Duration::ZERO, "nothing is in hand");
}

#[test]
fn the_cursor_stands_at_the_last_acknowledged_message_while_the_broker_is_away() {
    let acts = [Act::Fail(3, Code::Closed)];
    let ran = run(scripted(&acts), vec![part(1, 10, 12)], false);
    assert_eq!(format!("{:#}", ran.result.unwrap_err()), "on cue");
    assert_eq!(ran.progress.cursor.get(), 3);
}

#[test]
fn a_message_that_is_too_large_is_set_aside_and_the_rest_goes_on() {
    let acts = [Act::Fail(2, Code::TooLarge), Act::Fail(0, Code::TooLarge)];
    let ran = run(scripted(&acts), vec![part(1, 5, 5)], false);
    ran.result.unwrap();
    assert_eq!(ran.calls, [(1, 5), (4, 5), (5, 5)], "on the same connection");
    assert_eq!((ran.connects, ran.dead.as_str()), (1, "{\"seq\":3}\n{\"seq\":4}\n"));
    assert_eq!((ran.progress.cursor.get(), ran.progress.dead.load(Relaxed)), (5, 2));
}

#[test]
fn a_broker_that_acknowledges_less_than_it_says_is_not_believed() {
    let acts = [Act::Done(2)];
    let ran = run(scripted(&acts), vec![part(1, 3, 3)], false);
    ran.result.unwrap();
    assert_eq!(ran.calls, [(1, 3), (3, 3)]);
}

#[test]
fn nothing_wanted_moves_the_cursor_too() {
    let empty = Part { messages: vec![], cursor: 900, lost: 7 };
    let ran = run(scripted(&[]), vec![empty], false);
    ran.result.unwrap();
    assert_eq!(ran.calls, []);
    assert_eq!((ran.progress.cursor.get(), ran.progress.lost.load(Relaxed)), (900, 7));
}

#[test]
fn a_stop_delivers_what_is_there_but_does_not_wait_for_a_broker_that_is_away() {
    let ran = run(scripted(&[]), vec![part(1, 3, 3)], true);
    ran.result.unwrap();
    assert_eq!(ran.progress.cursor.get(), 3);
    let away = Scripted { refuse: true, ..scripted(&[]) };
    let start = Instant::now();
    let ran = run(away, vec![part(1, 3, 3)], true);
    ran.result.unwrap();
    assert_eq!((ran.connects, ran.progress.cursor.get()), (1, 0));
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn waits_grow_with_jitter_and_a_refused_login_is_not_tried_in_haste() {
    let mut trouble = Trouble::default();
    let fault = |code| Fault::new(code, anyhow::anyhow!("x"));
    for most in [500, 1000, 2000, 4000, 8000, 15_000, 15_000] {
        assert!(trouble.wait(&fault(Code::Refused)) <= Duration::from_millis(most));
    }
    assert_eq!(trouble.wait(&fault(Code::Auth)), AFTER_AUTH);
}

#[test]
fn events_that_are_set_aside_are_told_every_ten_seconds_with_how_many_there_were() {
    let (mut aside, start) = (Aside::default(), Instant::now());
    let at = |aside: &mut Aside, ms| aside.count(start + Duration::from_millis(ms));
    assert_eq!(at(&mut aside, 0), Some(0));
    assert_eq!([1, 2, 9_999].map(|it| at(&mut aside, it)), [None; 3]);
    assert_eq!(at(&mut aside, 10_000), Some(3));
    assert_eq!(at(&mut aside, 10_001), None);
    assert_eq!(aside.unsaid, 1, "told when the sink ends");
}

/// What the log gets.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_thousand_events_that_are_too_large_make_two_lines() {
    let acts = [Act::Fail(0, Code::TooLarge); 1000];
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    let ran = tracing::subscriber::with_default(subscriber.finish(), || {
        run(scripted(&acts), vec![part(1, 1000, 1000)], false)
    });
    ran.result.unwrap();
    assert_eq!((ran.dead.lines().count(), ran.progress.dead.load(Relaxed)), (1000, 1000));
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = text.lines().filter(|it| it.contains("ERROR")).collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].contains("more=0") && lines[1].contains("more=999"), "{text}");
}
