//! What is wrong with a configuration: where, what, and what would be right, one line each.
//!
//! Nothing here quotes a value that can be a secret; whoever makes a [`Problem`] sees to that.

use std::{fmt, path::PathBuf};

/// A position in the file, both numbers from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// The line.
    pub line: u64,
    /// The column, in characters.
    pub column: u64,
}

/// One thing that is wrong, or that deserves a warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where; `None` iff it is about no place in a file.
    pub mark: Option<Mark>,
    /// Which setting, such as `streams.front.url`; empty iff it is about the whole file.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would be right; empty iff the message says it all.
    pub allowed: String,
}

impl Problem {
    /// A problem at a place in the file.
    pub fn new(mark: Option<Mark>, path: impl Into<String>, message: impl Into<String>) -> Problem {
        Problem { mark, path: path.into(), message: message.into(), allowed: String::new() }
    }

    /// The same problem, with what would be right.
    pub fn allowed(mut self, allowed: impl Into<String>) -> Problem {
        self.allowed = allowed.into();
        self
    }
}

/// Problems of one file, in the order of their places.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Problems {
    /// The file; empty iff there is none.
    pub file: PathBuf,
    /// The problems.
    pub list: Vec<Problem>,
}

/// More lines than this help nobody: ten thousand wrong streams have one cause.
const SHOWN: usize = 100;

impl Problems {
    /// The problems of `file`, sorted by place.
    pub fn new(file: impl Into<PathBuf>, mut list: Vec<Problem>) -> Problems {
        list.sort_by_key(|it| it.mark);
        Problems { file: file.into(), list }
    }

    /// The line for one of the problems: `file:line:column: path: message; allowed: …`.
    pub fn line(&self, problem: &Problem) -> String {
        let mut line = String::new();
        if !self.file.as_os_str().is_empty() {
            line += &escaped(&self.file.display().to_string());
            if let Some(Mark { line: row, column }) = problem.mark {
                line += &format!(":{row}:{column}");
            }
            line += ": ";
        }
        if !problem.path.is_empty() {
            line += &problem.path;
            line += ": ";
        }
        line += &problem.message;
        if !problem.allowed.is_empty() {
            line += "; allowed: ";
            line += &problem.allowed;
        }
        line
    }
}

/// One line for each problem, without a line end after the last.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.list.iter().take(SHOWN).enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            write!(f, "{end}{}", self.line(problem))?;
        }
        match self.list.len().checked_sub(SHOWN) {
            Some(more) if 0 < more => write!(f, "\n… and {more} more"),
            _ => Ok(()),
        }
    }
}

/// `text` for a message: control characters made visible, and cut where it gets long.
pub fn escaped(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut out = String::new();
    for c in text.chars().take(LONGEST) {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}

/// The one of `names` that was probably meant by `written`.
pub fn meant<'a>(written: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 40;
    let length = written.chars().count();
    if LONGEST < length {
        return None;
    }
    let written = written.to_lowercase().replace('-', "_");
    let limit = if length < 4 { 1 } else { 1 + length / 4 };
    let near = names.into_iter().map(|it| (distance(&written, &it.replace('-', "_")), it));
    near.filter(|it| it.0 <= limit).min_by_key(|it| it.0).map(|it| it.1)
}

/// How many letters must be put in, taken out, replaced or swapped with their neighbour (optimal
/// string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let same = usize::from(a[i - 1] != b[j - 1]);
                let mut least =
                    (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + same);
                if 1 < i && 1 < j && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    least = least.min(rows[i - 2][j - 2] + 1);
                }
                least
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_hand_is_recognised_and_another_word_is_not() {
        let names = ["transport", "latency", "max_fps", "tls"];
        let check = |written, expected| assert_eq!(meant(written, names), expected, "{written}");
        check("trasnport", Some("transport"));
        check("max-fps", Some("max_fps"));
        check("MaxFps", Some("max_fps"));
        check("tsl", Some("tls"));
        check("password", None);
        check(&"x".repeat(100_000), None);
    }

    #[test]
    fn a_line_says_where_what_and_what_is_allowed() {
        let mark = Some(Mark { line: 3, column: 7 });
        let problem = Problem::new(mark, "log.level", "wrong").allowed("info");
        let problems = Problems::new("a\nb.yaml", vec![problem]);
        assert_eq!(problems.to_string(), "a\\nb.yaml:3:7: log.level: wrong; allowed: info");
    }
}
