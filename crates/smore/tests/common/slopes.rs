//! Gradients against central differences, group by group. The error allowed is relative to the
//! group's own gradient, so that a small group cannot hide behind a large one.

use super::numbers;
use std::ops::Range;

const STEP: f64 = 1e-6;
/// Of the group's gradient; rounding of the loss adds its own, see [`check`].
const ALLOWED: f64 = 1e-6;

/// Slope of `f` along `direction`, whose elements stand at `range` of `at`.
fn slope(at: &[f64], range: Range<usize>, direction: &[f64], f: impl Fn(&[f64]) -> f64) -> f64 {
    let moved = |step: f64| {
        let mut at = at.to_vec();
        for (at, d) in at[range.clone()].iter_mut().zip(direction) {
            *at += step * d;
        }
        f(&at)
    };
    (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
}

/// Compares the gradient `grads` of `f` at `at` within `range` with differences.
pub(crate) fn check(
    name: &str,
    at: &[f64],
    range: Range<usize>,
    grads: &[f64],
    f: impl Fn(&[f64]) -> f64,
) {
    let grads = &grads[range.clone()];
    let (steepest, size) =
        grads.iter().enumerate().fold((0, 0.0), |(i, size), (j, g): (usize, &f64)| {
            if g.abs() > size { (j, g.abs()) } else { (i, size) }
        });
    let mut alone = vec![0.0; range.len()];
    alone[steepest] = 1.0;
    let rounding = 1e-15 * f(at).abs().max(1.0) / STEP;
    for direction in [alone, numbers(range.len(), 11), numbers(range.len(), 12)] {
        let want = slope(at, range.clone(), &direction, &f);
        let got: f64 = grads.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let moved: f64 = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
        let allowed = ALLOWED * size * moved * (range.len() as f64).sqrt() + 4.0 * rounding;
        assert!((want - got).abs() <= allowed, "{name}: slope {want}, gradient {got}");
    }
}
