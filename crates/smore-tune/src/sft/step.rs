//! The gradients of one optimizer step, and held-out loss.

use super::windows::Window;
use crate::config::{BalanceReduction, TrainConfig};
use crate::data::Sample;
use crate::model::{Batch, Model, Routings, Scales, StepOutput};
use crate::optimizer::Optimizer;
use crate::routing::Counts;
use smore::adapter::{Noise, NoiseKey};
use smore_engine::Cpu;

/// Tokens evaluated together.
const EVAL_TOKENS: usize = 2048;

/// What a window came to.
pub(super) struct WindowResult {
    pub(super) loss: f64,
    pub(super) balance_loss: f64,
    pub(super) tokens: usize,
    pub(super) trained_tokens: usize,
}

/// Adds up the gradients of a window; `routed` sees every micro-batch's routing. Cross-entropy is divided by the trained tokens of the whole
/// window, so that it does not matter how the window is cut into micro-batches.
pub(super) fn accumulate(
    model: &Model<Cpu<f32>>,
    samples: &[Sample],
    window: &Window,
    train: &TrainConfig,
    optimizer: &mut Optimizer,
    mut routed: impl FnMut(&Batch, &Routings<Cpu<f32>>),
) -> WindowResult {
    let batches: Vec<Batch> = window
        .micro_batches
        .iter()
        .map(|indices| {
            let mut batch = Batch::default();
            for &i in indices {
                batch.push(samples[i].ids(), samples[i].trained());
            }
            batch
        })
        .collect();
    let trained_tokens: usize = batches.iter().map(|b| b.targets.len()).sum();
    let balance = match train.balance_reduction {
        BalanceReduction::Mean => 1.0 / batches.len() as f64,
        BalanceReduction::SumOverMicrobatches => 1.0,
    };
    let scales = Scales { loss: 1.0 / trained_tokens as f64, balance };
    let (mut loss, mut balance_loss) = (0.0, 0.0);
    for (i, batch) in batches.iter().enumerate() {
        let step = window.first_micro_batch + i as u64;
        let key = NoiseKey { seed: train.seed, step, place: 0 };
        let StepOutput { losses, balance_loss: balance, routing } =
            model.step(batch, scales, Some(Noise::Drawn(key)), &mut optimizer.grads);
        routed(batch, &routing);
        loss += losses.iter().sum::<f64>() * scales.loss;
        balance_loss += balance * scales.balance;
    }
    let tokens = batches.iter().map(|b| b.ids.len()).sum();
    WindowResult { loss, balance_loss, tokens, trained_tokens }
}

/// Mean cross-entropy per trained token of held-out samples, and the number of these tokens.
/// `None` without samples. The routing is added to `counts`.
pub fn evaluate(
    model: &Model<Cpu<f32>>,
    samples: &[Sample],
    mut counts: Option<&mut Counts>,
) -> Option<(f64, usize)> {
    let (mut sum, mut count) = (0.0, 0);
    let mut batch = Batch::default();
    for (i, sample) in samples.iter().enumerate() {
        batch.push(sample.ids(), sample.trained());
        if batch.ids.len() >= EVAL_TOKENS || i + 1 == samples.len() {
            let (losses, routing) = model.losses_routed(&batch);
            if let Some(counts) = counts.as_deref_mut() {
                counts.see(&routing);
            }
            sum += losses.iter().sum::<f64>();
            count += losses.len();
            batch = Batch::default();
        }
    }
    (count > 0).then(|| (sum / count as f64, count))
}
