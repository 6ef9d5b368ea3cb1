//! One number per row of a matrix: rows scaled, and rows met by rows.

use super::simd::{dot, simd};
use crate::{Float, team};

/// Elements of one task, about.
const TASK: usize = 1 << 14;

/// x_i *= weights_i
pub(super) fn scale<T: Float>(weights: &[T], x: &mut [T]) {
    let Some((d, rows)) = tasks(x.len(), weights.len()) else { return };
    team::each(x.chunks_mut(rows * d).zip(weights.chunks(rows)), |(x, weights)| {
        simd!({
            for (x, &w) in x.chunks_exact_mut(d).zip(weights) {
                for x in x {
                    *x *= w;
                }
            }
        });
    });
}

/// dots_i += x_i . y_i
pub(super) fn dots<T: Float>(x: &[T], y: &[T], dots: &mut [T]) {
    assert_eq!(x.len(), y.len(), "row shapes");
    let Some((d, rows)) = tasks(x.len(), dots.len()) else { return };
    let pairs = x.chunks(rows * d).zip(y.chunks(rows * d));
    team::each(dots.chunks_mut(rows).zip(pairs), |(dots, (x, y))| {
        simd!({
            let pairs = x.chunks_exact(d).zip(y.chunks_exact(d));
            for (sum, (x, y)) in dots.iter_mut().zip(pairs) {
                *sum += dot(x, y);
            }
        });
    });
}

/// Width of a row and rows of one task, of `len` elements in `n` rows; `None` where there are none.
fn tasks(len: usize, n: usize) -> Option<(usize, usize)> {
    assert!(len.checked_rem(n).unwrap_or(len) == 0, "{len} elements in {n} rows");
    (len > 0).then(|| (len / n, (TASK * n).div_ceil(len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 29 + seed * 17) % 83) as f64 / 41.0 - 1.0).collect()
    }

    /// Rows narrower and wider than a task, and none.
    #[test]
    fn agree_with_their_definitions() {
        for (n, d) in [(1, 1), (5, 7), (3, 2 * TASK + 5), (TASK + 3, 2), (0, 4)] {
            let (weights, x, y) = (numbers(n, 1), numbers(n * d, 2), numbers(n * d, 3));
            let mut scaled = x.clone();
            scale(&weights, &mut scaled);
            for (i, &got) in scaled.iter().enumerate() {
                assert_eq!(got, x[i] * weights[i / d]);
            }
            let mut sums = weights.clone();
            dots(&x, &y, &mut sums);
            for i in 0..n {
                let row = (i * d..(i + 1) * d).map(|j| x[j] * y[j]).sum::<f64>();
                assert!((sums[i] - weights[i] - row).abs() < 1e-9, "{n} x {d}, row {i}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "elements in 3 rows")]
    fn rows_of_unequal_width() {
        scale(&[1.0; 3], &mut [1.0; 10]);
    }
}
