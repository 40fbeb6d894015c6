//! What can be wrong with a weights file, said with names and numbers.

use std::{fmt, io, path::PathBuf};

/// A weights file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file was read, but is not what it should be.
    #[error("weights {} refused", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Problem,
    },
}

/// Why the bytes of a file are refused as weights. Strings out of the file are already [`shown`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Neither of the known formats.
    #[error(
        "it is {0}; expected are .safetensors, or a PyTorch state_dict (.pth) in the zip or the \
         old stream format"
    )]
    Foreign(&'static str),
    /// A TorchScript archive: a program, not just numbers.
    #[error(
        "it is a TorchScript archive (it has `{entry}`), which can carry code; save the model's \
         state_dict() instead"
    )]
    TorchScript {
        /// The archive entry that shows it.
        entry: String,
    },
    /// The pickle names something that weights do not need.
    #[error(
        "its pickle asks for `{name}` at byte {at}, which weights do not need; nothing was run; \
         do not load this file elsewhere unless you trust it, and save only the state_dict()"
    )]
    Global {
        /// Module and name.
        name: String,
        /// Offset in the pickle.
        at: usize,
    },
    /// A pickle opcode that weights do not need.
    #[error("its pickle has opcode 0x{opcode:02x} at byte {at}, which weights do not need")]
    Opcode {
        /// The opcode.
        opcode: u8,
        /// Offset in the pickle.
        at: usize,
    },
    /// The structure is broken.
    #[error("{what} (byte {at}); the file is damaged, get it again")]
    Malformed {
        /// What is broken.
        what: String,
        /// Offset in the file or, for pickles, in the pickle.
        at: usize,
    },
    /// The file ends before something that it announces.
    #[error("it ends early: {what} needs {need} bytes, {have} are left; get the file again")]
    Truncated {
        /// What is cut.
        what: String,
        /// Bytes that it needs.
        need: u64,
        /// Bytes that are left.
        have: u64,
    },
    /// Beyond a limit of ours.
    #[error("{what} is {size}, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A zip entry is compressed or encrypted; PyTorch stores its entries plainly.
    #[error(
        "its entry `{entry}` is compressed or encrypted; PyTorch stores entries plainly, so it \
         was packed by something else: unpack it and save the weights again"
    )]
    Compressed {
        /// The archive entry.
        entry: String,
    },
    /// A name occurs twice.
    #[error("`{name}` occurs twice")]
    Duplicate {
        /// The tensor, entry or key.
        name: String,
    },
    /// A tensor's type cannot be used.
    #[error("tensor `{name}` has type {dtype}; usable are float32, float64, float16 and bfloat16")]
    Dtype {
        /// The tensor.
        name: String,
        /// The type as the file names it.
        dtype: String,
    },
    /// A tensor lies outside of its bytes, overlaps, or has another size than they.
    #[error("tensor `{name}`: {what}")]
    Layout {
        /// The tensor.
        name: String,
        /// What does not fit.
        what: String,
    },
    /// Not a dictionary of tensors.
    #[error("{what}; expected is a state_dict: a dictionary from names to tensors")]
    NotStateDict {
        /// What was found.
        what: String,
    },
    /// The metadata cannot be used.
    #[error("metadata `{key}`: {what}")]
    Metadata {
        /// The key.
        key: String,
        /// What is wrong.
        what: String,
    },
}

impl Problem {
    /// A broken structure at an offset.
    pub fn malformed(what: impl Into<String>, at: usize) -> Problem {
        Problem::Malformed { what: what.into(), at }
    }

    /// A tensor that does not fit its bytes.
    pub fn layout(name: &str, what: impl Into<String>) -> Problem {
        Problem::Layout { name: shown(name), what: what.into() }
    }

    /// Metadata that cannot be used.
    pub fn metadata(key: &str, what: impl Into<String>) -> Problem {
        Problem::Metadata { key: shown(key), what: what.into() }
    }
}

/// A checkpoint is sound, but is not the network that was expected.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct Mismatch {
    /// Expected, but not in the checkpoint.
    pub missing: Vec<String>,
    /// In the checkpoint, but not expected.
    pub extra: Vec<String>,
    /// With another shape: name, shape in the checkpoint, expected shape.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors with a value that is not a finite number.
    pub not_finite: Vec<String>,
}

/// Names listed of each kind; a checkpoint of another network would fill screens.
const LISTED_MAX: usize = 20;

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |names: &[String]| names.iter().map(|it| shown(it)).collect::<Vec<_>>();
        let misshapen: Vec<_> = self
            .misshapen
            .iter()
            .map(|(name, found, expected)| {
                format!("{} {found:?} instead of {expected:?}", shown(name))
            })
            .collect();
        let lists = [
            ("missing", named(&self.missing)),
            ("extra", named(&self.extra)),
            ("misshapen", misshapen),
            ("NaN or infinite", named(&self.not_finite)),
        ];
        write!(f, "the checkpoint does not fit the network")?;
        for (kind, items) in lists.iter().filter(|it| !it.1.is_empty()) {
            let listed = &items[..items.len().min(LISTED_MAX)];
            write!(f, "; {} {kind}: {}", items.len(), listed.join(", "))?;
            if listed.len() < items.len() {
                write!(f, " and {} more", items.len() - listed.len())?;
            }
        }
        Ok(())
    }
}

/// A string out of a file, made fit for a message: control characters escaped, length bounded.
pub fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 120;
    let mut out = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == CHARS_MAX {
            out.push('…');
            break;
        }
        match c.is_control() || c == '`' {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}
