//! The journal under the real daemon: what a refusal costs, and how soon an event is seen.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use ghostwatch::journal::{filter::Filter, read::Reader};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    end_to_end::{account, configure, drain, events, get, published, start},
    support::{size, wait_until, within},
};

const STREAM: &str = "  p: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";

fn refused(listen: &str) -> u64 {
    let text = get(listen, "/metrics").unwrap_or_default();
    let mine = |it: &&str| {
        it.starts_with("ghostwatch_frames_dropped_total{")
            && it.contains("reason=\"journal\"")
            && it.contains("stream=\"p\"")
    };
    let value = text.lines().find(mine).and_then(|it| it.rsplit(' ').next());
    value.map_or(0, |it| it.parse::<f64>().unwrap() as u64)
}

/// Lets the journal refuse writes for a while, again and again; whatever happens in between, the
/// daemon stays up. Gives the frames that the journal refused.
fn refuse(listen: &str, begin: &mut dyn FnMut(), end: &mut dyn FnMut()) -> u64 {
    wait_until("some frames", || 20 < published(listen, "p"));
    for _ in 0..size(2, 20) {
        let before = refused(listen);
        begin();
        wait_until("frames are refused", || before + 5 < refused(listen));
        let ready = get(listen, "/readyz?verbose").unwrap();
        assert!(ready.contains("[-] journal: takes no events"), "{ready}");
        end();
        let before = published(listen, "p");
        wait_until("the journal takes events again", || before + 20 < published(listen, "p"));
    }
    wait_until("the journal counts as writable", || {
        get(listen, "/readyz").is_some_and(|it| it.starts_with("HTTP/1.1 200"))
    });
    let metrics = get(listen, "/metrics").unwrap();
    assert!(metrics.contains("\nghostwatch_frames_unaccounted 0\n"), "{metrics}");
    refused(listen)
}

/// Every frame is in the journal or in the `skipped` of the event after it, by its reason.
fn check_account(folder: &Path, refused: u64) {
    let events = events(folder);
    let mut skipped = BTreeMap::<String, u64>::new();
    for event in &events {
        for (reason, count) in event["data"]["skipped"].as_object().into_iter().flatten() {
            *skipped.entry(reason.clone()).or_default() += count.as_u64().unwrap();
        }
    }
    let (decoded, published) = account(&events)["p"];
    println!("{decoded} decoded, {published} published, skipped {skipped:?}");
    assert_eq!(skipped["journal"], refused, "{skipped:?}");
    assert_eq!(decoded, published + skipped.values().sum::<u64>());
}

#[test]
fn a_journal_that_another_process_locks_costs_frames_and_then_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let listen = configure(folder.path(), STREAM);
    let child = start(folder.path());
    wait_until("the daemon is up", || 0 < published(&listen, "p"));
    let other = rusqlite::Connection::open(folder.path().join("journal.db")).unwrap();
    other.busy_timeout(Duration::from_secs(5)).unwrap();
    let refused =
        refuse(&listen, &mut || other.execute_batch("BEGIN IMMEDIATE").unwrap(), &mut || {
            other.execute_batch("ROLLBACK").unwrap()
        });
    drop(other);
    drain(child, folder.path());
    check_account(folder.path(), refused);
}

/// A small file system that only processes which [`Small::enter`] it see, and that goes with it.
struct Small {
    holder: Child,
    user: bool,
}

impl Small {
    /// Mounts one at `path`.
    fn mount(path: &Path, size: &str) -> Small {
        // Root may mount at once, anyone else in a user namespace of their own.
        let user = !rustix::process::geteuid().is_root();
        let mut command = Command::new("unshare");
        command.args(if user {
            &["--user", "--map-root-user", "--mount"][..]
        } else {
            &["--mount"]
        });
        let script = "mount -t tmpfs -o size=$1 tmpfs \"$0\" && echo mounted && exec cat";
        let mut holder = command
            .args(["sh", "-c", script])
            .arg(path)
            .arg(size)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 8];
        holder.stdout.as_mut().unwrap().read_exact(&mut said).expect("the mount works");
        assert_eq!(&said, b"mounted\n");
        Small { holder, user }
    }

    fn enter(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--mount"]);
        if self.user {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg(program);
        command
    }

    /// A file inside, as seen from outside.
    fn inside(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").unwrap();
        Path::new("/proc").join(self.holder.id().to_string()).join("root").join(relative)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.holder.kill().ok();
        self.holder.wait().ok();
    }
}

/// Takes all the space that is left.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    // First in large pieces, then to the last byte.
    for piece in [1 << 16, 1] {
        while file.write_all(&vec![0; piece]).is_ok() {}
    }
}

