//! Propagation up the tree (paper Eq. 3; biases as in Eq. 32; S'MoRE* as in Eq. 38).
//!
//! For a block of tokens, layer by layer from the leaves:
//!
//! ```text
//! u_n = scale_l (B_l^n z_n + b_l^n)                    z = A x + a, from the stacked projection
//! x_i = sum over children n of alpha_n sigma(u_n + W_l x_n + bias_l)
//! ```
//!
//! u depends on the token and the expert alone, however often the expert stands in the tree, so it
//! is computed once per pair; each expert multiplies the tokens that chose it together. W_l meets
//! all nodes of the block in one product.

use crate::config::ActivationPosition;
use crate::kernel::Core;
use crate::router::add_to;
use crate::tree::ResidualTree;
use smore_engine::cpu::{Strided, StridedMut, dot, gemm, simd};
use smore_engine::{Float, Scratch};

/// One layer's values for a block, kept for the backward pass.
pub(crate) struct LayerValues<T> {
    /// Row of `residuals` that holds u of (token, expert), `[n * s]`; `NONE` where it is not active
    row_of: Scratch<u32>,
    /// Rows of each expert: `first_row[n]..first_row[n + 1]`
    first_row: Scratch<usize>,
    /// Token of each row
    token_of: Scratch<u32>,
    /// z of each row, `[rows, r]`
    inputs: Scratch<T>,
    /// u of each row, `[rows, d_{l+1}]`; empty where sigma stands on it, whose backward pass does
    /// without
    residuals: Scratch<T>,
    /// The children's outputs as each node takes them, where sigma stands on them and its backward
    /// pass needs its argument, `[n * nodes, d_l]`
    taken: Scratch<T>,
    /// What W_l multiplies: the children's outputs, through sigma where it stands on the child,
    /// `[n * nodes, d_l]`; empty at the leaves
    below: Scratch<T>,
    /// W x + bias at each node (`child`), or the argument of sigma (`all`) where its backward pass
    /// needs it, `[n * nodes, d_{l+1}]`
    inner: Scratch<T>,
    /// sigma at each node for `all`, `[n * nodes, d_{l+1}]`, else empty
    outer: Scratch<T>,
    /// The layer's output for every parent, `[n * parents, d_{l+1}]`, until the layer above takes it
    pub(crate) hidden: Scratch<T>,
}

const NONE: u32 = u32::MAX;

/// Layer `l` of a block. `z [n, stack_width]`; `below` is the layer below, absent at the leaves.
pub(crate) fn forward<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    z: &[T],
    tree: &ResidualTree<T>,
    below: Option<&mut LayerValues<T>>,
) -> LayerValues<T> {
    let mut values = active_experts(core, l, n, tree);
    residuals(core, l, z, &mut values);
    if let Some(below) = below {
        transform_children(core, l, n, tree, std::mem::take(&mut below.hidden), &mut values);
    }
    aggregate(core, l, n, tree, &mut values);
    values
}

/// Row of the layer below's output that `node` of layer `l` takes; that output has `rows` rows for
/// every token.
fn source<T>(core: &Core<T>, l: usize, tree: &ResidualTree<T>, node: usize, rows: usize) -> usize {
    let token = node / core.spec.layers[l].nodes;
    tree.layers[l].source.as_ref().map_or(node, |s| token * rows + s[node] as usize)
}

/// Finds the pairs (token, expert) that occur in layer `l` and gives each a row.
fn active_experts<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    tree: &ResidualTree<T>,
) -> LayerValues<T> {
    let layer = &core.spec.layers[l];
    let s = layer.experts;
    let mut row_of = Scratch::repeat(&[NONE], n * s);
    let mut pairs = 0;
    for (node, &expert) in tree.layers[l].expert_idx.iter().enumerate() {
        let row = &mut row_of[node / layer.nodes * s + usize::from(expert)];
        pairs += usize::from(*row == NONE);
        *row = 0;
    }
    let mut first_row = Scratch::zeros(s + 1);
    let mut token_of = Scratch::zeros(pairs);
    let mut rows = 0;
    for expert in 0..s {
        for token in 0..n {
            let row = &mut row_of[token * s + expert];
            if *row != NONE {
                *row = rows as u32;
                token_of[rows] = token as u32;
                rows += 1;
            }
        }
        first_row[expert + 1] = rows;
    }
    LayerValues {
        row_of,
        first_row,
        token_of,
        inputs: Scratch::default(),
        residuals: Scratch::default(),
        taken: Scratch::default(),
        below: Scratch::default(),
        inner: Scratch::default(),
        outer: Scratch::default(),
        hidden: Scratch::default(),
    }
}

