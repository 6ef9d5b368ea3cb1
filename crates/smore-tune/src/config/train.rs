//! The `train:` section of a run's configuration.

use super::{AdapterConfig, check};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// The `train:` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(clippy::struct_excessive_bools, reason = "keys that a user switches on one by one")]
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
    /// Where `cosine_with_min_lr` ends; of no other schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_kwargs: Option<SchedulerKwargs>,
    /// Share of the steps in which the learning rate rises from zero: 0.1 where neither this nor
    /// `warmup_steps` is given, but for `constant`, which has no warm-up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Steps in which the learning rate rises from zero, instead of a share of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
    /// Gradients with a larger norm are scaled down to it; 0 never clips.
    pub max_grad_norm: f64,
    /// Steps between checkpoints; 0 saves at the end only.
    pub save_steps: usize,
    /// Keep this many checkpoints, the newest; null keeps all.
    pub save_total_limit: Option<usize>,
    /// Steps between evaluations; 0 evaluates at the end only.
    pub eval_steps: usize,
    /// Stop after this many evaluations in a row without a better held-out loss; null never stops.
    pub early_stopping_patience: Option<usize>,
    /// A held-out loss counts as better for `early_stopping_patience` if it is lower by more.
    pub early_stopping_threshold: f64,
    /// Export the values of the evaluation with the lowest held-out loss, not the last ones.
    pub load_best_model_at_end: bool,
    /// Held-out questions whose answers before and after training the report shows.
    pub report_samples: usize,
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
    /// Share e of the loss that asks for all tokens alike: (1 - e) (-ln p) + e mean(-ln p_j).
    /// Evaluation does without.
    pub label_smoothing_factor: f64,
    /// Share of the elements of adapters' inputs that is dropped in training. What routers see
    /// stays whole.
    pub lora_dropout: f64,
    /// Factor on the learning rate of routers; one for all, or one per S'MoRE layer, leaves first.
    /// What a router's layers share takes the largest.
    pub router_lr_multiplier: RouterLr,
    /// How the balance losses of a step's forward passes are taken together.
    pub balance_reduction: BalanceReduction,
    /// Lay several samples side by side, up to `data.cutoff_len` tokens, as one entry of a batch.
    /// Each attends to itself only and starts at position 0.
    pub packing: bool,
    /// Put samples of like length into one batch.
    pub group_by_length: bool,
    /// Round frozen weights to bf16 and keep them so: half the memory of f32. Weights stored as
    /// bf16 or f16 are kept as they are where this is false. Adapters are always f32; what a step keeps
    /// for its backward pass is rounded to bf16, and factors of its products to bf16 or f16 where the
    /// processor multiplies those faster.
    pub bf16: bool,
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
            lr_scheduler_kwargs: None,
            warmup_ratio: Some(DEFAULT_WARMUP),
            warmup_steps: None,
            max_grad_norm: 1.0,
            save_steps: 500,
            save_total_limit: None,
            eval_steps: 50,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            load_best_model_at_end: false,
            report_samples: 3,
            seed: 42,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            label_smoothing_factor: 0.0,
            lora_dropout: 0.0,
            router_lr_multiplier: RouterLr::All(1.0),
            balance_reduction: BalanceReduction::Mean,
            packing: false,
            group_by_length: false,
            bf16: false,
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
    /// Not at all, and no warm-up either.
    Constant,
    /// Not at all.
    ConstantWithWarmup,
    /// Half a cosine down to `min_lr` or `min_lr_rate` of `lr_scheduler_kwargs`.
    CosineWithMinLr,
}

/// Where `cosine_with_min_lr` ends: one of the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerKwargs {
    /// A learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// A share of `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_rate: Option<f64>,
}

/// How the balance losses of a step's forward passes are taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceReduction {
    /// Their mean: `balance_weight` means the same however a step is cut.
    #[default]
    Mean,
    /// Their sum, as in the authors' code: the weight grows with `gradient_accumulation_steps`.
    SumOverMicrobatches,
}

/// Factors on the learning rate of routers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RouterLr {
    /// One for all.
    All(f64),
    /// One per S'MoRE layer, leaves first.
    PerLayer(Vec<f64>),
}

impl RouterLr {
    /// True where routers learn as everything else.
    pub fn is_one(&self) -> bool {
        self.factors().iter().all(|&x| x == 1.0)
    }

