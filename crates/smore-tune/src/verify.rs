//! Recorded cases of other implementations, computed again and compared: single adapters, called
//! layer cases, and whole models, see [`end_to_end`].
//!
//! # Layout of a layer case
//!
//! Two files, `name.json` and `name.safetensors`. Lists run from the leaves (layer 0) to the root.
//! B and T are batch and sequence, n = B T, f, s, r and d as in the paper.
//!
//! `name.json`:
//!
//! - `d_in`, `d_out`: of the adapted linear map
//! - `config`: the authors' constructor arguments `s`, `f`, `r`, `d_g` (a list per layer),
//!   `gate_type` (`switch`, `noisy_topk`, `dense`), `expert_act_fn` (`identity`, `relu`, `tanh`,
//!   `prelu|0.25`); optional are `gate_arch` (`mlp`), `gate_act_fn` (`relu`), `dim_downproj_x` (0:
//!   as wide as x), `activation_position` (`all`), `lora_alpha` (none), `balance_loss_weight`
//!   (0.01), `is_shared_expert_pool` (false)
//! - optional: `dtype` (`f32`; see below), `train_mode` (true where noise was recorded),
//!   `has_mask` and `base_bias` (true where those tensors were recorded)
//!
//! `name.safetensors`, what is needed:
//!
//! - `x [.., d_in]`, usually `[B, T, d_in]`; `base.weight [d_out, d_in]` and, if the map has one,
//!   `base.bias [d_out]`
//! - `param.*`: every parameter under its name in an adapter file, such as `param.moe_A.0`
//! - `g [.., d_out]` where gradients or losses were recorded: the loss is the sum of `y * g`
//! - `attention_mask [B, T]` with a mask, 0 for padding; `noise.l [n, f_{L-1}, .., f_{l+1}, s_l]`,
//!   drawn from N(0, 1), for a noisy gate in training
//!
//! Everything else is optional; what was recorded is compared, and a case in which nothing could
//! be compared fails: `y` (with the base's output), `hidden.l [n, f_{L-1}, .., f_{l+1}, d_{l+1}]`
//! (output of layer l), `topk_idx.l` and `topk_score.l` `[n, f_{L-1}, .., f_l]`, `loss_y`,
//! `balance_loss`, `layer_balance_loss.l`, `loss` = `loss_y` + `balance_loss`, `load.l [s_l]`,
//! `importance.l [s_l]` (noisy gate), `grad.*` and `grad.x` (of `loss`), `balance_grad.*` and
//! `balance_grad.x` (of `balance_loss`).
//!
//! # Precisions and tolerances
//!
//! Whatever a case was recorded in, the adapter is computed in f32 here, from the recorded
//! parameters and inputs; a bf16 number is an f32 number. Base and adapter meet as they met in the
//! recording: in a case with a bf16 base each of the two results is rounded to bf16, added, and
//! rounded again; so with `y` as with `grad.x`. Errors are relative to the recorded tensor's
//! largest value ("top" below). One rounding to bf16, which has 8 bits, moves a number by up to
//! 2^-8 = 3.9e-3 of itself. Chosen experts must be equal in every precision: a case in bf16 is
//! to be recorded where no two candidates lie within rounding of each other.
//!
//! | `dtype` | values | gradients | reason |
//! |---|---|---|---|
//! | `f32` | 2e-5 | 2e-4 | sums in another order |
//! | `mixed` | 2e-5 | 2e-4 | f32 inside; `y`, the losses made of it, `grad.x` and `balance_grad.x` 2^-6: where f32 results fall on both sides of a rounding boundary they end 2^-7 of top apart, and base and adapter may both do so |
//! | `bf16`, `autocast` | 4e-2 | 6e-2 | every result on the way was rounded: 10 roundings forward, 15 there and back |
//!
//! Measured over the 120 shared cases: f32 1.3e-6 and 5.3e-5; mixed 6.0e-7 and 3.0e-6, `y` and
//! `grad.x` equal to the bit; bf16 2.1e-2 and 2.8e-2; autocast 1.0e-2 and 2.8e-2. Autocast rounds
//! the factors of products, so here its parameters of two or more dimensions are rounded to bf16
//! first.
//!
//! Two scales are not a tensor's own top. `loss_y` and `loss` are sums of terms of both signs and
//! are measured against the root of the terms' summed squares where that is larger. Gradients of
//! the balance loss can cancel to nothing and are measured against at least 0.002 of the balance
//! loss (0.1 in bf16 and autocast).

