//! The method once more, slowly: scalar `f64` loops that follow the paper's text, without the
//! tensor library. Every other path is tested against it.
//!
//! Token by token, a recursion walks from the root to the leaves and back. On the way down every
//! parent chooses its children (Sec. 3.3, Eqs. 6-7); on the way up their outputs are summed (Eq. 3;
//! biases as in Eq. 32; S'MoRE* as in Eq. 38). It covers everything that is routed from the top:
//! all gates and router networks, activations and their positions, the shared pool (S'MoRE#) and
//! the ablations. Parameters are found by their names in a file, so that a wrong offset elsewhere
//! cannot hide here.
//!
//! ```
//! use smore::{config::SmoreConfig, layout::SmoreLayout, reference::Reference, spec::SmoreSpec};
//!
//! let json = r#"{"layers": [{"experts": 4, "fanout": 2, "rank": 1}]}"#;
//! let config: SmoreConfig = serde_json::from_str(json).unwrap();
//! let spec = SmoreSpec::new(&config, 3, 2).unwrap();
//! let layout = SmoreLayout::new(&spec);
//! let params = vec![0.5; layout.len];
//! let reference = Reference { spec: &spec, layout: &layout, params: &params };
//! let output = reference.forward(&[1.0, 2.0, 3.0], None, None);
//! assert_eq!(output.y.len(), 2);
//! // Equal parameters, equal scores: the first two experts, at one half each.
//! assert_eq!(output.layers[0].expert_idx, [0, 1]);
//! assert_eq!(output.layers[0].gate_weight, [0.5, 0.5]);
//! ```

use crate::config::{Activation, ActivationPosition, GateKind, Structure};
use crate::kernel::GateNoise;
use crate::layout::SmoreLayout;
use crate::spec::SmoreSpec;

/// An adapter with its parameters.
#[derive(Clone, Copy)]
pub struct Reference<'a> {
    /// Its validated description; not bottom-up.
    pub spec: &'a SmoreSpec,
    /// Where its parameters lie.
    pub layout: &'a SmoreLayout,
    /// Their values, in the layout's order.
    pub params: &'a [f64],
}

/// What the reference says of a batch of n tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The adapter's output, `[n, d_out]`.
    pub y: Vec<f64>,
    /// One entry per S'MoRE layer, leaves first.
    pub layers: Vec<LayerOutput>,
}

/// One layer of the residual trees, in the order of [`crate::tree::ResidualTree`].
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutput {
    /// Expert that stands at each node, `[n * F_l]`.
    pub expert_idx: Vec<u16>,
    /// Its gate weight alpha under its parent, `[n * F_l]`.
    pub gate_weight: Vec<f64>,
    /// x_i of the parents, `[n * F_{l+1}, d_{l+1}]`.
    pub hidden: Vec<f64>,
    /// The layer's balance loss.
    pub balance_loss: f64,
}

