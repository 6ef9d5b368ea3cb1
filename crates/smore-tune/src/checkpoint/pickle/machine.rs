//! The pickle machine: builds plain dicts, tuples and views of storages, and calls nothing.
//!
//! Every instruction adds at most one value or object, objects name each other by number, and
//! nothing here calls itself, so that work and memory grow with the pickle's length alone: a value
//! put twice into a tuple twice into a tuple is not copied.

use super::names::{Element, Global};
use super::{MAX_DIMS, Reading, quoted};
use std::collections::{BTreeMap, BTreeSet};

/// Most values on the stack, most in the memo and most objects.
const MAX_VALUES: usize = 1 << 21;

/// A tensor as the pickle describes it, not yet checked against its storage.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) name: &'a str,
    pub(super) element: Element,
    /// The storage's place is `data/KEY`; digits alone.
    pub(super) key: &'a str,
    /// Values in the storage.
    pub(super) stored: usize,
    /// The first value's place in the storage.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Steps in the storage, one per dimension.
    pub(super) strides: Vec<usize>,
}

/// Names an object of the machine.
type Id = usize;

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Str(&'a str),
    Global(Global),
    Object(Id),
}

#[derive(Debug)]
enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage { element: Element, key: &'a str, stored: usize },
    Tensor { storage: Id, offset: usize, shape: Id, strides: Id },
}

struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value<'a>>,
    /// Stack heights that MARK noted.
    marks: Vec<usize>,
    memo: BTreeMap<usize, Value<'a>>,
    objects: Vec<Object<'a>>,
}

/// The tensors of the dict that a pickle builds, in its order.
///
/// # Errors
/// The first thing that the pickle does besides building such a dict, or what else it builds.
pub(super) fn run(pickle: &[u8]) -> Reading<Vec<View<'_>>> {
    let mut machine = Machine {
        rest: pickle,
        stack: vec![],
        marks: vec![],
        memo: BTreeMap::new(),
        objects: vec![],
    };
    machine.start()?;
    loop {
        let at = pickle.len() - machine.rest.len();
        let done = machine.step().map_err(|what| format!("data.pkl, byte {at}: {what}"))?;
        if let Some(value) = done {
            return machine.views(value);
        }
    }
}

impl<'a> Machine<'a> {
    fn start(&mut self) -> Reading<()> {
        match self.take(2) {
            Ok([0x80, 2..=5]) => Ok(()),
            Ok([0x80, other]) => {
                Err(format!("data.pkl has pickle protocol {other}; expected 2 to 5"))
            }
            _ => Err("data.pkl does not begin as a pickle of protocol 2 to 5".into()),
        }
    }

