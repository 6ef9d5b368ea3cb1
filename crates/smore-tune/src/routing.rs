//! How routers use their experts.

use crate::data::Sample;
use crate::model::{Batch, Model};
use serde::{Deserialize, Serialize};
use smore_engine::Cpu;

/// How one layer of one adapter used its experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerUsage {
    /// Module path of the adapted map.
    pub path: String,
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// Share of all selections that went to each expert; sums to 1.
    pub share: Vec<f64>,
}

impl LayerUsage {
    /// Entropy of the shares over that of equal shares: 1 is even use, 0 a single expert.
    pub fn evenness(&self) -> f64 {
        let n = self.share.len() as f64;
        if n < 2.0 {
            return 1.0;
        }
        let entropy: f64 = self.share.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        entropy / n.ln()
    }

    /// Experts that get less than a tenth of an equal share.
    pub fn idle(&self) -> usize {
        let equal = 1.0 / self.share.len() as f64;
        self.share.iter().filter(|&&p| p < 0.1 * equal).count()
    }
}

/// Usage of every layer of every routed adapter over the tokens of `samples`.
pub fn usage(model: &Model<Cpu<f32>>, samples: &[&Sample]) -> Vec<LayerUsage> {
    let mut all: Vec<LayerUsage> = Vec::new();
    for chunk in samples.chunks(32) {
        let mut batch = Batch::default();
        for sample in chunk {
            batch.push(sample.ids(), sample.trained());
        }
        let routed = model.routing(&batch);
        let layers = model.adapters.slots.iter().zip(&routed).flat_map(|(slot, routing)| {
            let stats = routing.iter().flat_map(|r| r.stats.iter().enumerate());
            stats.map(|(l, s)| (slot.path(), l, s.load.clone())).collect::<Vec<_>>()
        });
        for (i, (path, layer, load)) in layers.enumerate() {
            match all.get_mut(i) {
                Some(seen) => seen.share.iter_mut().zip(&load).for_each(|(s, l)| *s += l),
                None => all.push(LayerUsage { path, layer, share: load }),
            }
        }
    }
    for usage in &mut all {
        let total: f64 = usage.share.iter().sum();
        usage.share.iter_mut().for_each(|s| *s /= total.max(1.0));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(share: &[f64]) -> LayerUsage {
        LayerUsage { path: String::new(), layer: 0, share: share.to_vec() }
    }

    #[test]
    fn evenness_and_idle_experts() {
        assert!((layer(&[0.25; 4]).evenness() - 1.0).abs() < 1e-12);
        assert_eq!(layer(&[0.0, 1.0]).evenness(), 0.0);
        assert_eq!(layer(&[0.01, 0.49, 0.5, 0.0]).idle(), 2);
    }
}
