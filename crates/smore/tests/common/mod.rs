//! What the tests share.

#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod case;
pub(crate) mod slopes;
pub(crate) mod table;

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

/// Asserts that no element differs by more than `allowed` of the largest wanted one.
#[track_caller]
pub(crate) fn close<T: smore_engine::Float>(what: &str, want: &[f64], got: &[T], allowed: f64) {
    assert_eq!(want.len(), got.len(), "{what}: lengths");
    let scale = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        let got = got.to_f64();
        let near = (want - got).abs() <= allowed * scale;
        assert!(near, "{what}[{i}] is {got}, expected {want}; the largest is {scale}");
    }
}
