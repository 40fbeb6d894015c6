//! Sinks on a real journal, and what the servers hold afterwards.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    event::{Event, Kind},
    journal::{cursor::Cursor, filter::Filter, read::Reader, retain::Retain, writer::Writer},
    sink::{
        Sink, Sinks,
        deliver::Watch,
        progress::Progress,
        settings::{Select, Target},
    },
};
use redis::streams::StreamRangeReply;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    nats, redis as redis_server,
    support::within,
    support_server::{Server, run},
};

/// The server that the figures are about.
pub(crate) fn nats_server(more: &str) -> Server {
    let newest = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/nats-server-2.15.1");
    nats::server(&newest, more)
}

pub(crate) fn nats_target(server: &Server) -> Target {
    Target::Nats(nats::settings(server))
}

pub(crate) fn redis_target(server: &Server) -> Target {
    Target::Redis(redis_server::settings(server))
}

/// Waits longer than `wait_until`: a sink finds a server that has come back after up to 15 s.
pub(crate) fn wait_long(what: &str, f: impl Fn() -> bool) {
    let deadline = within(90_000);
    while !f() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

struct Nobody;

impl Watch for Nobody {
    fn acked(&self, _: &str, _: Duration, _: Option<Duration>) {}
}

/// A journal with its writer.
pub(crate) struct Journal {
    folder: TempDir,
    pub(crate) writer: Writer,
    number: u64,
}

impl Journal {
    pub(crate) fn new(retain: Retain) -> Journal {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::open(&folder.path().join("journal.db"), retain).unwrap();
        Journal { folder, writer, number: 0 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("journal.db")
    }

    /// Registers sinks and starts them.
    pub(crate) fn start(
        &mut self,
        sinks: Vec<(&str, Target, Select)>,
    ) -> (Sinks, Vec<Arc<Progress>>) {
        let mut sink = |(name, target, select)| {
            let cursor: Arc<Cursor> = self.writer.cursor(name).unwrap();
            Sink { target, select, progress: Progress::new(cursor) }
        };
        let sinks: Vec<Sink> = sinks.into_iter().map(&mut sink).collect();
        let progress = sinks.iter().map(|it| it.progress.clone()).collect();
        let watch: Arc<dyn Watch> = Arc::new(Nobody);
        (Sinks::start(sinks, &self.path(), "t", &watch).unwrap(), progress)
    }

    /// Appends frames of three streams in turn, about 1,000 bytes each, in the largest commits.
    pub(crate) fn append(&mut self, count: u64) {
        self.append_sized(count, 640);
    }

    pub(crate) fn append_sized(&mut self, count: u64, pad: usize) {
        let (mut left, pad) = (count, "x".repeat(pad));
        while 0 < left {
            let some = left.min(256);
            let mut events: Vec<_> = (0..some).map(|it| event(self.number + it, &pad)).collect();
            self.writer.append(&mut events).unwrap();
            self.number += some;
            left -= some;
        }
    }

    /// Every event that is there.
    pub(crate) fn events(&self) -> Vec<String> {
        read_all(&self.path())
    }

    /// Stops the sinks as the daemon does; everything is delivered before.
    pub(crate) fn finish(&mut self, sinks: Sinks, progress: &[Arc<Progress>]) {
        let last = self.writer.stats().next - 1;
        for it in progress {
            let what = format!("sink {} has everything", it.cursor.sink());
            wait_long(&what, || it.cursor.get() == last);
        }
        assert_eq!(sinks.ended(), None);
        sinks.stop(within(8_000)).unwrap();
    }
}

/// Every event of a journal.
pub(crate) fn read_all(path: &Path) -> Vec<String> {
    let mut reader = Reader::open(path).unwrap();
    let (mut cursor, mut all) = (0, Vec::new());
    loop {
        let page = reader.page(cursor, &Filter::default(), 256).unwrap();
        if page.cursor == cursor {
            return all;
        }
        cursor = page.cursor;
        all.extend(page.records.into_iter().map(|it| it.json));
    }
}

/// A frame whose best label has 0.0 to 0.9 in turn.
fn event(number: u64, pad: &str) -> Event {
    let stream = ["front", "yard", "gate"][number as usize % 3];
    let best = (number % 10) as f32 / 10.0;
    Event {
        kind: if number % 10 == 7 { Kind::StreamState } else { Kind::FrameClassified },
        stream: Some(stream.into()),
        epoch: Some(0),
        source: format!("/ghostwatch/t/streams/{stream}"),
        time: SystemTime::now(),
        data: format!(
            r#"{{"stream":"{stream}","top":[{{"rank":1,"label_id":7,"label":"cock","confidence":{best}}},{{"rank":2,"label_id":8,"label":"hen","confidence":0.0}}],"pad":"{pad}"}}"#
        ),
    }
}

/// The id of an event.
pub(crate) fn id(json: &str) -> String {
    json.split(r#""id":""#).nth(1).unwrap().split('"').next().unwrap().to_owned()
}

/// Its place, which is in its id.
pub(crate) fn ids(events: &[String]) -> Vec<String> {
    events.iter().map(|it| id(it)).collect()
}

/// What NATS holds, in its order.
pub(crate) fn in_nats(server: &Server) -> Vec<String> {
    const READERS: u64 = 32;
    let url = format!("127.0.0.1:{}", server.port());
    run(async {
        let context = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
        let mut stream = context.get_stream("GHOSTWATCH").await.unwrap();
        let state = stream.info().await.unwrap().state.clone();
        let each = state.last_sequence / READERS + 1;
        let part = |nth: u64| {
            let context = context.clone();
            tokio::spawn(async move {
                let stream = context.get_stream("GHOSTWATCH").await.unwrap();
                let mut part = Vec::new();
                for seq in (nth * each + 1)..=((nth + 1) * each).min(state.last_sequence) {
                    let it = stream.get_raw_message(seq).await.unwrap();
                    part.push(String::from_utf8(it.payload.to_vec()).unwrap());
                }
                part
            })
        };
        let mut all = Vec::new();
        for it in (0..READERS).map(part).collect::<Vec<_>>() {
            all.extend(it.await.unwrap());
        }
        all
    })
}

/// What all keys of Redis hold, in the order of the journal.
pub(crate) fn in_redis(server: &Server) -> Vec<String> {
    let mut client = redis_server::client(server);
    let keys: Vec<String> = redis::cmd("KEYS").arg("ghostwatch:*").query(&mut client).unwrap();
    let mut all = Vec::new();
    for key in keys {
        let found: StreamRangeReply =
            redis::cmd("XRANGE").arg(key).arg("-").arg("+").query(&mut client).unwrap();
        let place = |it: &str| it.split('-').next().unwrap().parse::<u64>().unwrap();
        let entry =
            |it: &redis::streams::StreamId| (place(&it.id), it.get::<String>("event").unwrap());
        all.extend(found.ids.iter().map(entry));
    }
    all.sort_by_key(|it| it.0);
    all.into_iter().map(|it| it.1).collect()
}

/// Checks that a consumer has the journal: every event, in order, repetitions only of the same
/// event. Gives how many repetitions there are.
pub(crate) fn check_complete(found: &[String], journal: &[String], what: &str) -> usize {
    let mut seen = std::collections::HashMap::new();
    let mut first = Vec::new();
    for json in found {
        match seen.insert(id(json), json) {
            None => first.push(json.clone()),
            Some(before) => assert_eq!(before, json, "{what}: the same id means the same event"),
        }
    }
    let differs = first.iter().zip(journal).position(|it| it.0 != it.1);
    let (have, want) = (first.len(), journal.len());
    assert_eq!(differs, None, "{what}: {:?}", differs.map(|it| (id(&first[it]), id(&journal[it]))));
    assert_eq!(have, want, "{what}");
    found.len() - first.len()
}

/// The value of a series in what a daemon's `/metrics` says.
pub(crate) fn metric(listen: &str, series: &str) -> Option<f64> {
    let text = crate::end_to_end::get(listen, "/metrics")?;
    let line = text.lines().find_map(|it| it.strip_prefix(&format!("ghostwatch_{series} ")));
    line.map(|it| it.parse().unwrap())
}

/// An event as JSON.
pub(crate) fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}