    /// Carries out one instruction; STOP gives the result.
    fn step(&mut self) -> Reading<Option<Value<'a>>> {
        let [op] = self.array()?;
        match op {
            b'.' => return self.stop().map(Some),
            b'(' => {
                room(self.marks.len())?;
                self.marks.push(self.stack.len());
            }
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool)?,
            b'K' | b'M' | b'J' | 0x8a => self.integer(op)?,
            b'G' => {
                self.take(8)?;
                self.push(Value::Float)?;
            }
            b'X' | 0x8c | 0x8d => self.string(op)?,
            b'c' => {
                let global = Global::named(self.line()?, self.line()?)?;
                self.push(Value::Global(global))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(name), Value::Str(module)) = (name, module) else {
                    return Err("names a call by something other than text".into());
                };
                self.push(Value::Global(Global::named(module, name)?))?;
            }
            b')' => self.tuple(self.stack.len())?,
            0x85..=0x87 => {
                let n = usize::from(op - 0x84);
                self.tuple(self.below(n)?)?;
            }
            b't' => {
                let start = self.mark()?;
                self.tuple(start)?;
            }
            b'}' => self.make(Object::Dict(vec![]))?,
            b's' => self.set_items(self.below(2)?)?,
            b'u' => {
                let start = self.mark()?;
                self.set_items(start)?;
            }
            b'q' | b'r' | 0x94 => self.remember(op)?,
            b'h' | b'j' => self.recall(op)?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            // A frame groups what follows for reading ahead; we have it all.
            0x95 => {
                let frame = u64::from_le_bytes(self.array()?);
                if frame > self.rest.len() as u64 {
                    return Err("ends within a frame".into());
                }
            }
            b'i' => {
                return Err(Global::named(self.line()?, self.line()?).map_or_else(
                    |refusal| refusal,
                    |known| {
                        format!(
                            "makes an object of {}, which no file of tensors does",
                            known.name()
                        )
                    },
                ));
            }
            other => return Err(unknown(other)),
        }
        Ok(None)
    }

    fn take(&mut self, n: usize) -> Reading<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or("ends within an instruction")?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Reading<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or("ends before its STOP")?;
        self.rest = rest;
        Ok(*head)
    }

    /// Text up to a line's end, which is passed over.
    fn line(&mut self) -> Reading<&'a str> {
        let end = self.rest.iter().position(|&b| b == b'\n').ok_or("ends within a name")?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name is not UTF-8".into())
    }

    fn push(&mut self, value: Value<'a>) -> Reading<()> {
        room(self.stack.len())?;
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, object: Object<'a>) -> Reading<()> {
        room(self.objects.len())?;
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    /// The stack's height without its upper `n` values, none of which lies under a mark.
    fn below(&self, n: usize) -> Reading<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(n).filter(|&start| start >= floor);
        start.ok_or_else(|| "takes a value that is not on the stack".into())
    }

    fn pop(&mut self) -> Reading<Value<'a>> {
        self.below(1)?;
        Ok(self.stack.pop().expect("below found a value on the stack"))
    }

    fn mark(&mut self) -> Reading<usize> {
        self.marks.pop().ok_or_else(|| "goes back to a mark that was not set".into())
    }

    fn integer(&mut self, op: u8) -> Reading<()> {
        let value = match op {
            b'K' => i64::from(u8::from_le_bytes(self.array()?)),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let [n] = self.array()?;
                let bytes = self.take(n.into())?;
                if n > 8 {
                    return Err(format!("has a number of {n} bytes, expected up to 8"));
                }
                let negative = bytes.last().is_some_and(|&high| high >= 0x80);
                let mut whole = [if negative { 0xff } else { 0 }; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                i64::from_le_bytes(whole)
            }
        };
        self.push(Value::Int(value))
    }

    fn string(&mut self, op: u8) -> Reading<()> {
        let n = match op {
            0x8c => u64::from(u8::from_le_bytes(self.array()?)),
            b'X' => u64::from(u32::from_le_bytes(self.array()?)),
            _ => u64::from_le_bytes(self.array()?),
        };
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX))?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8")?;
        self.push(Value::Str(text))
    }

    fn tuple(&mut self, start: usize) -> Reading<()> {
        let items = self.stack.split_off(start);
        self.make(Object::Tuple(items))
    }

    /// Puts the pairs above `start` into the dict beneath them.
    fn set_items(&mut self, start: usize) -> Reading<()> {
        let items = self.stack.split_off(start);
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a dict gets a key without a value".into());
        };
        let dict = match self.stack.last() {
            Some(&Value::Object(id)) => self.objects.get_mut(id),
            _ => None,
        };
        let Some(Object::Dict(entries)) = dict else {
            return Err("puts items into something that is not a dict".into());
        };
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn remember(&mut self, op: u8) -> Reading<()> {
        let slot = match op {
            b'q' => usize::from(u8::from_le_bytes(self.array()?)),
            b'r' => u32::from_le_bytes(self.array()?) as usize,
            _ => self.memo.len(),
        };
        room(self.memo.len())?;
        let top = *self.stack.last().ok_or("remembers a value of an empty stack")?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, op: u8) -> Reading<()> {
        let slot = match op {
            b'h' => usize::from(u8::from_le_bytes(self.array()?)),
            _ => u32::from_le_bytes(self.array()?) as usize,
        };
        let value = self.memo.get(&slot).ok_or_else(|| format!("recalls {slot}, never kept"))?;
        self.push(*value)
    }

    fn object(&self, value: Value) -> Option<&Object<'a>> {
        if let Value::Object(id) = value { self.objects.get(id) } else { None }
    }

    fn items(&self, value: Value) -> Option<&[Value<'a>]> {
        if let Some(Object::Tuple(items)) = self.object(value) { Some(items) } else { None }
    }

    /// A persistent id: `("storage", torch.KIND, key, device, number of values)`.
    fn storage(&mut self) -> Reading<()> {
        let id = self.pop()?;
        let Some(&[Value::Str("storage"), Value::Global(Global::Storage(element)), key, device, n]) =
            self.items(id)
        else {
            return Err("a persistent id is not that of a storage".into());
        };
        let (Value::Str(key), Value::Str(_), Value::Int(n)) = (key, device, n) else {
            return Err("a storage's id is not (\"storage\", KIND, KEY, DEVICE, LENGTH)".into());
        };
        if key.is_empty() || key.len() > 20 || !key.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("a storage's key is {}; expected a number", quoted(key)));
        }
        let stored = index(n, "a storage's length")?;
        self.make(Object::Storage { element, key, stored })
    }

    fn reduce(&mut self) -> Reading<()> {
        let (args, callable) = (self.pop()?, self.pop()?);
        let (Some(args), Value::Global(global)) = (self.items(args), callable) else {
            return Err("calls something that is not a known name with a tuple".into());
        };
        match (global, args) {
            (Global::OrderedDict, []) => self.make(Object::Dict(vec![])),
            (
                Global::RebuildTensor,
                &[storage, Value::Int(offset), shape, strides, Value::Bool, hooks, ref more @ ..],
            ) => {
                self.nothing_in(hooks, "hooks")?;
                for &metadata in more {
                    self.nothing_in(metadata, "metadata such as a conjugation")?;
                }
                self.tensor(storage, offset, shape, strides)
            }
            (Global::RebuildParameter, &[tensor, Value::Bool, hooks]) => {
                self.nothing_in(hooks, "hooks")?;
                match self.object(tensor) {
                    Some(Object::Tensor { .. }) => self.push(tensor),
                    _ => Err("a parameter is made of something that is not a tensor".into()),
                }
            }
            (Global::Storage(_), _) => {
                Err("makes a storage by a call; only tensors are read, nothing was executed".into())
            }
            (known, args) => {
                let (name, n) = (known.name(), args.len());
                Err(format!("gives {name} {n} values that do not describe a tensor"))
            }
        }
    }

    /// Checks that what a tensor carries along says nothing.
    fn nothing_in(&self, value: Value, what: &str) -> Reading<()> {
        match (value, self.object(value)) {
            (Value::None, _) => Ok(()),
            (_, Some(Object::Dict(entries))) if entries.is_empty() => Ok(()),
            _ => Err(format!("a tensor carries {what}; expected none")),
        }
    }

    fn tensor(
        &mut self,
        storage: Value<'a>,
        offset: i64,
        shape: Value<'a>,
        strides: Value<'a>,
    ) -> Reading<()> {
        let (Value::Object(storage), Value::Object(shape), Value::Object(strides)) =
            (storage, shape, strides)
        else {
            return Err("a tensor is made of the wrong values".into());
        };
        if !matches!(self.objects[storage], Object::Storage { .. }) {
            return Err("a tensor's storage is not a storage".into());
        }
        let offset = index(offset, "a tensor's offset")?;
        self.make(Object::Tensor { storage, offset, shape, strides })
    }

    /// The state of an OrderedDict: its attribute `_metadata`, which says nothing about tensors.
    fn build(&mut self) -> Reading<()> {
        let state = self.pop()?;
        let target = self.stack.last().copied().unwrap_or(Value::None);
        match (self.object(target), self.object(state)) {
            (Some(Object::Dict(_)), Some(Object::Dict(_))) => Ok(()),
            _ => Err("gives attributes to something that is not a dict".into()),
        }
    }

    fn stop(&mut self) -> Reading<Value<'a>> {
        match (self.stack.as_slice(), self.marks.as_slice(), self.rest) {
            (&[value], [], []) => Ok(value),
            (_, _, [_, ..]) => Err(format!("{} bytes follow its end", self.rest.len())),
            _ => Err(format!("ends with {} values on its stack", self.stack.len())),
        }
    }

    /// The tensors in the dict that is the pickle's result.
    fn views(&self, value: Value<'a>) -> Reading<Vec<View<'a>>> {
        let Some(Object::Dict(entries)) = self.object(value) else {
            let kind = self.kind(value);
            return Err(format!("the file holds {kind}, expected a dict from names to tensors"));
        };
        let mut seen = BTreeSet::new();
        entries
            .iter()
            .map(|&(key, value)| {
                let Value::Str(name) = key else {
                    return Err(format!("a key is {}, expected a name", self.kind(key)));
                };
                if !seen.insert(name) {
                    return Err(format!("{} is there twice", quoted(name)));
                }
                let view = self.view(name, value);
                view.map_err(|what| format!("entry {}: {what}", quoted(name)))
            })
            .collect()
    }

    fn view(&self, name: &'a str, value: Value<'a>) -> Reading<View<'a>> {
        let (storage, offset, shape, strides) = match self.object(value) {
            Some(&Object::Tensor { storage, offset, shape, strides }) => {
                (storage, offset, shape, strides)
            }
            Some(Object::Dict(_)) => {
                return Err("is a dict itself; expected a tensor. Save the inner dict: \
                            torch.save(checkpoint[KEY], path)"
                    .into());
            }
            _ => return Err(format!("is {}, expected a tensor", self.kind(value))),
        };
        let Object::Storage { element, key, stored } = self.objects[storage] else {
            panic!("a tensor was made of something that is not a storage")
        };
        let shape = self.indices(shape, "shape")?;
        let strides = self.indices(strides, "strides")?;
        Ok(View { name, element, key, stored, offset, shape, strides })
    }

    fn indices(&self, tuple: Id, what: &str) -> Reading<Vec<usize>> {
        let Object::Tuple(items) = &self.objects[tuple] else {
            return Err(format!("its {what} is not a tuple"));
        };
        if items.len() > MAX_DIMS {
            return Err(format!(
                "its {what} has {} dimensions, expected up to {MAX_DIMS}",
                items.len()
            ));
        }
        items
            .iter()
            .map(|item| match item {
                Value::Int(n) => index(*n, what),
                other => Err(format!("its {what} has {}, expected numbers", self.kind(*other))),
            })
            .collect()
    }

    fn kind(&self, value: Value) -> &'static str {
        match (value, self.object(value)) {
            (Value::None, _) => "None",
            (Value::Bool, _) => "a truth value",
            (Value::Int(_) | Value::Float, _) => "a number",
            (Value::Str(_), _) => "a text",
            (Value::Global(_), _) => "a function or class",
            (_, Some(Object::Tuple(_))) => "a tuple",
            (_, Some(Object::Dict(_))) => "a dict",
            (_, Some(Object::Storage { .. })) => "a storage",
            (_, Some(Object::Tensor { .. })) => "a single tensor",
            (Value::Object(id), None) => panic!("object {id} was never made"),
        }
    }
}

/// Refuses to grow anything beyond what a file of tensors needs.
fn room(len: usize) -> Reading<()> {
    if len < MAX_VALUES {
        Ok(())
    } else {
        Err(format!("holds more than {MAX_VALUES} values, more than any file of tensors needs"))
    }
}

fn index(n: i64, what: &str) -> Reading<usize> {
    usize::try_from(n).map_err(|_| format!("{what} has {n}, expected a number from 0 up"))
}

/// An instruction that no file of tensors has.
fn unknown(op: u8) -> String {
    let does = match op {
        b'o' | 0x81 | 0x92 => "makes an object of a class",
        0x82..=0x84 => "calls a registered extension",
        b'P' => "names a persistent object by text",
        b']' | b'l' | b'a' | b'e' => "builds a list",
        0x8f..=0x91 => "builds a set",
        b'B' | b'C' | b'S' | b'T' | b'U' | 0x8e | 0x96 => "builds a string of bytes",
        0x97 | 0x98 => "uses a buffer outside of the pickle",
        _ => "is not one that tensors need",
    };
    format!("instruction {op:#04x} {does}; only tensors are read, nothing was executed")
}
