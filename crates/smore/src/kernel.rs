//! The fused pass over tokens: routing, tree and propagation of a block of tokens in cache-sized
//! memory.
//!
//! Forward reads the stacked projection `z [n, stack_width]` and gives the root's embedding
//! `[n, d_L]`. All that survives is z and the tree; backward computes the rest again, block by
//! block. Parameter gradients are summed within blocks and then over the blocks in order, so that
//! the bits do not depend on the number of threads.

use crate::activation::Act;
use crate::config::GateKind;
use crate::layout::SmoreLayout;
use crate::propagate;
use crate::router::{self, BalanceSlopes, Gate, LayerStats, noisy};
use crate::spec::SmoreSpec;
use crate::tree::{Removal, ResidualTree};
use smore_engine::cpu::chosen_rows;
use smore_engine::{Cpu, Device, Float, HostMatrix, MatrixRef, Scratch, View, ViewMut, team};
use std::ops::Range;

/// Tokens whose intermediate values are alive at once, per thread, and whose parameter gradients are
/// summed on their own before they join the others (docs/performance.md).
pub(crate) const BLOCK: usize = 40;

/// The parameters that the pass reads.
pub(crate) struct Core<'a, T> {
    pub(crate) spec: &'a SmoreSpec,
    pub(crate) layout: &'a SmoreLayout,
    /// The adapter's parameters from [`SmoreLayout::core`] on.
    pub(crate) params: &'a [T],
    /// Keys over their lengths, and the lengths, per layer; for the noisy gate only.
    unit_keys: Vec<(Vec<T>, Vec<T>)>,
}

impl<'a, T: Float> Core<'a, T> {
    /// `params`: all parameters of the adapter.
    pub(crate) fn new(spec: &'a SmoreSpec, layout: &'a SmoreLayout, params: &'a [T]) -> Self {
        let mut core = Self { spec, layout, params: &params[layout.core..], unit_keys: vec![] };
        if spec.gate.kind == GateKind::NoisyTopk {
            core.unit_keys = (0..spec.depth())
                .map(|l| noisy::unit_rows(core.keys(l), spec.layers[l].key_width))
                .collect();
        }
        core
    }

    /// Keys of layer `l`, `[s, key_width]`.
    pub(crate) fn keys(&self, l: usize) -> &[T] {
        let layer = &self.spec.layers[l];
        &self.params[self.layout.layers[l].keys..][..layer.experts * layer.key_width]
    }

    /// Keys as queries and descendants meet them: normalised for the noisy gate.
    pub(crate) fn used_keys(&self, l: usize) -> &[T] {
        self.unit_keys.get(l).map_or_else(|| self.keys(l), |(unit, _)| unit)
    }

    /// B of layer `l`, `[s, d_{l+1}, r]`.
    pub(crate) fn up(&self, l: usize) -> &[T] {
        let layer = &self.spec.layers[l];
        &self.params[self.layout.layers[l].up..][..layer.experts * layer.width * layer.rank]
    }

    /// b of layer `l`, `[s, d_{l+1}]`.
    pub(crate) fn up_bias(&self, l: usize) -> &[T] {
        let layer = &self.spec.layers[l];
        &self.params[self.layout.layers[l].up_bias..][..layer.experts * layer.width]
    }

    /// W of layer `l`, `[d_{l+1}, d_l]`, and its bias; empty at the leaves.
    pub(crate) fn transform(&self, l: usize) -> (&[T], &[T]) {
        let layer = &self.spec.layers[l];
        self.layout.layers[l].transform.map_or((&[], &[]), |(w, bias)| {
            (
                &self.params[w..w + layer.width * layer.width_below],
                &self.params[bias..bias + layer.width],
            )
        })
    }

    /// sigma of layer `l`.
    pub(crate) fn act(&self, l: usize) -> Act<T> {
        let slope = self.layout.layers[l].slope.map(|at| self.params[at]);
        Act::new(self.spec.activation, slope)
    }

    pub(crate) fn gate(&self, l: usize) -> Gate {
        let layer = &self.spec.layers[l];
        Gate::new(self.spec.gate.kind, layer.experts, layer.fanout)
    }

