//! The safetensors format: a JSON header with names, types and offsets, then the numbers.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
    marker::PhantomData,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use crate::infer::weights::{
    Tensor,
    error::{Problem, shown},
    tensor::{self, Dtype},
};

/// Bytes of the header. GhostNet's takes 50 kB, and the reference logits of ten pictures 120 kB.
const HEADER_MAX: u64 = 4 << 20;
const METADATA: &str = "__metadata__";

/// What a file holds.
#[derive(Debug)]
pub struct Contents {
    /// The tensors, counters left out.
    pub tensors: BTreeMap<String, Tensor>,
    /// The header's strings.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a whole file.
///
/// # Errors
/// Any [`Problem`] of the header or a tensor.
pub fn parse(file: &[u8]) -> Result<Contents, Problem> {
    let truncated = |what: &str, need: u64, have: usize| Problem::Truncated {
        what: what.to_owned(),
        need,
        have: have as u64,
    };
    let (length, rest) =
        file.split_first_chunk().ok_or_else(|| truncated("the header's length", 8, file.len()))?;
    let length = u64::from_le_bytes(*length);
    if HEADER_MAX < length {
        let what = "the header's length in bytes".into();
        return Err(Problem::TooLarge { what, size: length, limit: HEADER_MAX });
    }
    // The limit above is below any usize.
    let (header, data) = rest
        .split_at_checked(length as usize)
        .ok_or_else(|| truncated("the header", length, rest.len()))?;
    let header = self::header(header)?;
    lie_side_by_side(&header.tensors, data.len())?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in &header.tensors {
        if let Some(tensor) = read(name, entry, data)? {
            tensors.insert(name.clone(), tensor);
        }
    }
    Ok(Contents { tensors, metadata: header.metadata })
}

/// Writes a whole file: names in order, the numbers as float32 without gaps, from a multiple of
/// eight bytes on.
///
/// # Errors
/// Those of the writer.
pub fn write(
    out: &mut impl Write,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    header.insert(METADATA.into(), serde_json::json!(metadata));
    let mut offset = 0;
    for (name, tensor) in tensors {
        let end = offset + tensor.data.len() * Dtype::F32.size();
        let entry = serde_json::json!({
            "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end],
        });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in tensors.values() {
        let bytes: Vec<u8> = tensor.data.iter().flat_map(|it| it.to_le_bytes()).collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// What the header says of one tensor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

#[derive(Debug, Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

fn header(bytes: &[u8]) -> Result<Header, Problem> {
    if bytes.first() != Some(&b'{') {
        return Err(Problem::malformed("the header is not JSON", 8));
    }
    let header: Result<Header, _> = serde_json::from_slice(bytes);
    header.map_err(|e| match e.to_string().strip_prefix(TWICE) {
        // serde_json appends the position to the message.
        Some(rest) => Problem::Duplicate {
            name: rest.rsplit_once(" at line ").unwrap_or((rest, "")).0.into(),
        },
        None => Problem::malformed(
            format!("the header is no safetensors header: {}", shown(&e.to_string())),
            8 + e.column(),
        ),
    })
}

/// Marks the error of a repeated key on its way through serde.
const TWICE: &str = "key twice: ";

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut metadata = None;
                while let Some(key) = map.next_key::<String>()? {
                    let twice = match key.as_str() {
                        METADATA => metadata.replace(map.next_value::<Unique<String>>()?).is_some(),
                        _ => header.tensors.insert(key.clone(), map.next_value()?).is_some(),
                    };
                    if twice {
                        return Err(repeated(&key));
                    }
                }
                header.metadata = metadata.map(|it| it.0).unwrap_or_default();
                Ok(header)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// An object whose keys occur once; serde's own maps keep the last of several.
struct Unique<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique<T>, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Unique<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique<T>, A::Error> {
                let mut items = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if items.insert(key.clone(), map.next_value()?).is_some() {
                        return Err(repeated(&key));
                    }
                }
                Ok(Unique(items))
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

fn repeated<E: serde::de::Error>(key: &str) -> E {
    E::custom(format_args!("{TWICE}{}", shown(key)))
}

/// Checks that the tensors cover the data exactly once: no overlap, no gap, nothing outside.
fn lie_side_by_side(tensors: &BTreeMap<String, Entry>, length: usize) -> Result<(), Problem> {
    let mut spans: Vec<_> = tensors.iter().map(|it| (it.1.data_offsets, it.0)).collect();
    spans.sort_unstable();
    let mut covered = 0;
    for ((start, end), name) in spans {
        if end < start {
            return Err(Problem::layout(
                name,
                format!("it ends at {end}, before its start {start}"),
            ));
        }
        if start < covered {
            let what = format!("it starts at {start}, inside of another that ends at {covered}");
            return Err(Problem::layout(name, what));
        }
        if covered < start {
            let what = format!("bytes {covered} to {start} before it belong to no tensor");
            return Err(Problem::layout(name, what));
        }
        if length < end {
            return Err(Problem::Truncated {
                what: format!("tensor `{}`", shown(name)),
                need: (end - start) as u64,
                have: length.saturating_sub(start) as u64,
            });
        }
        covered = end;
    }
    if covered < length {
        let what = format!("{} bytes follow the last tensor", length - covered);
        return Err(Problem::malformed(what, covered));
    }
    Ok(())
}

/// One tensor; `None` for a counter.
fn read(name: &str, entry: &Entry, data: &[u8]) -> Result<Option<Tensor>, Problem> {
    let dtype = match entry.dtype.as_str() {
        "F32" => Dtype::F32,
        "F64" => Dtype::F64,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        "I64" if tensor::is_counter(name) => Dtype::I64,
        other => return Err(tensor::refuse_dtype(name, other)),
    };
    let (start, end) = entry.data_offsets;
    let elements = tensor::elements(name, &entry.shape)?;
    if elements.checked_mul(dtype.size()) != Some(end - start) {
        let what = format!(
            "{} bytes, but shape {:?} of {} needs {} elements of {} bytes",
            end - start,
            entry.shape,
            entry.dtype,
            elements,
            dtype.size()
        );
        return Err(Problem::layout(name, what));
    }
    let counter = tensor::is_counter(name);
    let values = dtype.decode(&data[start..end]).filter(|_| !counter);
    Ok(values.map(|values| Tensor { shape: entry.shape.clone(), data: values }))
}
