//! The adapter: LLaMA-Factory's `lora_` keys and the authors' `moe_` keys.

use super::{Made, Section, Source};
use serde_json::{Value, json};

pub(super) fn convert(source: &mut Source) -> Made<Value> {
    let kind = source.text("finetuning_type").unwrap_or_else(|| "lora".into());
    if let Some(path) = source.text("adapter_name_or_path") {
        for key in source.left.keys().cloned().collect::<Vec<_>>() {
            if key.starts_with("lora_") && key != "lora_dropout" || key.starts_with("moe_") {
                let value = source.take(&key).unwrap_or_default();
                source.note(&key, value, "the adapter that is trained on says so itself");
            }
        }
        return Ok(json!({"kind": "saved", "path": path}));
    }
    match kind.as_str() {
        "lora" => lora(source),
        "full" => Ok(json!({"kind": "full"})),
        "peft_moe" => smore(source),
        other => {
            Err(format!("finetuning_type is `{other}`; lora, full and peft_moe can be taken over"))
        }
    }
}

fn lora(source: &mut Source) -> Made<Value> {
    let rank = source.number("lora_rank")?.unwrap_or(json!(8));
    let mut section = json!({"kind": "lora", "rank": rank});
    if let Some(alpha) = source.number("lora_alpha")? {
        section["alpha"] = alpha;
    }
    if source.flag("use_rslora")? {
        section["rslora"] = json!(true);
    }
    section["targets"] = targets(source, "lora_target").unwrap_or(json!("all-linear"));
    Ok(section)
}

/// Names, or all linear maps.
fn targets(source: &mut Source, key: &str) -> Option<Value> {
    let names = source.list(key)?;
    let all = |name: &Value| *name == "all" || *name == "all-linear";
    Some(if names.iter().any(all) { json!("all-linear") } else { json!(names) })
}

/// Keys of the authors' fork with the same values here, and where they go.
const SAME: [(&str, &str); 4] = [
    ("moe_expert_act_fn", "activation"),
    ("moe_activation_position", "activation_position"),
    ("moe_init_method", "init"),
    ("moe_is_shared_expert_pool", "shared_pool"),
];
const SAME_GATE: [(&str, &str); 3] = [
    ("moe_gate_type", "kind"),
    ("moe_gate_arch", "architecture"),
    ("moe_gate_act_fn", "activation"),
];

fn smore(source: &mut Source) -> Made<Value> {
    match source.text("moe_arch").as_deref() {
        None | Some("smore") => {}
        Some(other) => {
            return Err(format!("moe_arch is `{other}`; only smore can be taken over"));
        }
    }
    let mut section = json!({"kind": "smore", "layers": layers(source)?});
    let mut gate = Section::new();
    for (key, ours) in SAME {
        if let Some(value) = source.take(key) {
            section[ours] = value;
        }
    }
    for (key, ours) in SAME_GATE {
        if let Some(value) = source.take(key) {
            gate.insert(ours.into(), value);
        }
    }
    if let Some(widths) = source.numbers("moe_gate_dims")? {
        if widths.iter().any(|w| *w != widths[0]) {
            let reason = "all routers have one width here; the first was taken";
            source.note("moe_gate_dims", json!(widths), reason);
        }
        if let Some(width) = widths.into_iter().next() {
            gate.insert("router_width".into(), width);
        }
    }
    for (key, ours) in [
        ("moe_dim_downproj_x", "router_input_width"),
        ("moe_balance_loss_weight", "balance_weight"),
    ] {
        if let Some(value) = source.number(key)? {
            gate.insert(ours.into(), value);
        }
    }
    section["gate"] = Value::Object(gate);
    if let Some(modules) = targets(source, "moe_target_modules") {
        section["targets"] = match source.list("moe_exclude_modules") {
            Some(exclude) => json!({"modules": modules, "exclude": exclude}),
            None => modules,
        };
    }
    // How the authors' code walks the tree; the result is the same.
    source.pass(&["moe_layer_forward_mode"]);
    Ok(section)
}

/// One record per layer, leaves first here and there.
fn layers(source: &mut Source) -> Made<Value> {
    let mut column = |key: &str| -> Made<Vec<Value>> {
        let list = source.numbers(key)?.filter(|list| !list.is_empty());
        list.ok_or_else(|| format!("{key} is missing; expected one number per layer"))
    };
    let experts = column("moe_num_experts")?;
    let active = column("moe_num_active")?;
    let ranks = column("moe_expert_dims")?;
    let depth = experts.len().max(active.len()).max(ranks.len());
    let alphas = source.numbers("moe_lora_alpha")?;
    let scalings = source.numbers("moe_lora_scaling")?;
    if alphas.is_some() && scalings.is_some() {
        return Err("moe_lora_alpha and moe_lora_scaling are both given; expected one".into());
    }
    let mut layers = Vec::new();
    for l in 0..depth {
        let of = |key: &str, list: &[Value]| match list {
            [one] => Ok(one.clone()),
            list => list.get(l).cloned().ok_or_else(|| {
                format!("{key} has {} numbers, but there are {depth} layers", list.len())
            }),
        };
        let rank = of("moe_expert_dims", &ranks)?;
        let mut layer = json!({
            "experts": of("moe_num_experts", &experts)?,
            "fanout": of("moe_num_active", &active)?,
        });
        if let Some(list) = &alphas {
            layer["lora_alpha"] = of("moe_lora_alpha", list)?;
        }
        if let Some(list) = &scalings {
            let scaling = of("moe_lora_scaling", list)?.as_f64().unwrap_or(1.0);
            layer["lora_alpha"] = json!(scaling * rank.as_f64().unwrap_or(1.0));
        }
        layer["rank"] = rank;
        layers.push(layer);
    }
    Ok(Value::Array(layers))
}
