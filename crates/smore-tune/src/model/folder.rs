//! A Hugging Face model folder: opened, checked tensor by tensor, mapped into memory.

use super::spec::DecoderSpec;
use crate::error::{Error, Result, nearest};
use memmap2::Mmap;
use rand::Rng;
use rayon::prelude::*;
use safetensors::SafeTensors;
use smore::rng::{Purpose, stream};
use smore_engine::{Dtype, HostMatrix};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model folder whose tensors are all there, of the right shape and type. Opening it reads the
/// headers only.
pub struct ModelFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The decoder that `config.json` describes.
    pub spec: DecoderSpec,
    tensors: BTreeMap<String, HostMatrix>,
    maps: Vec<Arc<Mmap>>,
}

/// One tensor as found in a file.
struct Found {
    file: PathBuf,
    shape: Vec<usize>,
    dtype: safetensors::Dtype,
    map: Arc<Mmap>,
    start: usize,
}

impl ModelFolder {
    /// Opens a folder and binds every tensor that its config asks for.
    ///
    /// # Errors
    /// A missing, extra or misshaped tensor, an unsupported type or config: names file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let spec = DecoderSpec::read(&path.join("config.json"))?;
        let mut found = BTreeMap::new();
        for file in weight_files(path)? {
            read_header(&file, &mut found)?;
        }
        let mut maps: Vec<Arc<Mmap>> = Vec::new();
        for tensor in found.values() {
            if !maps.iter().any(|map| Arc::ptr_eq(map, &tensor.map)) {
                maps.push(Arc::clone(&tensor.map));
            }
        }
        let mut tensors = BTreeMap::new();
        for (name, shape) in spec.tensors() {
            let tensor = found.remove(&name).ok_or_else(|| missing(path, &name, &found))?;
            tensors.insert(name.clone(), bind(&name, &shape, tensor)?);
        }
        // Some writers store the tied head once more, or the rotary table that config.json implies.
        let known_extra = |name: &str| {
            (spec.tied && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
        };
        if let Some((name, tensor)) = found.iter().find(|(name, _)| !known_extra(name)) {
            return Err(Error::Model {
                file: tensor.file.clone(),
                message: format!(
                    "tensor `{name}` has no place in a {}-block {}; is config.json of another \
                     model?",
                    spec.blocks,
                    spec.family.name()
                ),
            });
        }
        Ok(Self { path: path.to_owned(), spec, tensors, maps })
    }

    /// A model of this shape whose weights are drawn at random in memory: for measuring where there
    /// are no files. Vectors are ones.
    pub fn drawn(spec: DecoderSpec, bf16: bool) -> Self {
        let draw = |(name, shape): (String, Vec<usize>)| {
            let tensor = match shape[..] {
                [rows, cols] => random_matrix(rows, cols, bf16, &name),
                _ => HostMatrix::from_f32(1, shape[0], &vec![1.0; shape[0]]),
            };
            (name, tensor)
        };
        let tensors = spec.tensors().into_iter().map(draw).collect();
        Self { path: PathBuf::new(), spec, tensors, maps: Vec::new() }
    }

    /// The same model with every tensor rounded to bf16 and kept in memory. What was read of the
    /// files on the way is given back to the system tensor by tensor.
    pub fn in_bf16(mut self) -> Self {
        for tensor in self.tensors.values_mut().filter(|t| t.dtype != Dtype::Bf16) {
            let rounded = tensor.to_bf16();
            let stored = std::mem::replace(tensor, rounded);
            give_back(&self.maps, stored.row_bytes(0, stored.rows));
        }
        self
    }

    /// A tensor's matrix; vectors have one row.
    ///
    /// # Panics
    /// If the decoder has no tensor of this name: all are bound when the folder is opened.
    pub fn tensor(&self, name: &str) -> &HostMatrix {
        &self.tensors[name]
    }

    /// All matrices; vectors have one row.
    pub fn tensors(&self) -> impl Iterator<Item = &HostMatrix> {
        self.tensors.values()
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.rows * t.cols * t.dtype.bytes()).sum()
    }
}

/// `model.safetensors`, or the shards that the index names.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) =
        (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
    if single.is_file() {
        return Ok(vec![single]);
    }
    let text = std::fs::read_to_string(&index)
        .map_err(|e| Error::reading(&single, "the base model's weights", e))?;
    let bad = |message: String| Error::Model { file: index.clone(), message };
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| bad(format!("not valid JSON: {e}")))?;
    let map = json["weight_map"].as_object().ok_or_else(|| bad("no object `weight_map`".into()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let name = file.as_str().ok_or_else(|| bad(format!("`{tensor}` names no file")))?;
        // A shard lies beside its index; anything else could reach outside the folder.
        if Path::new(name).file_name().is_none_or(|f| f != name) {
            return Err(bad(format!("`{tensor}` is in `{name}`, which is not a plain file name")));
        }
        files.insert(folder.join(name));
    }
    Ok(files.into_iter().collect())
}