mod case;
mod compute;
pub mod end_to_end;
mod find;

pub use case::{LayerCase, Tensor, Tensors, read_tensors};
pub use compute::write_tensors;
pub use end_to_end::EndToEnd;
pub use find::{case_name, check_case, find_cases};

use crate::error::Result;
use serde::{Deserialize, Serialize};
use smore_engine::Float;
use std::path::Path;

/// The arithmetic a case was recorded in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// All in f32.
    #[default]
    F32,
    /// All in bf16: parameters, inputs and every result on the way.
    Bf16,
    /// The base and x in bf16, the adapter in f32.
    Mixed,
    /// As `Mixed`, with the adapter's products in bf16 under PyTorch's autocast.
    Autocast,
}

/// What a case may differ by, relative to the largest value of each tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Outputs, hidden states, gate weights, losses.
    pub values: f64,
    /// Gradients.
    pub gradients: f64,
    /// What is handed on in bf16 by a computation in f32: `y`, the losses made of it, `grad.x` and
    /// `balance_grad.x` of a mixed case.
    pub handed_on: Option<f64>,
}

impl Tolerance {
    /// The same for every tensor.
    pub fn same(tolerance: f64) -> Self {
        Self { values: tolerance, gradients: tolerance, handed_on: None }
    }

    /// What rounding explains; reasons and measurements in the module's documentation.
    pub fn of(precision: Precision) -> Self {
        let f32 = Self { values: 2e-5, gradients: 2e-4, handed_on: None };
        match precision {
            Precision::F32 => f32,
            Precision::Mixed => Self { handed_on: Some(1.0 / 64.0), ..f32 },
            Precision::Bf16 | Precision::Autocast => {
                Self { values: 4e-2, gradients: 6e-2, handed_on: None }
            }
        }
    }

    fn allowed(&self, tensor: &str, kind: Kind) -> f64 {
        let handed_on = ["y", "loss_y", "loss", "grad.x", "balance_grad.x"].contains(&tensor);
        match (kind, self.handed_on) {
            (Kind::Index, _) => 0.0,
            (_, Some(tolerance)) if handed_on => tolerance,
            (Kind::Value | Kind::Parameter, _) => self.values,
            (Kind::Gradient, _) => self.gradients,
        }
    }
}

/// What a recorded tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Outputs, hidden states, gate weights, losses.
    Value,
    /// Gradients.
    Gradient,
    /// Parameters after training.
    Parameter,
    /// Chosen experts or tokens.
    Index,
}

impl Kind {
    fn of(tensor: &str) -> Self {
        if tensor.starts_with("topk_idx.") {
            Self::Index
        } else if tensor.starts_with("grad.") || tensor.starts_with("balance_grad.") {
            Self::Gradient
        } else {
            Self::Value
        }
    }
}

/// How far one computed tensor is from the recorded one.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its name in the case.
    pub tensor: String,
    /// What it holds.
    pub kind: Kind,
    /// Largest difference: over the recorded tensor's largest value, or as it is for values and
    /// parameters of a whole model; of indices, the share that differs.
    pub error: f64,
    /// What was allowed.
    pub allowed: f64,
}

impl Check {
    /// Within what was allowed; a NaN is not.
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }

    /// The error over what was allowed.
    fn badness(&self) -> f64 {
        if self.error == 0.0 {
            0.0
        } else if self.error.is_nan() {
            f64::INFINITY
        } else {
            self.error / self.allowed
        }
    }
}

