//! What a run says of itself: the lines of `metrics.jsonl`, who watches, and the outcome.

use super::exchanges::Exchange;
use super::watch::Flag;
use crate::inject::Adapters;
use crate::memory::Split;
use crate::routing::LayerUsage;
use crate::routing::health::Alarm;
use serde::{Deserialize, Serialize};
use smore::layout::Param;
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Metric {
    /// After an optimizer step.
    Step(StepMetric),
    /// After an evaluation.
    Eval(EvalMetric),
    /// After a window of steps.
    Routers(RoutersMetric),
    /// When something is wrong with a router.
    Alarm(Alarm),
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
    /// Memory resident after the step, in bytes; 0 where the system does not say.
    #[serde(default)]
    pub resident_memory_bytes: u64,
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
            Self::Routers(m) => m.step,
            Self::Alarm(m) => m.step,
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

/// The routers over a window of steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RoutersMetric {
    /// Last step of the window.
    pub step: usize,
    /// The largest imbalance of a layer, see [`LayerUsage::imbalance`] ..
    pub imbalance: f64,
    /// .. its place ..
    pub place: String,
    /// .. and its layer.
    pub layer: usize,
    /// Mean evenness of all layers, see [`LayerUsage::evenness`].
    pub evenness: f64,
    /// Experts of all layers that get less than a tenth of an equal share.
    pub idle_experts: usize,
    /// What parents tell of their children in nats, above its bias: mean of all layers below the
    /// top; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_information: Option<f64>,
}

impl RoutersMetric {
    /// Of the usage of every layer.
    pub(super) fn of(step: usize, usage: &[LayerUsage]) -> Self {
        let worst = usage.iter().max_by(|a, b| a.imbalance().total_cmp(&b.imbalance()));
        let above: Vec<f64> =
            usage.iter().filter_map(|u| u.parent.map(|p| p.information - p.bias)).collect();
        let mean = |sum: f64, n: usize| sum / n.max(1) as f64;
        Self {
            step,
            imbalance: worst.map_or(0.0, LayerUsage::imbalance),
            place: worst.map_or_else(String::new, |u| u.path.clone()),
            layer: worst.map_or(0, |u| u.layer),
            evenness: mean(usage.iter().map(LayerUsage::evenness).sum(), usage.len()),
            idle_experts: usage.iter().map(LayerUsage::idle).sum(),
            parent_information: (!above.is_empty()).then(|| mean(above.iter().sum(), above.len())),
        }
    }
}

/// The adapters on one kind of module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModuleParameters {
    /// Its name in a block, such as `mlp.gate_proj`.
    pub module: String,
    /// Blocks in which it is adapted.
    pub places: usize,
    /// Trained parameters of all of them.
    pub parameters: usize,
    /// Those of them that are the routers'.
    pub router: usize,
}

impl ModuleParameters {
    /// Of every adapted kind of module, in the order of a block.
    pub(super) fn of(adapters: &Adapters) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for slot in &adapters.slots {
            let path = slot.path();
            let module = path.splitn(4, '.').nth(3).unwrap_or(&path).to_owned();
            if !all.iter().any(|m| m.module == module) {
                let module = module.clone();
                all.push(Self { module, places: 0, parameters: 0, router: 0 });
            }
            let Some(own) = all.iter_mut().find(|m| m.module == module) else { continue };
            own.places += 1;
            own.parameters += slot.range.len();
            let routers = slot.params().iter().filter(|p| p.router().is_some());
            own.router += routers.map(Param::len).sum::<usize>();
        }
        all
    }
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
    /// What it was expected to hold.
    pub planned_memory: Split,
    /// The trained parameters, by kind of module.
    pub modules: Vec<ModuleParameters>,
    /// Parameters of the base.
    pub base_parameters: usize,
    /// What was not as it could be before the run.
    pub warnings: Vec<String>,
    /// Answers to held-out questions before and after.
    pub exchanges: Vec<Exchange>,
    /// How the routers used their experts on held-out samples; empty without routers.
    pub routing: Vec<LayerUsage>,
    /// Every alarm about a router, also those that are over.
    pub alarms: Vec<Alarm>,
    /// Every line of `metrics.jsonl`.
    #[serde(skip)]
    pub metrics: Vec<Metric>,
}

impl Outcome {
    /// The alarms that are not over, each as it was last raised.
    pub fn standing_alarms(&self) -> Vec<&Alarm> {
        let mut standing: Vec<&Alarm> = Vec::new();
        for alarm in &self.alarms {
            let about = |a: &Alarm| (a.alarm, a.place.clone(), a.layer);
            standing.retain(|other| about(other) != about(alarm));
            standing.extend((!alarm.over).then_some(alarm));
        }
        standing
    }
}
