//! Whole models: a base, an adapter on a base, or a training run.
//!
//! A case is a folder; which kind it is its files tell. B and T are batch and sequence, V the
//! vocabulary, D the hidden width. Everything is computed in f32.
//!
//! # A base: `config.json`, `model.safetensors`, `fixture.safetensors`, `fixture.json`
//!
//! `fixture.safetensors` needs `input_ids [B, T]`. `attention_mask [B, T]` is all ones where
//! absent; padding can only be on the right. It does not exist here, so the rows at padding are
//! not compared, and it counts in no balance loss. `labels [B, T]` are needed for losses and
//! gradients and are as in transformers: the label of token t + 1 is to be predicted at t, -100 is
//! no label. Compared is what was recorded:
//!
//! - `logits [B, T, V]`, `hidden.0` (embedding) to `hidden.<blocks>` (final norm) `[B, T, D]`
//! - `inv_freq [head_dim / 2]`
//! - `long_logits_last<k> [B', k, V]`, the last k of `long_input_ids [B', T']`
//! - in `fixture.json`: `loss`
//!
//! # An adapter: `adapter_config.json`, `adapter_model.safetensors`, `fixture.*`
//!
//! The base is `base_model_name_or_path`, absolute or relative to the case. As above, and:
//!
//! - `hidden.<i>`, `logits` and the figures of `eval` are of evaluation
//! - `noise.<k> [B * T, .., s_l]` of noisy gates in training, in call order: block by block; q, k,
//!   v, o, up, gate, down; the root's layer first. With it `train_logits [B, T, V]`
//! - `grad.<name as in the adapter file>`, in training, of mean cross-entropy and balance losses.
//!   A shared pool's are those of its first copy
//! - in `fixture.json`, at the top, in `train` or in `eval`: `loss` = `ce` + `balance_loss`, `ce`,
//!   `balance_loss`, `loss_num_items_in_batch_<n>` = summed cross-entropy / n + `balance_loss`;
//!   in training `grad_norm`. At the top they are of training; `eval_loss` is of evaluation.
//!   `n_trainable` counts parameters; `boundary_gap`, the smallest difference between a chosen
//!   and an unchosen expert, is shown where a case misses
//! - `generate.json`: `{"prompt": [..], "greedy": {"use_cache": [..], "no_cache": [..]}}`, token
//!   by token with the cache and computed anew each time
//!
//! # A training run: `traj.json`, `batches.safetensors`, the adapter at the start, `final_adapter.safetensors`
//!
//! `traj.json` has `steps`, `lr` and optionally `betas` (0.9, 0.999), `eps` (1e-8),
//! `weight_decay` (0), `clip_grad_norm` (none), `grad_accum` (1), `cosine_warmup_steps` (none: the
//! rate stays); `float32`, else `float64`, lists per step `loss`, `balance_loss`, `grad_norm`
//! (before clipping) and `lr`, each optional. `batches.safetensors` holds `input_ids`,
//! `attention_mask` and `labels` `[steps * grad_accum, B, T]`, and for noisy gates `noise.<k>` in
//! call order over the run, `noise.<step>.<k>`, or `noise.<k>` of one forward pass stacked over
//! all of them (all also in a `noise.safetensors`).
//!
//! With accumulation cross-entropy is divided by the labels of the whole window, and every
//! micro-batch adds its balance loss in full to the gradient. What is logged may be the sum, the
//! mean or the last of the micro-batches' balance losses: the first step tells which, and all
//! others must follow.
//!
//! # Tolerances
//!
//! | what | allowed | measured |
//! |---|---|---|
//! | logits, hidden states | 2e-4 | 1.5e-5 |
//! | losses | 1e-5 | 1.3e-6 |
//! | `inv_freq`, `lr` | 1e-6 of each value | 1.2e-7 |
//! | gradients, `grad_norm` | 5e-4 of the tensor's largest value | 1.8e-5 |
//! | losses of a training run | 1e-4 | 1.4e-6 |
//! | parameters after training | the learning rate | 4.7e-5 of 1e-3 |
//! | their root mean square | a hundredth of the learning rate | 1.3e-7 of 1e-5 |
//! | tokens, `n_trainable` | equal | equal |
//!
//! A gradient's largest value counts as at least a thousandth of the whole adapter's: what is zero
//! in theory is recorded as rounding noise. Where a gradient is such noise AdamW still moves by up
//! to its learning rate, whichever way the noise points, so single parameters may be that far off
//! and all of them together may not.

mod batch;
mod figures;
mod fixture;
mod noise;
mod trajectory;

use super::case::{Tensor, Tensors, data_error, read_tensors};
use super::{CaseReport, Check, Kind, distance, largest_difference, share_different};
use crate::checkpoint::{LoadedAdapter, load_adapter};
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::model::Model;
use crate::model::folder::ModelFolder;
use fixture::Fixture;
use smore_engine::Cpu;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use trajectory::Trajectory;

