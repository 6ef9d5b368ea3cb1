//! Exact growth: an adapter that exists becomes a S'MoRE with the same function (paper, Props. 3.1
//! and 3.2), to be trained on from there.
//!
//! What the source computes goes into the top layer. Expert i gets the source's down factor, an
//! up factor that copies the projection into slot i of the root's embedding, and W_proj holds the
//! source's up factors, slot by slot. W of the top layer starts at zero, so that the layers below
//! say nothing yet; it has a gradient from the first step, and they have one from the second.

use crate::adapter::Smore;
use crate::config::{Activation, ActivationPosition, GateKind, RouterArchitecture};
use crate::spec::{LayerSpec, SmoreSpec};
use crate::{Error, Result};
use rand::{Rng, RngExt};

/// A mixture of low-rank experts on one linear map behind a linear gate on its input:
/// y += sum over the chosen i of p_i up_i down_i x, p = softmax(route x), divided by the sum of
/// the chosen where not all are.
///
/// HydraLoRA is one whose down factors are all the same; LoRAMoE and MoLA are others.
#[derive(Clone, Debug)]
pub struct Mixture<'a> {
    /// `[N, d_in]`
    pub route: &'a [f32],
    /// down `[r, d_in]` of every expert
    pub down: Vec<&'a [f32]>,
    /// up `[d_out, r]` of every expert
    pub up: Vec<&'a [f32]>,
    /// Experts chosen for a token; N for all.
    pub fanout: usize,
    /// Factor on all up factors.
    pub scale: f64,
}

/// Makes `values`, freshly initialised parameters of `target`, compute what the LoRA
/// y += scale * up down x does.
///
/// # Shapes
/// down `[r, d_in]`, up `[d_out, r]`
///
/// # Errors
/// Where the top layer's gate weights do not sum to 1, where an activation bends its residuals, or
/// where its rank is too small: names the key and what would do.
pub fn from_lora(
    target: &Smore,
    values: &mut [f32],
    down: &[f32],
    up: &[f32],
    scale: f64,
    rng: &mut impl Rng,
) -> Result<()> {
    let spec = &target.spec;
    let top = top(spec)?;
    let normalised = match spec.gate.kind {
        GateKind::Dense => true,
        GateKind::Switch => top.fanout > 1 || top.experts == 1,
        GateKind::NoisyTopk => top.fanout > 1,
    };
    if !normalised {
        return Err(Error::config(format!(
            "layers[{}].fanout is 1, so the top layer's gate weight is not 1 and a LoRA cannot keep \
             its function; set fanout to 2 or more, or gate.kind to dense",
            spec.depth() - 1
        )));
    }
    let mut grown = Grown::new(target, values, down.len() / spec.d_in)?;
    grown.clear(rng);
    for i in 0..top.experts {
        grown.put(i, down, up, scale);
    }
    Ok(())
}

/// As [`from_lora`], for a mixture.
///
/// # Errors
/// Also where gate, number of experts or router of the top layer cannot be those of the mixture.
pub fn from_mixture(
    target: &Smore,
    values: &mut [f32],
    mixture: &Mixture,
    rng: &mut impl Rng,
) -> Result<()> {
    let spec = &target.spec;
    let (top, l) = (top(spec)?, spec.depth() - 1);
    let n = mixture.down.len();
    if top.experts != n {
        return Err(Error::config(format!(
            "layers[{l}].experts is {}, but the adapter has {n} experts; the top layer needs as many",
            top.experts
        )));
    }
    let fits = match spec.gate.kind {
        GateKind::Dense => mixture.fanout == n,
        // A single one keeps its probability here and gets weight 1 there.
        GateKind::Switch => top.fanout == mixture.fanout && mixture.fanout > 1,
        GateKind::NoisyTopk => false,
    };
    if !fits {
        let wanted = match mixture.fanout {
            k if k == n => "gate.kind dense".into(),
            1 => {
                return Err(Error::config(
                    "the adapter gives its single chosen expert weight 1, which no gate of S'MoRE does; \
                 it cannot be grown",
                ));
            }
            k => format!("gate.kind switch and layers[{l}].fanout {k}"),
        };
        return Err(Error::config(format!("the adapter's gate needs {wanted}")));
    }
    let mut grown = Grown::new(target, values, mixture.down[0].len() / spec.d_in)?;
    grown.route(mixture.route, n)?;
    grown.clear(rng);
    for (i, (down, up)) in mixture.down.iter().zip(&mixture.up).enumerate() {
        grown.put(i, down, up, mixture.scale);
    }
    Ok(())
}

