//! Whether new traffic is routed as the held-out samples were when the adapter was exported.
//!
//! Per place and layer the shares of the experts are compared by the population stability index and
//! the Jensen-Shannon divergence. How much of it is chance is told by a permutation test: which
//! samples are the new ones is drawn anew many times, each draw compared in the same way. Samples
//! are whole texts, since tokens of one text are routed alike and are no independent draws. All
//! places are judged together by the largest divergence in standard deviations of its draws
//! (Westfall and Young 1993), so the share of false alarms is the one that is asked for however many
//! places there are.

use super::counts::{Counts, LayerCounts};
use super::table::Window;
use crate::error::{Error, Result};
use rand::seq::index;
use rayon::prelude::*;
use serde::Serialize;
use smore::rng::{Purpose, stream};
use std::path::Path;

/// The file beside an adapter's that holds the routing of its held-out samples.
pub const REFERENCE: &str = "smore_routing.parquet";

/// New samples that are compared; of more, an even choice.
const MOST: usize = 1024;
/// Draws of a permutation test.
const DRAWS: usize = 999;
/// Added to every share in the population stability index, which has none for zeros.
const FLOOR: f64 = 1e-4;

/// What an adapter's experts did on each of its held-out samples.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Path and layer, first column and number of experts.
    layers: Vec<(String, usize, usize, usize)>,
    samples: Vec<Sampled>,
}

/// Selections in one sample, for all experts of all layers of all places.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Tokens of the sample.
    pub tokens: u64,
    counts: Vec<f64>,
}

/// How far new traffic is from the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Drift {
    /// Samples compared.
    pub samples: usize,
    /// Their tokens.
    pub tokens: u64,
    /// Samples of the reference.
    pub reference: usize,
    /// Chance of a divergence as large as this if nothing had changed.
    pub p: f64,
    /// Whether `p` is at most the share of false alarms asked for.
    pub alarm: bool,
    /// Every layer of every place, the farthest first.
    pub layers: Vec<LayerDrift>,
}

/// How far one layer is.
#[derive(Clone, Debug, Serialize)]
pub struct LayerDrift {
    /// Module path.
    pub place: String,
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// Population stability index, sum of (q - p) ln(q / p) over the experts.
    pub psi: f64,
    /// Jensen-Shannon divergence in nats, from 0 to ln 2.
    pub js: f64,
    /// Chance of one so large anywhere, if nothing had changed.
    pub p: f64,
    /// Shares of the experts in the reference and now.
    pub shares: [Vec<f64>; 2],
}

impl Reference {
    /// Reads the file in an adapter's folder.
    ///
    /// # Errors
    /// If there is none, or it is not one.
    pub fn read(adapter: &Path) -> Result<Self> {
        let file = adapter.join(REFERENCE);
        if !file.exists() {
            let message = "the adapter has no routing to compare with; `smore train` keeps it for \
                           adapters with routers"
                .into();
            return Err(Error::Adapter { file, message });
        }
        let windows = super::table::read(&file)?;
        let mut layers = Vec::new();
        let mut at = 0;
        for (usage, counts) in windows.first().map_or(&[][..], |w| &w.layers) {
            layers.push((usage.path.clone(), usage.layer, at, counts.experts));
            at += counts.experts;
        }
        let samples: Vec<Sampled> = windows.iter().map(Sampled::of).collect();
        if layers.is_empty() || samples.iter().any(|s| s.counts.len() != at) {
            let message = "its samples do not have the same places".into();
            return Err(Error::Adapter { file, message });
        }
        Ok(Self { layers, samples })
    }

    /// Fewest false alarms that a test against this reference can be held to: one sample can be the
    /// farthest of all by chance.
    pub fn least_rate(&self, samples: usize) -> f64 {
        // C(n + k, k) ways to choose the new ones, for k = 1 as many as there are samples.
        let ways: f64 = (0..samples.min(8))
            .map(|i| (self.samples.len() + samples - i) as f64 / (i + 1) as f64)
            .product();
        (1.0 / ways).max(1.0 / (DRAWS + 1) as f64)
    }

    /// Whether counts are of the same places.
    pub fn fits(&self, sample: &Sampled) -> bool {
        self.layers.last().is_some_and(|(_, _, at, experts)| at + experts == sample.counts.len())
    }

    /// Compares samples with the reference; at most `rate` of the comparisons of samples like the
    /// reference's are alarms. `seed` draws the permutations.
    ///
    /// # Errors
    /// If there are too few samples for such a rate.
    pub fn compare(&self, new: &[Sampled], rate: f64, seed: u64) -> Result<Drift> {
        self.compared(new, None, rate, seed)
    }

