//! What the user wrote about an adapter, as read from the `adapter:` section of a run's YAML.
//!
//! Nothing here is checked beyond its type; [`crate::spec`] validates it once and derives every
//! number that follows from it.

use serde::{Deserialize, Serialize};

/// A S'MoRE adapter (`kind: smore`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmoreConfig {
    /// Names of the linear maps to adapt, in every transformer block.
    #[serde(default = "default_targets")]
    pub targets: Vec<String>,
    /// One record per S'MoRE layer, leaves first.
    pub layers: Vec<LayerConfig>,
    /// How children are chosen.
    #[serde(default)]
    pub gate: GateConfig,
    /// The activation sigma between layers.
    #[serde(default)]
    pub activation: Activation,
    /// How the parameters start.
    #[serde(default)]
    pub init: Init,
}

/// One S'MoRE layer: `experts` (s), `fanout` (f) and `rank` (r) of the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Residual experts in this layer (s).
    pub experts: usize,
    /// Children that each active parent picks in this layer (f).
    pub fanout: usize,
    /// Rank of each expert (r).
    pub rank: usize,
}

/// The router's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateConfig {
    /// Which gate turns logits into a choice.
    pub kind: GateKind,
    /// Weight w of the balance loss.
    pub balance_weight: f64,
    /// Hidden width of the router's network and length of the keys (m).
    pub router_width: usize,
    /// Width of the router's view of the token.
    pub router_input_width: usize,
    /// Activation inside the router's network.
    pub activation: Activation,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            kind: GateKind::Switch,
            balance_weight: 0.01,
            router_width: 32,
            router_input_width: 32,
            activation: Activation::Relu,
        }
    }
}

/// The gate (spec section 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// Softmax over all experts, the top f kept and renormalised (Fedus et al. 2022).
    #[default]
    Switch,
}

/// A pointwise non-linearity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// sigma(v) = v
    Identity,
    /// sigma(v) = max(v, 0)
    Relu,
    /// sigma(v) = tanh(v)
    #[default]
    Tanh,
}

/// How the parameters start (spec section 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Kaiming uniform everywhere, the output projection zero: the adapter starts as the zero map.
    #[default]
    WFinalZero,
}

/// A plain LoRA (`kind: lora`): y += (alpha / rank) B A x.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Names of the linear maps to adapt, in every transformer block.
    #[serde(default = "default_targets")]
    pub targets: Vec<String>,
    /// Rank of both factors.
    pub rank: usize,
    /// Scale numerator; twice the rank where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
}

fn default_targets() -> Vec<String> {
    ["gate_proj", "up_proj", "down_proj"].map(String::from).to_vec()
}
