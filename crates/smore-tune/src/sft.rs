//! Supervised fine-tuning: one straight-line recipe.
//!
//! [`Prepared::new`] finds everything that can be wrong with a run before a weight is read;
//! [`Prepared::run`] trains, evaluates and writes the run folder. What a person sees meanwhile is
//! an [`Observer`]'s business.

use crate::batching::{entries, group_by_length};
use crate::checkpoint::manifest::{Manifest, TrainedOn};
use crate::checkpoint::{LoadedAdapter, Settings, save_adapter, save_model};
use crate::config::{AdapterConfig, BalanceReduction, RunConfig, TrainConfig};
use crate::data::{Dataset, Sample};
use crate::doctor::{Examined, Finding, Subject, examine};
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::learning_rates::rates as rates_of;
use crate::memory;
use crate::model::folder::ModelFolder;
use crate::model::spec::DecoderSpec;
use crate::model::weights::{from_scratch, read_all};
use crate::model::{Batch, Model, Scales, StepOutput};
use crate::optimizer::Optimizer;
use crate::routing::usage;
use crate::run_folder::RunFolder;
use crate::run_report;
use crate::schedule::Schedule;
use crate::selection::Selection;
use rand::seq::SliceRandom;
use serde::Serialize;
use smore::adapter::{Noise, NoiseKey};
use smore::rng::{Purpose, stream};
use smore_engine::Cpu;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Samples over which the use of experts is counted for the manifest.
const USAGE_SAMPLES: usize = 256;

/// Tokens evaluated together.
const EVAL_TOKENS: usize = 2048;

/// A run whose every input has been read and checked, but for the weights.
pub struct Prepared {
    /// The configuration.
    pub config: RunConfig,
    /// The decoder's shape.
    pub spec: DecoderSpec,
    /// Absent where the weights are drawn anew.
    folder: Option<ModelFolder>,
    /// What is trained and held out.
    pub data: Dataset,
    /// The adapters and their starting values; none for `kind: full`.
    start: LoadedAdapter,
    /// What the adapter's folder will say about this run.
    manifest: Manifest,
    /// Longest sample in tokens: the config's cutoff or the model's positions.
    pub cutoff_len: usize,
    /// Optimizer steps.
    pub total_steps: usize,
    /// What was looked at before, and what is not as it could be.
    pub findings: Vec<Finding>,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Metric {
    /// After an optimizer step.
    Step(StepMetric),
    /// After an evaluation.
    Eval(EvalMetric),
}

/// An optimizer step.
#[derive(Clone, Debug, Serialize)]
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
    /// Seconds since training began.
    pub seconds: f64,
}

/// An evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct EvalMetric {
    /// Steps done.
    pub step: usize,
    /// Cross-entropy per held-out trained token, in nats.
    pub eval_loss: f64,
    /// Held-out trained tokens.
    pub eval_tokens: usize,
    /// Seconds since training began.
    pub seconds: f64,
}

/// Watches a run.
pub trait Observer {
    /// Called for every line of `metrics.jsonl`; `tokens` have been read since training began.
    fn metric(&mut self, metric: &Metric, total_steps: usize, tokens: usize);
    /// Called when something was written.
    fn saved(&mut self, path: &Path);
}

/// Sees nothing.
pub struct Silent;

impl Observer for Silent {
    fn metric(&mut self, _: &Metric, _: usize, _: usize) {}
    fn saved(&mut self, _: &Path) {}
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
    /// Every line of `metrics.jsonl`.
    #[serde(skip)]
    pub metrics: Vec<Metric>,
}