    /// As [`Reference::compare`] for samples that were taken one after the other until they had
    /// `tokens` tokens. The draws are taken so too: samples that are few, since they are long, are
    /// not like as many drawn at random.
    ///
    /// # Errors
    /// As [`Reference::compare`].
    pub fn compare_window(
        &self,
        new: &[Sampled],
        tokens: u64,
        rate: f64,
        seed: u64,
    ) -> Result<Drift> {
        self.compared(new, Some(tokens), rate, seed)
    }

    fn compared(&self, new: &[Sampled], until: Option<u64>, rate: f64, seed: u64) -> Result<Drift> {
        let least = self.least_rate(new.len());
        if new.is_empty() || rate < least {
            return Err(Error::Run(format!(
                "{} samples against {} of the reference cannot tell an alarm from chance at a rate \
                 of {rate}; give more samples or a rate from {least:.4} up",
                new.len(),
                self.samples.len()
            )));
        }
        // So many tell any difference that matters; more only take longer.
        let thin = new.len().div_ceil(MOST);
        let new: Vec<&Sampled> = new.iter().step_by(thin).collect();
        let pool: Vec<&Sampled> = new.iter().copied().chain(&self.samples).collect();
        let width = self.samples[0].counts.len();
        let mut all = vec![0.0; width];
        for sample in &pool {
            add(&mut all, &sample.counts);
        }
        let divergences = |chosen: &[usize]| {
            let mut own = vec![0.0; width];
            for &i in chosen {
                add(&mut own, &pool[i].counts);
            }
            let rest: Vec<f64> = all.iter().zip(&own).map(|(a, b)| a - b).collect();
            let layers = self.layers.iter();
            layers
                .map(|&(_, _, at, n)| js(&rest[at..at + n], &own[at..at + n]))
                .collect::<Vec<f64>>()
        };
        let observed = divergences(&(0..new.len()).collect::<Vec<_>>());
        let draws: Vec<Vec<f64>> = (0..DRAWS)
            .into_par_iter()
            .map(|draw| {
                let mut rng = stream(seed, Purpose::Permutation, draw as u64, 0);
                let Some(until) = until else {
                    return divergences(&index::sample(&mut rng, pool.len(), new.len()).into_vec());
                };
                let order = index::sample(&mut rng, pool.len(), pool.len().min(8 * new.len()));
                let mut tokens = 0;
                let before = |&i: &usize| {
                    let goes_on = tokens < until;
                    tokens += pool[i].tokens;
                    goes_on
                };
                divergences(&order.into_iter().take_while(before).collect::<Vec<_>>())
            })
            .collect();
        // Mean and deviation over the draws and what was observed, which is one of them by chance.
        let n = (DRAWS + 1) as f64;
        let scale: Vec<(f64, f64)> = (0..self.layers.len())
            .map(|l| {
                let values = || draws.iter().map(|d| d[l]).chain([observed[l]]);
                let mean = values().sum::<f64>() / n;
                let variance = values().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                (mean, variance.sqrt())
            })
            .collect();
        let far =
            |x: f64, l: usize| if scale[l].1 > 0.0 { (x - scale[l].0) / scale[l].1 } else { 0.0 };
        let farthest = |d: &[f64]| {
            d.iter().enumerate().map(|(l, &x)| far(x, l)).fold(f64::NEG_INFINITY, f64::max)
        };
        let largest: Vec<f64> = draws.iter().map(|d| farthest(d)).collect();
        // Sums in another order differ in their last bits.
        let chance =
            |score: f64| (1 + largest.iter().filter(|&&x| x >= score - 1e-9).count()) as f64 / n;
        let mut reference = vec![0.0; width];
        for sample in &self.samples {
            add(&mut reference, &sample.counts);
        }
        let mut now = vec![0.0; width];
        for sample in &new {
            add(&mut now, &sample.counts);
        }
        let layer = |(l, (place, layer, at, n)): (usize, &(String, usize, usize, usize))| {
            let shares = [&reference, &now].map(|all| shares(&all[*at..at + n]));
            LayerDrift {
                place: place.clone(),
                layer: *layer,
                psi: psi(&shares[0], &shares[1]),
                js: observed[l],
                p: chance(far(observed[l], l)),
                shares,
            }
        };
        let mut layers: Vec<LayerDrift> = self.layers.iter().enumerate().map(layer).collect();
        layers.sort_by(|a, b| a.p.total_cmp(&b.p).then(b.js.total_cmp(&a.js)));
        let p = chance(farthest(&observed));
        Ok(Drift {
            samples: new.len(),
            tokens: new.iter().map(|s| s.tokens).sum(),
            reference: self.samples.len(),
            p,
            alarm: p <= rate,
            layers,
        })
    }
}

