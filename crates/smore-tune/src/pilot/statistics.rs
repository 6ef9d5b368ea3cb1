//! Means with intervals over few seeds.

use serde::{Deserialize, Serialize};

/// A mean and half of its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Half of the two-sided 95% interval of Student's t; infinite for a single value.
    #[serde(with = "finite")]
    pub half: f64,
}

/// 97.5% quantiles of Student's t for 1, 2, .. degrees of freedom.
const T_QUANTILES: [f64; 15] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
];

/// The 97.5% quantile of Student's t.
fn t_quantile(freedom: usize) -> f64 {
    T_QUANTILES.get(freedom - 1).copied().unwrap_or_else(|| {
        // The normal quantile and two terms of its expansion in 1 / freedom (Fisher 1926).
        let (z, n): (f64, f64) = (1.959_964, freedom as f64);
        z + (z.powi(3) + z) / (4.0 * n)
            + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n * n)
    })
}

impl Estimate {
    /// Of independent values.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let half = match values.len() {
            0 | 1 => f64::INFINITY,
            len => {
                let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
                t_quantile(len - 1) * (squares / (n - 1.0) / n).sqrt()
            }
        };
        Self { mean, half }
    }

    /// Whether the interval leaves zero out.
    pub fn differs_from_zero(&self) -> bool {
        self.mean.abs() > self.half
    }
}

/// JSON has no infinity: null stands for it.
mod finite {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        x.is_finite().then_some(*x).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(d)?.unwrap_or(f64::INFINITY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;
    use smore::rng::{Purpose, stream};

    #[test]
    fn a_hand_worked_interval() {
        // Mean 2, variance 1, standard error 1 / sqrt(3), t(2) = 4.303.
        let e = Estimate::of(&[1.0, 2.0, 3.0]);
        assert!((e.mean - 2.0).abs() < 1e-12 && (e.half - 4.303 / 3f64.sqrt()).abs() < 1e-9);
        assert!(!e.differs_from_zero());
        assert!(Estimate::of(&[0.9, 1.0, 1.1]).differs_from_zero());
        assert!(!Estimate::of(&[5.0]).differs_from_zero());
    }

    #[test]
    fn quantiles_of_many_degrees_of_freedom() {
        for (freedom, quantile) in [(16, 2.120), (20, 2.086), (30, 2.042), (120, 1.980)] {
            assert!((t_quantile(freedom) - quantile).abs() < 1e-3, "{freedom}");
        }
    }

    /// Of intervals over values without a difference, one in twenty leaves zero out.
    #[test]
    fn intervals_cover_as_often_as_they_say() {
        let mut rng = stream(5, Purpose::Tasks, 0, 0);
        // A sum of twelve uniform numbers is normal enough.
        let mut normal = || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        for n in [3, 5, 20] {
            let outside = (0..4000)
                .filter(|_| {
                    let values: Vec<f64> = (0..n).map(|_| normal()).collect();
                    Estimate::of(&values).differs_from_zero()
                })
                .count();
            assert!((150..=265).contains(&outside), "{n}: {outside} of 4000");
        }
    }
}