/// The comparison of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Name of the case.
    pub name: String,
    /// One entry per recorded tensor that was compared.
    pub checks: Vec<Check>,
    /// What a reader should know besides: what was not compared, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl CaseReport {
    /// True where every tensor is within its tolerance, and there was one.
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(Check::passed)
    }

    /// The worst tensor, measured against what was allowed.
    pub fn worst(&self) -> Option<&Check> {
        self.checks.iter().max_by(|a, b| a.badness().total_cmp(&b.badness()))
    }

    /// The largest error among tensors of this kind, NaN above all.
    pub fn largest(&self, kind: Kind) -> Option<f64> {
        let errors = self.checks.iter().filter(|c| c.kind == kind).map(|c| c.error.abs());
        errors.max_by(f64::total_cmp)
    }
}

impl LayerCase {
    /// Compares everything that was recorded and computed.
    pub fn compare(&self, computed: &Tensors, tolerance: Tolerance) -> CaseReport {
        let mut checks = Vec::new();
        for (name, recorded) in &self.tensors {
            let Some(computed) = computed.get(name) else { continue };
            let kind = Kind::of(name);
            let error = match kind {
                Kind::Index => share_different(&recorded.values, &computed.values),
                _ => distance(&recorded.values, &computed.values, self.smallest_scale(name)),
            };
            let allowed = tolerance.allowed(name, kind);
            checks.push(Check { tensor: name.clone(), kind, error, allowed });
        }
        CaseReport { name: self.name.clone(), checks, notes: vec![] }
    }

    /// The smallest scale that means anything for a tensor: what is zero in theory is recorded as
    /// rounding noise.
    fn smallest_scale(&self, tensor: &str) -> f64 {
        let values = |name: &str| self.tensors.get(name).map_or(&[][..], |t| &t.values[..]);
        let size = match tensor {
            // A sum of terms of both signs is as exact as its terms.
            "loss_y" | "loss" => {
                let terms = values("y").iter().zip(values("g")).map(|(y, g)| y * g);
                terms.map(|term| term * term).sum::<f64>().sqrt()
            }
            // Differences of numbers of the balance loss's own size.
            _ if tensor.starts_with("balance_grad.") => {
                let balance = values("balance_loss").first().map_or(0.0, |b| b.abs());
                match self.precision {
                    Precision::F32 | Precision::Mixed => 2e-3 * balance,
                    Precision::Bf16 | Precision::Autocast => 1e-1 * balance,
                }
            }
            _ => 0.0,
        };
        size.max(1e-5)
    }
}

/// Computes a layer case in `T` and compares everything that was recorded, within `tolerance` or
/// what the case's precision explains.
///
/// # Errors
/// If the case cannot be read or names settings that S'MoRE does not have.
pub fn layer_case<T: Float>(json_path: &Path, tolerance: Option<Tolerance>) -> Result<CaseReport> {
    let case = LayerCase::open(json_path)?;
    let computed = case.compute::<T>()?;
    Ok(case.compare(&computed, tolerance.unwrap_or_else(|| Tolerance::of(case.precision))))
}

/// Largest difference over the recorded tensor's largest value, or over `scale` where that is
/// larger.
fn distance(recorded: &[f64], computed: &[f64], scale: f64) -> f64 {
    let top = recorded.iter().fold(scale, |top: f64, x| top.max(x.abs()));
    largest_difference(recorded, computed, |_| top)
}

/// Largest difference, each over the `scale` of its recorded value.
fn largest_difference(recorded: &[f64], computed: &[f64], scale: impl Fn(f64) -> f64) -> f64 {
    let pairs = recorded.iter().zip(computed);
    let differences = pairs.map(|(&a, &b)| if a == b { 0.0 } else { (a - b).abs() / scale(a) });
    differences.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

fn share_different(recorded: &[f64], computed: &[f64]) -> f64 {
    let different = recorded.iter().zip(computed).filter(|(a, b)| a != b).count();
    different as f64 / recorded.len().max(1) as f64
}
