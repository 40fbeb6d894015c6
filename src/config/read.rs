//! YAML -> typed values, by the table of fields. Finds every problem that one value alone can have.
//!
//! A value with a problem is replaced by its default, so that reading goes on and one mistake gives
//! one problem.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    time::{Duration, SystemTime},
};

use crate::config::{
    node::{Key, Node, Tree},
    problem::{Mark, Problem, escaped, meant},
    raw::{Absent, Field, Kind},
    scalar::{Wrong, allowed, found, scalar},
};

/// More entries than any configuration may have; beyond it they are not even looked at.
pub const ENTRIES_MAX: usize = 1024;

/// A mapping whose fields are all known and of their kind.
#[derive(Clone)]
pub struct Fields {
    /// Where it is written; `None` iff it is not from a file.
    pub mark: Option<Mark>,
    /// How messages name it, such as `streams.front`.
    pub path: String,
    items: BTreeMap<&'static str, Item>,
}

/// A value and its place.
#[derive(Clone)]
pub struct Item {
    /// Where it is written; `None` iff it is not from a file.
    pub mark: Option<Mark>,
    /// The value.
    pub value: Value,
}

/// A value of its kind. It has no `Debug`: it can hold secrets.
#[derive(Clone)]
pub enum Value {
    /// Nothing, or the word that stands for a choice of ours.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number inside its bounds.
    Int(i64),
    /// A finite number inside its bounds.
    Number(f64),
    /// A text.
    Text {
        /// The text, with the environment put in.
        text: String,
        /// Whether it needed the environment.
        from_env: bool,
    },
    /// One of the allowed words.
    Word(&'static str),
    /// A duration inside its bounds.
    Duration(Duration),
    /// Bytes inside their bounds.
    Size(u64),
    /// A moment.
    Time(SystemTime),
    /// Values of one kind.
    List(Vec<Item>),
    /// Fields.
    Map(Fields),
    /// Mappings by id, in the order as written; ids are unique but not yet checked.
    Entries(Vec<(Key, Fields)>),
}

macro_rules! getters {
    ($($name:ident, $variant:ident, $type:ty;)*) => {
        $(
            /// The field, unless it is unset or null.
            pub fn $name(&self, name: &str) -> Option<$type> {
                match self.value(name) {
                    Some(Value::$variant(it)) => Some(it.clone()),
                    _ => None,
                }
            }
        )*
    };
}

impl Fields {
    getters! {
        bool, Bool, bool;
        int, Int, i64;
        number, Number, f64;
        word, Word, &'static str;
        duration, Duration, Duration;
        size, Size, u64;
        time, Time, SystemTime;
    }

    /// The field, unless it is unset or null.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.value(name) {
            Some(Value::Text { text, .. }) => Some(text),
            _ => None,
        }
    }

    /// Whether the field is a text that is written in the file itself.
    pub fn is_inline(&self, name: &str) -> bool {
        matches!(self.value(name), Some(Value::Text { from_env: false, .. }))
    }

    /// The text as a message may show it: what comes from the environment can be a secret.
    pub fn quoted(&self, name: &str) -> String {
        match self.text(name) {
            Some(text) if self.is_inline(name) => format!("`{}`", escaped(text)),
            _ => "what the environment says".to_owned(),
        }
    }

    /// The field, unless it is unset or null.
    pub fn list(&self, name: &str) -> Option<&[Item]> {
        match self.value(name) {
            Some(Value::List(it)) => Some(it),
            _ => None,
        }
    }

    /// The mapping in the field.
    pub fn map(&self, name: &str) -> &Fields {
        match self.value(name) {
            Some(Value::Map(it)) => it,
            _ => panic!("the table says that {name} is a mapping with a default"),
        }
    }

    /// The entries in the field.
    pub fn entries(&self, name: &str) -> &[(Key, Fields)] {
        match self.value(name) {
            Some(Value::Entries(it)) => it,
            _ => panic!("the table says that {name} has entries and a default"),
        }
    }

    /// Where the field is written, or else the mapping itself.
    pub fn mark_of(&self, name: &str) -> Option<Mark> {
        self.items.get(name).and_then(|it| it.mark).or(self.mark)
    }

    /// Whether the field has a value, null included.
    pub fn has(&self, name: &str) -> bool {
        self.items.contains_key(name)
    }

    /// A problem of one of the fields.
    pub fn problem(&self, name: &str, message: impl Into<String>) -> Problem {
        let dot = if self.path.is_empty() { "" } else { "." };
        Problem::new(self.mark_of(name), format!("{}{dot}{name}", self.path), message)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.items.get(name).map(|it| &it.value)
    }
}