impl Reference<'_> {
    /// Runs the tokens `x [n, d_in]`. Tokens whose `valid` is false do not count in the balance
    /// losses. `noise` is given in training with the noisy gate.
    ///
    /// # Panics
    /// For an adapter with the bottom-up router.
    pub fn forward(
        &self,
        x: &[f64],
        valid: Option<&[bool]>,
        noise: Option<&GateNoise<f64>>,
    ) -> Output {
        assert!(!self.spec.bottom_up(), "the reference routes from the top only");
        let mut walk = Walk {
            of: *self,
            noise,
            x: &[],
            view: vec![],
            counts: true,
            layers: self.spec.layers.iter().map(|_| LayerOutput::new()).collect(),
            sums: self.spec.layers.iter().map(|l| Sums::new(l.experts)).collect(),
        };
        let mut y = Vec::new();
        for (token, x) in x.chunks_exact(self.spec.d_in).enumerate() {
            walk.x = x;
            walk.view = self.affine("moe_downproj_x.weight", "moe_downproj_x.bias", x);
            walk.counts = valid.is_none_or(|v| v[token]);
            let root = walk.parent(self.spec.depth() - 1, &[]);
            y.extend(self.affine("moe_W_final", "moe_W_final_bias", &root));
        }
        for (layer, sums) in walk.layers.iter_mut().zip(&walk.sums) {
            layer.balance_loss = self.balance(sums);
        }
        Output { y, layers: walk.layers }
    }

    fn find(&self, name: &str) -> Option<&[f64]> {
        let param = self.layout.params.iter().find(|p| p.name == name)?;
        Some(&self.params[param.range()])
    }

    /// A parameter by its name in a file.
    fn param(&self, name: &str) -> &[f64] {
        self.find(name).unwrap_or_else(|| panic!("the layout has no {name}"))
    }

    /// Expert n of a parameter that holds one part per expert.
    fn part(&self, name: &str, expert: usize, experts: usize) -> &[f64] {
        let all = self.param(name);
        let len = all.len() / experts;
        &all[expert * len..(expert + 1) * len]
    }

    /// W x + b
    fn affine(&self, weight: &str, bias: &str, x: &[f64]) -> Vec<f64> {
        affine(self.param(weight), self.param(bias), x)
    }

    /// u_n = scale_l (B_l^n (A_l^n x + a_l^n) + b_l^n), in Eq. 3.
    fn residual(&self, l: usize, expert: usize, x: &[f64]) -> Vec<f64> {
        let layer = &self.spec.layers[l];
        // S'MoRE#: every layer draws on one set of experts, kept under the leaves' name.
        let pool = if self.spec.shared_pool { 0 } else { l };
        let part = |name: &str| self.part(&format!("{name}.{pool}"), expert, layer.experts);
        let down = affine(part("moe_A"), part("moe_A_bias"), x);
        let up = affine(part("moe_B"), part("moe_B_bias"), &down);
        up.iter().map(|u| layer.scale * u).collect()
    }

    /// sigma of layer `l`.
    fn sigma(&self, l: usize, x: &[f64]) -> Vec<f64> {
        activate(self.spec.activation, self.find(&format!("moe_expert_act_param.{l}")), x)
    }

    /// k(n), as queries and descendants see it.
    fn key(&self, l: usize, expert: usize) -> Vec<f64> {
        let key = self.part(&format!("moe_gate.{l}.keys"), expert, self.spec.layers[l].experts);
        if self.spec.gate.kind == GateKind::NoisyTopk { unit(key) } else { key.to_vec() }
    }

    /// The query that meets the keys of layer `l` (Eqs. 6-7): an MLP of the router's input, or the
    /// input itself.
    fn query(&self, l: usize, input: &[f64]) -> Vec<f64> {
        let name = |part: &str| format!("moe_gate.{l}.mlp.{part}");
        let query = if self.find(&name("0.weight")).is_some() {
            let inner = self.affine(&name("0.weight"), &name("0.bias"), input);
            let slope = self.find(&name("1.weight"));
            let inner = activate(self.spec.gate.activation, slope, &inner);
            self.affine(&name("2.weight"), &name("2.bias"), &inner)
        } else {
            input.to_vec()
        };
        if self.spec.gate.kind == GateKind::NoisyTopk { unit(&query) } else { query }
    }

    /// The children of one parent, which stand in layer `l`: best first. `noise [s]`.
    fn choose(&self, l: usize, input: &[f64], noise: Option<&[f64]>) -> Choice {
        let layer = &self.spec.layers[l];
        let query = self.query(l, input);
        let logits: Vec<f64> = (0..layer.experts).map(|n| dot(&query, &self.key(l, n))).collect();
        match self.spec.gate.kind {
            GateKind::Switch => switch(&logits, layer.fanout),
            GateKind::Dense => {
                let p = softmax(&logits);
                Choice::new(p.iter().copied().enumerate().collect(), p.clone())
            }
            GateKind::NoisyTopk => {
                let spread = format!("moe_gate.{l}.weight_noise.weight");
                let deviation = |n| softplus(dot(self.part(&spread, n, layer.experts), input));
                let deviation: Vec<f64> = (0..layer.experts).map(|n| deviation(n) + 1e-2).collect();
                noisy(&logits, &deviation, layer.fanout, noise)
            }
        }
    }

    /// The balance loss of one layer (spec section 2).
    fn balance(&self, sums: &Sums) -> f64 {
        let w = self.spec.gate.balance_weight;
        match self.spec.gate.kind {
            GateKind::Dense => 0.0,
            GateKind::Switch => {
                let n = sums.rows.max(1.0);
                let s = sums.load.len() as f64;
                let pairs = sums.load.iter().zip(&sums.importance);
                w * s * pairs.map(|(load, p)| load / n * (p / n)).sum::<f64>()
            }
            GateKind::NoisyTopk => w * (variation(&sums.importance) + variation(&sums.load)),
        }
    }
}

