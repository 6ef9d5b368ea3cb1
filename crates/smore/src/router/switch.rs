//! The switch gate (Fedus et al. 2022, as in MixLoRA): softmax over all experts, the top f kept.
//! The dense gate is its case f = s without a balance loss.

use super::{BalanceSlopes, Gate, LayerStats, top};
use crate::config::GateKind;
use crate::tree::TreeLayer;
use smore_engine::cpu::simd;
use smore_engine::{Float, Scratch};

/// Softmax probabilities.
pub(crate) struct Scores<T> {
    /// `[rows, width]`
    probabilities: Scratch<T>,
    /// What one parent chooses from
    width: usize,
}

pub(super) fn forward<T: Float>(
    gate: Gate,
    logits: &[T],
    out: &mut TreeLayer<T>,
    fixed: bool,
) -> Scores<T> {
    let (s, f) = (gate.experts, gate.fanout);
    let mut probabilities = Scratch::zeros(logits.len());
    simd!({
        for (logits, p) in logits.chunks_exact(s).zip(probabilities.chunks_exact_mut(s)) {
            softmax(logits, p);
        }
    });
    let chosen = out.expert_idx.chunks_exact_mut(f).zip(out.gate_weight.chunks_exact_mut(f));
    for (p, (idx, weight)) in probabilities.chunks_exact(s).zip(chosen) {
        if !fixed {
            if gate.kind == GateKind::Dense {
                idx.iter_mut().enumerate().for_each(|(i, idx)| *idx = i as u16);
            } else {
                top(p, f, idx);
            }
        }
        let sum =
            if gate.renormalised { idx.iter().map(|&i| p[usize::from(i)]).sum() } else { T::ONE };
        for (w, &i) in weight.iter_mut().zip(idx.iter()) {
            *w = p[usize::from(i)] / sum;
        }
    }
    Scores { probabilities, width: s }
}

#[inline(always)]
pub(super) fn softmax<T: Float>(logits: &[T], p: &mut [T]) {
    let max = logits.iter().fold(logits[0], |m, &x| m.max_of(x));
    let mut sum = T::ZERO;
    for (p, &x) in p.iter_mut().zip(logits) {
        *p = (x - max).exp();
        sum += *p;
    }
    for p in p {
        *p /= sum;
    }
}

pub(super) fn collect<T: Float>(
    kind: GateKind,
    scores: &Scores<T>,
    row: usize,
    idx: &[u16],
    weight: &[T],
    stats: &mut LayerStats,
) {
    for (&i, &w) in idx.iter().zip(weight) {
        stats.load[usize::from(i)] += 1.0;
        if kind == GateKind::Dense {
            stats.importance[usize::from(i)] += w.to_f64();
        }
    }
    if kind == GateKind::Switch {
        // The bottom-up router has one probability per expert and position.
        let s = stats.importance.len();
        let width = scores.width;
        for (i, p) in scores.probabilities[row * width..][..width].iter().enumerate() {
            stats.importance[i % s] += p.to_f64();
        }
    }
}

/// w s sum_i load_i mean_p_i, with load_i = selections / N (no gradient) and mean_p_i = sum of
/// p_i / N over the N rows that count (spec section 2).
pub(super) fn balance(weight: f64, stats: &LayerStats) -> (f64, BalanceSlopes) {
    let s = stats.load.len();
    let rows = stats.rows.max(1.0);
    let factor = weight * s as f64 / (rows * rows);
    let loss = stats.load.iter().zip(&stats.importance).map(|(l, p)| factor * l * p).sum();
    let importance = stats.load.iter().map(|l| factor * l).collect();
    (loss, BalanceSlopes { load: vec![0.0; s], importance })
}

/// Slopes by the logits `[rows, s]`.
pub(super) fn backward<T: Float>(
    gate: Gate,
    scores: &Scores<T>,
    out: &TreeLayer<T>,
    dweight: &[T],
    balance: Option<&BalanceSlopes>,
    counts: impl Fn(usize) -> bool,
) -> Scratch<T> {
    let (s, f) = (gate.experts, gate.fanout);
    let mut dlogits = Scratch::zeros(scores.probabilities.len());
    for (row, d) in dlogits.chunks_exact_mut(s).enumerate() {
        let p = &scores.probabilities[row * s..(row + 1) * s];
        let chosen = row * f..(row + 1) * f;
        let (idx, weight) = (&out.expert_idx[chosen.clone()], &out.gate_weight[chosen.clone()]);
        let dweight = &dweight[chosen];
        if let Some(slopes) = balance.filter(|_| counts(row)) {
            for (d, &slope) in d.iter_mut().zip(&slopes.importance) {
                *d = T::from_f64(slope);
            }
        }
        // weight_k = p_k / sum of chosen p: through the division first ...
        let (mut mean, mut sum) = (T::ZERO, T::ONE);
        if gate.renormalised {
            mean = weight.iter().zip(dweight).map(|(&w, &d)| w * d).sum();
            sum = idx.iter().map(|&i| p[usize::from(i)]).sum();
        }
        for (&i, &dw) in idx.iter().zip(dweight) {
            d[usize::from(i)] += (dw - mean) / sum;
        }
        // ... then through the softmax.
        let mean: T = p.iter().zip(d.iter()).map(|(&p, &d)| p * d).sum();
        for (d, &p) in d.iter_mut().zip(p) {
            *d = p * (*d - mean);
        }
    }
    dlogits
}
