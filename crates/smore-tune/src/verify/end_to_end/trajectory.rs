//! A recorded training run, step by step.

use super::batch::Tokens;
use super::fixture::{GRADIENTS, RATES};
use super::{Params, Recording, Rule, Scale, Source, noise, params, scalar};
use crate::checkpoint::{LoadedAdapter, read_values};
use crate::config::{LrScheduler, TrainConfig};
use crate::error::{Error, Result};
use crate::model::spec::DecoderSpec;
use crate::model::{Model, Scales};
use crate::optimizer::Optimizer;
use crate::schedule::Schedule;
use crate::verify::case::{Tensor, Tensors, data_error, read};
use crate::verify::{Check, Kind};
use serde::Deserialize;
use smore::adapter::Noise;
use smore::kernel::GateNoise;
use smore_engine::Cpu;
use std::path::Path;

/// Losses of every step, absolute.
const LOSS: f64 = 1e-4;
/// The root mean square of all parameters, of the learning rate.
const WHOLE: f64 = 1e-2;

/// A run's batches and how it follows its gradients.
pub(super) struct Trajectory {
    train: TrainConfig,
    schedule: Schedule,
    steps: usize,
    accumulated: usize,
    micro_batches: Vec<Tokens>,
    params: Params,
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
        let accumulated = settings.grad_accum.unwrap_or(1);
        if accumulated == 0 {
            return Err(data_error(&file, "`grad_accum` is 0; expected at least 1".into()));
        }
        let mut source = Source::open(&folder.join("batches.safetensors"))?;
        let apart = folder.join("noise.safetensors");
        if apart.exists() {
            source.tensors.extend(Source::open(&apart)?.tensors);
        }
        let unknown = source.tensors.keys().filter(|name| !super::is_input(name));
        recording.unknown.extend(unknown.cloned());
        let n = steps.saturating_mul(accumulated);
        let micro_batches = Tokens::batches(&source, n, spec.vocabulary)?;
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
        let params = params(loaded);
        Ok(Self { train, schedule, steps, accumulated, micro_batches, params, noise, context })
    }

    /// Trains `model` and tells what every step and the end were like.
    pub(super) fn compute(
        &self,
        model: &mut Model<Cpu<f32>>,
        recording: &mut Recording,
    ) -> Result<Tensors> {
        let mut optimizer = Optimizer::new(model);
        let mut out = Tensors::new();
        let mut logged = Vec::new();
        for step in 1..=self.steps {
            logged.push(self.accumulate(model, step, &mut optimizer));
            let rate = self.schedule.rate(step - 1);
            let norm = optimizer.step(model, &self.train, rate, step)?;
            out.insert(format!("grad_norm.{step}"), scalar(norm));
            out.insert(format!("lr.{step}"), scalar(rate));
        }
        for (figure, with_loss) in [("loss", true), ("balance_loss", false)] {
            let value = |(loss, balances): &(f64, Vec<f64>), kept: Kept| {
                kept.of(balances) + if with_loss { *loss } else { 0.0 }
            };
            let recorded = recording.expected.get(&format!("{figure}.1"));
            let kept = recorded.map_or(Kept::Sum, |recorded| {
                let off = |kept| (value(&logged[0], kept) - recorded.tensor.values[0]).abs();
                Kept::ALL
                    .into_iter()
                    .min_by(|a, b| off(*a).total_cmp(&off(*b)))
                    .unwrap_or(Kept::Sum)
            });
            for (step, of) in (1..).zip(&logged) {
                out.insert(format!("{figure}.{step}"), scalar(value(of, kept)));
            }
            let note = format!("{figure} was recorded with the balance losses' {}", kept.name());
            if self.accumulated > 1 && kept != Kept::Sum && !recording.notes.contains(&note) {
                recording.notes.push(note);
            }
        }
        for (key, (range, shape)) in &self.params {
            let values = model.params()[range.clone()].iter().map(|&x| f64::from(x)).collect();
            out.insert(format!("final.{key}"), Tensor { shape: shape.clone(), values });
        }
        out.retain(|name, _| recording.expected.contains_key(name));
        Ok(out)
    }

    /// Cross-entropy per label of the window, and the balance loss of each micro-batch.
    fn accumulate(
        &self,
        model: &Model<Cpu<f32>>,
        step: usize,
        optimizer: &mut Optimizer,
    ) -> (f64, Vec<f64>) {
        let window = (step - 1) * self.accumulated..step * self.accumulated;
        let tokens = &self.micro_batches[window.clone()];
        let labels: usize = tokens.iter().map(|t| t.batch.targets.len()).sum();
        let scales = Scales { loss: 1.0 / labels as f64, balance: 1.0 };
        let (mut loss, mut balances) = (0.0, Vec::new());
        for (tokens, i) in tokens.iter().zip(window) {
            let noise = self.noise.as_ref().map(|noise| Noise::Given(&noise[i]));
            let out = model.step(&tokens.batch, scales, noise, &mut optimizer.grads);
            loss += out.losses.iter().sum::<f64>() * scales.loss;
            balances.push(out.balance_loss);
        }
        (loss, balances)
    }

    /// All parameters after training together.
    pub(super) fn check_whole(
        &self,
        recording: &Recording,
        computed: &Tensors,
        tolerance: Option<f64>,
    ) -> Option<Check> {
        let parameters = recording.expected.iter().filter(|(_, e)| e.rule.kind == Kind::Parameter);
        let squares: Vec<f64> = parameters
            .flat_map(|(name, e)| e.tensor.values.iter().zip(&computed[name].values))
            .map(|(a, b)| (a - b).powi(2))
            .collect();
        (!squares.is_empty()).then(|| Check {
            tensor: "final (root mean square)".into(),
            kind: Kind::Parameter,
            error: (squares.iter().sum::<f64>() / squares.len() as f64).sqrt(),
            allowed: tolerance.unwrap_or(self.train.learning_rate * WHOLE),
        })
    }
}

/// What a recording keeps of the balance losses of several micro-batches.
#[derive(Clone, Copy, PartialEq)]
enum Kept {
    Sum,
    Mean,
    Last,
}

impl Kept {
    const ALL: [Self; 3] = [Self::Sum, Self::Mean, Self::Last];

    fn of(self, balances: &[f64]) -> f64 {
        let sum: f64 = balances.iter().sum();
        match self {
            Self::Sum => sum,
            Self::Mean => sum / balances.len() as f64,
            Self::Last => balances.last().copied().unwrap_or(0.0),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Mean => "mean over micro-batches",
            Self::Last => "last",
        }
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
            ("lr", of.lr, Rule::value(Scale::Each, RATES)),
        ] {
            if let Some(value) = value {
                recording.put(&format!("{name}.{step}"), scalar(value), rule);
            }
        }
        recording.see_gap(of.boundary_gap);
    }
    Ok(())
}

/// The trained adapter.
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
    let values = read_values(&file, &loaded.settings, &loaded.adapters)?;
    for (key, (range, shape)) in params(loaded) {
        let values = values[range].iter().map(|&x| f64::from(x)).collect();
        recording.put(
            &format!("final.{key}"),
            Tensor { shape, values },
            Rule::parameter(learning_rate),
        );
    }
    Ok(())
}
