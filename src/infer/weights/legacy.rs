//! PyTorch's old stream format (`torch.save` before 1.6): five pickles, then the storages.

use std::collections::BTreeMap;

use crate::infer::weights::{
    Tensor,
    error::{Problem, shown},
    pickle::{self, Loaded, Object, Value},
    rebuild,
};

/// 0x1950a86a20f9469cfc6c, little-endian: the number that the first pickle holds.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// Whether a file starts with the format's number.
pub fn is_legacy(file: &[u8]) -> bool {
    let head = &file[..file.len().min(32)];
    head.starts_with(&[0x80]) && head.windows(MAGIC.len()).any(|it| it == MAGIC)
}

/// Reads a `state_dict` out of a stream.
///
/// # Errors
/// Any [`Problem`] of a pickle or a tensor. Offsets are from the start of their pickle.
pub fn parse(file: &[u8]) -> Result<BTreeMap<String, Tensor>, Problem> {
    let mut at = 0;
    let mut next = || {
        let loaded = pickle::load(&file[at..])?;
        at += loaded.length;
        Ok(loaded)
    };
    let magic = next()?;
    if magic.object(magic.value) != Some(&Object::Long(MAGIC.to_vec())) {
        return Err(Problem::Foreign("a pickle, but not one of PyTorch"));
    }
    if next()?.value != Value::Int(PROTOCOL) {
        return Err(Problem::Foreign("a PyTorch stream of an unknown version"));
    }
    little_endian(&next()?)?;
    let loaded = next()?;
    let keys = next()?;
    let bytes = storages(file, at, &loaded, &keys)?;
    rebuild::tensors(&loaded, &bytes, file.len())
}

/// The third pickle describes the machine that wrote the file.
fn little_endian(system: &Loaded) -> Result<(), Problem> {
    let Some(Object::Dict(items)) = system.object(system.value) else {
        return Err(Problem::Foreign("a PyTorch stream with no description of its machine"));
    };
    let order = items.iter().find(|it| system.text(it.0) == Some("little_endian"));
    match order {
        Some((_, Value::Bool(true))) => Ok(()),
        _ => Err(Problem::Foreign("a PyTorch file of a big-endian machine")),
    }
}

/// The storages' bytes: for each key in the order of the last pickle, a count and the elements.
fn storages<'a, 'b>(
    file: &'a [u8],
    mut at: usize,
    loaded: &'b Loaded,
    keys: &'b Loaded,
) -> Result<BTreeMap<&'b str, &'a [u8]>, Problem> {
    let Some(Object::List(items)) = keys.object(keys.value) else {
        return Err(Problem::malformed("the stream has no list of storages", at));
    };
    let declared = rebuild::storages(loaded)?;
    let mut bytes = BTreeMap::new();
    for item in items {
        let key = keys.text(*item).unwrap_or_default();
        let Some(storage) = declared.get(key) else {
            let what = format!("the stream has a storage `{}` that nothing uses", shown(key));
            return Err(Problem::malformed(what, at));
        };
        let left = &file[at..];
        let count: Option<&[u8; 8]> = left.first_chunk();
        let length = storage.elements.checked_mul(storage.dtype.size());
        let stored =
            length.and_then(|length| length.checked_add(8)).and_then(|length| left.get(8..length));
        let (Some(count), Some(stored)) = (count, stored) else {
            return Err(Problem::Truncated {
                what: format!("storage `{}`", shown(key)),
                need: (length.unwrap_or(usize::MAX) as u64).saturating_add(8),
                have: left.len() as u64,
            });
        };
        if u64::from_le_bytes(*count) != storage.elements as u64 {
            let what = format!(
                "storage `{}` has {} elements instead of {}",
                shown(key),
                u64::from_le_bytes(*count),
                storage.elements
            );
            return Err(Problem::malformed(what, at));
        }
        at += 8 + stored.len();
        if bytes.insert(key, stored).is_some() {
            return Err(Problem::Duplicate { name: shown(key) });
        }
    }
    if at != file.len() {
        let what = format!("{} bytes follow the last storage", file.len() - at);
        return Err(Problem::malformed(what, at));
    }
    Ok(bytes)
}