/// Reads nodes and collects their problems.
pub struct Reader {
    /// Looks up a variable of the environment.
    pub env: fn(&str) -> Option<String>,
    /// What was found wrong.
    pub problems: Vec<Problem>,
}

/// Where a value belongs. A chain on the stack: most are never printed.
#[derive(Clone, Copy)]
pub enum Path<'a> {
    /// The file.
    Root,
    /// A key of what is above.
    Key(&'a Path<'a>, &'a str),
    /// A place in the list above, from 0.
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Key(Path::Root, key) => f.write_str(&escaped(key)),
            Path::Key(above, key) => write!(f, "{above}.{}", escaped(key)),
            Path::Index(above, index) => write!(f, "{above}[{index}]"),
        }
    }
}

impl Reader {
    /// Reads a mapping with these fields.
    pub fn fields(&mut self, node: &Node, fields: &'static [Field], path: Path<'_>) -> Fields {
        let empty = Vec::new();
        let mut entries = match &node.tree {
            Tree::Map(entries) => entries,
            Tree::Null => &empty,
            other => {
                let message = format!("expected a mapping, found {}", found(other, false));
                self.problem(node.mark, path, message, String::new());
                &empty
            }
        };
        if ENTRIES_MAX < entries.len() {
            self.too_many(node, entries.len(), path);
            entries = &empty;
        }
        let mut items = BTreeMap::new();
        let mut bad = HashSet::new();
        let mut seen = HashSet::new();
        for (key, value) in entries {
            let Some(field) = fields.iter().find(|it| it.name == key.name) else {
                self.unknown(key, fields, path);
                continue;
            };
            let path = Path::Key(&path, field.name);
            if !seen.insert(field.name) {
                self.problem(key.mark, path, "is there twice".to_owned(), String::new());
            } else if let Some(value) = self.value(value, &field.kind, path) {
                items.insert(field.name, value);
            } else {
                bad.insert(field.name);
            }
        }
        let mut read = Fields { mark: node.mark, path: path.to_string(), items };
        let is_mapping = matches!(node.tree, Tree::Map(_) | Tree::Null);
        self.absent(&mut read, fields, path, |it| is_mapping && !bad.contains(it));
        read
    }

    /// Puts in the defaults, and finds out what must be there. `missed`: whether it would be missed.
    fn absent(
        &mut self,
        read: &mut Fields,
        fields: &'static [Field],
        path: Path<'_>,
        missed: impl Fn(&str) -> bool,
    ) {
        for field in fields {
            match field.default {
                _ if read.has(field.name) => {}
                Absent::Required if missed(field.name) => {
                    let message = format!("`{}` is missing", field.name);
                    let doc = field.doc.trim_end_matches('.').to_owned();
                    self.problem(read.mark, path, message, doc);
                }
                Absent::Yaml(text) => {
                    let node = Node { mark: read.mark, tree: default_tree(text) };
                    let item = self.value(&node, &field.kind, Path::Key(&path, field.name));
                    let value = item.expect("a default is of its kind").value;
                    read.items.insert(field.name, Item { mark: None, value });
                }
                Absent::Required | Absent::Unset => {}
            }
        }
    }

    fn unknown(&mut self, key: &Key, fields: &'static [Field], path: Path<'_>) {
        let names = || fields.iter().map(|it| it.name);
        if key.name == "<<" {
            return self.no_merge(key, path);
        }
        let message = match meant(&key.name, names()) {
            Some(name) => format!("unknown field; did you mean `{name}`?"),
            None => "unknown field".to_owned(),
        };
        self.problem(
            key.mark,
            Path::Key(&path, &key.name),
            message,
            names().collect::<Vec<_>>().join(", "),
        );
    }

