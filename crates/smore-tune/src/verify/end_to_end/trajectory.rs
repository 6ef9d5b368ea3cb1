//! A recorded training run, step by step.

use super::batch::Tokens;
use super::fixture::GRADIENTS;
use super::{Recording, Rule, Scale, Source, keys, noise, scalar};
use crate::checkpoint::{LoadedAdapter, read_values};
use crate::config::{LrScheduler, TrainConfig};
use crate::error::{Error, Result};
use crate::model::spec::DecoderSpec;
use crate::model::{Model, Scales};
use crate::optimizer::Optimizer;
use crate::schedule::Schedule;
use crate::verify::case::{Tensor, Tensors, data_error, read};
use serde::Deserialize;
use smore::adapter::Noise;
use smore::kernel::GateNoise;
use smore_engine::Cpu;
use std::path::Path;

/// Losses of every step, absolute.
const LOSS: f64 = 1e-4;
/// Learning rates, each relative to itself.
const RATE: f64 = 1e-6;

/// A run's batches and how it follows its gradients.
pub(super) struct Trajectory {
    train: TrainConfig,
    schedule: Schedule,
    steps: usize,
    accumulated: usize,
    micro_batches: Vec<Tokens>,
    /// Of every micro-batch and adapter.
    noise: Option<Vec<Vec<GateNoise<f64>>>>,
    /// Longest sequence.
    pub(super) context: usize,
}

/// `traj.json`
#[derive(Deserialize)]
struct Settings {
    steps: Option<usize>,
    lr: f64,
    betas: Option<(f64, f64)>,
    eps: Option<f64>,
    weight_decay: Option<f64>,
    clip_grad_norm: Option<f64>,
    grad_accum: Option<usize>,
    cosine_warmup_steps: Option<usize>,
    float32: Option<Vec<StepFigures>>,
    float64: Option<Vec<StepFigures>>,
}

#[derive(Deserialize)]
struct StepFigures {
    loss: Option<f64>,
    balance_loss: Option<f64>,
    grad_norm: Option<f64>,
    lr: Option<f64>,
    boundary_gap: Option<f64>,
}

impl Settings {
    fn read(file: &Path) -> Result<Self> {
        let bytes = read(file, "a training run's settings")?;
        serde_json::from_slice(&bytes).map_err(|e| Error::Data {
            file: file.to_path_buf(),
            line: Some(e.line()),
            message: format!("no training run: {e}"),
        })
    }

    fn train(&self) -> TrainConfig {
        let unsaid = TrainConfig::default();
        let (adam_beta1, adam_beta2) = self.betas.unwrap_or((unsaid.adam_beta1, unsaid.adam_beta2));
        TrainConfig {
            learning_rate: self.lr,
            lr_scheduler_type: match self.cosine_warmup_steps {
                Some(_) => LrScheduler::Cosine,
                None => LrScheduler::Constant,
            },
            max_grad_norm: self.clip_grad_norm.unwrap_or(0.0),
            weight_decay: self.weight_decay.unwrap_or(0.0),
            adam_beta1,
            adam_beta2,
            adam_epsilon: self.eps.unwrap_or(unsaid.adam_epsilon),
            ..unsaid
        }
    }
}

impl Trajectory {
    /// Reads run and recording of a folder.
    pub(super) fn open(
        folder: &Path,
        spec: &DecoderSpec,
        loaded: &LoadedAdapter,
        recording: &mut Recording,
    ) -> Result<Self> {
        let file = folder.join("traj.json");
        let settings = Settings::read(&file)?;
        let figures = settings.float32.as_ref().or(settings.float64.as_ref());
        let Some(steps) = settings.steps.or(figures.map(Vec::len)).filter(|&n| n > 0) else {
            return Err(data_error(&file, "no `steps` and no list `float32` of steps".into()));
        };
        expect_figures(&file, figures.map_or(&[], Vec::as_slice), steps, recording)?;
        let accumulated = settings.grad_accum.unwrap_or(1).max(1);
        let mut source = Source::open(&folder.join("batches.safetensors"))?;
        let apart = folder.join("noise.safetensors");
        if apart.exists() {
            source.tensors.extend(Source::open(&apart)?.tensors);
        }
        let unknown = source.tensors.keys().filter(|name| !super::is_input(name));
        recording.unknown.extend(unknown.cloned());
        let micro_batches = Tokens::batches(&source, steps * accumulated, spec.vocabulary)?;
        let empty = |window: &[Tokens]| window.iter().all(|t| t.batch.targets.is_empty());
        if let Some(step) = micro_batches.chunks(accumulated).position(empty) {
            let message = format!("no token has a label to predict in step {}", step + 1);
            return Err(source.error(message));
        }
        let noise = noise::read(&source, &loaded.adapters, &micro_batches)?;
        let noisy = loaded.adapters.slots.iter().any(|slot| noise::noisy(slot).is_some());
        if noisy && noise.is_none() {
            let message = "tensor `noise.0` is missing: noisy gates draw noise in training";
            return Err(source.error(message.into()));
        }
        expect_final(folder, loaded, settings.lr, recording)?;
        let train = settings.train();
        let schedule =
            Schedule::with_warmup(&train, settings.cosine_warmup_steps.unwrap_or(0), steps);
        let context = micro_batches[0].shape[1];
        Ok(Self { train, schedule, steps, accumulated, micro_batches, noise, context })
    }

