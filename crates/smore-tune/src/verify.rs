//! Recorded cases of other implementations, computed again and compared.
//!
//! A layer case is a pair `name.json` (settings) and `name.safetensors` (parameters, inputs,
//! outputs and gradients recorded from the authors' code or from a user's own).

use crate::error::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use smore::adapter::Smore;
use smore::config::{GateConfig, LayerConfig, SmoreConfig};
use smore::kernel::{GateNoise, Pass, hidden_states};
use smore::spec::SmoreSpec;
use smore_engine::{Cpu, Float, View, ViewMut};
use std::collections::BTreeMap;
use std::path::Path;

/// What a case may differ by, relative to the largest value of each tensor.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Outputs, hidden states, gate weights, balance losses.
    pub values: f64,
    /// Gradients.
    pub gradients: f64,
}

impl Default for Tolerance {
    fn default() -> Self {
        Self { values: 2e-5, gradients: 2e-4 }
    }
}

/// How far one computed tensor is from the recorded one.
#[derive(Clone, Debug)]
pub struct Check {
    /// Its name in the case.
    pub tensor: String,
    /// Largest difference over the recorded tensor's largest value.
    pub error: f64,
    /// What was allowed.
    pub allowed: f64,
}

impl Check {
    /// Within what was allowed; a NaN is not.
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }
}

/// The comparison of one case.
#[derive(Clone, Debug)]
pub struct CaseReport {
    /// Name of the case.
    pub name: String,
    /// One entry per recorded tensor that was compared.
    pub checks: Vec<Check>,
}

impl CaseReport {
    /// True where every tensor is within its tolerance, and there was one.
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(Check::passed)
    }

    /// The worst tensor, measured against what was allowed.
    pub fn worst(&self) -> Option<&Check> {
        let badness = |c: &Check| if c.error.is_nan() { f64::INFINITY } else { c.error / c.allowed };
        self.checks.iter().max_by(|a, b| badness(a).total_cmp(&badness(b)))
    }
}

/// A recorded tensor as `f64` and its shape.
type Recorded = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// A layer case as read.
struct LayerCase {
    name: String,
    smore: Smore,
    tensors: Recorded,
    has_mask: bool,
    json: Value,
}

/// Computes a layer case in `T` and compares everything that was recorded.
///
/// # Errors
/// If the case cannot be read or names settings that S'MoRE does not have.
pub fn layer_case<T: Float>(json_path: &Path, tolerance: Tolerance) -> Result<CaseReport> {
    let case = LayerCase::open(json_path)?;
    let computed = case.compute::<T>()?;
    let mut checks = Vec::new();
    for (name, (_, recorded)) in &case.tensors {
        if let Some(values) = computed.get(name) {
            let gradient = name.starts_with("grad.") || name.starts_with("balance_grad.");
            let allowed = if gradient { tolerance.gradients } else { tolerance.values };
            // A chosen expert is right or wrong.
            let allowed = if name.starts_with("topk_idx") { 0.0 } else { allowed };
            let floor = case.noise_floor(name);
            let error = distance(recorded, values, floor);
            checks.push(Check { tensor: name.clone(), error, allowed });
        } else if name.starts_with("grad.") {
            return Err(case.error(&format!("`{name}` was recorded but is no parameter of ours")));
        }
    }
    Ok(CaseReport { name: case.name, checks })
}

