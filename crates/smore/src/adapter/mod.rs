//! Adapters: on one linear map behind one trait, and MixLoRA inside an FFN.

mod dropout;
mod hydra_lora;
mod lora;
mod mix_lora;
mod smore;

pub use dropout::InputDropout;
pub use hydra_lora::{HydraLora, HydraLoraSaved};
pub use lora::{Lora, LoraSaved};
pub use mix_lora::{FfnInput, FfnSlopes, MixLora, MixLoraSaved};
pub use smore::{Smore, SmoreSaved};

use crate::kernel::{AdapterKernels, GateNoise, Routing};
use crate::layout::Param;
use crate::tree::Removal;
use rand::Rng;
use smore_engine::{Device, MatrixRef, Slopes, Term, View, ViewMut};

/// An adapter's matrices in 16 bits.
pub struct Halved<D: Device> {
    /// Down factors, `[ranks, d_in]`
    down: D::Weight,
    /// What gives the output, `[d_out, width]`
    up: D::Weight,
}

/// The linear map that an adapter is on.
pub struct Map<'a, D: Device> {
    /// W `[d_out, d_in]`
    pub w: MatrixRef<'a, D>,
    /// `[d_out]`
    pub bias: Option<View<'a, D>>,
    /// Whether its result, or the slopes by its input, are added to what is there.
    pub accumulate: bool,
}

impl<D: Device> Map<'_, D> {
    /// y = W x + bias + the adapter's last map; that alone is added to y where there is no map.
    fn add(map: Option<Self>, device: &D, own: Term<D>, x: View<D>, y: ViewMut<D>, n: usize) {
        match map {
            Some(Map { w, bias, accumulate }) => {
                device.linear_sum([Term { x, w, bias }, own], y, n, accumulate);
            }
            None => device.linear(own.x, own.w, own.bias, y, n, true),
        }
    }

    /// The slopes `to` by the input of the adapter's last map `own`, and where there are a map and `dx`, those by
    /// the map's input.
    fn slopes(
        map: Option<Self>,
        device: &D,
        own: MatrixRef<D>,
        dy: View<D>,
        to: ViewMut<D>,
        dx: Option<&mut ViewMut<D>>,
        n: usize,
    ) {
        let Some((Map { w, accumulate, .. }, dx)) = map.zip(dx) else {
            return device.linear_backward(dy, own, to, n, false);
        };
        let map = Slopes { w, dx: dx.rb(), accumulate };
        let own = Slopes { w: own, dx: to, accumulate: false };
        device.linear_backward_both(dy, [map, own], n);
    }
}

/// What a pass is for.
#[derive(Clone, Copy)]
pub struct Mode<'a> {
    /// Tokens that count in balance losses, `[n]`; all where absent.
    pub valid: Option<&'a [bool]>,
    /// Noise of noisy gates, where the pass is a training step.
    pub noise: Option<Noise<'a>>,
    /// Dropout on the adapter's input, in a training step.
    pub dropout: Option<InputDropout>,
    /// What is taken out of one adapter's trees, to see what it does. No training step has it.
    pub removed: Option<Removed<'a>>,
    /// Whether tokens come one by one, so that [`MapAdapter::halved`] pays.
    pub decoding: bool,
}

/// A removal at one of a model's adapters.
#[derive(Clone, Copy, Debug)]
pub struct Removed<'a> {
    /// Number of the adapted linear map, as in [`NoiseKey`].
    pub place: u64,
    /// What goes.
    pub what: &'a Removal,
}

impl Mode<'_> {
    /// A pass that is no training step, over tokens that all count.
    pub fn plain() -> Self {
        Self { valid: None, noise: None, dropout: None, removed: None, decoding: false }
    }
}

/// Where the noise of a noisy gate comes from.
#[derive(Clone, Copy, Debug)]
pub enum Noise<'a> {
    /// Drawn from N(0, 1), the same for the same key.
    Drawn(NoiseKey),
    /// Recorded elsewhere, for this linear map and those after it: the first is this one's.
    Given(&'a [GateNoise<f64>]),
}

