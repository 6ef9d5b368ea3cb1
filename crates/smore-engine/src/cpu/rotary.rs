//! Rotary positions (Su et al. 2021), in the half-split layout of Hugging Face's Llama.

use super::simd::simd;
use crate::{Float, team};

/// Rows of one task.
const ROWS: usize = 16;

pub(super) fn rotate<T: Float>(
    x: &mut [T],
    table: &[T],
    positions: &[u32],
    head_dim: usize,
    inverse: bool,
) {
    let half = head_dim / 2;
    let width = x.len() / positions.len().max(1);
    assert_eq!(x.len(), width * positions.len(), "rotary shapes");
    let sign = if inverse { -T::ONE } else { T::ONE };
    team::each(x.chunks_mut(width * ROWS).zip(positions.chunks(ROWS)), |(x, positions)| {
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) = table[position as usize * head_dim..][..head_dim].split_at(half);
            simd!({
                for head in row.chunks_exact_mut(head_dim) {
                    let (a, b) = head.split_at_mut(half);
                    for ((a, b), (&c, &s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                        let s = s * sign;
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            });
        }
    });
}
