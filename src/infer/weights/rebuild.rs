//! From a pickle's values to tensors: the constructors that a `state_dict` calls, and the views
//! of storages read out through their strides.

use std::collections::BTreeMap;

use crate::infer::weights::{
    Tensor,
    error::{Problem, shown},
    pickle::{Global, Loaded, Object, Storage, Value, View},
    tensor::{self, DIMENSIONS_MAX},
};

/// What a constructor gave.
#[derive(Debug)]
pub enum Built {
    /// A new object.
    New(Object),
    /// One of the arguments.
    Same(Value),
}

/// Calls one of the known constructors.
///
/// # Errors
/// What is wrong with the arguments.
pub fn call(objects: &[Object], global: Global, arguments: Value) -> Result<Built, String> {
    let arguments = tuple(objects, arguments).ok_or("the pickle calls with no tuple")?;
    match (global, arguments) {
        (Global::OrderedDict, []) => Ok(Built::New(Object::Dict(Vec::new()))),
        // Python 2 passes the items as a list of pairs.
        (Global::OrderedDict, [items]) => {
            let pairs = sequence(objects, *items).ok_or("an OrderedDict is made of no list")?;
            let pair = |it: &Value| match sequence(objects, *it) {
                Some([key, value]) => Some((*key, *value)),
                _ => None,
            };
            let pairs: Option<Vec<_>> = pairs.iter().map(pair).collect();
            let pairs = pairs.ok_or("an OrderedDict is made of something that is no pair")?;
            Ok(Built::New(Object::Dict(pairs)))
        }
        (Global::RebuildTensor, [storage, offset, shape, strides, _, _, ..]) => {
            let storage = match storage {
                Value::Object(index) if matches!(objects[*index], Object::Storage(_)) => *index,
                _ => return Err("a tensor is made of no storage".into()),
            };
            let offset = size(*offset).ok_or("a tensor's offset is no size")?;
            let shape = sizes(objects, *shape).ok_or("a tensor's shape is not a few sizes")?;
            let strides = sizes(objects, *strides).ok_or("a tensor's strides are no sizes")?;
            if shape.len() != strides.len() {
                return Err(format!(
                    "a tensor has {} extents, {} strides",
                    shape.len(),
                    strides.len()
                ));
            }
            Ok(Built::New(Object::Tensor(View { storage, offset, shape, strides })))
        }
        (Global::RebuildParameter, [tensor @ Value::Object(index), _, _])
            if matches!(objects[*index], Object::Tensor(_)) =>
        {
            Ok(Built::Same(*tensor))
        }
        _ => Err(format!("the pickle calls {global:?} with {} arguments", arguments.len())),
    }
}

/// The storage that a persistent id names: `("storage", type, key, location, elements)`, in the
/// stream format followed by a view, which only PyTorch before 0.4 used.
///
/// # Errors
/// What is wrong with the id.
pub fn storage(objects: &[Object], id: Value) -> Result<Storage, String> {
    let text = |value: Value| match value {
        Value::Object(index) => match &objects[index] {
            Object::Str(text) => Some(text.as_str()),
            _ => None,
        },
        _ => None,
    };
    let (kind, class, key, elements) = match tuple(objects, id) {
        Some([kind, class, key, _, elements] | [kind, class, key, _, elements, Value::None]) => {
            (*kind, *class, *key, *elements)
        }
        _ => return Err("a storage's id has another form than PyTorch gives it".into()),
    };
    let Value::Global(Global::Storage(dtype)) = class else {
        return Err("a storage's type is none".into());
    };
    match (text(kind), text(key), size(elements)) {
        (Some("storage"), Some(key), Some(elements)) => {
            Ok(Storage { key: key.to_owned(), dtype, elements })
        }
        _ => Err("a storage's id has another form than PyTorch gives it".into()),
    }
}

/// All storages that a pickle names, each once.
///
/// # Errors
/// [`Problem::Layout`] if one is named with two types or lengths.
pub fn storages(loaded: &Loaded) -> Result<BTreeMap<&str, &Storage>, Problem> {
    let mut found: BTreeMap<&str, &Storage> = BTreeMap::new();
    for object in &loaded.objects {
        if let Object::Storage(storage) = object {
            let earlier = *found.entry(&storage.key).or_insert(storage);
            if earlier != storage {
                let what = "this storage is named with two types or lengths";
                return Err(Problem::layout(&storage.key, what));
            }
        }
    }
    Ok(found)
}