/// As [`from_lora`], for a S'MoRE of one layer.
///
/// # Errors
/// Also where the top layer is not the source's in experts, fanout, gate, router or activation.
pub fn from_one_layer(
    target: &Smore,
    values: &mut [f32],
    source: &Smore,
    source_values: &[f32],
    rng: &mut impl Rng,
) -> Result<()> {
    let (spec, from) = (&target.spec, &source.spec);
    let (top, l) = (top(spec)?, spec.depth() - 1);
    if from.depth() != 1 || from.bottom_up() {
        return Err(Error::config(
            "the adapter has more than one layer or a bottom_up router; only a single layer routed \
             from the top can be grown",
        ));
    }
    let old = &from.layers[0];
    let same_gate = spec.gate.kind == from.gate.kind
        && spec.gate.architecture == from.gate.architecture
        && spec.gate.input_width == from.gate.input_width
        && (spec.gate.activation == from.gate.activation
            || from.gate.architecture == RouterArchitecture::Linear)
        && (top.router_width == old.router_width
            || from.gate.architecture == RouterArchitecture::Linear);
    if !same_gate || (top.experts, top.fanout) != (old.experts, old.fanout) {
        return Err(Error::config(format!(
            "the adapter's layer becomes the top one, so layers[{l}] needs experts {} and fanout {} \
             and gate needs its kind, architecture, activation, router_width {} and \
             router_input_width {}",
            old.experts, old.fanout, old.router_width, from.gate.input_width
        )));
    }
    let bends = |s: &SmoreSpec| s.position == ActivationPosition::All && !is_identity(s.activation);
    let kept = if bends(from) {
        // A learned slope is carried over, so its starting value does not matter.
        spec.position == ActivationPosition::All && alike(spec.activation, from.activation)
    } else {
        !bends(spec)
    };
    if !kept {
        return Err(Error::config(if bends(from) {
            "the adapter has an activation after its residuals; keep its `activation` and \
             `activation_position: all`"
                .into()
        } else {
            bent(spec.activation)
        }));
    }
    if top.rank < old.rank {
        return Err(rank_too_small(l, top.rank, old.rank));
    }
    let mut grown = Grown { target, values, slots: Slots::Plain, rank: old.rank };
    grown.clear(rng);
    grown.embed(source, source_values);
    Ok(())
}

fn top(spec: &SmoreSpec) -> Result<&LayerSpec> {
    if spec.bottom_up() {
        return Err(Error::config(
            "gate.architecture is bottom_up, whose weights depend on what comes from below; growing \
             needs mlp or linear",
        ));
    }
    Ok(&spec.layers[spec.depth() - 1])
}

fn is_identity(activation: Activation) -> bool {
    matches!(activation, Activation::Identity) || activation == Activation::Prelu(1.0)
}

fn alike(a: Activation, b: Activation) -> bool {
    matches!((a, b), (Activation::Prelu(_), Activation::Prelu(_))) || a == b
}

fn bent(activation: Activation) -> String {
    let name = String::from(activation);
    format!(
        "activation is {name} and activation_position is all, which bends what the top layer takes \
         over; exact are activation prelu|1.0 (starts as the identity and learns to bend), \
         activation identity, relu with twice the rank, or activation_position child or child_v2"
    )
}

fn rank_too_small(l: usize, rank: usize, needed: usize) -> Error {
    Error::config(format!("layers[{l}].rank is {rank}, but the adapter needs {needed} there"))
}

/// How projections pass the top layer's activation.
#[derive(Clone, Copy, PartialEq)]
enum Slots {
    /// As they are.
    Plain,
    /// As relu(z) and relu(-z), whose difference is z.
    Doubled,
}

/// The parameters of a S'MoRE while its top layer is filled.
struct Grown<'a> {
    target: &'a Smore,
    values: &'a mut [f32],
    slots: Slots,
    /// Rank of the source.
    rank: usize,
}

