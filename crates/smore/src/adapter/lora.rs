//! LoRA (Hu et al. 2021): y += (alpha / r) B A x.

use super::dropout::Stack;
use super::{Adapter, Halved, MapAdapter, Mode};
use crate::init;
use crate::kernel::AdapterKernels;
use crate::layout::{LoraLayout, Param};
use crate::spec::LoraSpec;
use rand::Rng;
use smore_engine::{MatrixRef, View, ViewMut};

/// LoRA on one linear map.
pub struct Lora {
    /// Its validated description.
    pub spec: LoraSpec,
    /// Where its parameters lie.
    pub layout: LoraLayout,
}

impl Lora {
    /// An adapter for `spec`; it holds no values.
    pub fn new(spec: LoraSpec) -> Self {
        Self { layout: LoraLayout::new(&spec), spec }
    }

    fn stack(&self) -> Stack {
        let LoraSpec { d_in, rank, .. } = self.spec;
        Stack { d_in, rows: rank, down: rank }
    }
}

/// A x, `[n, r]`; of a token in decoding, times the scale.
pub struct LoraSaved<D: AdapterKernels> {
    down: D::Buf,
}

impl Adapter for Lora {
    fn params(&self) -> &[Param] {
        &self.layout.params
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        init::lora(&self.layout, rng)
    }
}

impl<D: AdapterKernels> MapAdapter<D> for Lora {
    type Saved = LoraSaved<D>;

    fn forward(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> LoraSaved<D> {
        let LoraSpec { d_in, d_out, rank, scale } = self.spec;
        let n = x.len / d_in;
        let b = params.at(self.layout.up..self.layout.len).mat(d_out, rank);
        let down =
            self.stack().project(device, mode.dropout, params.at(0..self.layout.up), None, x);
        let down_mat = View::new(&down, n * rank).mat(n, rank);
        device.gemm(scale, down_mat, b.t(), 1.0, y.mat(n, d_out));
        LoraSaved { down }
    }

    fn halved(&self, device: &D, w: MatrixRef<D>, params: View<D>) -> Option<Halved<D>> {
        let (LoraSpec { d_in, d_out, rank, .. }, up) = (self.spec, self.layout.up);
        Some(Halved {
            down: device.halved(w, params.at(0..up), rank, d_in)?,
            up: device.halved(w, params.at(up..self.layout.len), d_out, rank)?,
        })
    }

    fn forward_token(
        &self,
        device: &D,
        _params: View<D>,
        halved: &Halved<D>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> LoraSaved<D> {
        let rank = self.spec.rank;
        let mut down = device.unwritten(rank);
        let mut view = ViewMut::new(&mut down, rank);
        device.linear(x, MatrixRef::Frozen(&halved.down), None, view.rb(), 1, false);
        device.scale(self.spec.scale, view.rb());
        device.linear(view.view(), MatrixRef::Frozen(&halved.up), None, y, 1, true);
        LoraSaved { down }
    }

    fn backward(
        &self,
        device: &D,
        mode: Mode,
        _balance_scale: f64,
        params: View<D>,
        saved: &mut LoraSaved<D>,
        x: View<D>,
        dy: View<D>,
        mut grads: ViewMut<D>,
        dx: Option<ViewMut<D>>,
    ) {
        let LoraSpec { d_in, d_out, rank, scale } = self.spec;
        let n = x.len / d_in;
        let (up, len) = (self.layout.up, self.layout.len);
        let down = View::new(&saved.down, n * rank).mat(n, rank);
        let dy = dy.mat(n, d_out);
        device.gemm(scale, dy.t(), down, 1.0, grads.rb().at(up..len).mat(d_out, rank));
        let mut ddown = device.unwritten(n * rank);
        let b = params.at(up..len).mat(d_out, rank);
        device.gemm(scale, dy, b, 0.0, ViewMut::new(&mut ddown, n * rank).mat(n, rank));
        let (ddown, a) = (View::new(&ddown, n * rank), params.at(0..up));
        self.stack().backward(device, mode.dropout, 0, a, x, ddown, grads.at(0..up), dx);
    }
}
