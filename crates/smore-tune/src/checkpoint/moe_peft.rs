//! MoE-PEFT's settings and names: MixLoRA both ways, LoRAMoE and MoLA for reading.
//!
//! LoRAMoE and MoLA put a gate and LoRA experts on each linear map: flat mixtures, which are S'MoREs
//! of one layer with a linear router. They are read as such, with the same function.

use super::Unplaced;
use super::peft::{optional, read, refuse};
use crate::config::AdapterConfig;
use crate::inject::{Site, Slot};
use crate::model::spec::Proj;
use serde_json::{Map, Value, json};
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::config::{
    Activation, ActivationPosition, GateConfig, GateKind, Init, LayerConfig, LoraConfig,
    MixLoraConfig, RouterArchitecture, SmoreConfig, Structure,
};
use smore::grow::{Mixture, from_mixture};
use smore::targets::{Modules, Targets};

type Reading<T> = std::result::Result<T, String>;

/// `mixlora.layers.0.mlp.moe_gate.weight` of `model.layers.0.mlp.moe_gate.weight`.
pub(super) fn stored_name(prefix: &str, path: &str) -> String {
    format!("{prefix}.{}", path.trim_start_matches("model."))
}

/// What MixLoRA writes besides the common keys.
pub(super) fn mix_lora_keys(c: &MixLoraConfig) -> Value {
    let alpha = c.alpha.unwrap_or(2.0 * c.rank as f64);
    json!({
        "expert_lora": {"lora_alpha": alpha, "lora_dropout": 0.0, "r": c.rank},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "num_experts": c.experts,
        "peft_type": "MIXLORA",
        "r": c.rank,
        "router_aux_loss_coef": c.balance_weight,
        "routing_strategy": "mixlora",
        "top_k": c.fanout,
        "use_dora": false,
        "use_rslora": false,
    })
}

/// MoE-PEFT's own weight of the balance loss. It never writes it into an adapter's settings.
const BALANCE_WEIGHT: f64 = 0.001;

/// Rank and alpha such that alpha / rank is the scale.
fn low_rank(keys: &Map<String, Value>) -> Reading<(usize, f64)> {
    let (rank, alpha): (usize, f64) = (read(keys, "r")?, read(keys, "lora_alpha")?);
    let rslora = optional(keys, "use_rslora")?.unwrap_or(false);
    Ok((rank, if rslora { alpha * (rank as f64).sqrt() } else { alpha }))
}

/// A list of names, or names that are on or off.
fn targets(keys: &Map<String, Value>) -> Reading<Targets> {
    let names = match keys.get("target_modules") {
        Some(Value::Object(all)) => {
            all.iter().filter(|(_, on)| **on == json!(true)).map(|(name, _)| name.clone()).collect()
        }
        _ => read(keys, "target_modules")?,
    };
    Ok(Modules::Names(names).into())
}

/// A MixLoRA, and the activation of its experts.
pub(super) fn mix_lora(keys: &Map<String, Value>) -> Reading<(AdapterConfig, Option<String>)> {
    refuse(keys, &["use_dora", "bias"])?;
    let strategy: String = optional(keys, "routing_strategy")?.unwrap_or_else(|| "mixlora".into());
    if strategy != "mixlora" {
        return Err(format!(
            "routing_strategy is `{strategy}`; only `mixlora` (top-k) is supported"
        ));
    }
    let (mut rank, mut alpha) = low_rank(keys)?;
    if let Some(Value::Object(expert)) = keys.get("expert_lora") {
        let mut own = keys.clone();
        own.extend(expert.clone());
        refuse(&own, &["use_dora"])?;
        let expert = low_rank(&own)?;
        let attention = targets(keys)?;
        let outside = matches!(&attention.modules, Modules::Names(names)
            if names.iter().any(|n| Proj::ALL[..4].iter().any(|p| p.name() == n)));
        if outside && expert != (rank, alpha) {
            return Err(format!(
                "expert_lora has rank {} and alpha {}, the attention's LoRAs {rank} and {alpha}; \
                 only equal ones are supported",
                expert.0, expert.1
            ));
        }
        (rank, alpha) = expert;
    }
    let config = MixLoraConfig {
        targets: targets(keys)?,
        experts: read(keys, "num_experts")?,
        fanout: read(keys, "top_k")?,
        rank,
        alpha: Some(alpha),
        balance_weight: optional(keys, "router_aux_loss_coef")?.unwrap_or(BALANCE_WEIGHT),
    };
    Ok((AdapterConfig::MixLora(config), optional(keys, "act_fn")?))
}