/// u = scale (B z + b) for every active pair.
fn residuals<T: Float>(core: &Core<T>, l: usize, z: &[T], values: &mut LayerValues<T>) {
    let layer = &core.spec.layers[l];
    let (rank, width, stride) = (layer.rank, layer.width, core.spec.stack_width());
    let scale = T::from_f64(layer.scale);
    let rows = values.token_of.len();
    values.inputs = Scratch::zeros(rows * rank);
    values.residuals = Scratch::zeros(rows * width);
    for expert in 0..layer.experts {
        let (first, last) = (values.first_row[expert], values.first_row[expert + 1]);
        let inputs = &mut values.inputs[first * rank..last * rank];
        let column = layer.stack_start + expert * rank;
        for (input, &token) in inputs.chunks_exact_mut(rank).zip(&values.token_of[first..last]) {
            input.copy_from_slice(&z[token as usize * stride + column..][..rank]);
        }
        let out = &mut values.residuals[first * width..last * width];
        let bias = &core.up_bias(l)[expert * width..(expert + 1) * width];
        for out in out.chunks_exact_mut(width) {
            for (o, &b) in out.iter_mut().zip(bias) {
                *o = scale * b;
            }
        }
        let up = Strided::new(&core.up(l)[expert * width * rank..], width, rank);
        let target = StridedMut::new(out, last - first, width);
        gemm(false, scale, Strided::new(inputs, last - first, rank), up.t(), T::ONE, target);
    }
}

/// inner = W_l x + bias_l over all nodes, x through sigma where it stands on the child.
fn transform_children<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    tree: &ResidualTree<T>,
    children: Scratch<T>,
    values: &mut LayerValues<T>,
) {
    let layer = &core.spec.layers[l];
    let (nodes, width, below) = (n * layer.nodes, layer.width, layer.width_below);
    let mut taken = children;
    if tree.layers[l].source.is_some() {
        let (children, rows) = (taken, core.spec.layers[l - 1].parents);
        taken = Scratch::zeros(nodes * below);
        for (node, taken) in taken.chunks_exact_mut(below).enumerate() {
            let row = source(core, l, tree, node, rows);
            taken.copy_from_slice(&children[row * below..][..below]);
        }
    }
    if core.spec.position == ActivationPosition::All {
        values.below = taken;
    } else {
        values.below = core.act(l).forward(&mut taken);
        values.taken = taken;
    }
    let (w, bias) = core.transform(l);
    values.inner = Scratch::repeat(bias, nodes);
    let target = StridedMut::new(&mut values.inner, nodes, width);
    let w = Strided::new(w, width, below);
    gemm(false, T::ONE, Strided::new(&values.below, nodes, below), w.t(), T::ONE, target);
}

/// The sum over each parent's children.
fn aggregate<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    tree: &ResidualTree<T>,
    values: &mut LayerValues<T>,
) {
    let layer = &core.spec.layers[l];
    let width = layer.width;
    values.hidden = Scratch::zeros(n * layer.parents * width);
    let all = core.spec.position == ActivationPosition::All;
    if all {
        if values.inner.is_empty() {
            values.inner = Scratch::zeros(n * layer.nodes * width);
        }
        let residuals = std::mem::take(&mut values.residuals);
        let LayerValues { row_of, inner, .. } = values;
        simd!({
            for (node, inner) in inner.chunks_exact_mut(width).enumerate() {
                add_to(inner, residual(&residuals, row_of, core, l, tree, node));
            }
        });
        values.outer = core.act(l).forward(&mut values.inner);
    }
    let LayerValues { row_of, residuals, inner, outer, hidden, .. } = values;
    let weights = &tree.layers[l].gate_weight;
    // In `child`, what comes from below carries no gate weight.
    let below_weight = |weight| match core.spec.position {
        ActivationPosition::Child => T::ONE,
        _ => weight,
    };
    simd!({
        for (node, &weight) in weights.iter().enumerate() {
            let parent = &mut hidden[node / layer.fanout * width..][..width];
            if all {
                axpy(weight, &outer[node * width..][..width], parent);
                continue;
            }
            axpy(weight, residual(residuals, row_of, core, l, tree, node), parent);
            if l > 0 {
                axpy(below_weight(weight), &inner[node * width..][..width], parent);
            }
        }
    });
}

