//! `check`: everything that is wrong with the configuration, or what it will cost; with `--probe`, what
//! comes of opening its streams.

use std::{
    io::{self, Write},
    path::Path,
    time::Duration,
};

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::{
    cli::{code, find_config, probe::Probes},
    config::{
        self, Loaded, Options,
        plan::{Plan, StreamPlan},
        problem::{Problem, Problems},
        units::show_duration,
    },
    source::url::SourceUrl,
};

/// What to check and how to print it.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Open every stream and say what comes of it; exit code 3 if one fails
    #[arg(long, conflicts_with = "no_secrets")]
    pub probe: bool,
    /// Look at each stream for at most this many seconds
    #[arg(long, requires = "probe", default_value_t = 10, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=600))]
    pub probe_time: u64,
    /// Do not read the files and credentials that hold secrets
    #[arg(long)]
    pub no_secrets: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines for people.
    Text,
    /// One JSON object.
    Json,
}

/// Bytes of one frame event in the journal, with its row and index.
const EVENT_BYTES: f64 = 900.0;
/// What most cameras send, for streams of which nothing says it.
const ASSUMED_FPS: f64 = 25.0;
const DAY: f64 = 86_400.0;

/// Checks the configuration. The result goes to standard output, whatever it is.
pub fn run(args: &Args, config: Option<&Path>) -> u8 {
    let path = match find_config(config) {
        Ok(path) => path,
        Err(error) => {
            eprintln!("ghostwatch: {error:#}");
            return code::WRONG;
        }
    };
    let options = Options { secrets: !args.no_secrets, ..Options::all() };
    let result = config::load(&path, &options);
    let probes = result.as_ref().ok().filter(|_| args.probe).map(|it| {
        let count = it.plan.streams.len();
        eprintln!(
            "ghostwatch: opening {count} streams, 8 at a time, for up to {} s",
            args.probe_time
        );
        Probes::run(&it.plan, Duration::from_secs(args.probe_time))
    });
    let text = match args.format {
        Format::Text => {
            text(&path, &result) + &probes.as_ref().map(Probes::text).unwrap_or_default()
        }
        Format::Json => {
            let mut all = json(&path, &result);
            all["probes"] = probes.as_ref().map_or(Value::Null, Probes::json);
            format!("{all:#}\n")
        }
    };
    // Whoever closed the pipe has seen enough; the exit code stands.
    drop(io::stdout().lock().write_all(text.as_bytes()));
    match probes.map_or(0, |it| it.failed()) {
        _ if result.is_err() => code::WRONG,
        0 => code::OK,
        _ => code::PROBE,
    }
}

/// What is printed for people.
pub fn text(path: &Path, result: &Result<Loaded, Problems>) -> String {
    match result {
        Err(problems) => match problems.list.len() {
            1 => format!("{problems}\n1 problem\n"),
            count => format!("{problems}\n{count} problems\n"),
        },
        Ok(Loaded { plan, warnings }) => {
            let mut out = String::new();
            for warning in &warnings.list {
                out += &format!("warning: {}\n", warnings.line(warning));
            }
            out += &format!("{}: ok\n", path.display());
            out += &Estimate::new(plan).to_string();
            out
        }
    }
}

/// What is printed for programs.
pub fn json(path: &Path, result: &Result<Loaded, Problems>) -> Value {
    let list = |it: &Problems| it.list.iter().map(problem).collect::<Vec<_>>();
    let (problems, warnings, estimate) = match result {
        Err(problems) => (list(problems), Vec::new(), Value::Null),
        Ok(it) => (Vec::new(), list(&it.warnings), Estimate::new(&it.plan).json()),
    };
    json!({
        "file": path.display().to_string(),
        "ok": result.is_ok(),
        "problems": problems,
        "warnings": warnings,
        "estimate": estimate,
    })
}

fn problem(it: &Problem) -> Value {
    json!({
        "line": it.mark.map(|it| it.line),
        "column": it.mark.map(|it| it.column),
        "path": it.path,
        "message": it.message,
        "allowed": it.allowed,
    })
}

/// What a plan will cost, as far as that can be known.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Streams that go on without end, and those of them whose rate is assumed.
    streams: (usize, usize),
    /// Streams that end, or that are as fast as the device.
    uncounted: usize,
    events_per_second: f64,
    /// How far back the journal reaches; `None`: without end.
    reach: Option<Reach>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Reach {
    seconds: f64,
    /// Which setting it is due to.
    by: &'static str,
}

impl Estimate {
    /// What `plan` will cost.
    pub fn new(plan: &Plan) -> Estimate {
        let rates: Vec<_> = plan.streams.values().filter_map(rate).collect();
        let events_per_second: f64 = rates.iter().fold(0.0, |sum, it| sum + it.0);
        let retain = plan.journal.retain;
        let by_age = retain.age.map(|it| Reach { seconds: it.as_secs_f64(), by: "age" });
        let by_bytes = retain.bytes.filter(|_| 0.0 < events_per_second).map(|bytes| Reach {
            seconds: bytes as f64 / (EVENT_BYTES * events_per_second),
            by: "bytes",
        });
        let both = [by_age, by_bytes];
        Estimate {
            streams: (rates.len(), rates.iter().filter(|it| it.1).count()),
            uncounted: plan.streams.len() - rates.len(),
            events_per_second,
            reach: both.into_iter().flatten().min_by(|a, b| a.seconds.total_cmp(&b.seconds)),
        }
    }

    fn bytes_per_day(&self) -> f64 {
        self.events_per_second * EVENT_BYTES * DAY
    }

