//! HydraLoRA (Tian et al. 2024): one shared down factor, several up factors, all of them active.
//!
//! ```text
//! w  = softmax(R x)
//! y += (alpha / r) sum_i w_i B_i A x
//! ```
//!
//! A and R are one matrix, so that both projections are one product `z [n, r + N]`.

use super::dropout::Stack;
use super::{Adapter, Map, MapAdapter, Mode};
use crate::config::GateKind;
use crate::init;
use crate::kernel::{AdapterKernels, Routing};
use crate::layout::{HydraLoraLayout, Param};
use crate::router::{Gate, flat};
use crate::spec::HydraLoraSpec;
use rand::Rng;
use smore_engine::{Device, Float, View, ViewMut};

/// HydraLoRA on one linear map.
pub struct HydraLora {
    /// Its validated description.
    pub spec: HydraLoraSpec,
    /// Where its parameters lie.
    pub layout: HydraLoraLayout,
}

/// A x, the logits and the gate weights.
pub struct HydraLoraSaved<D: Device> {
    /// A x, then R x: `[n, r + N]`
    z: D::Buf,
    /// `[N, n]`
    weights: D::Buf,
    /// All heads with their weights, for every token; without a balance loss.
    pub routing: Routing<D::Elem>,
}

impl HydraLora {
    /// An adapter for `spec`; it holds no values.
    pub fn new(spec: HydraLoraSpec) -> Self {
        Self { layout: HydraLoraLayout::new(&spec), spec }
    }

    fn stack(&self) -> Stack {
        let HydraLoraSpec { d_in, rank, .. } = self.spec;
        Stack { d_in, rows: self.spec.stack_width(), down: rank }
    }

    fn gate(&self) -> Gate {
        Gate::new(GateKind::Dense, self.spec.heads, self.spec.heads)
    }

    /// R x on the host, `[n, N]`.
    fn logits<D: Device>(&self, device: &D, z: View<D>) -> Vec<D::Elem> {
        let HydraLoraSpec { rank, heads, .. } = self.spec;
        flat::columns(&device.download(z), rank + heads, rank, heads)
    }
}

/// w_i A x in the first r columns of `[n, r + N]`.
fn weighted<D: Device>(device: &D, z: View<D>, weights: View<D>) -> D::Buf {
    let mut weighted = device.copy(z);
    device.scale_rows(weights, ViewMut::new(&mut weighted, z.len));
    weighted
}

/// The transpose of a matrix of `cols` columns.
fn transposed<T: Float>(values: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|j| values.iter().skip(j).step_by(cols)).copied().collect()
}

impl Adapter for HydraLora {
    fn params(&self) -> &[Param] {
        &self.layout.params
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        init::hydra_lora(&self.layout, rng)
    }
}

impl<D: AdapterKernels> MapAdapter<D> for HydraLora {
    type Saved = HydraLoraSaved<D>;

    fn forward_on(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        mut y: ViewMut<D>,
    ) -> HydraLoraSaved<D> {
        let HydraLoraSpec { d_in, d_out, heads, rank, scale } = self.spec;
        let (n, width) = (x.len / d_in, self.spec.stack_width());
        if let Some(Map { w, bias, accumulate }) = map {
            device.linear(x, w, bias, y.rb(), n, accumulate);
        }
        let z = self.stack().project(device, mode.dropout, params.at(0..self.layout.up), None, x);
        let z_view = View::new(&z, n * width);
        let mut routing = flat::route(self.gate(), 0.0, &self.logits(device, z_view), mode.valid);
        if let Some(removed) = mode.removed {
            routing.tree.remove(removed.what);
        }
        let weights = device.upload(&transposed(&routing.tree.layers[0].gate_weight, heads));
        for i in 0..heads {
            let weights = View::new(&weights, heads * n).at(i * n..(i + 1) * n);
            let weighted = weighted(device, z_view, weights);
            let weighted = View::new(&weighted, n * width).mat_strided(n, rank, width);
            let b = params.at(self.layout.head(&self.spec, i)).mat(d_out, rank);
            device.gemm(scale, weighted, b.t(), 1.0, y.rb().mat(n, d_out));
        }
        HydraLoraSaved { z, weights, routing }
    }

    fn backward_on(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut HydraLoraSaved<D>,
        x: View<D>,
        dy: View<D>,
        mut grads: ViewMut<D>,
        mut dx: Option<ViewMut<D>>,
    ) {
        let HydraLoraSpec { d_in, d_out, heads, rank, scale } = self.spec;
        let (n, width) = (x.len / d_in, self.spec.stack_width());
        if let Some((Map { w, accumulate, .. }, dx)) = map.zip(dx.as_mut()) {
            device.linear_backward(dy, w, dx.rb(), n, accumulate);
        }
        let (z, dy) = (View::new(&saved.z, n * width), dy.mat(n, d_out));
        let (mut dz, mut dweights) = (device.zeros(n * width), device.zeros(heads * n));
        // Slopes of one head's w_i A x; the columns of the logits stay 0.
        let mut dhead = device.zeros(n * width);
        for i in 0..heads {
            let (run, head) = (i * n..(i + 1) * n, self.layout.head(&self.spec, i));
            let weights = View::new(&saved.weights, heads * n).at(run.clone());
            let weighted = weighted(device, z, weights);
            let weighted = View::new(&weighted, n * width).mat_strided(n, rank, width);
            let db = grads.rb().at(head.clone()).mat(d_out, rank);
            device.gemm(scale, dy.t(), weighted, 1.0, db);
            let b = params.at(head).mat(d_out, rank);
            let target = ViewMut::new(&mut dhead, n * width).mat_strided(n, rank, width);
            device.gemm(scale, dy, b, 0.0, target);
            let dots = ViewMut::new(&mut dweights, heads * n).at(run);
            device.row_dots(View::new(&dhead, n * width), z, dots);
            device.scale_rows(weights, ViewMut::new(&mut dhead, n * width));
            device.add(View::new(&dhead, n * width), ViewMut::new(&mut dz, n * width));
        }
        let dweights = transposed(&device.download(View::new(&dweights, heads * n)), n);
        let logits = self.logits(device, z);
        let routing = &saved.routing;
        let dlogits = flat::route_backward(
            self.gate(),
            balance_scale,
            &logits,
            mode.valid,
            routing,
            &dweights,
        );
        let dlogits = device.upload(&flat::among_zeros(&dlogits, width, rank, heads));
        device.add(View::new(&dlogits, n * width), ViewMut::new(&mut dz, n * width));
        let (dz, stack) = (View::new(&dz, n * width), 0..self.layout.up);
        let (map, dmap) = (params.at(stack.clone()), grads.at(stack));
        self.stack().backward(device, mode.dropout, map, x, dz, dmap, dx);
    }
}
