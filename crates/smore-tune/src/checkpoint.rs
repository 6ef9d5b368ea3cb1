//! Adapter folders in PEFT's layout and model folders in Hugging Face's, written whole or not at
//! all, and read strictly.
//!
//! LoRA uses upstream PEFT's format (`peft_type` `LORA`), S'MoRE the authors' (`HIER_MOE`).

mod peft;

use crate::config::AdapterConfig;
use crate::error::{Error, Result, nearest};
use crate::inject::Adapters;
use crate::model::spec::DecoderSpec;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use smore::layout::Param;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Before every module path in an adapter file.
pub(crate) const PREFIX: &str = "base_model.model.";

/// Writes a folder beside its final place and renames it there when `fill` is done, so that nobody
/// ever sees half of it.
///
/// # Errors
/// If writing fails; what was there before stays.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|e| io(parent, e))?;
    let fresh = tempfile::Builder::new()
        .prefix(".writing-")
        .tempdir_in(parent)
        .map_err(|e| io(parent, e))?;
    fill(fresh.path())?;
    for entry in std::fs::read_dir(fresh.path()).map_err(|e| io(fresh.path(), e))? {
        let file = entry.map_err(|e| io(fresh.path(), e))?.path();
        std::fs::File::open(&file).and_then(|f| f.sync_all()).map_err(|e| io(&file, e))?;
    }
    let fresh = fresh.keep();
    let retired = parent.join(format!(".replaced-{}", std::process::id()));
    if path.exists() {
        std::fs::rename(path, &retired).map_err(|e| io(path, e))?;
    }
    std::fs::rename(&fresh, path).map_err(|e| io(path, e))?;
    if retired.exists() {
        std::fs::remove_dir_all(&retired).map_err(|e| io(&retired, e))?;
    }
    // Temporary folders are private; a result is as readable as anything the user writes.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, open).map_err(|e| io(path, e))?;
    }
    Ok(())
}

/// Writes `adapter_config.json` and `adapter_model.safetensors`, reads them back and compares.
///
/// # Errors
/// If writing fails or what is read back differs.
pub fn save_adapter(
    path: &Path,
    config: &AdapterConfig,
    base: &Path,
    adapters: &Adapters,
    values: &[f32],
) -> Result<()> {
    write_folder(path, |dir| {
        let text = peft::to_json(config, base);
        write(&dir.join("adapter_config.json"), text.as_bytes())?;
        let mut tensors = Vec::new();
        for slot in &adapters.slots {
            let values = &values[slot.range.clone()];
            for param in slot.params() {
                for name in stored_names(config, param) {
                    let name = format!("{PREFIX}{}.{name}", slot.path());
                    tensors.push((name, param.shape.clone(), &values[param.range()]));
                }
            }
        }
        let file = dir.join("adapter_model.safetensors");
        write_tensors(&file, &tensors)?;
        if read_values(&file, config, adapters)? == values {
            Ok(())
        } else {
            Err(Error::Run(format!(
                "{}: reads back different from what was written",
                file.display()
            )))
        }
    })
}

/// An adapter read from its folder.
pub struct LoadedAdapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its places on the model.
    pub adapters: Adapters,
    /// Its values.
    pub values: Vec<f32>,
}

/// Reads an adapter folder for a model of shape `spec`.
///
/// # Errors
/// A missing, extra or misshaped tensor, or a setting we do not know: names file, tensor or key.
pub fn load_adapter(path: &Path, spec: &DecoderSpec) -> Result<LoadedAdapter> {
    let (config, widths) = read_adapter_config(path)?;
    let adapters = Adapters::with_router_widths(&config, &widths, spec)
        .map_err(|message| Error::Adapter { file: path.join("adapter_config.json"), message })?;
    let values = read_values(&path.join("adapter_model.safetensors"), &config, &adapters)?;
    Ok(LoadedAdapter { config, adapters, values })
}

/// Reads an adapter folder's `adapter_config.json`: its settings, and the router width of every
/// layer of S'MoRE.
///
/// # Errors
/// A missing file, or a setting we do not know: names file and key.
pub fn read_adapter_config(path: &Path) -> Result<(AdapterConfig, Vec<usize>)> {
    let file = path.join("adapter_config.json");
    let text = std::fs::read_to_string(&file)
        .map_err(|e| Error::reading(&file, "an adapter's settings", e))?;
    peft::from_json(&text).map_err(|message| Error::Adapter { file, message })
}

