//! What the user wrote about an adapter, as read from the `adapter:` section of a run's YAML.
//!
//! Nothing here is checked beyond its type; [`crate::spec`] validates it once and derives every
//! number that follows from it.

use crate::targets::Targets;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// A S'MoRE adapter (`kind: smore`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmoreConfig {
    /// The linear maps to adapt.
    #[serde(default)]
    pub targets: Targets,
    /// One record per S'MoRE layer, leaves first.
    pub layers: Vec<LayerConfig>,
    /// How children are chosen.
    #[serde(default)]
    pub gate: GateConfig,
    /// The activation sigma between layers.
    #[serde(default)]
    pub activation: Activation,
    /// Where sigma stands.
    #[serde(default)]
    pub activation_position: ActivationPosition,
    /// S'MoRE#: one set of experts serves every layer.
    #[serde(default)]
    pub shared_pool: bool,
    /// What the layers form: a tree, or less for an ablation.
    #[serde(default)]
    pub structure: Structure,
    /// How the parameters start.
    #[serde(default)]
    pub init: Init,
}

impl SmoreConfig {
    /// These layers, leaves first, and everything else as it is by default.
    pub fn new(layers: Vec<LayerConfig>) -> Self {
        Self {
            targets: Targets::default(),
            layers,
            gate: GateConfig::default(),
            activation: Activation::default(),
            activation_position: ActivationPosition::default(),
            shared_pool: false,
            structure: Structure::default(),
            init: Init::default(),
        }
    }
}

/// One S'MoRE layer: `experts` (s), `fanout` (f) and `rank` (r) of the paper.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Residual experts in this layer (s).
    pub experts: usize,
    /// Children that each active parent picks in this layer (f).
    pub fanout: usize,
    /// Rank of each expert (r).
    pub rank: usize,
    /// The layer's residuals are scaled by `lora_alpha / rank`, or by 1 where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
}

/// The router's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateConfig {
    /// Which gate turns logits into a choice.
    pub kind: GateKind,
    /// Whether a small network or the keys alone look at the router's input.
    pub architecture: RouterArchitecture,
    /// Weight w of the balance loss.
    pub balance_weight: f64,
    /// Hidden width of the router's network and length of the keys (m).
    pub router_width: usize,
    /// Width of the router's view of the token; 0 means the full width of the input.
    pub router_input_width: usize,
    /// Activation inside the router's network.
    pub activation: Activation,
    /// Children are chosen with the keys of their ancestors in view. `false` is an ablation: it
    /// tests the paper's claim that hierarchical routing matters (Sec. 3.3). All parents of a
    /// token then choose the same children.
    pub ancestor_keys: bool,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            kind: GateKind::Switch,
            architecture: RouterArchitecture::Mlp,
            balance_weight: 0.01,
            router_width: 32,
            router_input_width: 32,
            activation: Activation::Relu,
            ancestor_keys: true,
        }
    }
}

/// What the layers of experts form. To test the claim that the non-linearity between layers
/// matters, keep the tree and set `activation: identity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Structure {
    /// Every active node chooses its own children: S'MoRE.
    #[default]
    Tree,
    /// MoMOR, the paper's Eq. 2: residuals of all orders without a tree. Every layer chooses once
    /// per token, as many experts as its tree could hold (min(F_l, s_l)), and hands its sum to the
    /// layer above. Needs `activation: identity`. Tests the claim that structure adds flexibility
    /// (Thms. 3.3 and 3.4).
    MultiOrder,
    /// MoLRE, a flat mixture of low-rank experts: one layer, `activation: identity`. Tests the
    /// claim that residuals of higher order matter.
    Flat,
}

/// The gate (spec section 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// Softmax over all experts, the top f kept and renormalised (Fedus et al. 2022).
    #[default]
    Switch,
    /// Cosine scores with learned noise in training, softmax over the top f (Shazeer et al. 2017).
    NoisyTopk,
    /// Softmax over all experts, all of them active (HydraLoRA).
    Dense,
}

/// What computes the router's logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterArchitecture {
    /// A two-layer network gives a query that meets the experts' keys.
    #[default]
    Mlp,
    /// The keys meet the router's input directly. (The noisy gate always uses the network.)
    Linear,
    /// Routing from the leaves to the root (paper, App. B.2); see [`crate::router::bottom_up`].
    BottomUp,
}

