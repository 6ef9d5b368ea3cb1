//! What a run takes, told from shapes alone: no weight is read.

mod amount;
mod compute;
mod demand;
pub mod models;
mod search;
mod structure;
mod time;

pub use amount::Amount;
pub use compute::{Flops, flops};
pub use demand::Demand;
pub use search::{Budget, Found, Timing, search};
pub use structure::Structure;
pub use time::{Pace, Work};

use crate::checkpoint::adapter_file_bytes;
use crate::config::AdapterConfig;
use crate::inject::{Adapters, Site};
use crate::memory::Split;
use crate::model::spec::DecoderSpec;
use serde::Serialize;
use smore::config::LoraConfig;
use smore::counting::lora_rank_for;

/// How a model and an adapter on it are to be run.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Tokens of one forward pass in training.
    pub tokens: usize,
    /// The best values of the run are kept beside the newest.
    pub keeps_best: bool,
    /// The recipe's `bf16`.
    pub mixed: bool,
}

/// What one adapter takes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// What it is, for people.
    pub name: String,
    /// Trained numbers.
    pub parameters: usize,
    /// Bytes of its file; none where the base itself is trained.
    pub file_bytes: Option<u64>,
    /// Floating-point operations for one token, forward.
    pub flops: Flops,
    /// What S'MoRE's structure costs and gives.
    pub structure: Option<Structure>,
    /// Peaks of a training step.
    pub memory: Vec<Peak>,
}

/// The memory of a training step under one choice of precision and recomputation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peak {
    /// Frozen weights are kept as bf16, else as f32; where the recipe says `bf16`, so is what waits for
    /// the backward sweep.
    pub bf16: bool,
    /// Blocks are computed again in the backward sweep.
    pub gradient_checkpointing: bool,
    /// Its parts, bytes.
    pub split: Split,
    /// Their sum, bytes.
    pub total: u64,
}

impl Cost {
    /// Plans `config` on a model of shape `spec`.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn of(
        name: String,
        config: &AdapterConfig,
        router_widths: Option<&[usize]>,
        spec: &DecoderSpec,
        setting: Setting,
    ) -> Result<Self, String> {
        let adapters = match router_widths {
            Some(widths) => Adapters::stored(config, widths, spec)?,
            None => Adapters::new(config, spec)?,
        };
        let full = matches!(config, AdapterConfig::Full(_));
        let parameters = if full { spec.parameters() } else { adapters.len() };
        let peak = |bf16: bool, gradient_checkpointing| {
            let demand = Demand {
                spec,
                adapters: &adapters,
                trained: parameters,
                // What is trained is no frozen weight.
                weights: if full { 0 } else { spec.parameters() * if bf16 { 2 } else { 4 } },
                batch: setting.tokens,
                tokens: 0,
                mixed: bf16 && setting.mixed,
                gradient_checkpointing,
                keeps_best: setting.keeps_best,
            };
            let (split, total) = (demand.split(), demand.peak());
            Peak { bf16, gradient_checkpointing, split, total }
        };
        let precisions: &[bool] = if full { &[false] } else { &[false, true] };
        let memory =
            precisions.iter().flat_map(|&bf16| [peak(bf16, false), peak(bf16, true)]).collect();
        let file_bytes = (!full).then(|| adapter_file_bytes(config, &adapters));
        Ok(Self {
            name,
            parameters,
            file_bytes,
            flops: flops(&adapters),
            structure: Structure::of(&adapters),
            memory,
        })
    }
}

/// LoRA on the same targets as `config`, whose rank is d_L of a S'MoRE and whose parameters come
/// closest to those of `config`; what does not apply is left out.
///
/// # Errors
/// A message naming the key that does not fit the model.
pub fn loras(
    config: &AdapterConfig,
    parameters: usize,
    spec: &DecoderSpec,
) -> Result<Vec<(String, AdapterConfig)>, String> {
    let Some(targets) = config.targets() else { return Ok(vec![]) };
    let lora = |rank| {
        let targets = targets.clone();
        AdapterConfig::Lora(LoraConfig { targets, ..LoraConfig::new(rank) })
    };
    let maps = Adapters::new(&lora(1), spec)?;
    let shapes: Vec<(usize, usize)> = maps
        .slots
        .iter()
        .filter_map(|slot| match slot.site {
            Site::Map(proj) => Some(spec.shape(proj)),
            Site::Ffn => None,
        })
        .collect();
    let mut all = Vec::new();
    if let AdapterConfig::Smore(c) = config {
        let width = smore::spec::SmoreSpec::new(c, 1, 1).map_err(|e| e.to_string())?.root_width();
        all.push((format!("LoRA of equal rank {width}"), lora(width)));
    }
    if !matches!(config, AdapterConfig::Lora(_)) {
        let rank = lora_rank_for(parameters, &shapes);
        all.push((format!("LoRA of equal parameters, rank {rank}"), lora(rank)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests;
