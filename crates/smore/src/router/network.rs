//! The router's network: query = Linear(act(Linear(input))), logits = query . key.

use super::add_to;
use crate::activation::Act;
use crate::config::GateKind;
use crate::kernel::Core;
use smore_engine::cpu::{Strided, StridedMut, gemm};
use smore_engine::{Float, Scratch};

/// A block's queries, with what the backward pass needs.
pub(super) struct Query<T> {
    rows: usize,
    /// `[rows, router_input]`
    pub(super) input: Scratch<T>,
    /// `[rows, m]` before the activation, where its backward pass needs that
    pre: Scratch<T>,
    /// `[rows, m]` after it; empty in a linear router
    hidden: Scratch<T>,
    /// `[rows, key_width]`; empty in a linear router, where the input is the query
    output: Scratch<T>,
    /// `[rows, s]`; empty for the noisy gate, which normalises the query first
    pub(super) logits: Scratch<T>,
}

impl<T> Query<T> {
    /// Logits that came without a network.
    pub(super) fn of_logits(rows: usize, logits: Scratch<T>) -> Self {
        Self {
            rows,
            input: Scratch::default(),
            pre: Scratch::default(),
            hidden: Scratch::default(),
            output: Scratch::default(),
            logits,
        }
    }

    /// `[rows, key_width]`
    pub(super) fn query(&self) -> &[T] {
        if self.output.is_empty() { &self.input } else { &self.output }
    }
}

pub(super) fn forward<T: Float>(
    core: &Core<T>,
    l: usize,
    rows: usize,
    input: Scratch<T>,
) -> Query<T> {
    let layer = &core.spec.layers[l];
    let mut q = Query { input, ..Query::of_logits(rows, Scratch::default()) };
    if let Some(net) = &core.layout.layers[l].network {
        let m = layer.router_width;
        q.pre = affine(core, &q.input, rows, layer.router_input, net.first, net.first_bias, m);
        q.hidden = act(core, l).forward(&mut q.pre);
        q.output = affine(core, &q.hidden, rows, m, net.second, net.second_bias, m);
    }
    if core.spec.gate.kind != GateKind::NoisyTopk {
        let mut logits = Scratch::zeros(rows * layer.experts);
        let keys = Strided::new(core.keys(l), layer.experts, layer.key_width);
        let query = Strided::new(q.query(), rows, layer.key_width);
        let out = StridedMut::new(&mut logits, rows, layer.experts);
        gemm(false, T::ONE, query, keys.t(), T::ZERO, out);
        q.logits = logits;
    }
    q
}

/// The bottom-up router's network, whose outputs are the logits `[rows, s]` themselves.
pub(super) fn forward_scores<T: Float>(
    core: &Core<T>,
    l: usize,
    rows: usize,
    input: Scratch<T>,
) -> Query<T> {
    let layer = &core.spec.layers[l];
    let mut q = Query { input, ..Query::of_logits(rows, Scratch::default()) };
    if let Some(net) = &core.layout.layers[l].network {
        let (m, s) = (layer.router_width, layer.experts);
        q.pre = affine(core, &q.input, rows, layer.router_input, net.first, net.first_bias, m);
        q.hidden = act(core, l).forward(&mut q.pre);
        q.logits = affine(core, &q.hidden, rows, m, net.second, net.second_bias, s);
    }
    q
}

/// The backward pass of [`forward_scores`]: slopes by its input.
pub(super) fn backward_scores<T: Float>(
    core: &Core<T>,
    l: usize,
    q: &Query<T>,
    dlogits: Scratch<T>,
    grads: &mut [T],
) -> Scratch<T> {
    network_backward(core, l, q, dlogits, core.spec.layers[l].experts, grads)
}

