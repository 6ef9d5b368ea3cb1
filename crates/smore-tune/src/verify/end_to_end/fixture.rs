//! A base, with or without an adapter, on one batch.

use super::batch::Tokens;
use super::figures::{Figure, add_figures, figure, json};
use super::{Params, Recording, Rule, Scale, Source, noise, scalar};
use crate::error::Result;
use crate::generate::likeliest;
use crate::inject::Adapters;
use crate::model::spec::DecoderSpec;
use crate::model::{Batch, Model, Scales};
use crate::verify::case::{Tensor, Tensors, data_error};
use serde_json::Value;
use smore::adapter::Noise;
use smore::kernel::GateNoise;
use smore_engine::Cpu;
use std::path::Path;

/// Logits and hidden states, absolute.
const STATES: f64 = 2e-4;
/// Losses, absolute.
const LOSS: f64 = 1e-5;
/// Rotary frequencies and learning rates, each of itself.
pub(super) const RATES: f64 = 1e-6;
/// Gradients and their norm, of the tensor's largest value.
pub(super) const GRADIENTS: f64 = 5e-4;
/// The least that counts as a gradient's largest value, of the whole adapter's.
const SMALLEST_GRADIENT: f64 = 1e-3;

/// What one batch is computed from.
pub(super) struct Fixture {
    tokens: Tokens,
    params: Params,
    long: Option<Tokens>,
    /// Recorded continuations begin with it.
    prompt: Vec<u32>,
    /// Of every adapter, in training with noisy gates.
    noise: Option<Vec<GateNoise<f64>>>,
    /// Recorded in evaluation with padding counted; stands in for ours.
    foreign_balance: Option<f64>,
    /// Longest sequence.
    pub(super) context: usize,
}

impl Fixture {
    /// Reads batch and recording of a folder; what is computed is in `recording`.
    pub(super) fn open(
        folder: &Path,
        spec: &DecoderSpec,
        adapters: &Adapters,
        params: Params,
        recording: &mut Recording,
    ) -> Result<Self> {
        let mut source = Source::open(&folder.join("fixture.safetensors"))?;
        let file = folder.join("fixture.json");
        if file.exists() {
            let figures = json(&file)?;
            add_figures(&file, &figures, &mut source.tensors)?;
            recording.see_gap(figures["boundary_gap"].as_f64());
        }
        let tokens = Tokens::batch(&source, spec.vocabulary)?;
        let long = if source.tensors.contains_key("long_input_ids") {
            Some(Tokens::whole(&source, "long_input_ids", spec.vocabulary)?)
        } else {
            None
        };
        let noise = noise::read(&source, adapters, std::slice::from_ref(&tokens))?;
        let mut fixture = Self {
            context: tokens.shape[1].max(long.as_ref().map_or(0, |long| long.shape[1])),
            tokens,
            params,
            long,
            prompt: vec![],
            noise: noise.map(|mut of_batches| of_batches.remove(0)),
            foreign_balance: None,
        };
        fixture.expect(&source, spec, recording)?;
        fixture.read_continuations(&folder.join("generate.json"), spec.vocabulary, recording)?;
        fixture.check_labels(&source, recording)?;
        fixture.check_noise(&source, adapters, recording)?;
        fixture.set_apart_padded_balance(adapters, recording);
        Ok(fixture)
    }

    /// Sorts out what was recorded.
    fn expect(&self, source: &Source, spec: &DecoderSpec, recording: &mut Recording) -> Result<()> {
        let gradients = source.tensors.iter().filter(|(name, _)| name.starts_with("grad."));
        let largest = gradients.flat_map(|(_, t)| &t.values).fold(0.0f64, |a, x| a.max(x.abs()));
        for (name, tensor) in &source.tensors {
            let (rule, shape) = if let Some(key) = name.strip_prefix("grad.") {
                let Some((_, shape)) = self.params.get(&*key.replace(".default.", ".")) else {
                    let message = format!("`{name}`: the adapter has no parameter `{key}`");
                    return Err(source.error(message));
                };
                (Rule::gradient(SMALLEST_GRADIENT * largest, GRADIENTS), shape.clone())
            } else if let Some(rule) = self.value(source, name, spec)? {
                rule
            } else {
                if !super::is_input(name) {
                    recording.unknown.push(name.clone());
                }
                continue;
            };
            source.shaped(name, &shape)?;
            recording.put(name, tensor.clone(), rule);
        }
        Ok(())
    }

