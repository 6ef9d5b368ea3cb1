//! `trainer_state.json`, with the keys of Hugging Face's trainer.

use crate::checkpoint::write;
use crate::config::TrainConfig;
use crate::error::Result;
use crate::selection::Selection;
use crate::sft::Metric;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Writes the file into `folder`: a checkpoint or a run folder.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write_trainer_state(
    folder: &Path,
    train: &TrainConfig,
    total_steps: usize,
    metrics: &[Metric],
    selection: &Selection,
) -> Result<()> {
    let best = selection.best.as_ref();
    let last = metrics.iter().rev().find_map(|metric| match metric {
        Metric::Step(step) => Some(step),
        Metric::Eval(_) | Metric::Routers(_) | Metric::Alarm(_) => None,
    });
    let tokens: usize = metrics
        .iter()
        .map(|metric| if let Metric::Step(step) = metric { step.tokens } else { 0 })
        .sum();
    let state = json!({
        "best_global_step": best.map(|best| best.step),
        "best_metric": best.map(|best| best.loss),
        "best_model_checkpoint": null,
        "epoch": last.map_or(0.0, |step| step.epoch),
        "eval_steps": train.eval_steps,
        "global_step": last.map_or(0, |step| step.step),
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": history(metrics),
        "logging_steps": 1,
        "max_steps": total_steps,
        "num_input_tokens_seen": tokens,
        "num_train_epochs": train.num_train_epochs.ceil() as usize,
        "save_steps": train.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": train.per_device_train_batch_size,
        "trial_name": null,
        "trial_params": null,
    });
    write(&folder.join("trainer_state.json"), format!("{state:#}\n").as_bytes())
}

fn history(metrics: &[Metric]) -> Vec<Value> {
    let mut epoch = 0.0;
    metrics
        .iter()
        .filter_map(|metric| {
            let pairs = match metric {
                Metric::Step(m) => {
                    epoch = m.epoch;
                    vec![
                        ("epoch", json!(m.epoch)),
                        ("grad_norm", json!(m.grad_norm)),
                        ("learning_rate", json!(m.learning_rate)),
                        ("loss", json!(m.loss)),
                        ("step", json!(m.step)),
                    ]
                }
                Metric::Eval(m) => vec![
                    ("epoch", json!(epoch)),
                    ("eval_loss", json!(m.eval_loss)),
                    ("step", json!(m.step)),
                ],
                // Not in the trainer's vocabulary.
                Metric::Routers(_) | Metric::Alarm(_) => return None,
            };
            let pairs = pairs.into_iter().map(|(key, value)| (key.to_owned(), value));
            Some(Value::Object(pairs.collect::<Map<_, _>>()))
        })
        .collect()
}
