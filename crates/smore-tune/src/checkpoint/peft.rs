//! `adapter_config.json`, both ways: upstream PEFT's, the authors' and HydraLoRA's keys here,
//! MoE-PEFT's in [`moe_peft`].

use super::{Settings, moe_peft};
use crate::config::{AdapterConfig, FullConfig};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use smore::config::{
    Activation, GateConfig, HydraLoraConfig, LayerConfig, LoraConfig, RouterArchitecture,
    SmoreConfig, Structure,
};
use smore::targets::Targets;

type Reading<T> = std::result::Result<T, String>;

/// The file's text: keys sorted, two spaces, as PEFT writes it.
pub(super) fn to_json(settings: &Settings) -> String {
    let config = &settings.config;
    let Some(targets) = config.targets() else { return "{}\n".into() };
    let mut keys = match config {
        AdapterConfig::Smore(c) => smore_keys(c, &settings.router_widths),
        AdapterConfig::Lora(c) => lora_keys(c),
        AdapterConfig::HydraLora(c) => hydra_keys(c),
        AdapterConfig::MixLora(c) => moe_peft::mix_lora_keys(c),
        AdapterConfig::Saved(_) | AdapterConfig::Full(_) => json!({}),
    };
    if settings.dropout > 0.0 {
        for key in ["/lora_dropout", "/moe_dropout", "/expert_lora/lora_dropout"] {
            if let Some(rate) = keys.pointer_mut(key) {
                *rate = json!(settings.dropout);
            }
        }
    }
    let common = json!({
        "auto_mapping": null,
        "base_model_name_or_path": settings.base,
        "bias": "none",
        "exclude_modules": targets.exclude,
        "inference_mode": true,
        "layers_to_transform": targets.blocks,
        "modules_to_save": null,
        "revision": null,
        "target_modules": targets.modules,
        "task_type": "CAUSAL_LM",
    });
    if let (Some(keys), Value::Object(common)) = (keys.as_object_mut(), common) {
        keys.extend(common);
        keys.sort_keys();
    }
    format!("{keys:#}\n")
}

fn lora_keys(c: &LoraConfig) -> Value {
    json!({
        "alpha_pattern": c.alpha_pattern,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "lora_alpha": number(c.alpha.unwrap_or(2.0 * c.rank as f64)),
        "lora_dropout": 0.0,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "r": c.rank,
        "rank_pattern": c.rank_pattern,
        "use_dora": false,
        "use_rslora": c.rslora,
    })
}

/// Whole numbers without a decimal point, as PEFT's users write alpha.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn smore_keys(c: &SmoreConfig, router_widths: &[usize]) -> Value {
    let each = |f: fn(&LayerConfig) -> usize| c.layers.iter().map(f).collect::<Vec<_>>();
    let scaled = c.layers.iter().any(|l| l.lora_alpha.is_some());
    // The authors' list is all or nothing; a layer without alpha has scale 1, that is alpha = r.
    let alphas: Vec<Value> =
        c.layers.iter().map(|l| number(l.lora_alpha.unwrap_or(l.rank as f64))).collect();
    let mut keys = json!({
        "activation_position": c.activation_position,
        "balance_loss_weight": c.gate.balance_weight,
        "dim_downproj_x": c.gate.router_input_width,
        "expert_act_fn": c.activation,
        "expert_dims": each(|l| l.rank),
        "gate_act_fn": c.gate.activation,
        "gate_arch": c.gate.architecture,
        "gate_dims": router_widths,
        "gate_type": c.gate.kind,
        "init_method": c.init,
        "init_moe_weights": true,
        "is_shared_expert_pool": c.shared_pool,
        "layer_forward_mode": "subgraph",
        "lora_alpha": if scaled { json!(alphas) } else { Value::Null },
        "lora_scaling": null,
        "moe_arch": "smore",
        "moe_dropout": 0.0,
        "num_active": each(|l| l.fanout),
        "num_experts": each(|l| l.experts),
        "peft_type": "HIER_MOE",
    });
    // What the authors' code cannot express is written only where it is used.
    if c.structure != Structure::Tree {
        keys["structure"] = json!(c.structure);
    }
    if !c.gate.ancestor_keys {
        keys["ancestor_keys"] = json!(false);
    }
    keys
}

/// What HydraLoRA's fork writes: a LoRA's keys and the number of heads.
fn hydra_keys(c: &HydraLoraConfig) -> Value {
    json!({
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "lora_alpha": number(c.alpha.unwrap_or(2.0 * c.rank as f64)),
        "lora_dropout": 0.0,
        "lora_nums": c.heads,
        "peft_type": "LORA",
        "r": c.rank,
    })
}

