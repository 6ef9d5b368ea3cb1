//! A block's FFN: down(act(gate(x)) * up(x)), forward and backward.

use super::block::{Normed, routing_of};
use super::spec::{Norm, Proj};
use super::{Model, Scales};
use smore::adapter::{AnySaved, FfnInput, FfnSlopes, MixLoraSaved, Mode};
use smore::kernel::{AdapterKernels, Routing};
use smore_engine::Device;

/// What the FFN's backward pass needs, its large buffers as `B`.
pub(super) struct Ffn<D: AdapterKernels, B = <D as Device>::Buf> {
    /// Inverse roots of the norm before it `[n]`.
    inv: D::Buf,
    /// `[n, intermediate]`
    gate: B,
    up: B,
    /// Of the norm behind it.
    behind: Option<Normed<D, B>>,
    /// What the adapters on gate, up and down saved.
    pub(super) adapters: [Option<AnySaved<D>>; 3],
    /// What the adapter in the FFN as a whole saved.
    pub(super) mix: Option<MixLoraSaved<D>>,
}

impl<D: AdapterKernels, B> Ffn<D, B> {
    pub(super) fn map<C>(self, mut f: impl FnMut(B) -> C) -> Ffn<D, C> {
        let Self { inv, gate, up, behind, adapters, mix } = self;
        let behind = behind.map(|n| n.map(&mut f));
        Ffn { inv, gate: f(gate), up: f(up), behind, adapters, mix }
    }

    /// Routing of the adapters, in the order of their slots.
    pub(super) fn into_routing(self) -> Vec<Option<Routing<D::Elem>>> {
        routing_of(self.adapters, self.mix)
    }
}

impl<D: AdapterKernels> Model<D> {
    /// The FFN onto the skip connection.
    pub(super) fn ffn(&self, b: usize, x: &mut D::Buf, mode: Mode) -> Ffn<D> {
        let width = self.device.len(x) / self.spec.hidden * self.spec.intermediate;
        let (normed, inv) = self.normed(b, Norm::Ffn, x);
        let h = self.view(&normed);
        let (mut gate, mut up) = (self.device.unwritten(width), self.device.unwritten(width));
        let ag = self.apply(b, Proj::Gate, h, self.view_mut(&mut gate), mode, false);
        let au = self.apply(b, Proj::Up, h, self.view_mut(&mut up), mode, false);
        let ((ad, mix), behind) = self.join(b, Norm::PostFfn, x, |mut y| {
            let (gate, up) = (self.view(&gate), self.view(&up));
            let (inner, mix) = if let Some((slot, mix)) = self.adapters.in_ffn(b) {
                let mut inner = self.device.zeros(width);
                let params = self.params_view().at(slot.range.clone());
                let (mode, input) = (slot.mode(mode), FfnInput { x: h, gate, up });
                let target = self.view_mut(&mut inner);
                let saved = mix.forward(&self.device, mode, params, input, target, y.rb());
                (inner, Some(saved))
            } else {
                let mut inner = self.device.unwritten(width);
                self.device.gated(self.spec.activation, gate, up, self.view_mut(&mut inner));
                (inner, None)
            };
            (self.apply(b, Proj::Down, self.view(&inner), y, mode, true), mix)
        });
        Ffn { inv, gate, up, behind, adapters: [ag, au, ad], mix }
    }

    /// The backward pass of [`Model::ffn`], in place on `dx`; where `through` is false only
    /// parameters get gradients. Returns the adapters' routing.
    pub(super) fn ffn_backward(
        &self,
        b: usize,
        middle: D::Kept,
        saved: Ffn<D, D::Kept>,
        dx: &mut D::Buf,
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
        through: bool,
    ) -> Vec<Option<Routing<D::Elem>>> {
        let Ffn { inv, gate, up, behind, mut adapters, mix } = saved;
        let act = self.spec.activation;
        let width = self.device.len(dx) / self.spec.hidden * self.spec.intermediate;
        let [ag, au, ad] = &mut adapters;
        let inner = if mix.is_some() {
            // Experts mix their own; the base's map is frozen then and asks only for slopes.
            self.device.zeros(width)
        } else {
            let mut inner = self.device.unwritten(width);
            self.device.gated_kept(act, &gate, &up, self.view_mut(&mut inner));
            inner
        };
        let mut dinner = self.device.unwritten(width);
        let dpart = self.join_backward(b, Norm::PostFfn, behind, dx, grads);
        let dy = self.view(dpart.as_ref().unwrap_or(dx));
        let (x, target) = (self.view(&inner), Some(self.view_mut(&mut dinner)));
        self.apply_backward(b, Proj::Down, x, dy, target, false, ad.as_mut(), mode, scales, grads);
        drop(inner);
        let middle = self.device.recall(middle);
        let (normed, _) = self.normed(b, Norm::Ffn, &middle);
        let experts = self.adapters.in_ffn(b).zip(mix.as_ref());
        let len = self.device.len(dx);
        // Experts add to what is there.
        let mut dnormed =
            if experts.is_some() { self.device.zeros(len) } else { self.device.unwritten(len) };
        let (dgate, dup) = if let Some(((slot, mix), saved)) = experts {
            let (gate, up) = (self.device.recall(gate), self.device.recall(up));
            let params = self.params_view().at(slot.range.clone());
            let input =
                FfnInput { x: self.view(&normed), gate: self.view(&gate), up: self.view(&up) };
            let (mut dgate, mut dup) = (self.device.zeros(width), self.device.zeros(width));
            let slopes = through.then(|| FfnSlopes {
                x: self.view_mut(&mut dnormed),
                gate: self.view_mut(&mut dgate),
                up: self.view_mut(&mut dup),
            });
            let (mode, scale, dinner) = (slot.mode(mode), scales.balance, self.view(&dinner));
            let grads = self.view_mut(grads).at(slot.range.clone());
            let device = &self.device;
            mix.backward(device, mode, scale, params, saved, input, dy, dinner, grads, slopes);
            (dgate, dup)
        } else {
            self.device.gated_kept_backward(act, self.view(&dinner), gate, up).into()
        };
        drop((dinner, dpart));
        let mut accumulate = experts.is_some();
        for (proj, dy, saved) in [(Proj::Gate, &dgate, ag), (Proj::Up, &dup, au)] {
            let target = through.then(|| self.view_mut(&mut dnormed));
            let (x, dy, saved) = (self.view(&normed), self.view(dy), saved.as_mut());
            self.apply_backward(b, proj, x, dy, target, accumulate, saved, mode, scales, grads);
            accumulate = true;
        }
        if through {
            let (x, dy) = (self.view(&middle), self.view(&dnormed));
            self.norm_backward(b, Norm::Ffn, x, &inv, dy, self.view_mut(dx), grads);
        }
        routing_of(adapters, mix)
    }
}
