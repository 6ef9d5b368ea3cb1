//! Reads the tensors of a file that PyTorch's `torch.save` wrote (`.bin`, `.pt`), without running
//! what is in it.
//!
//! Such a file is a zip archive of stored entries in one folder of any name: `data.pkl`, a pickle
//! that builds a dict of tensors; `data/KEY`, the bytes of a storage that tensors are views of;
//! `version`; and, since PyTorch 2.1, `byteorder`. A pickle is a program that may call whatever
//! Python can import. Ours (`machine`) knows a few instructions and the few names that tensors
//! need, and refuses every other.

mod machine;
mod names;

use crate::error::{Error, Result};
use machine::View;
use names::Element;
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use zip::{CompressionMethod, ZipArchive};

/// What is wrong, in words; the file's name is put in front by whoever knows it.
type Reading<T> = std::result::Result<T, String>;

/// Most bytes of `data.pkl`; a tensor takes about two hundred.
const MAX_PICKLE: u64 = 32 << 20;

/// The values of all tensors may take this many times the file's bytes, for tied and widened ones.
const MAX_GROWTH: u64 = 8;

/// ... but a small file need not be that small.
const MIN_ALLOWANCE: u64 = 1 << 20;

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 16;

/// How a file begins that `torch.save` wrote before PyTorch 1.6: a pickle of a magic number.
const LEGACY: [u8; 15] =
    [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, 0x2e];

/// How a zip archive begins.
const ZIP: [u8; 4] = *b"PK\x03\x04";

/// A tensor with its values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its dimensions; none for a single number.
    pub shape: Vec<usize>,
    /// Its values, as many as the product of `shape`.
    pub values: Vec<f32>,
}

/// Reads what `torch.save(state_dict, path)` wrote: a dict from names to tensors of f32, f16, bf16
/// or f64 (rounded to f32). No code in the file is run.
///
/// # Errors
/// A file that is not of this kind, is damaged, or holds or calls anything else: names the file
/// and the tensor, entry or call.
pub fn read_torch_file(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file =
        std::fs::File::open(path).map_err(|e| Error::reading(path, "tensors of PyTorch", e))?;
    read_torch(std::io::BufReader::new(file))
        .map_err(|message| Error::Adapter { file: path.to_owned(), message })
}

/// [`read_torch_file`] from anything that can be read; an error is the message without the file.
pub fn read_torch<R: Read + Seek>(
    source: R,
) -> std::result::Result<BTreeMap<String, Tensor>, String> {
    let mut archive = Archive::open(source)?;
    let pickle = archive.read_limited("data.pkl", MAX_PICKLE)?;
    let mut views = machine::run(&pickle)?;
    // Views of one storage lie together, so that only one storage is held at a time.
    views.sort_by_key(|v| v.key);
    let mut allowance = archive.bytes.saturating_mul(MAX_GROWTH).max(MIN_ALLOWANCE);
    let mut held = ("", Vec::new());
    let mut tensors = BTreeMap::new();
    for view in views {
        let bad = |what: String| format!("tensor {}: {what}", quoted(view.name));
        let n = check(&view).map_err(bad)?;
        allowance = (n as u64)
            .checked_mul(size_of::<f32>() as u64)
            .and_then(|bytes| allowance.checked_sub(bytes))
            .ok_or_else(|| {
                bad(format!(
                    "with it, all tensors take more than {MAX_GROWTH} times the file's bytes; save \
                     expanded tensors after `.contiguous()`"
                ))
            })?;
        if held.0 != view.key {
            held = (view.key, archive.read(&format!("data/{}", view.key)).map_err(bad)?);
        }
        let expected = view.stored.checked_mul(view.element.bytes());
        if expected != Some(held.1.len()) {
            let (key, found, stored) = (view.key, held.1.len(), view.stored);
            return Err(bad(format!(
                "its storage `data/{key}` has {found} bytes, expected {stored} values of {} bytes",
                view.element.bytes()
            )));
        }
        let values = gather(&view, &held.1, n);
        tensors.insert(view.name.to_owned(), Tensor { shape: view.shape, values });
    }
    Ok(tensors)
}

/// The number of values of a view that lies within its storage.
fn check(view: &View) -> Reading<usize> {
    if let Element::Unread(kind) = view.element {
        return Err(format!("is stored as `{kind}`; expected f32, f16, bf16 or f64"));
    }
    let (shape, strides) = (&view.shape, &view.strides);
    if shape.len() != strides.len() {
        return Err(format!("shape {shape:?} has other dimensions than strides {strides:?}"));
    }
    let absurd = || format!("shape {shape:?} with strides {strides:?} is larger than memory");
    if shape.contains(&0) {
        return Ok(0);
    }
    let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(absurd)?;
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(view.offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?))
        .ok_or_else(absurd)?;
    if last < view.stored {
        Ok(n)
    } else {
        let (offset, stored) = (view.offset, view.stored);
        Err(format!(
            "shape {shape:?} with strides {strides:?} from {offset} reaches value {last} of a \
             storage of {stored}"
        ))
    }
}

