//! `config.yaml` -> [`plan::Plan`], or every problem that it has.
//!
//! In order: [`parse`] (the only place that says `serde_yaml`) gives a tree of any shape, `read`
//! checks it by the table in [`raw`], `build` checks what belongs together and makes the plan.

pub mod build;
pub mod diff;
pub mod node;
pub mod plan;
pub mod problem;
pub mod raw;
pub mod read;
pub mod scalar;
pub mod schema;
pub mod sinks;
pub mod streams;
#[cfg(test)]
mod tests;
pub mod units;
pub mod urls;

use std::{
    env, fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_yaml::{DuplicateKeyPolicy, MergeKeyPolicy, Spanned, budget::BudgetBreach};

use crate::config::{
    build::{Built, Place, Surroundings},
    node::{Key, Node, Tree},
    plan::Plan,
    problem::{Mark, Problem, Problems, escaped},
    read::Reader,
};

/// A larger file is refused unread.
const FILE_MAX: u64 = 1 << 20;
/// The table needs four levels.
const DEPTH_MAX: usize = 24;
/// As many streams as are allowed, each with every field, have less.
const NODES_MAX: usize = 40_000;

/// Fields that name a file with a secret.
const SECRET_FILES: [&str; 3] = ["password_file", "token_file", "key_file"];

/// A plan, and what was accepted but should be changed.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The plan.
    pub plan: Plan,
    /// Warnings, not errors.
    pub warnings: Problems,
}

/// How much of the world around the file is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Looks up a variable of the environment.
    pub env: fn(&str) -> Option<String>,
    /// Read the secrets that are named, and refuse those that cannot be read.
    pub secrets: bool,
    /// Refuse files that are named but not there.
    pub files: bool,
}

impl Options {
    /// The process's own environment, and everything is looked at.
    pub fn all() -> Options {
        Options { env: |name| env::var(name).ok(), secrets: true, files: true }
    }

    /// The process's own environment; only the file itself is looked at.
    pub fn alone() -> Options {
        Options { secrets: false, files: false, ..Options::all() }
    }
}

/// Reads and checks a configuration file. Relative paths in it are relative to its folder.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path, options: &Options) -> Result<Loaded, Problems> {
    let failed = |error: io::Error| {
        let message = match error.kind() {
            io::ErrorKind::InvalidData => "the file is not UTF-8 text".to_owned(),
            _ => format!("cannot be read: {error}"),
        };
        Problems::new(path, vec![Problem::new(None, "", message)])
    };
    let (text, mode) = read_file(path).map_err(failed)?;
    let base = path.parent().unwrap_or(Path::new(""));
    let place = if mode & 0o004 == 0 { Place::PrivateFile } else { Place::OpenFile };
    check(&parse_as(&text, path)?, path, &Surroundings { base, options, place })
}

/// The files with secrets that a configuration names, as far as it can be read: who may read them is
/// not the plan's business.
pub fn secret_files(path: &Path) -> Vec<PathBuf> {
    let node = read_file(path).ok().and_then(|it| parse(&it.0).ok());
    let mut found = Vec::new();
    let mut left: Vec<Node> = node.into_iter().collect();
    while let Some(node) = left.pop() {
        match node.tree {
            Tree::List(nodes) => left.extend(nodes),
            Tree::Map(entries) => {
                for (key, node) in entries {
                    match node.tree {
                        Tree::Text(text) if SECRET_FILES.contains(&&*key.name) => found.push(text),
                        _ => left.push(node),
                    }
                }
            }
            _ => {}
        }
    }
    let base = path.parent().unwrap_or(Path::new(""));
    let mut found: Vec<_> =
        found.iter().filter(|it| !it.contains("${")).map(|it| base.join(it)).collect();
    found.sort();
    found.dedup();
    found
}

/// Checks a configuration's text. `name` is how messages call it, `base` what its paths are
/// relative to. The warnings are those for a file that everyone may read.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load_text(
    text: &str,
    name: &Path,
    base: &Path,
    options: &Options,
) -> Result<Loaded, Problems> {
    let place = Place::OpenFile;
    check(&parse_as(text, name)?, name, &Surroundings { base, options, place })
}

fn parse_as(text: &str, name: &Path) -> Result<Node, Problems> {
    parse(text).map_err(|it| Problems::new(name, vec![it]))
}

/// Checks a tree.
fn check(node: &Node, name: &Path, around: &Surroundings<'_>) -> Result<Loaded, Problems> {
    let mut reader = Reader { env: around.options.env, problems: Vec::new() };
    let fields = reader.fields(node, raw::ROOT, read::Path::Root);
    let Built { plan, mut problems, warnings } = build::build(&fields, around);
    problems.extend(reader.problems);
    match plan {
        Some(plan) if problems.is_empty() => {
            Ok(Loaded { plan, warnings: Problems::new(name, warnings) })
        }
        _ => Err(Problems::new(name, problems)),
    }
}

