//! Dashboard and alert rules: what a real Prometheus that watches the real daemon makes of them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::{
    end_to_end::{clip, drain, free_port, get, root, start},
    sinks_daemon::with_sinks,
    support::wait_until,
};

/// Panels that show nothing on a machine without an NVIDIA GPU: NVML, which gives these figures, is
/// part of its driver. Of their queries only the syntax is checked.
const NEEDS_GPU: [&str; 3] = ["GPU load", "GPU memory", "GPU temperature and power"];

/// One query of a panel.
#[derive(Debug)]
struct Query {
    panel: String,
    text: String,
}

fn dashboards(file: &str) -> PathBuf {
    root().join("dashboards").join(file)
}

/// Every query of the dashboard, with Grafana's variables filled in.
fn queries() -> Vec<Query> {
    let text = fs::read_to_string(dashboards("overview.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        let none = Vec::new();
        let targets = panel["targets"].as_array().unwrap_or(&none);
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{title}");
        for target in targets {
            let text = target["expr"].as_str().unwrap();
            let text = text.replace("$__rate_interval", "10s").replace("$stream", ".*");
            assert!(!text.contains('$'), "{title}: a variable that the test does not know: {text}");
            queries.push(Query { panel: title.to_owned(), text });
        }
    }
    assert!(!queries.is_empty());
    queries
}

/// Debian's Prometheus, until it is dropped.
struct Prometheus {
    child: Child,
    listen: String,
}

impl Prometheus {
    /// Starts one with the repository's configuration, only faster, against the daemon at `daemon`.
    fn start(folder: &Path, daemon: &str) -> Prometheus {
        let text = fs::read_to_string(dashboards("prometheus.yml")).unwrap();
        let text = text
            .replace("127.0.0.1:9464", daemon)
            .replace("- alerts.yml", &format!("- {}", dashboards("alerts.yml").display()))
            .replace("_interval: 5s", "_interval: 500ms");
        let config = folder.join("prometheus.yml");
        fs::write(&config, text).unwrap();
        let listen = format!("127.0.0.1:{}", free_port());
        let log = fs::File::create(folder.join("prometheus.log")).unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("prometheus").display()))
            .arg(format!("--web.listen-address={listen}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("prometheus is there: run scripts/setup test");
        let it = Prometheus { child, listen };
        wait_until("Prometheus is ready", || {
            get(&it.listen, "/-/ready").is_some_and(|it| it.starts_with("HTTP/1.1 200"))
        });
        it
    }

    /// What its HTTP API answers.
    fn api(&self, path: &str, query: Option<&str>) -> Value {
        let config = ureq::Agent::config_builder().proxy(None).http_status_as_error(false).build();
        let request = ureq::Agent::new_with_config(config)
            .get(format!("http://{}/api/v1/{path}", self.listen))
            .query_pairs(query.map(|it| ("query", it)));
        let text = request.call().unwrap().body_mut().read_to_string().unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["status"], "success", "{query:?}: {answer}");
        answer["data"].clone()
    }

    /// The samples that a query is answered with, those that are no number left out.
    fn ask(&self, query: &str) -> Vec<f64> {
        let data = self.api("query", Some(query));
        let sample = |it: &Value| it["value"][1].as_str().unwrap().parse::<f64>().unwrap();
        let samples = data["result"].as_array().unwrap().iter().map(sample);
        samples.filter(|it| it.is_finite()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }
}

/// The daemon, which a failed test must not leave behind.
struct Daemon(Option<Child>);

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().expect("it is our child");
            child.wait().expect("it is our child");
        }
    }
}

