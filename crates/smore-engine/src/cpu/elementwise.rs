//! Operations on single elements, rows and whole buffers.

use super::simd::{dot, simd};
use crate::Float;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements of one task; fixed, so that sums are grouped alike on every machine.
pub(super) const CHUNK: usize = 1 << 14;

/// Zeros, written by all threads where there are many: memory that was used before has to be.
pub(super) fn zeros<T: Float>(len: usize) -> Vec<T> {
    if len < 4 * CHUNK {
        return vec![T::ZERO; len];
    }
    let mut all = Vec::with_capacity(len);
    let room = &mut all.spare_capacity_mut()[..len];
    room.par_chunks_mut(4 * CHUNK).for_each(|x| x.fill(MaybeUninit::new(T::ZERO)));
    // SAFETY: the first `len` elements were written.
    unsafe { all.set_len(len) };
    all
}

/// x = cap tanh(x / cap)
pub(super) fn soft_cap<T: Float>(cap: T, x: &mut [T]) {
    x.par_chunks_mut(CHUNK).for_each(|x| {
        simd!({
            for x in x {
                *x = cap * (*x / cap).tanh();
            }
        });
    });
}

pub(super) fn add<T: Float>(x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len(), "add shapes");
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        simd!({
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        });
    });
}

pub(super) fn add_row<T: Float>(row: &[T], y: &mut [T]) {
    y.par_chunks_mut(row.len()).for_each(|y| {
        simd!({
            for (y, &x) in y.iter_mut().zip(row) {
                *y += x;
            }
        });
    });
}

pub(super) fn sum_rows<T: Float>(y: &[T], sum: &mut [T]) {
    // Tasks own columns, so that every sum has one order.
    const COLUMNS: usize = 256;
    let d = sum.len();
    sum.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sum)| {
        let first = task * COLUMNS;
        simd!({
            for row in y.chunks_exact(d) {
                for (s, &x) in sum.iter_mut().zip(&row[first..]) {
                    *s += x;
                }
            }
        });
    });
}

pub(super) fn sum_squares<T: Float>(x: &[T]) -> f64 {
    let parts: Vec<f64> = x
        .par_chunks(CHUNK)
        .map(|x| simd!(x.chunks(256).map(|part| dot(part, part).to_f64()).sum()))
        .collect();
    parts.iter().sum()
}

pub(super) fn scale<T: Float>(factor: T, x: &mut [T]) {
    x.par_chunks_mut(CHUNK).for_each(|x| {
        simd!({
            for x in x {
                *x *= factor;
            }
        });
    });
}
