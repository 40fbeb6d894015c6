//! A pickle machine that can run nothing: it builds plain values, and knows six names.
//!
//! Every opcode and every global that is not needed for a `state_dict` is refused by name. Values
//! live in one arena and refer to each other by index, so nothing here recurses, however deeply a
//! hostile pickle nests, and memory grows by at most some tens of bytes per byte of pickle.

use std::collections::HashMap;

use crate::infer::weights::{
    error::{Problem, shown},
    rebuild,
    tensor::Dtype,
};

/// A pickle's length; a `state_dict` of GhostNet takes 0.1 MB. Bounds the machine's memory too.
pub const PICKLE_MAX: usize = 1 << 20;
/// Strings, tuples, tensors and so on in a pickle; GhostNet's has some 4,000.
const OBJECTS_MAX: usize = 1 << 18;

/// A value on the machine's stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer of at most eight bytes.
    Int(i64),
    /// A float; nothing that we read is one, so the number itself is not kept.
    Float,
    /// One of the known names.
    Global(Global),
    /// Something in the arena.
    Object(usize),
}

/// A name that a pickle may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// `torch.FloatStorage` and its like.
    Storage(Dtype),
}

/// What lives in the arena.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A string.
    Str(String),
    /// An integer of more than eight bytes, little-endian.
    Long(Vec<u8>),
    /// A tuple.
    Tuple(Vec<Value>),
    /// A list.
    List(Vec<Value>),
    /// A dictionary, in order, keys not checked for being unique.
    Dict(Vec<(Value, Value)>),
    /// Elements that are stored outside of the pickle.
    Storage(Storage),
    /// A tensor: a view of a storage.
    Tensor(View),
}

/// Elements that are stored outside of the pickle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Its name.
    pub key: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// How many elements it has.
    pub elements: usize,
}

/// A tensor: a view of a storage. Not yet checked against the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Index of the [`Object::Storage`].
    pub storage: usize,
    /// The first element.
    pub offset: usize,
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, per dimension; as many as extents.
    pub strides: Vec<usize>,
}

/// What a pickle gave.
#[derive(Debug)]
pub struct Loaded {
    /// The value.
    pub value: Value,
    /// Everything that values refer to.
    pub objects: Vec<Object>,
    /// Bytes that the pickle took.
    pub length: usize,
}

impl Loaded {
    /// The object that a value refers to, if it is one.
    pub fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(index) => self.objects.get(index),
            _ => None,
        }
    }

    /// The text of a value, if it is a string.
    pub fn text(&self, value: Value) -> Option<&str> {
        match self.object(value) {
            Some(Object::Str(text)) => Some(text),
            _ => None,
        }
    }
}

/// Reads one pickle from the front of `bytes`.
///
/// # Errors
/// Any [`Problem`] that a pickle can have; offsets are from the front of `bytes`.
pub fn load(bytes: &[u8]) -> Result<Loaded, Problem> {
    let mut machine = Machine {
        bytes: &bytes[..bytes.len().min(PICKLE_MAX)],
        cut: PICKLE_MAX < bytes.len(),
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        objects: Vec::new(),
    };
    while !machine.step()? {
        if OBJECTS_MAX < machine.objects.len() {
            let (size, limit) = (machine.objects.len() as u64, OBJECTS_MAX as u64);
            return Err(Problem::TooLarge {
                what: "the pickle's number of objects".into(),
                size,
                limit,
            });
        }
    }
    let value = machine.pop()?;
    if !machine.stack.is_empty() || !machine.marks.is_empty() {
        return Err(machine.broken("the pickle stops with values left over"));
    }
    Ok(Loaded { value, objects: machine.objects, length: machine.at })
}

struct Machine<'a> {
    bytes: &'a [u8],
    /// `true` iff the input goes on past `bytes`.
    cut: bool,
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    objects: Vec<Object>,
}