    /// Turns slopes by the keys as used into slopes by the keys as stored.
    fn finish_key_grads(&self, grads: &mut [T]) {
        for (l, (unit, length)) in self.unit_keys.iter().enumerate() {
            let at = self.layout.layers[l].keys;
            let width = self.spec.layers[l].key_width;
            noisy::unit_rows_backward(unit, length, &mut grads[at..at + unit.len()], width);
        }
    }
}

/// Noise of the noisy gate, drawn from N(0, 1): per layer, leaves first, `[n * parents, s]`.
#[derive(Clone, Debug)]
pub struct GateNoise<T> {
    /// One vector per layer.
    pub layers: Vec<Vec<T>>,
}

/// What the balance loss and the gate say about a batch besides the output.
#[derive(Clone, Debug)]
pub struct Routing<T> {
    /// Every token's tree.
    pub tree: ResidualTree<T>,
    /// Per layer, over the tokens that count.
    pub stats: Vec<LayerStats>,
    /// Balance loss of each layer.
    pub balance_losses: Vec<f64>,
    /// Their slopes.
    pub(crate) slopes: Vec<BalanceSlopes>,
}

/// The trees of a run of tokens and what they bring to the statistics.
pub struct RoutedTokens<T> {
    tree: ResidualTree<T>,
    stats: Vec<LayerStats>,
}

impl<T: Float> Routing<T> {
    /// Joins what runs of tokens brought, in their order.
    pub fn of(spec: &SmoreSpec, runs: &[RoutedTokens<T>]) -> Self {
        let mut tree = ResidualTree::zeros(spec, 0);
        let mut stats: Vec<_> = spec.layers.iter().map(|l| LayerStats::new(l.experts)).collect();
        for run in runs {
            tree.extend(&run.tree);
            for (sum, run) in stats.iter_mut().zip(&run.stats) {
                sum.add(run);
            }
        }
        let balance = |stats| router::balance(spec.gate.kind, spec.gate.balance_weight, stats);
        let (balance_losses, slopes) = stats.iter().map(balance).unzip();
        Self { tree, stats, balance_losses, slopes }
    }
}

/// Inputs of a pass besides the parameters.
pub struct Pass<'a, T> {
    /// The adapter.
    pub spec: &'a SmoreSpec,
    /// Its parameters' places.
    pub layout: &'a SmoreLayout,
    /// Tokens that count in the balance loss, `[n]`; all where absent.
    pub valid: Option<&'a [bool]>,
    /// Noise of the noisy gate in training.
    pub noise: Option<&'a GateNoise<T>>,
    /// Taken out of the trees once they are routed. Routing itself stays as it is.
    pub removed: Option<&'a Removal>,
}

/// The pass over tokens as a device computes it.
pub trait AdapterKernels: Device {
    /// Routes every token and propagates its tree: `hidden [n, d_L]` from `z [n, stack_width]`.
    fn tree_forward(
        &self,
        pass: &Pass<Self::Elem>,
        params: View<Self>,
        z: View<Self>,
        hidden: ViewMut<Self>,
    ) -> Vec<RoutedTokens<Self::Elem>>;

    /// [`AdapterKernels::tree_forward`] of a single token from its input `x [d_in]`, for routers
    /// that work from the top: computes the router's part of `z [stack_width]`, then that of the
    /// chosen experts, from `down` where that is given. The other experts' weights are not read, and
    /// their part of z is 0.
    ///
    /// # Shapes
    /// down `[stacked_ranks, d_in]`
    fn token_forward(
        &self,
        pass: &Pass<Self::Elem>,
        params: View<Self>,
        down: Option<&Self::Weight>,
        x: View<Self>,
        z: ViewMut<Self>,
        hidden: ViewMut<Self>,
    ) -> RoutedTokens<Self::Elem>;

    /// Backward of [`AdapterKernels::tree_forward`] on the same trees. Adds parameter gradients to
    /// `grads` (the adapter's run), turns `z` into the slopes by it, and the slopes in `hidden` into the
    /// embedding itself. Slopes of the balance loss enter times `balance_scale`.
    fn tree_backward(
        &self,
        pass: &Pass<Self::Elem>,
        routing: &Routing<Self::Elem>,
        balance_scale: f64,
        params: View<Self>,
        z: ViewMut<Self>,
        grads: ViewMut<Self>,
        hidden: ViewMut<Self>,
    );
}

