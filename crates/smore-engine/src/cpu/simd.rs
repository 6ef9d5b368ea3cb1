//! Element-wise loops compiled once per vector unit and chosen at run time, so that a portable
//! build uses the machine it finds.

use crate::Float;

/// The expression, compiled for the widest vector unit of this machine. Functions called in it must be
/// `#[inline(always)]` to profit.
///
/// A macro, since the closure must be inlined too: left to itself the compiler keeps a long one as a
/// function of its own, for the narrowest unit that a portable build knows.
#[macro_export]
macro_rules! simd {
    ($body:expr) => {
        $crate::cpu::dispatch(
            #[inline(always)]
            || $body,
        )
    };
}
pub use simd;

/// What [`simd!`](crate::simd!) calls.
#[doc(hidden)]
#[inline]
pub fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Lanes of a reduction: enough for four AVX2 registers, and a fixed summation order everywhere.
const LANES: usize = 32;

/// Sum of a_i b_i. Call it inside [`simd!`](crate::simd!).
#[inline(always)]
pub fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut tail = T::ZERO;
    for (&x, &y) in a_chunks.remainder().iter().zip(b_chunks.remainder()) {
        tail += x * y;
    }
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().copied().sum::<T>() + tail
}

/// Sum of x in the order of [`dot`]. Call it inside [`simd!`](crate::simd!): a plain loop adds one
/// number after the other.
#[inline(always)]
pub(super) fn sum<T: Float>(x: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    let mut tail = T::ZERO;
    for &x in rest {
        tail += x;
    }
    lanes.iter().copied().sum::<T>() + tail
}

/// The largest of x and `least`; NaN loses. Call it inside [`simd!`](crate::simd!).
#[inline(always)]
pub(super) fn max<T: Float>(least: T, x: &[T]) -> T {
    let mut lanes = [least; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = lanes[i].max_of(x[i]);
        }
    }
    rest.iter().chain(&lanes).fold(least, |max, &x| max.max_of(x))
}
