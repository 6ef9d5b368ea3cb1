//! Operations on single elements, rows and whole buffers.

use super::simd::{dot, simd};
use crate::Float;
use rayon::prelude::*;

/// Elements of one task; fixed, so that sums are grouped alike on every machine.
const CHUNK: usize = 1 << 14;

pub(super) fn swiglu<T: Float>(gate: &[T], up: &[T], y: &mut [T]) {
    (y.par_chunks_mut(CHUNK), gate.par_chunks(CHUNK), up.par_chunks(CHUNK))
        .into_par_iter()
        .for_each(|(y, gate, up)| {
            simd(|| {
                for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                    *y = g * g.sigmoid() * u;
                }
            });
        });
}

/// With s = sigmoid(g): d silu(g) = s (1 + g (1 - s)).
pub(super) fn swiglu_backward<T: Float>(
    gate: &[T],
    up: &[T],
    dy: &[T],
    dgate: &mut [T],
    dup: &mut [T],
) {
    (
        dgate.par_chunks_mut(CHUNK),
        dup.par_chunks_mut(CHUNK),
        gate.par_chunks(CHUNK),
        up.par_chunks(CHUNK),
        dy.par_chunks(CHUNK),
    )
        .into_par_iter()
        .for_each(|(dgate, dup, gate, up, dy)| {
            simd(|| {
                let values = gate.iter().zip(up).zip(dy);
                for ((dg, du), ((&g, &u), &dy)) in dgate.iter_mut().zip(dup).zip(values) {
                    let s = g.sigmoid();
                    *dg += dy * u * s * (T::ONE + g * (T::ONE - s));
                    *du += dy * g * s;
                }
            });
        });
}

pub(super) fn add<T: Float>(x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len(), "add shapes");
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        simd(|| {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        });
    });
}

pub(super) fn add_row<T: Float>(row: &[T], y: &mut [T]) {
    y.par_chunks_mut(row.len()).for_each(|y| {
        simd(|| {
            for (y, &x) in y.iter_mut().zip(row) {
                *y += x;
            }
        });
    });
}

pub(super) fn sum_rows<T: Float>(y: &[T], sum: &mut [T]) {
    let d = sum.len();
    simd(|| {
        for row in y.chunks_exact(d) {
            for (s, &x) in sum.iter_mut().zip(row) {
                *s += x;
            }
        }
    });
}

pub(super) fn sum_squares<T: Float>(x: &[T]) -> f64 {
    let parts: Vec<f64> = x
        .par_chunks(CHUNK)
        .map(|x| simd(|| x.chunks(256).map(|part| dot(part, part).to_f64()).sum()))
        .collect();
    parts.iter().sum()
}

pub(super) fn scale<T: Float>(factor: T, x: &mut [T]) {
    x.par_chunks_mut(CHUNK).for_each(|x| {
        simd(|| {
            for x in x {
                *x *= factor;
            }
        });
    });
}