/// The adapter that the file describes.
pub(super) fn from_json(text: &str) -> Reading<Settings> {
    let json: Value = serde_json::from_str(text).map_err(|e| format!("not valid JSON: {e}"))?;
    let keys = json.as_object().ok_or("not a JSON object")?;
    let mut settings = Settings {
        config: AdapterConfig::Full(FullConfig::default()),
        router_widths: vec![],
        base: optional(keys, "base_model_name_or_path")?,
        mixture: None,
        dropout: optional(keys, "lora_dropout")?.or(optional(keys, "moe_dropout")?).unwrap_or(0.0),
        activation: None,
    };
    settings.config = match keys.get("peft_type").and_then(Value::as_str) {
        Some("LORA") if keys.get("lora_nums").is_some_and(|n| !n.is_null()) => {
            AdapterConfig::HydraLora(hydra_lora(keys)?)
        }
        // Only PEFT's own files say whether a sub-set of the layers is meant.
        Some("LORA") if keys.get("target_modules").is_some_and(Value::is_object) => {
            AdapterConfig::Lora(moe_peft::lora(keys)?)
        }
        Some("LORA") => AdapterConfig::Lora(lora(keys)?),
        Some("HIER_MOE") => {
            let arch = keys.get("moe_arch").and_then(Value::as_str).unwrap_or("smore");
            if arch != "smore" {
                return Err(format!("moe_arch is `{arch}`; expected `smore`"));
            }
            let (config, widths) = hier_moe(keys)?;
            settings.router_widths = widths;
            AdapterConfig::Smore(config)
        }
        Some("MIXLORA") => {
            let (config, activation) = moe_peft::mix_lora(keys)?;
            settings.activation = activation;
            config
        }
        Some(kind @ ("LORAMOE" | "MOLA")) => {
            let (config, mixture) = moe_peft::flat_mixture(keys, kind)?;
            settings.router_widths = vec![1];
            settings.mixture = Some(mixture);
            config
        }
        Some(other) => {
            return Err(format!(
                "peft_type is `{other}`; expected LORA, HIER_MOE, MIXLORA, LORAMOE or MOLA"
            ));
        }
        None => return Err("no `peft_type`; is this an adapter's folder?".into()),
    };
    Ok(settings)
}

pub(super) fn read<T: serde::de::DeserializeOwned>(
    keys: &Map<String, Value>,
    key: &str,
) -> Reading<T> {
    let value = keys.get(key).ok_or_else(|| format!("no key `{key}`"))?;
    serde_json::from_value(value.clone()).map_err(|e| format!("{key} is {value}: {e}"))
}

pub(super) fn optional<T: serde::de::DeserializeOwned>(
    keys: &Map<String, Value>,
    key: &str,
) -> Reading<Option<T>> {
    if keys.get(key).is_none_or(Value::is_null) { Ok(None) } else { read(keys, key).map(Some) }
}

/// Refuses settings that would change the function and that we do not compute.
pub(super) fn refuse(keys: &Map<String, Value>, unsupported: &[&str]) -> Reading<()> {
    for &key in unsupported {
        let on = match keys.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Object(o)) => !o.is_empty(),
            Some(Value::Array(a)) => !a.is_empty(),
            Some(Value::String(s)) => key == "bias" && s != "none",
            Some(_) => true,
        };
        if on {
            return Err(format!("{key} is {}, which is not supported", keys[key]));
        }
    }
    Ok(())
}

/// The modules that PEFT would wrap.
fn targets(keys: &Map<String, Value>) -> Reading<Targets> {
    let pattern: Option<OneOrMany<String>> = optional(keys, "layers_pattern")?;
    let patterns = pattern.map_or(vec![], OneOrMany::into_vec);
    if !patterns.iter().all(|p| p == "layers") {
        return Err(format!(
            "layers_pattern is {patterns:?}; the blocks of a decoder are `layers`"
        ));
    }
    let blocks: Option<OneOrMany<usize>> = optional(keys, "layers_to_transform")?;
    Ok(Targets {
        modules: read(keys, "target_modules")?,
        exclude: optional(keys, "exclude_modules")?,
        blocks: blocks.map(OneOrMany::into_vec),
    })
}

/// A value, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(x) => vec![x],
            Self::Many(x) => x,
        }
    }
}