impl<'a> Machine<'a> {
    /// Takes one opcode; `true` at the end of the pickle.
    fn step(&mut self) -> Result<bool, Problem> {
        let at = self.at;
        let opcode = self.take(1)?[0];
        match opcode {
            // PROTO, FRAME: hints only.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return Ok(true),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(i64::from(value)));
            }
            b'K' => {
                let value = i64::from(self.take(1)?[0]);
                self.stack.push(Value::Int(value));
            }
            b'M' => {
                let value = i64::from(u16::from_le_bytes(self.array()?));
                self.stack.push(Value::Int(value));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            // BINSTRING, SHORT_BINSTRING (Python 2), BINUNICODE and its short and long forms.
            b'T' | b'U' | b'X' | 0x8c | 0x8d => self.text(opcode)?,
            b')' => self.push(Object::Tuple(Vec::new())),
            b']' => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            0x85..=0x87 => self.tuple(usize::from(opcode - 0x84))?,
            b't' => {
                let items = self.pop_mark()?;
                self.push(Object::Tuple(items));
            }
            b'a' | b'e' => self.append(opcode == b'e')?,
            b's' | b'u' => self.set_items(opcode == b'u')?,
            b'q' | b'r' | 0x94 => self.memo_put(opcode)?,
            b'h' | b'j' => self.memo_get(opcode)?,
            b'c' | 0x93 => self.global(opcode, at)?,
            b'Q' => {
                let id = self.pop()?;
                let storage = rebuild::storage(&self.objects, id)
                    .map_err(|what| Problem::malformed(what, at))?;
                self.push(Object::Storage(storage));
            }
            b'R' => self.reduce(at)?,
            b'b' => self.build()?,
            _ => return Err(Problem::Opcode { opcode, at }),
        }
        Ok(false)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Problem> {
        let left = &self.bytes[self.at..];
        match left.get(..length) {
            Some(taken) => {
                self.at += length;
                Ok(taken)
            }
            None if self.cut => Err(Problem::TooLarge {
                what: "the pickle's length in bytes".into(),
                size: (self.at as u64).saturating_add(length as u64),
                limit: PICKLE_MAX as u64,
            }),
            None => Err(Problem::Truncated {
                what: format!("the pickle at byte {}", self.at),
                need: length as u64,
                have: left.len() as u64,
            }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        Ok(self.take(N)?.try_into().expect("take gives as many bytes as asked for"))
    }

    fn broken(&self, what: &str) -> Problem {
        Problem::malformed(what, self.at)
    }

    fn push(&mut self, object: Object) {
        self.stack.push(Value::Object(self.objects.len()));
        self.objects.push(object);
    }

    /// Takes the top value; what lies below a mark stays out of reach.
    fn pop(&mut self) -> Result<Value, Problem> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.broken("the pickle takes a value that is not there"));
        }
        Ok(self.stack.pop().expect("the stack is higher than its floor"))
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>, Problem> {
        let mark = self.marks.pop();
        let mark = mark.ok_or_else(|| self.broken("the pickle takes a mark that is not there"))?;
        Ok(self.stack.split_off(mark))
    }

    /// LONG1.
    fn long(&mut self) -> Result<(), Problem> {
        let length = usize::from(self.take(1)?[0]);
        let bytes = self.take(length)?;
        if 8 < length {
            self.push(Object::Long(bytes.to_vec()));
            return Ok(());
        }
        let negative = bytes.last().is_some_and(|it| 0x80 <= *it);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..length].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn text(&mut self, opcode: u8) -> Result<(), Problem> {
        let length = match opcode {
            b'U' | 0x8c => u64::from(self.take(1)?[0]),
            0x8d => u64::from_le_bytes(self.array()?),
            _ => u64::from(u32::from_le_bytes(self.array()?)),
        };
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let text = str::from_utf8(bytes)
            .map_err(|_| self.broken("a string of the pickle is not UTF-8"))?;
        self.push(Object::Str(text.to_owned()));
        Ok(())
    }

    fn tuple(&mut self, length: usize) -> Result<(), Problem> {
        let mut items = vec![Value::None; length];
        for item in items.iter_mut().rev() {
            *item = self.pop()?;
        }
        self.push(Object::Tuple(items));
        Ok(())
    }

    /// The container on top of the stack, which stays there.
    fn top(&mut self) -> Result<&mut Object, Problem> {
        let top = self.pop()?;
        self.stack.push(top);
        let at = self.at;
        match top {
            Value::Object(index) => Ok(&mut self.objects[index]),
            _ => Err(Problem::malformed("the pickle fills something that is no container", at)),
        }
    }

    fn append(&mut self, many: bool) -> Result<(), Problem> {
        let items = if many { self.pop_mark()? } else { vec![self.pop()?] };
        let at = self.at;
        match self.top()? {
            Object::List(list) => list.extend(items),
            _ => return Err(Problem::malformed("the pickle appends to something else", at)),
        }
        Ok(())
    }

    fn set_items(&mut self, many: bool) -> Result<(), Problem> {
        let items = match many {
            true => self.pop_mark()?,
            false => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
        };
        let at = self.at;
        let (pairs, odd) = items.as_chunks::<2>();
        match self.top()? {
            Object::Dict(dict) if odd.is_empty() => {
                dict.extend(pairs.iter().map(|it| (it[0], it[1])))
            }
            _ => return Err(Problem::malformed("the pickle sets items of something else", at)),
        }
        Ok(())
    }

    fn memo_put(&mut self, opcode: u8) -> Result<(), Problem> {
        let index = match opcode {
            b'q' => u32::from(self.take(1)?[0]),
            b'r' => u32::from_le_bytes(self.array()?),
            _ => u32::try_from(self.memo.len()).expect("a pickle has less than 2^32 bytes"),
        };
        let value = self.pop()?;
        self.stack.push(value);
        self.memo.insert(index, value);
        Ok(())
    }

    fn memo_get(&mut self, opcode: u8) -> Result<(), Problem> {
        let index = match opcode {
            b'h' => u32::from(self.take(1)?[0]),
            _ => u32::from_le_bytes(self.array()?),
        };
        match self.memo.get(&index) {
            Some(value) => self.stack.push(*value),
            None => return Err(self.broken("the pickle recalls a value that it has not stored")),
        }
        Ok(())
    }

    /// GLOBAL and STACK_GLOBAL: only a fixed set of names means anything here.
    fn global(&mut self, opcode: u8, at: usize) -> Result<(), Problem> {
        let (module, name) = match opcode {
            b'c' => (self.line()?, self.line()?),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                (self.owned_text(module)?, self.owned_text(name)?)
            }
        };
        let global = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
            ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
            ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::Storage(Dtype::Bf16),
            ("torch", "LongStorage") => Global::Storage(Dtype::I64),
            _ => return Err(Problem::Global { name: shown(&format!("{module}.{name}")), at }),
        };
        self.stack.push(Value::Global(global));
        Ok(())
    }

    fn line(&mut self) -> Result<String, Problem> {
        let left = &self.bytes[self.at..];
        let length = left.iter().position(|it| *it == b'\n').unwrap_or(left.len());
        let line = self.take(length)?;
        self.take(1)?;
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    fn owned_text(&self, value: Value) -> Result<String, Problem> {
        match value {
            Value::Object(index) => match &self.objects[index] {
                Object::Str(text) => Ok(text.clone()),
                _ => Err(self.broken("the pickle names something with no string")),
            },
            _ => Err(self.broken("the pickle names something with no string")),
        }
    }

    /// REDUCE: in Python a call of anything; here one of three constructors of ours.
    fn reduce(&mut self, at: usize) -> Result<(), Problem> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let built = match callee {
            Value::Global(global) => rebuild::call(&self.objects, global, arguments),
            _ => Err("the pickle calls something that is no name".into()),
        };
        match built.map_err(|what| Problem::malformed(what, at))? {
            rebuild::Built::New(object) => self.push(object),
            rebuild::Built::Same(value) => self.stack.push(value),
        }
        Ok(())
    }

    /// BUILD: sets attributes. An OrderedDict of PyTorch has one, `_metadata`, which is not used.
    fn build(&mut self) -> Result<(), Problem> {
        self.pop()?;
        let at = self.at;
        match self.top()? {
            Object::Dict(_) => Ok(()),
            _ => Err(Problem::malformed("the pickle sets attributes of something else", at)),
        }
    }
}
