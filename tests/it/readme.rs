//! What the README says to type: it is taken from there and run.

use std::{
    fs::{self, File},
    net::TcpStream,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::{
    end_to_end::{FRAME, configure, drain, events, ghostwatch, root, start},
    mqtt, redis as redis_server,
    sinks_daemon::with_sinks,
    support::wait_until,
    support_broker::free_port,
    support_sinks::{metric, nats_server, wait_long},
};

const STREAM: &str = "  p: {url: \"test:?size=64x48&fps=50\", realtime: true}\n";
/// So many lines of each consumer are compared.
const LINES: usize = 20;

/// The code block after the line `<!-- marker -->`.
fn block(marker: &str) -> String {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, rest) = text.split_once(&format!("\n<!-- {marker} -->\n```")).expect(marker);
    let (_, rest) = rest.split_once('\n').unwrap();
    rest.split_once("\n```\n").unwrap().0.to_owned()
}

/// An example while it runs in a shell; ended with all its children when it is dropped.
struct Example {
    child: Child,
    printed: PathBuf,
}

impl Example {
    /// Runs it with each of `changes` made, which the README's own text must need.
    fn start(folder: &Path, name: &str, changes: &[(&str, String)]) -> Example {
        let mut text = block(&format!("consumer: {name}"));
        for (from, to) in changes {
            assert!(text.contains(from), "{name}: no {from:?} in {text}");
            text = text.replace(from, to);
        }
        let printed = folder.join(format!("{name}.printed"));
        let child = Command::new("bash")
            .args(["-c", &text])
            .current_dir(root())
            .stdin(Stdio::null())
            .stdout(File::create(&printed).unwrap())
            .stderr(File::create(folder.join(format!("{name}.said"))).unwrap())
            .process_group(0)
            .spawn()
            .unwrap();
        Example { child, printed }
    }

    /// The complete lines of what it has printed.
    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.printed).unwrap();
        let complete = text.rsplit_once('\n').map_or("", |it| it.0);
        complete.lines().map(str::to_owned).collect()
    }

    /// Its first lines; what went wrong is shown if they do not come.
    fn first(&self, count: usize) -> Vec<String> {
        let said = self.printed.with_extension("said");
        wait_until(&format!("{count} lines; errors are in {}", said.display()), || {
            let error = fs::read_to_string(&said).unwrap();
            assert!(error.is_empty(), "{error}");
            count <= self.lines().len()
        });
        self.lines().drain(..count).collect()
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // It may have ended by itself.
        kill_process_group(Pid::from_child(&self.child), Signal::KILL).ok();
        self.child.wait().unwrap();
    }
}

#[test]
fn the_sinks_in_the_readme_are_a_valid_configuration() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), STREAM);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let mut sinks = block("sinks");
    if !cfg!(feature = "kafka") {
        sinks =
            sinks.lines().filter(|it| !it.contains("type: kafka")).collect::<Vec<_>>().join("\n");
    }
    fs::write(path, text.replace("  p:", "  front:") + &sinks).unwrap();
    let output = ghostwatch(folder.path()).arg("check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// The words of a consumer's line about an event.
fn words(event: &Value, paths: &[&str]) -> String {
    let word = |it: &&str| event.pointer(it).unwrap().as_str().unwrap().to_owned();
    paths.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Checks that a consumer has printed the first events that it gets, in their order.
fn compare(name: &str, lines: &[String], journal: &[Value]) {
    let frames = journal.iter().filter(|it| it["type"] == FRAME);
    let all: Vec<&Value> = match name {
        "webhook" | "file" => journal.iter().collect(),
        _ => frames.collect(),
    };
    for (line, event) in lines.iter().zip(all) {
        match name {
            "nats" => assert_eq!(*line, words(event, &["/id", "/subject", "/data/top/0/label"])),
            "webhook" => assert_eq!(*line, words(event, &["/id", "/type"])),
            _ => {
                let json = if name == "kafka" { line.strip_prefix("p ").unwrap() } else { line };
                assert_eq!(serde_json::from_str::<Value>(json).unwrap(), *event, "{name}");
            }
        }
    }
}

#[cfg(feature = "kafka")]
#[test]
fn the_kafka_consumer_in_the_readme_reads_what_is_in_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let server = crate::kafka::tansu(&folder, &[]);
    let place = format!("127.0.0.1:{}", server.port);
    let sink = format!("  - {{type: kafka, servers: [\"{place}\"]}}\n");
    let listen = with_sinks(folder.path(), STREAM, &sink);
    let child = start(folder.path());
    let acked = || metric(&listen, "sink_acked_total{sink=\"kafka\"}").unwrap_or_default();
    wait_long("some frames", || LINES as f64 + 10.0 <= acked());
    let example = Example::start(folder.path(), "kafka", &[("127.0.0.1:9092", place)]);
    let lines = example.first(LINES);
    drain(child, folder.path());
    compare("kafka", &lines, &events(folder.path()));
}

#[test]
fn the_consumers_in_the_readme_read_what_is_in_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let (nats, redis) = (nats_server("").started(), redis_server::server(&[]).started());
    let (mosquitto, hook) = (mqtt::quiet_mosquitto(&folder), free_port());
    let receiver = Example::start(
        folder.path(),
        "webhook",
        &[("\"127.0.0.1\", 8080", format!("\"127.0.0.1\", {hook}"))],
    );
    wait_until("the receiver listens", || TcpStream::connect(("127.0.0.1", hook)).is_ok());
    let sinks = format!(
        "  - {{type: nats, servers: [\"nats://127.0.0.1:{}\"]}}\n  \
         - {{type: redis, url: \"redis://127.0.0.1:{}\"}}\n  \
         - {{type: mqtt, url: \"mqtt://127.0.0.1:{}\"}}\n  \
         - {{type: webhook, url: \"http://127.0.0.1:{hook}/events\"}}\n  \
         - {{type: file, path: data/events.ndjson}}\n",
        nats.port(),
        redis.port(),
        mosquitto.port
    );
    let listen = with_sinks(folder.path(), STREAM, &sinks);
    let child = start(folder.path());
    for sink in ["nats", "redis", "mqtt"] {
        let series = format!("sink_acked_total{{sink=\"{sink}\"}}");
        wait_long(sink, || 10.0 < metric(&listen, &series).unwrap_or_default());
    }

    let example =
        |name: &str, from: &str, to: String| Example::start(folder.path(), name, &[(from, to)]);
    let file = folder.path().join("data/events.ndjson").display().to_string();
    let all = [
        ("nats", example("nats", "127.0.0.1:4222", format!("127.0.0.1:{}", nats.port()))),
        ("redis", example("redis", "redis-cli", format!("redis-cli -p {}", redis.port()))),
        ("webhook", receiver),
        ("file", example("file", "data/events.ndjson", file)),
    ];
    let label = example("mqtt", "mosquitto_sub", format!("mosquitto_sub -p {}", mosquitto.port));
    let label = label.first(1).remove(0);
    let printed = all.map(|(name, it)| (name, it.first(LINES)));
    drain(child, folder.path());

    let journal = events(folder.path());
    for (name, lines) in printed {
        compare(name, &lines, &journal);
    }
    let label: Value =
        serde_json::from_str(label.strip_prefix("ghostwatch/p/label ").unwrap()).unwrap();
    let event = journal.iter().find(|it| it["id"] == label["id"]).expect("it names its event");
    assert_eq!(label["label"], event["data"]["top"][0]["label"]);
}
