//! How much a run trains on.

use crate::batching::entries;
use crate::config::RunConfig;
use crate::data::Sample;
use crate::doctor::{Subject, examine};
use crate::error::Result;
use crate::sft::total_steps;
use serde::Serialize;

/// The tokens of a run's data, as the model is given them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Samples.
    pub samples: usize,
    /// Tokens of all of them: an epoch.
    pub tokens: usize,
    /// Steps of the optimizer in an epoch.
    pub updates: usize,
    /// Steps of the optimizer in the whole run.
    pub total_updates: usize,
}

impl Amount {
    /// Reads the data that `config` names.
    ///
    /// # Errors
    /// The first thing that would keep the run from starting.
    pub fn of(config: &RunConfig) -> Result<Option<Self>> {
        let mut examined = examine(&Subject::from(config));
        examined.accept()?;
        let (Some(data), Some(spec)) = (&examined.data, &examined.spec) else { return Ok(None) };
        let lengths: Vec<usize> = data.train.iter().map(Sample::len).collect();
        let capacity = config.data.cutoff_len.min(spec.max_positions);
        let entries = entries(&config.train, &lengths, capacity).len();
        let train = &config.train;
        let window = train.per_device_train_batch_size * train.gradient_accumulation_steps;
        Ok(Some(Self {
            samples: lengths.len(),
            tokens: lengths.iter().sum(),
            updates: entries.div_ceil(window),
            total_updates: total_steps(train, entries),
        }))
    }

    /// Epochs of the whole run.
    pub fn epochs(&self) -> f64 {
        self.total_updates as f64 / self.updates.max(1) as f64
    }
}
