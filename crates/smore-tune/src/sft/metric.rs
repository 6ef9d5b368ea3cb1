//! What a run says of itself: the lines of `metrics.jsonl`, who watches, and the outcome.

use super::watch::Flag;
use crate::memory::Split;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Metric {
    /// After an optimizer step.
    Step(StepMetric),
    /// After an evaluation.
    Eval(EvalMetric),
}

/// An optimizer step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepMetric {
    /// Steps done, from 1.
    pub step: usize,
    /// Passes over the data done.
    pub epoch: f64,
    /// Cross-entropy per trained token, in nats.
    pub loss: f64,
    /// Sum of the balance losses, as it entered the gradient.
    pub balance_loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Trained tokens of this step.
    pub trained_tokens: usize,
    /// All tokens of this step.
    pub tokens: usize,
    /// Seconds of training so far.
    pub seconds: f64,
    /// What is out of the ordinary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<Flag>,
}

impl Metric {
    /// Steps done when it was taken.
    pub fn step(&self) -> usize {
        match self {
            Self::Step(m) => m.step,
            Self::Eval(m) => m.step,
        }
    }
}

/// An evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalMetric {
    /// Steps done.
    pub step: usize,
    /// Cross-entropy per held-out trained token, in nats.
    pub eval_loss: f64,
    /// Held-out trained tokens.
    pub eval_tokens: usize,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// Watches a run.
pub trait Observer {
    /// Called for every line of `metrics.jsonl`; `tokens` have been read since training began.
    fn metric(&mut self, metric: &Metric, total_steps: usize, tokens: usize);
    /// Called when something was written.
    fn saved(&mut self, path: &Path);
    /// Called with what a person should know: a checkpoint that is damaged, an earlier run that was
    /// moved.
    fn note(&mut self, text: &str);
    /// Asked after every step; where true the run writes a checkpoint and ends.
    fn interrupted(&mut self) -> bool {
        false
    }
}

/// Sees nothing.
pub struct Silent;

impl Observer for Silent {
    fn metric(&mut self, _: &Metric, _: usize, _: usize) {}
    fn saved(&mut self, _: &Path) {}
    fn note(&mut self, _: &str) {}
}

/// What a finished run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The run folder.
    pub output_dir: PathBuf,
    /// The trained adapter, or the trained model for `kind: full`.
    pub trained: PathBuf,
    /// Trained parameters.
    pub trainable_parameters: usize,
    /// Held-out loss before training; absent without held-out data.
    pub eval_loss_before: Option<f64>,
    /// Held-out loss of what was exported.
    pub eval_loss_after: Option<f64>,
    /// Optimizer steps.
    pub steps: usize,
    /// Whether `early_stopping_patience` ended the run.
    pub stopped_early: bool,
    /// Step of the evaluation with the lowest held-out loss.
    pub best_step: Option<usize>,
    /// That loss.
    pub best_eval_loss: Option<f64>,
    /// Step whose values were exported: the best one's with `load_best_model_at_end`, else the
    /// last.
    pub exported_step: usize,
    /// Tokens read in training.
    pub tokens: usize,
    /// Seconds of training, evaluations included.
    pub seconds: f64,
    /// Most memory ever resident, in bytes.
    pub peak_memory_bytes: u64,
    /// What that memory holds.
    pub memory: Split,
    /// Every line of `metrics.jsonl`.
    #[serde(skip)]
    pub metrics: Vec<Metric>,
}
