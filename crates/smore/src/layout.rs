//! Where each parameter of an adapter lies.
//!
//! An adapter's parameters are one contiguous run of numbers, so that an optimizer, a gradient norm
//! or an all-reduce sees one buffer. Its order serves the arithmetic: the down factors of all
//! layers and the router's projection form one matrix `[stack_width, d_in]`, their biases one row.

use crate::config::{Activation, GateKind, RouterArchitecture};
use crate::spec::{HydraLoraSpec, LoraSpec, MixLoraSpec, SmoreSpec};
use std::ops::Range;

/// One named parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in an adapter file, below the module path: the authors' for S'MoRE, PEFT's for LoRA.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its first element in the adapter's run of numbers.
    pub offset: usize,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True where the shape holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part of a router that it is; `None` for what computes residuals.
    pub fn router(&self) -> Option<RouterPart> {
        if let Some(layer) = self.name.strip_prefix("moe_gate.") {
            return layer.split('.').next()?.parse().ok().map(RouterPart::Layer);
        }
        match self.name.as_str() {
            name if name.starts_with("moe_downproj_x.") => Some(RouterPart::Shared),
            "lora_route.weight" | "mlp.moe_gate.weight" => Some(RouterPart::Layer(0)),
            _ => None,
        }
    }

    /// Its elements in the adapter's run of numbers.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// What a router's parameter serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterPart {
    /// One layer, 0 at the leaves.
    Layer(usize),
    /// All layers.
    Shared,
}

/// Parameters of S'MoRE on one linear map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmoreLayout {
    /// All parameters, in order of their offsets.
    pub params: Vec<Param>,
    /// Total number of elements.
    pub len: usize,
    /// First element of the stacked biases `[stack_width]`; the stacked matrix starts at 0.
    pub stack_bias: usize,
    /// W_proj `[d_out, d_L]`
    pub output_proj: usize,
    /// bias_proj `[d_out]`
    pub output_bias: usize,
    /// From here on lies what the pass over tokens reads: up factors, transforms, routers.
    pub core: usize,
    /// Offsets of each layer's parameters.
    pub layers: Vec<LayerLayout>,
}

/// Offsets of one layer's parameters, counted from [`SmoreLayout::core`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLayout {
    /// B `[s, d_{l+1}, r]`
    pub up: usize,
    /// b `[s, d_{l+1}]`
    pub up_bias: usize,
    /// W `[d_{l+1}, d_l]` and its bias `[d_{l+1}]`, absent at the leaves
    pub transform: Option<(usize, usize)>,
    /// The router's network, absent in a linear router
    pub network: Option<NetworkLayout>,
    /// Keys `[s, key_width]`; of the bottom-up router `[F_1, s, d_down]` at the leaves and
    /// `[F_l, d_down]` above
    pub keys: usize,
    /// W_noise `[s, router_input]` of the noisy gate
    pub noise: Option<usize>,
    /// Slope `[1]` of a prelu between layers
    pub slope: Option<usize>,
}

/// Offsets of a router's two-layer network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkLayout {
    /// `[m, router_input]`
    pub first: usize,
    /// `[m]`
    pub first_bias: usize,
    /// `[m, m]`; `[s, m]` of the bottom-up router
    pub second: usize,
    /// `[m]`; `[s]` of the bottom-up router
    pub second_bias: usize,
    /// Slope `[1]` of a prelu between the two
    pub slope: Option<usize>,
}

/// Hands out offsets one after the other.
struct Cursor {
    params: Vec<Param>,
    next: usize,
    base: usize,
}

impl Cursor {
    fn put(&mut self, name: impl Into<String>, shape: &[usize]) -> usize {
        let param = Param { name: name.into(), shape: shape.to_vec(), offset: self.next };
        self.next += param.len();
        let offset = param.offset - self.base;
        self.params.push(param);
        offset
    }

    /// One factor (A or B) of the first `count` experts of an FFN on one of its maps.
    fn put_experts(&mut self, count: usize, factor: char, map: &str, shape: [usize; 2]) -> usize {
        let start = self.next - self.base;
        for e in 0..count {
            self.put(format!("mlp.{map}.experts.{e}.lora_{factor}.weight"), &shape);
        }
        start
    }
}