impl Prepared {
    /// Reads and checks all inputs of a run; `name` stands for the config in messages.
    ///
    /// # Errors
    /// Anything that would make the run fail later and can be known now.
    pub fn new(config: RunConfig, name: &str) -> Result<Self> {
        let mut examined = examine(&Subject { name: name.to_owned(), ..Subject::from(&config) });
        examined.accept()?;
        let Examined {
            spec: Some(spec),
            start: Some(start),
            data: Some(data),
            folder,
            findings,
            ..
        } = examined
        else {
            unreachable!("nothing is missing where nothing is wrong");
        };
        let cutoff_len = config.data.cutoff_len.min(spec.max_positions);
        let entries = entries(&config.train, &lengths(&data.train), cutoff_len);
        let total_steps = total_steps(&config.train, entries.len());
        let manifest = manifest(&config, &data)?;
        Ok(Self { config, spec, folder, data, start, manifest, cutoff_len, total_steps, findings })
    }

    /// Number of trained parameters.
    pub fn trainable_parameters(&self) -> usize {
        match self.config.adapter {
            AdapterConfig::Full(_) => {
                self.spec.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum()
            }
            _ => self.start.adapters.len(),
        }
    }

    /// Trains and writes the run folder.
    ///
    /// # Errors
    /// A loss that is not a number, or a failed write.
    pub fn run(self, observer: &mut dyn Observer) -> Result<(Outcome, Model<Cpu<f32>>)> {
        let Self {
            config, spec, folder, data, start, mut manifest, cutoff_len, total_steps, ..
        } = self;
        let LoadedAdapter { settings, adapters, values } = start;
        let train = &config.train;
        let mut out = RunFolder::create(&config)?;
        let base = (spec, folder);
        let mut model = build_model(&config, base, adapters, &values, cutoff_len)?;
        let schedule = Schedule::new(train, total_steps);
        let rates = rates_of(&model.adapters, &train.router_lr_multiplier, model.trained());
        let mut optimizer = Optimizer::with_rates(&model, rates.map_err(Error::Run)?);
        let lengths = lengths(&data.train);
        let mut windows = Windows::new(train, &lengths, cutoff_len);
        let mut selection = Selection::new(train);
        let start = Instant::now();
        let mut tokens = 0;
        let mut log = |metric: Metric, tokens: usize, out: &mut RunFolder| -> Result<()> {
            out.metric(&metric)?;
            observer.metric(&metric, total_steps, tokens);
            Ok(())
        };
        let evaluate = |model: &Model<Cpu<f32>>, step: usize| {
            evaluate(model, &data.validation).map(|(eval_loss, eval_tokens)| {
                let seconds = start.elapsed().as_secs_f64();
                EvalMetric { step, eval_loss, eval_tokens, seconds }
            })
        };
        let before = evaluate(&model, 0);
        if let Some(eval) = before.clone() {
            log(Metric::Eval(eval), 0, &mut out)?;
        }
        let mut after = before.clone();
        let mut steps = total_steps;
        for step in 1..=total_steps {
            let window = windows.next_window();
            let result = accumulate(&model, &data.train, &window, train, &mut optimizer)?;
            let rate = schedule.rate(step - 1);
            let grad_norm = optimizer.step(&mut model, train, rate, step)?;
            tokens += result.tokens;
            let metric = StepMetric {
                step,
                epoch: windows.epochs_done(),
                loss: result.loss,
                balance_loss: result.balance_loss,
                grad_norm,
                learning_rate: rate,
                trained_tokens: result.trained_tokens,
                tokens: result.tokens,
                seconds: start.elapsed().as_secs_f64(),
            };
            log(Metric::Step(metric), tokens, &mut out)?;
            let last = step == total_steps;
            if (last || due(step, train.eval_steps))
                && let Some(eval) = evaluate(&model, step)
            {
                let stop = selection.see(step, eval.eval_loss, &model.params);
                after = Some(eval.clone());
                log(Metric::Eval(eval), tokens, &mut out)?;
                if stop {
                    steps = step;
                    break;
                }
            }
            if !last && due(step, train.save_steps) {
                let path = config.output_dir.join(format!("checkpoint-{step}"));
                save(&path, &config, &settings, &manifest, &model)?;
            }
        }
        if let Some(best) = selection.exported() {
            model.params.clone_from(&best.values);
        }
        let name = if model.weights.is_trained() { "model" } else { "adapter" };
        let trained = config.output_dir.join(name);
        let unseen = if data.validation.is_empty() { &data.train } else { &data.validation };
        manifest.routing = usage(&model, &unseen.iter().take(USAGE_SAMPLES).collect::<Vec<_>>());
        manifest.steps = Some(steps);
        manifest.best_step = selection.exported().map(|best| best.step);
        save(&trained, &config, &settings, &manifest, &model)?;
        observer.saved(&trained);
        let outcome = Outcome {
            output_dir: config.output_dir.clone(),
            trained,
            trainable_parameters: model.trained(),
            eval_loss_before: before.map(|e| e.eval_loss),
            eval_loss_after: match selection.exported() {
                Some(best) => Some(best.loss),
                None => after.map(|e| e.eval_loss),
            },
            steps,
            stopped_early: steps < total_steps,
            best_step: selection.best.as_ref().map(|best| best.step),
            best_eval_loss: selection.best.as_ref().map(|best| best.loss),
            exported_step: selection.exported().map_or(steps, |best| best.step),
            tokens,
            seconds: start.elapsed().as_secs_f64(),
            peak_memory_bytes: memory::peak(),
            metrics: out.into_metrics(),
        };
        run_report::report(&outcome).write(&outcome.output_dir.join("report.html"))?;
        Ok((outcome, model))
    }
}

