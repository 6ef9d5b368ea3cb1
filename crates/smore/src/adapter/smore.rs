//! S'MoRE on one linear map: three products around the pass over tokens.
//!
//! ```text
//! z      = [A_0; ..; A_{L-1}; D] x + [a; bias]        one product, [n, stack_width]
//! hidden = tree_forward(z)                            [n, d_L]
//! y     += W_proj hidden + bias_proj
//! ```
//!
//! A single token, as in decoding, reads the rows of D and of the experts it chooses, not the whole
//! stack.

use super::dropout::{InputDropout, Stack};
use super::{Adapter, Halved, Map, MapAdapter, Mode, Noise};
use crate::config::GateKind;
use crate::init;
use crate::kernel::{AdapterKernels, GateNoise, Pass, Routing};
use crate::layout::{Param, SmoreLayout};
use crate::spec::SmoreSpec;
use rand::Rng;
use smore_engine::{Float, MatrixRef, Term, View, ViewMut};

/// S'MoRE on one linear map.
pub struct Smore {
    /// Its validated description.
    pub spec: SmoreSpec,
    /// Where its parameters lie.
    pub layout: SmoreLayout,
}

/// The stacked projection and the routing: the rest is computed again.
pub struct SmoreSaved<D: AdapterKernels> {
    /// `[n, stack_width]`; of a single token, 0 where an expert was not chosen.
    pub z: D::Buf,
    /// Trees, statistics and balance losses.
    pub routing: Routing<D::Elem>,
}

impl Smore {
    /// An adapter for `spec`; it holds no values.
    pub fn new(spec: SmoreSpec) -> Self {
        Self { layout: SmoreLayout::new(&spec), spec }
    }

    fn stack(&self) -> Stack {
        let (d_in, rows) = (self.spec.d_in, self.spec.stack_width());
        Stack { d_in, rows, down: rows - self.spec.gate.input_width }
    }