impl SmoreLayout {
    /// Lays out the parameters of `spec`.
    pub fn new(spec: &SmoreSpec) -> Self {
        let mut at = Cursor { params: Vec::new(), next: 0, base: 0 };
        // A shared pool is stored once, under the leaves' name.
        let pools = if spec.shared_pool { 1 } else { spec.depth() };
        for (l, layer) in spec.layers[..pools].iter().enumerate() {
            at.put(format!("moe_A.{l}"), &[layer.experts, layer.rank, spec.d_in]);
        }
        at.put("moe_downproj_x.weight", &[spec.gate.input_width, spec.d_in]);
        let stack_bias = at.next;
        for (l, layer) in spec.layers[..pools].iter().enumerate() {
            at.put(format!("moe_A_bias.{l}"), &[layer.experts, layer.rank]);
        }
        at.put("moe_downproj_x.bias", &[spec.gate.input_width]);
        let output_proj = at.put("moe_W_final", &[spec.d_out, spec.root_width()]);
        let output_bias = at.put("moe_W_final_bias", &[spec.d_out]);
        let core = at.next;
        at.base = core;
        let mut layers: Vec<LayerLayout> = Vec::with_capacity(spec.depth());
        for l in 0..spec.depth() {
            let pool = if l >= pools { Some((layers[0].up, layers[0].up_bias)) } else { None };
            layers.push(put_layer(&mut at, spec, l, pool));
        }
        Self { len: at.next, params: at.params, stack_bias, output_proj, output_bias, core, layers }
    }

    /// Number of elements from [`SmoreLayout::core`] on.
    pub fn core_len(&self) -> usize {
        self.len - self.core
    }
}

fn put_layer(
    at: &mut Cursor,
    spec: &SmoreSpec,
    l: usize,
    pool: Option<(usize, usize)>,
) -> LayerLayout {
    let layer = &spec.layers[l];
    let (s, width, input) = (layer.experts, layer.width, layer.router_input);
    let (up, up_bias) = pool.unwrap_or_else(|| {
        (
            at.put(format!("moe_B.{l}"), &[s, width, layer.rank]),
            at.put(format!("moe_B_bias.{l}"), &[s, width]),
        )
    });
    let transform = (l > 0).then(|| {
        (
            at.put(format!("moe_W.{l}"), &[width, layer.width_below]),
            at.put(format!("moe_W_bias.{l}"), &[width]),
        )
    });
    let has_network = match spec.gate.architecture {
        RouterArchitecture::Mlp => true,
        RouterArchitecture::Linear => false,
        RouterArchitecture::BottomUp => l > 0,
    };
    let network = has_network.then(|| {
        let m = layer.router_width;
        let out = if spec.bottom_up() { s } else { m };
        let prelu = matches!(spec.gate.activation, Activation::Prelu(_));
        NetworkLayout {
            first: at.put(format!("moe_gate.{l}.mlp.0.weight"), &[m, input]),
            first_bias: at.put(format!("moe_gate.{l}.mlp.0.bias"), &[m]),
            slope: prelu.then(|| at.put(format!("moe_gate.{l}.mlp.1.weight"), &[1])),
            second: at.put(format!("moe_gate.{l}.mlp.2.weight"), &[out, m]),
            second_bias: at.put(format!("moe_gate.{l}.mlp.2.bias"), &[out]),
        }
    });
    let mut key_shape = vec![s, layer.key_width];
    if spec.bottom_up() {
        // One key per position in the tree, from the top down; at the leaves one per expert too.
        let positions = spec.layers[l.max(1).min(spec.depth())..].iter().rev().map(|l| l.fanout);
        key_shape = positions.collect();
        key_shape.extend((l == 0).then_some(s));
        key_shape.push(layer.key_width);
    }
    let keys = at.put(format!("moe_gate.{l}.keys"), &key_shape);
    let noisy = spec.gate.kind == GateKind::NoisyTopk;
    let noise = noisy.then(|| at.put(format!("moe_gate.{l}.weight_noise.weight"), &[s, input]));
    let slope = matches!(spec.activation, Activation::Prelu(_))
        .then(|| at.put(format!("moe_expert_act_param.{l}"), &[1]));
    LayerLayout { up, up_bias, transform, network, keys, noise, slope }
}

/// Parameters of LoRA on one linear map: A `[r, d_in]` at 0, then B `[d_out, r]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraLayout {
    /// Both parameters.
    pub params: Vec<Param>,
    /// First element of B.
    pub up: usize,
    /// Total number of elements.
    pub len: usize,
}

