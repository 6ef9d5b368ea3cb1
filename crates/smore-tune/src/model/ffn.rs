//! A block's FFN: down(act(gate(x)) * up(x)), forward and backward.

use super::block::{BlockSaved, Normed};
use super::spec::{Norm, Proj};
use super::{Model, Scales};
use smore::adapter::{AnySaved, Mode};
use smore::kernel::AdapterKernels;
use smore_engine::ViewMut;

/// What the FFN's backward pass needs.
pub(super) struct Ffn<D: AdapterKernels> {
    /// Inverse roots of the norm before it `[n]`.
    inv: D::Buf,
    /// `[n, intermediate]`
    gate: D::Buf,
    up: D::Buf,
    /// Of the norm behind it.
    behind: Option<Normed<D>>,
    /// What the adapters on gate, up and down saved.
    pub(super) adapters: [Option<AnySaved<D>>; 3],
}

impl<D: AdapterKernels> Model<D> {
    /// The FFN onto the skip connection.
    pub(super) fn ffn(&self, b: usize, x: &mut D::Buf, mode: Mode) -> Ffn<D> {
        let width = self.device.len(x) / self.spec.hidden * self.spec.intermediate;
        let (normed, inv) = self.normed(b, Norm::Ffn, x);
        let h = self.view(&normed);
        let (mut gate, mut up) = (self.device.zeros(width), self.device.zeros(width));
        let ag = self.apply(b, Proj::Gate, h, self.view_mut(&mut gate), mode, false);
        let au = self.apply(b, Proj::Up, h, self.view_mut(&mut up), mode, false);
        let mut inner = self.device.zeros(width);
        let (act, target) = (self.spec.activation, self.view_mut(&mut inner));
        self.device.gated(act, self.view(&gate), self.view(&up), target);
        let (ad, behind) = self.join(b, Norm::PostFfn, x, |y| {
            self.apply(b, Proj::Down, self.view(&inner), y, mode, true)
        });
        Ffn { inv, gate, up, behind, adapters: [ag, au, ad] }
    }

    /// The backward pass of [`Model::ffn`], in place on `dx`; where `through` is false only
    /// parameters get gradients.
    pub(super) fn ffn_backward(
        &self,
        b: usize,
        saved: &BlockSaved<D>,
        dx: &mut D::Buf,
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
        through: bool,
    ) {
        let BlockSaved { middle, ffn, .. } = saved;
        let (act, width) = (self.spec.activation, self.device.len(&ffn.gate));
        let (gate, up) = (self.view(&ffn.gate), self.view(&ffn.up));
        let [ag, au, ad] = &ffn.adapters;
        let mut inner = self.device.zeros(width);
        self.device.gated(act, gate, up, self.view_mut(&mut inner));
        let mut dinner = self.device.zeros(width);
        let dpart = self.join_backward(b, Norm::PostFfn, ffn.behind.as_ref(), dx, grads);
        self.apply_backward(
            b,
            Proj::Down,
            self.view(&inner),
            self.view(dpart.as_ref().unwrap_or(dx)),
            Some(ViewMut::new(&mut dinner, width)),
            ad.as_ref(),
            mode,
            scales,
            grads,
        );
        drop((inner, dpart));
        let (mut dgate, mut dup) = (self.device.zeros(width), self.device.zeros(width));
        let dinner = self.view(&dinner);
        let (target, other) = (self.view_mut(&mut dgate), ViewMut::new(&mut dup, width));
        self.device.gated_backward(act, gate, up, dinner, target, other);
        let (normed, _) = self.normed(b, Norm::Ffn, middle);
        let mut dnormed = self.device.zeros(self.device.len(dx));
        for (proj, dy, saved) in [(Proj::Gate, &dgate, ag), (Proj::Up, &dup, au)] {
            let target = through.then(|| self.view_mut(&mut dnormed));
            let (x, dy) = (self.view(&normed), self.view(dy));
            self.apply_backward(b, proj, x, dy, target, saved.as_ref(), mode, scales, grads);
        }
        if through {
            let (x, dy) = (self.view(middle), self.view(&dnormed));
            self.norm_backward(b, Norm::Ffn, x, &ffn.inv, dy, self.view_mut(dx), grads);
        }
    }
}