impl LayerOutput {
    fn new() -> Self {
        Self { expert_idx: vec![], gate_weight: vec![], hidden: vec![], balance_loss: 0.0 }
    }
}

/// Sums over the parents that count, for one layer's balance loss.
struct Sums {
    rows: f64,
    load: Vec<f64>,
    importance: Vec<f64>,
}

impl Sums {
    fn new(experts: usize) -> Self {
        Self { rows: 0.0, load: vec![0.0; experts], importance: vec![0.0; experts] }
    }

    fn add(&mut self, choice: &Choice) {
        self.rows += 1.0;
        for n in 0..self.load.len() {
            self.load[n] += choice.load[n];
            self.importance[n] += choice.importance[n];
        }
    }
}

/// The way through one token's tree after the other.
struct Walk<'a> {
    of: Reference<'a>,
    noise: Option<&'a GateNoise<f64>>,
    /// The token
    x: &'a [f64],
    /// Its x_down
    view: Vec<f64>,
    /// Whether it counts in the balance losses
    counts: bool,
    layers: Vec<LayerOutput>,
    sums: Vec<Sums>,
}

impl Walk<'_> {
    /// x_i of a parent of layer `l`'s nodes (Eq. 3), given the keys of the parent's ancestors and
    /// its own.
    fn parent(&mut self, l: usize, keys: &[f64]) -> Vec<f64> {
        let layer = &self.of.spec.layers[l];
        // Parents are met in the order of the tree, so this is the parent's number.
        let row = self.layers[l].expert_idx.len() / layer.fanout;
        let s = layer.experts;
        let noise = self.noise.map(|n| &n.layers[l][row * s..(row + 1) * s]);
        let choice = self.of.choose(l, &[&self.view, keys].concat(), noise);
        if self.counts {
            self.sums[l].add(&choice);
        }
        for &(expert, weight) in &choice.chosen {
            self.layers[l].expert_idx.push(expert as u16);
            self.layers[l].gate_weight.push(weight);
        }
        let below = self.children(l, &choice, keys);
        let mut hidden = vec![0.0; layer.width];
        for (&(expert, weight), below) in choice.chosen.iter().zip(&below) {
            for (h, term) in hidden.iter_mut().zip(self.term(l, expert, weight, below)) {
                *h += term;
            }
        }
        self.layers[l].hidden.extend(&hidden);
        hidden
    }

    /// x_n of every chosen child; empty at the leaves.
    fn children(&mut self, l: usize, choice: &Choice, keys: &[f64]) -> Vec<Vec<f64>> {
        let count = choice.chosen.len();
        if l == 0 {
            return vec![vec![]; count];
        }
        if self.of.spec.structure == Structure::MultiOrder {
            // Eq. 2: the layer below chooses once per token, and all take its sum.
            return vec![self.parent(l - 1, keys); count];
        }
        let mut below = Vec::new();
        for &(expert, _) in &choice.chosen {
            let mut keys = keys.to_vec();
            if self.of.spec.gate.ancestor_keys {
                keys.extend(self.of.key(l, expert));
            }
            below.push(self.parent(l - 1, &keys));
        }
        below
    }

    /// What one child adds to its parent: alpha sigma(u + W x + b), or a variant of it.
    fn term(&self, l: usize, expert: usize, weight: f64, below: &[f64]) -> Vec<f64> {
        let u = self.of.residual(l, expert, self.x);
        let transform = |x: &[f64]| {
            if l == 0 {
                return vec![0.0; u.len()];
            }
            self.of.affine(&format!("moe_W.{l}"), &format!("moe_W_bias.{l}"), x)
        };
        let combine = |v: Vec<f64>, f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            u.iter().zip(v).map(|(&u, v)| f(u, v)).collect()
        };
        match self.of.spec.position {
            ActivationPosition::All => {
                let inner = combine(transform(below), &|u, v| u + v);
                self.of.sigma(l, &inner).iter().map(|o| weight * o).collect()
            }
            // Eq. 38; the second part has no alpha in the authors' code.
            ActivationPosition::Child => {
                combine(transform(&self.of.sigma(l, below)), &|u, v| weight * u + v)
            }
            ActivationPosition::ChildV2 => {
                combine(transform(&self.of.sigma(l, below)), &|u, v| weight * (u + v))
            }
        }
    }
}

