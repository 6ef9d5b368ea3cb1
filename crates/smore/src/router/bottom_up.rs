//! The bottom-up router (paper, App. B.2), which the authors describe and did not build: routing
//! and propagation alternate from the leaves to the root, so that a choice can depend on what the
//! chosen experts below have made of the token.
//!
//! Keys belong to positions in the tree, not to parents. Layer l has F_{l+1} parents and under each
//! f_l positions.
//!
//! - *Leaves.* Every parent position p holds a key for each expert: score(p, e) = x_down . key(p, e).
//!   Softmax over the experts, the f_0 best are its children.
//! - *Layer l >= 1.* Position j of a parent holds the aggregated embedding x_j (d_l) of its own
//!   children and a key. `Linear(act(Linear([x_j, key_j])))` scores all s_l experts. Under one
//!   parent this gives f_l s_l pairs (position, expert); one softmax runs over them and the f_l best
//!   pairs become the parent's children: residual of the expert, embedding of the position.
//!
//! # Differs from the paper
//! The appendix leaves open what "the top f_l among the positions of one parent" ranges over. Here
//! it is the pairs: a position whose embedding suits no expert may be left out, and one that suits
//! two may serve twice. Weights are renormalised and the balance loss is formed as by the switch
//! gate (a single choice keeps its raw probability), an expert's probability being the sum over
//! positions. Gradients flow through every pair's score into the embeddings below, chosen or not.

use super::switch;
use super::{BalanceSlopes, Gate, Query, Routed, Scores, add_to, network};
use crate::config::GateKind;
use crate::kernel::Core;
use crate::propagate::{self, LayerValues};
use crate::tree::ResidualTree;
use smore_engine::cpu::{Strided, StridedMut, gemm};
use smore_engine::{Float, Scratch};

/// Routes and propagates a block of `n` tokens. `z [n, stack_width]`.
pub(crate) fn forward<T: Float>(
    core: &Core<T>,
    n: usize,
    z: &[T],
    tree: &mut ResidualTree<T>,
    fixed: bool,
) -> (Vec<Routed<T>>, Vec<LayerValues<T>>) {
    let depth = core.spec.depth();
    let (mut routed, mut layers) = (Vec::with_capacity(depth), Vec::with_capacity(depth));
    let view = &z[core.spec.stacked_ranks()..];
    for l in 0..depth {
        let query = match layers.last() {
            None => leaf_scores(core, n, view),
            Some(below) => pair_scores(core, l, n, below),
        };
        routed.push(choose(core, l, query, tree, fixed));
        let values = propagate::forward(core, l, n, z, tree, layers.last_mut());
        layers.push(values);
    }
    (routed, layers)
}

/// The gate over everything one parent chooses from.
fn pair_gate<T: Float>(core: &Core<T>, l: usize) -> Gate {
    let layer = &core.spec.layers[l];
    let positions = if l == 0 { 1 } else { layer.fanout };
    Gate::new(GateKind::Switch, positions * layer.experts, layer.fanout)
}

/// x_down . key(p, e): `[n * F_1, s_0]`.
fn leaf_scores<T: Float>(core: &Core<T>, n: usize, view: &[T]) -> Query<T> {
    let layer = &core.spec.layers[0];
    let (s, width, parents) = (layer.experts, layer.key_width, layer.parents);
    let mut logits = Scratch::zeros(n * parents * s);
    let x = Strided::rows_apart(view, n, width, core.spec.stack_width());
    for p in 0..parents {
        let keys = Strided::new(&core.params[leaf_keys(core, p)..], s, width);
        let target = StridedMut::rows_apart(&mut logits[p * s..], n, s, parents * s);
        gemm(false, T::ONE, x, keys.t(), T::ZERO, target);
    }
    Query::of_logits(n * parents, logits)
}

/// Offset of the leaf keys `[s, d_down]` of parent position `p`.
fn leaf_keys<T: Float>(core: &Core<T>, p: usize) -> usize {
    let layer = &core.spec.layers[0];
    core.layout.layers[0].keys + p * layer.experts * layer.key_width
}

/// Scores of all experts at every position, from its embedding and key: `[n * F_l, s_l]`.
fn pair_scores<T: Float>(core: &Core<T>, l: usize, n: usize, below: &LayerValues<T>) -> Query<T> {
    let layer = &core.spec.layers[l];
    let (embedding, key) = (layer.width_below, layer.key_width);
    let keys = &core.params[core.layout.layers[l].keys..][..layer.nodes * key];
    let mut input = Scratch::zeros(n * layer.nodes * (embedding + key));
    let rows = input.chunks_exact_mut(embedding + key).zip(below.hidden.chunks_exact(embedding));
    for (row, (input, x)) in rows.enumerate() {
        input[..embedding].copy_from_slice(x);
        input[embedding..].copy_from_slice(&keys[row % layer.nodes * key..][..key]);
    }
    network::forward_scores(core, l, n * layer.nodes, input)
}

