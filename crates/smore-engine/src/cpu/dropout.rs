//! Dropout: which elements stay is a function of key and place, so that nothing is stored and any
//! part of a buffer can be computed by itself.

use super::elementwise::CHUNK;
use super::simd::simd;
use crate::{Dropout, Float, team};

/// y += x, without what is dropped and the rest scaled up.
pub(super) fn add<T: Float>(dropout: Dropout, x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len(), "dropout shapes");
    let limit = (dropout.rate * f64::from(u32::MAX)).round() as u64;
    let scale = T::from_f64(1.0 / (1.0 - dropout.rate));
    team::each(y.chunks_mut(CHUNK).zip(x.chunks(CHUNK)).enumerate(), |(task, (y, x))| {
        let first = dropout.first + (task * CHUNK) as u64;
        simd!({
            for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                let kept = mix(dropout.key, first + i as u64) >> 32 >= limit;
                *y += if kept { x * scale } else { T::ZERO };
            }
        });
    });
}

/// Number `place` of the sequence SplitMix64 (Steele et al. 2014) that starts at `key`.
#[inline(always)]
fn mix(key: u64, place: u64) -> u64 {
    let mut z = key.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropped(dropout: Dropout, n: usize) -> Vec<f64> {
        let mut y = vec![0.0; n];
        add(dropout, &vec![1.0; n], &mut y);
        y
    }

    /// The sequence from 0 that SplitMix64's reference gives.
    #[test]
    fn draws_the_published_sequence() {
        let want = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!([0, 1, 2].map(|i| mix(0, i)), want);
    }

    /// Elements drop independently of their neighbours, of the element a power of two away, and of
    /// the same element under another key.
    #[test]
    fn neighbours_and_keys_are_independent() {
        let (n, rate) = (200_000, 0.5);
        let keys = [0, 1, 1 << 32, 0x1234_5678_9abc_def0u64];
        let masks = keys.map(|key| dropped(Dropout { key, first: 0, rate }, n + 1024));
        let both = |a: &[f64], b: &[f64]| {
            let pairs = a.iter().zip(b).filter(|(a, b)| **a == 0.0 && **b == 0.0);
            pairs.count() as f64 / n as f64
        };
        for (i, mask) in masks.iter().enumerate() {
            for apart in [1, 2, 3, 64, 128, 512, 1024] {
                let share = both(&mask[..n], &mask[apart..]);
                assert!((share - 0.25).abs() < 0.005, "key {i}, {apart} apart: {share}");
            }
            for other in &masks[..i] {
                let share = both(&mask[..n], other);
                assert!((share - 0.25).abs() < 0.005, "key {i}: {share}");
            }
        }
    }

    #[test]
    fn drops_its_share_and_keeps_the_mean() {
        let n = 200_000;
        for rate in [0.05, 0.5, 0.9] {
            let y = dropped(Dropout { key: 7, first: 0, rate }, n);
            let zeros = y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
            assert!((zeros - rate).abs() < 0.005, "{zeros} of {rate}");
            assert!((y.iter().sum::<f64>() / n as f64 - 1.0).abs() < 0.03);
            assert!(y.iter().all(|&y| y == 0.0 || (y - 1.0 / (1.0 - rate)).abs() < 1e-12));
        }
    }

    /// Any part by itself is that part of the whole, and another key drops others.
    #[test]
    fn depends_on_key_and_place_alone() {
        let whole = Dropout { key: 3, first: 0, rate: 0.3 };
        let all = dropped(whole, 50_000);
        let part = dropped(Dropout { first: 20_001, ..whole }, 17_000);
        assert!(part == all[20_001..37_001]);
        assert_ne!(all, dropped(Dropout { key: 4, ..whole }, 50_000));
    }
}
