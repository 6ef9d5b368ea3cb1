//! One adapter with its inputs, ready to run on every path.

use super::numbers;
use smore::adapter::{Smore, SmoreSaved};
use smore::config::{GateKind, SmoreConfig};
use smore::kernel::{GateNoise, Pass, hidden_states};
use smore::reference::{Output, Reference};
use smore::spec::SmoreSpec;
use smore::tree::ResidualTree;
use smore_engine::{Cpu, Float, View, ViewMut};

pub(crate) const D_IN: usize = 7;
pub(crate) const D_OUT: usize = 5;
/// More than the kernel keeps in one block.
pub(crate) const TOKENS: usize = 53;

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) smore: Smore,
    pub(crate) params: Vec<f64>,
    pub(crate) x: Vec<f64>,
    /// Slopes of the loss by the output.
    pub(crate) g: Vec<f64>,
    pub(crate) valid: Option<Vec<bool>>,
    pub(crate) noise: Option<GateNoise<f64>>,
}

pub(crate) fn cast<T: Float>(v: &[f64]) -> Vec<T> {
    v.iter().map(|&x| T::from_f64(x)).collect()
}

impl Case {
    /// Random parameters and tokens for `config`; noise in training with the noisy gate.
    pub(crate) fn new(config: &SmoreConfig, seed: u64, train: bool) -> Self {
        let spec = SmoreSpec::new(config, D_IN, D_OUT).unwrap();
        Self::of(spec, format!("{config:?}"), seed, train, TOKENS)
    }

    pub(crate) fn of(spec: SmoreSpec, name: String, seed: u64, train: bool, n: usize) -> Self {
        let smore = Smore::new(spec);
        let draw = |l: &smore::spec::LayerSpec| numbers(n * l.parents * l.experts, seed + 5);
        let noisy = train && smore.spec.gate.kind == GateKind::NoisyTopk;
        Self {
            name,
            params: numbers(smore.layout.len, seed),
            x: numbers(n * D_IN, seed + 2),
            g: numbers(n * D_OUT, seed + 3),
            valid: None,
            noise: noisy
                .then(|| GateNoise { layers: smore.spec.layers.iter().map(draw).collect() }),
            smore,
        }
    }

    /// The same with every fifth token out of the balance losses.
    pub(crate) fn masked(mut self) -> Self {
        self.valid = Some((0..self.tokens()).map(|t| t % 5 != 2).collect());
        self
    }

    pub(crate) fn tokens(&self) -> usize {
        self.x.len() / D_IN
    }

    /// Output and what was saved, in `T`.
    pub(crate) fn forward<T: Float>(
        &self,
        params: &[f64],
        x: &[f64],
    ) -> (Vec<T>, SmoreSaved<Cpu<T>>) {
        let (params, x) = (cast::<T>(params), cast::<T>(x));
        let noise = self
            .noise
            .as_ref()
            .map(|n| GateNoise { layers: n.layers.iter().map(|l| cast(l)).collect() });
        let mut y = vec![T::ZERO; x.len() / D_IN * D_OUT];
        let len = y.len();
        let saved = self.smore.forward_with(
            &Cpu::<T>::new(),
            self.valid.as_deref(),
            noise.as_ref(),
            None,
            View::new(&params, params.len()),
            View::new(&x, x.len()),
            ViewMut::new(&mut y, len),
        );
        (y, saved)
    }

    /// As [`Case::forward`], with the case's own numbers.
    pub(crate) fn run<T: Float>(&self) -> (Vec<T>, SmoreSaved<Cpu<T>>) {
        self.forward(&self.params, &self.x)
    }

    pub(crate) fn reference(&self) -> Output {
        let (spec, layout) = (&self.smore.spec, &self.smore.layout);
        let reference = Reference { spec, layout, params: &self.params };
        reference.forward(&self.x, self.valid.as_deref(), self.noise.as_ref())
    }

    /// Outputs of every layer on given trees; weights are computed anew.
    pub(crate) fn hidden_on(
        &self,
        params: &[f64],
        x: &[f64],
        tree: &ResidualTree<f64>,
    ) -> Vec<Vec<f64>> {
        let (spec, layout) = (&self.smore.spec, &self.smore.layout);
        let (_, mut saved) = self.forward::<f64>(params, x);
        saved.routing.tree = tree.clone();
        let (valid, noise) = (self.valid.as_deref(), self.noise.as_ref());
        hidden_states(
            &Pass { spec, layout, valid, noise, removed: None },
            &saved.routing,
            params,
            &saved.z,
        )
    }

    /// Gradients of sum(y g) + `balance` times the balance losses, by the parameters and by x.
    pub(crate) fn gradients(&self, balance: f64) -> (Vec<f64>, Vec<f64>) {
        let (_, mut saved) = self.run::<f64>();
        let mut grads = vec![0.0; self.params.len()];
        let mut dx = vec![0.0; self.x.len()];
        self.smore.backward_with(
            &Cpu::<f64>::new(),
            self.valid.as_deref(),
            self.noise.as_ref(),
            None,
            balance,
            View::new(&self.params, self.params.len()),
            &mut saved,
            View::new(&self.x, self.x.len()),
            View::new(&self.g, self.g.len()),
            ViewMut::new(&mut grads, self.params.len()),
            Some(ViewMut::new(&mut dx, self.x.len())),
        );
        (grads, dx)
    }

    /// Range and shape of a parameter, or `None` where the adapter has none of this name.
    pub(crate) fn find(&self, name: &str) -> Option<&smore::layout::Param> {
        self.smore.layout.params.iter().find(|p| p.name == name)
    }
}
