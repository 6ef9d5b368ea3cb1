//! What waits for the backward pass: as it is, or in bf16.

use super::elementwise::{CHUNK, unwritten};
use super::simd::simd;
use crate::{Float, team};

/// A buffer between the forward and the backward pass.
pub enum Kept<T> {
    /// As it was.
    Whole(Vec<T>),
    /// Every element rounded to the nearest in bf16, ties to even: the upper half of its f32. In
    /// pieces, which fill the room that the large buffers around them leave instead of cutting it up.
    Halves(Vec<Vec<u16>>),
}

/// An element as it is kept, and what it is to compute with.
pub(super) trait Widen<T>: Copy + Send + Sync {
    fn widened(self) -> T;
}

impl<T: Float> Widen<T> for T {
    #[inline(always)]
    fn widened(self) -> T {
        self
    }
}

/// The upper half of an f32.
impl<T: Float> Widen<T> for u16 {
    #[inline(always)]
    fn widened(self) -> T {
        T::from_f32(f32::from_bits(u32::from(self) << 16))
    }
}

/// Rounds every element.
pub(super) fn halves<T: Float>(x: &[T]) -> Kept<T> {
    // Made by one thread: those that ask the allocator at the same time wait for each other.
    let mut pieces: Vec<_> = x.chunks(CHUNK).map(|x| Vec::with_capacity(x.len())).collect();
    team::each(pieces.iter_mut().zip(x.chunks(CHUNK)), |(piece, x)| {
        simd!(piece.extend(x.iter().map(|x| rounded(x.to_f64() as f32))));
    });
    Kept::Halves(pieces)
}

/// The upper half of the f32 nearest among those whose lower half is 0; NaN stays NaN.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { nearest as u16 }
}

impl<T: Float> Kept<T> {
    pub(super) fn recall(self) -> Vec<T> {
        let pieces = match self {
            Self::Whole(x) => return x,
            Self::Halves(pieces) => pieces,
        };
        let mut x = unwritten(pieces.iter().map(Vec::len).sum());
        team::each(x.chunks_mut(CHUNK).zip(pieces), |(x, piece)| {
            simd!({
                for (x, &half) in x.iter_mut().zip(&piece) {
                    *x = half.widened();
                }
            });
        });
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the `half` crate: every upper half, with lower halves around the tie.
    #[test]
    fn rounds_to_the_nearest_and_recalls_it() {
        let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        for upper in 0..=u16::MAX {
            let x = lower.map(|l| f32::from_bits(u32::from(upper) << 16 | l));
            let got = halves(&x).recall();
            for (x, got) in x.into_iter().zip(got) {
                let want = half::bf16::from_f32(x).to_f32();
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x}");
            }
        }
    }
}
