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

/// The values of a parameter.
#[track_caller]
pub(crate) fn named<'a>(
    params: &[smore::layout::Param],
    values: &'a [f64],
    name: &str,
) -> &'a [f64] {
    let param = params.iter().find(|p| p.name == name);
    &values[param.unwrap_or_else(|| panic!("no {name}")).range()]
}

/// W x of a row-major matrix.
pub(crate) fn times(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// exp(x_i) / sum_j exp(x_j)
pub(crate) fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x.exp() / sum).collect()
}

/// What `f` gives where work is split over `n` threads.
pub(crate) fn on_threads<R: Send>(n: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
}