/// The `n` values of a checked view, row-major.
fn gather(view: &View, storage: &[u8], n: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(n);
    if n == 0 {
        return values;
    }
    let (&inner, outer) = view.shape.split_last().unwrap_or((&1, &[]));
    let step = view.strides.last().copied().unwrap_or(0);
    let mut index = vec![0; outer.len()];
    loop {
        let row: usize = index.iter().zip(&view.strides).map(|(i, s)| i * s).sum();
        let start = view.offset + row;
        values.extend((0..inner).map(|j| view.element.at(storage, start + j * step)));
        // Counts up the outer indices, the last one fastest.
        let Some(d) = (0..outer.len()).rev().find(|&d| index[d] + 1 < outer[d]) else { break };
        index[d] += 1;
        index[d + 1..].fill(0);
    }
    values
}

/// The entries of the archive's one folder.
struct Archive<R> {
    zip: ZipArchive<R>,
    /// The folder's name with its slash.
    folder: String,
    /// Bytes of the whole file.
    bytes: u64,
}

impl<R: Read + Seek> Archive<R> {
    fn open(mut source: R) -> Reading<Self> {
        let mut start = Vec::new();
        let bytes = source
            .by_ref()
            .take(LEGACY.len() as u64)
            .read_to_end(&mut start)
            .and_then(|_| source.seek(SeekFrom::End(0)))
            .map_err(|e| format!("cannot be read: {e}"))?;
        if start == LEGACY {
            return Err(
                "is in the format of PyTorch before 1.6; load it with a newer PyTorch and \
                        save it again, best as safetensors"
                    .into(),
            );
        }
        if !start.starts_with(&ZIP) {
            return Err("is not a file of `torch.save`, which begins as a zip archive".into());
        }
        let zip = ZipArchive::new(source).map_err(|e| format!("not a whole zip archive: {e}"))?;
        if zip.has_duplicate_names() {
            return Err("two entries of the zip archive have the same name".into());
        }
        let folder = folder(&zip)?;
        let mut archive = Self { zip, folder, bytes };
        archive.check_version()?;
        Ok(archive)
    }

    /// Refuses layouts and byte orders that we would misread.
    fn check_version(&mut self) -> Reading<()> {
        let version = self.read_limited("version", 16)?;
        let number = std::str::from_utf8(&version).ok().and_then(|v| v.trim().parse::<u32>().ok());
        if !number.is_some_and(|v| (1..=10).contains(&v)) {
            let found = String::from_utf8_lossy(&version);
            return Err(format!("`version` is {}; expected 1 to 10", quoted(&found)));
        }
        if !self.has("byteorder") {
            return Ok(());
        }
        let order = self.read_limited("byteorder", 16)?;
        if order.trim_ascii() == b"little" {
            return Ok(());
        }
        let found = String::from_utf8_lossy(&order);
        Err(format!(
            "`byteorder` is {}; expected `little`: save it again on a machine of that order",
            quoted(&found)
        ))
    }

    fn has(&self, name: &str) -> bool {
        self.index(name).is_some()
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.zip.index_for_name_raw(format!("{}{name}", self.folder).as_bytes())
    }

    fn read(&mut self, name: &str) -> Reading<Vec<u8>> {
        self.read_limited(name, u64::MAX)
    }

    /// A stored entry, no longer than `limit`.
    fn read_limited(&mut self, name: &str, limit: u64) -> Reading<Vec<u8>> {
        let index =
            self.index(name).ok_or_else(|| format!("no entry `{name}` in the zip archive"))?;
        let bad = |what: &dyn std::fmt::Display| format!("entry `{name}`: {what}");
        let entry = self.zip.by_index_data(index).map_err(|e| bad(&e))?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(bad(
                &"is compressed or encrypted; `torch.save` stores entries as they are",
            ));
        }
        let (size, limit) = (entry.size(), limit.min(self.bytes));
        // A stored entry cannot be longer than the file, whatever it claims.
        if size > limit {
            return Err(bad(&format!("claims {size} bytes, expected up to {limit}")));
        }
        let entry = self.zip.by_index(index).map_err(|e| bad(&e))?;
        let mut bytes = Vec::with_capacity(size as usize);
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| bad(&e))?;
        if bytes.len() as u64 == size {
            Ok(bytes)
        } else {
            Err(bad(&format!("has other than the {size} bytes it claims")))
        }
    }
}

/// The folder in the archive that has a `data.pkl`, with its slash.
fn folder<R: Read + Seek>(zip: &ZipArchive<R>) -> Reading<String> {
    let mut folders = zip.file_names_raw().filter_map(|name| {
        let folder = std::str::from_utf8(name).ok()?.strip_suffix("data.pkl")?;
        (folder.find('/')? + 1 == folder.len()).then(|| folder.to_owned())
    });
    match (folders.next(), folders.next()) {
        (Some(folder), None) => Ok(folder),
        (None, _) => Err("a zip archive without FOLDER/data.pkl; expected what `torch.save` \
                          writes"
            .into()),
        (Some(a), Some(b)) => {
            Err(format!("both {} and {} have a data.pkl", quoted(&a), quoted(&b)))
        }
    }
}

/// A name from the file as it may stand in a message: short, on one line, nothing that a terminal
/// obeys.
fn quoted(name: &str) -> String {
    let short: String = name.chars().take(80).collect();
    format!("`{}`", short.escape_debug())
}

#[cfg(test)]
#[path = "pickle_tests.rs"]
mod tests;
