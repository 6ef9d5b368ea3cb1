//! What the tests share.

/// Numbers in (-1, 1), none near 0, that look random.
pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
            if x.abs() < 0.02 { x + 0.1 } else { x }
        })
        .collect()
}
