//! Adapter folders in PEFT's layout and model folders in Hugging Face's, written whole or not at
//! all, and read strictly: every tensor has a place and every place a tensor.
//!
//! | kind | written as | also read from |
//! |---|---|---|
//! | LoRA | upstream PEFT's `LORA` | MoE-PEFT's `LORA` |
//! | S'MoRE | the authors' `HIER_MOE` | MoE-PEFT's `LORAMOE` and `MOLA`, which are flat mixtures |
//! | HydraLoRA | its fork's `LORA` with `lora_nums` | |
//! | MixLoRA | MoE-PEFT's `MIXLORA` | |
//!
//! Tensors are written as safetensors and read from those or from PyTorch's `.bin`.

mod folder;
pub mod manifest;
mod model;
mod moe_peft;
mod peft;
pub mod pickle;
mod tensors;

pub(crate) use folder::{UNFINISHED, check_seal, seal, write_file};
pub use folder::{write, write_folder};
pub(crate) use model::fill_model;
pub use model::{copy_model_files, save_model};
pub use moe_peft::FlatMixture;

use crate::config::AdapterConfig;
use crate::error::{Error, Result, nearest};
use crate::inject::{Adapters, Slot};
use crate::model::spec::DecoderSpec;
use manifest::Manifest;
use smore::layout::Param;
use std::path::{Path, PathBuf};
use tensors::{Tensors, file_bytes, read_adapter, read_safetensors, write_tensors};
pub(crate) use tensors::{read_named, write_named};

/// Before every module path in an adapter file of PEFT.
pub(crate) const PREFIX: &str = "base_model.model.";

/// An adapter's settings, as its folder has them.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The adapter.
    pub config: AdapterConfig,
    /// Router width of every layer of S'MoRE; empty for other kinds.
    pub router_widths: Vec<usize>,
    /// The base model it names.
    pub base: Option<String>,
    /// Where the tensors are those of a flat mixture that becomes a S'MoRE.
    pub mixture: Option<FlatMixture>,
    /// Share of the adapter's input that was dropped in training. It has no part in its function.
    pub dropout: f64,
    /// The activation that MixLoRA's experts were trained with, if the folder says so.
    pub activation: Option<String>,
}

/// An adapter read from its folder.
pub struct LoadedAdapter {
    /// Its settings.
    pub settings: Settings,
    /// Its places on the model.
    pub adapters: Adapters,
    /// Its values.
    pub values: Vec<f32>,
}

/// Writes `adapter_config.json`, `adapter_model.safetensors` and `smore_manifest.json`, reads the
/// tensors back and compares.
///
/// # Errors
/// If writing fails or what is read back differs; nothing is left half-written.
pub fn save_adapter(
    path: &Path,
    settings: &Settings,
    adapters: &Adapters,
    values: &[f32],
    manifest: &Manifest,
) -> Result<()> {
    write_folder(path, |dir| fill_adapter(dir, settings, adapters, values, manifest))
}

/// Bytes of the `adapter_model.safetensors` that [`save_adapter`] writes, header included.
pub fn adapter_file_bytes(config: &AdapterConfig, adapters: &Adapters) -> u64 {
    let named = |slot, param: &Param| {
        let names = stored_names(config, slot, param).into_iter();
        names.map(|name| (name, param.shape.clone())).collect::<Vec<_>>()
    };
    let all = adapters.slots.iter().flat_map(|slot| slot.params().iter().map(move |p| (slot, p)));
    file_bytes(all.flat_map(|(slot, param)| named(slot, param)).collect())
}

/// As [`save_adapter`], among other files of a folder that is being written.
pub(crate) fn fill_adapter(
    dir: &Path,
    settings: &Settings,
    adapters: &Adapters,
    values: &[f32],
    manifest: &Manifest,
) -> Result<()> {
    // A mixture was turned into a S'MoRE when it was read.
    let settings = Settings { mixture: None, ..settings.clone() };
    let text = peft::to_json(&settings);
    write(&dir.join("adapter_config.json"), text.as_bytes())?;
    manifest.write(dir)?;
    let mut tensors = Vec::new();
    for slot in &adapters.slots {
        let values = &values[slot.range.clone()];
        for param in slot.params() {
            for name in stored_names(&settings.config, slot, param) {
                tensors.push((name, param.shape.clone(), &values[param.range()]));
            }
        }
    }
    let file = dir.join("adapter_model.safetensors");
    write_tensors(&file, &tensors)?;
    let back = load_tensors(dir, &settings, adapters)?;
    if back.iter().map(|x| x.to_bits()).eq(values.iter().map(|x| x.to_bits())) {
        Ok(())
    } else {
        Err(Error::Run(format!("{}: reads back different from what was written", file.display())))
    }
}

/// Reads an adapter folder for a model of shape `spec`.
///
/// # Errors
/// A missing, extra or misshaped tensor, or a setting we do not know: names file, tensor or key.
pub fn load_adapter(path: &Path, spec: &DecoderSpec) -> Result<LoadedAdapter> {
    let settings = read_settings(path)?;
    let bad = |message| Error::Adapter { file: path.join("adapter_config.json"), message };
    settings.check_activation(spec).map_err(bad)?;
    let adapters =
        Adapters::stored(&settings.config, &settings.router_widths, spec).map_err(bad)?;
    let values = load_tensors(path, &settings, &adapters)?;
    Ok(LoadedAdapter { settings, adapters, values })
}

/// Reads an adapter folder's `adapter_config.json`.
///
/// # Errors
/// A missing file, or a setting we do not know: names file and key.
pub fn read_settings(path: &Path) -> Result<Settings> {
    let file = path.join("adapter_config.json");
    let text = std::fs::read_to_string(&file)
        .map_err(|e| Error::reading(&file, "an adapter's settings", e))?;
    peft::from_json(&text).map_err(|message| Error::Adapter { file, message })
}