#[test]
fn a_full_disk_costs_frames_and_then_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().canonicalize().unwrap();
    let mounted = home.join("small");
    fs::create_dir(&mounted).unwrap();
    let small = Small::mount(&mounted, "32m");
    let listen = configure(&home, STREAM);
    let config = fs::read_to_string(home.join("config.yaml")).unwrap();
    let path = home.join("config.yaml");
    fs::write(&path, config.replace("journal.db", "small/journal.db")).unwrap();
    let log = fs::File::create(home.join("log")).unwrap();
    let child = small
        .enter(Path::new(env!("CARGO_BIN_EXE_ghostwatch")))
        .arg("--config")
        .arg(&path)
        .arg("run")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let ballast = small.inside(&mounted.join("ballast"));
    let refused =
        refuse(&listen, &mut || fill(&ballast), &mut || fs::remove_file(&ballast).unwrap());
    drain(child, &home);
    // The file system goes with its last process; what was in it is read from a copy.
    fs::copy(small.inside(&mounted.join("journal.db")), home.join("journal.db")).unwrap();
    fs::write(&path, config).unwrap();
    check_account(&home, refused);
}

fn millis(event: &Value, part: &str) -> f64 {
    event["data"]["latency_us"][part].as_f64().unwrap() / 1e3
}

/// For each event of an idle stream: how long after its frame's arrival this process saw it, less
/// decoding and inference, and the whole.
fn watch(reader: &mut Reader, cursor: &mut u64, events: usize) -> Vec<(f64, f64)> {
    let deadline = within(60_000);
    let mut all = Vec::new();
    while all.len() < events {
        assert!(std::time::Instant::now() < deadline, "only {} of {events} events", all.len());
        reader.wait(Duration::from_secs(1));
        let page = reader.page(*cursor, &Filter::default(), 100).unwrap();
        let now = SystemTime::now();
        *cursor = page.cursor;
        for record in page.records {
            let event: Value = serde_json::from_str(&record.json).unwrap();
            let Some(at) = event["data"]["ingest_time"].as_str() else { continue };
            let at = SystemTime::from(OffsetDateTime::parse(at, &Rfc3339).unwrap());
            let whole = now.duration_since(at).unwrap_or_default().as_secs_f64() * 1e3;
            all.push((whole - millis(&event, "decode") - millis(&event, "inference"), whole));
        }
    }
    all
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = of.collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

#[test]
fn an_idle_streams_event_is_seen_elsewhere_5_ms_after_decoding_and_inference() {
    let folder = tempfile::tempdir().unwrap();
    let listen =
        configure(folder.path(), "  p: {url: \"test:?size=320x240&fps=10\", realtime: true}\n");
    let child = start(folder.path());
    wait_until("the daemon is up", || 2 < published(&listen, "p"));
    let mut reader = Reader::open(&folder.path().join("journal.db")).unwrap();
    let mut cursor = reader.latest().unwrap();
    // Other tests and other users of the machine take the processor for longer than this allows;
    // one quiet stretch of five seconds in two minutes shows what the daemon itself needs.
    let mut medians = Vec::new();
    let events = size(50, 500);
    for _ in 0..24 {
        let seen = watch(&mut reader, &mut cursor, events);
        let (rest, whole) =
            (median(seen.iter().map(|it| it.0)), median(seen.iter().map(|it| it.1)));
        println!(
            "{events} events: seen after {whole:.2} ms, {rest:.2} ms more than decoding and inference (medians)"
        );
        medians.push(rest);
        if rest <= 5.0 {
            break;
        }
    }
    drain(child, folder.path());
    assert!(medians.iter().any(|it| *it <= 5.0), "medians of {medians:?} ms");
}

#[test]
fn what_is_gone_with_a_damaged_or_removed_journal_is_an_event_and_a_count() {
    let folder = tempfile::tempdir().unwrap();
    let listen = configure(folder.path(), STREAM);
    let path = folder.path().join("journal.db");
    let damage = || fs::write(&path, "not a database ".repeat(1000)).unwrap();
    let remove = || fs::remove_file(&path).unwrap();
    for (spoil, is_moved) in [(&damage as &dyn Fn(), true), (&remove, false)] {
        let child = start(folder.path());
        wait_until("some frames", || 5 < published(&listen, "p"));
        drain(child, folder.path());
        let reader = Reader::open(&path).unwrap();
        let (id, last) = (reader.id().unwrap(), reader.latest().unwrap());
        drop(reader);
        spoil();
        let child = start(folder.path());
        wait_until("some frames of the new one", || 5 < published(&listen, "p"));
        let metrics = get(&listen, "/metrics").unwrap();
        let lost =
            format!("ghostwatch_journal_lost_events_total{{reason=\"corruption\"}} {last}\n");
        assert!(metrics.contains(&lost), "{lost}{metrics}");
        drain(child, folder.path());
        let gap = &events(folder.path())[0];
        assert_eq!(gap["type"], "io.ghostwatch.journal.gap.v1", "{gap}");
        let data = &gap["data"];
        assert_eq!((&data["journal"], &data["events"]), (&id.into(), &last.into()), "{gap}");
        let moved = data["moved_to"].as_str().map(|it| Path::new(it).exists());
        assert_eq!(moved, is_moved.then_some(true), "{gap}");
        assert!(data["detail"].is_string(), "{gap}");
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert!(log.contains(&format!("{last} events (1 to {last}) are gone")), "{log}");
    }
}