/// A pointwise non-linearity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Activation {
    /// sigma(v) = v
    Identity,
    /// sigma(v) = max(v, 0)
    Relu,
    /// sigma(v) = tanh(v)
    #[default]
    Tanh,
    /// sigma(v) = max(v, 0) + a min(v, 0), a learned and starting at this value; written
    /// `prelu|0.25`.
    Prelu(f64),
}

impl TryFrom<String> for Activation {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "identity" => return Ok(Self::Identity),
            "relu" => return Ok(Self::Relu),
            "tanh" => return Ok(Self::Tanh),
            _ => {}
        }
        match text.strip_prefix("prelu|").map(str::parse::<f64>) {
            Some(Ok(slope)) if slope.is_finite() => Ok(Self::Prelu(slope)),
            _ if text.starts_with("prelu") => {
                Err(format!("activation `{text}` has no slope to start from; write `prelu|0.25`"))
            }
            _ => Err(format!(
                "unknown activation `{text}`; expected identity, relu, tanh or prelu|<slope>"
            )),
        }
    }
}

impl From<Activation> for String {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Identity => "identity".into(),
            Activation::Relu => "relu".into(),
            Activation::Tanh => "tanh".into(),
            Activation::Prelu(slope) => format!("prelu|{slope}"),
        }
    }
}

/// Where the activation stands in a layer's sum (spec section 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPosition {
    /// sum of alpha sigma(u + W x + b): the paper's Eq. 3.
    #[default]
    All,
    /// sum of alpha u + W sigma(x) + b: S'MoRE*, Eq. 38, as in the authors' code.
    Child,
    /// sum of alpha (u + W sigma(x) + b).
    ChildV2,
}

/// How the parameters start (spec section 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Kaiming uniform everywhere, the output projection zero: the adapter starts as the zero map.
    #[default]
    WFinalZero,
    /// Up factors and transforms start as shifted identities, so that with sigma = identity the
    /// layers act as one (paper, Props. 3.1 and 3.2); the output projection is zero.
    #[serde(rename = "eq_1_layer")]
    Eq1Layer,
    /// Up factors zero.
    BZero,
    /// Up factors and transforms zero.
    BwZero,
    /// Nothing zero: the adapter changes the base from the start.
    Normal,
}

/// A plain LoRA (`kind: lora`): y += (alpha / rank) B A x.
///
/// The patterns are matched by who knows the module paths; see `smore_tune::targets`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// The linear maps to adapt.
    #[serde(default)]
    pub targets: Targets,
    /// Rank of both factors.
    pub rank: usize,
    /// Scale numerator; twice the rank where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rslora: bool,
    /// Other ranks for some modules: a pattern for the end of a module's path, and the rank. The
    /// first pattern that fits decides.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub rank_pattern: IndexMap<String, usize>,
    /// Other values of alpha for some modules, as in `rank_pattern`.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub alpha_pattern: IndexMap<String, f64>,
}

impl LoraConfig {
    /// A LoRA of one rank on the FFN.
    pub fn new(rank: usize) -> Self {
        Self {
            targets: Targets::default(),
            rank,
            alpha: None,
            rslora: false,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
        }
    }
}

/// HydraLoRA (`kind: hydra_lora`): y += (alpha / rank) sum_i softmax(R x)_i B_i A x.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HydraLoraConfig {
    /// The linear maps to adapt.
    #[serde(default)]
    pub targets: Targets,
    /// Up factors B_i that share one A.
    pub heads: usize,
    /// Rank of all factors.
    pub rank: usize,
    /// Scale numerator; twice the rank where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
}

/// MixLoRA (`kind: mix_lora`): experts that are whole FFNs, the base's with LoRAs of their own,
/// behind one gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixLoraConfig {
    /// The linear maps to adapt: those of the FFN get a LoRA per expert, others a plain LoRA.
    #[serde(default)]
    pub targets: Targets,
    /// Experts of every FFN.
    pub experts: usize,
    /// Experts that act on a token (top-k).
    pub fanout: usize,
    /// Rank of every LoRA.
    pub rank: usize,
    /// Scale numerator; twice the rank where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Weight w of the balance loss.
    #[serde(default = "default_balance_weight")]
    pub balance_weight: f64,
}

fn default_balance_weight() -> f64 {
    GateConfig::default().balance_weight
}
