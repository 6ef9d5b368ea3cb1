//! RMS norm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * (offset + gain).

use super::simd::{self, dot, simd};
use crate::{Float, RmsNorm, team};

const ROWS: usize = 16;

pub(super) fn forward<T: Float>(
    norm: RmsNorm,
    x: &[T],
    gain: &[T],
    y: &mut [T],
    inv_rms: &mut [T],
) {
    let d = gain.len();
    assert_eq!((x.len(), y.len()), (inv_rms.len() * d, inv_rms.len() * d), "norm shapes");
    let (eps, width) = (T::from_f64(norm.eps), T::from_f64(d as f64));
    let offset = T::from_f64(norm.offset);
    let rows = y.chunks_mut(ROWS * d).zip(x.chunks(ROWS * d)).zip(inv_rms.chunks_mut(ROWS));
    team::each(rows, |((y, x), inv_rms)| {
        simd!({
            let rows = x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(inv_rms);
            for ((x, y), inv) in rows {
                *inv = T::ONE / (dot(x, x) / width + eps).sqrt();
                for ((y, &x), &g) in y.iter_mut().zip(x).zip(gain) {
                    *y = x * *inv * (offset + g);
                }
            }
        });
    });
}

/// With n = x * inv and g = offset + gain: dx += inv * (g dy - n * mean(g dy n)), dgain += sum over
/// rows of dy n.
pub(super) fn backward<T: Float>(
    norm: RmsNorm,
    x: &[T],
    gain: &[T],
    inv_rms: &[T],
    dy: &[T],
    dx: &mut [T],
    dgain: Option<&mut [T]>,
) {
    let d = gain.len();
    assert_eq!((x.len(), dy.len(), dx.len()), (inv_rms.len() * d, x.len(), x.len()), "norm");
    let (width, offset) = (T::from_f64(d as f64), T::from_f64(norm.offset));
    let slopes = dx.chunks_mut(ROWS * d).zip(dy.chunks(ROWS * d));
    let rows = slopes.zip(x.chunks(ROWS * d).zip(inv_rms.chunks(ROWS)));
    team::each_with(
        rows,
        || vec![T::ZERO; d],
        |scaled, ((dx, dy), (x, inv_rms))| {
            simd!({
                let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d));
                for ((dx, dy), (x, &inv)) in rows.zip(x.chunks_exact(d).zip(inv_rms)) {
                    for (((s, &dy), &g), &x) in scaled.iter_mut().zip(dy).zip(gain).zip(x) {
                        *s = dy * (offset + g) * x;
                    }
                    let mean = simd::sum(scaled) * inv * inv / width;
                    for (((dx, &dy), &g), &x) in dx.iter_mut().zip(dy).zip(gain).zip(x) {
                        *dx += inv * ((offset + g) * dy - x * mean);
                    }
                }
            });
        },
    );
    if let Some(dgain) = dgain {
        for ((x, dy), &inv) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inv_rms) {
            for ((dg, &x), &dy) in dgain.iter_mut().zip(x).zip(dy) {
                *dg += dy * x * inv;
            }
        }
    }
}
