//! What a difference on the same samples is worth: McNemar's exact test and a paired bootstrap.

use rand::RngExt;
use serde::{Deserialize, Serialize};
use smore::rng::{Purpose, stream};

/// Draws of the bootstrap.
const RESAMPLES: usize = 4000;

/// Two sides on the same samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Samples that both have.
    pub samples: usize,
    /// Mean of the first side, 0 to 1.
    pub first: f64,
    /// Mean of the second side, 0 to 1.
    pub second: f64,
    /// Samples that only the first side has right.
    pub only_first: usize,
    /// Samples that only the second side has right.
    pub only_second: usize,
    /// Second minus first.
    pub difference: f64,
    /// The difference's 95% interval, from the paired bootstrap.
    pub interval: (f64, f64),
    /// Two-sided p of McNemar's exact test.
    pub p: f64,
}

/// What a pair shows at the 95% level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The second side is worse.
    Worse,
    /// The second side is better.
    Better,
    /// Nothing can be told.
    NoDifference,
}

impl Paired {
    /// Compares right (true) and wrong answers to the same questions.
    ///
    /// # Panics
    /// If the two are of different length.
    pub fn of(first: &[bool], second: &[bool], seed: u64) -> Self {
        assert_eq!(first.len(), second.len(), "pairs are of the same samples");
        let pairs = || first.iter().zip(second);
        let only_first = pairs().filter(|&(&a, &b)| a && !b).count();
        let only_second = pairs().filter(|&(&a, &b)| b && !a).count();
        let share =
            |side: &[bool]| side.iter().filter(|&&x| x).count() as f64 / side.len().max(1) as f64;
        Self {
            samples: first.len(),
            first: share(first),
            second: share(second),
            only_first,
            only_second,
            difference: share(second) - share(first),
            interval: bootstrap(first.len(), only_first, only_second, seed),
            p: mcnemar(only_first, only_second),
        }
    }

    /// What it shows at the 95% level, by McNemar's test.
    pub fn verdict(&self) -> Verdict {
        match self.p < 0.05 {
            true if self.difference < 0.0 => Verdict::Worse,
            true => Verdict::Better,
            false => Verdict::NoDifference,
        }
    }
}

/// Two-sided p of McNemar's exact test: that of a fair coin falling this unevenly among the
/// samples on which the sides differ.
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let (n, least) = (only_first + only_second, only_first.min(only_second));
    // ln of the binomial coefficient, from term to term.
    let mut ln_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=least {
        tail += ln_term.exp();
        ln_term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// Percentile interval of the difference when the samples are drawn again with replacement. A
/// sample's share in the difference is -1, 0 or 1, so that the three counts say everything.
fn bootstrap(n: usize, only_first: usize, only_second: usize, seed: u64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 0.0);
    }
    let mut rng = stream(seed, Purpose::Bootstrap, 0, 0);
    let mut differences: Vec<i64> = (0..RESAMPLES)
        .map(|_| {
            let drawn = (0..n).map(|_| match rng.random_range(0..n) {
                i if i < only_first => -1,
                i if i < only_first + only_second => 1,
                _ => 0,
            });
            drawn.sum()
        })
        .collect();
    differences.sort_unstable();
    let at = |q: f64| differences[((RESAMPLES - 1) as f64 * q).round() as usize] as f64 / n as f64;
    (at(0.025), at(0.975))
}

/// Mean and its standard error, as lm-evaluation-harness has it; the error of a single value is 0.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    if n < 2.0 {
        return (mean, 0.0);
    }
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mcnemar_is_the_coins_tail() {
        assert_eq!(mcnemar(0, 0), 1.0);
        assert_eq!(mcnemar(3, 3), 1.0);
        // 2 * 0.5^10, and 2 * (1 + 10) * 0.5^10
        assert!((mcnemar(0, 10) - 2.0 / 1024.0).abs() < 1e-12);
        assert!((mcnemar(9, 1) - 22.0 / 1024.0).abs() < 1e-12);
        assert!(mcnemar(4000, 5000) < 1e-20);
    }

    #[test]
    fn standard_errors_are_the_harnesss() {
        let (mean, error) = mean_and_error(&[1.0, 0.0, 1.0, 1.0]);
        assert_eq!(mean, 0.75);
        assert!((error - 0.25).abs() < 1e-12);
        assert_eq!(mean_and_error(&[1.0]), (1.0, 0.0));
    }

    /// Two equal sides with noise of their own are told apart in at most 10 of 100 repetitions,
    /// and the interval holds 0 in at least 90; a side that is truly worse is found every time.
    #[test]
    fn equal_sides_are_seldom_told_apart() {
        let draw = |seed: u64, side: u64, right: f64| -> Vec<bool> {
            let mut rng = stream(seed, Purpose::Bootstrap, 1, side);
            let mut common = stream(seed, Purpose::Bootstrap, 2, 0);
            // Some questions are easier than others for both.
            let one = |_| rng.random::<f64>() < right + 0.3 * (common.random::<f64>() - 0.5);
            (0..400).map(one).collect()
        };
        let equal = |s| Paired::of(&draw(s, 1, 0.6), &draw(s, 2, 0.6), s);
        let pairs: Vec<Paired> = (0..100).map(equal).collect();
        let same = pairs.iter().filter(|p| p.verdict() == Verdict::NoDifference).count();
        assert!(same >= 90, "{same} of 100");
        let held = pairs.iter().filter(|p| p.interval.0 <= 0.0 && p.interval.1 >= 0.0).count();
        assert!(held >= 90, "{held} of 100");
        for s in 0..20 {
            let pair = Paired::of(&draw(s, 1, 0.7), &draw(s, 2, 0.4), s);
            assert_eq!(pair.verdict(), Verdict::Worse, "{pair:?}");
            assert!(pair.interval.1 < 0.0, "{pair:?}");
        }
    }
}