/// A block of tokens after its forward pass.
pub(crate) struct Block<T> {
    pub(crate) tree: ResidualTree<T>,
    pub(crate) routed: Vec<router::Routed<T>>,
    pub(crate) layers: Vec<propagate::LayerValues<T>>,
}

/// Forward over `n` tokens from token `first` on; `z` holds just these tokens. Where `fixed` is
/// given, its trees are kept and only their weights are computed.
pub(crate) fn forward_block<T: Float>(
    core: &Core<T>,
    pass: &Pass<T>,
    first: usize,
    n: usize,
    z: &[T],
    fixed: Option<ResidualTree<T>>,
) -> Block<T> {
    let spec = core.spec;
    let keep = fixed.is_some();
    let mut tree = fixed.unwrap_or_else(|| ResidualTree::zeros(spec, n));
    let view = &z[spec.stacked_ranks()..];
    if spec.bottom_up() {
        let (routed, mut layers) = router::bottom_up::forward(core, n, z, &mut tree, keep);
        if let Some(removed) = pass.removed {
            tree.remove(removed);
            layers = propagate_up(core, n, z, &tree);
        }
        return Block { tree, routed, layers };
    }
    let routed = route_down(core, pass, first, n, view, &mut tree, keep);
    if let Some(removed) = pass.removed {
        tree.remove(removed);
    }
    let layers = propagate_up(core, n, z, &tree);
    Block { tree, routed, layers }
}

/// Routes a block from the top layer down; `view` starts at the router's columns of z.
fn route_down<T: Float>(
    core: &Core<T>,
    pass: &Pass<T>,
    first: usize,
    n: usize,
    view: &[T],
    tree: &mut ResidualTree<T>,
    keep: bool,
) -> Vec<router::Routed<T>> {
    let mut routed: Vec<_> = (0..core.spec.depth())
        .rev()
        .map(|l| {
            let noise = pass.noise.map(|noise| {
                let width = core.spec.layers[l].parents * core.spec.layers[l].experts;
                &noise.layers[l][first * width..(first + n) * width]
            });
            router::route(core, l, n, view, noise, tree, keep)
        })
        .collect();
    routed.reverse();
    routed
}

/// Propagates a block through its trees, leaves first.
fn propagate_up<T: Float>(
    core: &Core<T>,
    n: usize,
    z: &[T],
    tree: &ResidualTree<T>,
) -> Vec<propagate::LayerValues<T>> {
    let mut layers = Vec::with_capacity(core.spec.depth());
    for l in 0..core.spec.depth() {
        let values = propagate::forward(core, l, n, z, tree, layers.last_mut());
        layers.push(values);
    }
    layers
}