impl<'a> Grown<'a> {
    fn new(target: &'a Smore, values: &'a mut [f32], rank: usize) -> Result<Self> {
        let spec = &target.spec;
        let slots = match (spec.position, spec.activation) {
            (ActivationPosition::Child | ActivationPosition::ChildV2, _) => Slots::Plain,
            (_, activation) if is_identity(activation) => Slots::Plain,
            (_, Activation::Relu) => Slots::Doubled,
            (_, activation) => return Err(Error::config(bent(activation))),
        };
        let needed = if slots == Slots::Doubled { 2 * rank } else { rank };
        let l = spec.depth() - 1;
        if spec.layers[l].rank < needed {
            return Err(rank_too_small(l, spec.layers[l].rank, needed));
        }
        Ok(Self { target, values, slots, rank })
    }

    fn top(&self) -> LayerSpec {
        self.target.spec.layers[self.target.spec.depth() - 1]
    }

    /// A parameter by the stem of its name; a layer's own are the top one's.
    fn param(&mut self, stem: &str) -> &mut [f32] {
        param(self.target, self.values, stem)
    }

    /// Everything that is added to what the top layer takes over starts at zero.
    fn clear(&mut self, rng: &mut impl Rng) {
        let depth = self.target.spec.depth();
        for stem in ["moe_A_bias", "moe_B", "moe_B_bias", "moe_W_final_bias"] {
            self.param(stem).fill(0.0);
        }
        if depth > 1 {
            for stem in ["moe_W", "moe_W_bias"] {
                self.param(stem).fill(0.0);
            }
        }
        // Slots are filled afterwards. Behind them is what comes from below, zero at the start: it
        // needs a way out, or W would have no gradient there.
        let LayerSpec { experts, rank, width, .. } = self.top();
        let bound = 1.0 / (width as f32).sqrt();
        for row in self.param("moe_W_final").chunks_exact_mut(width) {
            let (slots, below) = row.split_at_mut(experts * rank);
            slots.fill(0.0);
            below.fill_with(|| (2.0 * rng.random::<f32>() - 1.0) * bound);
        }
    }

    /// Lets expert i compute down x in its slot and W_proj the rest.
    fn put(&mut self, i: usize, down: &[f32], up: &[f32], scale: f64) {
        let LayerSpec { rank, width, scale: layer_scale, .. } = self.top();
        let (r, d_in) = (self.rank, self.target.spec.d_in);
        let doubled = self.slots == Slots::Doubled;
        let a = &mut self.param("moe_A")[i * rank * d_in..(i + 1) * rank * d_in];
        a[..r * d_in].copy_from_slice(down);
        if doubled {
            for (a, down) in a[r * d_in..2 * r * d_in].iter_mut().zip(down) {
                *a = -down;
            }
        }
        // The layer's own scale is undone: slots hold projections as they are.
        let b = &mut self.param("moe_B")[i * width * rank..(i + 1) * width * rank];
        for j in 0..rank {
            b[(i * rank + j) * rank + j] = (1.0 / layer_scale) as f32;
        }
        for (row, up) in self.param("moe_W_final").chunks_exact_mut(width).zip(up.chunks_exact(r)) {
            let slot = &mut row[i * rank..(i + 1) * rank];
            for (j, &x) in up.iter().enumerate() {
                let x = (f64::from(x) * scale) as f32;
                slot[j] = x;
                if doubled {
                    slot[r + j] = -x;
                }
            }
        }
    }

    /// Lets the top layer's logits be route x.
    fn route(&mut self, route: &[f32], n: usize) -> Result<()> {
        let spec = &self.target.spec;
        let (d_in, width) = (spec.d_in, spec.gate.input_width);
        let LayerSpec { router_width: m, router_input, key_width, .. } = self.top();
        if width < n {
            return Err(Error::config(format!(
                "gate.router_input_width is {width}, but the adapter's {n} experts need {n} or more"
            )));
        }
        let mlp = spec.gate.architecture == RouterArchitecture::Mlp;
        let doubled = match spec.gate.activation {
            _ if !mlp => false,
            a if is_identity(a) => false,
            Activation::Relu => true,
            a => {
                return Err(Error::config(format!(
                    "gate.activation is {}, which bends the adapter's logits; exact are relu, \
                     prelu|1.0, identity, or gate.architecture linear",
                    String::from(a)
                )));
            }
        };
        let needed = if doubled { 2 * n } else { n };
        if mlp && m < needed {
            return Err(Error::config(format!(
                "gate.router_width is {m}, but the adapter's {n} experts need {needed} or more"
            )));
        }
        self.param("moe_downproj_x.weight")[..n * d_in].copy_from_slice(route);
        self.param("moe_downproj_x.bias")[..n].fill(0.0);
        let keys = self.param("keys");
        keys.fill(0.0);
        for (i, key) in keys.chunks_exact_mut(key_width).enumerate() {
            key[i] = 1.0;
        }
        if mlp {
            let (first, second) = (unit_rows(n, doubled), &mut *self);
            second.param("mlp.0.bias")[..needed].fill(0.0);
            let rows = second.param("mlp.0.weight").chunks_exact_mut(router_input);
            for (row, (at, sign)) in rows.zip(&first) {
                row.fill(0.0);
                row[*at] = *sign;
            }
            second.param("mlp.2.bias")[..n].fill(0.0);
            for (i, row) in second.param("mlp.2.weight").chunks_exact_mut(m).take(n).enumerate() {
                row.fill(0.0);
                row[i] = 1.0;
                if doubled {
                    row[n + i] = -1.0;
                }
            }
        }
        Ok(())
    }

