//! The method once more, slowly: scalar `f64` loops that follow the paper's text, without the
//! tensor library. Every other path is tested against it.
//!
//! It covers everything that is routed from the top: all gates, router networks, activations and
//! their positions, the shared pool and the ablations. Parameters come by name, as in a file.

use crate::activation::Act;
use crate::config::{ActivationPosition, GateKind, Structure};
use crate::layout::SmoreLayout;
use crate::spec::SmoreSpec;

/// An adapter with its parameters.
pub struct Reference<'a> {
    /// Its validated description; not bottom-up.
    pub spec: &'a SmoreSpec,
    /// Where its parameters lie.
    pub layout: &'a SmoreLayout,
    /// Their values.
    pub params: &'a [f64],
}

/// What the reference says of a batch.
pub struct Output {
    /// The adapter's output, `[n][d_out]`.
    pub y: Vec<Vec<f64>>,
    /// Every token's root.
    pub roots: Vec<Node>,
    /// Balance loss of each layer.
    pub balance_losses: Vec<f64>,
}

/// A node of the residual tree; the root has no expert of its own.
#[derive(Clone, Debug)]
pub struct Node {
    /// The chosen children in order: expert, gate weight, and the child as a node.
    pub children: Vec<(usize, f64, Node)>,
    /// x_i of the paper's Eq. 3: the sum over the children; empty at the leaves.
    pub hidden: Vec<f64>,
}

/// Sums over the tokens that count, for one layer's balance loss.
struct Sums {
    rows: f64,
    load: Vec<f64>,
    importance: Vec<f64>,
}

/// One gate decision: chosen experts with weights, and what the balance loss adds per expert.
struct Choice {
    chosen: Vec<(usize, f64)>,
    load: Vec<f64>,
    importance: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

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

impl Reference<'_> {
    /// A parameter by its name in a file.
    fn param(&self, name: &str) -> &[f64] {
        let param = self.layout.params.iter().find(|p| p.name == name);
        param.map_or(&[], |p| &self.params[p.range()])
    }

    /// W x + b
    fn affine(&self, weight: &str, bias: &str, x: &[f64]) -> Vec<f64> {
        let (weight, bias) = (self.param(weight), self.param(bias));
        weight.chunks_exact(x.len()).zip(bias).map(|(w, b)| dot(w, x) + b).collect()
    }

