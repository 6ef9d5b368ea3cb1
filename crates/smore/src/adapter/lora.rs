//! LoRA (Hu et al. 2021): y += (alpha / r) B A x.

use super::dropout::Stack;
use super::{Adapter, Halved, Map, MapAdapter, Mode};
use crate::init;
use crate::kernel::AdapterKernels;
use crate::layout::{LoraLayout, Param};
use crate::spec::LoraSpec;
use rand::Rng;
use smore_engine::{Device, MatrixRef, Term, View, ViewMut};

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

    /// B
    fn up<'a, D: Device>(&self, params: View<'a, D>) -> MatrixRef<'a, D> {
        let LoraSpec { d_out, rank, .. } = self.spec;
        MatrixRef::Trained(params.at(self.layout.up..self.layout.len), d_out, rank)
    }
}

/// (alpha / r) A x, `[n, r]`
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

    fn forward_on(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        map: Option<Map<D>>,
        x: View<D>,
        y: ViewMut<D>,
    ) -> LoraSaved<D> {
        let LoraSpec { d_in, rank, scale, .. } = self.spec;
        let n = x.len / d_in;
        let a = params.at(0..self.layout.up);
        let mut down = self.stack().project(device, mode.dropout, a, None, x);
        device.scale(scale, ViewMut::new(&mut down, n * rank));
        let own = Term { x: View::new(&down, n * rank), w: self.up(params), bias: None };
        Map::add(map, device, own, x, y, n);
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

    fn backward_on(
        &self,
        device: &D,
        mode: Mode,
        _balance_scale: f64,
        params: View<D>,
        map: Option<Map<D>>,
        saved: &mut LoraSaved<D>,
        x: View<D>,
        dy: View<D>,
        mut grads: ViewMut<D>,
        mut dx: Option<ViewMut<D>>,
    ) {
        let LoraSpec { d_in, d_out, rank, scale } = self.spec;
        let (n, up, len) = (x.len / d_in, self.layout.up, self.layout.len);
        let mut ddown = device.unwritten(n * rank);
        let mut slopes = ViewMut::new(&mut ddown, n * rank);
        Map::slopes(map, device, self.up(params), dy, slopes.rb(), dx.as_mut(), n);
        device.scale(scale, slopes.rb());
        let (down, dup) = (View::new(&saved.down, n * rank), grads.rb().at(up..len));
        let dup = dup.mat(d_out, rank);
        device.gemm(1.0, dy.mat(n, d_out).t(), down.mat(n, rank), 1.0, dup);
        let (a, da) = (params.at(0..up), grads.at(0..up));
        self.stack().backward(device, mode.dropout, a, x, slopes.view(), da, dx);
    }
}
