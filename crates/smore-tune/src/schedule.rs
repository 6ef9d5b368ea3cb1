//! The learning rate over a run: a linear warm-up, then the chosen fall.

use crate::config::{LrScheduler, TrainConfig};

/// Learning rates of all steps.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    kind: LrScheduler,
    peak: f64,
    warmup: usize,
    total: usize,
    /// Share of the peak at which it ends.
    floor: f64,
}

impl Schedule {
    /// A schedule over `total` optimizer steps.
    pub fn new(config: &TrainConfig, total: usize) -> Self {
        Self::with_warmup(config, config.warmup(total), total)
    }

    /// As [`Schedule::new`], with `warmup` steps instead of the config's share.
    pub(crate) fn with_warmup(config: &TrainConfig, warmup: usize, total: usize) -> Self {
        let (kind, peak) = (config.lr_scheduler_type, config.learning_rate);
        Self { kind, peak, warmup, total, floor: config.floor() }
    }

    /// Rate of step `step`, counted from 0. As in Hugging Face's schedules the first step of a
    /// warm-up has rate 0, and step `total` would have rate 0 again.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let left = (self.total - self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / left).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak
            * match self.kind {
                LrScheduler::Cosine => cosine,
                LrScheduler::CosineWithMinLr => self.floor + (1.0 - self.floor) * cosine,
                LrScheduler::Linear => 1.0 - progress,
                LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SchedulerKwargs;

    fn rates(kind: LrScheduler) -> Vec<f64> {
        let config = TrainConfig {
            learning_rate: 2.0,
            warmup_ratio: Some(0.2),
            lr_scheduler_type: kind,
            lr_scheduler_kwargs: Some(SchedulerKwargs { min_lr: Some(0.5), min_lr_rate: None }),
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, 10);
        (0..10).map(|s| schedule.rate(s)).collect()
    }

    #[test]
    fn warms_up_and_falls_as_named() {
        for kind in [
            LrScheduler::Cosine,
            LrScheduler::Linear,
            LrScheduler::ConstantWithWarmup,
            LrScheduler::CosineWithMinLr,
        ] {
            assert_eq!(rates(kind)[..3], [0.0, 1.0, 2.0]);
        }
        assert!((rates(LrScheduler::Cosine)[6] - 1.0).abs() < 1e-12);
        assert!((rates(LrScheduler::Linear)[4] - 1.5).abs() < 1e-12);
        assert_eq!(rates(LrScheduler::ConstantWithWarmup)[9], 2.0);
        assert_eq!(rates(LrScheduler::Constant), [2.0; 10]);
        let floored = rates(LrScheduler::CosineWithMinLr);
        assert!((floored[6] - 1.25).abs() < 1e-12 && floored[9] > 0.5, "{floored:?}");
        assert!(rates(LrScheduler::Cosine)[9] < 0.1);
    }

    #[test]
    fn a_warm_up_is_counted_or_a_share() {
        let mut config = TrainConfig { warmup_ratio: Some(0.25), ..TrainConfig::default() };
        assert_eq!(Schedule::new(&config, 10).warmup, 3);
        (config.warmup_ratio, config.warmup_steps) = (None, Some(4));
        assert_eq!(Schedule::new(&config, 10).warmup, 4);
        assert_eq!(Schedule::new(&config, 3).warmup, 3);
        let share = SchedulerKwargs { min_lr: None, min_lr_rate: Some(0.1) };
        config.lr_scheduler_kwargs = Some(share);
        config.lr_scheduler_type = LrScheduler::CosineWithMinLr;
        let schedule = Schedule::new(&config, 8);
        assert!((schedule.rate(8) / config.learning_rate - 0.1).abs() < 1e-12);
    }
}