/// A case as read; see the module's documentation for the layouts.
pub struct EndToEnd {
    /// Its name: the folder's.
    pub name: String,
    model: Model<Cpu<f32>>,
    /// Values of the adapter as stored.
    start: Vec<f32>,
    work: Work,
    recording: Recording,
}

enum Work {
    Batch(Fixture),
    Run(Trajectory),
}

impl EndToEnd {
    /// True for a folder that holds a case of a whole model.
    pub fn is_case(folder: &Path) -> bool {
        let has = |name: &str| folder.join(name).is_file();
        let model = has("adapter_config.json") || has("config.json");
        has("traj.json") || (model && (has("fixture.safetensors") || has("fixture.json")))
    }

    /// Reads a case's folder and the weights of its base.
    ///
    /// # Errors
    /// Names the file and the key, tensor or token.
    pub fn open(folder: &Path) -> Result<Self> {
        let adapted =
            folder.join("adapter_config.json").is_file() || folder.join("traj.json").is_file();
        let base = if adapted { base_of(folder)? } else { folder.to_path_buf() };
        let base = ModelFolder::open(&base)?;
        let mut recording = Recording::default();
        let (adapters, start, work) = if adapted {
            let loaded = load_adapter(folder, &base.spec)?;
            let work = if folder.join("traj.json").is_file() {
                Work::Run(Trajectory::open(folder, &base.spec, &loaded, &mut recording)?)
            } else {
                let params = params(&loaded);
                let adapters = &loaded.adapters;
                Work::Batch(Fixture::open(folder, &base.spec, adapters, params, &mut recording)?)
            };
            (loaded.adapters, loaded.values, work)
        } else {
            let none = Adapters::none(&base.spec);
            let work = Fixture::open(folder, &base.spec, &none, Params::new(), &mut recording)?;
            (none, vec![], Work::Batch(work))
        };
        let context = match &work {
            Work::Batch(fixture) => fixture.context,
            Work::Run(run) => run.context,
        };
        let model = Model::new(Cpu::new(), &base, adapters, &start, context);
        Ok(Self { name: super::case_name(folder), model, start, work, recording })
    }

    /// Computes everything that was recorded, under its names.
    ///
    /// # Errors
    /// If training fails.
    pub fn compute(&mut self) -> Result<Tensors> {
        self.model.params_mut().clone_from(&self.start);
        match &self.work {
            Work::Batch(fixture) => Ok(fixture.compute(&self.model, &self.recording)),
            Work::Run(run) => run.compute(&mut self.model, &mut self.recording),
        }
    }

    /// Compares everything that was recorded, within `tolerance` or what is documented.
    ///
    /// # Panics
    /// If `computed` is of another case.
    pub fn compare(&self, computed: &Tensors, tolerance: Option<f64>) -> CaseReport {
        let rows = match &self.work {
            Work::Batch(fixture) => fixture.rows(),
            Work::Run(_) => &[],
        };
        let recorded = self.recording.expected.iter();
        let mut checks: Vec<Check> =
            recorded.map(|(name, e)| e.check(name, &computed[name], rows, tolerance)).collect();
        if let Work::Run(run) = &self.work {
            checks.extend(run.check_whole(&self.recording, computed, tolerance));
        }
        let mut notes = self.recording.notes.clone();
        if !self.recording.unknown.is_empty() {
            let names = self.recording.unknown.join(", ");
            notes.push(format!("not compared, since nothing has this name: {names}"));
        }
        let mut report = CaseReport { name: self.name.clone(), checks, notes };
        if let Some(gap) = self.recording.gap
            && !report.passed()
        {
            report.notes.push(format!(
                "boundary_gap is {gap:.1e}: where rounding tips a gate's choice, what follows \
                 differs by more than rounding"
            ));
        }
        report
    }
}

/// The base that an adapter's settings name.
fn base_of(folder: &Path) -> Result<PathBuf> {
    let file = folder.join("adapter_config.json");
    let bytes = super::case::read(&file, "an adapter's settings")?;
    let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| Error::Adapter {
        file: file.clone(),
        message: format!("not valid JSON: {e}"),
    })?;
    let Some(name) = json["base_model_name_or_path"].as_str() else {
        let message = "no `base_model_name_or_path`; expected the base's folder".into();
        return Err(Error::Adapter { file, message });
    };
    let base = folder.join(name);
    if base.is_dir() {
        return Ok(base);
    }
    let what = format!(
        "the base's folder, which `base_model_name_or_path` in {} names absolutely or relative to \
         the case",
        file.display()
    );
    Err(Error::Missing { path: base, what })
}

/// Tensors of a recording's file.
struct Source {
    file: PathBuf,
    tensors: Tensors,
}

