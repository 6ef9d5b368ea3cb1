//! What is out of the ordinary in a run's losses and gradients.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;

/// Steps that a new one is held against.
const WINDOW: usize = 50;
/// Steps before anything is marked: the first losses fall fast and say little.
const FIRST: usize = 20;
/// A loss spikes if it is above the median by this many deviations as robustly estimated ..
const DEVIATIONS: f64 = 6.0;
/// .. and by this share of the median, as the losses of a nearly finished run deviate by little.
const SHARE: f64 = 0.25;
/// A gradient explodes if its norm is this many times the median.
const EXPLOSION: f64 = 10.0;

/// A mark on a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flag {
    /// The loss is far above those of the 50 steps before.
    LossSpike,
    /// The gradient's norm is ten times the median of the 50 steps before, or more.
    GradientExplosion,
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LossSpike => "loss spike",
            Self::GradientExplosion => "gradient explosion",
        })
    }
}

/// Holds each step against those before it.
#[derive(Default)]
pub(super) struct Watch {
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
}

impl Watch {
    /// Marks a step and remembers it. Marked values are not remembered: one explosion must not hide
    /// the next.
    pub(super) fn see(&mut self, loss: f64, grad_norm: f64) -> Vec<Flag> {
        let spike = spikes(&self.losses, loss);
        let explosion = median(&self.norms).is_some_and(|m| grad_norm > EXPLOSION * m && m > 0.0);
        for (seen, value, marked) in
            [(&mut self.losses, loss, spike), (&mut self.norms, grad_norm, explosion)]
        {
            if !marked {
                seen.push_back(value);
            }
            if seen.len() > WINDOW {
                seen.pop_front();
            }
        }
        let flags = [(spike, Flag::LossSpike), (explosion, Flag::GradientExplosion)];
        flags.into_iter().filter_map(|(is, flag)| is.then_some(flag)).collect()
    }
}

fn spikes(seen: &VecDeque<f64>, loss: f64) -> bool {
    let Some(middle) = median(seen) else { return false };
    let deviations: VecDeque<f64> = seen.iter().map(|x| (x - middle).abs()).collect();
    // 1.4826 times the median deviation estimates the standard deviation of a normal variable.
    let sigma = 1.4826 * median(&deviations).unwrap_or(0.0);
    loss - middle > (DEVIATIONS * sigma).max(SHARE * middle.abs())
}

/// None before enough was seen.
fn median(seen: &VecDeque<f64>) -> Option<f64> {
    if seen.len() < FIRST {
        return None;
    }
    let mut sorted: Vec<f64> = seen.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    Some(sorted[sorted.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that falls from 3 with noise of 0.1, and a gradient around 1.
    fn run(steps: usize) -> impl Iterator<Item = (f64, f64)> {
        (0..steps).map(|i| {
            let noise = ((i * 7919) % 100) as f64 / 50.0 - 1.0;
            (1.0 + 2.0 / (1.0 + i as f64 / 40.0) + 0.1 * noise, 1.0 + 0.5 * noise)
        })
    }

    #[test]
    fn a_healthy_run_has_no_marks() {
        let mut watch = Watch::default();
        assert!(run(500).all(|(loss, norm)| watch.see(loss, norm).is_empty()));
    }

    #[test]
    fn spikes_and_explosions_are_marked_each_time() {
        let mut watch = Watch::default();
        for (i, (loss, norm)) in run(300).enumerate() {
            let (spike, explosion) = (i % 10 == 5, i % 10 == 7);
            let loss = if spike { loss * 2.5 } else { loss };
            let norm = if explosion { 30.0 } else { norm };
            let mut wanted = Vec::new();
            wanted.extend((spike && i > 30).then_some(Flag::LossSpike));
            wanted.extend((explosion && i > 30).then_some(Flag::GradientExplosion));
            let flags = watch.see(loss, norm);
            assert!(i <= 30 || flags == wanted, "step {i}: {flags:?}");
        }
    }
}
