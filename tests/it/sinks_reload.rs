//! What a reload does to sinks and to what the journal keeps, by the real program.

use std::{fs, path::Path, process::Child};

use ghostwatch::journal::read::Reader;

use crate::{
    end_to_end::{configure, drain, events, get, published, signal, start},
    support::wait_until,
    support_sinks::{id, ids, metric, read_all, wait_long},
};

const STREAM: &str = "  p: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";

fn file_sink(name: &str, file: &str) -> String {
    format!("  - {{type: file, name: {name}, path: {file}}}\n")
}

fn lines(folder: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
    // The last line may be half written.
    text.lines().filter(|it| it.ends_with("}}")).map(str::to_owned).collect()
}

/// The number of a daemon's thread of this name; a thread that is started anew has another.
fn thread(child: &Child, name: &str) -> Option<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let mine = tasks.filter_map(Result::ok).find(|it| {
        fs::read_to_string(it.path().join("comm")).is_ok_and(|it| it.trim_end() == name)
    })?;
    Some(mine.file_name().into_string().unwrap())
}

/// Sequence numbers of events, which are without a hole and without a repetition.
fn numbers(events: &[String]) -> (u64, u64) {
    let number = |it: &String| id(it).rsplit('-').next().unwrap().parse::<u64>().unwrap();
    let all: Vec<u64> = events.iter().map(number).collect();
    assert!(all.windows(2).all(|it| it[0] + 1 == it[1]), "{all:?}");
    (all[0], *all.last().unwrap())
}

/// A daemon whose configuration is written anew and reloaded.
struct Daemon {
    folder: tempfile::TempDir,
    listen: String,
    base: String,
    child: Child,
}

