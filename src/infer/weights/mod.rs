//! Weights files to named float32 tensors, by code that can run nothing.
//!
//! Reads safetensors and PyTorch's `state_dict` in both of its formats; every size is checked
//! against the file before anything is allocated. Writes safetensors only. Knows nothing of the
//! network: what tensors it needs is the argument of [`check`].

pub mod atomic;
pub mod error;
pub mod fetch;
pub mod labels;
pub mod legacy;
pub mod metadata;
pub mod pickle;
pub mod rebuild;
pub mod safetensors;
pub mod tensor;
pub mod zip;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::Path,
};

use sha2::{Digest, Sha256};

use crate::infer::weights::{
    atomic::Atomic,
    error::{Mismatch, Problem, WeightsError},
    metadata::Metadata,
};

/// Bytes of a weights file; ghostnet_1x has 21 MB in float32. Bounds the memory of reading.
pub const FILE_MAX: u64 = 128 << 20;

/// A network's parameters and what is known of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// By name, as the published checkpoint names them; without `module.` and counters.
    pub tensors: BTreeMap<String, Tensor>,
    /// What the checkpoint says of itself.
    pub metadata: Metadata,
    /// Hash of the file it was read from, in hex.
    pub sha256: String,
}

/// A dense tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Row-major values, as many as the product of `shape`.
    pub data: Vec<f32>,
}

/// Reads a weights file, whichever of the three formats its content shows.
///
/// # Errors
/// [`WeightsError::Io`] if it cannot be read, [`WeightsError::Content`] if it is refused.
pub fn read(path: &Path) -> Result<Checkpoint, WeightsError> {
    let bytes = read_bytes(path, FILE_MAX)?;
    let named_safetensors = path.extension().is_some_and(|it| it == "safetensors");
    let checkpoint = parse(&bytes, named_safetensors);
    checkpoint.map_err(|source| WeightsError::Content { path: path.to_owned(), source })
}

/// Reads the bytes of a weights file. `named_safetensors` decides only how a file is refused that
/// no format's content is recognised in.
///
/// # Errors
/// Why the bytes are refused.
pub fn parse(bytes: &[u8], named_safetensors: bool) -> Result<Checkpoint, Problem> {
    let (tensors, strings) = if bytes.starts_with(zip::MAGIC) {
        (zip::parse(bytes)?, BTreeMap::new())
    } else if legacy::is_legacy(bytes) {
        (legacy::parse(bytes)?, BTreeMap::new())
    } else if bytes.get(8) == Some(&b'{') || (named_safetensors && foreign(bytes).is_none()) {
        let contents = safetensors::parse(bytes)?;
        (contents.tensors, contents.metadata)
    } else {
        return Err(Problem::Foreign(foreign(bytes).unwrap_or("of no known format")));
    };
    let tensors = without_prefix(tensors);
    let metadata = Metadata::parse(strings, &tensors)?;
    Ok(Checkpoint { tensors, metadata, sha256: hex(&Sha256::digest(bytes)) })
}

/// Writes a checkpoint as safetensors; gives the hash of the file. The file appears at `path`
/// whole or not at all.
///
/// # Errors
/// [`WeightsError::Io`] if it cannot be written.
pub fn write(path: &Path, checkpoint: &Checkpoint) -> Result<String, WeightsError> {
    let failed = |source| WeightsError::Io { action: "write", path: path.to_owned(), source };
    let file = Atomic::create(path).map_err(failed)?;
    let sha256 = {
        let mut out = Hashing { inner: BufWriter::new(file.file()), hash: Sha256::new() };
        safetensors::write(&mut out, &checkpoint.tensors, &checkpoint.metadata.strings())
            .and_then(|()| out.flush())
            .map_err(failed)?;
        hex(&out.hash.finalize())
    };
    file.commit().map_err(failed)?;
    Ok(sha256)
}

/// Checks that a checkpoint has exactly the expected tensors, all finite.
///
/// # Errors
/// A [`Mismatch`] that names everything that does not fit.
pub fn check(checkpoint: &Checkpoint, expected: &[(String, Vec<usize>)]) -> Result<(), Mismatch> {
    let names: BTreeSet<_> = expected.iter().map(|it| &it.0).collect();
    let tensors = &checkpoint.tensors;
    let missing = names.iter().filter(|it| !tensors.contains_key(**it));
    let extra = tensors.keys().filter(|it| !names.contains(it));
    let misshapen = expected.iter().filter_map(|(name, shape)| {
        let found = &tensors.get(name)?.shape;
        (found != shape).then(|| (name.clone(), found.clone(), shape.clone()))
    });
    let not_finite = tensors.iter().filter(|it| !it.1.data.iter().all(|it| it.is_finite()));
    let mismatch = Mismatch {
        missing: missing.map(|it| (*it).clone()).collect(),
        extra: extra.cloned().collect(),
        misshapen: misshapen.collect(),
        not_finite: not_finite.map(|it| it.0.clone()).collect(),
    };
    let fits = mismatch.missing.is_empty()
        && mismatch.extra.is_empty()
        && mismatch.misshapen.is_empty()
        && mismatch.not_finite.is_empty();
    if fits { Ok(()) } else { Err(mismatch) }
}

/// Bytes as lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|it| format!("{it:02x}")).collect()
}

/// A regular file of at most `limit` bytes, whole.
fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, WeightsError> {
    let failed = |source| WeightsError::Io { action: "read", path: path.to_owned(), source };
    // A pipe would block already when it is opened.
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    if limit < metadata.len() {
        let what = "the file's length in bytes".into();
        let source = Problem::TooLarge { what, size: metadata.len(), limit };
        return Err(WeightsError::Content { path: path.to_owned(), source });
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let file = File::open(path).map_err(failed)?;
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// What a file is that is none of ours, as far as people mix them up.
fn foreign(bytes: &[u8]) -> Option<&'static str> {
    let starts = |prefix: &[u8]| bytes.starts_with(prefix);
    let head = &bytes[..bytes.len().min(64)];
    let text = head.trim_ascii_start();
    if bytes.is_empty() {
        Some("empty")
    } else if starts(b"version https://git-lfs") {
        Some("a Git LFS pointer, not the file it points to")
    } else if text.starts_with(b"<!") || text.starts_with(b"<html") {
        Some("a web page, not the file it may link to")
    } else if starts(&[0x80]) {
        Some("a pickle, but not one of PyTorch")
    } else if bytes.get(4..8) == Some(b"PTMF") {
        Some("a TorchScript mobile file, which carries code")
    } else if starts(&[0x1f, 0x8b]) {
        Some("compressed with gzip; unpack it first")
    } else if bytes.get(257..262) == Some(b"ustar") {
        Some("a tar archive, as PyTorch wrote before 0.1.10")
    } else if starts(b"PK\x05\x06") {
        Some("an empty zip archive")
    } else if starts(b"\x89HDF") {
        Some("an HDF5 file")
    } else {
        None
    }
}

/// Names without the `module.` that `DataParallel` puts before all of them.
fn without_prefix(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    const PREFIX: &str = "module.";
    if !tensors.keys().all(|it| it.starts_with(PREFIX)) {
        return tensors;
    }
    tensors.into_iter().map(|(name, tensor)| (name[PREFIX.len()..].to_owned(), tensor)).collect()
}

/// Hashes what is written through it.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