/// Names a stream of random numbers; see [`crate::rng::stream`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    /// The run's seed.
    pub seed: u64,
    /// Counts micro-batches over the whole run.
    pub step: u64,
    /// Number of the adapted linear map.
    pub place: u64,
}

/// The trained parameters of an adapter: their names, places and starting values.
pub trait Adapter {
    /// All parameters, in the order in which they lie.
    fn params(&self) -> &[Param];

    /// Number of elements of all parameters.
    fn len(&self) -> usize {
        self.params().last().map_or(0, |p| p.range().end)
    }

    /// True where there is nothing to train.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Starting values.
    fn init(&self, rng: &mut impl Rng) -> Vec<f32>;
}

/// An adapter on one linear map `[d_out, d_in]`: adds its output to the map's.
pub trait MapAdapter<D: AdapterKernels>: Adapter {
    /// What backward needs from forward.
    type Saved;

    /// y += adapter(x).
    ///
    /// # Shapes
    /// x `[n, d_in]`, y `[n, d_out]`
    fn forward(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> Self::Saved {
        self.forward_on(device, mode, params, None, x, y)
    }

    /// y = W x + bias + adapter(x), + y where the map accumulates: both in one go where the device can. As
    /// [`MapAdapter::forward`] without a map.
    fn forward_on(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> Self::Saved;

    /// The adapter's matrices as a token in decoding reads them where `w`, the map itself, is stored in 16
    /// bits: reading is what takes the time there. `None` where it reads its parameters.
    fn halved(&self, _device: &D, _w: MatrixRef<D>, _params: View<D>) -> Option<Halved<D>> {
        None
    }

    /// [`MapAdapter::forward`] of a single token, with what [`MapAdapter::halved`] gave. What chooses
    /// experts is read in full.
    fn forward_token(
        &self,
        device: &D,
        params: View<D>,
        _halved: &Halved<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> Self::Saved {
        self.forward(device, Mode::plain(), params, x, y)
    }

    /// Adds parameter gradients to `grads` and, where wanted, the input's to `dx`. The balance
    /// loss enters times `balance_scale`. Of `saved` only the routing is left: slopes may take the
    /// place of the rest.
    ///
    /// # Shapes
    /// as in [`MapAdapter::forward`], dy like y, dx like x
    fn backward(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        saved: &mut Self::Saved,
        x: View<D>,
        dy: View<D>,
        grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    ) {
        self.backward_on(device, mode, balance_scale, params, None, saved, x, dy, grads, dx);
    }

    /// The backward pass of [`MapAdapter::forward_on`]: as [`MapAdapter::backward`], and `dx` is what both give, + dx
    /// where the map accumulates.
    fn backward_on(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut Self::Saved,
        x: View<D>,
        dy: View<D>,
        grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    );
}

/// Any adapter on one linear map that this crate knows.
pub enum AnyAdapter {
    /// S'MoRE
    Smore(Smore),
    /// LoRA
    Lora(Lora),
    /// HydraLoRA
    HydraLora(HydraLora),
}

/// What [`AnyAdapter`] saves.
pub enum AnySaved<D: AdapterKernels> {
    /// Of S'MoRE
    Smore(SmoreSaved<D>),
    /// Of LoRA
    Lora(LoraSaved<D>),
    /// Of HydraLoRA
    HydraLora(HydraLoraSaved<D>),
}

impl<D: AdapterKernels> AnySaved<D> {
    /// The trees of a routed adapter.
    pub fn routing(&self) -> Option<&Routing<D::Elem>> {
        match self {
            Self::Smore(saved) => Some(&saved.routing),
            Self::Lora(_) => None,
            Self::HydraLora(saved) => Some(&saved.routing),
        }
    }

    /// As [`AnySaved::routing`], by value.
    pub fn into_routing(self) -> Option<Routing<D::Elem>> {
        match self {
            Self::Smore(saved) => Some(saved.routing),
            Self::Lora(_) => None,
            Self::HydraLora(saved) => Some(saved.routing),
        }
    }
}

impl Adapter for AnyAdapter {
    fn params(&self) -> &[Param] {
        match self {
            Self::Smore(a) => a.params(),
            Self::Lora(a) => a.params(),
            Self::HydraLora(a) => a.params(),
        }
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        match self {
            Self::Smore(a) => a.init(rng),
            Self::Lora(a) => a.init(rng),
            Self::HydraLora(a) => a.init(rng),
        }
    }
}

impl<D: AdapterKernels> MapAdapter<D> for AnyAdapter {
    type Saved = AnySaved<D>;

    fn forward_on(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> AnySaved<D> {
        match self {
            Self::Smore(a) => AnySaved::Smore(a.forward_on(device, mode, params, map, x, y)),
            Self::Lora(a) => AnySaved::Lora(a.forward_on(device, mode, params, map, x, y)),
            Self::HydraLora(a) => {
                AnySaved::HydraLora(a.forward_on(device, mode, params, map, x, y))
            }
        }
    }

    fn halved(&self, device: &D, w: MatrixRef<D>, params: View<D>) -> Option<Halved<D>> {
        match self {
            Self::Smore(a) => a.halved(device, w, params),
            Self::Lora(a) => a.halved(device, w, params),
            Self::HydraLora(a) => a.halved(device, w, params),
        }
    }

    fn forward_token(
        &self,
        device: &D,
        params: View<D>,
        halved: &Halved<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> AnySaved<D> {
        match self {
            Self::Smore(a) => AnySaved::Smore(a.forward_token(device, params, halved, x, y)),
            Self::Lora(a) => AnySaved::Lora(a.forward_token(device, params, halved, x, y)),
            Self::HydraLora(a) => {
                AnySaved::HydraLora(a.forward_token(device, params, halved, x, y))
            }
        }
    }

    fn backward_on(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut AnySaved<D>,
        x: View<D>,
        dy: View<D>,
        grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    ) {
        match (self, saved) {
            (Self::Smore(a), AnySaved::Smore(s)) => {
                a.backward_on(device, mode, balance_scale, params, map, s, x, dy, grads, dx);
            }
            (Self::Lora(a), AnySaved::Lora(s)) => {
                a.backward_on(device, mode, balance_scale, params, map, s, x, dy, grads, dx);
            }
            (Self::HydraLora(a), AnySaved::HydraLora(s)) => {
                a.backward_on(device, mode, balance_scale, params, map, s, x, dy, grads, dx);
            }
            _ => unreachable!("an adapter meets what another kind saved"),
        }
    }
}

/// Any adapter that a transformer block can hold, by where it acts.
pub enum BlockAdapter {
    /// On one linear map.
    Map(AnyAdapter),
    /// Inside the FFN, around its gated activation.
    Ffn(MixLora),
}

impl Adapter for BlockAdapter {
    fn params(&self) -> &[Param] {
        match self {
            Self::Map(a) => a.params(),
            Self::Ffn(a) => a.params(),
        }
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        match self {
            Self::Map(a) => a.init(rng),
            Self::Ffn(a) => a.init(rng),
        }
    }
}

impl<T: smore_engine::Float> GateNoise<T> {
    /// Noise for `n` tokens, the same for the same key.
    pub fn draw(spec: &crate::spec::SmoreSpec, key: NoiseKey, n: usize) -> Self {
        use rand_distr::{Distribution, StandardNormal};
        let mut rng =
            crate::rng::stream(key.seed, crate::rng::Purpose::GateNoise, key.step, key.place);
        let mut layer =
            |len: usize| (0..len).map(|_| T::from_f64(StandardNormal.sample(&mut rng))).collect();
        Self { layers: spec.layers.iter().map(|l| layer(n * l.parents * l.experts)).collect() }
    }

    /// The same numbers in another precision.
    fn cast<U: smore_engine::Float>(&self) -> GateNoise<U> {
        let cast = |layer: &Vec<T>| layer.iter().map(|x| U::from_f64(x.to_f64())).collect();
        GateNoise { layers: self.layers.iter().map(cast).collect() }
    }
}