/// The model to train: the base's weights, the adapters on them, what the recipe says of a step.
fn build_model(
    config: &RunConfig,
    (spec, folder): (DecoderSpec, Option<ModelFolder>),
    adapters: Adapters,
    values: &[f32],
    cutoff_len: usize,
) -> Result<Model<Cpu<f32>>> {
    let (device, train) = (Cpu::new(), &config.train);
    let folder = if train.bf16 { folder.map(ModelFolder::in_bf16) } else { folder };
    let mut model = if matches!(config.adapter, AdapterConfig::Full(_)) {
        let values = match &folder {
            Some(folder) => read_all(folder),
            None => from_scratch(&spec, train.seed),
        };
        Model::full(device, spec, &values, cutoff_len)
    } else {
        let Some(folder) = &folder else {
            return Err(Error::Run("an adapter needs a base with weights".into()));
        };
        Model::new(device, folder, adapters, values, cutoff_len)
    };
    model.gradient_checkpointing = train.gradient_checkpointing;
    model.dropout = train.lora_dropout;
    model.label_smoothing = train.label_smoothing_factor;
    Ok(model)
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn lengths(samples: &[Sample]) -> Vec<usize> {
    samples.iter().map(|sample| sample.ids.len()).collect()
}

/// Optimizer steps of a run over `entries` samples or packs of them.
pub(crate) fn total_steps(train: &TrainConfig, entries: usize) -> usize {
    let window = train.per_device_train_batch_size * train.gradient_accumulation_steps;
    let per_epoch = entries.div_ceil(window);
    let by_epochs = (train.num_train_epochs * per_epoch as f64).ceil() as usize;
    train.max_steps.unwrap_or(by_epochs).max(1)
}

/// Deals out the samples of each optimizer step: every epoch in a new order.
struct Windows {
    seed: u64,
    batch: usize,
    per_step: usize,
    /// Samples, or packs of them, and how many tokens they have.
    entries: Vec<Vec<usize>>,
    lengths: Vec<usize>,
    group_by_length: bool,
    epoch: u64,
    order: Vec<usize>,
    next: usize,
    /// Micro-batches dealt in the run.
    micro_batches: u64,
}

/// The micro-batches of one optimizer step.
struct Window {
    first_micro_batch: u64,
    micro_batches: Vec<Vec<usize>>,
}

impl Windows {
    fn new(train: &TrainConfig, lengths: &[usize], cutoff_len: usize) -> Self {
        let entries = entries(train, lengths, cutoff_len);
        let tokens = |entry: &Vec<usize>| entry.iter().map(|&i| lengths[i]).sum();
        let mut windows = Self {
            seed: train.seed,
            batch: train.per_device_train_batch_size,
            per_step: train.gradient_accumulation_steps,
            lengths: entries.iter().map(tokens).collect(),
            entries,
            group_by_length: train.group_by_length,
            epoch: 0,
            order: Vec::new(),
            next: 0,
            micro_batches: 0,
        };
        windows.shuffle();
        windows
    }

    fn shuffle(&mut self) {
        self.order = (0..self.entries.len()).collect();
        let mut rng = stream(self.seed, Purpose::Order, self.epoch, 0);
        self.order.shuffle(&mut rng);
        if self.group_by_length {
            group_by_length(&mut self.order, &self.lengths, self.batch, &mut rng);
        }
        self.next = 0;
    }

    /// The last window of an epoch may be smaller.
    fn next_window(&mut self) -> Window {
        if self.next == self.entries.len() {
            self.epoch += 1;
            self.shuffle();
        }
        let end = self.entries.len().min(self.next + self.batch * self.per_step);
        let micro_batches: Vec<Vec<usize>> = self.order[self.next..end]
            .chunks(self.batch)
            .map(|batch| batch.iter().flat_map(|&i| self.entries[i].clone()).collect())
            .collect();
        let first_micro_batch = self.micro_batches;
        self.next = end;
        self.micro_batches += micro_batches.len() as u64;
        Window { first_micro_batch, micro_batches }
    }

    fn epochs_done(&self) -> f64 {
        self.epoch as f64 + self.next as f64 / self.entries.len() as f64
    }
}

/// What a window came to.
struct WindowResult {
    loss: f64,
    balance_loss: f64,
    tokens: usize,
    trained_tokens: usize,
}

/// Adds up the gradients of a window. Cross-entropy is divided by the trained tokens of the whole
/// window, so that it does not matter how the window is cut into micro-batches.
fn accumulate(
    model: &Model<Cpu<f32>>,
    samples: &[Sample],
    window: &Window,
    train: &TrainConfig,
    optimizer: &mut Optimizer,
) -> Result<WindowResult> {
    let batches: Vec<Batch> = window
        .micro_batches
        .iter()
        .map(|indices| {
            let mut batch = Batch::default();
            for &i in indices {
                batch.push(&samples[i].ids, &samples[i].trained);
            }
            batch
        })
        .collect();
    let trained_tokens: usize = batches.iter().map(|b| b.targets.len()).sum();
    let balance = match train.balance_reduction {
        BalanceReduction::Mean => 1.0 / batches.len() as f64,
        BalanceReduction::SumOverMicrobatches => 1.0,
    };
    let scales = Scales { loss: 1.0 / trained_tokens as f64, balance };
    let (mut loss, mut balance_loss) = (0.0, 0.0);
    for (i, batch) in batches.iter().enumerate() {
        let step = window.first_micro_batch + i as u64;
        let key = NoiseKey { seed: train.seed, step, place: 0 };
        let StepOutput { losses, balance_loss: balance, .. } =
            model.step(batch, scales, Some(Noise::Drawn(key)), &mut optimizer.grads);
        loss += losses.iter().sum::<f64>() * scales.loss;
        balance_loss += balance * scales.balance;
    }
    if !(loss + balance_loss).is_finite() {
        let origins: Vec<String> = window
            .micro_batches
            .iter()
            .flatten()
            .map(|&i| {
                let origin = &samples[i].origin;
                format!("{}:{}", origin.file.display(), origin.line)
            })
            .collect();
        return Err(Error::Run(format!(
            "the loss is {loss} (balance {balance_loss}) on the samples {}; lower \
             train.learning_rate or look at these samples",
            origins.join(", ")
        )));
    }
    let tokens = batches.iter().map(|b| b.ids.len()).sum();
    Ok(WindowResult { loss, balance_loss, tokens, trained_tokens })
}

/// Mean cross-entropy per trained token of held-out samples, and the number of these tokens.
/// `None` without samples.
pub fn evaluate(model: &Model<Cpu<f32>>, samples: &[Sample]) -> Option<(f64, usize)> {
    let (mut sum, mut count) = (0.0, 0);
    let mut batch = Batch::default();
    for (i, sample) in samples.iter().enumerate() {
        batch.push(&sample.ids, &sample.trained);
        if batch.ids.len() >= EVAL_TOKENS || i + 1 == samples.len() {
            let losses = model.losses(&batch);
            sum += losses.iter().sum::<f64>();
            count += losses.len();
            batch = Batch::default();
        }
    }
    (count > 0).then(|| (sum / count as f64, count))
}

fn save(
    path: &Path,
    config: &RunConfig,
    settings: &Settings,
    manifest: &Manifest,
    model: &Model<Cpu<f32>>,
) -> Result<()> {
    if model.weights.is_trained() {
        save_model(path, &model.spec, &config.model, &model.params)
    } else {
        save_adapter(path, settings, &model.adapters, &model.params, manifest)
    }
}

/// What is known about a run before it begins.
fn manifest(config: &RunConfig, data: &Dataset) -> Result<Manifest> {
    let mut manifest = Manifest::new(&config.model)?;
    manifest.seed = Some(config.train.seed);
    manifest.data = Some(TrainedOn::of(&config.data, &data.report)?);
    if let AdapterConfig::Saved(saved) = &config.adapter {
        manifest.from = Some(saved.path.display().to_string());
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_comes_once_an_epoch_in_a_new_order() {
        let train = TrainConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            ..TrainConfig::default()
        };
        let mut windows = Windows::new(&train, &[3; 7], 10);
        let mut epoch = || -> Vec<usize> {
            (0..2).flat_map(|_| windows.next_window().micro_batches).flatten().collect()
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..7).collect::<Vec<_>>());
        }
    }

    /// The same of packs and of batches of like length, whose tokens stay within the cutoff.
    #[test]
    fn packs_and_groups_come_once_an_epoch_too() {
        let lengths: Vec<usize> = (0..50).map(|i| 1 + (i * 37) % 30).collect();
        for (packing, group_by_length) in [(true, false), (false, true)] {
            let train = TrainConfig {
                per_device_train_batch_size: 3,
                gradient_accumulation_steps: 2,
                packing,
                group_by_length,
                ..TrainConfig::default()
            };
            let mut windows = Windows::new(&train, &lengths, 64);
            let count = entries(&train, &lengths, 64).len();
            let mut orders = Vec::new();
            for _ in 0..2 {
                let epoch: Vec<Window> =
                    (0..count.div_ceil(6)).map(|_| windows.next_window()).collect();
                let batches: Vec<_> = epoch.into_iter().flat_map(|w| w.micro_batches).collect();
                for batch in &batches {
                    let tokens: usize = batch.iter().map(|&i| lengths[i]).sum();
                    assert!(!packing || tokens <= 3 * 64);
                }
                orders.push(batches.concat());
            }
            assert_eq!(windows.epochs_done(), 2.0);
            assert_ne!(orders[0], orders[1]);
            for order in &mut orders {
                order.sort_unstable();
                assert_eq!(*order, (0..50).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn steps_follow_epochs_unless_given() {
        let mut train = TrainConfig { num_train_epochs: 1.5, ..TrainConfig::default() };
        assert_eq!(total_steps(&train, 17), 5);
        train.max_steps = Some(3);
        assert_eq!(total_steps(&train, 17), 3);
    }
}