impl Sampled {
    /// The counts of one sample.
    pub fn new(counts: &Counts) -> Self {
        let layers = counts.routed().flat_map(|(_, place)| &place.layers);
        let load = layers.flat_map(LayerCounts::load);
        Self { tokens: counts.tokens(), counts: load.map(|n| n as f64).collect() }
    }

    fn of(window: &Window) -> Self {
        let load = window.layers.iter().flat_map(|(_, counts)| counts.load());
        Self {
            tokens: window.layers.first().map_or(0, |(usage, _)| usage.tokens),
            counts: load.map(|n| n as f64).collect(),
        }
    }
}

fn add(sum: &mut [f64], other: &[f64]) {
    sum.iter_mut().zip(other).for_each(|(a, b)| *a += b);
}

fn shares(counts: &[f64]) -> Vec<f64> {
    let total: f64 = counts.iter().sum();
    counts.iter().map(|n| if total > 0.0 { n / total } else { 0.0 }).collect()
}

/// Jensen-Shannon divergence of two rows of counts, in nats.
fn js(a: &[f64], b: &[f64]) -> f64 {
    let total = |counts: &[f64]| counts.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let (all_a, all_b) = (total(a), total(b));
    let term = |p: f64, q: f64| if p > 0.0 { p * (2.0 * p / (p + q)).ln() } else { 0.0 };
    let pairs = a.iter().zip(b).map(|(x, y)| (x / all_a, y / all_b));
    (0.5 * pairs.map(|(p, q)| term(p, q) + term(q, p)).sum::<f64>()).max(0.0)
}

fn psi(before: &[f64], now: &[f64]) -> f64 {
    let terms = before.iter().zip(now).map(|(p, q)| (p + FLOOR, q + FLOOR));
    terms.map(|(p, q)| (q - p) * (q / p).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    /// A sample of `tokens` tokens from a text whose leaning differs from text to text.
    fn sample(seed: u64, lean: f64) -> Sampled {
        let mut rng = stream(seed, Purpose::Sampling, 0, 0);
        let tokens = rng.random_range(20..120);
        let counts = (0..12).flat_map(|_| {
            let own = lean + 0.15 * (rng.random::<f64>() - 0.5);
            let first = (0..tokens).filter(|_| rng.random::<f64>() < own).count();
            [first as f64, (tokens - first) as f64]
        });
        Sampled { counts: counts.collect(), tokens: tokens as u64 }
    }

    fn reference() -> Reference {
        Reference {
            layers: (0..12).map(|l| (format!("place {}", l / 2), l % 2, 2 * l, 2)).collect(),
            samples: (0..300).map(|i| sample(i, 0.5)).collect(),
        }
    }

    /// 200 windows of texts like the reference's: as many alarms as asked for, give or take three
    /// standard deviations.
    #[test]
    fn false_alarms_come_at_the_stated_rate() {
        let reference = reference();
        let rate = 0.05;
        let alarms = (0..200u64).filter(|window| {
            let new: Vec<Sampled> = (0..8).map(|i| sample(1000 + window * 8 + i, 0.5)).collect();
            reference.compare(&new, rate, *window).unwrap().alarm
        });
        let (alarms, deviation) = (alarms.count() as f64, (200.0 * rate * (1.0 - rate)).sqrt());
        assert!((alarms - 200.0 * rate).abs() < 3.0 * deviation, "{alarms}");
    }

    #[test]
    fn texts_of_another_kind_are_noticed_every_time() {
        let reference = reference();
        for window in 0..50u64 {
            let new: Vec<Sampled> = (0..8).map(|i| sample(9000 + window * 8 + i, 0.65)).collect();
            let drift = reference.compare(&new, 0.01, window).unwrap();
            assert!(drift.alarm, "{}", drift.p);
        }
    }

    #[test]
    fn a_single_sample_cannot_be_held_to_a_rate_below_one_in_all() {
        let error = reference().compare(&[sample(1, 0.9)], 0.001, 1).unwrap_err().to_string();
        assert!(error.contains("a rate from 0.0033 up"), "{error}");
        assert!(reference().compare(&[sample(1, 0.9)], 0.01, 1).unwrap().alarm);
    }

    #[test]
    fn divergences_worked_by_hand() {
        assert!(js(&[3.0, 1.0], &[6.0, 2.0]) < 1e-15);
        assert!((js(&[1.0, 0.0], &[0.0, 5.0]) - 2f64.ln()).abs() < 1e-12);
        assert!((psi(&[0.5, 0.5], &[0.25, 0.75]) - 0.25 * 3f64.ln()).abs() < 1e-3);
    }
}
