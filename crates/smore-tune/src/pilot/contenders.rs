//! Who is compared, each at the same number of trained parameters.

use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::model::spec::DecoderSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How far a contender's parameters may be from the budget.
pub const TOLERANCE: f64 = 0.02;

/// An adapter of the study.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contender {
    /// LoRA.
    Lora,
    /// HydraLoRA.
    HydraLora,
    /// MixLoRA.
    MixLora,
    /// S'MoRE of two layers.
    Smore2,
    /// S'MoRE of three layers.
    Smore3,
    /// S'MoRE of two layers whose children are chosen without their ancestors' keys.
    NoAncestorKeys,
    /// S'MoRE of two layers without a non-linearity.
    Identity,
    /// Residuals of two orders without a tree (MoMOR).
    MultiOrder,
    /// One layer (MoLRE).
    Flat,
}

impl Contender {
    /// All contenders; ablations last.
    pub const ALL: [Self; 9] = [
        Self::Lora,
        Self::HydraLora,
        Self::MixLora,
        Self::Smore2,
        Self::Smore3,
        Self::NoAncestorKeys,
        Self::Identity,
        Self::MultiOrder,
        Self::Flat,
    ];

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::HydraLora => "HydraLoRA",
            Self::MixLora => "MixLoRA",
            Self::Smore2 => "S'MoRE, 2 layers",
            Self::Smore3 => "S'MoRE, 3 layers",
            Self::NoAncestorKeys => "2 layers, no ancestors' keys",
            Self::Identity => "2 layers, no non-linearity",
            Self::MultiOrder => "2 orders, no tree (MoMOR)",
            Self::Flat => "1 layer (MoLRE)",
        }
    }

    /// The configuration whose parameters come closest to `budget`.
    ///
    /// # Errors
    /// If none is within [`TOLERANCE`].
    pub fn config(self, spec: &DecoderSpec, budget: usize) -> Result<AdapterConfig> {
        let mut best: Option<(usize, AdapterConfig)> = None;
        for section in self.sections() {
            let config: AdapterConfig = serde_json::from_value(section)
                .map_err(|e| Error::Run(format!("{}: {e}", self.name())))?;
            let off = parameters(&config, spec)?.abs_diff(budget);
            if best.as_ref().is_none_or(|(least, _)| off < *least) {
                best = Some((off, config));
            }
        }
        match best {
            Some((off, config)) if off as f64 <= TOLERANCE * budget as f64 => Ok(config),
            _ => Err(Error::Run(format!(
                "{} cannot be had with {budget} parameters within {}%; choose another budget",
                self.name(),
                100.0 * TOLERANCE
            ))),
        }
    }

    /// Sizes to choose from.
    fn sections(self) -> Vec<Value> {
        match self {
            Self::Lora => (1..=128).map(|rank| json!({"kind": "lora", "rank": rank})).collect(),
            Self::HydraLora => product(
                3..=8,
                1..=64,
                |heads, rank| json!({"kind": "hydra_lora", "heads": heads, "rank": rank}),
            ),
            Self::MixLora => product(
                4..=8,
                1..=32,
                |experts, rank| json!({"kind": "mix_lora", "experts": experts, "fanout": 2, "rank": rank}),
            ),
            Self::Smore2 => trees(2, &json!({})),
            Self::Smore3 => trees(3, &json!({})),
            Self::NoAncestorKeys => trees(2, &json!({"gate": {"ancestor_keys": false}})),
            Self::Identity => trees(2, &json!({"activation": "identity"})),
            Self::MultiOrder => {
                trees(2, &json!({"activation": "identity", "structure": "multi_order"}))
            }
            Self::Flat => trees(1, &json!({"activation": "identity", "structure": "flat"})),
        }
    }
}

/// Trained parameters of an adapter on a decoder.
pub(super) fn parameters(config: &AdapterConfig, spec: &DecoderSpec) -> Result<usize> {
    Ok(Adapters::new(config, spec).map_err(Error::Run)?.len())
}

fn product(
    a: std::ops::RangeInclusive<usize>,
    b: std::ops::RangeInclusive<usize>,
    of: impl Fn(usize, usize) -> Value,
) -> Vec<Value> {
    a.flat_map(|a| b.clone().map(move |b| (a, b))).map(|(a, b)| of(a, b)).collect()
}

/// S'MoREs of `depth` layers, four experts of which two act in each (eight in a single layer), of
/// about one rank, with routers from narrow to wide.
fn trees(depth: u32, rest: &Value) -> Vec<Value> {
    let experts = if depth == 1 { 8 } else { 4 };
    let highest: usize = if depth == 1 { 16 } else { 8 };
    let mut all = Vec::new();
    for lowest in 1..=highest {
        // Bit l of `more`: layer l has one rank more.
        for more in 0..(1u32 << depth) - 1 {
            let layers: Vec<Value> = (0..depth)
                .map(|l| lowest + (more >> l & 1) as usize)
                .map(|rank| json!({"experts": experts, "fanout": 2, "rank": rank}))
                .collect();
            for width in (8..=48).step_by(4) {
                let mut section = json!({"kind": "smore", "layers": layers, "gate": {}});
                for (key, value) in rest.as_object().into_iter().flatten() {
                    section[key] = value.clone();
                }
                section["gate"]["router_width"] = json!(width);
                section["gate"]["router_input_width"] = json!(width);
                all.push(section);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::Study;
    use super::*;
    use crate::demo::{VOCAB_SIZE, base_config};

    #[test]
    fn all_have_the_same_number_of_parameters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, base_config(VOCAB_SIZE).to_string()).unwrap();
        let spec = DecoderSpec::read(&path).unwrap();
        let budget = Study::full().budget;
        for contender in Contender::ALL {
            let config = contender.config(&spec, budget).unwrap();
            let n = parameters(&config, &spec).unwrap();
            assert!(n.abs_diff(budget) as f64 <= TOLERANCE * budget as f64, "{contender:?}: {n}");
            let error = contender.config(&spec, 3).unwrap_err();
            assert!(error.to_string().contains("another budget"), "{error}");
        }
    }
}