    /// The source's layer as the top one: its embedding becomes the first part of the root's.
    fn embed(&mut self, source: &Smore, from: &[f32]) {
        let (old, new) = (source.spec.layers[0], self.top());
        let (d_in, d_out) = (source.spec.d_in, source.spec.d_out);
        let read = |stem: &str| -> &[f32] { &from[range(source, stem)] };
        let ratio = (old.scale / new.scale) as f32;
        for e in 0..old.experts {
            let down = &read("moe_A")[e * old.rank * d_in..(e + 1) * old.rank * d_in];
            let at = e * new.rank * d_in;
            self.param("moe_A")[at..at + down.len()].copy_from_slice(down);
            let bias = &read("moe_A_bias")[e * old.rank..(e + 1) * old.rank];
            let at = e * new.rank;
            self.param("moe_A_bias")[at..at + old.rank].copy_from_slice(bias);
            for row in 0..old.width {
                let up = &read("moe_B")[(e * old.width + row) * old.rank..][..old.rank];
                let at = (e * new.width + row) * new.rank;
                for (b, &up) in self.param("moe_B")[at..at + old.rank].iter_mut().zip(up) {
                    *b = up * ratio;
                }
                let bias = read("moe_B_bias")[e * old.width + row] * ratio;
                self.param("moe_B_bias")[e * new.width + row] = bias;
            }
        }
        for o in 0..d_out {
            let row = &read("moe_W_final")[o * old.width..(o + 1) * old.width];
            let at = o * new.width;
            self.param("moe_W_final")[at..at + old.width].copy_from_slice(row);
        }
        for stem in ["moe_W_final_bias", "moe_downproj_x.weight", "moe_downproj_x.bias"] {
            self.param(stem).copy_from_slice(read(stem));
        }
        let gate = source.layout.params.iter().filter(|p| p.name.starts_with("moe_gate.0."));
        for stem in gate.map(|p| p.name.trim_start_matches("moe_gate.0.")) {
            self.param(stem).copy_from_slice(read(stem));
        }
        if matches!(source.spec.activation, Activation::Prelu(_))
            && matches!(self.target.spec.activation, Activation::Prelu(_))
            && source.spec.position == ActivationPosition::All
        {
            self.param("moe_expert_act_param").copy_from_slice(read("moe_expert_act_param"));
        }
    }
}

/// Rows of a map that hands on n inputs, and then their negatives where `doubled`.
fn unit_rows(n: usize, doubled: bool) -> Vec<(usize, f32)> {
    let plain = (0..n).map(|i| (i, 1.0));
    let negative = (0..if doubled { n } else { 0 }).map(|i| (i, -1.0));
    plain.chain(negative).collect()
}

fn param<'a>(smore: &Smore, values: &'a mut [f32], stem: &str) -> &'a mut [f32] {
    &mut values[range(smore, stem)]
}

/// The run of the top layer's parameter with this stem, or of the one parameter of that name.
///
/// # Panics
/// If there is none: callers ask for what the spec has.
fn range(smore: &Smore, stem: &str) -> std::ops::Range<usize> {
    let top = smore.spec.depth() - 1;
    let names = [
        stem.to_owned(),
        format!("{stem}.{top}"),
        format!("moe_gate.{top}.{stem}"),
        // A shared pool lies under the leaves' name.
        format!("{stem}.0"),
    ];
    let find = |name: &String| smore.layout.params.iter().find(|p| p.name == *name);
    let param = names.iter().find_map(find);
    param.unwrap_or_else(|| panic!("S'MoRE has no parameter {stem}")).range()
}
