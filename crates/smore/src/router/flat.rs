//! The router of the flat mixtures (HydraLoRA, MixLoRA): the logits of one linear map meet a gate
//! once per token. The tree has one layer.

use super::{Gate, LayerStats, balance, switch};
use crate::kernel::{Routing, scaled};
use crate::tree::{ResidualTree, TreeLayer};
use smore_engine::Float;

/// Chooses and weighs experts for every row of `logits [n, s]`.
pub(crate) fn route<T: Float>(
    gate: Gate,
    balance_weight: f64,
    logits: &[T],
    valid: Option<&[bool]>,
) -> Routing<T> {
    let (n, f) = (logits.len() / gate.experts, gate.fanout);
    let mut layer =
        TreeLayer { expert_idx: vec![0; n * f], gate_weight: vec![T::ZERO; n * f], source: None };
    let scores = switch::forward(gate, logits, &mut layer, false);
    let mut stats = LayerStats::new(gate.experts);
    let chosen = layer.expert_idx.chunks_exact(f).zip(layer.gate_weight.chunks_exact(f));
    for (row, (idx, weight)) in chosen.enumerate().filter(|(row, _)| counts(valid, *row)) {
        stats.rows += 1.0;
        switch::collect(gate.kind, &scores, row, idx, weight, &mut stats);
    }
    let (loss, slopes) = balance(gate.kind, balance_weight, &stats);
    Routing {
        tree: ResidualTree { layers: vec![layer] },
        stats: vec![stats],
        balance_losses: vec![loss],
        slopes: vec![slopes],
    }
}

/// Slopes by the logits `[n, s]`, from those by the gate weights `[n, f]` and by the balance loss
/// times `balance_scale`. The choice stays that of `routing`.
pub(crate) fn route_backward<T: Float>(
    gate: Gate,
    balance_scale: f64,
    logits: &[T],
    valid: Option<&[bool]>,
    routing: &Routing<T>,
    dweight: &[T],
) -> Vec<T> {
    let mut layer = routing.tree.layers[0].clone();
    let scores = switch::forward(gate, logits, &mut layer, true);
    let slopes = scaled(&routing.slopes, balance_scale);
    let counts = |row| counts(valid, row);
    switch::backward(gate, &scores, &layer, dweight, slopes.first(), counts).to_vec()
}

fn counts(valid: Option<&[bool]>, row: usize) -> bool {
    valid.is_none_or(|valid| valid[row])
}

/// Columns `first..first + count` of a row-major matrix of `width` columns.
pub(crate) fn columns<T: Float>(rows: &[T], width: usize, first: usize, count: usize) -> Vec<T> {
    rows.chunks_exact(width).flat_map(|row| &row[first..first + count]).copied().collect()
}

/// The backward pass of [`columns`]: `values [n, count]` in a matrix of zeros.
pub(crate) fn among_zeros<T: Float>(
    values: &[T],
    width: usize,
    first: usize,
    count: usize,
) -> Vec<T> {
    let mut rows = vec![T::ZERO; values.len() / count * width];
    for (row, values) in rows.chunks_exact_mut(width).zip(values.chunks_exact(count)) {
        row[first..first + count].copy_from_slice(values);
    }
    rows
}
