//! Label files: one class per line, as `id<TAB>name` or just the name.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::infer::weights::{error::WeightsError, hex, read_bytes};

/// Bytes of a label file; ImageNet's takes 30 kB.
const FILE_MAX: u64 = 4 << 20;

/// The names of a model's classes, in the order of its outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// One per class.
    pub entries: Vec<Label>,
    /// Hash of the file, in hex.
    pub sha256: String,
}

/// One class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its id, for ImageNet the WordNet id; `None` iff the file has names only.
    pub wnid: Option<String>,
    /// Its name, never empty, without control characters. Need not be unique.
    pub name: String,
}

/// A label file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelsError {
    /// It cannot be read.
    #[error("the labels cannot be read")]
    Read(#[from] WeightsError),
    /// Another number of labels than classes.
    #[error(
        "{} has {found} labels (line {line} is its last), but the model has {classes} classes; \
         give the label file that belongs to the weights",
        path.display()
    )]
    Count {
        /// The file.
        path: PathBuf,
        /// Labels in it.
        found: usize,
        /// Classes of the model.
        classes: usize,
        /// The last line with a label, from 1; 0 if there is none.
        line: usize,
    },
    /// A line is no label.
    #[error("{}:{line}: {what}; expected is `id<TAB>name` or just a name on every line", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Labels {
    /// Reads a label file for a model with `classes` classes.
    ///
    /// # Errors
    /// [`LabelsError`], with the line.
    pub fn read(path: &Path, classes: usize) -> Result<Labels, LabelsError> {
        let bytes = read_bytes(path, FILE_MAX)?;
        Labels::parse(&bytes, path, classes)
    }

    fn parse(bytes: &[u8], path: &Path, classes: usize) -> Result<Labels, LabelsError> {
        let body = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let body = body.strip_suffix(b"\n").unwrap_or(body);
        let lines: Vec<_> =
            if body.is_empty() { Vec::new() } else { body.split(|it| *it == b'\n').collect() };
        let mut entries = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            let refuse = |what| LabelsError::Line { path: path.to_owned(), line: index + 1, what };
            let entry = label(line).map_err(refuse)?;
            if entries.first().is_some_and(|it: &Label| it.wnid.is_some() != entry.wnid.is_some()) {
                return Err(refuse("it has an id and the first line has none, or the reverse"));
            }
            entries.push(entry);
        }
        if entries.len() != classes {
            let (found, line) = (entries.len(), lines.len());
            return Err(LabelsError::Count { path: path.to_owned(), found, classes, line });
        }
        Ok(Labels { entries, sha256: hex(&Sha256::digest(bytes)) })
    }
}

fn label(line: &[u8]) -> Result<Label, &'static str> {
    let line = str::from_utf8(line).map_err(|_| "it is not UTF-8")?;
    let line = line.strip_suffix('\r').unwrap_or(line);
    let (wnid, name) = match line.split_once('\t') {
        Some((id, name)) => (Some(id.trim()), name.trim()),
        None => (None, line.trim()),
    };
    if name.is_empty() {
        return Err("it has no name");
    }
    if name.chars().any(char::is_control) {
        return Err("its name has a control character");
    }
    if wnid.is_some_and(|it| it.is_empty() || !it.bytes().all(|it| it.is_ascii_graphic())) {
        return Err("its id is empty or has other than printable ASCII characters");
    }
    Ok(Label { wnid: wnid.map(str::to_owned), name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8], classes: usize) -> Result<Labels, String> {
        let labels = Labels::parse(text, Path::new("l.txt"), classes);
        labels.map_err(|e| e.to_string())
    }

    #[test]
    fn both_forms_are_read() {
        let labels = parse(b"n1\ta, b\nn2\tcrane\n", 2).unwrap();
        assert_eq!(labels.entries[0].wnid.as_deref(), Some("n1"));
        assert_eq!(labels.entries[0].name, "a, b");
        let labels = parse(b"\xef\xbb\xbffirst\r\nsecond one", 2).unwrap();
        assert_eq!(labels.entries[1], Label { wnid: None, name: "second one".into() });
    }

    #[test]
    fn another_number_of_labels_than_classes_is_refused_with_both_and_the_line() {
        for (text, found) in [(&b"a\nb\n"[..], 2), (b"a\nb\nc\nd", 4), (b"", 0)] {
            let error = parse(text, 3).unwrap_err();
            let expected = format!(
                "l.txt has {found} labels (line {found} is its last), but the model has 3 classes"
            );
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn a_line_that_is_no_label_is_refused_with_its_number() {
        let rows: [(&[u8], &str); 6] = [
            (b"a\n\nb", "l.txt:2: it has no name"),
            (b"a\n\xff\nb", "l.txt:2: it is not UTF-8"),
            (b"a\nn1\tb\nc", "l.txt:2: it has an id and"),
            (b"a\nb\x1b[31m\nc", "l.txt:2: its name has a control"),
            (b"n1\ta\n\tb\nn3\tc", "l.txt:2: its id is empty"),
            (b"a\nb\n\n", "l.txt:3: it has no name"),
        ];
        for (text, expected) in rows {
            let error = parse(text, 3).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
