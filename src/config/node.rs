//! YAML as it was read: any shape, each part with its place in the file. Judges nothing.

use crate::config::problem::Mark;

/// A value and its place.
#[derive(Clone, PartialEq)]
pub struct Node {
    /// Where it is written; `None` iff it is not from a file.
    pub mark: Option<Mark>,
    /// The value.
    pub tree: Tree,
}

/// A value. It has no `Debug`: it can hold secrets.
#[derive(Clone, PartialEq)]
pub enum Tree {
    /// Nothing, `null` or `~`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Anything else that is one word or text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// Keys with their values, in order. A key can be there twice.
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping and its place.
#[derive(Clone, PartialEq)]
pub struct Key {
    /// Where it is written; `None` iff it is not from a file.
    pub mark: Option<Mark>,
    /// The key.
    pub name: String,
}

impl Node {
    /// A node that is not from a file.
    pub fn made(tree: Tree) -> Node {
        Node { mark: None, tree }
    }

    /// A mapping that is not from a file.
    pub fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Node)>) -> Node {
        let entry = |(name, node): (K, Node)| (Key { mark: None, name: name.into() }, node);
        Node::made(Tree::Map(entries.into_iter().map(entry).collect()))
    }

    /// A text that is not from a file.
    pub fn text(text: impl Into<String>) -> Node {
        Node::made(Tree::Text(text.into()))
    }
}
