//! The top-down router (paper Sec. 3.3, Eqs. 6-7): from the root to the leaves, every active node
//! chooses its children.
//!
//! A parent's router input is the token's view x_down followed by the keys of the parent's
//! ancestors, from the top down to the parent itself. A small network turns it into a query; the query
//! meets the experts' keys; a gate ([`switch`] and dense, [`noisy`]) turns the logits into chosen
//! experts and their weights.

pub mod bottom_up;
pub(crate) mod flat;
mod network;
pub mod noisy;
pub mod switch;

use crate::config::GateKind;
use crate::kernel::Core;
use crate::tree::ResidualTree;
use network::Query;
use smore_engine::{Float, Scratch};

/// What the balance loss of one layer needs from all tokens together.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerStats {
    /// Rows that count: valid tokens times parents.
    pub rows: f64,
    /// Per expert: selections (switch, dense, noisy in evaluation) or the summed probability of
    /// being selected (noisy in training).
    pub load: Vec<f64>,
    /// Per expert: summed softmax probability (switch) or summed gate weight (noisy, dense).
    pub importance: Vec<f64>,
}

impl LayerStats {
    /// Nothing seen yet.
    pub fn new(experts: usize) -> Self {
        Self { rows: 0.0, load: vec![0.0; experts], importance: vec![0.0; experts] }
    }

    /// Adds what other tokens brought.
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        for (mine, other) in self.load.iter_mut().zip(&other.load) {
            *mine += other;
        }
        for (mine, other) in self.importance.iter_mut().zip(&other.importance) {
            *mine += other;
        }
    }
}

/// Slopes of one layer's balance loss by [`LayerStats`], the same for every token.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceSlopes {
    /// By `load`, per expert.
    pub load: Vec<f64>,
    /// By `importance`, per expert.
    pub importance: Vec<f64>,
}

/// The gates' common settings at one layer.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) kind: GateKind,
    pub(crate) experts: usize,
    pub(crate) fanout: usize,
    /// Weights of the chosen are divided by their sum.
    pub(crate) renormalised: bool,
}

impl Gate {
    /// A gate of S'MoRE: the switch gate renormalises where it chooses more than one expert. A
    /// single choice keeps its raw probability, so that the router gets a gradient from the task.
    pub(crate) fn new(kind: GateKind, experts: usize, fanout: usize) -> Self {
        Self { kind, experts, fanout, renormalised: kind == GateKind::Switch && fanout > 1 }
    }
}

/// The balance loss of one layer and its slopes.
pub(crate) fn balance(kind: GateKind, weight: f64, stats: &LayerStats) -> (f64, BalanceSlopes) {
    match kind {
        GateKind::Switch => switch::balance(weight, stats),
        GateKind::NoisyTopk => noisy::balance(weight, stats),
        GateKind::Dense => {
            let zero = vec![0.0; stats.load.len()];
            (0.0, BalanceSlopes { load: zero.clone(), importance: zero })
        }
    }
}

/// One layer's routing of a block of tokens, with what its backward pass needs.
pub(crate) struct Routed<T> {
    query: Query<T>,
    scores: Scores<T>,
}

/// From query to gate weights, kept for the backward pass.
pub(crate) enum Scores<T> {
    Softmax(switch::Scores<T>),
    Noisy(noisy::Scores<T>),
}

/// Chooses the children of every parent in layer `l` and writes them into `tree`, or, where
/// `fixed`, weighs the children that `tree` already holds.
///
/// `view [n, stack_width]` starts at the router's columns; `noise [n * parents, s]`.
pub(crate) fn route<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    view: &[T],
    noise: Option<&[T]>,
    tree: &mut ResidualTree<T>,
    fixed: bool,
) -> Routed<T> {
    let input = router_input(core, l, n, view, tree);
    let layer = &core.spec.layers[l];
    let query = network::forward(core, l, n * layer.parents, input);
    let gate = core.gate(l);
    let out = &mut tree.layers[l];
    let scores = match gate.kind {
        GateKind::Switch | GateKind::Dense => {
            Scores::Softmax(switch::forward(gate, &query.logits, out, fixed))
        }
        GateKind::NoisyTopk => {
            Scores::Noisy(noisy::forward(core, l, gate, &query, noise, out, fixed))
        }
    };
    Routed { query, scores }
}

/// Adds the block's rows to the layer's statistics; tokens with `valid` false do not count.
pub(crate) fn collect<T: Float>(
    core: &Core<T>,
    l: usize,
    routed: &Routed<T>,
    tree: &ResidualTree<T>,
    valid: Option<&[bool]>,
    stats: &mut LayerStats,
) {
    let layer = &core.spec.layers[l];
    let out = &tree.layers[l];
    let rows = out.expert_idx.len() / layer.fanout;
    for row in 0..rows {
        if !valid.is_none_or(|v| v[row / layer.parents]) {
            continue;
        }
        stats.rows += 1.0;
        let chosen = row * layer.fanout..(row + 1) * layer.fanout;
        let (idx, weight) = (&out.expert_idx[chosen.clone()], &out.gate_weight[chosen]);
        match &routed.scores {
            Scores::Softmax(s) => {
                switch::collect(core.spec.gate.kind, s, row, idx, weight, stats);
            }
            Scores::Noisy(s) => noisy::collect(s, row, layer.experts, idx, weight, stats),
        }
    }
}