/// From the slopes by the logits to those by the router's input; keys and network on the way.
pub(super) fn backward<T: Float>(
    core: &Core<T>,
    l: usize,
    q: &Query<T>,
    dlogits: &[T],
    grads: &mut [T],
) -> Scratch<T> {
    let layer = &core.spec.layers[l];
    let (rows, s, width) = (q.rows, layer.experts, layer.key_width);
    let dlogits = Strided::new(dlogits, rows, s);
    let at = core.layout.layers[l].keys;
    let dkeys = StridedMut::new(&mut grads[at..], s, width);
    gemm(false, T::ONE, dlogits.t(), Strided::new(q.query(), rows, width), T::ONE, dkeys);
    let mut dquery = Scratch::zeros(rows * width);
    let keys = Strided::new(core.keys(l), s, width);
    gemm(false, T::ONE, dlogits, keys, T::ZERO, StridedMut::new(&mut dquery, rows, width));
    backward_query(core, l, q, dquery, grads)
}

/// From the slopes by the query to those by the router's input.
pub(super) fn backward_query<T: Float>(
    core: &Core<T>,
    l: usize,
    q: &Query<T>,
    dquery: Scratch<T>,
    grads: &mut [T],
) -> Scratch<T> {
    network_backward(core, l, q, dquery, core.spec.layers[l].router_width, grads)
}

/// From the slopes by the network's `width` outputs to those by its input.
fn network_backward<T: Float>(
    core: &Core<T>,
    l: usize,
    q: &Query<T>,
    doutput: Scratch<T>,
    width: usize,
    grads: &mut [T],
) -> Scratch<T> {
    let layer = &core.spec.layers[l];
    let Some(net) = &core.layout.layers[l].network else {
        return doutput;
    };
    let (rows, m) = (q.rows, layer.router_width);
    let mut dhidden = Scratch::zeros(rows * m);
    let second = (net.second, net.second_bias);
    affine_backward(core, &q.hidden, rows, m, second, width, &doutput, grads, &mut dhidden);
    let dslope = act(core, l).backward(&q.pre, &q.hidden, &mut dhidden);
    if let Some(slope) = net.slope {
        grads[slope] += dslope;
    }
    let mut dinput = Scratch::zeros(rows * layer.router_input);
    let first = (net.first, net.first_bias);
    affine_backward(
        core,
        &q.input,
        rows,
        layer.router_input,
        first,
        m,
        &dhidden,
        grads,
        &mut dinput,
    );
    dinput
}

fn act<T: Float>(core: &Core<T>, l: usize) -> Act<T> {
    let slope = core.layout.layers[l].network.as_ref().and_then(|n| n.slope);
    Act::new(core.spec.gate.activation, slope.map(|at| core.params[at]))
}

/// y `[rows, d_out]` = x `[rows, d_in]` W^T + b
fn affine<T: Float>(
    core: &Core<T>,
    x: &[T],
    rows: usize,
    d_in: usize,
    weight: usize,
    bias: usize,
    d_out: usize,
) -> Scratch<T> {
    let bias = &core.params[bias..bias + d_out];
    let mut y = Scratch::repeat(bias, rows);
    let w = Strided::new(&core.params[weight..], d_out, d_in);
    let out = StridedMut::new(&mut y, rows, d_out);
    gemm(false, T::ONE, Strided::new(x, rows, d_in), w.t(), T::ONE, out);
    y
}

/// dW += dy^T x, db += sum of dy, dx = dy W.
fn affine_backward<T: Float>(
    core: &Core<T>,
    x: &[T],
    rows: usize,
    d_in: usize,
    (weight, bias): (usize, usize),
    d_out: usize,
    dy: &[T],
    grads: &mut [T],
    dx: &mut [T],
) {
    for dy in dy.chunks_exact(d_out) {
        add_to(&mut grads[bias..bias + d_out], dy);
    }
    let dy = Strided::new(dy, rows, d_out);
    let dw = StridedMut::new(&mut grads[weight..], d_out, d_in);
    gemm(false, T::ONE, dy.t(), Strided::new(x, rows, d_in), T::ONE, dw);
    let w = Strided::new(&core.params[weight..], d_out, d_in);
    gemm(false, T::ONE, dy, w, T::ZERO, StridedMut::new(dx, rows, d_in));
}
