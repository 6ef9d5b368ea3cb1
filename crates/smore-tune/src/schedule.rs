//! The learning rate over a run: a linear warm-up, then the chosen fall.

use crate::config::{LrScheduler, TrainConfig};

/// Learning rates of all steps.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    kind: LrScheduler,
    peak: f64,
    warmup: usize,
    total: usize,
}

impl Schedule {
    /// A schedule over `total` optimizer steps.
    pub fn new(config: &TrainConfig, total: usize) -> Self {
        let warmup = (total as f64 * config.warmup_ratio).ceil() as usize;
        Self::with_warmup(config, warmup, total)
    }

    /// As [`Schedule::new`], with `warmup` steps instead of the config's share.
    pub(crate) fn with_warmup(config: &TrainConfig, warmup: usize, total: usize) -> Self {
        let (kind, peak) = (config.lr_scheduler_type, config.learning_rate);
        Self { kind, peak, warmup, total }
    }

    /// Rate of step `step`, counted from 0. As in Hugging Face's schedules the first step of a
    /// warm-up has rate 0, and step `total` would have rate 0 again.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let left = (self.total - self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / left).min(1.0);
        self.peak
            * match self.kind {
                LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
                LrScheduler::Linear => 1.0 - progress,
                LrScheduler::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: LrScheduler) -> Vec<f64> {
        let config = TrainConfig {
            learning_rate: 2.0,
            warmup_ratio: 0.2,
            lr_scheduler_type: kind,
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, 10);
        (0..10).map(|s| schedule.rate(s)).collect()
    }

    #[test]
    fn warms_up_and_falls_as_named() {
        for kind in [LrScheduler::Cosine, LrScheduler::Linear, LrScheduler::Constant] {
            assert_eq!(rates(kind)[..3], [0.0, 1.0, 2.0]);
        }
        assert!((rates(LrScheduler::Cosine)[6] - 1.0).abs() < 1e-12);
        assert!((rates(LrScheduler::Linear)[4] - 1.5).abs() < 1e-12);
        assert_eq!(rates(LrScheduler::Constant)[9], 2.0);
        assert!(rates(LrScheduler::Cosine)[9] < 0.1);
    }
}