/// The names under which a parameter is stored: a shared pool's experts are stored once per layer.
fn stored_names(config: &AdapterConfig, param: &Param) -> Vec<String> {
    let AdapterConfig::Smore(c) = config else { return vec![param.name.clone()] };
    let pool = ["moe_A.0", "moe_A_bias.0", "moe_B.0", "moe_B_bias.0"];
    if !c.shared_pool || !pool.contains(&param.name.as_str()) {
        return vec![param.name.clone()];
    }
    let stem = param.name.trim_end_matches('0');
    (0..c.layers.len()).map(|l| format!("{stem}{l}")).collect()
}

/// The values of an adapter file, laid out as `adapters` says.
pub(crate) fn read_values(
    file: &Path,
    config: &AdapterConfig,
    adapters: &Adapters,
) -> Result<Vec<f32>> {
    let bytes = std::fs::read(file).map_err(|e| Error::reading(file, "an adapter's weights", e))?;
    let bad = |message: String| Error::Adapter { file: file.to_owned(), message };
    let stored = SafeTensors::deserialize(&bytes)
        .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
    let mut left: BTreeMap<String, TensorView> =
        stored.tensors().into_iter().map(|(name, t)| (name.replace(".default.", "."), t)).collect();
    let mut values = vec![0.0; adapters.len()];
    for slot in &adapters.slots {
        let run = &mut values[slot.range.clone()];
        for param in slot.params() {
            for (copy, name) in stored_names(config, param).iter().enumerate() {
                let name = format!("{PREFIX}{}.{name}", slot.path());
                let Some(tensor) = left.remove(&name) else {
                    let hint = nearest(&name, left.keys().map(String::as_str))
                        .map_or_else(String::new, |n| format!("; the nearest is `{n}`"));
                    return Err(bad(format!("no tensor `{name}`{hint}")));
                };
                if tensor.shape() != param.shape {
                    let (found, expected) = (tensor.shape(), &param.shape);
                    return Err(bad(format!("`{name}` is {found:?}, expected {expected:?}")));
                }
                let read = to_f32(&tensor)
                    .ok_or_else(|| bad(format!("`{name}` is {:?}", tensor.dtype())))?;
                let target = &mut run[param.range()];
                if copy > 0 && read != target {
                    return Err(bad(format!("`{name}` differs from the pool it should copy")));
                }
                target.copy_from_slice(&read);
            }
        }
    }
    match left.keys().next() {
        Some(extra) => Err(bad(format!(
            "tensor `{extra}` has no place in this adapter on this model ({} unplaced)",
            left.len()
        ))),
        None => Ok(values),
    }
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

/// Writes a Hugging Face model folder: the tensors of `spec` with these values, and the settings
/// and tokenizer of the folder it came from.
///
/// # Errors
/// If reading the source or writing fails.
pub fn save_model(path: &Path, spec: &DecoderSpec, source: &Path, values: &[f32]) -> Result<()> {
    write_folder(path, |dir| {
        for name in MODEL_FILES {
            let from = source.join(name);
            if from.is_file() {
                std::fs::copy(&from, dir.join(name))
                    .map_err(|source| Error::Io { path: from, source })?;
            }
        }
        let mut start = 0;
        let mut tensors = Vec::new();
        for (name, shape) in spec.tensors() {
            let len: usize = shape.iter().product();
            tensors.push((name, shape, &values[start..start + len]));
            start += len;
        }
        let file = dir.join("model.safetensors");
        if spec.bf16 { write_tensors_bf16(&file, &tensors) } else { write_tensors(&file, &tensors) }
    })
}

/// What a model folder holds besides weights.
const MODEL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

type Named<'a> = (String, Vec<usize>, &'a [f32]);

fn write_tensors(path: &Path, tensors: &[Named]) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., v)| bytemuck::cast_slice(v).to_vec()).collect();
    write_bytes(path, tensors, &bytes, safetensors::Dtype::F32)
}

fn write_tensors_bf16(path: &Path, tensors: &[Named]) -> Result<()> {
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

/// Writes a whole file, or says which could not be written.
///
/// # Errors
/// If writing fails.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::Io { path: PathBuf::from(path), source })
}