impl LoraLayout {
    /// Lays out the parameters of `spec`.
    pub fn new(spec: &LoraSpec) -> Self {
        let mut at = Cursor { params: Vec::new(), next: 0, base: 0 };
        at.put("lora_A.weight", &[spec.rank, spec.d_in]);
        let up = at.put("lora_B.weight", &[spec.d_out, spec.rank]);
        Self { params: at.params, up, len: at.next }
    }
}

/// Parameters of HydraLoRA on one linear map: A `[r, d_in]` and the route `[N, d_in]`, stacked at 0,
/// then B_i `[d_out, r]` one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HydraLoraLayout {
    /// All parameters, in order of their offsets.
    pub params: Vec<Param>,
    /// First element of B_0.
    pub up: usize,
    /// Total number of elements.
    pub len: usize,
}

impl HydraLoraLayout {
    /// Lays out the parameters of `spec`.
    pub fn new(spec: &HydraLoraSpec) -> Self {
        let mut at = Cursor { params: Vec::new(), next: 0, base: 0 };
        at.put("lora_A.weight", &[spec.rank, spec.d_in]);
        at.put("lora_route.weight", &[spec.heads, spec.d_in]);
        let up = at.next;
        for i in 0..spec.heads {
            at.put(format!("lora_B{i}.weight"), &[spec.d_out, spec.rank]);
        }
        Self { params: at.params, up, len: at.next }
    }

    /// Elements of B_i.
    pub fn head(&self, spec: &HydraLoraSpec, i: usize) -> Range<usize> {
        let len = spec.d_out * spec.rank;
        self.up + i * len..self.up + (i + 1) * len
    }
}

/// Parameters of MixLoRA in one FFN. All that meets the FFN's input is one matrix
/// `[stack_width, hidden]` at 0: A of all experts on the gate map, on the up map, the router.
/// Names are below the block's path, as MoE-PEFT has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixLoraLayout {
    /// All parameters, in order of their offsets.
    pub params: Vec<Param>,
    /// Factors on the gate map, where it is adapted: A `[r, hidden]`, B `[intermediate, r]`.
    pub gate_proj: Option<ExpertFactors>,
    /// Factors on the up map, where it is adapted: A `[r, hidden]`, B `[intermediate, r]`.
    pub up_proj: Option<ExpertFactors>,
    /// Factors on the down map, where it is adapted: A `[r, intermediate]`, B `[hidden, r]`.
    pub down_proj: Option<ExpertFactors>,
    /// First element of the factors that lie outside the stack.
    pub stack_end: usize,
    /// Total number of elements.
    pub len: usize,
}

/// Where the experts' factors on one map start; expert e's are the e-th.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertFactors {
    /// A of expert 0
    pub a: usize,
    /// B of expert 0
    pub b: usize,
}

impl MixLoraLayout {
    /// Lays out the parameters of `spec`.
    pub fn new(spec: &MixLoraSpec) -> Self {
        let &MixLoraSpec { hidden, intermediate, experts, rank, .. } = spec;
        let mut at = Cursor { params: Vec::new(), next: 0, base: 0 };
        let [gate, up, down] = [spec.gate_proj, spec.up_proj, spec.down_proj]
            .map(|adapted| if adapted { experts } else { 0 });
        let gate_a = at.put_experts(gate, 'A', "gate_proj", [rank, hidden]);
        let up_a = at.put_experts(up, 'A', "up_proj", [rank, hidden]);
        at.put("mlp.moe_gate.weight", &[experts, hidden]);
        let stack_end = at.next;
        let gate_b = at.put_experts(gate, 'B', "gate_proj", [intermediate, rank]);
        let up_b = at.put_experts(up, 'B', "up_proj", [intermediate, rank]);
        let down_a = at.put_experts(down, 'A', "down_proj", [rank, intermediate]);
        let down_b = at.put_experts(down, 'B', "down_proj", [hidden, rank]);
        Self {
            gate_proj: spec.gate_proj.then_some(ExpertFactors { a: gate_a, b: gate_b }),
            up_proj: spec.up_proj.then_some(ExpertFactors { a: up_a, b: up_b }),
            down_proj: spec.down_proj.then_some(ExpertFactors { a: down_a, b: down_b }),
            params: at.params,
            stack_end,
            len: at.next,
        }
    }
}