    /// Trains `model` and tells what every step and the end were like.
    pub(super) fn compute(
        &self,
        model: &mut Model<Cpu<f32>>,
        recording: &Recording,
    ) -> Result<Tensors> {
        let mut optimizer = Optimizer::new(model);
        let mut out = Tensors::new();
        let mut put = |name: String, tensor: Tensor| {
            if recording.expected.contains_key(&name) {
                out.insert(name, tensor);
            }
        };
        for step in 1..=self.steps {
            let (loss, balance) = self.accumulate(model, step, &mut optimizer);
            let rate = self.schedule.rate(step - 1);
            let norm = optimizer.step(model, &self.train, rate, step)?;
            put(format!("loss.{step}"), scalar(loss + balance));
            put(format!("balance_loss.{step}"), scalar(balance));
            put(format!("grad_norm.{step}"), scalar(norm));
            put(format!("lr.{step}"), scalar(rate));
        }
        for (key, (range, shape)) in keys(&model.adapters) {
            let values = model.params[range].iter().map(|&x| f64::from(x)).collect();
            put(format!("final.{key}"), Tensor { shape, values });
        }
        Ok(out)
    }

    /// Cross-entropy per label of the window and the sum of its balance losses.
    fn accumulate(
        &self,
        model: &Model<Cpu<f32>>,
        step: usize,
        optimizer: &mut Optimizer,
    ) -> (f64, f64) {
        let window = (step - 1) * self.accumulated..step * self.accumulated;
        let tokens = &self.micro_batches[window.clone()];
        let labels: usize = tokens.iter().map(|t| t.batch.targets.len()).sum();
        let scales = Scales { loss: 1.0 / labels as f64, balance: 1.0 };
        let (mut loss, mut balance) = (0.0, 0.0);
        for (tokens, i) in tokens.iter().zip(window) {
            let noise = self.noise.as_ref().map(|noise| Noise::Given(&noise[i]));
            let out = model.step(&tokens.batch, scales, noise, &mut optimizer.grads);
            loss += out.losses.iter().sum::<f64>() * scales.loss;
            balance += out.balance_loss;
        }
        (loss, balance)
    }
}

fn expect_figures(
    file: &Path,
    figures: &[StepFigures],
    steps: usize,
    recording: &mut Recording,
) -> Result<()> {
    if !figures.is_empty() && figures.len() != steps {
        let found = figures.len();
        return Err(data_error(file, format!("lists {found} steps; `steps` is {steps}")));
    }
    for (step, of) in (1..).zip(figures) {
        let loss = Rule::value(Scale::Absolute, LOSS);
        let norm = Rule::gradient(0.0, GRADIENTS);
        for (name, value, rule) in [
            ("loss", of.loss, loss),
            ("balance_loss", of.balance_loss, loss),
            ("grad_norm", of.grad_norm, norm),
            ("lr", of.lr, Rule::value(Scale::Each, RATE)),
        ] {
            if let Some(value) = value {
                recording.put(&format!("{name}.{step}"), scalar(value), rule);
            }
        }
        recording.see_gap(of.boundary_gap);
    }
    Ok(())
}

/// The trained adapter. Where a gradient is rounding noise, AdamW still moves by up to its learning
/// rate, whichever way the noise points; so this is what a parameter may be off.
fn expect_final(
    folder: &Path,
    loaded: &LoadedAdapter,
    learning_rate: f64,
    recording: &mut Recording,
) -> Result<()> {
    let file = folder.join("final_adapter.safetensors");
    if !file.exists() {
        return Ok(());
    }
    let values = read_values(&file, &loaded.config, &loaded.adapters)?;
    for (key, (range, shape)) in keys(&loaded.adapters) {
        let values = values[range].iter().map(|&x| f64::from(x)).collect();
        recording.put(
            &format!("final.{key}"),
            Tensor { shape, values },
            Rule::parameter(learning_rate),
        );
    }
    Ok(())
}