/// The tensors of a `state_dict`, or of the one under the key `state_dict`. `bytes` has the bytes
/// of each storage, `room` is how many elements may come out in all.
///
/// # Errors
/// Any [`Problem`] of a tensor.
pub fn tensors(
    loaded: &Loaded,
    bytes: &BTreeMap<&str, &[u8]>,
    mut room: usize,
) -> Result<BTreeMap<String, Tensor>, Problem> {
    let mut tensors = BTreeMap::new();
    for (key, value) in state_dict(loaded)? {
        let name = loaded.text(*key).ok_or_else(|| Problem::NotStateDict {
            what: "a key of the dictionary is not a string".into(),
        })?;
        let Some(Object::Tensor(view)) = loaded.object(*value) else {
            let what = format!("`{}` is not a tensor", shown(name));
            return Err(Problem::NotStateDict { what });
        };
        let Object::Storage(storage) = &loaded.objects[view.storage] else {
            unreachable!("a view is only ever made of a storage");
        };
        let elements = check(name, view, storage)?;
        if tensor::is_counter(name) {
            continue;
        }
        // Tensors may share a storage, so that little input could become much output.
        room = room.checked_sub(elements).ok_or_else(|| {
            Problem::layout(name, "the tensors together are far larger than the file")
        })?;
        let values = bytes.get(storage.key.as_str()).ok_or_else(|| {
            Problem::layout(name, format!("its storage `{}` is missing", shown(&storage.key)))
        })?;
        let tensor = read(name, view, storage, values, elements)?;
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(Problem::Duplicate { name: shown(name) });
        }
    }
    Ok(tensors)
}

fn state_dict(loaded: &Loaded) -> Result<&[(Value, Value)], Problem> {
    let dict = |value: Value| match loaded.object(value) {
        Some(Object::Dict(items)) => Some(items.as_slice()),
        _ => None,
    };
    let top = dict(loaded.value).ok_or_else(|| Problem::NotStateDict {
        what: "the file holds something else than a dictionary".into(),
    })?;
    let inner = top.iter().find(|it| loaded.text(it.0) == Some("state_dict"));
    Ok(inner.and_then(|it| dict(it.1)).unwrap_or(top))
}

/// Checks a view against its storage; gives the number of its elements.
fn check(name: &str, view: &View, storage: &Storage) -> Result<usize, Problem> {
    let elements = tensor::elements(name, &view.shape)?;
    if storage.elements < elements {
        let what = format!("{elements} elements in a storage of {}", storage.elements);
        return Err(Problem::layout(name, what));
    }
    let last =
        view.shape.iter().zip(&view.strides).try_fold(view.offset, |last, (extent, stride)| {
            last.checked_add(extent.saturating_sub(1).checked_mul(*stride)?)
        });
    match last {
        Some(last) if elements == 0 || last < storage.elements => Ok(elements),
        _ => Err(Problem::layout(
            name,
            format!(
                "offset {}, shape {:?} and strides {:?} reach outside its storage of {} elements",
                view.offset, view.shape, view.strides, storage.elements
            ),
        )),
    }
}

fn read(
    name: &str,
    view: &View,
    storage: &Storage,
    bytes: &[u8],
    elements: usize,
) -> Result<Tensor, Problem> {
    let width = storage.dtype.size();
    if Some(bytes.len()) != storage.elements.checked_mul(width) {
        let what =
            format!("its storage has {} bytes for {} elements", bytes.len(), storage.elements);
        return Err(Problem::layout(name, what));
    }
    let shape = view.shape.clone();
    let decode = |bytes: &[u8]| {
        storage.dtype.decode(bytes).ok_or_else(|| tensor::refuse_dtype(name, "int64"))
    };
    if elements == 0 || contiguous(view) {
        let start = if elements == 0 { 0 } else { view.offset * width };
        return Ok(Tensor { shape, data: decode(&bytes[start..start + elements * width])? });
    }
    let mut gathered = Vec::with_capacity(elements * width);
    let mut index = [0_usize; DIMENSIONS_MAX];
    for _ in 0..elements {
        let element: usize = index.iter().zip(&view.strides).map(|(i, stride)| i * stride).sum();
        let start = (view.offset + element) * width;
        gathered.extend_from_slice(&bytes[start..start + width]);
        for (i, extent) in index.iter_mut().zip(&shape).rev() {
            *i += 1;
            if *i < *extent {
                break;
            }
            *i = 0;
        }
    }
    Ok(Tensor { shape, data: decode(&gathered)? })
}

/// Whether a view's elements lie one after the other. Strides of extents of 1 mean nothing.
fn contiguous(view: &View) -> bool {
    let mut expected = 1;
    for (extent, stride) in view.shape.iter().zip(&view.strides).rev() {
        if *extent != 1 && *stride != expected {
            return false;
        }
        expected *= extent;
    }
    true
}

fn tuple(objects: &[Object], value: Value) -> Option<&[Value]> {
    match value {
        Value::Object(index) => match &objects[index] {
            Object::Tuple(items) => Some(items),
            _ => None,
        },
        _ => None,
    }
}

fn sequence(objects: &[Object], value: Value) -> Option<&[Value]> {
    match value {
        Value::Object(index) => match &objects[index] {
            Object::Tuple(items) | Object::List(items) => Some(items),
            _ => None,
        },
        _ => None,
    }
}

fn size(value: Value) -> Option<usize> {
    match value {
        Value::Int(value) => usize::try_from(value).ok(),
        _ => None,
    }
}

fn sizes(objects: &[Object], value: Value) -> Option<Vec<usize>> {
    let items = tuple(objects, value).filter(|it| it.len() <= DIMENSIONS_MAX)?;
    items.iter().map(|it| size(*it)).collect()
}
