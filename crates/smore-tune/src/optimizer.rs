//! AdamW with clipping, as training and replayed trajectories use it.

use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::learning_rates::Rates;
use crate::model::Model;
use smore_engine::{AdamW, Cpu, Device, View, ViewMut};

/// Gradients and moments, laid out like the parameters.
pub struct Optimizer {
    /// What the next step follows.
    pub grads: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    rates: Rates,
}

impl Optimizer {
    /// No gradient yet, no past.
    pub fn new(model: &Model<Cpu<f32>>) -> Self {
        Self::with_rates(model, vec![(0..model.trained(), 1.0)])
    }

    /// As [`Optimizer::new`], with a factor on the learning rate of some parameters.
    pub(crate) fn with_rates(model: &Model<Cpu<f32>>, rates: Rates) -> Self {
        let zeros = || vec![0.0; model.trained()];
        Self { grads: zeros(), m: zeros(), v: zeros(), rates }
    }

    /// The gradient's norm.
    pub(crate) fn norm(&self, model: &Model<Cpu<f32>>) -> f64 {
        model.device.sum_squares(View::new(&self.grads, model.trained())).sqrt()
    }

    /// First and second moments.
    pub(crate) fn moments(&self) -> [&[f32]; 2] {
        [&self.m, &self.v]
    }

    /// Takes moments that were kept, as long as the parameters.
    pub(crate) fn restore(&mut self, [m, v]: [Vec<f32>; 2]) {
        assert_eq!((m.len(), v.len()), (self.m.len(), self.v.len()), "moments");
        (self.m, self.v) = (m, v);
    }

    /// Clips, steps and clears the gradients; returns their norm before clipping. Steps count
    /// from 1.
    ///
    /// # Errors
    /// If the norm is not a number.
    pub fn step(
        &mut self,
        model: &mut Model<Cpu<f32>>,
        train: &TrainConfig,
        learning_rate: f64,
        step: usize,
    ) -> Result<f64> {
        let (n, device) = (model.trained(), model.device);
        let norm = self.norm(model);
        if !norm.is_finite() {
            return Err(Error::Run(format!(
                "the gradient's norm is {norm} at step {step}; lower train.learning_rate"
            )));
        }
        // PyTorch's clip_grad_norm_, the 1e-6 included.
        let factor = train.max_grad_norm / (norm + 1e-6);
        if train.max_grad_norm > 0.0 && factor < 1.0 {
            device.scale(factor, ViewMut::new(&mut self.grads, n));
        }
        for (run, factor) in &self.rates {
            let settings = AdamW {
                learning_rate: learning_rate * factor,
                beta1: train.adam_beta1,
                beta2: train.adam_beta2,
                epsilon: train.adam_epsilon,
                weight_decay: train.weight_decay,
                step: step as u64,
            };
            device.adamw(
                &settings,
                ViewMut::new(model.params_mut(), n).at(run.clone()),
                View::new(&self.grads, n).at(run.clone()),
                ViewMut::new(&mut self.m, n).at(run.clone()),
                ViewMut::new(&mut self.v, n).at(run.clone()),
            );
        }
        device.clear(ViewMut::new(&mut self.grads, n));
        Ok(norm)
    }
}