/// Largest difference over the recorded tensor's largest value, or over `floor` where that is
/// larger.
fn distance(recorded: &[f64], computed: &[f64], floor: f64) -> f64 {
    if recorded.len() != computed.len() {
        return f64::NAN;
    }
    let top = recorded.iter().fold(floor, |top: f64, x| top.max(x.abs()));
    let differences = recorded.iter().zip(computed).map(|(a, b)| (a - b).abs() / top);
    differences.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

impl LayerCase {
    fn open(json_path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(json_path)
            .map_err(|source| Error::Io { path: json_path.to_path_buf(), source })?;
        let bad = |message: String| Error::Data {
            file: json_path.to_path_buf(),
            line: None,
            message,
        };
        let json: Value =
            serde_json::from_str(&text).map_err(|e| bad(format!("not valid JSON: {e}")))?;
        let tensors = read_tensors(&json_path.with_extension("safetensors"))?;
        let size = |key: &str| {
            json[key].as_u64().map(|n| n as usize).ok_or_else(|| bad(format!("no number `{key}`")))
        };
        let (config, widths) = authors_config(&json["config"]).map_err(&bad)?;
        let spec = SmoreSpec::with_router_widths(&config, &widths, size("d_in")?, size("d_out")?)
            .map_err(|e| bad(e.to_string()))?;
        let name = json_path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let has_mask = json["has_mask"].as_bool().unwrap_or(false);
        Ok(Self { name, smore: Smore::new(spec), tensors, has_mask, json })
    }

    fn error(&self, message: &str) -> Error {
        Error::Data { file: self.name.clone().into(), line: None, message: message.into() }
    }

    fn tensor<T: Float>(&self, name: &str) -> Result<Vec<T>> {
        let (_, values) =
            self.tensors.get(name).ok_or_else(|| self.error(&format!("no tensor `{name}`")))?;
        Ok(values.iter().map(|&x| T::from_f64(x)).collect())
    }

    fn params<T: Float>(&self) -> Result<Vec<T>> {
        let mut params = vec![T::ZERO; self.smore.layout.len];
        for param in &self.smore.layout.params {
            let name = format!("param.{}", param.name);
            let (shape, _) =
                self.tensors.get(&name).ok_or_else(|| self.error(&format!("no tensor `{name}`")))?;
            if *shape != param.shape {
                let expected = &param.shape;
                return Err(self.error(&format!("`{name}` is {shape:?}, expected {expected:?}")));
            }
            params[param.range()].copy_from_slice(&self.tensor(&name)?);
        }
        Ok(params)
    }

    /// Everything the case may have recorded, under its names.
    fn compute<T: Float>(&self) -> Result<BTreeMap<String, Vec<f64>>> {
        let (smore, spec) = (&self.smore, &self.smore.spec);
        let device = Cpu::<T>::new();
        let (params, x, g) = (self.params::<T>()?, self.tensor::<T>("x")?, self.tensor::<T>("g")?);
        let n = x.len() / spec.d_in;
        let mask: Option<Vec<bool>> = if self.has_mask {
            Some(self.tensor::<f64>("attention_mask")?.iter().map(|&m| m != 0.0).collect())
        } else {
            None
        };
        let valid = mask.as_deref();
        let noise = self.noise::<T>()?;
        let base = self.tensor::<T>("base.weight")?;
        let mut y = base_output(&base, &x, spec.d_in, spec.d_out);
        if let Ok(bias) = self.tensor::<T>("base.bias") {
            for row in y.chunks_exact_mut(spec.d_out) {
                row.iter_mut().zip(&bias).for_each(|(y, &b)| *y += b);
            }
        }
        let target = ViewMut::new(&mut y, n * spec.d_out);
        let saved =
            smore.forward_with(&device, valid, noise.as_ref(), whole(&params), whole(&x), target);
        // Twice: with the whole loss, and with the balance loss alone.
        let backward = |g: &Vec<T>, base: bool| {
            let mut grads = vec![T::ZERO; smore.layout.len];
            let mut dx = vec![T::ZERO; x.len()];
            if base {
                dx = base_input_grad(&self.tensor::<T>("base.weight")?, g, spec.d_in);
            }
            smore.backward_with(
                &device,
                valid,
                noise.as_ref(),
                1.0,
                whole(&params),
                &saved,
                whole(&x),
                whole(g),
                ViewMut::new(&mut grads, smore.layout.len),
                Some(ViewMut::new(&mut dx, n * spec.d_in)),
            );
            Ok::<_, Error>((grads, dx))
        };
        let mut out = BTreeMap::new();
        for (prefix, g, base) in
            [("grad", g.clone(), true), ("balance_grad", vec![T::ZERO; g.len()], false)]
        {
            let (grads, dx) = backward(&g, base)?;
            for param in &smore.layout.params {
                let values = to_f64(&grads[param.range()]);
                out.insert(format!("{prefix}.{}", param.name), values);
            }
            out.insert(format!("{prefix}.x"), to_f64(&dx));
        }
        let loss_y: f64 = y.iter().zip(&g).map(|(&y, &g)| y.to_f64() * g.to_f64()).sum();
        let balance: f64 = saved.routing.balance_losses.iter().sum();
        out.insert("y".into(), to_f64(&y));
        out.insert("loss_y".into(), vec![loss_y]);
        out.insert("balance_loss".into(), vec![balance]);
        out.insert("loss".into(), vec![loss_y + balance]);
        let pass =
            Pass { spec, layout: &smore.layout, valid, noise: noise.as_ref() };
        let hidden = hidden_states(&pass, &saved.routing, &params, &saved.z);
        for (l, hidden) in hidden.iter().enumerate() {
            let tree = &saved.routing.tree.layers[l];
            out.insert(format!("hidden.{l}"), to_f64(hidden));
            out.insert(format!("topk_score.{l}"), to_f64(&tree.gate_weight));
            let idx = tree.expert_idx.iter().map(|&i| f64::from(i)).collect();
            out.insert(format!("topk_idx.{l}"), idx);
            let loss = saved.routing.balance_losses[l];
            out.insert(format!("layer_balance_loss.{l}"), vec![loss]);
        }
        Ok(out)
    }

    fn noise<T: Float>(&self) -> Result<Option<GateNoise<T>>> {
        if !self.tensors.contains_key("noise.0") {
            return Ok(None);
        }
        let layers = (0..self.smore.spec.depth())
            .map(|l| self.tensor(&format!("noise.{l}")))
            .collect::<Result<_>>()?;
        Ok(Some(GateNoise { layers }))
    }

    /// The smallest scale that means anything: a gradient that is zero in theory is recorded as
    /// rounding noise, and the balance loss's gradients are differences of numbers of its own size.
    fn noise_floor(&self, tensor: &str) -> f64 {
        let balance = self.json["balance_loss"].as_f64().unwrap_or(0.0);
        if tensor.starts_with("balance_grad.") { (1e-3 * balance).max(1e-5) } else { 1e-5 }
    }
}

fn whole<T: Float>(values: &Vec<T>) -> View<'_, Cpu<T>> {
    View::new(values, values.len())
}