impl Source {
    fn open(file: &Path) -> Result<Self> {
        Ok(Self { file: file.to_path_buf(), tensors: read_tensors(file)? })
    }

    fn error(&self, message: String) -> Error {
        data_error(&self.file, message)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| self.error(format!("tensor `{name}` is missing")))
    }

    fn shaped(&self, name: &str, expected: &[usize]) -> Result<&Tensor> {
        let tensor = self.tensor(name)?;
        if tensor.shape == expected {
            return Ok(tensor);
        }
        let shape = &tensor.shape;
        Err(self.error(format!("`{name}` has shape {shape:?}; expected {expected:?}")))
    }
}

/// What was recorded and is compared.
#[derive(Default)]
struct Recording {
    expected: BTreeMap<String, Expected>,
    /// Recorded, but unknown here.
    unknown: Vec<String>,
    notes: Vec<String>,
    /// Smallest difference between a chosen and an unchosen expert.
    gap: Option<f64>,
}

impl Recording {
    fn put(&mut self, name: &str, tensor: Tensor, rule: Rule) {
        self.expected.insert(name.to_owned(), Expected { tensor, rule });
    }

    fn see_gap(&mut self, gap: Option<f64>) {
        self.gap = self.gap.into_iter().chain(gap).reduce(f64::min);
    }
}

struct Expected {
    tensor: Tensor,
    rule: Rule,
}

/// How a tensor is compared.
#[derive(Clone, Copy)]
struct Rule {
    kind: Kind,
    scale: Scale,
    allowed: f64,
    /// Only the rows of tokens that are no padding.
    by_token: bool,
}

/// What a difference is divided by.
#[derive(Clone, Copy)]
enum Scale {
    Absolute,
    /// The tensor's largest value, or this where that is larger.
    Top(f64),
    /// Each recorded value.
    Each,
}

impl Rule {
    fn value(scale: Scale, allowed: f64) -> Self {
        Self { kind: Kind::Value, scale, allowed, by_token: false }
    }

    fn gradient(smallest: f64, allowed: f64) -> Self {
        Self { kind: Kind::Gradient, ..Self::value(Scale::Top(smallest), allowed) }
    }

    fn parameter(allowed: f64) -> Self {
        Self { kind: Kind::Parameter, ..Self::value(Scale::Absolute, allowed) }
    }

    fn index() -> Self {
        Self { kind: Kind::Index, ..Self::value(Scale::Absolute, 0.0) }
    }
}

impl Expected {
    fn check(
        &self,
        name: &str,
        computed: &Tensor,
        rows: &[usize],
        tolerance: Option<f64>,
    ) -> Check {
        let (recorded, rule) = (&self.tensor, self.rule);
        assert_eq!(recorded.shape, computed.shape, "shape of `{name}`");
        let kept = |tensor: &Tensor| {
            if rule.by_token {
                select(&tensor.values, rows, tensor.shape[2])
            } else {
                tensor.values.clone()
            }
        };
        let (a, b) = (kept(recorded), kept(computed));
        let error = match (rule.kind, rule.scale) {
            (Kind::Index, _) => share_different(&a, &b),
            (_, Scale::Absolute) => largest_difference(&a, &b, |_| 1.0),
            (_, Scale::Top(smallest)) => distance(&a, &b, smallest),
            (_, Scale::Each) => largest_difference(&a, &b, f64::abs),
        };
        let allowed = match (rule.kind, tolerance) {
            (Kind::Index, _) | (_, None) => rule.allowed,
            (_, Some(tolerance)) => tolerance,
        };
        Check { tensor: name.to_owned(), kind: rule.kind, error, allowed }
    }
}

/// Names of tensors from which a case is computed.
fn is_input(name: &str) -> bool {
    ["input_ids", "attention_mask", "labels", "long_input_ids"].contains(&name)
        || name.starts_with("noise.")
}

/// Rows of a matrix.
fn select(values: &[f64], rows: &[usize], width: usize) -> Vec<f64> {
    rows.iter().flat_map(|&row| &values[row * width..(row + 1) * width]).copied().collect()
}

fn scalar(value: f64) -> Tensor {
    Tensor { shape: vec![], values: vec![value] }
}

/// Where each parameter lies among all adapters' values, and its shape, by its name in the adapter
/// file. A shared pool has the name of its first copy.
type Params = BTreeMap<String, (Range<usize>, Vec<usize>)>;

fn params(loaded: &LoadedAdapter) -> Params {
    let slots = loaded.adapters.slots.iter();
    slots
        .flat_map(|slot| slot.params().iter().map(move |p| (slot, p)))
        .map(|(slot, param)| {
            let (start, range) = (slot.range.start, param.range());
            let key = loaded.settings.stored_name(slot, param);
            (key, (start + range.start..start + range.end, param.shape.clone()))
        })
        .collect()
}
