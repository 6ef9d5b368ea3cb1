//! Operations on single elements, rows and whole buffers.

use super::simd::{dot, simd};
use crate::{Float, team};
use std::mem::MaybeUninit;

/// Elements of one task; fixed, so that sums are grouped alike on every machine.
pub(super) const CHUNK: usize = 1 << 14;

/// Elements of a task that only writes zeros.
const ZEROS: usize = 4 * CHUNK;

/// Zeros, written by all threads where there are many: memory that was used before has to be.
pub(super) fn zeros<T: Float>(len: usize) -> Vec<T> {
    if len < ZEROS {
        return vec![T::ZERO; len];
    }
    let mut all = Vec::with_capacity(len);
    let room = &mut all.spare_capacity_mut()[..len];
    team::each(room.chunks_mut(ZEROS), |x| x.fill(MaybeUninit::new(T::ZERO)));
    // SAFETY: the first `len` elements were written.
    unsafe { all.set_len(len) };
    all
}

pub(super) fn clear<T: Float>(x: &mut [T]) {
    team::each(x.chunks_mut(ZEROS), |x| x.fill(T::ZERO));
}

/// Elements to be overwritten: anything, and NaN where debug assertions are on.
#[allow(clippy::uninit_vec, reason = "the assembly below may have written it")]
pub(super) fn unwritten<T: Float>(len: usize) -> Vec<T> {
    if cfg!(debug_assertions) || cfg!(not(any(target_arch = "x86_64", target_arch = "aarch64"))) {
        return vec![T::from_f64(f64::NAN); len];
    }
    let mut all: Vec<T> = Vec::with_capacity(len);
    // SAFETY: the assembly does nothing, but for the compiler it may have written all that the pointer
    // leads to, so that what lies there are bits like others; and any bits are a float.
    unsafe {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        std::arch::asm!("/* {0} */", in(reg) all.as_mut_ptr(), options(nostack, preserves_flags));
        all.set_len(len);
    }
    all
}

/// x = cap tanh(x / cap)
pub(super) fn soft_cap<T: Float>(cap: T, x: &mut [T]) {
    team::each(x.chunks_mut(CHUNK), |x| {
        simd!({
            for x in x {
                *x = cap * (*x / cap).tanh();
            }
        });
    });
}

pub(super) fn add<T: Float>(x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len(), "add shapes");
    team::each(y.chunks_mut(CHUNK).zip(x.chunks(CHUNK)), |(y, x)| {
        simd!({
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        });
    });
}

/// The row in every row of y, or added to it where `accumulate`.
pub(super) fn add_row<T: Float>(row: &[T], y: &mut [T], accumulate: bool) {
    let d = row.len();
    team::each(y.chunks_mut(CHUNK.div_ceil(d) * d), |y| {
        for y in y.chunks_exact_mut(d) {
            if !accumulate {
                y.copy_from_slice(row);
                continue;
            }
            simd!({
                for (y, &x) in y.iter_mut().zip(row) {
                    *y += x;
                }
            });
        }
    });
}

pub(super) fn sum_rows<T: Float>(y: &[T], sum: &mut [T]) {
    // Tasks own columns, so that every sum has one order.
    const COLUMNS: usize = 256;
    let d = sum.len();
    team::each(sum.chunks_mut(COLUMNS).enumerate(), |(task, sum)| {
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
    let part = |x: &[T]| simd!(x.chunks(256).map(|part| dot(part, part).to_f64()).sum::<f64>());
    team::map(x.chunks(CHUNK), part).iter().sum()
}

pub(super) fn scale<T: Float>(factor: T, x: &mut [T]) {
    team::each(x.chunks_mut(CHUNK), |x| {
        simd!({
            for x in x {
                *x *= factor;
            }
        });
    });
}
