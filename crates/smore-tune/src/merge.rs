//! A plain LoRA merged into its base: W + scale B A, written as a model folder like the base's.
//!
//! Tensors are written one after the other, so that memory holds one of them and not the model.

use crate::checkpoint::{LoadedAdapter, copy_model_files, write, write_folder};
use crate::error::{Error, Result};
use crate::grow::Difference;
use crate::inject::{Adapters, Site};
use crate::model::folder::{ModelFolder, weight_files};
use crate::model::weights::to_f32;
use crate::model::{Batch, Model};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use smore::adapter::{AnyAdapter, BlockAdapter, Lora};
use smore_engine::cpu::{Strided, StridedMut, gemm};
use smore_engine::{Cpu, HostMatrix};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Logits of an f32 result differ from those of base and adapter by rounding alone, relative to
/// the largest.
const EXACT: f64 = 1e-4;

/// Merges `adapter` into the model of `folder` and writes it to `out`, in the storage type `dtype`
/// or the base's own. Says how far base with adapter and the written model are apart on `batch`.
///
/// # Errors
/// A routed adapter, or a failed write; nothing is left behind.
pub fn merge(
    folder: &ModelFolder,
    adapter: LoadedAdapter,
    out: &Path,
    dtype: Option<Dtype>,
    batch: &Batch,
) -> Result<Difference> {
    let loras = loras(&adapter)?;
    let mut difference = None;
    write_folder(out, |dir| {
        copy_model_files(&folder.path, dir)?;
        let mut total = 0;
        for file in weight_files(&folder.path)? {
            let name = file.file_name().expect("a file of weights has a name");
            total += write_merged(folder, &file, &dir.join(name), dtype, &loras)?;
        }
        write_notes(&folder.path, dir, dtype, total)?;
        let written = ModelFolder::open(dir)?;
        let context = batch.ids.len();
        let none = Adapters::none(&written.spec);
        let after = Model::new(Cpu::new(), &written, none, &[], context);
        let before = Model::new(Cpu::new(), folder, adapter.adapters, &adapter.values, context);
        let found = Difference::of(&before, &after, batch);
        let whole = written.tensors().all(|t| t.dtype == smore_engine::Dtype::F32);
        if whole && found.largest > EXACT * found.largest_logit.max(1.0) {
            return Err(Error::Run(format!(
                "the merged model's logits differ by {:.1e}, which is more than rounding; nothing \
                 was written",
                found.largest
            )));
        }
        difference = Some(found);
        Ok(())
    })?;
    Ok(difference.expect("the folder was written"))
}

/// Down factor, up factor and scale of the LoRA on one matrix.
struct LowRank {
    down: Vec<f32>,
    up: Vec<f32>,
    rank: usize,
    scale: f64,
}

/// The LoRAs by the name of the matrix they change.
fn loras(adapter: &LoadedAdapter) -> Result<BTreeMap<String, LowRank>> {
    let mut loras = BTreeMap::new();
    for slot in &adapter.adapters.slots {
        let (Site::Map(proj), BlockAdapter::Map(AnyAdapter::Lora(lora))) =
            (slot.site, &slot.adapter)
        else {
            let kind = adapter.settings.config.kind();
            return Err(Error::Config {
                file: "--adapter".into(),
                message: format!(
                    "the adapter is a {kind}: which of its experts act depends on the token, so no \
                     single matrix equals it. Serve it as it is, or fit a LoRA to it on text of \
                     yours with `smore distill-lora`"
                ),
            });
        };
        let Lora { spec, layout } = lora;
        let values = &adapter.values[slot.range.clone()];
        let (down, up) = values.split_at(layout.up);
        let low_rank =
            LowRank { down: down.to_vec(), up: up.to_vec(), rank: spec.rank, scale: spec.scale };
        loras.insert(format!("{}.weight", proj.path(slot.block)), low_rank);
    }
    Ok(loras)
}