/// One gate decision.
struct Choice {
    /// Experts with their weights alpha.
    chosen: Vec<(usize, f64)>,
    /// Per expert: 1 where chosen, or the probability of it.
    load: Vec<f64>,
    /// Per expert: its probability, or its weight.
    importance: Vec<f64>,
}

impl Choice {
    /// Every chosen expert is a load of 1.
    fn new(chosen: Vec<(usize, f64)>, importance: Vec<f64>) -> Self {
        let mut load = vec![0.0; importance.len()];
        for &(n, _) in &chosen {
            load[n] = 1.0;
        }
        Self { chosen, load, importance }
    }
}

/// The switch gate: the top f of a softmax over all; renormalised, but a single one stays raw.
fn switch(logits: &[f64], f: usize) -> Choice {
    let p = softmax(logits);
    let top = &ranked(&p)[..f];
    let sum = if f > 1 { top.iter().map(|&n| p[n]).sum() } else { 1.0 };
    Choice::new(top.iter().map(|&n| (n, p[n] / sum)).collect(), p)
}

/// The noisy gate (Shazeer et al. 2017): softmax over the top f of the noisy cosines; a single one
/// keeps its score.
fn noisy(clean: &[f64], deviation: &[f64], f: usize, noise: Option<&[f64]>) -> Choice {
    let s = clean.len();
    let drawn = |n: usize| noise.map_or(0.0, |noise| noise[n] * deviation[n]);
    let scores: Vec<f64> = (0..s).map(|n| clean[n] + drawn(n)).collect();
    let order = ranked(&scores);
    let top: Vec<f64> = order[..f].iter().map(|&n| scores[n]).collect();
    let weights = if f > 1 { softmax(&top) } else { top };
    let mut choice = Choice { chosen: vec![], load: vec![0.0; s], importance: vec![0.0; s] };
    for (&n, weight) in order.iter().zip(weights) {
        choice.chosen.push((n, weight));
        choice.importance[n] = weight;
        choice.load[n] = if weight > 0.0 { 1.0 } else { 0.0 };
    }
    if noise.is_some() {
        // Shazeer, App. A: the probability of being chosen if this expert's noise were redrawn and
        // the others' kept. A chosen expert must beat the best of the rest, any other the last
        // of the chosen.
        let (last_chosen, best_left) = (scores[order[f - 1]], scores[order[f.min(s - 1)]]);
        for n in 0..s {
            let limit = if scores[n] > best_left { best_left } else { last_chosen };
            choice.load[n] = normal_cdf((clean[n] - limit) / deviation[n]);
        }
    }
    choice
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// W x + b, W row-major with as many rows as b.
fn affine(weight: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    assert_eq!(weight.len(), bias.len() * x.len());
    let row = |i: usize| &weight[i * x.len()..(i + 1) * x.len()];
    (0..bias.len()).map(|i| dot(row(i), x) + bias[i]).collect()
}

fn activate(activation: Activation, slope: Option<&[f64]>, x: &[f64]) -> Vec<f64> {
    let value = |x: f64| match (activation, slope) {
        (Activation::Identity, _) => x,
        (Activation::Tanh, _) => x.tanh(),
        (Activation::Prelu(_), Some(slope)) if x < 0.0 => slope[0] * x,
        (Activation::Prelu(_), None) => panic!("a prelu without a slope"),
        (Activation::Relu | Activation::Prelu(_), _) => x.max(0.0),
    };
    x.iter().map(|&x| value(x)).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn normal_cdf(z: f64) -> f64 {
    0.5 * libm::erfc(-z / std::f64::consts::SQRT_2)
}

/// x / |x|
fn unit(x: &[f64]) -> Vec<f64> {
    let length = dot(x, x).sqrt().max(1e-12);
    x.iter().map(|x| x / length).collect()
}

/// Indices by falling value, equal ones by rising index.
fn ranked(x: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    order
}

/// cv^2: unbiased variance / (mean^2 + 1e-10), 0 for a single number.
fn variation(x: &[f64]) -> f64 {
    if x.len() < 2 {
        return 0.0;
    }
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    variance / (mean * mean + 1e-10)
}