/// Rows of the stacked matrix that belong to the experts in `tree`, in order.
fn chosen_stack_rows<T>(spec: &SmoreSpec, tree: &ResidualTree<T>) -> Vec<usize> {
    let mut rows: Vec<usize> = Vec::new();
    for (layer, chosen) in spec.layers.iter().zip(&tree.layers) {
        for &expert in &chosen.expert_idx {
            let first = layer.stack_start + usize::from(expert) * layer.rank;
            rows.extend(first..first + layer.rank);
        }
    }
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// How much every node does to a token's output: the Euclidean norm of the change of the adapter's
/// output when the node's gate weight, with what hangs below it, is set to zero and everything
/// else stays. Per layer, leaves first, `[n * F_l]`, in units of the map's output.
///
/// The parts of one token need not add up to its output: behind a non-linearity nodes interact.
pub fn contributions<T: Float>(
    pass: &Pass<T>,
    routing: &Routing<T>,
    params: &[T],
    z: &[T],
) -> Vec<Vec<f64>> {
    let (spec, core) = (pass.spec, Core::new(pass.spec, pass.layout, params));
    let (width, root, top) = (spec.stack_width(), spec.root_width(), spec.depth() - 1);
    let gram = gram(&params[pass.layout.output_proj..pass.layout.output_bias], root);
    let mut norms: Vec<Vec<f64>> = spec.layers.iter().map(|_| Vec::new()).collect();
    for (first, n) in pieces(0, z.len() / width, BLOCK) {
        let z = &z[first * width..(first + n) * width];
        let tree = routing.tree.tokens(spec, first, n);
        let whole = propagate_up(&core, n, z, &tree);
        for (l, layer) in spec.layers.iter().enumerate() {
            let start = norms[l].len();
            norms[l].resize(start + n * layer.nodes, 0.0);
            for node in 0..layer.nodes {
                let mut without = tree.clone();
                without.clear(l, (0..n * layer.nodes).map(|i| i % layer.nodes == node).collect());
                let rest = propagate_up(&core, n, z, &without);
                let pairs = whole[top].hidden.chunks_exact(root);
                for (t, (a, b)) in pairs.zip(rest[top].hidden.chunks_exact(root)).enumerate() {
                    let change: Vec<f64> =
                        a.iter().zip(b).map(|(a, b)| a.to_f64() - b.to_f64()).collect();
                    norms[l][start + t * layer.nodes + node] = norm_in(&gram, &change);
                }
            }
        }
    }
    norms
}

/// W^T W of `w [d_out, d]`.
fn gram<T: Float>(w: &[T], d: usize) -> Vec<f64> {
    let mut gram = vec![0.0; d * d];
    for row in w.chunks_exact(d) {
        for (gram, a) in gram.chunks_exact_mut(d).zip(row) {
            for (g, b) in gram.iter_mut().zip(row) {
                *g += a.to_f64() * b.to_f64();
            }
        }
    }
    gram
}

/// |W x| from W^T W.
fn norm_in(gram: &[f64], x: &[f64]) -> f64 {
    let dot = |row: &[f64]| row.iter().zip(x).map(|(g, x)| g * x).sum::<f64>();
    gram.chunks_exact(x.len()).zip(x).map(|(row, x)| x * dot(row)).sum::<f64>().max(0.0).sqrt()
}

/// Output of every layer for a batch already routed: `[n * F_{l+1}, d_{l+1}]`, leaves first. Slow
/// and complete, for tracing and for comparison with other tools.
pub fn hidden_states<T: Float>(
    pass: &Pass<T>,
    routing: &Routing<T>,
    params: &[T],
    z: &[T],
) -> Vec<Vec<T>> {
    let core = Core::new(pass.spec, pass.layout, params);
    let n = z.len() / pass.spec.stack_width();
    let tree = forward_block(&core, pass, 0, n, z, Some(routing.tree.clone())).tree;
    let (mut layers, mut hidden) = (Vec::new(), Vec::new());
    for l in 0..pass.spec.depth() {
        let values = propagate::forward(&core, l, n, z, &tree, layers.last_mut());
        hidden.push(values.hidden.to_vec());
        layers.push(values);
    }
    hidden
}

/// First token and number of tokens of every piece of `size` out of `n`.
fn pieces(first: usize, n: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (first..first + n).step_by(size).map(move |at| (at, size.min(first + n - at)))
}

impl<T: Float> AdapterKernels for Cpu<T> {
    fn tree_forward(
        &self,
        pass: &Pass<T>,
        params: View<Self>,
        z: View<Self>,
        hidden: ViewMut<Self>,
    ) -> Vec<RoutedTokens<T>> {
        let spec = pass.spec;
        let core = Core::new(spec, pass.layout, Self::slice(params));
        let (width, root) = (spec.stack_width(), spec.root_width());
        let (z, hidden) = (Self::slice(z), Self::slice_mut(hidden));
        let blocks = hidden.chunks_mut(BLOCK * root).zip(z.chunks(BLOCK * width));
        team::map(blocks.enumerate(), |(i, (hidden, z))| {
            let (first, count) = (i * BLOCK, hidden.len() / root);
            let block = forward_block(&core, pass, first, count, z, None);
            hidden.copy_from_slice(&block.layers[spec.depth() - 1].hidden);
            let valid = pass.valid.map(|v| &v[first..first + count]);
            let stats = block_stats(&core, &block, valid);
            RoutedTokens { tree: block.tree, stats }
        })
    }

    fn token_forward(
        &self,
        pass: &Pass<T>,
        params: View<Self>,
        down: Option<&HostMatrix>,
        x: View<Self>,
        z: ViewMut<Self>,
        hidden: ViewMut<Self>,
    ) -> RoutedTokens<T> {
        let (spec, at) = (pass.spec, pass.layout.stack_bias);
        let stack = MatrixRef::Trained(params.at(0..at), spec.stack_width(), spec.d_in);
        let params = Self::slice(params);
        let core = Core::new(spec, pass.layout, params);
        let (x, z) = (Self::slice(x), Self::slice_mut(z));
        let biases = &params[at..];
        let project = |stack: MatrixRef<Self>, rows: &[usize], z: &mut [T]| {
            let mut products = vec![T::ZERO; rows.len()];
            chosen_rows(stack, rows, x, &mut products);
            for (&row, product) in rows.iter().zip(products) {
                z[row] = product + biases[row];
            }
        };
        z.fill(T::ZERO);
        let ranks = spec.stacked_ranks();
        project(stack, &(ranks..spec.stack_width()).collect::<Vec<_>>(), z);
        let mut tree = ResidualTree::zeros(spec, 1);
        let routed = route_down(&core, pass, 0, 1, &z[ranks..], &mut tree, false);
        project(down.map_or(stack, MatrixRef::Frozen), &chosen_stack_rows(spec, &tree), z);
        let layers = propagate_up(&core, 1, z, &tree);
        Self::slice_mut(hidden).copy_from_slice(&layers[spec.depth() - 1].hidden);
        let block = Block { tree, routed, layers };
        let stats = block_stats(&core, &block, pass.valid);
        RoutedTokens { tree: block.tree, stats }
    }

    fn tree_backward(
        &self,
        pass: &Pass<T>,
        routing: &Routing<T>,
        balance_scale: f64,
        params: View<Self>,
        z: ViewMut<Self>,
        grads: ViewMut<Self>,
        hidden: ViewMut<Self>,
    ) {
        let spec = pass.spec;
        let core = Core::new(spec, pass.layout, Self::slice(params));
        let (width, root) = (spec.stack_width(), spec.root_width());
        let (z, hidden) = (Self::slice_mut(z), Self::slice_mut(hidden));
        let slopes = scaled(&routing.slopes, balance_scale);
        // As many blocks at a time as there are threads: their sums are all that is held, and they
        // are added in the order of the blocks, however many that are.
        let threads = rayon::current_num_threads().min(hidden.len().div_ceil(BLOCK * root));
        let len = core.layout.core_len();
        let mut parts = Scratch::zeros(threads * len);
        let wave = BLOCK * threads.max(1);
        let grads = &mut Self::slice_mut(grads)[core.layout.core..];
        // Slopes by unit keys are turned into those by keys when all are there: on their own.
        let mut apart = Scratch::zeros(if core.unit_keys.is_empty() { 0 } else { len });
        let waves = z.chunks_mut(wave * width).zip(hidden.chunks_mut(wave * root));
        for (w, (z, hidden)) in waves.enumerate() {
            let blocks = z.chunks_mut(BLOCK * width).zip(hidden.chunks_mut(BLOCK * root));
            team::each(
                blocks.zip(parts.chunks_exact_mut(len)).enumerate(),
                |(i, ((z, hidden), grads))| {
                    let token = w * wave + i * BLOCK;
                    let tree = routing.tree.tokens(spec, token, hidden.len() / root);
                    grads.fill(T::ZERO);
                    backward_block(&core, pass, token, tree, z, hidden, &slopes, grads);
                },
            );
            for part in parts.chunks_exact(len).take(hidden.len().div_ceil(BLOCK * root)) {
                router::add_to(if apart.is_empty() { &mut *grads } else { &mut apart }, part);
            }
        }
        core.finish_key_grads(&mut apart);
        router::add_to(grads, &apart);
    }
}

fn block_stats<T: Float>(
    core: &Core<T>,
    block: &Block<T>,
    valid: Option<&[bool]>,
) -> Vec<LayerStats> {
    block
        .routed
        .iter()
        .enumerate()
        .map(|(l, routed)| {
            let mut stats = LayerStats::new(core.spec.layers[l].experts);
            router::collect(core, l, routed, &block.tree, valid, &mut stats);
            stats
        })
        .collect()
}

pub(crate) fn scaled(slopes: &[BalanceSlopes], factor: f64) -> Vec<BalanceSlopes> {
    let times = |x: &[f64]| x.iter().map(|x| x * factor).collect();
    slopes
        .iter()
        .map(|s| BalanceSlopes { load: times(&s.load), importance: times(&s.importance) })
        .collect()
}

/// Turns `z [n, stack_width]` into the slopes by it, and the slopes in `hidden` into the embedding.
fn backward_block<T: Float>(
    core: &Core<T>,
    pass: &Pass<T>,
    first: usize,
    mut tree: ResidualTree<T>,
    z: &mut [T],
    hidden: &mut [T],
    slopes: &[BalanceSlopes],
    grads: &mut [T],
) {
    let (spec, n) = (core.spec, hidden.len() / core.spec.root_width());
    let valid = pass.valid.map(|v| &v[first..first + n]);
    let view = spec.stacked_ranks();
    if spec.bottom_up() {
        return backward_bottom_up(core, pass, first, tree, z, hidden, slopes, grads);
    }
    let mut layers = propagate_up(core, n, z, &tree);
    let embedding = std::mem::take(&mut layers[spec.depth() - 1].hidden);
    let rows = |z: &mut [T], columns: Range<usize>| {
        z.chunks_exact_mut(spec.stack_width()).for_each(|z| z[columns.clone()].fill(T::ZERO));
    };
    rows(z, 0..view);
    let (mut dhidden, mut dweights) = (Scratch::copy(hidden), Vec::new());
    for (l, values) in layers.into_iter().enumerate().rev() {
        let (dweight, dbelow) = propagate::backward(core, l, n, &tree, values, &dhidden, grads, z);
        dweights.push(dweight);
        dhidden = dbelow;
    }
    hidden.copy_from_slice(&embedding);
    drop(embedding);
    // What routing leaves for its backward pass is not alive beside what propagation leaves.
    let routed = route_down(core, pass, first, n, &z[view..], &mut tree, true);
    rows(z, view..spec.stack_width());
    let layers = routed.into_iter().enumerate().rev();
    for ((l, routed), mut dweight) in layers.zip(dweights) {
        let (slopes, dview) = (Some(&slopes[l]), &mut z[view..]);
        router::route_backward(core, l, &routed, &tree, &mut dweight, slopes, valid, grads, dview);
    }
}

/// [`backward_block`] where routing and propagation alternate.
fn backward_bottom_up<T: Float>(
    core: &Core<T>,
    pass: &Pass<T>,
    first: usize,
    tree: ResidualTree<T>,
    z: &mut [T],
    hidden: &mut [T],
    slopes: &[BalanceSlopes],
    grads: &mut [T],
) {
    let (spec, n) = (core.spec, hidden.len() / core.spec.root_width());
    let valid = pass.valid.map(|v| &v[first..first + n]);
    let view = spec.stacked_ranks();
    let Block { tree, routed, mut layers } = forward_block(core, pass, first, n, z, Some(tree));
    let embedding = std::mem::take(&mut layers[spec.depth() - 1].hidden);
    let seen = z[view..].to_vec();
    z.fill(T::ZERO);
    let mut dhidden = Scratch::copy(hidden);
    for (l, (routed, values)) in routed.into_iter().zip(layers).enumerate().rev() {
        let (mut dweight, mut dbelow) =
            propagate::backward(core, l, n, &tree, values, &dhidden, grads, z);
        // Here the router also looks at what comes from below.
        let (slopes, dview) = (Some(&slopes[l]), &mut z[view..]);
        router::bottom_up::backward(
            core,
            l,
            n,
            &seen,
            &routed,
            &tree,
            &mut dweight,
            slopes,
            valid,
            grads,
            dview,
            &mut dbelow,
        );
        dhidden = dbelow;
    }
    hidden.copy_from_slice(&embedding);
}
