//! Typed values -> plan. Finds the problems that values have together, or with the world.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use crate::{
    config::{
        Options, host_name,
        plan::{
            BatchPlan, DevicePlan, HttpPlan, JournalPlan, LimitsPlan, LogFormat, LogPlan,
            ModelPlan, Plan,
        },
        problem::{Problem, escaped},
        read::{Fields, Item, Value},
        read_secret,
    },
    infer::wanted::{Precision, Use},
    journal::retain::Retain,
    secret::Secret,
};

/// What the file is not, but what it needs.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// What relative paths are relative to.
    pub base: &'a Path,
    /// How much is looked at.
    pub options: &'a Options,
    /// Where it is written.
    pub place: Place,
}

/// Where a configuration is written, and so who may read what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file that not everyone may read.
    PrivateFile,
    /// In a file that everyone may read.
    OpenFile,
    /// On the command line.
    CommandLine,
}

/// What came of it.
pub struct Built {
    /// `None` only if there are problems.
    pub plan: Option<Plan>,
    /// What makes it unusable.
    pub problems: Vec<Problem>,
    /// What does not.
    pub warnings: Vec<Problem>,
}

/// Makes the plan, as far as the values are there.
pub fn build(root: &Fields, around: &Surroundings<'_>) -> Built {
    let mut it = Builder { around, problems: Vec::new(), warnings: Vec::new() };
    let limits = limits(root.map("limits"));
    let streams = it.streams(root, limits.max_streams);
    let instance = it.instance(root);
    let model = it.model(root.map("model"));
    let device = it.device(root.map("device"));
    let batch = it.batch(root.map("batch"));
    let journal = it.journal(root.map("journal"));
    let sinks = it.sinks(root, &instance);
    let http = it.http(root.map("http"));
    let log = log(root.map("log"));
    let plan = http.map(|http| Plan {
        instance,
        streams,
        model,
        device,
        batch,
        journal,
        sinks,
        http,
        log,
        limits,
    });
    Built { plan, problems: it.problems, warnings: it.warnings }
}

/// Why an unset field is never one that has a default.
pub const DEFAULT: &str = "the table gives this field a default";
/// Why an integer fits.
const BOUND: &str = "the table bounds this number";

/// Collects problems while the parts of the plan are made.
pub struct Builder<'a> {
    /// The world.
    pub around: &'a Surroundings<'a>,
    /// What makes the plan unusable.
    pub problems: Vec<Problem>,
    /// What does not.
    pub warnings: Vec<Problem>,
}