#[test]
fn every_panel_of_the_dashboard_is_answered_with_data() {
    let folder = tempfile::tempdir().unwrap();
    let streams = format!(
        "  clip: {{url: \"{}\", loop: true, realtime: true, max_fps: 5}}\n  \
         pattern: {{url: \"test:?size=64x48&fps=20\", realtime: true}}\n  \
         gone: {{url: \"file:///no/such/clip.mp4\"}}\n",
        clip("bikes.mp4")
    );
    let listen = with_sinks(folder.path(), &streams, "  - {type: file, path: all.ndjson}\n");
    let mut daemon = Daemon(Some(start(folder.path())));
    wait_until("the daemon is ready", || {
        get(&listen, "/readyz").is_some_and(|it| it.starts_with("HTTP/1.1 200"))
    });
    let prometheus = Prometheus::start(folder.path(), &listen);

    let queries = queries();
    for Query { panel, text } in &queries {
        if NEEDS_GPU.contains(&panel.as_str()) {
            prometheus.ask(text);
            assert!(text.contains("ghostwatch_gpu_"), "{panel}: {text}");
        } else {
            wait_until(&format!("{panel}: {text}"), || !prometheus.ask(text).is_empty());
        }
    }
    let panels: BTreeSet<&str> = queries.iter().map(|it| it.panel.as_str()).collect();
    assert!(NEEDS_GPU.iter().all(|it| panels.contains(it)), "{panels:?}");

    for (query, expected) in [
        ("up{job=\"ghostwatch\"}", 1.0),
        (
            "ghostwatch_stream_info{stream=\"clip\",codec=\"h264\",width=\"640\",height=\"272\"}",
            1.0,
        ),
        (
            "ghostwatch_stream_info{stream=\"pattern\",codec=\"raw\",width=\"64\",height=\"48\"}",
            1.0,
        ),
        ("count(ghostwatch_stream_info)", 2.0),
        ("ghostwatch_stream_connects_total{stream=\"gone\",result=\"failed\"}", 1.0),
        ("ghostwatch_stream_connects_total{stream=\"pattern\",result=\"failed\"}", 0.0),
        ("ghostwatch_stream_connects_total{stream=\"pattern\",result=\"ok\"}", 1.0),
        // Three of the pipeline, and one of each stream.
        ("count(ghostwatch_queue_oldest_age_seconds < 5)", 6.0),
    ] {
        assert_eq!(prometheus.ask(query), [expected], "{query}");
    }
    check_rules(&prometheus);
    drop(prometheus);
    drain(daemon.0.take().expect("it runs"), folder.path());
}

/// Every alert rule can be evaluated on what the daemon tells.
fn check_rules(prometheus: &Prometheus) {
    let rules = || prometheus.api("rules", None)["groups"][0]["rules"].clone();
    wait_until("the rules are evaluated", || {
        let rules = rules();
        let rules = rules.as_array().unwrap();
        !rules.is_empty() && rules.iter().all(|it| it["health"] != "unknown")
    });
    for rule in rules().as_array().unwrap() {
        assert_eq!(rule["health"], "ok", "{rule}");
    }
}

fn promtool(arguments: &[&str], file: &str) {
    let output = Command::new("promtool")
        .args(arguments)
        .arg(dashboards(file))
        .output()
        .expect("promtool is there: run scripts/setup test");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn promtool_accepts_the_alert_rules_and_the_configuration() {
    promtool(&["check", "rules"], "alerts.yml");
    promtool(&["check", "config"], "prometheus.yml");
}

#[test]
fn each_alert_is_raised_when_it_should_be_and_not_otherwise() {
    promtool(&["test", "rules"], "alerts_test.yml");
    let read = |file: &str| -> Value {
        serde_yaml::from_str(&fs::read_to_string(dashboards(file)).unwrap()).unwrap()
    };
    let (rules, tests) = (read("alerts.yml"), read("alerts_test.yml"));
    let tests: Vec<&Value> = tests["tests"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|it| it["alert_rule_test"].as_array().unwrap())
        .collect();
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let mine = tests.iter().filter(|it| it["alertname"] == rule["alert"]);
        let raised = |it: &Value| !it["exp_alerts"].as_array().unwrap().is_empty();
        let (loud, quiet): (Vec<bool>, Vec<bool>) = mine.map(|it| raised(it)).partition(|it| *it);
        assert!(!loud.is_empty() && !quiet.is_empty(), "{} is not tested", rule["alert"]);
    }
}