/// Writes a file of weights with the merged matrices in place of the base's; returns the bytes of
/// its tensors.
fn write_merged(
    folder: &ModelFolder,
    from: &Path,
    to: &Path,
    dtype: Option<Dtype>,
    loras: &BTreeMap<String, LowRank>,
) -> Result<usize> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    let handle = File::open(from).map_err(|e| io(from, e))?;
    // SAFETY: read only; the folder was opened through the same maps and their terms.
    let bytes = unsafe { memmap2::Mmap::map(&handle) }.map_err(|e| io(from, e))?;
    let bad = |e| Error::Model { file: from.to_owned(), message: format!("not whole: {e}") };
    let stored = SafeTensors::deserialize(&bytes).map_err(bad)?;
    let mut tensors = stored.tensors();
    tensors.sort_by_key(|(_, t)| t.data().as_ptr() as usize);

    let (mut header, mut end) = (Map::new(), 0);
    // Readers of this ecosystem refuse files that do not say so.
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    for (name, tensor) in &tensors {
        let dtype = stored_as(tensor.dtype(), dtype);
        let elements: usize = tensor.shape().iter().product();
        let len = elements * dtype.bitsize() / 8;
        let entry =
            json!({"dtype": dtype, "shape": tensor.shape(), "data_offsets": [end, end + len]});
        header.insert(name.clone(), entry);
        end += len;
    }
    let mut header = Value::Object(header).to_string();
    // Data start at a multiple of 8.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::new(File::create(to).map_err(|e| io(to, e))?);
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| io(to, e));
    put(&(header.len() as u64).to_le_bytes())?;
    put(header.as_bytes())?;
    for (name, tensor) in &tensors {
        let target = stored_as(tensor.dtype(), dtype);
        match loras.get(name) {
            None if target == tensor.dtype() => put(tensor.data())?,
            None => put(&narrowed(&widened(tensor), target))?,
            Some(lora) => put(&narrowed(&merged(folder.tensor(name), lora), target))?,
        }
    }
    file.flush().map_err(|e| io(to, e))?;
    Ok(end)
}

/// Numbers are stored as asked; anything else stays.
fn stored_as(own: Dtype, asked: Option<Dtype>) -> Dtype {
    if matches!(own, Dtype::F32 | Dtype::F16 | Dtype::BF16) { asked.unwrap_or(own) } else { own }
}

fn widened(tensor: &safetensors::tensor::TensorView) -> Vec<f32> {
    let pairs = || tensor.data().as_chunks::<2>().0.iter();
    match tensor.dtype() {
        Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

fn narrowed(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => bytemuck::cast_slice(values).to_vec(),
    }
}

/// W + scale B A
fn merged(w: &HostMatrix, lora: &LowRank) -> Vec<f32> {
    let (rows, cols, r) = (w.rows, w.cols, lora.rank);
    let mut sum = to_f32(w);
    gemm(
        true,
        lora.scale as f32,
        Strided::new(&lora.up, rows, r),
        Strided::new(&lora.down, r, cols),
        1.0,
        StridedMut::new(&mut sum, rows, cols),
    );
    sum
}

/// The index of the shards with its total, and the storage type in `config.json`.
fn write_notes(from: &Path, to: &Path, dtype: Option<Dtype>, total: usize) -> Result<()> {
    let change = |name: &str, change: &dyn Fn(&mut Value)| -> Result<()> {
        let Ok(text) = std::fs::read_to_string(from.join(name)) else { return Ok(()) };
        let mut json: Value = serde_json::from_str(&text).map_err(|e| Error::Model {
            file: from.join(name),
            message: format!("not valid JSON: {e}"),
        })?;
        change(&mut json);
        write(&to.join(name), format!("{json:#}\n").as_bytes())
    };
    if !from.join("model.safetensors").is_file() {
        change("model.safetensors.index.json", &|json| {
            json["metadata"]["total_size"] = total.into();
        })?;
    }
    let Some(dtype) = dtype else { return Ok(()) };
    let name = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    change("config.json", &|json| {
        // Newer configs say `dtype`, older ones `torch_dtype`.
        let key = if json["dtype"].is_string() { "dtype" } else { "torch_dtype" };
        json[key] = name.into();
    })
}
