//! The recipe: keys of Hugging Face's trainer, most of which have the same name here.

use super::{Made, Section, Source, number};
use crate::config::{LrScheduler, TrainConfig};
use serde_json::{Value, json};

/// What that trainer does where nothing is said, and we do otherwise.
const DEFAULTS: [(&str, f64); 5] = [
    ("learning_rate", 5e-5),
    ("num_train_epochs", 3.0),
    ("per_device_train_batch_size", 8.0),
    ("gradient_accumulation_steps", 1.0),
    ("save_steps", 500.0),
];

pub(super) fn convert(source: &mut Source, kind: &str) -> Made<Value> {
    let mut train = Section::new();
    for (key, default) in DEFAULTS {
        let default = if default.fract() == 0.0 { json!(default as i64) } else { json!(default) };
        train.insert(key.into(), source.number(key)?.unwrap_or(default));
    }
    schedule(source, &mut train)?;
    length(source, &mut train)?;
    evaluation(source, &mut train)?;
    if kind == "full" {
        for key in ["bf16", "pure_bf16", "lora_dropout"] {
            if let Some(value) = source.take(key).filter(|value| *value != false) {
                source.note(key, value, "the base itself is trained, in f32 and without adapters");
            }
        }
    }
    if kind == "smore" {
        train.insert("balance_reduction".into(), json!("sum_over_microbatches"));
        if let Some(rate) = source.number("moe_dropout")? {
            train.insert("lora_dropout".into(), rate);
        }
    }
    if let Some(patience) = source.number("early_stopping_steps")? {
        train.insert("early_stopping_patience".into(), patience);
    }
    let (packing, neat) = (source.flag("packing")?, source.flag("neat_packing")?);
    if packing || neat {
        train.insert("packing".into(), json!(true));
    }
    same_name(source, &mut train)?;
    Ok(Value::Object(train))
}

/// Keys that are the same here, with what kind of value they have.
fn same_name(source: &mut Source, train: &mut Section) -> Made<()> {
    let ours = serde_json::to_value(TrainConfig::default()).unwrap_or_default();
    for (key, default) in ours.as_object().into_iter().flatten() {
        if train.contains_key(key) {
            continue;
        }
        if let Some(value) = source.take(key) {
            let value = if default.is_number() { number(key, &value)? } else { value };
            train.insert(key.clone(), value);
        }
    }
    Ok(())
}

fn schedule(source: &mut Source, train: &mut Section) -> Made<()> {
    let mut kind = source.take("lr_scheduler_type").unwrap_or(json!("linear"));
    if serde_json::from_value::<LrScheduler>(kind.clone()).is_err() {
        source.note("lr_scheduler_type", kind, "not offered; linear was taken");
        kind = json!("linear");
    }
    let ratio = source.number("warmup_ratio")?;
    let steps = source.number("warmup_steps")?.filter(|steps| *steps != 0);
    if kind == "constant" {
        for (key, value) in [("warmup_ratio", ratio), ("warmup_steps", steps)] {
            if let Some(value) = value.filter(|value| value.as_f64() != Some(0.0)) {
                source.note(key, value, "the schedule `constant` has no warm-up, there neither");
            }
        }
    } else if let Some(steps) = steps {
        if let Some(ratio) = ratio.filter(|ratio| ratio.as_f64() != Some(0.0)) {
            source.note("warmup_ratio", ratio, "warmup_steps wins over it, there too");
        }
        train.insert("warmup_steps".into(), steps);
    } else {
        train.insert("warmup_ratio".into(), ratio.unwrap_or(json!(0.0)));
    }
    let kwargs = source.take("lr_scheduler_kwargs");
    match kwargs {
        Some(kwargs) if kind == "cosine_with_min_lr" => {
            train.insert("lr_scheduler_kwargs".into(), kwargs);
        }
        Some(kwargs) => source.note("lr_scheduler_kwargs", kwargs, "this schedule has none here"),
        None => {}
    }
    train.insert("lr_scheduler_type".into(), kind);
    Ok(())
}

fn length(source: &mut Source, train: &mut Section) -> Made<()> {
    // That trainer writes -1 for "by epochs".
    let steps = source.number("max_steps")?.filter(|steps| steps.as_f64() > Some(0.0));
    if let Some(steps) = steps {
        train.insert("max_steps".into(), steps);
    }
    if let Some(strategy) = source.text("save_strategy") {
        match strategy.as_str() {
            "steps" => {}
            "no" => {
                train.insert("save_steps".into(), json!(0));
            }
            other => {
                let reason = "checkpoints come every save_steps steps; give their number";
                source.note("save_strategy", json!(other), reason);
            }
        }
    }
    Ok(())
}

fn evaluation(source: &mut Source, train: &mut Section) -> Made<()> {
    let strategy = source.text("eval_strategy").or(source.text("evaluation_strategy"));
    let every = source.number("eval_steps")?;
    let logging = source.number("logging_steps")?;
    let steps = match strategy.as_deref() {
        Some("steps") => every.or(logging).unwrap_or(json!(500)),
        None | Some("no") => json!(0),
        Some(other) => {
            let reason = "evaluations come every eval_steps steps; give their number";
            source.note("eval_strategy", json!(other), reason);
            every.unwrap_or(json!(0))
        }
    };
    train.insert("eval_steps".into(), steps);
    if let Some(metric) = source.text("metric_for_best_model")
        && !["loss", "eval_loss"].contains(&metric.as_str())
    {
        let reason = "the best checkpoint is that of the lowest held-out loss";
        source.note("metric_for_best_model", json!(metric), reason);
    }
    source.pass(&["greater_is_better", "per_device_eval_batch_size", "plot_loss", "logging_dir"]);
    Ok(())
}