fn to_f64<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// x W^T in f64.
fn base_output<T: Float>(w: &[T], x: &[T], d_in: usize, d_out: usize) -> Vec<T> {
    let mut y = Vec::with_capacity(x.len() / d_in * d_out);
    for x in x.chunks_exact(d_in) {
        for w in w.chunks_exact(d_in) {
            let sum: f64 = x.iter().zip(w).map(|(&x, &w)| x.to_f64() * w.to_f64()).sum();
            y.push(T::from_f64(sum));
        }
    }
    y
}

/// g W in f64.
fn base_input_grad<T: Float>(w: &[T], g: &[T], d_in: usize) -> Vec<T> {
    let d_out = w.len() / d_in;
    let mut dx = Vec::with_capacity(g.len() / d_out * d_in);
    for g in g.chunks_exact(d_out) {
        for i in 0..d_in {
            let sum: f64 =
                g.iter().enumerate().map(|(o, &g)| g.to_f64() * w[o * d_in + i].to_f64()).sum();
            dx.push(T::from_f64(sum));
        }
    }
    dx
}

/// Reads every tensor of a file as `f64`.
fn read_tensors(path: &Path) -> Result<Recorded> {
    let bytes =
        std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let bad = |message: String| Error::Data { file: path.to_path_buf(), line: None, message };
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut tensors = Recorded::new();
    for (name, t) in file.tensors() {
        let data = t.data();
        let values = match t.dtype() {
            Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            Dtype::F64 => data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => {
                data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect()
            }
            Dtype::BF16 => data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| half::bf16::from_le_bytes(*b).to_f64())
                .collect(),
            other => return Err(bad(format!("`{name}` is {other:?}; expected a float or I64"))),
        };
        tensors.insert(name.clone(), (t.shape().to_vec(), values));
    }
    Ok(tensors)
}

/// The authors' constructor arguments in our words, and the router width of every layer.
fn authors_config(config: &Value) -> std::result::Result<(SmoreConfig, Vec<usize>), String> {
    let list = |key: &str| -> std::result::Result<Vec<usize>, String> {
        serde_json::from_value(config[key].clone()).map_err(|e| format!("config.{key}: {e}"))
    };
    let (s, f, r, widths) = (list("s")?, list("f")?, list("r")?, list("d_g")?);
    if s.len() != f.len() || s.len() != r.len() {
        return Err("config.s, config.f and config.r have different lengths".into());
    }
    let alphas: Option<Vec<f64>> = serde_json::from_value(config["lora_alpha"].clone())
        .map_err(|e| format!("config.lora_alpha: {e}"))?;
    let layers = (0..s.len())
        .map(|l| LayerConfig {
            experts: s[l],
            fanout: f[l],
            rank: r[l],
            lora_alpha: alphas.as_ref().and_then(|a| a.get(l).copied()),
        })
        .collect();
    let word = |key: &str| -> Value { config[key].clone() };
    fn read<T: serde::de::DeserializeOwned>(
        key: &str,
        value: Value,
    ) -> std::result::Result<T, String> {
        serde_json::from_value(value).map_err(|e| format!("config.{key}: {e}"))
    }
    let width = config["dim_downproj_x"].as_i64().unwrap_or(0).max(0);
    let gate = GateConfig {
        kind: read("gate_type", word("gate_type"))?,
        architecture: read("gate_arch", word("gate_arch"))?,
        balance_weight: read("balance_loss_weight", word("balance_loss_weight"))?,
        router_width: widths.first().copied().unwrap_or(1),
        router_input_width: width as usize,
        activation: read("gate_act_fn", word("gate_act_fn"))?,
        ancestor_keys: true,
    };
    let config = SmoreConfig {
        targets: vec![],
        layers,
        gate,
        activation: read("expert_act_fn", word("expert_act_fn"))?,
        activation_position: read("activation_position", word("activation_position"))?,
        shared_pool: read("is_shared_expert_pool", word("is_shared_expert_pool"))?,
        structure: smore::config::Structure::Tree,
        init: read("init_method", word("init_method"))?,
    };
    Ok((config, widths))
}