/// u of the expert that stands at `node`.
#[inline(always)]
fn residual<'a, T: Float>(
    residuals: &'a [T],
    row_of: &[u32],
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    node: usize,
) -> &'a [T] {
    let layer = &core.spec.layers[l];
    let expert = usize::from(tree.layers[l].expert_idx[node]);
    let row = row_of[node / layer.nodes * layer.experts + expert] as usize;
    &residuals[row * layer.width..][..layer.width]
}

#[inline(always)]
fn axpy<T: Float>(a: T, x: &[T], y: &mut [T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// From the slopes by the output of layer `l` to those by z (added to `dz`), by the gate weights
/// `[n * nodes]` and by the output of the layer below (empty at the leaves); up factors, transforms
/// and prelu slopes are added to `grads`. Slopes take the place of `values`.
pub(crate) fn backward<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    tree: &ResidualTree<T>,
    mut values: LayerValues<T>,
    dhidden: &[T],
    grads: &mut [T],
    dz: &mut [T],
) -> (Scratch<T>, Scratch<T>) {
    let (dweight, dinner) = match core.spec.position {
        ActivationPosition::All => split_all(core, l, tree, &mut values, dhidden, grads),
        _ => split_child(core, l, tree, &mut values, dhidden),
    };
    residuals_backward(core, l, &mut values, grads, dz);
    let dbelow = if l > 0 {
        transform_backward(core, l, n, tree, &mut values, &dinner, grads)
    } else {
        Scratch::default()
    };
    (dweight, dbelow)
}

/// The backward pass of [`aggregate`] where sigma stands on all: slopes by gate weights and by
/// sigma's argument, in the place of `outer`; `residuals` become the slopes by them.
fn split_all<T: Float>(
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    values: &mut LayerValues<T>,
    dhidden: &[T],
    grads: &mut [T],
) -> (Scratch<T>, Scratch<T>) {
    let layer = &core.spec.layers[l];
    let (width, act) = (layer.width, core.act(l));
    let mut dweight = Scratch::zeros(tree.layers[l].gate_weight.len());
    let mut dinner = std::mem::take(&mut values.outer);
    let mut dresiduals = Scratch::zeros(values.token_of.len() * width);
    let mut dslope = T::ZERO;
    simd!({
        let mut slopes = Scratch::zeros(width);
        let weights = tree.layers[l].gate_weight.iter().zip(dweight.iter_mut());
        for (node, ((&weight, dweight), outer)) in
            weights.zip(dinner.chunks_exact_mut(width)).enumerate()
        {
            let dparent = &dhidden[node / layer.fanout * width..][..width];
            *dweight = dot(dparent, outer);
            for (d, &dparent) in slopes.iter_mut().zip(dparent) {
                *d = weight * dparent;
            }
            let inner = values.inner.get(node * width..(node + 1) * width).unwrap_or(&[]);
            dslope += act.backward(inner, outer, &mut slopes);
            outer.copy_from_slice(&slopes);
            add_to(residual_mut(&mut dresiduals, &values.row_of, core, l, tree, node), outer);
        }
    });
    values.residuals = dresiduals;
    add_slope(core, l, dslope, grads);
    (dweight, dinner)
}

/// The backward pass of [`aggregate`] where sigma stands on the children: slopes by gate weights and
/// by `inner`; `residuals` become the slopes by them.
fn split_child<T: Float>(
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    values: &mut LayerValues<T>,
    dhidden: &[T],
) -> (Scratch<T>, Scratch<T>) {
    let layer = &core.spec.layers[l];
    let width = layer.width;
    let weights = &tree.layers[l].gate_weight;
    let mut dweight = Scratch::zeros(weights.len());
    let mut dinner = Scratch::zeros(weights.len() * width);
    let mut dresiduals = Scratch::zeros(values.residuals.len());
    let LayerValues { row_of, residuals, inner, .. } = &*values;
    simd!({
        for (node, dinner) in dinner.chunks_exact_mut(width).enumerate() {
            let weight = weights[node];
            let dparent = &dhidden[node / layer.fanout * width..][..width];
            dweight[node] = dot(dparent, residual(residuals, row_of, core, l, tree, node));
            let du = residual_mut(&mut dresiduals, row_of, core, l, tree, node);
            axpy(weight, dparent, du);
            if l > 0 && core.spec.position == ActivationPosition::ChildV2 {
                dweight[node] += dot(dparent, &inner[node * width..][..width]);
                axpy(weight, dparent, dinner);
            } else if l > 0 {
                axpy(T::ONE, dparent, dinner);
            }
        }
    });
    values.residuals = dresiduals;
    (dweight, dinner)
}

fn add_slope<T: Float>(core: &Core<T>, l: usize, dslope: T, grads: &mut [T]) {
    if let Some(at) = core.layout.layers[l].slope {
        grads[at] += dslope;
    }
}

#[inline(always)]
fn residual_mut<'a, T: Float>(
    dresiduals: &'a mut [T],
    row_of: &[u32],
    core: &Core<T>,
    l: usize,
    tree: &ResidualTree<T>,
    node: usize,
) -> &'a mut [T] {
    let layer = &core.spec.layers[l];
    let expert = usize::from(tree.layers[l].expert_idx[node]);
    let row = row_of[node / layer.nodes * layer.experts + expert] as usize;
    &mut dresiduals[row * layer.width..][..layer.width]
}