/// A plain LoRA of MoE-PEFT.
pub(super) fn lora(keys: &Map<String, Value>) -> Reading<LoraConfig> {
    let (rank, alpha) = low_rank(keys)?;
    Ok(LoraConfig { targets: targets(keys)?, alpha: Some(alpha), ..LoraConfig::new(rank) })
}

/// A flat mixture on every adapted map, as stored by LoRAMoE and MoLA.
#[derive(Clone, Debug, PartialEq)]
pub struct FlatMixture {
    /// First part of all names.
    prefix: &'static str,
    /// Experts chosen for a token.
    fanout: usize,
    /// alpha / rank
    scale: f64,
}

/// The S'MoRE that a LoRAMoE or MoLA is, and how to read it.
pub(super) fn flat_mixture(
    keys: &Map<String, Value>,
    kind: &str,
) -> Reading<(AdapterConfig, FlatMixture)> {
    refuse(keys, &["use_dora", "bias"])?;
    let (rank, alpha) = low_rank(keys)?;
    let experts: usize = read(keys, "num_experts")?;
    let (prefix, fanout) = match kind {
        "LORAMOE" => ("loramoe", experts),
        _ => ("mola", read(keys, "top_k")?),
    };
    let targets = targets(keys)?;
    if let Modules::Names(names) = &targets.modules
        && let Some(name) = names.iter().find(|n| Proj::ALL[..4].iter().any(|p| p.name() == *n))
        && kind == "LORAMOE"
    {
        return Err(format!(
            "LORAMOE with {name}: it keeps its experts to the FFN, and a mixture there beside LoRAs \
             elsewhere is not supported"
        ));
    }
    let config = SmoreConfig {
        targets,
        layers: vec![LayerConfig { experts, fanout, rank, lora_alpha: None }],
        gate: GateConfig {
            kind: if fanout == experts { GateKind::Dense } else { GateKind::Switch },
            architecture: RouterArchitecture::Linear,
            router_width: 1,
            router_input_width: experts,
            ..GateConfig::default()
        },
        activation: Activation::Identity,
        activation_position: ActivationPosition::All,
        shared_pool: false,
        structure: Structure::Flat,
        init: Init::Eq1Layer,
    };
    let scale = alpha / rank as f64;
    Ok((AdapterConfig::Smore(config), FlatMixture { prefix, fanout, scale }))
}

impl FlatMixture {
    /// Reads one map's mixture into the S'MoRE on it.
    pub(super) fn fill(
        &self,
        slot: &Slot,
        tensors: &mut Unplaced,
        values: &mut [f32],
    ) -> Reading<()> {
        let (Site::Map(proj), BlockAdapter::Map(AnyAdapter::Smore(smore))) =
            (slot.site, &slot.adapter)
        else {
            unreachable!("a flat mixture becomes a S'MoRE on a map")
        };
        let path = proj.path(slot.block);
        let mut take = |part: &str, shape: [usize; 2]| {
            tensors.take(&stored_name(self.prefix, &format!("{path}.{part}")), &shape)
        };
        let (n, r) = (smore.spec.layers[0].experts, smore.spec.layers[0].rank);
        let (d_in, d_out) = (smore.spec.d_in, smore.spec.d_out);
        let route = take("moe_gate.weight", [n, d_in])?;
        let (mut down, mut up) = (Vec::new(), Vec::new());
        for e in 0..n {
            down.push(take(&format!("experts.{e}.lora_A.weight"), [r, d_in])?);
            up.push(take(&format!("experts.{e}.lora_B.weight"), [d_out, r])?);
        }
        let mixture = Mixture {
            route: &route,
            down: down.iter().map(Vec::as_slice).collect(),
            up: up.iter().map(Vec::as_slice).collect(),
            fanout: self.fanout,
            scale: self.scale,
        };
        // Nothing is drawn: one layer has no way for what comes from below.
        let mut rng = smore::rng::stream(0, smore::rng::Purpose::AdapterInit, 0, 0);
        from_mixture(smore, values, &mixture, &mut rng).map_err(|e| e.to_string())
    }
}
