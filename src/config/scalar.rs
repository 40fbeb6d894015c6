//! One YAML scalar -> a typed value, by its kind; and how kinds and values are called in messages.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::config::{
    node::Tree,
    problem::{escaped, meant},
    raw::Kind,
    read::Value,
    units,
};

/// Why a scalar is no value of its kind.
#[derive(Debug)]
pub enum Wrong {
    /// Another value would be right.
    Value(String),
    /// The value may be right, but something around it is not.
    World(String),
}

/// Reads a value that is neither a mapping nor a list. `env` looks up an environment variable.
///
/// # Errors
/// What is wrong with it.
pub fn scalar(
    kind: &'static Kind,
    tree: &Tree,
    env: fn(&str) -> Option<String>,
) -> Result<Value, Wrong> {
    let wrong = || {
        let found = found(tree, matches!(kind, Kind::Secret(_)));
        Wrong::Value(format!("expected {}, found {found}", noun(kind)))
    };
    let outside = |it: &dyn std::fmt::Display| Wrong::Value(format!("{it} is out of range"));
    match (kind, tree) {
        (Kind::Bool, Tree::Bool(it)) => Ok(Value::Bool(*it)),
        (Kind::Int(least, most), Tree::Int(it)) if (*least..=*most).contains(it) => {
            Ok(Value::Int(*it))
        }
        (Kind::Int(..), Tree::Int(it)) => Err(outside(it)),
        (Kind::Number(..), Tree::Int(it)) => number(kind, *it as f64).ok_or_else(|| outside(it)),
        (Kind::Number(..), Tree::Float(it)) => number(kind, *it).ok_or_else(|| outside(it)),
        (Kind::Text(most) | Kind::Secret(most), Tree::Text(text)) => interpolate(text, *most, env),
        (Kind::Choice(words), Tree::Text(text)) => choice(words, text),
        (Kind::Duration(least, most), Tree::Text(text)) => {
            let bound = |it| units::duration(it).expect("the table's bounds are durations");
            let it = units::duration(text).ok_or_else(wrong)?;
            let is_inside = (bound(least)..=bound(most)).contains(&it);
            if is_inside { Ok(Value::Duration(it)) } else { Err(outside(text)) }
        }
        (Kind::Size(least, most), Tree::Text(text)) => {
            let bound = |it| units::size(it).expect("the table's bounds are sizes");
            let it = units::size(text).ok_or_else(wrong)?;
            let is_inside = (bound(least)..=bound(most)).contains(&it);
            if is_inside { Ok(Value::Size(it)) } else { Err(outside(text)) }
        }
        (Kind::Time, Tree::Text(text)) => {
            let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| wrong())?;
            Ok(Value::Time(time.into()))
        }
        _ => Err(wrong()),
    }
}

fn number(kind: &Kind, it: f64) -> Option<Value> {
    let Kind::Number(least, most) = kind else { return None };
    (*least..=*most).contains(&it).then_some(Value::Number(it))
}

fn choice(words: &'static [&'static str], text: &str) -> Result<Value, Wrong> {
    if let Some(word) = words.iter().find(|it| **it == text) {
        return Ok(Value::Word(word));
    }
    let shown = escaped(text);
    Err(Wrong::Value(match meant(text, words.iter().copied()) {
        Some(word) => format!("`{shown}` is unknown; did you mean `{word}`?"),
        None => format!("`{shown}` is unknown"),
    }))
}

/// A text with the environment put in.
fn interpolate(text: &str, most: usize, env: fn(&str) -> Option<String>) -> Result<Value, Wrong> {
    let world = |message: &str| Wrong::World(message.to_owned());
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${env:") {
        let (name, after) = after.split_once('}').ok_or_else(|| world("`${env:` has no `}`"))?;
        let fine = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(fine) {
            return Err(world("the name in `${env:NAME}` is no variable's name"));
        }
        out += before;
        out += &env(name).ok_or_else(|| {
            Wrong::World(format!("the environment variable {} is not set", escaped(name)))
        })?;
        rest = after;
    }
    let from_env = rest.len() != text.len();
    out += rest;
    match out.len() {
        0 => Err(Wrong::Value("the text is empty".to_owned())),
        length if most < length => Err(Wrong::Value(format!("the text has {length} bytes"))),
        _ if out.contains('\0') => Err(world("the text has a NUL character")),
        _ => Ok(Value::Text { text: out, from_env }),
    }
}

/// What a kind is called after "expected".
fn noun(kind: &Kind) -> &'static str {
    match kind {
        Kind::Bool => "true or false",
        Kind::Int(..) => "a whole number",
        Kind::Number(..) => "a number",
        Kind::Text(_) | Kind::Secret(_) => "text",
        Kind::Choice(_) => "a word",
        Kind::Duration(..) => "a duration with its unit",
        Kind::Size(..) => "a size with its unit",
        Kind::Time => "a time",
        Kind::List(..) => "a list",
        Kind::Map(_) | Kind::Entries(_) => "a mapping",
        Kind::Or(_, kind) => noun(kind),
    }
}

/// What was found instead. A secret is not quoted.
pub fn found(tree: &Tree, secret: bool) -> String {
    match tree {
        Tree::Null => "nothing".to_owned(),
        Tree::List(_) => "a list".to_owned(),
        Tree::Map(_) => "a mapping".to_owned(),
        Tree::Bool(_) | Tree::Int(_) | Tree::Float(_) if secret => {
            "a word without quotes".to_owned()
        }
        Tree::Int(it) => format!("the number {it}"),
        Tree::Float(it) => format!("the number {it}"),
        Tree::Bool(it) => it.to_string(),
        Tree::Text(_) if secret => "text".to_owned(),
        Tree::Text(text) => format!("`{}`", escaped(text)),
    }
}

/// What can be written, for people.
pub fn allowed(kind: &Kind) -> String {
    match kind {
        Kind::Bool => "true, false".to_owned(),
        Kind::Int(least, most) if least == most => least.to_string(),
        Kind::Int(least, most) => format!("{least} to {most}"),
        Kind::Number(least, most) => format!("{least} to {most}"),
        Kind::Text(most) | Kind::Secret(most) => {
            format!("text of 1 to {most} bytes, in quotes if it looks like something else")
        }
        Kind::Choice(words) => words.join(", "),
        Kind::Duration(least, most) => {
            format!("{least} to {most}, in us, ms, s, m, h or d")
        }
        Kind::Size(least, most) => {
            format!("{least} to {most}, in B, KiB, MiB, GiB, TiB, kB, MB, GB or TB")
        }
        Kind::Time => "RFC 3339, such as 2026-11-24T01:55:12Z".to_owned(),
        Kind::List(kind, least, most) => match (least == most, &**kind) {
            (true, kind) => format!("a list of {least}, each {}", allowed(kind)),
            (false, Kind::Map(_)) => format!("a list of {least} to {most} mappings"),
            (false, kind) => format!("a list of {least} to {most}, each {}", allowed(kind)),
        },
        Kind::Map(fields) | Kind::Entries(fields) => {
            fields.iter().map(|it| it.name).collect::<Vec<_>>().join(", ")
        }
        Kind::Or(word, kind) => format!("{word}, or {}", allowed(kind)),
    }
}
