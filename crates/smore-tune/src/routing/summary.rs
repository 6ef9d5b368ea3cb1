//! What counts of a layer say about its router.

use super::counts::{Counts, LayerCounts};
use serde::{Deserialize, Serialize};

/// How one layer of one adapter used its experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerUsage {
    /// Module path of the adapted map.
    pub path: String,
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// Share of all selections that went to each expert; sums to 1. Where every expert is always
    /// chosen (the dense gate, HydraLoRA), its share of the gate weights.
    pub share: Vec<f64>,
    /// Mean gate weight of each expert where it stands; 0 where it never does.
    #[serde(default)]
    pub weight: Vec<f64>,
    /// Tokens that were counted.
    #[serde(default)]
    pub tokens: u64,
    /// Largest coefficient of variation that the shares can have: sqrt(s/f - 1), always the same
    /// experts.
    #[serde(default)]
    pub most_cv: f64,
    /// How much the parent tells of the child.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentInformation>,
    /// Different trees at this place, of all layers; estimated from 256 on.
    #[serde(default)]
    pub trees: f64,
}

/// Mutual information of parent and child, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParentInformation {
    /// As the counts say. Near its bias, the hierarchy idles: a child is chosen alike under every
    /// parent.
    pub information: f64,
    /// What independent parents and children would show on average over as many nodes:
    /// (p - 1)(s - 1) / 2n for p parents and s children that occur (Miller 1955). Nodes of one text
    /// are not independent, so it is a lower bound.
    pub bias: f64,
}

impl LayerUsage {
    /// Of counts over `tokens` tokens of a place at which `trees` different trees were seen.
    pub(super) fn of(
        path: &str,
        layer: usize,
        (tokens, trees): (u64, f64),
        counts: &LayerCounts,
    ) -> Self {
        let (load, weights) = (counts.load(), counts.weights());
        let dense = counts.fanout == counts.experts;
        let all = || load.iter().map(|&n| n as f64);
        let share = if dense { shares(weights.iter().copied()) } else { shares(all()) };
        let mean = |(sum, n): (&f64, f64)| if n > 0.0 { sum / n } else { 0.0 };
        Self {
            path: path.to_owned(),
            layer,
            share,
            weight: weights.iter().zip(all()).map(mean).collect(),
            tokens,
            most_cv: most_cv(counts.experts, if dense { 1 } else { counts.fanout }),
            parent: ParentInformation::of(counts),
            trees,
        }
    }

    /// Entropy of the shares over that of equal shares: 1 is even use, 0 a single expert.
    pub fn evenness(&self) -> f64 {
        let n = self.share.len() as f64;
        if n < 2.0 {
            return 1.0;
        }
        entropy(&self.share) / n.ln()
    }

    /// Standard deviation of the shares over their mean.
    pub fn cv(&self) -> f64 {
        let n = self.share.len() as f64;
        let mean = self.share.iter().sum::<f64>() / n;
        if mean <= 0.0 {
            return 0.0;
        }
        let variance = self.share.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / n;
        variance.sqrt() / mean
    }

    /// The coefficient of variation over the largest that it can be: 0 is even use, 1 always the
    /// same experts.
    pub fn imbalance(&self) -> f64 {
        if self.most_cv > 0.0 { self.cv() / self.most_cv } else { 0.0 }
    }

    /// Experts that get less than a tenth of an equal share.
    pub fn idle(&self) -> usize {
        self.below(0.1).len()
    }

    /// Experts that get less than `part` of an equal share.
    pub fn below(&self, part: f64) -> Vec<usize> {
        let equal = 1.0 / self.share.len() as f64;
        let shares = self.share.iter().enumerate();
        shares.filter(|&(_, &p)| p < part * equal).map(|(expert, _)| expert).collect()
    }

    /// The expert with the largest share.
    pub fn dominant(&self) -> usize {
        let shares = self.share.iter().enumerate();
        shares.fold((0, 0.0), |most, (e, &p)| if p > most.1 { (e, p) } else { most }).0
    }
}