impl Daemon {
    fn start(sinks: &str) -> Daemon {
        let folder = tempfile::tempdir().unwrap();
        let listen = configure(folder.path(), STREAM);
        let path = folder.path().join("config.yaml");
        let base = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{base}sinks:\n{sinks}")).unwrap();
        let child = start(folder.path());
        Daemon { folder, listen, base, child }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn said(&self, what: &str) -> usize {
        fs::read_to_string(self.path().join("log")).unwrap().matches(what).count()
    }

    /// Reloads another text; it must be taken, or be refused.
    fn reload(&self, text: &str, taken: bool) {
        let what = if taken { "configuration reloaded" } else { "configuration refused" };
        let before = self.said(what);
        fs::write(self.path().join("config.yaml"), text).unwrap();
        signal(&self.child, "HUP");
        wait_until(what, || before < self.said(what));
    }

    fn sinks(&self, sinks: &str) {
        self.reload(&format!("{}sinks:\n{sinks}", self.base), true);
    }

    fn has_series(&self, sink: &str) -> bool {
        let metrics = get(&self.listen, "/metrics").unwrap_or_default();
        metrics.contains(&format!("sink=\"{sink}\""))
    }

    fn drain(self) -> tempfile::TempDir {
        drain(self.child, self.folder.path());
        self.folder
    }
}

#[test]
fn a_reload_adds_changes_and_removes_sinks_and_touches_no_other() {
    let a = file_sink("a", "a.ndjson");
    let daemon = Daemon::start(&a);
    let count = |file: &str| lines(daemon.path(), file).len();
    wait_long("the first sink", || 20 < count("a.ndjson"));
    let untouched = thread(&daemon.child, "sink-a").unwrap();
    daemon.sinks(&(a.clone() + &file_sink("b", "b.ndjson")));
    wait_until("the new sink", || 20 < count("b.ndjson"));
    assert!(1 < numbers(&lines(daemon.path(), "b.ndjson")).0, "a new sink begins with what is new");

    daemon.sinks(&(a.clone() + &file_sink("b", "c.ndjson")));
    wait_until("the changed sink", || 20 < count("c.ndjson"));
    let both = || [lines(daemon.path(), "b.ndjson"), lines(daemon.path(), "c.ndjson")].concat();
    numbers(&both());
    let sent = || metric(&daemon.listen, "sink_acked_total{sink=\"b\"}").unwrap_or_default();
    wait_until("its counters go on", || both().len() as f64 <= sent() + 20.0);

    daemon.sinks(&a);
    wait_until("its series are gone", || !daemon.has_series("b"));
    assert_eq!(thread(&daemon.child, "sink-b"), None);
    let (before, seen) = (both().len(), published(&daemon.listen, "p"));
    wait_until("frames without it", || seen + 10 < published(&daemon.listen, "p"));
    assert_eq!(both().len(), before);

    daemon.sinks(&(a + &file_sink("b", "c.ndjson")));
    wait_until("what came in the meantime", || before + 20 < both().len());
    assert_eq!(thread(&daemon.child, "sink-a"), Some(untouched));
    let folder = daemon.drain();
    let journal = read_all(&folder.path().join("journal.db"));
    assert!(lines(folder.path(), "a.ndjson") == journal, "the untouched sink has everything once");
    let b = [lines(folder.path(), "b.ndjson"), lines(folder.path(), "c.ndjson")].concat();
    let (first, last) = numbers(&b);
    assert_eq!(last as usize, journal.len());
    assert_eq!(ids(&b), ids(&journal[first as usize - 1..]));
    events(folder.path());
}

#[test]
fn a_sink_that_was_taken_out_goes_on_where_it_was_after_a_restart() {
    let (a, b) = (file_sink("a", "a.ndjson"), file_sink("b", "b.ndjson"));
    let daemon = Daemon::start(&(a.clone() + &b));
    wait_long("events", || 20 < lines(daemon.path(), "b.ndjson").len());
    daemon.sinks(&a);
    wait_until("it is gone", || !daemon.has_series("b"));
    let seen = published(&daemon.listen, "p");
    wait_until("frames without it", || seen + 10 < published(&daemon.listen, "p"));
    let config = format!("{}sinks:\n{a}{b}", daemon.base);
    let listen = daemon.listen.clone();
    let folder = daemon.drain();
    fs::write(folder.path().join("config.yaml"), config).unwrap();
    let child = start(folder.path());
    wait_long("frames", || 10 < published(&listen, "p"));
    drain(child, folder.path());
    assert!(lines(folder.path(), "b.ndjson") == read_all(&folder.path().join("journal.db")));
}

#[test]
fn a_reload_that_is_wrong_or_needs_a_restart_leaves_the_sinks_alone() {
    let a = file_sink("a", "a.ndjson");
    let daemon = Daemon::start(&a);
    wait_long("the sink", || 5 < lines(daemon.path(), "a.ndjson").len());
    let untouched = thread(&daemon.child, "sink-a");
    daemon.reload(&format!("{}sinks: [{{type: nats}}]\n", daemon.base), false);
    assert_eq!(daemon.said("sinks[0].servers: a nats sink needs it"), 1);
    let elsewhere = daemon.base.replace("journal.db", "other.db");
    daemon.reload(&format!("{elsewhere}sinks: []\ninstance: other\n"), false);
    assert_eq!(daemon.said("a restart is needed to change instance, journal.path"), 1);
    assert_eq!(metric(&daemon.listen, "config_last_reload_successful"), Some(0.0));
    let before = lines(daemon.path(), "a.ndjson").len();
    wait_until("it goes on", || before + 5 < lines(daemon.path(), "a.ndjson").len());
    assert_eq!(thread(&daemon.child, "sink-a"), untouched);
    daemon.drain();
}

#[test]
fn a_reload_changes_what_the_journal_keeps() {
    let daemon = Daemon::start(&file_sink("a", "a.ndjson"));
    let oldest = || metric(&daemon.listen, "journal_oldest_sequence").unwrap_or_default();
    wait_long("events", || 20 < published(&daemon.listen, "p"));
    assert_eq!(oldest(), 1.0);
    // No file system has so much free: everything has to go.
    let text = fs::read_to_string(daemon.path().join("config.yaml")).unwrap();
    daemon.reload(&text.replace("keep_free: 0B", "keep_free: 1000TiB"), true);
    let journal = Reader::open(&daemon.path().join("journal.db")).unwrap();
    wait_until("the oldest events go", || 20 < journal.oldest().unwrap());
    daemon.reload(&text, true);
    let before = published(&daemon.listen, "p");
    wait_until("frames are taken again", || before + 20 < published(&daemon.listen, "p"));
    let there = oldest();
    assert!(20.0 < there, "the oldest are gone, as the metrics say too");
    let before = published(&daemon.listen, "p");
    wait_until("more frames", || before + 20 < published(&daemon.listen, "p"));
    assert_eq!(oldest(), there, "nothing goes any more");
    daemon.drain();
}