/// The f_l best of every parent's pairs.
fn choose<T: Float>(
    core: &Core<T>,
    l: usize,
    query: Query<T>,
    tree: &mut ResidualTree<T>,
    fixed: bool,
) -> Routed<T> {
    let layer = &core.spec.layers[l];
    let out = &mut tree.layers[l];
    if fixed {
        to_pairs(layer.experts, layer.fanout, out);
    }
    let scores = switch::forward(pair_gate(core, l), &query.logits, out, fixed);
    if let Some(source) = &mut out.source {
        for (node, (source, pair)) in source.iter_mut().zip(&out.expert_idx).enumerate() {
            let parent = node % layer.nodes / layer.fanout;
            let position = usize::from(*pair) / layer.experts;
            *source = (parent * layer.fanout + position) as u32;
        }
    }
    for pair in &mut out.expert_idx {
        *pair %= layer.experts as u16;
    }
    Routed { query, scores: Scores::Softmax(scores) }
}

/// Writes (position, expert) back into one number, as the gate counts pairs.
fn to_pairs<T>(experts: usize, fanout: usize, out: &mut crate::tree::TreeLayer<T>) {
    if let Some(source) = &out.source {
        for (pair, source) in out.expert_idx.iter_mut().zip(source) {
            *pair += (*source as usize % fanout * experts) as u16;
        }
    }
}

/// Gradients of the router of layer `l`: adds to the core's gradients, to `dview` and to `dbelow`,
/// the slopes by the layer below's output. `view` are the router's columns of z.
pub(crate) fn backward<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    view: &[T],
    routed: &Routed<T>,
    tree: &ResidualTree<T>,
    dweight: &mut [T],
    balance: Option<&BalanceSlopes>,
    valid: Option<&[bool]>,
    grads: &mut [T],
    dview: &mut [T],
    dbelow: &mut [T],
) {
    let layer = &core.spec.layers[l];
    let Scores::Softmax(scores) = &routed.scores else { return };
    let gate = pair_gate(core, l);
    let mut pairs = tree.layers[l].clone();
    to_pairs(layer.experts, layer.fanout, &mut pairs);
    // Every position of an expert has the slope of its balance loss.
    let positions = gate.experts / layer.experts;
    let spread = balance.map(|b| BalanceSlopes {
        load: vec![0.0; gate.experts],
        importance: b.importance.repeat(positions),
    });
    let counts = |row: usize| valid.is_none_or(|v| v[row / layer.parents]);
    let dlogits = switch::backward(gate, scores, &pairs, dweight, spread.as_ref(), counts);
    if l == 0 {
        return leaf_backward(core, n, view, &dlogits, grads, dview);
    }
    let dinput = network::backward_scores(core, l, &routed.query, dlogits, grads);
    let (embedding, key) = (layer.width_below, layer.key_width);
    let at = core.layout.layers[l].keys;
    for (row, d) in dinput.chunks_exact(embedding + key).enumerate() {
        add_to(&mut dbelow[row * embedding..][..embedding], &d[..embedding]);
        add_to(&mut grads[at + row % layer.nodes * key..][..key], &d[embedding..]);
    }
}

fn leaf_backward<T: Float>(
    core: &Core<T>,
    n: usize,
    view: &[T],
    dlogits: &[T],
    grads: &mut [T],
    dview: &mut [T],
) {
    let layer = &core.spec.layers[0];
    let (s, width, parents) = (layer.experts, layer.key_width, layer.parents);
    let stride = core.spec.stack_width();
    let x = Strided::rows_apart(view, n, width, stride);
    for p in 0..parents {
        let d = Strided::rows_apart(&dlogits[p * s..], n, s, parents * s);
        let at = leaf_keys(core, p);
        let keys = Strided::new(&core.params[at..], s, width);
        let dkeys = StridedMut::new(&mut grads[at..], s, width);
        gemm(false, T::ONE, d.t(), x, T::ONE, dkeys);
        let target = StridedMut::rows_apart(dview, n, width, stride);
        gemm(false, T::ONE, d, keys, T::ONE, target);
    }
}
