//! A layer case as it lies on disk: settings and recorded tensors.

use super::Precision;
use crate::error::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use smore::adapter::Smore;
use smore::config::{
    Activation, ActivationPosition, GateConfig, GateKind, Init, LayerConfig, RouterArchitecture,
    SmoreConfig, Structure,
};
use smore::spec::SmoreSpec;
use smore::targets::Targets;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor as `f64`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its shape; empty for a single number.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub values: Vec<f64>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A layer case as read; see the documentation of [`super`] for its layout.
pub struct LayerCase {
    /// Its name: the file's, without the ending.
    pub name: String,
    /// The arithmetic it was recorded in.
    pub precision: Precision,
    /// Everything that was recorded.
    pub tensors: Tensors,
    pub(super) smore: Smore,
    /// Whether the recording ran in training; unknown where absent.
    pub(super) train: Option<bool>,
    /// Whether padding was masked; unknown where absent.
    pub(super) masked: Option<bool>,
    /// Whether the base has a bias; unknown where absent.
    pub(super) biased: Option<bool>,
    tensor_file: PathBuf,
}

#[derive(Deserialize)]
struct Settings {
    config: Arguments,
    d_in: usize,
    d_out: usize,
    #[serde(default)]
    dtype: Precision,
    train_mode: Option<bool>,
    has_mask: Option<bool>,
    base_bias: Option<bool>,
}

/// Constructor arguments of the authors' module that bear on what it computes.
#[derive(Deserialize)]
struct Arguments {
    s: Vec<usize>,
    f: Vec<usize>,
    r: Vec<usize>,
    d_g: Vec<usize>,
    dim_downproj_x: Option<i64>,
    gate_type: GateKind,
    gate_arch: Option<RouterArchitecture>,
    gate_act_fn: Option<Activation>,
    expert_act_fn: Activation,
    activation_position: Option<ActivationPosition>,
    lora_alpha: Option<Alphas>,
    balance_loss_weight: Option<f64>,
    is_shared_expert_pool: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Alphas {
    Same(f64),
    Each(Vec<Option<f64>>),
}

impl LayerCase {
    /// Reads `name.json` and the `name.safetensors` beside it.
    ///
    /// # Errors
    /// Names the file and the line, key or tensor.
    pub fn open(json_path: &Path) -> Result<Self> {
        let bytes = read(json_path, "a case's settings")?;
        let settings: Settings = serde_json::from_slice(&bytes).map_err(|e| Error::Data {
            file: json_path.to_path_buf(),
            line: Some(e.line()),
            message: format!("no layer case's settings: {e}, after `{}`", text_before(&bytes, &e)),
        })?;
        let bad = |message: String| data_error(json_path, message);
        if settings.d_in == 0 || settings.d_out == 0 {
            return Err(bad("`d_in` and `d_out` must be above 0".into()));
        }
        let (config, widths) = settings.config.in_our_words().map_err(bad)?;
        let spec = SmoreSpec::with_router_widths(&config, &widths, settings.d_in, settings.d_out)
            .map_err(|e| bad(format!("config: {e}")))?;
        let tensor_file = json_path.with_extension("safetensors");
        let case = Self {
            name: json_path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            precision: settings.dtype,
            tensors: read_tensors(&tensor_file)?,
            smore: Smore::new(spec),
            train: settings.train_mode,
            masked: settings.has_mask,
            biased: settings.base_bias,
            tensor_file,
        };
        case.check_names()?;
        Ok(case)
    }

    /// An error about the case's tensors.
    pub(super) fn error(&self, message: String) -> Error {
        data_error(&self.tensor_file, message)
    }

    /// The tensor `name`, which the computation needs.
    pub(super) fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| self.error(format!("tensor `{name}` is missing")))
    }

    /// The elements of the tensor `name`, which must be of this shape.
    pub(super) fn shaped(&self, name: &str, expected: &[usize]) -> Result<&[f64]> {
        let tensor = self.tensor(name)?;
        self.check_shape(name, &tensor.shape, expected)?;
        Ok(&tensor.values)
    }

    /// Shapes are the same if they are so without their dimensions of size 1.
    pub(super) fn check_shape(
        &self,
        name: &str,
        shape: &[usize],
        expected: &[usize],
    ) -> Result<()> {
        let wide = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
        if wide(shape) == wide(expected) {
            return Ok(());
        }
        Err(self.error(format!("`{name}` has shape {shape:?}; expected {expected:?}")))
    }

    /// Parameters and gradients of unknown names mean that settings and tensors do not belong
    /// together.
    fn check_names(&self) -> Result<()> {
        for (name, tensor) in &self.tensors {
            let split = ["param.", "grad.", "balance_grad."]
                .iter()
                .find_map(|prefix| Some((*prefix, name.strip_prefix(prefix)?)));
            let Some((prefix, param)) = split else { continue };
            let known = self.smore.layout.params.iter().any(|p| p.name == param)
                || (param == "x" && prefix != "param.");
            if known {
                continue;
            }
            let Some(first) = self.pool_name(param) else {
                let message = format!("`{name}`: the settings have no parameter `{param}`");
                return Err(self.error(message));
            };
            let first = format!("{prefix}{first}");
            if *tensor != *self.tensor(&first)? {
                let message =
                    format!("`{name}` is no copy of `{first}`, though the pool is shared");
                return Err(self.error(message));
            }
        }
        Ok(())
    }

    /// The name under which a shared pool's copy in a higher layer is kept.
    fn pool_name(&self, param: &str) -> Option<String> {
        let (stem, layer) = param.rsplit_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let spec = &self.smore.spec;
        let pooled = ["moe_A", "moe_B", "moe_A_bias", "moe_B_bias"].contains(&stem);
        (spec.shared_pool && pooled && layer < spec.depth()).then(|| format!("{stem}.0"))
    }
}

