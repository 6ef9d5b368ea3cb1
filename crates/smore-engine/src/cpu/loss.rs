//! The output head and its cross-entropy in one operation, so that logits exist for a few rows at
//! a time and never for a whole batch.

use super::Cpu;
use super::elementwise::unwritten;
use super::gemm::{Strided, StridedMut, product};
use super::linear;
use super::simd::{self, simd};
use crate::{CrossEntropy, Float, MatrixRef, team};

/// Logits held at once where the rows allow it: 16 MiB in f32.
const LOGITS: usize = 1 << 22;

/// Rows whose logits are held at once. A head is packed anew for every one of these pieces, so a
/// large one is given more than the usual 16 MiB.
pub fn logit_rows(vocabulary: usize) -> usize {
    (LOGITS / vocabulary).clamp(128, 1024)
}

pub(super) fn cross_entropy<T: Float>(
    device: Cpu<T>,
    h: &[T],
    targets: &[(u32, u32)],
    head: &MatrixRef<Cpu<T>>,
    loss: CrossEntropy,
    mut dh: Option<&mut [T]>,
    mut dhead: Option<&mut [T]>,
) -> Vec<f64> {
    let (vocabulary, d) = linear::shape(head);
    let rows = logit_rows(vocabulary);
    let mut losses = Vec::with_capacity(targets.len());
    let room = rows.min(targets.len());
    let (mut x, mut logits) = (unwritten(room * d), unwritten(room * vocabulary));
    let mut slopes = dh.as_ref().map(|_| unwritten(room * d));
    for chunk in targets.chunks(rows) {
        let n = chunk.len();
        let (x, logits) = (&mut x[..n * d], &mut logits[..n * vocabulary]);
        for (&(row, _), x) in chunk.iter().zip(x.chunks_exact_mut(d)) {
            x.copy_from_slice(&h[row as usize * d..][..d]);
        }
        device.forward(x, head, None, logits, n, false);
        let wanted = dh.is_some() || dhead.is_some();
        let rows = logits.chunks_exact_mut(vocabulary).zip(chunk);
        losses
            .extend(team::map(rows, |(row, &(_, target))| nll(row, target as usize, loss, wanted)));
        if let (Some(dh), Some(slopes)) = (dh.as_deref_mut(), &mut slopes) {
            let dx = &mut slopes[..n * d];
            device.backward(logits, head, dx, n, false);
            for (&(row, _), dx) in chunk.iter().zip(dx.chunks_exact(d)) {
                let dh = &mut dh[row as usize * d..][..d];
                for (dh, &dx) in dh.iter_mut().zip(dx) {
                    *dh += dx;
                }
            }
        }
        if let Some(dhead) = dhead.as_deref_mut() {
            let dlogits = Strided::new(logits, n, vocabulary).t();
            let out = StridedMut::new(dhead, vocabulary, d);
            product(false, T::ONE, dlogits, Strided::new(x, n, d), T::ONE, out);
        }
    }
    losses
}

/// As [`softmax_nll`] of the capped row: c tanh(z / c), whose slope is 1 - tanh^2.
fn nll<T: Float>(row: &mut [T], target: usize, settings: CrossEntropy, gradient: bool) -> f64 {
    let Some(cap) = settings.soft_cap.map(T::from_f64) else {
        return softmax_nll(row, target, settings, gradient);
    };
    simd!({
        for x in row.iter_mut() {
            *x = cap * (*x / cap).tanh();
        }
    });
    let slopes: Vec<T> = row.iter().map(|&x| T::ONE - (x / cap) * (x / cap)).collect();
    let loss = softmax_nll(row, target, settings, gradient);
    if gradient {
        simd!({
            for (x, &slope) in row.iter_mut().zip(&slopes) {
                *x *= slope;
            }
        });
    }
    loss
}

/// -ln softmax(row)[target], smoothed; where `gradient`, the row becomes
/// scale (softmax - (1 - e) onehot(target) - e / vocabulary).
fn softmax_nll<T: Float>(
    row: &mut [T],
    target: usize,
    settings: CrossEntropy,
    gradient: bool,
) -> f64 {
    let CrossEntropy { label_smoothing, scale, .. } = settings;
    let at_target = row[target];
    let mean = if label_smoothing > 0.0 { mean(row) } else { 0.0 };
    let (max, sum) = simd!({
        let max = simd::max(row[0], row);
        let mut sum = 0.0;
        // Sums of a few hundred terms in T, those in f64: close to a sum in f64, at vector speed.
        for part in row.chunks_mut(256) {
            for x in part.iter_mut() {
                *x = (*x - max).exp();
            }
            sum += simd::sum(part).to_f64();
        }
        (max, sum)
    });
    if gradient {
        let factor = T::from_f64(scale / sum);
        let spread = T::from_f64(scale * label_smoothing / row.len() as f64);
        simd!({
            if label_smoothing > 0.0 {
                for x in row.iter_mut() {
                    *x = *x * factor - spread;
                }
            } else {
                for x in row.iter_mut() {
                    *x *= factor;
                }
            }
        });
        row[target] -= T::from_f64(scale * (1.0 - label_smoothing));
    }
    let log_sum = sum.ln();
    let loss = log_sum - (at_target - max).to_f64();
    if label_smoothing > 0.0 {
        let of_all = log_sum - (mean - max.to_f64());
        return (1.0 - label_smoothing) * loss + label_smoothing * of_all;
    }
    loss
}

/// The mean in f64, of sums of a few hundred terms in T.
fn mean<T: Float>(row: &[T]) -> f64 {
    let sum: f64 = simd!({ row.chunks(256).map(|part| simd::sum(part).to_f64()).sum() });
    sum / row.len() as f64
}