    /// The factors that are written.
    pub fn factors(&self) -> &[f64] {
        match self {
            Self::All(x) => std::slice::from_ref(x),
            Self::PerLayer(list) => list,
        }
    }
}

impl<'de> Deserialize<'de> for RouterLr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = RouterLr;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or a list with one number per S'MoRE layer")
            }

            fn visit_f64<E: de::Error>(self, x: f64) -> Result<RouterLr, E> {
                Ok(RouterLr::All(x))
            }

            fn visit_u64<E: de::Error>(self, x: u64) -> Result<RouterLr, E> {
                Ok(RouterLr::All(x as f64))
            }

            fn visit_i64<E: de::Error>(self, x: i64) -> Result<RouterLr, E> {
                Ok(RouterLr::All(x as f64))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<RouterLr, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(RouterLr::PerLayer)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// Share of the steps that warm up where nothing is said.
const DEFAULT_WARMUP: f64 = 0.1;

impl TrainConfig {
    pub(super) fn validate(&self) -> std::result::Result<(), String> {
        type Fits = fn(f64) -> bool;
        let positive: Fits = |v| v > 0.0 && v.is_finite();
        let not_negative: Fits = |v| v >= 0.0 && v.is_finite();
        let below_one: Fits = |v| (0.0..1.0).contains(&v);
        let share: Fits = |v| (0.0..=1.0).contains(&v);
        let reals: [(&str, f64, Fits, &str); 11] = [
            ("learning_rate", self.learning_rate, positive, "a positive number"),
            ("num_train_epochs", self.num_train_epochs, positive, "a positive number"),
            ("warmup_ratio", self.warmup_ratio.unwrap_or(0.0), share, "a number from 0 to 1"),
            ("max_grad_norm", self.max_grad_norm, not_negative, "a number from 0 up"),
            ("weight_decay", self.weight_decay, not_negative, "a number from 0 up"),
            ("adam_beta1", self.adam_beta1, below_one, "a number from 0 to below 1"),
            ("adam_beta2", self.adam_beta2, below_one, "a number from 0 to below 1"),
            ("adam_epsilon", self.adam_epsilon, positive, "a positive number"),
            (
                "early_stopping_threshold",
                self.early_stopping_threshold,
                not_negative,
                "a number from 0 up",
            ),
            (
                "label_smoothing_factor",
                self.label_smoothing_factor,
                below_one,
                "a number from 0 to below 1",
            ),
            ("lora_dropout", self.lora_dropout, below_one, "a number from 0 to below 1"),
        ];
        for (key, value, fits, expected) in reals {
            check(fits(value), &format!("train.{key}"), value, expected)?;
        }
        let counts = [
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("save_total_limit", self.save_total_limit.unwrap_or(1)),
            ("early_stopping_patience", self.early_stopping_patience.unwrap_or(1)),
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
        ];
        for (key, value) in counts {
            check(value > 0, &format!("train.{key}"), value, "at least 1")?;
        }
        for &factor in self.router_lr_multiplier.factors() {
            let key = "train.router_lr_multiplier";
            check(not_negative(factor), key, factor, "a number from 0 up")?;
        }
        self.validate_schedule()?;
        self.validate_together()
    }

    /// Fills in the warm-up that is not given. Of a zero and a number the number counts.
    pub(super) fn settle(&mut self) {
        match (self.warmup_ratio, self.warmup_steps) {
            (None, None) => {
                let constant = self.lr_scheduler_type == LrScheduler::Constant;
                self.warmup_ratio = Some(if constant { 0.0 } else { DEFAULT_WARMUP });
            }
            (Some(_), Some(0)) => self.warmup_steps = None,
            (Some(0.0), Some(_)) => self.warmup_ratio = None,
            _ => {}
        }
    }

    /// Steps of the warm-up of a run of `total` steps.
    pub fn warmup(&self, total: usize) -> usize {
        match (self.lr_scheduler_type, self.warmup_steps) {
            (LrScheduler::Constant, _) => 0,
            (_, Some(steps)) => steps.min(total),
            (_, None) => (total as f64 * self.warmup_ratio.unwrap_or(0.0)).ceil() as usize,
        }
    }

    /// Share of `learning_rate` at which the schedule ends, where it does not fall to 0.
    pub(crate) fn floor(&self) -> f64 {
        match self.lr_scheduler_kwargs.unwrap_or_default() {
            SchedulerKwargs { min_lr: Some(rate), .. } => rate / self.learning_rate,
            SchedulerKwargs { min_lr_rate: Some(share), .. } => share,
            SchedulerKwargs { .. } => 0.0,
        }
    }

    fn validate_schedule(&self) -> std::result::Result<(), String> {
        if let (Some(ratio), Some(steps)) = (self.warmup_ratio, self.warmup_steps) {
            return Err(format!(
                "train.warmup_ratio is {ratio} and train.warmup_steps is {steps}; expected one of \
                 them"
            ));
        }
        let warms_up = self.warmup_ratio.unwrap_or(0.0) > 0.0 || self.warmup_steps > Some(0);
        if self.lr_scheduler_type == LrScheduler::Constant && warms_up {
            return Err("train.lr_scheduler_type `constant` has no warm-up; write \
                        `constant_with_warmup`, or leave out warmup_ratio and warmup_steps"
                .into());
        }
        let key = "train.lr_scheduler_kwargs";
        match (self.lr_scheduler_type, self.lr_scheduler_kwargs) {
            (LrScheduler::CosineWithMinLr, Some(SchedulerKwargs { min_lr, min_lr_rate })) => {
                if min_lr.is_some() == min_lr_rate.is_some() {
                    return Err(format!("{key} needs one of min_lr and min_lr_rate"));
                }
                let expected = "a rate from 0 to train.learning_rate";
                let floor = self.floor();
                let given = min_lr.or(min_lr_rate).unwrap_or_default();
                check((0.0..=1.0).contains(&floor), &format!("{key}'s minimum"), given, expected)
            }
            (LrScheduler::CosineWithMinLr, None) => Err(format!(
                "train.lr_scheduler_type `cosine_with_min_lr` needs {key}: {{min_lr: RATE}} or \
                 {{min_lr_rate: SHARE}}"
            )),
            (_, Some(_)) => Err(format!(
                "{key} is given, but only train.lr_scheduler_type `cosine_with_min_lr` has such"
            )),
            (_, None) => Ok(()),
        }
    }

    fn validate_together(&self) -> std::result::Result<(), String> {
        let selects = self.early_stopping_patience.is_some() || self.load_best_model_at_end;
        if selects && self.eval_steps == 0 {
            return Err("train.eval_steps is 0, but early_stopping_patience and \
                        load_best_model_at_end need evaluations; give the steps between them"
                .into());
        }
        if self.early_stopping_threshold > 0.0 && self.early_stopping_patience.is_none() {
            return Err("train.early_stopping_threshold is given without \
                        train.early_stopping_patience; expected both or neither"
                .into());
        }
        if self.packing && self.group_by_length {
            return Err(
                "train.packing and train.group_by_length are both true, but packed samples \
                        are all about as long as data.cutoff_len; expected one of them"
                    .into(),
            );
        }
        Ok(())
    }

    /// What this section asks of the adapter.
    pub(super) fn validate_for(&self, adapter: &AdapterConfig) -> std::result::Result<(), String> {
        if let AdapterConfig::Full(_) = adapter {
            if self.lora_dropout > 0.0 {
                return Err(
                    "train.lora_dropout is given, but adapter.kind full has no adapter".into()
                );
            }
            if self.bf16 {
                return Err(
                    "train.bf16 rounds frozen weights, but adapter.kind full trains all of \
                            them, in f32; remove it"
                        .into(),
                );
            }
        }
        let routed = !matches!(adapter, AdapterConfig::Full(_) | AdapterConfig::Lora(_));
        let multiplier = &self.router_lr_multiplier;
        if !routed && !multiplier.is_one() {
            let kind = adapter.kind();
            return Err(format!(
                "train.router_lr_multiplier is given, but adapter.kind {kind} has no routers"
            ));
        }
        if let RouterLr::PerLayer(list) = multiplier {
            let layers = match adapter {
                AdapterConfig::Smore(c) => c.layers.len(),
                // What a folder holds is known when it is read.
                AdapterConfig::Saved(_) => list.len(),
                _ => 1,
            };
            if list.len() != layers {
                return Err(format!(
                    "train.router_lr_multiplier has {} numbers, but the adapter has {layers} \
                     layers; give one per layer, or one number for all",
                    list.len()
                ));
            }
        }
        Ok(())
    }
}
