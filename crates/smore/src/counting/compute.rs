//! Multiplications per token.

use super::{Activity, equal_rank_lora_parameters};
use crate::config::RouterArchitecture;
use crate::spec::{HydraLoraSpec, MixLoraSpec, SmoreSpec};
use serde::Serialize;

/// Multiplications of weights for one token (paper, App. C.1), of one linear map or, added up, of
/// many. Additions, biases, activations and gate weights are not counted.
///
/// This is what the method asks for. This engine multiplies the down factors of all experts in one
/// product, chosen or not (`stack_width x d_in`), which takes less time than picking them apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Multiplications {
    /// A x of the active experts: sum of min(s_l, F_l) r_l d_in
    pub down: usize,
    /// B of the active experts: sum of min(s_l, F_l) r_l d_{l+1}
    pub up: usize,
    /// W_l at every node: sum of F_l d_l d_{l+1}
    pub transform: usize,
    /// W_proj: d_out d_L
    pub projection: usize,
    /// The router's view of the token and every parent's query and scores. The paper's formula
    /// leaves them out, the authors' statistics count one query per layer.
    pub router: usize,
}

impl Multiplications {
    /// Counts what one token costs. Experts of a shared pool act once for all layers.
    pub fn of(spec: &SmoreSpec) -> Self {
        let mut counts = Self::of_experts(spec, &Activity::of(spec));
        counts.router = view(spec);
        for l in 0..spec.depth() {
            counts.router += queries(spec, l) * query(spec, l);
        }
        counts
    }

    /// Counts what one token costs in HydraLoRA: every parameter is one multiplication.
    pub fn of_hydra_lora(spec: &HydraLoraSpec) -> Self {
        let HydraLoraSpec { d_in, d_out, heads, rank, .. } = *spec;
        let (down, up, router) = (rank * d_in, heads * rank * d_out, heads * d_in);
        Self { down, up, router, ..Self::default() }
    }

    /// Counts what one token costs in MixLoRA besides the base's own products, which all experts
    /// share: the factors of k experts and the router.
    pub fn of_mix_lora(spec: &MixLoraSpec) -> Self {
        let MixLoraSpec { hidden, intermediate, experts, fanout, rank, .. } = *spec;
        // Each map's inputs and outputs, from `hidden` to `intermediate` or back.
        let into = usize::from(spec.gate_proj) + usize::from(spec.up_proj);
        let out = usize::from(spec.down_proj);
        Self {
            down: fanout * rank * (into * hidden + out * intermediate),
            up: fanout * rank * (into * intermediate + out * hidden),
            router: experts * hidden,
            ..Self::default()
        }
    }

    /// Everything but the router.
    pub(super) fn of_experts(spec: &SmoreSpec, activity: &Activity) -> Self {
        let mut counts = Self { projection: spec.d_out * spec.root_width(), ..Self::default() };
        for (&experts, layer) in activity.pools(spec).iter().zip(&spec.layers) {
            counts.down += experts * layer.rank * spec.d_in;
            counts.up += experts * layer.rank * layer.width;
        }
        for (&times, layer) in activity.transforms.iter().zip(&spec.layers) {
            counts.transform += times * layer.width_below * layer.width;
        }
        counts
    }

    /// The paper's total (App. C.1), without the router.
    pub fn paper(&self) -> usize {
        self.down + self.up + self.transform + self.projection
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.paper() + self.router
    }
}

super::adds_up!(Multiplications: down, up, transform, projection, router);

/// D x, the router's view of the token.
fn view(spec: &SmoreSpec) -> usize {
    spec.d_in * spec.gate.input_width
}

/// How often layer l's router is asked for one token.
fn queries(spec: &SmoreSpec, l: usize) -> usize {
    let layer = &spec.layers[l];
    if spec.bottom_up() {
        // Parents at the leaves, every position above.
        if l == 0 { layer.parents } else { layer.nodes }
    } else if spec.gate.ancestor_keys {
        layer.parents
    } else {
        1
    }
}

/// One query of layer l and its scores.
fn query(spec: &SmoreSpec, l: usize) -> usize {
    let layer = &spec.layers[l];
    let (s, m, input) = (layer.experts, layer.router_width, layer.router_input);
    match spec.gate.architecture {
        RouterArchitecture::Mlp => m * input + m * m + s * m,
        RouterArchitecture::Linear => s * layer.key_width,
        RouterArchitecture::BottomUp if l == 0 => s * layer.key_width,
        RouterArchitecture::BottomUp => m * input + s * m,
    }
}

/// The router's view and one query in every layer: the authors' `gate_flops`.
pub(super) fn router_once(spec: &SmoreSpec) -> usize {
    view(spec) + (0..spec.depth()).map(|l| query(spec, l)).sum::<usize>()
}

/// The paper's Table 6: what propagation adds to LoRA of rank d_L, as a share of its
/// multiplications, `sum of F_l d_{l+1} (r_l + d_l) / ((d_in + d_out) d_L)`.
///
/// # Differs from the paper
/// App. C.1 counts B for min(s_l, F_l) experts; the printed table follows from F_l. (With the
/// minimum it would say 3.2% and 7.0% instead of 3.3% and 7.5% for L = 3 and 4.) The table also
/// leaves aside what S'MoRE saves on the down factors of experts that were not chosen.
pub fn propagation_overhead(spec: &SmoreSpec) -> f64 {
    let activity = Activity::of(spec);
    let added: usize = spec
        .layers
        .iter()
        .zip(&activity.transforms)
        .map(|(l, transforms)| l.width * (l.nodes * l.rank + transforms * l.width_below))
        .sum();
    added as f64 / equal_rank_lora_parameters(spec) as f64
}