    fn json(&self) -> Value {
        json!({
            "streams": self.streams.0,
            "streams_with_assumed_rate": self.streams.1,
            "streams_not_counted": self.uncounted,
            "events_per_second": self.events_per_second,
            "bytes_per_event": EVENT_BYTES,
            "bytes_per_day": self.bytes_per_day(),
            "journal_reach_seconds": self.reach.map(|it| it.seconds),
            "journal_reach_by": self.reach.map(|it| it.by),
        })
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (count, assumed) = self.streams;
        let total = count + self.uncounted;
        write!(f, "streams: {total}")?;
        if 0 < self.uncounted {
            let uncounted = self.uncounted;
            write!(f, ", {uncounted} not counted below: they end, or are as fast as the device")?;
        }
        write!(f, "\nevents: {:.1}/s expected", self.events_per_second)?;
        if 0 < assumed {
            write!(
                f,
                " ({assumed} without a known rate at {ASSUMED_FPS}/s each; max_fps lowers it)"
            )?;
        }
        let per_day = self.bytes_per_day() / 1e9;
        writeln!(f, "\ndisk: {per_day:.2} GB/day at about {EVENT_BYTES} bytes per event")?;
        match self.reach {
            None => writeln!(f, "journal: keeps everything as long as there is room"),
            Some(Reach { seconds, by }) => {
                let reach = show_duration(Duration::from_secs_f64(seconds.min(DAY * 365_000.0)));
                writeln!(f, "journal: reaches back {reach} (retain.{by})")
            }
        }
    }
}

/// Events per second of a stream that goes on without end, and whether that is assumed.
fn rate(stream: &StreamPlan) -> Option<(f64, bool)> {
    let known = match stream.parsed()? {
        SourceUrl::Test(it) if it.frames.is_none() || stream.looped => {
            Some(f64::from(it.fps.0) / f64::from(it.fps.1))
        }
        SourceUrl::File(_) if stream.looped => None,
        SourceUrl::File(_) | SourceUrl::Test(_) => return None,
        SourceUrl::Rtsp(_) | SourceUrl::Http(_) => None,
    };
    if !stream.is_live() && !stream.realtime {
        return None;
    }
    let rate = known.unwrap_or(ASSUMED_FPS).min(stream.max_fps.unwrap_or(f64::INFINITY));
    Some((rate, known.is_none() && stream.max_fps.is_none_or(|it| ASSUMED_FPS < it)))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(yaml: &str, expected: &Expect) {
        let options = Options { env: |_| None, secrets: true, files: false };
        let name = Path::new("c.yaml");
        let yaml = format!("version: 1\n{yaml}");
        let result = config::load_text(&yaml, name, Path::new("/etc/ghostwatch"), &options);
        expected.assert_eq(&text(name, &result));
    }

    #[test]
    fn it_says_what_the_streams_will_cost() {
        check(
            "streams:\n a: {url: 'rtsp://cam/'}\n \
             b: {url: 'test:', realtime: true, max_fps: 5}\n c: {url: x.mp4}\n",
            &expect![[r#"
                c.yaml: ok
                streams: 3, 1 not counted below: they end, or are as fast as the device
                events: 30.0/s expected (1 without a known rate at 25/s each; max_fps lowers it)
                disk: 2.33 GB/day at about 900 bytes per event
                journal: reaches back 7d (retain.age)
            "#]],
        );
    }

    #[test]
    fn more_streams_make_the_journal_reach_less_far_back() {
        let streams: String =
            (0..200).map(|i| format!(" s{i}: {{url: 'rtsp://cam/'}}\n")).collect();
        check(
            &format!("streams:\n{streams}"),
            &expect![[r#"
            c.yaml: ok
            streams: 200
            events: 5000.0/s expected (200 without a known rate at 25/s each; max_fps lowers it)
            disk: 388.80 GB/day at about 900 bytes per event
            journal: reaches back 1.33h (retain.bytes)
        "#]],
        );
        check(
            "journal: {retain: {age: null, bytes: null}}",
            &expect![[r#"
                c.yaml: ok
                streams: 0
                events: 0.0/s expected
                disk: 0.00 GB/day at about 900 bytes per event
                journal: keeps everything as long as there is room
            "#]],
        );
    }

    #[test]
    fn warnings_come_first_and_show_no_secret() {
        check(
            "streams: {a: {url: 'rtsp://u:canary@cam/', max_fps: 1}}",
            &expect![[r#"
            warning: c.yaml:2:20: streams.a.url: a password is written in this file, which everyone on this machine may read; use password_file, password_credential or ${env:NAME}, or at least chmod o-r
            c.yaml: ok
            streams: 1
            events: 1.0/s expected
            disk: 0.08 GB/day at about 900 bytes per event
            journal: reaches back 7d (retain.age)
        "#]],
        );
    }

    #[test]
    fn programs_get_the_same_as_json() {
        let name = Path::new("c.yaml");
        let options = Options { env: |_| None, secrets: true, files: false };
        let of = |yaml| json(name, &config::load_text(yaml, name, Path::new("/"), &options));
        let wrong = of("version: 1\nlog: {level: loud}");
        assert_eq!(wrong["ok"], false);
        let expected = json!([{
            "line": 2,
            "column": 14,
            "path": "log.level",
            "message": "`loud` is unknown",
            "allowed": "error, warn, info, debug, trace",
        }]);
        assert_eq!(wrong["problems"], expected);
        let right = of("version: 1\nstreams: {a: {url: 'test:?fps=10', realtime: true}}");
        assert_eq!(right["ok"], true);
        assert_eq!(right["estimate"]["events_per_second"], 10.0);
        assert_eq!(right["estimate"]["bytes_per_day"], 777_600_000.0);
        assert_eq!(right["estimate"]["journal_reach_by"], "age");
    }
}
