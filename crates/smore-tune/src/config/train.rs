//! The `train:` section of a run's configuration.

use super::check;
use serde::{Deserialize, Serialize};

/// The `train:` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Highest learning rate of the schedule.
    pub learning_rate: f64,
    /// Passes over the training samples; may be a fraction.
    pub num_train_epochs: f64,
    /// Optimizer steps; wins over `num_train_epochs`.
    pub max_steps: Option<usize>,
    /// Samples in one forward pass.
    pub per_device_train_batch_size: usize,
    /// Forward passes per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// How the learning rate falls after the warm-up.
    pub lr_scheduler_type: LrScheduler,
    /// Share of the steps in which the learning rate rises from zero.
    pub warmup_ratio: f64,
    /// Gradients with a larger norm are scaled down to it; 0 never clips.
    pub max_grad_norm: f64,
    /// Steps between checkpoints; 0 saves at the end only.
    pub save_steps: usize,
    /// Steps between evaluations; 0 evaluates at the end only.
    pub eval_steps: usize,
    /// Seed of every random draw of the run.
    pub seed: u64,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment.
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    pub adam_epsilon: f64,
    /// Keep only each block's input and compute the block again in the backward sweep: less memory
    /// for about a third more time. Results are the same to the bit.
    pub gradient_checkpointing: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            num_train_epochs: 2.0,
            max_steps: None,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 8,
            lr_scheduler_type: LrScheduler::Cosine,
            warmup_ratio: 0.1,
            max_grad_norm: 1.0,
            save_steps: 500,
            eval_steps: 50,
            seed: 42,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            gradient_checkpointing: false,
        }
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Half a cosine down to zero.
    #[default]
    Cosine,
    /// A straight line down to zero.
    Linear,
    /// Not at all.
    Constant,
}

impl TrainConfig {
    pub(super) fn validate(&self) -> std::result::Result<(), String> {
        type Fits = fn(f64) -> bool;
        let positive: Fits = |v| v > 0.0 && v.is_finite();
        let not_negative: Fits = |v| v >= 0.0 && v.is_finite();
        let below_one: Fits = |v| (0.0..1.0).contains(&v);
        let share: Fits = |v| (0.0..=1.0).contains(&v);
        let reals: [(&str, f64, Fits, &str); 8] = [
            ("learning_rate", self.learning_rate, positive, "a positive number"),
            ("num_train_epochs", self.num_train_epochs, positive, "a positive number"),
            ("warmup_ratio", self.warmup_ratio, share, "a number from 0 to 1"),
            ("max_grad_norm", self.max_grad_norm, not_negative, "a number from 0 up"),
            ("weight_decay", self.weight_decay, not_negative, "a number from 0 up"),
            ("adam_beta1", self.adam_beta1, below_one, "a number from 0 to below 1"),
            ("adam_beta2", self.adam_beta2, below_one, "a number from 0 to below 1"),
            ("adam_epsilon", self.adam_epsilon, positive, "a positive number"),
        ];
        for (key, value, fits, expected) in reals {
            check(fits(value), &format!("train.{key}"), value, expected)?;
        }
        let counts = [
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
        ];
        for (key, value) in counts {
            check(value > 0, &format!("train.{key}"), value, "at least 1")?;
        }
        Ok(())
    }
}
