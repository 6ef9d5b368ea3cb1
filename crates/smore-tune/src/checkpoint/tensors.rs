//! Files of tensors: safetensors both ways, PyTorch's for reading.

use super::pickle::{Tensor, read_torch_file};
use crate::error::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Tensors by name.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// Reads `adapter_model.safetensors`, or `adapter_model.bin` where there is no such file.
pub(super) fn read_adapter(folder: &Path) -> Result<(PathBuf, Tensors)> {
    let (safe, torch) =
        (folder.join("adapter_model.safetensors"), folder.join("adapter_model.bin"));
    if !safe.exists() && torch.exists() {
        let tensors = read_torch_file(&torch)?;
        return Ok((torch, tensors));
    }
    let tensors = read_safetensors(&safe)?;
    Ok((safe, tensors))
}

/// Reads a file of f32, f16 or bf16 tensors.
pub(super) fn read_safetensors(file: &Path) -> Result<Tensors> {
    let bytes = std::fs::read(file).map_err(|e| Error::reading(file, "an adapter's weights", e))?;
    let bad = |message: String| Error::Adapter { file: file.to_owned(), message };
    let stored = SafeTensors::deserialize(&bytes)
        .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
    let mut tensors = Tensors::new();
    for (name, tensor) in stored.tensors() {
        let values = to_f32(&tensor).ok_or_else(|| {
            bad(format!("tensor `{name}` is {:?}; expected F32, F16 or BF16", tensor.dtype()))
        })?;
        tensors.insert(name, Tensor { shape: tensor.shape().to_vec(), values });
    }
    Ok(tensors)
}

fn to_f32(tensor: &TensorView) -> Option<Vec<f32>> {
    let data = tensor.data();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            Some(data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        }
        safetensors::Dtype::BF16 => {
            let pairs = data.as_chunks::<2>().0.iter();
            Some(pairs.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect())
        }
        safetensors::Dtype::F16 => {
            let pairs = data.as_chunks::<2>().0.iter();
            Some(pairs.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect())
        }
        _ => None,
    }
}

/// Writes plain runs of values under names.
pub(crate) fn write_named(path: &Path, runs: &[(&str, &[f32])]) -> Result<()> {
    let named = |&(name, values): &(&str, _)| -> Named {
        let values: &[f32] = values;
        (name.to_owned(), vec![values.len()], values)
    };
    write_tensors(path, &runs.iter().map(named).collect::<Vec<_>>())
}

/// Reads what [`write_named`] wrote.
pub(crate) fn read_named(file: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let tensors = read_safetensors(file)?;
    Ok(tensors.into_iter().map(|(name, tensor)| (name, tensor.values)).collect())
}

/// Name, shape and values of a tensor to be written.
pub(super) type Named<'a> = (String, Vec<usize>, &'a [f32]);

pub(super) fn write_tensors(path: &Path, tensors: &[Named]) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., v)| bytemuck::cast_slice(v).to_vec()).collect();
    write_bytes(path, tensors, &bytes, safetensors::Dtype::F32)
}

/// Bytes of what [`write_tensors`] writes: a length of 8, a header in JSON filled up to a multiple
/// of 8, and the numbers.
pub(super) fn file_bytes(mut tensors: Vec<(String, Vec<usize>)>) -> u64 {
    tensors.sort();
    let mut header = r#"{"__metadata__":{"format":"pt"}}"#.len();
    let mut at = 0;
    for (name, shape) in &tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({
            name: {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        });
        // A comma for the outer braces.
        header += entry.to_string().len() - 1;
        at = end;
    }
    (8 + header.next_multiple_of(8) + at) as u64
}

pub(super) fn write_tensors_bf16(path: &Path, tensors: &[Named]) -> Result<()> {
    fn narrow(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
    }
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(.., v)| narrow(v)).collect();
    write_bytes(path, tensors, &bytes, safetensors::Dtype::BF16)
}

fn write_bytes(
    path: &Path,
    tensors: &[Named],
    bytes: &[Vec<u8>],
    dtype: safetensors::Dtype,
) -> Result<()> {
    let failed = |e: safetensors::SafeTensorError| Error::Io {
        path: path.to_owned(),
        source: std::io::Error::other(e),
    };
    let views = tensors
        .iter()
        .zip(bytes)
        .map(|((name, shape, _), b)| Ok((name, TensorView::new(dtype, shape.clone(), b)?)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(failed)?;
    // Readers of this ecosystem refuse files that do not say so.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_file_is_known_before_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_model.safetensors");
        let values = vec![0.5_f32; 3000];
        // Offsets of one to five digits, names out of order, and all lengths of padding.
        for n in 1..20 {
            let tensor = |i: usize| {
                let shape = if i.is_multiple_of(2) { vec![i + 1] } else { vec![i, 10, 3] };
                (format!("layer.{}.weight", (i * 7) % 13 + 100 * i), shape)
            };
            let named: Vec<_> = (0..n).map(tensor).collect();
            let tensors: Vec<Named> = named
                .iter()
                .map(|(name, shape)| {
                    let len = shape.iter().product();
                    (name.clone(), shape.clone(), &values[..len])
                })
                .collect();
            write_tensors(&path, &tensors).unwrap();
            assert_eq!(file_bytes(named), std::fs::metadata(&path).unwrap().len(), "{n} tensors");
        }
    }
}