/// The backward pass of [`residuals`], which hold the slopes by them; adds to `dz [n, stack_width]`.
fn residuals_backward<T: Float>(
    core: &Core<T>,
    l: usize,
    values: &mut LayerValues<T>,
    grads: &mut [T],
    dz: &mut [T],
) {
    let layer = &core.spec.layers[l];
    let (rank, width, stride) = (layer.rank, layer.width, core.spec.stack_width());
    let scale = T::from_f64(layer.scale);
    let at = &core.layout.layers[l];
    for expert in 0..layer.experts {
        let (first, last) = (values.first_row[expert], values.first_row[expert + 1]);
        let rows = last - first;
        let du = Strided::new(&values.residuals[first * width..last * width], rows, width);
        let dbias = &mut grads[at.up_bias + expert * width..][..width];
        simd!({
            for du in du.data.chunks_exact(width) {
                axpy(scale, du, dbias);
            }
        });
        let inputs = &mut values.inputs[first * rank..last * rank];
        let dup = &mut grads[at.up + expert * width * rank..];
        let target = StridedMut::new(dup, width, rank);
        gemm(false, scale, du.t(), Strided::new(inputs, rows, rank), T::ONE, target);
        let up = Strided::new(&core.up(l)[expert * width * rank..], width, rank);
        // In the place of the inputs, which are no longer needed.
        gemm(false, scale, du, up, T::ZERO, StridedMut::new(inputs, rows, rank));
        let column = layer.stack_start + expert * rank;
        for (d, &token) in inputs.chunks_exact(rank).zip(&values.token_of[first..last]) {
            add_to(&mut dz[token as usize * stride + column..][..rank], d);
        }
    }
}

/// The backward pass of [`transform_children`]: slopes by the layer below's output.
fn transform_backward<T: Float>(
    core: &Core<T>,
    l: usize,
    n: usize,
    tree: &ResidualTree<T>,
    values: &mut LayerValues<T>,
    dinner: &[T],
    grads: &mut [T],
) -> Scratch<T> {
    let layer = &core.spec.layers[l];
    let (nodes, width, below) = (n * layer.nodes, layer.width, layer.width_below);
    if let Some((at, at_bias)) = core.layout.layers[l].transform {
        for d in dinner.chunks_exact(width) {
            add_to(&mut grads[at_bias..at_bias + width], d);
        }
        let dw = StridedMut::new(&mut grads[at..], width, below);
        let d = Strided::new(dinner, nodes, width);
        gemm(false, T::ONE, d.t(), Strided::new(&values.below, nodes, below), T::ONE, dw);
    }
    let all = core.spec.position == ActivationPosition::All;
    // In the place of what W multiplied, where sigma does not ask for it.
    let mut dbelow =
        if all { std::mem::take(&mut values.below) } else { Scratch::zeros(nodes * below) };
    let w = Strided::new(core.transform(l).0, width, below);
    let target = StridedMut::new(&mut dbelow, nodes, below);
    gemm(false, T::ONE, Strided::new(dinner, nodes, width), w, T::ZERO, target);
    if !all {
        let dslope = core.act(l).backward(&values.taken, &values.below, &mut dbelow);
        add_slope(core, l, dslope, grads);
    }
    if tree.layers[l].source.is_none() {
        return dbelow;
    }
    let rows = core.spec.layers[l - 1].parents;
    let mut dchildren = Scratch::zeros(n * rows * below);
    for (node, d) in dbelow.chunks_exact(below).enumerate() {
        let row = source(core, l, tree, node, rows);
        add_to(&mut dchildren[row * below..][..below], d);
    }
    dchildren
}
