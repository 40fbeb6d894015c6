//! PyTorch's zip format (`torch.save` since 1.6): a pickle and one plain entry per storage.
//!
//! A reader of its own, as the format needs little: no compression, so that no entry can grow,
//! and every entry is a slice of the file.

use std::collections::BTreeMap;

use crate::infer::weights::{
    Tensor,
    error::{Problem, shown},
    pickle, rebuild,
};

/// What every zip file with an entry starts with.
pub const MAGIC: &[u8] = b"PK\x03\x04";

const END: &[u8] = b"PK\x05\x06";
const END_LENGTH: usize = 22;
const COMMENT_MAX: usize = 0xffff;
/// Entries; PyTorch writes one per tensor and some more.
const ENTRIES_MAX: u64 = 1 << 16;

/// Reads a `state_dict` out of a zip archive.
///
/// # Errors
/// Any [`Problem`] of the archive, the pickle or a tensor.
pub fn parse(file: &[u8]) -> Result<BTreeMap<String, Tensor>, Problem> {
    let entries = entries(file)?;
    let pickles: Vec<_> = entries.keys().filter_map(|it| it.strip_suffix("data.pkl")).collect();
    let folder = match pickles[..] {
        [folder] if folder.ends_with('/') => folder,
        _ => return Err(Problem::Foreign("a zip archive that PyTorch did not make")),
    };
    if let Some(order) = entries.get(format!("{folder}byteorder").as_str())
        && order.checked()? != b"little"
    {
        return Err(Problem::Foreign("a PyTorch file of a big-endian machine"));
    }
    let loaded = pickle::load(entries[format!("{folder}data.pkl").as_str()].checked()?)?;
    let mut bytes = BTreeMap::new();
    for key in rebuild::storages(&loaded)?.keys() {
        if let Some(entry) = entries.get(format!("{folder}data/{key}").as_str()) {
            bytes.insert(*key, entry.checked()?);
        }
    }
    rebuild::tensors(&loaded, &bytes, file.len())
}

/// Whether an entry belongs to a TorchScript archive, or to the format that came before it.
fn is_script(entry: &str) -> bool {
    let inner = entry.split_once('/').map_or("", |it| it.1);
    inner.starts_with("code/") || ["constants.pkl", "bytecode.pkl", "model.json"].contains(&inner)
}

/// A plainly stored file.
#[derive(Debug)]
struct Entry<'a> {
    name: &'a str,
    start: usize,
    bytes: &'a [u8],
    crc: u32,
}

impl<'a> Entry<'a> {
    /// The bytes, once their checksum has been found right.
    fn checked(&self) -> Result<&'a [u8], Problem> {
        let crc = crc32(self.bytes);
        if crc == self.crc {
            return Ok(self.bytes);
        }
        let what = format!(
            "the checksum of entry `{}` is {crc:08x} instead of {:08x}",
            shown(self.name),
            self.crc
        );
        Err(Problem::malformed(what, self.start))
    }
}

/// The central directory, each entry checked to lie in the file, alone.
fn entries(file: &[u8]) -> Result<BTreeMap<&str, Entry<'_>>, Problem> {
    let (mut at, count) = directory(file)?;
    let mut entries = BTreeMap::new();
    let mut spans = Vec::new();
    for _ in 0..count {
        let entry = entry(file, &mut at)?;
        spans.push((entry.start, entry.start + entry.bytes.len()));
        if let Some(twice) = entries.insert(entry.name, entry) {
            return Err(Problem::Duplicate { name: shown(twice.name) });
        }
    }
    spans.sort_unstable();
    if let Some(pair) = spans.windows(2).find(|it| it[1].0 < it[0].1) {
        return Err(Problem::malformed("two entries of the archive overlap", pair[1].0));
    }
    Ok(entries)
}

