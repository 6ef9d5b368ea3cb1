//! Which evaluation was the best, and when to stop for want of a better one.

use crate::config::TrainConfig;

/// Looks on at a run's evaluations.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Selection {
    patience: Option<usize>,
    threshold: f64,
    keeps_values: bool,
    /// The best evaluation so far.
    pub(crate) best: Option<Best>,
    /// Evaluations since the last that was better by more than the threshold.
    pub(crate) waited: usize,
}

/// The evaluation with the lowest held-out loss.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Best {
    /// Steps done.
    pub(crate) step: usize,
    /// Held-out loss.
    pub(crate) loss: f64,
    /// Everything trained, as it was then; empty where nobody asks for it.
    pub(crate) values: Vec<f32>,
}

impl Selection {
    /// As the recipe asks.
    pub(crate) fn new(train: &TrainConfig) -> Self {
        Self {
            patience: train.early_stopping_patience,
            threshold: train.early_stopping_threshold,
            keeps_values: train.load_best_model_at_end,
            ..Self::default()
        }
    }

    /// Takes note of an evaluation after `step` steps; true where the run should stop.
    ///
    /// As in Hugging Face's trainer every lower loss is the new best, but only one that is lower by
    /// more than the threshold is worth waiting for.
    pub(crate) fn see(&mut self, step: usize, loss: f64, values: &[f32]) -> bool {
        let before = self.best.as_ref().map_or(f64::INFINITY, |best| best.loss);
        self.waited = if before - loss > self.threshold { 0 } else { self.waited + 1 };
        if loss < before {
            let values = if self.keeps_values { values.to_vec() } else { Vec::new() };
            self.best = Some(Best { step, loss, values });
        }
        self.patience.is_some_and(|patience| self.waited >= patience)
    }

    /// The best evaluation where its values are to be exported.
    pub(crate) fn exported(&self) -> Option<&Best> {
        self.best.as_ref().filter(|_| self.keeps_values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(patience: Option<usize>, threshold: f64) -> Selection {
        Selection::new(&TrainConfig {
            early_stopping_patience: patience,
            early_stopping_threshold: threshold,
            load_best_model_at_end: true,
            ..TrainConfig::default()
        })
    }

    #[test]
    fn stops_after_as_many_evaluations_without_a_better_one() {
        let mut all = selection(Some(2), 0.0);
        let stops: Vec<bool> = [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.8]
            .iter()
            .enumerate()
            .map(|(i, &loss)| all.see(i, loss, &[i as f32]))
            .collect();
        assert_eq!(stops, [false, false, false, false, false, true, false]);
        assert_eq!(all.exported(), Some(&Best { step: 6, loss: 1.8, values: vec![6.0] }));
        let mut never = selection(None, 0.0);
        assert!(!(0..50).any(|i| never.see(i, 1.0 + i as f64, &[])));
        assert_eq!(never.best.unwrap().step, 0);
    }

    #[test]
    fn small_gains_are_the_best_but_not_worth_waiting_for() {
        let mut all = selection(Some(2), 0.5);
        assert!(!all.see(1, 3.0, &[1.0]));
        assert!(!all.see(2, 2.9, &[2.0]));
        assert!(all.see(3, 2.8, &[3.0]));
        assert_eq!(all.best.unwrap().step, 3);
        let mut bare = Selection::new(&TrainConfig::default());
        bare.see(1, 1.0, &[1.0]);
        assert!(bare.exported().is_none() && bare.best.unwrap().values.is_empty());
    }
}