    /// How a state or a figure is compared, and its shape; `None` for other names.
    fn value(
        &self,
        source: &Source,
        name: &str,
        spec: &DecoderSpec,
    ) -> Result<Option<(Rule, Vec<usize>)>> {
        let [batch, length] = self.tokens.shape;
        let states = Rule::value(Scale::Absolute, STATES);
        let of_tokens = Rule { by_token: true, ..states };
        let number = |prefix: &str| {
            let digits = name.strip_prefix(prefix)?;
            digits.parse::<usize>().ok().filter(|i| i.to_string() == digits)
        };
        if let Some(i) = number("hidden.") {
            let blocks = spec.blocks;
            return if i <= blocks {
                Ok(Some((of_tokens, vec![batch, length, spec.hidden])))
            } else {
                Err(source.error(format!(
                    "`{name}`: the last hidden state of {blocks} blocks is `hidden.{blocks}`"
                )))
            };
        }
        if let Some(last) = number("long_logits_last") {
            let [sequences, tokens] = self.long.as_ref().map_or([0, 0], |long| long.shape);
            return if (1..=tokens).contains(&last) {
                Ok(Some((states, vec![sequences, last, spec.vocabulary])))
            } else {
                Err(source.error(format!("`{name}`: `long_input_ids` has {tokens} tokens")))
            };
        }
        Ok(match (name, figure(name)) {
            ("logits" | "train_logits", _) => {
                Some((of_tokens, vec![batch, length, spec.vocabulary]))
            }
            ("inv_freq", _) => Some((Rule::value(Scale::Each, RATES), vec![spec.head_dim / 2])),
            ("n_trainable", _) => Some((Rule::index(), vec![])),
            (_, Some((Figure::GradNorm, _))) => Some((Rule::gradient(0.0, GRADIENTS), vec![])),
            (_, Some(_)) => Some((Rule::value(Scale::Absolute, LOSS), vec![])),
            (_, None) => None,
        })
    }

    /// `generate.json`: `{"prompt": [..], "greedy": {"use_cache": [..], "no_cache": [..]}}`.
    fn read_continuations(
        &mut self,
        file: &Path,
        vocabulary: usize,
        recording: &mut Recording,
    ) -> Result<()> {
        if !file.exists() {
            return Ok(());
        }
        let json = json(file)?;
        let tokens = |value: &Value, key: &str| -> Result<Vec<u32>> {
            let token = |v: &Value| v.as_u64().filter(|&t| t < vocabulary as u64);
            let ids: Option<Vec<u64>> =
                value.as_array().and_then(|list| list.iter().map(token).collect());
            let Some(ids) = ids else {
                let message = format!("`{key}` is no list of tokens below {vocabulary}");
                return Err(data_error(file, message));
            };
            Ok(ids.into_iter().map(|id| id as u32).collect())
        };
        self.prompt = tokens(&json["prompt"], "prompt")?;
        if self.prompt.is_empty() {
            return Err(data_error(file, "`prompt` has no token".into()));
        }
        for way in ["use_cache", "no_cache"] {
            if json["greedy"][way].is_null() {
                continue;
            }
            let ids = tokens(&json["greedy"][way], way)?;
            if !ids.starts_with(&self.prompt) {
                let message = format!("`greedy.{way}` does not begin with `prompt`");
                return Err(data_error(file, message));
            }
            self.context = self.context.max(ids.len());
            let values = ids.iter().map(|&id| f64::from(id)).collect();
            let tensor = Tensor { shape: vec![ids.len()], values };
            recording.put(&format!("generate.{way}"), tensor, Rule::index());
        }
        Ok(())
    }