/// Gradients of the router of layer `l`: adds to the core's gradients and to `dview`.
///
/// `dweight [n * nodes]` is the loss's slope by every gate weight.
pub(crate) fn route_backward<T: Float>(
    core: &Core<T>,
    l: usize,
    routed: &Routed<T>,
    tree: &ResidualTree<T>,
    dweight: &mut [T],
    balance: Option<&BalanceSlopes>,
    valid: Option<&[bool]>,
    grads: &mut [T],
    dview: &mut [T],
) {
    let layer = &core.spec.layers[l];
    let gate = core.gate(l);
    let out = &tree.layers[l];
    let counts = |row: usize| valid.is_none_or(|v| v[row / layer.parents]);
    let dinput = match &routed.scores {
        Scores::Softmax(s) => {
            let dlogits = switch::backward(gate, s, out, dweight, balance, counts);
            network::backward(core, l, &routed.query, &dlogits, grads)
        }
        Scores::Noisy(s) => {
            noisy::backward(core, l, gate, &routed.query, s, out, dweight, balance, counts, grads)
        }
    };
    spread_input(core, l, tree, &dinput, grads, dview);
}

/// `[n * parents, router_input]`: the token's view, then the ancestors' keys from the top down.
fn router_input<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    view: &[T],
    tree: &ResidualTree<T>,
) -> Scratch<T> {
    let spec = core.spec;
    let layer = &spec.layers[l];
    let (width, d_down, stride) = (layer.router_input, spec.gate.input_width, spec.stack_width());
    let mut input = Scratch::zeros(n * layer.parents * width);
    for (row, input) in input.chunks_exact_mut(width).enumerate() {
        let (token, parent) = (row / layer.parents, row % layer.parents);
        input[..d_down].copy_from_slice(&view[token * stride..][..d_down]);
        for_ancestors(core, l, tree, token, parent, |level, expert, columns| {
            let m = spec.layers[level].key_width;
            input[columns..columns + m].copy_from_slice(&core.used_keys(level)[expert * m..][..m]);
        });
    }
    input
}

/// The backward pass of [`router_input`].
fn spread_input<T: Float>(
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    dinput: &[T],
    grads: &mut [T],
    dview: &mut [T],
) {
    let spec = core.spec;
    let layer = &spec.layers[l];
    let (width, d_down, stride) = (layer.router_input, spec.gate.input_width, spec.stack_width());
    for (row, dinput) in dinput.chunks_exact(width).enumerate() {
        let (token, parent) = (row / layer.parents, row % layer.parents);
        add_to(&mut dview[token * stride..][..d_down], &dinput[..d_down]);
        for_ancestors(core, l, tree, token, parent, |level, expert, columns| {
            let m = spec.layers[level].key_width;
            let key = core.layout.layers[level].keys + expert * m;
            add_to(&mut grads[key..key + m], &dinput[columns..columns + m]);
        });
    }
}

/// Calls `f(layer, expert, first column of its key in the router input)` for the node `parent` of
/// layer l+1 and each of its ancestors.
fn for_ancestors<T>(
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    token: usize,
    parent: usize,
    mut f: impl FnMut(usize, usize, usize),
) {
    let layers = &core.spec.layers;
    let mut node = parent;
    if !core.spec.gate.ancestor_keys {
        return;
    }
    let mut columns = layers[l].router_input;
    for level in l + 1..layers.len() {
        let expert = tree.layers[level].expert_idx[token * layers[level].nodes + node];
        columns -= layers[level].key_width;
        f(level, usize::from(expert), columns);
        node /= layers[level].fanout;
    }
}

pub(crate) fn add_to<T: Float>(target: &mut [T], values: &[T]) {
    for (t, &v) in target.iter_mut().zip(values) {
        *t += v;
    }
}

/// The `count` largest of `values`, largest first; of equal ones the lower index first.
pub(crate) fn top<T: Float>(values: &[T], count: usize, chosen: &mut [u16]) {
    for slot in 0..count {
        let mut best = None;
        for (i, &value) in values.iter().enumerate() {
            if chosen[..slot].contains(&(i as u16)) {
                continue;
            }
            if best.is_none_or(|(_, top)| value > top) {
                best = Some((i, value));
            }
        }
        chosen[slot] = best.map_or(0, |(i, _)| i as u16);
    }
}