    /// Forward with the noise given instead of drawn; see [`MapAdapter::forward`].
    pub fn forward_with<D: AdapterKernels>(
        &self,
        device: &D,
        valid: Option<&[bool]>,
        noise: Option<&GateNoise<D::Elem>>,
        dropout: Option<InputDropout>,
        params: View<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> SmoreSaved<D> {
        let (spec, layout) = (&self.spec, &self.layout);
        let pass = Pass { spec, layout, valid, noise, removed: None };
        self.forward_pass(device, &pass, dropout, params, None, x, y)
    }

    fn forward_pass<D: AdapterKernels>(
        &self,
        device: &D,
        pass: &Pass<D::Elem>,
        dropout: Option<InputDropout>,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> SmoreSaved<D> {
        let (spec, layout) = (&self.spec, &self.layout);
        let (n, width, root) = (x.len / spec.d_in, spec.stack_width(), spec.root_width());
        let plain = map.is_none() && dropout.is_none() && pass.removed.is_none();
        if n == 1 && plain && !spec.bottom_up() {
            return self.token(device, pass, params, None, x, y);
        }
        let at = layout.stack_bias;
        let (stack, biases) = (params.at(0..at), params.at(at..at + width));
        let z = self.stack().project(device, dropout, stack, Some(biases), x);
        let mut hidden = device.unwritten(n * root);
        let embeddings = ViewMut::new(&mut hidden, n * root);
        let routed = device.tree_forward(pass, params, View::new(&z, n * width), embeddings);
        let bias = Some(params.at(layout.output_bias..layout.core));
        let own = Term { x: View::new(&hidden, n * root), w: self.output(params), bias };
        Map::add(map, device, own, x, y, n);
        SmoreSaved { z, routing: Routing::of(spec, &routed) }
    }

    /// A single token, of whose tree alone the experts are read.
    fn token<D: AdapterKernels>(
        &self,
        device: &D,
        pass: &Pass<D::Elem>,
        params: View<D>,
        halved: Option<&Halved<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> SmoreSaved<D> {
        let (spec, layout) = (&self.spec, &self.layout);
        let (width, root) = (spec.stack_width(), spec.root_width());
        let (mut z, mut hidden) = (device.unwritten(width), device.unwritten(root));
        let mut embedding = ViewMut::new(&mut hidden, root);
        let down = halved.map(|halved| &halved.down);
        let z_view = ViewMut::new(&mut z, width);
        let routed = device.token_forward(pass, params, down, x, z_view, embedding.rb());
        let out = halved.map_or_else(|| self.output(params), |h| MatrixRef::Frozen(&h.up));
        let bias = Some(params.at(layout.output_bias..layout.core));
        device.linear(embedding.view(), out, bias, y, 1, true);
        SmoreSaved { z, routing: Routing::of(spec, &[routed]) }
    }

    /// W_proj, `[d_out, d_L]`
    fn output<'a, D: AdapterKernels>(&self, params: View<'a, D>) -> MatrixRef<'a, D> {
        let at = self.layout.output_proj..self.layout.output_bias;
        MatrixRef::Trained(params.at(at), self.spec.d_out, self.spec.root_width())
    }

    /// Backward with the noise given instead of drawn; see [`MapAdapter::backward`].
    pub fn backward_with<D: AdapterKernels>(
        &self,
        device: &D,
        valid: Option<&[bool]>,
        noise: Option<&GateNoise<D::Elem>>,
        dropout: Option<InputDropout>,
        balance_scale: f64,
        params: View<D>,
        saved: &mut SmoreSaved<D>,
        x: View<D>,
        dy: View<D>,
        grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    ) {
        let (spec, layout) = (&self.spec, &self.layout);
        let pass = Pass { spec, layout, valid, noise, removed: None };
        self.backward_pass(
            device,
            &pass,
            dropout,
            balance_scale,
            params,
            None,
            saved,
            x,
            dy,
            grads,
            dx,
        );
    }

    fn backward_pass<D: AdapterKernels>(
        &self,
        device: &D,
        pass: &Pass<D::Elem>,
        dropout: Option<InputDropout>,
        balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut SmoreSaved<D>,
        x: View<D>,
        dy: View<D>,
        mut grads: ViewMut<D>,
        mut dx: Option<ViewMut<D>>,
    ) {
        assert!(pass.removed.is_none(), "removals are for measuring, not for training");
        let (spec, layout) = (&self.spec, &self.layout);
        let (n, width, root) = (x.len / spec.d_in, spec.stack_width(), spec.root_width());
        let (proj, stack_end) = (layout.output_proj, layout.stack_bias);
        // Slopes by the root's embedding, in the place of which the pass leaves the embedding.
        let mut hidden = device.unwritten(n * root);
        let mut hidden = ViewMut::new(&mut hidden, n * root);
        Map::slopes(map, device, self.output(params), dy, hidden.rb(), dx.as_mut(), n);
        let (routing, mut z) = (&saved.routing, ViewMut::new(&mut saved.z, n * width));
        device.tree_backward(pass, routing, balance_scale, params, z.rb(), grads.rb(), hidden.rb());
        device.linear_gradients(dy, hidden.view(), grads.rb().at(proj..layout.core), n);
        device.sum_rows(z.view(), grads.rb().at(stack_end..stack_end + width));
        let (stack, dstack) = (params.at(0..stack_end), grads.at(0..stack_end));
        self.stack().backward(device, dropout, stack, x, z.view(), dstack, dx);
    }

    fn pass<'a, T: Float>(
        &'a self,
        mode: Mode<'a>,
        noise: Option<&'a GateNoise<T>>,
    ) -> Pass<'a, T> {
        let removed = mode.removed.map(|r| r.what);
        Pass { spec: &self.spec, layout: &self.layout, valid: mode.valid, noise, removed }
    }

    fn noise<T: Float>(&self, mode: Mode, n: usize) -> Option<GateNoise<T>> {
        let noise = mode.noise.filter(|_| self.spec.gate.kind == GateKind::NoisyTopk)?;
        Some(match noise {
            Noise::Drawn(key) => GateNoise::draw(&self.spec, key, n),
            Noise::Given(maps) => maps[0].cast(),
        })
    }
}

impl Adapter for Smore {
    fn params(&self) -> &[Param] {
        &self.layout.params
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        init::smore(&self.spec, &self.layout, rng)
    }
}

impl<D: AdapterKernels> MapAdapter<D> for Smore {
    type Saved = SmoreSaved<D>;

    fn forward_on(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> SmoreSaved<D> {
        let noise = self.noise(mode, x.len / self.spec.d_in);
        let pass = self.pass(mode, noise.as_ref());
        self.forward_pass(device, &pass, mode.dropout, params, map, x, y)
    }

    fn halved(&self, device: &D, w: MatrixRef<D>, params: View<D>) -> Option<Halved<D>> {
        let (spec, layout) = (&self.spec, &self.layout);
        if spec.bottom_up() {
            return None;
        }
        let (ranks, root) = (spec.stacked_ranks(), spec.root_width());
        let out = params.at(layout.output_proj..layout.output_bias);
        Some(Halved {
            down: device.halved(w, params.at(0..ranks * spec.d_in), ranks, spec.d_in)?,
            up: device.halved(w, out, spec.d_out, root)?,
        })
    }

    fn forward_token(
        &self,
        device: &D,
        params: View<D>,
        halved: &Halved<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> SmoreSaved<D> {
        let (spec, layout) = (&self.spec, &self.layout);
        let pass = Pass { spec, layout, valid: None, noise: None, removed: None };
        self.token(device, &pass, params, Some(halved), x, y)
    }

    fn backward_on(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut SmoreSaved<D>,
        x: View<D>,
        dy: View<D>,
        grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    ) {
        let (noise, scale) = (self.noise(mode, x.len / self.spec.d_in), balance_scale);
        let (pass, drop) = (self.pass(mode, noise.as_ref()), mode.dropout);
        self.backward_pass(device, &pass, drop, scale, params, map, saved, x, dy, grads, dx);
    }
}
