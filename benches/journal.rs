//! How many events the journal takes and what one costs: commits of 256 as under full load, and
//! of one as for an idle stream, then what a following reader costs while nothing happens.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    event::{Event, Kind},
    journal::{
        filter::Filter,
        read::Reader,
        retain::Retain,
        writer::{COMMIT_MAX, Writer},
    },
};

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("journal.db");
    let retain = Retain { bytes: Some(256 << 20), ..Retain::default() };
    let mut writer = Writer::open(&path, retain).expect("opens");
    measure("commits of 256, growing", &mut writer, 150_000, COMMIT_MAX);
    measure("commits of 256, at the limit of 256 MiB", &mut writer, 300_000, COMMIT_MAX);
    measure("commits of 1", &mut writer, 2_000, 1);
    read(&path);
    idle(&path);
}

/// An event as large as a published one with five labels.
fn event(number: usize) -> Event {
    let label = |it| {
        format!(
            "{{\"rank\":{it},\"label_id\":656,\"wnid\":\"n03770679\",\"label\":\"minivan\",\
             \"confidence\":0.612345}}"
        )
    };
    let top = (1..=5).map(label).collect::<Vec<_>>().join(",");
    let rest = "x".repeat(480);
    Event {
        kind: Kind::FrameClassified,
        stream: Some("front".into()),
        epoch: Some(0),
        source: "/ghostwatch/bench/streams/front".into(),
        time: SystemTime::now(),
        data: format!("{{\"frame\":{number},\"rest\":\"{rest}\",\"top\":[{top}]}}"),
    }
}

fn measure(what: &str, writer: &mut Writer, total: usize, commit: usize) {
    let template: Vec<_> = (0..commit).map(event).collect();
    let mut commits = Vec::new();
    let (start, cpu) = (Instant::now(), cpu_time());
    for _ in 0..total.div_ceil(commit) {
        let mut events = template.clone();
        let begin = Instant::now();
        writer.append(&mut events).expect("appends");
        commits.push(begin.elapsed());
    }
    let (wall, cpu) = (start.elapsed(), cpu_time() - cpu);
    let events = (commits.len() * commit) as f64;
    commits.sort();
    let at = |share: usize| commits[(commits.len() - 1) * share / 100].as_secs_f64() * 1e3;
    println!(
        "{what}: {:.0} events/s, {:.1} us of CPU per event; commit p50 {:.2} ms, p99 {:.2} ms, \
         longest {:.1} ms; {} MiB",
        events / wall.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / events,
        at(50),
        at(99),
        at(100),
        writer.stats().size_bytes >> 20,
    );
}

fn read(path: &Path) {
    let mut reader = Reader::open(path).expect("opens");
    let mut cursor = reader.oldest().expect("readable") - 1;
    let (start, mut events) = (Instant::now(), 0);
    loop {
        let page = reader.page(cursor, &Filter::default(), 512).expect("a page");
        if page.cursor == cursor {
            break;
        }
        (cursor, events) = (page.cursor, events + page.records.len());
    }
    println!("reading: {:.0} events/s", events as f64 / start.elapsed().as_secs_f64());
}

fn idle(path: &Path) {
    let mut reader = Reader::open(path).expect("opens");
    let cursor = reader.latest().expect("readable");
    let (start, cpu) = (Instant::now(), cpu_time());
    while start.elapsed() < Duration::from_secs(10) {
        reader.wait(Duration::from_secs(1));
        reader.page(cursor, &Filter::default(), 512).expect("a page");
    }
    let share = (cpu_time() - cpu).as_secs_f64() / start.elapsed().as_secs_f64();
    println!("following, nothing new: {:.4} % of a core", share * 100.0);
}

/// User and system time of this process, from the kernel's count of nanoseconds on a CPU.
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/self/schedstat").expect("Linux counts CPU time");
    let nanos = text.split_whitespace().next().expect("three numbers").parse();
    Duration::from_nanos(nanos.expect("a number"))
}