    fn too_many(&mut self, node: &Node, count: usize, path: Path<'_>) {
        let message = format!("there are {count} entries");
        self.problem(node.mark, path, message, format!("at most {ENTRIES_MAX}"));
    }

    fn no_merge(&mut self, key: &Key, path: Path<'_>) {
        let message = "merge keys are not supported; write what streams share under `defaults`";
        self.problem(key.mark, path, message.to_owned(), String::new());
    }

    /// Reads a value of this kind; `None` if it has a problem, which is then in the list.
    fn value(&mut self, node: &Node, kind: &'static Kind, path: Path<'_>) -> Option<Item> {
        let whole = kind;
        let kind = match (kind, &node.tree) {
            (Kind::Or("null", _), Tree::Null) => {
                return Some(Item { mark: node.mark, value: Value::Null });
            }
            (Kind::Or(word, _), Tree::Text(text)) if word == text => {
                return Some(Item { mark: node.mark, value: Value::Null });
            }
            (Kind::Or(_, kind), _) => *kind,
            (kind, _) => kind,
        };
        let value = match (kind, &node.tree) {
            (Kind::Map(fields), _) => Value::Map(self.fields(node, fields, path)),
            (Kind::Entries(fields), _) => Value::Entries(self.entries(node, fields, path)),
            (Kind::List(kind, least, most), Tree::List(nodes)) => {
                if !(*least..=*most).contains(&nodes.len()) {
                    let message = format!("the list has {} entries", nodes.len());
                    self.problem(node.mark, path, message, allowed(whole));
                    return None;
                }
                let mut items = Vec::new();
                for (i, node) in nodes.iter().enumerate() {
                    items.extend(self.value(node, kind, Path::Index(&path, i)));
                }
                if items.len() < nodes.len() && !matches!(kind, Kind::Map(_)) {
                    return None;
                }
                Value::List(items)
            }
            (kind, tree) => match scalar(kind, tree, self.env) {
                Ok(value) => value,
                Err(Wrong::Value(message)) => {
                    self.problem(node.mark, path, message, allowed(whole));
                    return None;
                }
                Err(Wrong::World(message)) => {
                    self.problem(node.mark, path, message, String::new());
                    return None;
                }
            },
        };
        Some(Item { mark: node.mark, value })
    }

    fn entries(
        &mut self,
        node: &Node,
        fields: &'static [Field],
        path: Path<'_>,
    ) -> Vec<(Key, Fields)> {
        let entries = match &node.tree {
            Tree::Map(entries) => entries,
            Tree::Null => return Vec::new(),
            other => {
                let message = format!("expected a mapping from ids, found {}", found(other, false));
                self.problem(node.mark, path, message, String::new());
                return Vec::new();
            }
        };
        if ENTRIES_MAX < entries.len() {
            self.too_many(node, entries.len(), path);
            return Vec::new();
        }
        let mut seen = HashSet::new();
        let mut read = Vec::new();
        for (key, value) in entries {
            if key.name == "<<" {
                self.no_merge(key, path);
                continue;
            }
            let path = Path::Key(&path, &key.name);
            if seen.insert(key.name.as_str()) {
                read.push((key.clone(), self.fields(value, fields, path)));
            } else {
                self.problem(key.mark, path, "is there twice".to_owned(), String::new());
            }
        }
        read
    }

    fn problem(&mut self, mark: Option<Mark>, path: Path<'_>, message: String, allowed: String) {
        self.problems.push(Problem::new(mark, path.to_string(), message).allowed(allowed));
    }
}

/// The tree of a default in the table, which is one word.
fn default_tree(text: &str) -> Tree {
    match text {
        "null" => Tree::Null,
        "true" | "false" => Tree::Bool(text == "true"),
        "{}" => Tree::Map(Vec::new()),
        "[]" => Tree::List(Vec::new()),
        _ => text.parse().map_or_else(|_| Tree::Text(text.to_owned()), Tree::Int),
    }
}
