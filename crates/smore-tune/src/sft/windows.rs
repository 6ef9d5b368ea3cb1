//! Which samples each optimizer step sees: every epoch in a new order.

use crate::batching::group_by_length;
use crate::config::TrainConfig;
use rand::seq::SliceRandom;
use smore::rng::{Purpose, stream};

/// Optimizer steps of a run over `entries` samples or packs of them.
pub(crate) fn total_steps(train: &TrainConfig, entries: usize) -> usize {
    let window = train.per_device_train_batch_size * train.gradient_accumulation_steps;
    let per_epoch = entries.div_ceil(window);
    let by_epochs = (train.num_train_epochs * per_epoch as f64).ceil() as usize;
    train.max_steps.unwrap_or(by_epochs).max(1)
}

/// Deals out the samples of each optimizer step.
pub(super) struct Windows {
    seed: u64,
    batch: usize,
    per_step: usize,
    /// Samples, or packs of them, and how many tokens they have.
    entries: Vec<Vec<usize>>,
    lengths: Vec<usize>,
    group_by_length: bool,
    epoch: u64,
    order: Vec<usize>,
    next: usize,
    /// Micro-batches dealt in the run.
    micro_batches: u64,
}

/// The micro-batches of one optimizer step.
pub(super) struct Window {
    pub(super) first_micro_batch: u64,
    pub(super) micro_batches: Vec<Vec<usize>>,
}

impl Windows {
    /// `entries` are what [`crate::batching::entries`] made of samples of these `lengths`.
    pub(super) fn new(train: &TrainConfig, lengths: &[usize], entries: Vec<Vec<usize>>) -> Self {
        let tokens = |entry: &Vec<usize>| entry.iter().map(|&i| lengths[i]).sum();
        let mut windows = Self {
            seed: train.seed,
            batch: train.per_device_train_batch_size,
            per_step: train.gradient_accumulation_steps,
            lengths: entries.iter().map(tokens).collect(),
            entries,
            group_by_length: train.group_by_length,
            epoch: 0,
            order: Vec::new(),
            next: 0,
            micro_batches: 0,
        };
        windows.shuffle();
        windows
    }

    fn shuffle(&mut self) {
        self.order = (0..self.entries.len()).collect();
        let mut rng = stream(self.seed, Purpose::Order, self.epoch, 0);
        self.order.shuffle(&mut rng);
        if self.group_by_length {
            group_by_length(&mut self.order, &self.lengths, self.batch, &mut rng);
        }
        self.next = 0;
    }

    /// The last window of an epoch may be smaller.
    pub(super) fn next_window(&mut self) -> Window {
        if self.next == self.entries.len() {
            self.epoch += 1;
            self.shuffle();
        }
        let end = self.entries.len().min(self.next + self.batch * self.per_step);
        let micro_batches: Vec<Vec<usize>> = self.order[self.next..end]
            .chunks(self.batch)
            .map(|batch| batch.iter().flat_map(|&i| self.entries[i].clone()).collect())
            .collect();
        let first_micro_batch = self.micro_batches;
        self.next = end;
        self.micro_batches += micro_batches.len() as u64;
        Window { first_micro_batch, micro_batches }
    }

    pub(super) fn epochs_done(&self) -> f64 {
        self.epoch as f64 + self.next as f64 / self.entries.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::entries;

    #[test]
    fn every_sample_comes_once_an_epoch_in_a_new_order() {
        let train = TrainConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            ..TrainConfig::default()
        };
        let mut windows = Windows::new(&train, &[3; 7], entries(&train, &[3; 7], 10));
        let mut epoch = || -> Vec<usize> {
            (0..2).flat_map(|_| windows.next_window().micro_batches).flatten().collect()
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..7).collect::<Vec<_>>());
        }
    }

    /// The same of packs and of batches of like length, whose tokens stay within the cutoff.
    #[test]
    fn packs_and_groups_come_once_an_epoch_too() {
        let lengths: Vec<usize> = (0..50).map(|i| 1 + (i * 37) % 30).collect();
        for (packing, group_by_length) in [(true, false), (false, true)] {
            let train = TrainConfig {
                per_device_train_batch_size: 3,
                gradient_accumulation_steps: 2,
                packing,
                group_by_length,
                ..TrainConfig::default()
            };
            let entries = entries(&train, &lengths, 64);
            let count = entries.len();
            let mut windows = Windows::new(&train, &lengths, entries);
            let mut orders = Vec::new();
            for _ in 0..2 {
                let epoch: Vec<Window> =
                    (0..count.div_ceil(6)).map(|_| windows.next_window()).collect();
                let batches: Vec<_> = epoch.into_iter().flat_map(|w| w.micro_batches).collect();
                for batch in &batches {
                    let tokens: usize = batch.iter().map(|&i| lengths[i]).sum();
                    assert!(!packing || tokens <= 3 * 64);
                }
                orders.push(batches.concat());
            }
            assert_eq!(windows.epochs_done(), 2.0);
            assert_ne!(orders[0], orders[1]);
            for order in &mut orders {
                order.sort_unstable();
                assert_eq!(*order, (0..50).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn steps_follow_epochs_unless_given() {
        let mut train = TrainConfig { num_train_epochs: 1.5, ..TrainConfig::default() };
        assert_eq!(total_steps(&train, 17), 5);
        train.max_steps = Some(3);
        assert_eq!(total_steps(&train, 17), 3);
    }
}