    fn apply(act: Act<f64>, x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; x.len()];
        act.forward(x, &mut y);
        y
    }

    /// sigma of layer `l`.
    fn sigma(&self, l: usize, x: &[f64]) -> Vec<f64> {
        let slope = self.param(&format!("moe_expert_act_param.{l}")).first().copied();
        Self::apply(Act::new(self.spec.activation, slope), x)
    }

    /// u_n = scale (B (A x + a) + b)
    fn residual(&self, l: usize, expert: usize, x: &[f64]) -> Vec<f64> {
        let layer = &self.spec.layers[l];
        let pool = if self.spec.shared_pool { 0 } else { l };
        let of = |name: &str, len: usize| {
            &self.param(&format!("{name}.{pool}"))[expert * len..(expert + 1) * len]
        };
        let (r, d) = (layer.rank, layer.width);
        let a = of("moe_A", r * x.len()).chunks_exact(x.len()).zip(of("moe_A_bias", r));
        let z: Vec<f64> = a.map(|(a, bias)| dot(a, x) + bias).collect();
        let b = of("moe_B", d * r).chunks_exact(r).zip(of("moe_B_bias", d));
        b.map(|(b, bias)| layer.scale * (dot(b, &z) + bias)).collect()
    }

    /// Keys of layer `l` as queries and descendants see them.
    fn key(&self, l: usize, expert: usize) -> Vec<f64> {
        let width = self.spec.layers[l].key_width;
        let key = &self.param(&format!("moe_gate.{l}.keys"))[expert * width..(expert + 1) * width];
        if self.spec.gate.kind == GateKind::NoisyTopk { unit(key) } else { key.to_vec() }
    }

    /// Query of the router of layer `l` for this input.
    fn query(&self, l: usize, input: &[f64]) -> Vec<f64> {
        if self.layout.layers[l].network.is_none() {
            return input.to_vec();
        }
        let name = |part: &str| format!("moe_gate.{l}.mlp.{part}");
        let pre = self.affine(&name("0.weight"), &name("0.bias"), input);
        let slope = self.param(&name("1.weight")).first().copied();
        let hidden = Self::apply(Act::new(self.spec.gate.activation, slope), &pre);
        self.affine(&name("2.weight"), &name("2.bias"), &hidden)
    }

    /// The children of one parent. `noise [s]` in training.
    fn choose(&self, l: usize, input: &[f64], noise: Option<&[f64]>) -> Choice {
        let layer = &self.spec.layers[l];
        let noisy = self.spec.gate.kind == GateKind::NoisyTopk;
        let query = self.query(l, input);
        let query = if noisy { unit(&query) } else { query };
        let logits: Vec<f64> = (0..layer.experts).map(|e| dot(&query, &self.key(l, e))).collect();
        match self.spec.gate.kind {
            GateKind::NoisyTopk => self.choose_noisy(l, input, &logits, noise),
            GateKind::Dense => {
                let p = softmax(&logits);
                let chosen = p.iter().copied().enumerate().collect();
                Choice { chosen, load: vec![1.0; p.len()], importance: p }
            }
            GateKind::Switch => {
                let p = softmax(&logits);
                let order = &ranked(&p)[..layer.fanout];
                let sum: f64 = order.iter().map(|&e| p[e]).sum();
                let sum = if layer.fanout > 1 { sum } else { 1.0 };
                let mut load = vec![0.0; p.len()];
                for &e in order {
                    load[e] = 1.0;
                }
                let chosen = order.iter().map(|&e| (e, p[e] / sum)).collect();
                Choice { chosen, load, importance: p }
            }
        }
    }

    fn choose_noisy(
        &self,
        l: usize,
        input: &[f64],
        clean: &[f64],
        noise: Option<&[f64]>,
    ) -> Choice {
        let (s, f) = (clean.len(), self.spec.layers[l].fanout);
        let spread = self.param(&format!("moe_gate.{l}.weight_noise.weight"));
        let deviation: Vec<f64> =
            spread.chunks_exact(input.len()).map(|w| dot(w, input).exp().ln_1p() + 1e-2).collect();
        let scores: Vec<f64> =
            (0..s).map(|e| clean[e] + noise.map_or(0.0, |n| n[e] * deviation[e])).collect();
        let order = ranked(&scores);
        let top: Vec<f64> = order[..f].iter().map(|&e| scores[e]).collect();
        let weights = if f > 1 { softmax(&top) } else { top };
        let chosen: Vec<(usize, f64)> = order[..f].iter().copied().zip(weights).collect();
        let mut importance = vec![0.0; s];
        let mut load = vec![0.0; s];
        for &(e, weight) in &chosen {
            importance[e] = weight;
            load[e] = if weight > 0.0 { 1.0 } else { 0.0 };
        }
        if noise.is_some() {
            // Shazeer App. A: the chance to be chosen if this expert's noise were drawn anew.
            let (last_in, first_out) = (scores[order[f - 1]], scores[order[f.min(s - 1)]]);
            for e in 0..s {
                let limit = if scores[e] > first_out { first_out } else { last_in };
                let z = (clean[e] - limit) / deviation[e];
                load[e] = 0.5 * libm::erfc(-z / std::f64::consts::SQRT_2);
            }
        }
        Choice { chosen, load, importance }
    }

    /// The sub-tree below a parent of layer `l`'s nodes, and its x_i (Eq. 3). `position` counts
    /// parents in their layer.
    fn grow(
        &self,
        l: usize,
        position: usize,
        view: &[f64],
        ancestors: &[f64],
        x: &[f64],
        noise: Option<&[Vec<f64>]>,
        sums: Option<&mut Vec<Sums>>,
    ) -> Node {
        let layer = &self.spec.layers[l];
        let input = [view, ancestors].concat();
        let s = layer.experts;
        let drawn = noise.map(|n| &n[l][position * s..(position + 1) * s]);
        let choice = self.choose(l, &input, drawn);
        let mut sums = sums;
        if let Some(sums) = sums.as_deref_mut() {
            let sums = &mut sums[l];
            sums.rows += 1.0;
            for e in 0..s {
                sums.load[e] += choice.load[e];
                sums.importance[e] += choice.importance[e];
            }
        }
        let mut children = Vec::new();
        // Without a tree all nodes share what the layer below made of the token.
        let multi_order = self.spec.structure == Structure::MultiOrder;
        let mut shared: Option<Node> = None;
        for (slot, &(expert, weight)) in choice.chosen.iter().enumerate() {
            let mut child = Node { children: vec![], hidden: vec![] };
            if l > 0 {
                child = if let Some(node) = &shared {
                    node.clone()
                } else {
                    let mut keys = ancestors.to_vec();
                    if self.spec.gate.ancestor_keys {
                        keys.extend(self.key(l, expert));
                    }
                    let at = if multi_order { 0 } else { position * layer.fanout + slot };
                    self.grow(l - 1, at, view, &keys, x, noise, sums.as_deref_mut())
                };
                if multi_order {
                    shared = Some(child.clone());
                }
            }
            children.push((expert, weight, child));
        }
        let hidden = self.sum(l, &children, x);
        Node { children, hidden }
    }

    /// x_i = sum over children of alpha sigma(u + W x + b), or its variants.
    fn sum(&self, l: usize, children: &[(usize, f64, Node)], x: &[f64]) -> Vec<f64> {
        let mut hidden = vec![0.0; self.spec.layers[l].width];
        let up = |below: &[f64]| {
            if l == 0 {
                return vec![0.0; hidden.len()];
            }
            self.affine(&format!("moe_W.{l}"), &format!("moe_W_bias.{l}"), below)
        };
        let terms: Vec<Vec<f64>> = children
            .iter()
            .map(|(expert, weight, child)| {
                let u = self.residual(l, *expert, x);
                let mix = |u: f64, v: f64| match self.spec.position {
                    ActivationPosition::Child => weight * u + v,
                    ActivationPosition::All | ActivationPosition::ChildV2 => weight * (u + v),
                };
                if self.spec.position == ActivationPosition::All {
                    let v = up(&child.hidden);
                    let inner: Vec<f64> = u.iter().zip(&v).map(|(u, v)| u + v).collect();
                    return self.sigma(l, &inner).iter().map(|s| weight * s).collect();
                }
                let v = up(&self.sigma(l, &child.hidden));
                u.iter().zip(&v).map(|(&u, &v)| mix(u, v)).collect()
            })
            .collect();
        for term in terms {
            for (h, t) in hidden.iter_mut().zip(term) {
                *h += t;
            }
        }
        hidden
    }

    /// Runs a batch. `noise[token][layer]` holds `[parents * s]` draws in training; tokens whose
    /// `valid` is false do not count in the balance losses.
    pub fn forward(
        &self,
        tokens: &[Vec<f64>],
        valid: Option<&[bool]>,
        noise: Option<&[Vec<Vec<f64>>]>,
    ) -> Output {
        let top = self.spec.depth() - 1;
        let empty = |l: &crate::spec::LayerSpec| Sums {
            rows: 0.0,
            load: vec![0.0; l.experts],
            importance: vec![0.0; l.experts],
        };
        let mut sums: Vec<Sums> = self.spec.layers.iter().map(empty).collect();
        let (mut y, mut roots) = (Vec::new(), Vec::new());
        for (t, x) in tokens.iter().enumerate() {
            let view = self.affine("moe_downproj_x.weight", "moe_downproj_x.bias", x);
            let counted = valid.is_none_or(|v| v[t]).then_some(&mut sums);
            let drawn = noise.map(|n| n[t].as_slice());
            let root = self.grow(top, 0, &view, &[], x, drawn, counted);
            y.push(self.affine("moe_W_final", "moe_W_final_bias", &root.hidden));
            roots.push(root);
        }
        let balance_losses = sums.iter().map(|s| self.balance(s)).collect();
        Output { y, roots, balance_losses }
    }

    fn balance(&self, sums: &Sums) -> f64 {
        let w = self.spec.gate.balance_weight;
        let s = sums.load.len() as f64;
        match self.spec.gate.kind {
            GateKind::Dense => 0.0,
            GateKind::Switch => {
                let n = sums.rows.max(1.0);
                let pairs = sums.load.iter().zip(&sums.importance);
                w * s * pairs.map(|(l, p)| l / n * (p / n)).sum::<f64>()
            }
            GateKind::NoisyTopk => {
                let variation = |x: &[f64]| {
                    if x.len() < 2 {
                        return 0.0;
                    }
                    let mean = x.iter().sum::<f64>() / s;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (s - 1.0);
                    variance / (mean * mean + 1e-10)
                };
                w * (variation(&sums.importance) + variation(&sums.load))
            }
        }
    }
}