/// The text and the permission bits of a file, which must not be too large.
fn read_file(path: &Path) -> io::Result<(String, u32)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(io::Error::other("it is a folder"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if FILE_MAX < bytes.len() as u64 {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    let text = String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((text, meta.mode()))
}

/// The secret in a file, without the line end.
fn read_secret(path: &Path) -> io::Result<String> {
    const SECRET_MAX: u64 = 64 << 10;
    let mut text = String::new();
    let file = File::open(path)?;
    if SECRET_MAX < file.take(SECRET_MAX + 1).read_to_string(&mut text)? as u64 {
        return Err(io::Error::other("it is larger than 64 KiB"));
    }
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() { Err(io::Error::other("it is empty")) } else { Ok(text.to_owned()) }
}

/// The host's name, as far as it can stand in an event's `source`.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let fine = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    let name: String = name.trim().chars().filter(fine).take(64).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

/// Reads YAML of any shape, in little time and memory whatever it is.
///
/// # Errors
/// It is no YAML, or it nests, repeats or counts beyond any configuration.
pub fn parse(text: &str) -> Result<Node, Problem> {
    let options = serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_nodes: NODES_MAX,
            max_events: 3 * NODES_MAX,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_recorded_anchor_events: NODES_MAX,
            max_recorded_anchor_bytes: 4 << 20,
            max_documents: 1,
            max_buffered_comment_events: 10_000,
        },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::AsOrdinary,
        alias_limits: serde_yaml::alias_limits! {
            max_total_replayed_events: 10_000,
            max_replay_stack_depth: 4,
            max_alias_expansions_per_anchor: 1_000,
        },
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    match serde_yaml::from_str_with_options::<Located>(text, options) {
        Ok(located) => Ok(located.0),
        Err(_) if text.trim_start_matches('\u{feff}').trim().is_empty() => {
            Ok(Node { mark: Some(Mark { line: 1, column: 1 }), tree: Tree::Null })
        }
        Err(error) => Err(Problem::new(error.location().and_then(mark), "", describe(&error))),
    }
}

/// What the parser says, in one line and without the place, which is known already.
fn describe(error: &serde_yaml::Error) -> String {
    match error.without_snippet() {
        serde_yaml::Error::Budget { breach: BudgetBreach::Documents { .. }, .. } => {
            "there is more than one document in the file".to_owned()
        }
        serde_yaml::Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => {
            format!("it is nested more than {DEPTH_MAX} levels deep")
        }
        serde_yaml::Error::Budget { .. }
        | serde_yaml::Error::AliasReplayLimitExceeded { .. }
        | serde_yaml::Error::AliasExpansionLimitExceeded { .. }
        | serde_yaml::Error::AliasReplayStackDepthExceeded { .. } => {
            "there is more in it than in any configuration".to_owned()
        }
        error => {
            let message = error.to_string();
            let line = message.lines().next().unwrap_or_default();
            escaped(line.rsplit_once(" at line ").map_or(line, |it| it.0))
        }
    }
}

fn mark(it: serde_yaml::Location) -> Option<Mark> {
    (0 < it.line()).then(|| Mark { line: it.line(), column: it.column() })
}

/// Brings [`Node`] into the deserializer's world without saying so in `node`.
struct Located(Node);

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Located, D::Error> {
        let it = Spanned::<Shape>::deserialize(deserializer)?;
        Ok(Located(Node { mark: mark(it.referenced), tree: it.value.0 }))
    }
}

struct Shape(Tree);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
        deserializer.deserialize_any(AnyShape).map(Shape)
    }
}

struct AnyShape;

impl<'de> Visitor<'de> for AnyShape {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, it: bool) -> Result<Tree, E> {
        Ok(Tree::Bool(it))
    }

    fn visit_i64<E>(self, it: i64) -> Result<Tree, E> {
        Ok(Tree::Int(it))
    }

    fn visit_u64<E>(self, it: u64) -> Result<Tree, E> {
        Ok(i64::try_from(it).map_or(Tree::Float(it as f64), Tree::Int))
    }

    fn visit_f64<E>(self, it: f64) -> Result<Tree, E> {
        Ok(Tree::Float(it))
    }

    fn visit_str<E>(self, it: &str) -> Result<Tree, E> {
        Ok(Tree::Text(it.to_owned()))
    }

    fn visit_string<E>(self, it: String) -> Result<Tree, E> {
        Ok(Tree::Text(it))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
        let mut nodes = Vec::new();
        while let Some(Located(node)) = seq.next_element()? {
            nodes.push(node);
        }
        Ok(Tree::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            if entries.len() == NODES_MAX {
                return Err(A::Error::custom("a mapping has too many keys"));
            }
            let Located(value) = map.next_value()?;
            entries.push((Key { mark: mark(key.referenced), name: key.value }, value));
        }
        Ok(Tree::Map(entries))
    }
}