    fn check_labels(&self, source: &Source, recording: &Recording) -> Result<()> {
        let needs = |name: &&String| {
            let cross_entropy = figure(name).is_some_and(|(f, _)| !matches!(f, Figure::Balance));
            cross_entropy || name.starts_with("grad.")
        };
        match recording.expected.keys().find(needs) {
            Some(name) if self.tokens.batch.targets.is_empty() => Err(source.error(format!(
                "`{name}` is recorded, but no token has a label to predict in `labels`"
            ))),
            _ => Ok(()),
        }
    }

    /// What was recorded in training cannot be computed without the noise.
    fn check_noise(
        &self,
        source: &Source,
        adapters: &Adapters,
        recording: &Recording,
    ) -> Result<()> {
        let train = |name: &&String| {
            ["grad.", "train.", "train_logits"].iter().any(|prefix| name.starts_with(prefix))
        };
        let noisy = adapters.slots.iter().any(|slot| noise::noisy(slot).is_some());
        match recording.expected.keys().find(train) {
            Some(name) if noisy && self.noise.is_none() => Err(source.error(format!(
                "tensor `noise.0` is missing: `{name}` was recorded in training, in which noisy \
                 gates draw noise"
            ))),
            _ => Ok(()),
        }
    }

    /// Without noise the balance loss is the same in training and evaluation. A recording in which
    /// it is not has counted padding in evaluation (the authors' Gemma does), which does not exist
    /// here.
    fn set_apart_padded_balance(&mut self, adapters: &Adapters, recording: &mut Recording) {
        let balance = |name: &str| Some(recording.expected.get(name)?.tensor.values[0]);
        let noisy = adapters.slots.iter().any(|slot| noise::noisy(slot).is_some());
        let (Some(eval), Some(train)) =
            (balance("eval.balance_loss"), balance("train.balance_loss"))
        else {
            return;
        };
        if self.tokens.padded() && !noisy && (eval - train).abs() > LOSS {
            self.foreign_balance = Some(eval);
            recording.expected.remove("eval.balance_loss");
            recording.notes.push(format!(
                "not compared: eval.balance_loss. Though nothing is drawn it differs from \
                 train.balance_loss by {:.1e}: it counts padding. The recorded one stands in \
                 the other eval losses",
                (eval - train).abs()
            ));
        }
    }

    /// Rows that are no padding, of `[B * T]`.
    pub(super) fn rows(&self) -> &[usize] {
        &self.tokens.rows
    }

    /// Everything that was recorded.
    pub(super) fn compute(&self, model: &Model<Cpu<f32>>, recording: &Recording) -> Tensors {
        let mut out = Tensors::new();
        self.put_states(model, recording, &mut out);
        self.put_losses(model, recording, &mut out);
        let recorded = |name: &str| recording.expected.get(name);
        for (name, expected) in &recording.expected {
            if name.starts_with("long_logits_last") {
                let long = self.long.as_ref().expect("`long_input_ids` were asked for");
                let shape = &expected.tensor.shape;
                out.insert(name.clone(), last_logits(model, long, shape));
            }
        }
        if let Some(expected) = recorded("inv_freq") {
            let values = model.spec.rope.frequencies(model.spec.head_dim);
            out.insert("inv_freq".into(), Tensor { shape: expected.tensor.shape.clone(), values });
        }
        if recorded("n_trainable").is_some() {
            out.insert("n_trainable".into(), scalar(model.trained() as f64));
        }
        for (way, cached) in [("generate.use_cache", true), ("generate.no_cache", false)] {
            if let Some(expected) = recorded(way) {
                let ids = continuation(model, &self.prompt, expected.tensor.values.len(), cached);
                let values: Vec<f64> = ids.into_iter().map(f64::from).collect();
                out.insert(way.into(), Tensor { shape: vec![values.len()], values });
            }
        }
        out
    }

