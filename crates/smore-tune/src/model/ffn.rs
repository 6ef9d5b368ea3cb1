//! A block's FFN: down(act(gate(x)) * up(x)), forward and backward.

use super::block::{BlockSaved, Normed};
use super::spec::{Norm, Proj};
use super::{Model, Scales};
use smore::adapter::{AnySaved, FfnInput, FfnSlopes, MixLoraSaved, Mode};
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
    /// What the adapter in the FFN as a whole saved.
    pub(super) mix: Option<MixLoraSaved<D>>,
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
        let ((ad, mix), behind) = self.join(b, Norm::PostFfn, x, |mut y| {
            let input = FfnInput { x: h, gate: self.view(&gate), up: self.view(&up) };
            let target = self.view_mut(&mut inner);
            let mix = if let Some((slot, mix)) = self.adapters.in_ffn(b) {
                let params = self.params_view().at(slot.range.clone());
                Some(mix.forward(&self.device, slot.mode(mode), params, input, target, y.rb()))
            } else {
                self.device.gated(self.spec.activation, input.gate, input.up, target);
                None
            };
            (self.apply(b, Proj::Down, self.view(&inner), y, mode, true), mix)
        });
        Ffn { inv, gate, up, behind, adapters: [ag, au, ad], mix }
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
        if ffn.mix.is_none() {
            // Experts mix their own; the base's map is frozen then and asks only for slopes.
            self.device.gated(act, gate, up, self.view_mut(&mut inner));
        }
        let mut dinner = self.device.zeros(width);
        let dpart = self.join_backward(b, Norm::PostFfn, ffn.behind.as_ref(), dx, grads);
        let dy = self.view(dpart.as_ref().unwrap_or(dx));
        self.apply_backward(
            b,
            Proj::Down,
            self.view(&inner),
            dy,
            Some(ViewMut::new(&mut dinner, width)),
            ad.as_ref(),
            mode,
            scales,
            grads,
        );
        drop(inner);
        let (mut dgate, mut dup) = (self.device.zeros(width), self.device.zeros(width));
        let dinner = self.view(&dinner);
        let (normed, _) = self.normed(b, Norm::Ffn, middle);
        let mut dnormed = self.device.zeros(self.device.len(dx));
        let (dgate_view, dup_view) = (self.view_mut(&mut dgate), ViewMut::new(&mut dup, width));
        if let (Some((slot, mix)), Some(saved)) = (self.adapters.in_ffn(b), &ffn.mix) {
            let params = self.params_view().at(slot.range.clone());
            let grads = self.view_mut(grads).at(slot.range.clone());
            let input = FfnInput { x: self.view(&normed), gate, up };
            let x = self.view_mut(&mut dnormed);
            let slopes = through.then_some(FfnSlopes { x, gate: dgate_view, up: dup_view });
            let scale = scales.balance;
            mix.backward(
                &self.device,
                slot.mode(mode),
                scale,
                params,
                saved,
                input,
                dy,
                dinner,
                grads,
                slopes,
            );
        } else {
            self.device.gated_backward(act, gate, up, dinner, dgate_view, dup_view);
        }
        drop(dpart);
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