impl Builder<'_> {
    fn instance(&mut self, root: &Fields) -> String {
        let Some(name) = root.text("instance") else { return host_name() };
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !name.chars().all(fine) {
            let problem = root
                .problem("instance", format!("{} has other characters", root.quoted("instance")));
            self.problems.push(problem.allowed("a-z, A-Z, 0-9, `.`, `_`, `-`"));
        }
        name.to_owned()
    }

    /// The secret in the file that the field names.
    pub fn secret_file(&mut self, it: &Fields, name: &str) -> Option<Secret> {
        let path = self.path(it, name, false)?;
        if !self.around.options.secrets {
            return None;
        }
        match read_secret(&path) {
            Ok(secret) => Some(Secret::new(secret)),
            Err(error) => {
                let message = format!("{}: {error}", escaped(&path.display().to_string()));
                self.problems.push(it.problem(name, message));
                None
            }
        }
    }

    /// A path, relative to the file.
    pub fn path(&mut self, it: &Fields, name: &str, must_exist: bool) -> Option<PathBuf> {
        let path = self.around.base.join(it.text(name)?);
        if must_exist && self.around.options.files && !path.exists() {
            let message = format!("{}: no such file", escaped(&path.display().to_string()));
            self.problems.push(it.problem(name, message));
        }
        Some(path)
    }

    fn model(&mut self, it: &Fields) -> ModelPlan {
        let int = |name| it.int(name).map(|it| u32::try_from(it).expect(BOUND));
        let (resize, input) = (int("resize"), int("input"));
        if let (Some(resize), Some(input)) = (resize, input)
            && resize < input
        {
            let problem = it.problem("input", format!("{input} is more than `resize`, {resize}"));
            self.problems.push(problem.allowed(format!("at most {resize}")));
        }
        ModelPlan {
            weights: self.path(it, "weights", true).expect(DEFAULT),
            labels: self.path(it, "labels", true),
            name: it.text("name").map(str::to_owned),
            resize,
            input,
            mean: it.list("mean").map(triple),
            std: it.list("std").map(triple),
        }
    }

    fn device(&mut self, it: &Fields) -> DevicePlan {
        let text = it.text("use").expect(DEFAULT);
        let cuda = text.strip_prefix("cuda:").and_then(|it| it.parse::<u8>().ok());
        let device = match (text, cuda) {
            ("cpu", _) => Use::Cpu,
            ("native", _) => Use::Native,
            (_, Some(index)) => Use::Cuda(usize::from(index)),
            ("auto", _) => Use::Auto,
            _ => {
                let problem = it.problem("use", format!("{} is unknown", it.quoted("use")));
                self.problems
                    .push(problem.allowed("auto, cpu, native, cuda:N with N from 0 to 255"));
                Use::Auto
            }
        };
        if let Some(lacks) = device.lacks() {
            let problem = it.problem("use", format!("{} cannot be used", it.quoted("use")));
            self.problems.push(problem.allowed(lacks));
        }
        DevicePlan {
            device,
            precision: match it.word("precision").expect(DEFAULT) {
                "fp32" => Some(Precision::Fp32),
                "bf16" => Some(Precision::Bf16),
                "fp16" => Some(Precision::Fp16),
                _ => None,
            },
            lanes: it.int("lanes").map(|it| usize::try_from(it).expect(BOUND)),
            cuda: self.path(it, "cuda", true),
        }
    }

    fn batch(&mut self, it: &Fields) -> BatchPlan {
        let max_size = it.int("max_size").map(|it| it as usize).expect(DEFAULT);
        let buckets = it.list("buckets").map(|items| {
            let mut sizes: Vec<_> = items.iter().filter_map(whole).collect();
            sizes.sort_unstable();
            sizes.dedup();
            sizes
        });
        if let Some(largest) = buckets.as_ref().and_then(|it| it.last())
            && *largest != max_size
        {
            let problem = it.problem("buckets", format!("the largest is {largest}"));
            self.problems
                .push(problem.allowed(format!("{max_size} (batch.max_size) as the largest")));
        }
        BatchPlan { max_size, max_wait: it.duration("max_wait").expect(DEFAULT), buckets }
    }

    fn journal(&mut self, it: &Fields) -> JournalPlan {
        let state = || {
            let folders = (self.around.options.env)("STATE_DIRECTORY")?;
            let first = folders.split(':').next().filter(|it| !it.is_empty())?;
            Some(PathBuf::from(first).join("journal.db"))
        };
        let unset = || state().unwrap_or_else(|| self.around.base.join("data/journal.db"));
        let path = it.text("path").map_or_else(unset, |it| self.around.base.join(it));
        let retain = it.map("retain");
        JournalPlan {
            path,
            retain: Retain {
                bytes: retain.size("bytes"),
                age: retain.duration("age"),
                keep_free: retain.size("keep_free").expect(DEFAULT),
            },
            commit_every: it.duration("commit_every").expect(DEFAULT),
        }
    }

    fn http(&mut self, it: &Fields) -> Option<HttpPlan> {
        let text = it.text("listen").expect(DEFAULT);
        let token_file = self.path(it, "token_file", false);
        let token = self.secret_file(it, "token_file");
        let hosts = it.list("hosts").expect(DEFAULT).iter();
        let hosts = hosts.filter_map(|item| match &item.value {
            Value::Text { text, .. } => Some(text.to_ascii_lowercase()),
            _ => None,
        });
        let hosts: Vec<_> = hosts.collect();
        let allowed = "an address and port, such as 127.0.0.1:9464 or \"[::1]:9464\"";
        let Ok(listen) = text.parse::<SocketAddr>() else {
            let problem = it.problem("listen", format!("{} is no address", it.quoted("listen")));
            self.problems.push(problem.allowed(allowed));
            return None;
        };
        if !listen.ip().is_loopback() && token_file.is_none() {
            let message =
                format!("{listen} can be reached from outside, and http.token_file is not set");
            self.problems.push(
                it.problem("listen", message)
                    .allowed("a loopback address, or any with http.token_file"),
            );
        }
        Some(HttpPlan { listen, token_file, token, hosts })
    }
}

/// What a stream id is, for people.
pub const ID: &str = "1 to 63 of a-z, 0-9, `_`, `-`, a letter or digit first";

/// Whether `text` matches `^[a-z0-9][a-z0-9_-]{0,62}$`.
pub fn is_id(text: &str) -> bool {
    let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && first(bytes[0])
        && bytes.iter().all(|it| first(*it) || b"_-".contains(it))
}

fn triple(items: &[Item]) -> [f32; 3] {
    let number = |i: usize| match items.get(i).map(|it| &it.value) {
        Some(Value::Number(it)) => *it as f32,
        _ => panic!("the table says that there are three numbers"),
    };
    [number(0), number(1), number(2)]
}

fn whole(item: &Item) -> Option<usize> {
    if let Value::Int(it) = item.value { usize::try_from(it).ok() } else { None }
}

fn limits(it: &Fields) -> LimitsPlan {
    let int = |name| u32::try_from(it.int(name).expect(DEFAULT)).expect(BOUND);
    LimitsPlan {
        max_streams: int("max_streams") as usize,
        max_width: int("max_width"),
        max_height: int("max_height"),
    }
}

fn log(it: &Fields) -> LogPlan {
    LogPlan {
        level: it.word("level").expect(DEFAULT),
        format: match it.word("format").expect(DEFAULT) {
            "text" => LogFormat::Text,
            "json" => LogFormat::Json,
            _ => LogFormat::Auto,
        },
    }
}