impl Arguments {
    /// The same in our words, and the router width of every layer.
    fn in_our_words(&self) -> std::result::Result<(SmoreConfig, Vec<usize>), String> {
        let depth = self.s.len();
        for (key, list) in [("f", &self.f), ("r", &self.r)] {
            if list.len() != depth {
                let found = list.len();
                return Err(format!(
                    "config.{key} has {found} entries but config.s has {depth}; give one per layer"
                ));
            }
        }
        let widths = match self.d_g[..] {
            [one] => vec![one; depth],
            _ => self.d_g.clone(),
        };
        let alphas = match &self.lora_alpha {
            None => vec![None; depth],
            Some(Alphas::Same(alpha)) => vec![Some(*alpha); depth],
            Some(Alphas::Each(alphas)) if alphas.len() == depth => alphas.clone(),
            Some(Alphas::Each(alphas)) => {
                let found = alphas.len();
                return Err(format!("config.lora_alpha has {found} entries for {depth} layers"));
            }
        };
        let layers = (0..depth)
            .map(|l| LayerConfig {
                experts: self.s[l],
                fanout: self.f[l],
                rank: self.r[l],
                lora_alpha: alphas[l],
            })
            .collect();
        let unsaid = GateConfig::default();
        let gate = GateConfig {
            kind: self.gate_type,
            architecture: self.gate_arch.unwrap_or(unsaid.architecture),
            balance_weight: self.balance_loss_weight.unwrap_or(unsaid.balance_weight),
            router_width: widths.first().copied().unwrap_or(1),
            router_input_width: self.dim_downproj_x.unwrap_or(0).max(0) as usize,
            activation: self.gate_act_fn.unwrap_or(unsaid.activation),
            ..unsaid
        };
        let config = SmoreConfig {
            targets: Targets::default(),
            layers,
            gate,
            activation: self.expert_act_fn,
            activation_position: self.activation_position.unwrap_or_default(),
            shared_pool: self.is_shared_expert_pool.unwrap_or(false),
            structure: Structure::Tree,
            init: Init::default(),
        };
        Ok((config, widths))
    }
}

pub(super) fn data_error(file: &Path, message: String) -> Error {
    Error::Data { file: file.to_path_buf(), line: None, message }
}

/// A file's bytes. All that keeps a case from being read is wrong with the case.
pub(super) fn read(path: &Path, what: &str) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| match Error::reading(path, what, source) {
        Error::Io { path, source } => data_error(&path, format!("cannot be read: {source}")),
        missing => missing,
    })
}

/// The end of what was read before the error, within its line: it shows the key.
fn text_before(json: &[u8], error: &serde_json::Error) -> String {
    let line = json.split(|&b| b == b'\n').nth(error.line().saturating_sub(1)).unwrap_or(&[]);
    let read = &line[..error.column().min(line.len())];
    let end = &read[read.len().saturating_sub(60)..];
    String::from_utf8_lossy(end).trim().to_owned()
}

/// Reads every tensor of a safetensors file: a recorded case's or a dump's.
///
/// # Errors
/// If the file is missing, cut or holds a type that is neither float, integer nor bool.
pub fn read_tensors(path: &Path) -> Result<Tensors> {
    let bytes = read(path, "the tensors of the case")?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| data_error(path, format!("no whole safetensors file: {e}")))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.tensors() {
        let values = numbers(view.dtype(), view.data()).ok_or_else(|| {
            let dtype = view.dtype();
            data_error(path, format!("`{name}` is {dtype:?}; expected floats, integers or bools"))
        })?;
        tensors.insert(name.clone(), Tensor { shape: view.shape().to_vec(), values });
    }
    Ok(tensors)
}

fn numbers(dtype: Dtype, data: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        data.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)).collect()
    }
    Some(match dtype {
        Dtype::F64 => each(data, f64::from_le_bytes),
        Dtype::F32 => each(data, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F16 => each(data, |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(data, |b| half::bf16::from_le_bytes(b).to_f64()),
        Dtype::I64 => each(data, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => each(data, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U8 | Dtype::BOOL => each(data, |[b]: [u8; 1]| f64::from(b)),
        _ => return None,
    })
}