fn lora(keys: &Map<String, Value>) -> Reading<LoraConfig> {
    refuse(
        keys,
        &[
            "use_dora",
            "modules_to_save",
            "layer_replication",
            "fan_in_fan_out",
            "bias",
            "lora_bias",
            "trainable_token_indices",
            "target_parameters",
            "alora_invocation_tokens",
            "use_qalora",
            "use_bdlora",
            "velora_config",
            "monteclora_config",
            "arrow_config",
            "kasa_config",
        ],
    )?;
    check_init(keys)?;
    Ok(LoraConfig {
        targets: targets(keys)?,
        rank: read(keys, "r")?,
        alpha: Some(read(keys, "lora_alpha")?),
        rslora: optional(keys, "use_rslora")?.unwrap_or(false),
        rank_pattern: optional(keys, "rank_pattern")?.unwrap_or_default(),
        alpha_pattern: optional(keys, "alpha_pattern")?.unwrap_or_default(),
    })
}

/// Initialisations that take their start out of the base's weights do so again whenever PEFT loads
/// the adapter: the factors in the file are not all of it.
fn check_init(keys: &Map<String, Value>) -> Reading<()> {
    let keeps_base = ["gaussian", "eva", "orthogonal", "mica"];
    match keys.get("init_lora_weights") {
        Some(Value::String(init)) if !keeps_base.contains(&init.to_lowercase().as_str()) => {
            Err(format!(
                "init_lora_weights is `{init}`, with which PEFT changes the base's weights too; \
                 not supported. PEFT makes a plain LoRA of it: save_pretrained with \
                 path_initial_model_for_weight_conversion"
            ))
        }
        _ => Ok(()),
    }
}

fn hydra_lora(keys: &Map<String, Value>) -> Reading<HydraLoraConfig> {
    let LoraConfig { targets, rank, alpha, rslora, .. } = lora(keys)?;
    refuse(keys, &["rank_pattern", "alpha_pattern"])?;
    // alpha / sqrt(r) = (alpha sqrt(r)) / r
    let alpha = alpha.map(|a| if rslora { a * (rank as f64).sqrt() } else { a });
    Ok(HydraLoraConfig { targets, heads: read(keys, "lora_nums")?, rank, alpha })
}

fn hier_moe(keys: &Map<String, Value>) -> Reading<(SmoreConfig, Vec<usize>)> {
    refuse(keys, &["modules_to_save", "bias"])?;
    let list = |key: &str| read::<Vec<usize>>(keys, key);
    let (experts, fanouts, ranks) =
        (list("num_experts")?, list("num_active")?, list("expert_dims")?);
    if experts.len() != fanouts.len() || experts.len() != ranks.len() {
        return Err("num_experts, num_active and expert_dims have different lengths".into());
    }
    let mut widths = list("gate_dims")?;
    if let ([width], depth) = (widths.as_slice(), experts.len()) {
        widths = vec![*width; depth];
    }
    let alphas: Option<Vec<Option<f64>>> = optional(keys, "lora_alpha")?;
    if let Some(n) = alphas.as_ref().map(Vec::len).filter(|&n| n != experts.len()) {
        return Err(format!("lora_alpha has {n} entries, num_experts {}", experts.len()));
    }
    let layers = (0..experts.len())
        .map(|l| LayerConfig {
            experts: experts[l],
            fanout: fanouts[l],
            rank: ranks[l],
            lora_alpha: alphas.as_ref().and_then(|a| a.get(l).copied().flatten()),
        })
        .collect();
    let architecture: RouterArchitecture = read(keys, "gate_arch")?;
    let activation: Activation = read(keys, "expert_act_fn")?;
    let gate = GateConfig {
        kind: read(keys, "gate_type")?,
        architecture,
        balance_weight: read(keys, "balance_loss_weight")?,
        router_width: widths.first().copied().unwrap_or(1),
        router_input_width: read::<i64>(keys, "dim_downproj_x")?.max(0) as usize,
        activation: read(keys, "gate_act_fn")?,
        ancestor_keys: optional(keys, "ancestor_keys")?.unwrap_or(true),
    };
    let config = SmoreConfig {
        targets: targets(keys)?,
        layers,
        gate,
        activation,
        activation_position: read(keys, "activation_position")?,
        shared_pool: read(keys, "is_shared_expert_pool")?,
        structure: optional(keys, "structure")?.unwrap_or_default(),
        init: read(keys, "init_method")?,
    };
    Ok((config, widths))
}