/// Where the central directory starts, and its number of entries.
fn directory(file: &[u8]) -> Result<(usize, u64), Problem> {
    let from = file.len().saturating_sub(END_LENGTH + COMMENT_MAX);
    let end = file[from..].windows(END.len()).rposition(|it| it == END).map(|it| from + it);
    let end = end.ok_or_else(|| Problem::Truncated {
        what: "the archive's directory".into(),
        need: END_LENGTH as u64,
        have: 0,
    })?;
    let mut count = u64::from(u16::from_le_bytes(array(file, end + 10)?));
    let mut size = u64::from(u32::from_le_bytes(array(file, end + 12)?));
    let mut start = u64::from(u32::from_le_bytes(array(file, end + 16)?));
    // PyTorch writes zip64 records for small files too.
    if let Some(locator) = end.checked_sub(20)
        && file[locator..].starts_with(b"PK\x06\x07")
    {
        let end64 = place(u64::from_le_bytes(array(file, locator + 8)?));
        if array(file, end64)? != *b"PK\x06\x06" {
            return Err(Problem::malformed("the archive's zip64 record is missing", end64));
        }
        count = u64::from_le_bytes(array(file, end64.saturating_add(32))?);
        size = u64::from_le_bytes(array(file, end64.saturating_add(40))?);
        start = u64::from_le_bytes(array(file, end64.saturating_add(48))?);
    }
    if ENTRIES_MAX < count {
        let what = "the number of the archive's entries".into();
        return Err(Problem::TooLarge { what, size: count, limit: ENTRIES_MAX });
    }
    slice(file, place(start), size, "the archive's directory")?;
    Ok((place(start), count))
}

/// One record of the central directory at `at`, which moves on.
fn entry<'a>(file: &'a [u8], at: &mut usize) -> Result<Entry<'a>, Problem> {
    let start = *at;
    let record = slice(file, start, 46, "a record of the archive's directory")?;
    if !record.starts_with(b"PK\x01\x02") {
        return Err(Problem::malformed("the archive's directory is broken", start));
    }
    let u16_at = |at: usize| array(record, at).map(u16::from_le_bytes);
    let u32_at = |at: usize| array(record, at).map(u32::from_le_bytes);
    let (name_length, extra_length) = (u16_at(28)?, u16_at(30)?);
    let name = slice(file, start + 46, u64::from(name_length), "an entry's name")?;
    let name = str::from_utf8(name)
        .map_err(|_| Problem::malformed("an entry's name is not UTF-8", start + 46))?;
    // Before anything else is asked of the entry: TorchScript compresses its code.
    if is_script(name) {
        return Err(Problem::TorchScript { entry: shown(name) });
    }
    let extra_at = start + 46 + usize::from(name_length);
    let extra = slice(file, extra_at, u64::from(extra_length), "an entry's extra field")?;
    *at = extra_at + usize::from(extra_length) + usize::from(u16_at(32)?);

    // Sizes and offset at their limit stand in the zip64 field, in this order.
    let mut wide = zip64(extra).as_chunks().0.iter().map(|it| u64::from_le_bytes(*it));
    let mut widen = |narrow: u32| match narrow {
        u32::MAX => wide.next().unwrap_or(u64::MAX),
        narrow => u64::from(narrow),
    };
    let (size, packed, local) = (widen(u32_at(24)?), widen(u32_at(20)?), widen(u32_at(42)?));
    let (flags, method) = (u16_at(8)?, u16_at(10)?);
    if method != 0 || flags & 1 != 0 || size != packed {
        return Err(Problem::Compressed { entry: shown(name) });
    }
    let local = place(local);
    let header = slice(file, local, 30, "an entry's header")?;
    if !header.starts_with(MAGIC) {
        return Err(Problem::malformed("an entry's header is broken", local));
    }
    let local_name = u64::from(u16::from_le_bytes(array(header, 26)?));
    let local_extra = usize::from(u16::from_le_bytes(array(header, 28)?));
    if slice(file, local + 30, local_name, "an entry's name")? != name.as_bytes() {
        return Err(Problem::malformed("an entry has two names", local));
    }
    let data = local + 30 + name.len() + local_extra;
    let bytes = slice(file, data, size, &format!("entry `{}`", shown(name)))?;
    Ok(Entry { name, start: data, bytes, crc: u32_at(16)? })
}

/// The payload of the zip64 field; empty if there is none.
fn zip64(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([head[2], head[3]]));
        let Some(payload) = rest.get(..length) else { break };
        if u16::from_le_bytes([head[0], head[1]]) == 1 {
            return payload;
        }
        extra = &rest[length..];
    }
    &[]
}

/// An offset as an index; one beyond memory lies outside of every file.
fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Problem> {
    let slice = slice(bytes, at, N as u64, "a field of the archive")?;
    Ok(slice.try_into().expect("the slice is as long as asked for"))
}

fn slice<'a>(bytes: &'a [u8], at: usize, length: u64, what: &str) -> Result<&'a [u8], Problem> {
    let left = bytes.get(at..).unwrap_or(&[]);
    left.get(..place(length)).ok_or_else(|| Problem::Truncated {
        what: what.to_owned(),
        need: length,
        have: left.len() as u64,
    })
}

/// CRC-32 as in zip, a byte at a time.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, it| TABLE[usize::from(crc as u8 ^ it)] ^ (crc >> 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_zip() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }
}