    fn put_states(&self, model: &Model<Cpu<f32>>, recording: &Recording, out: &mut Tensors) {
        let (spec, batch) = (&model.spec, &self.tokens.batch);
        let hidden = |i: usize| format!("hidden.{i}");
        let wanted = |name: &str| recording.expected.contains_key(name);
        if wanted("logits") || (0..=spec.blocks).any(|i| wanted(&hidden(i))) {
            let (states, logits) = model.states_and_logits(batch, None);
            for (i, state) in states.iter().enumerate().filter(|(i, _)| wanted(&hidden(*i))) {
                out.insert(hidden(i), self.tokens.spread(state, spec.hidden));
            }
            if wanted("logits") {
                out.insert("logits".into(), self.tokens.spread(&logits, spec.vocabulary));
            }
        }
        if wanted("train_logits") {
            let (_, logits) = model.states_and_logits(batch, self.noise());
            out.insert("train_logits".into(), self.tokens.spread(&logits, spec.vocabulary));
        }
    }

    fn noise(&self) -> Option<Noise<'_>> {
        self.noise.as_deref().map(Noise::Given)
    }

    /// Losses of both passes, gradients and their norm.
    fn put_losses(&self, model: &Model<Cpu<f32>>, recording: &Recording, out: &mut Tensors) {
        let batch = &self.tokens.batch;
        let asked = |wanted: bool| {
            let of = |name: &String| figure(name).is_some_and(|(_, train)| train == wanted);
            recording.expected.keys().any(|name| of(name) || wanted && name.starts_with("grad."))
        };
        let mut passes = Vec::new();
        if asked(false) {
            let balance = self.foreign_balance.unwrap_or_else(|| {
                let routing = model.routing(batch);
                routing.iter().flatten().flat_map(|r| &r.balance_losses).sum()
            });
            passes.push((false, model.losses(batch), balance, 0.0));
        }
        if asked(true) {
            let mut grads = vec![0.0; model.trained()];
            let scales = Scales { loss: 1.0 / batch.targets.len().max(1) as f64, balance: 1.0 };
            let step = model.step(batch, scales, self.noise(), &mut grads);
            let norm = grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            passes.push((true, step.losses, step.balance_loss, norm));
            for name in recording.expected.keys() {
                let Some(key) = name.strip_prefix("grad.") else { continue };
                let (range, shape) = &self.params[&*key.replace(".default.", ".")];
                let values = grads[range.clone()].iter().map(|&g| f64::from(g)).collect();
                out.insert(name.clone(), Tensor { shape: shape.clone(), values });
            }
        }
        for (is_train, losses, balance, norm) in passes {
            let sum: f64 = losses.iter().sum();
            let mean = sum / losses.len() as f64;
            for name in recording.expected.keys() {
                let value = match figure(name) {
                    Some((figure, train)) if train == is_train => match figure {
                        Figure::Loss => mean + balance,
                        Figure::LossOver(items) => sum / items + balance,
                        Figure::CrossEntropy => mean,
                        Figure::Balance => balance,
                        Figure::GradNorm => norm,
                    },
                    _ => continue,
                };
                out.insert(name.clone(), scalar(value));
            }
        }
    }
}

/// Logits of the last tokens of each sequence.
fn last_logits(model: &Model<Cpu<f32>>, long: &Tokens, shape: &[usize]) -> Tensor {
    let (_, logits) = model.states_and_logits(&long.batch, None);
    let width = model.spec.vocabulary;
    let sequences = logits.chunks_exact(long.shape[1] * width);
    let last = sequences.flat_map(|s| &s[(long.shape[1] - shape[1]) * width..]);
    Tensor { shape: shape.to_vec(), values: last.map(|&x| f64::from(x)).collect() }
}

/// `prompt` continued greedily to `len` tokens.
fn continuation(model: &Model<Cpu<f32>>, prompt: &[u32], len: usize, cached: bool) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    let mut cache = model.cache();
    while ids.len() < len {
        let logits = if cached {
            model.extend(&ids[cache.len()..], &mut cache)
        } else {
            let mut batch = Batch::default();
            batch.push(&ids, &vec![false; ids.len()]);
            let (_, logits) = model.states_and_logits(&batch, None);
            logits[logits.len() - model.spec.vocabulary..].to_vec()
        };
        ids.push(likeliest(&logits));
    }
    ids
}