fn read_header(file: &Path, found: &mut BTreeMap<String, Found>) -> Result<()> {
    let handle =
        std::fs::File::open(file).map_err(|e| Error::reading(file, "a file of weights", e))?;
    // SAFETY: the map is read only; as with every user of memory-mapped weights, a file that is
    // cut short by someone else while we run raises SIGBUS, which is what the user is told to
    // avoid in the README.
    let map = unsafe { Mmap::map(&handle) }
        .map_err(|source| Error::Io { path: file.to_owned(), source })?;
    let map = Arc::new(map);
    let bad = |message: String| Error::Model { file: file.to_owned(), message };
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
    for (name, tensor) in tensors.tensors() {
        let start = tensor.data().as_ptr() as usize - map.as_ptr() as usize;
        let entry = Found {
            file: file.to_owned(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            map: Arc::clone(&map),
            start,
        };
        if let Some(twin) = found.insert(name.clone(), entry) {
            return Err(bad(format!("tensor `{name}` is also in {}", twin.file.display())));
        }
    }
    Ok(())
}

/// Values of both signs, somewhat below 1 / sqrt(cols).
fn random_matrix(rows: usize, cols: usize, bf16: bool, name: &str) -> HostMatrix {
    const PIECE: usize = 1 << 16;
    let dtype = if bf16 { Dtype::Bf16 } else { Dtype::F32 };
    // Larger ones would saturate attention and routers, whose tiny numbers take longer.
    let exponent = 127 - u64::from(cols.ilog2().div_ceil(2) + 1);
    // A sign, the exponent, and a fraction of any bits, in every half or quarter of eight bytes.
    let (mask, fixed) = if bf16 {
        (0x807f_807f_807f_807f, exponent << 7 | exponent << 23 | exponent << 39 | exponent << 55)
    } else {
        (0x807f_ffff_807f_ffff, exponent << 23 | exponent << 55)
    };
    let mut bytes = vec![0u8; rows * cols * dtype.bytes()];
    bytes.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
        let mut rng = stream(name.len() as u64, Purpose::BaseInit, i as u64, rows as u64);
        for word in piece.chunks_mut(8) {
            let drawn = rng.next_u64() & mask | fixed;
            word.copy_from_slice(&drawn.to_le_bytes()[..word.len()]);
        }
    });
    HostMatrix::new(rows, cols, dtype, Arc::new(bytes), 0)
}

fn missing(folder: &Path, name: &str, found: &BTreeMap<String, Found>) -> Error {
    let hint = nearest(name, found.keys().map(String::as_str))
        .map_or_else(String::new, |near| format!("; the nearest name not yet used is `{near}`"));
    Error::Model {
        file: folder.to_owned(),
        message: format!("no tensor `{name}` in the weights{hint}"),
    }
}

fn bind(name: &str, shape: &[usize], tensor: Found) -> Result<HostMatrix> {
    let bad = |message: String| Error::Model { file: tensor.file.clone(), message };
    if tensor.shape != shape {
        let found = &tensor.shape;
        return Err(bad(format!("tensor `{name}` has shape {found:?}, expected {shape:?}")));
    }
    let dtype = match tensor.dtype {
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::Bf16,
        other => {
            return Err(bad(format!("tensor `{name}` is {other:?}; expected F32, F16 or BF16")));
        }
    };
    let (rows, cols) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1]) };
    let owner = Arc::new(Mapped(tensor.map));
    Ok(HostMatrix::new(rows, cols, dtype, owner, tensor.start))
}

/// Lets the system drop the pages that hold `bytes`. Failing leaves them for the system to drop
/// when it needs the memory.
#[cfg(unix)]
fn give_back(maps: &[Arc<Mmap>], bytes: &[u8]) {
    let start = bytes.as_ptr() as usize;
    let holds = |map: &&Arc<Mmap>| map.as_ptr_range().contains(&bytes.as_ptr());
    let Some(map) = maps.iter().find(holds) else { return };
    let offset = start - map.as_ptr() as usize;
    // SAFETY: the map is read only and backed by a file, so pages that are dropped come back with
    // the same bytes when they are read again.
    let advised = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes.len())
    };
    drop(advised);
}

#[cfg(not(unix))]
fn give_back(_: &[Arc<Mmap>], _: &[u8]) {}

/// Shares a memory map between the tensors in it.
struct Mapped(Arc<Mmap>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