/// Largest coefficient of variation of the loads of `fanout` of `experts`.
fn most_cv(experts: usize, fanout: usize) -> f64 {
    (experts as f64 / fanout as f64 - 1.0).max(0.0).sqrt()
}

fn shares(of: impl Iterator<Item = f64> + Clone) -> Vec<f64> {
    let total: f64 = of.clone().sum();
    of.map(|x| if total > 0.0 { x / total } else { 0.0 }).collect()
}

fn entropy(shares: &[f64]) -> f64 {
    shares.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum()
}

impl ParentInformation {
    /// None at the top, where the parent is the token.
    fn of(counts: &LayerCounts) -> Option<Self> {
        if counts.parents == 0 || counts.fanout == counts.experts {
            return None;
        }
        let n: u64 = counts.count.iter().sum();
        let joint = shares(counts.count.iter().map(|&c| c as f64));
        let rows: Vec<f64> = joint.chunks(counts.experts).map(|row| row.iter().sum()).collect();
        let children =
            shares(counts.load().into_iter().map(|c| c as f64).collect::<Vec<_>>().into_iter());
        let information = entropy(&rows) + entropy(&children) - entropy(&joint);
        let seen = |p: &[f64]| p.iter().filter(|&&p| p > 0.0).count() as f64;
        let degrees = (seen(&rows) - 1.0).max(0.0) * (seen(&children) - 1.0).max(0.0);
        Some(Self { information: information.max(0.0), bias: degrees / (2.0 * n.max(1) as f64) })
    }
}

impl Counts {
    /// Every layer of every routed place, layers of a place together, leaves first.
    pub fn usage(&self) -> Vec<LayerUsage> {
        let layers = self.routed().flat_map(|(_, place)| {
            let seen = (place.tokens, place.trees.estimate());
            let layers = place.layers.iter().enumerate();
            layers.map(move |(l, counts)| LayerUsage::of(&place.path, l, seen, counts))
        });
        layers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(share: &[f64]) -> LayerUsage {
        LayerUsage {
            path: String::new(),
            layer: 0,
            share: share.to_vec(),
            weight: Vec::new(),
            tokens: 0,
            most_cv: most_cv(share.len(), 1),
            parent: None,
            trees: 0.0,
        }
    }

    #[test]
    fn evenness_and_idle_experts() {
        assert!((layer(&[0.25; 4]).evenness() - 1.0).abs() < 1e-12);
        assert_eq!(layer(&[0.0, 1.0]).evenness(), 0.0);
        assert_eq!(layer(&[0.01, 0.49, 0.5, 0.0]).idle(), 2);
        assert_eq!(layer(&[0.01, 0.49, 0.5, 0.0]).dominant(), 2);
    }

    #[test]
    fn imbalance_runs_from_even_to_always_the_same() {
        assert_eq!(layer(&[0.25; 4]).imbalance(), 0.0);
        assert!((layer(&[0.0, 1.0, 0.0, 0.0]).imbalance() - 1.0).abs() < 1e-12);
        let two_of_four = LayerUsage { most_cv: most_cv(4, 2), ..layer(&[0.5, 0.5, 0.0, 0.0]) };
        assert!((two_of_four.imbalance() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn information_of_tables_worked_by_hand() {
        let of = |count: &[u64]| {
            let counts = LayerCounts {
                experts: 2,
                parents: 2,
                fanout: 1,
                count: count.to_vec(),
                weight: vec![0.0; 4],
            };
            ParentInformation::of(&counts).unwrap()
        };
        assert!(of(&[30, 10, 60, 20]).information < 1e-12);
        assert!((of(&[50, 0, 0, 50]).information - 2f64.ln()).abs() < 1e-12);
        assert!((of(&[50, 0, 0, 50]).bias - 1.0 / 200.0).abs() < 1e-15);
        // 0.4 ln(0.4 / 0.25) * 2 + 0.1 ln(0.1 / 0.25) * 2
        let by_hand = 0.8 * 1.6f64.ln() + 0.2 * 0.4f64.ln();
        assert!((of(&[40, 10, 10, 40]).information - by_hand).abs() < 1e-12);
    }
}