impl Settings {
    /// Settings of an adapter that starts here, on the base model at `base`.
    pub fn new(config: AdapterConfig, base: &Path) -> Self {
        let base = Some(base.to_string_lossy().into_owned());
        let router_widths = match &config {
            AdapterConfig::Smore(c) => vec![c.gate.router_width; c.layers.len()],
            _ => vec![],
        };
        Self { config, router_widths, base, mixture: None, dropout: 0.0, activation: None }
    }

    /// The base model it names, if it is here: relative to the current directory or to the
    /// adapter's `folder`.
    pub fn find_base(&self, folder: &Path) -> Option<PathBuf> {
        let name = self.base.as_deref()?;
        let candidates = [PathBuf::from(name), folder.join(name)];
        candidates.into_iter().find(|c| c.join("config.json").is_file())
    }

    /// The name of a parameter in this adapter's file; of a shared pool's, that of its first copy.
    pub(crate) fn stored_name(&self, slot: &Slot, param: &Param) -> String {
        stored_names(&self.config, slot, param).remove(0)
    }

    fn check_activation(&self, spec: &DecoderSpec) -> std::result::Result<(), String> {
        use smore_engine::GateActivation::{GeluTanh, Silu};
        let own = match spec.activation {
            Silu => ["silu", "swish"],
            GeluTanh => ["gelu_pytorch_tanh", "gelu_new"],
        };
        match self.activation.as_deref() {
            Some(other) if !own.contains(&other) => Err(format!(
                "act_fn is `{other}`, but the base's FFN has `{}`; experts with an activation of \
                 their own are not supported",
                own[0]
            )),
            _ => Ok(()),
        }
    }
}

/// The names under which a parameter is stored: a shared pool's experts are stored once per layer.
fn stored_names(config: &AdapterConfig, slot: &Slot, param: &Param) -> Vec<String> {
    let one = |name: &str| match config {
        AdapterConfig::MixLora(_) => moe_peft::stored_name("mixlora", &slot.param_path(name)),
        _ => format!("{PREFIX}{}", slot.param_path(name)),
    };
    let pool = ["moe_A.0", "moe_A_bias.0", "moe_B.0", "moe_B_bias.0"];
    match config {
        AdapterConfig::Smore(c) if c.shared_pool && pool.contains(&param.name.as_str()) => {
            let stem = param.name.trim_end_matches('0');
            (0..c.layers.len()).map(|l| one(&format!("{stem}{l}"))).collect()
        }
        _ => vec![one(&param.name)],
    }
}

/// The values of a safetensors file, laid out as `adapters` says.
pub(crate) fn read_values(
    file: &Path,
    settings: &Settings,
    adapters: &Adapters,
) -> Result<Vec<f32>> {
    place(file, read_safetensors(file)?, settings, adapters)
}

/// The values of all adapters.
fn load_tensors(folder: &Path, settings: &Settings, adapters: &Adapters) -> Result<Vec<f32>> {
    let (file, tensors) = read_adapter(folder)?;
    place(&file, tensors, settings, adapters)
}

/// Gives every tensor its place.
fn place(
    file: &Path,
    tensors: Tensors,
    settings: &Settings,
    adapters: &Adapters,
) -> Result<Vec<f32>> {
    let left = tensors.into_iter().map(|(name, t)| (name.replace(".default.", "."), t)).collect();
    let mut unplaced = Unplaced { left };
    let bad = |message: String| Error::Adapter { file: file.to_owned(), message };
    // Settings that claim far more values than there are must not claim memory for them. Where
    // little is missing, the tensor is named below; a mixture's S'MoRE adds small identities.
    let stored = unplaced.len();
    if adapters.len() > 16 * stored + (1 << 20) {
        let expected = adapters.len();
        return Err(bad(format!(
            "has {stored} values, too few for the {expected} of adapter_config.json"
        )));
    }
    let mut values = vec![0.0; adapters.len()];
    for slot in &adapters.slots {
        let run = &mut values[slot.range.clone()];
        if let Some(mixture) = &settings.mixture {
            mixture.fill(slot, &mut unplaced, run).map_err(bad)?;
            continue;
        }
        for param in slot.params() {
            let names = stored_names(&settings.config, slot, param);
            for (copy, name) in names.iter().enumerate() {
                let read = unplaced.take(name, &param.shape).map_err(bad)?;
                let target = &mut run[param.range()];
                if copy > 0 && read != target {
                    return Err(bad(format!("`{name}` differs from the pool it should copy")));
                }
                target.copy_from_slice(&read);
            }
        }
    }
    unplaced.finish().map_err(bad)?;
    Ok(values)
}

/// Tensors that were read and have no place yet.
struct Unplaced {
    left: Tensors,
}

impl Unplaced {
    /// Number of values.
    fn len(&self) -> usize {
        self.left.values().map(|t| t.values.len()).sum()
    }

    /// The values of a tensor that must be there, with this shape.
    fn take(&mut self, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
        let Some(tensor) = self.left.remove(name) else {
            let hint = nearest(name, self.left.keys().map(String::as_str))
                .map_or_else(String::new, |n| format!("; the nearest not yet placed is `{n}`"));
            return Err(format!("no tensor `{name}`{hint}"));
        };
        if tensor.shape != shape {
            return Err(format!("`{name}` is {:?}, expected {shape:?}", tensor.shape));
        }
        Ok(tensor.values)
    }

    /// Nothing may be left over.
    fn finish(self) -> std::result::Result<(), String> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(extra) => Err(format!(
                "tensor `{extra}` has no place in this adapter on this model ({} unplaced)",
                self.left.len()
            )),
        }
    }
}
