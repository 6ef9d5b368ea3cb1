//! A block's attention, forward and backward.

use super::block::{Normed, routing_of};
use super::spec::{Norm, Proj};
use super::{Model, Scales};
use smore::adapter::{AnySaved, Mode};
use smore::kernel::{AdapterKernels, Routing};
use smore_engine::{AttentionShape, Device, View, ViewMut};
use std::ops::Range;

/// What attention's backward pass needs besides keys and values, its large buffers as `B`.
pub(super) struct Attention<D: AdapterKernels, B = <D as Device>::Buf> {
    /// Inverse roots of the norm before it `[n]`.
    inv: D::Buf,
    /// Queries after norm and rotation `[n, heads * head_dim]`.
    q: B,
    /// Of the norms of queries and keys.
    query_norm: Option<Normed<D, B>>,
    key_norm: Option<Normed<D, B>>,
    /// Output of attention `[n, heads * head_dim]` and its log-sum-exp `[n, heads]`.
    attended: B,
    lse: D::Buf,
    /// Of the norm behind it.
    behind: Option<Normed<D, B>>,
    /// What the adapters on q, k, v and o saved.
    pub(super) adapters: [Option<AnySaved<D>>; 4],
}

impl<D: AdapterKernels, B> Attention<D, B> {
    pub(super) fn map<C>(self, mut f: impl FnMut(B) -> C) -> Attention<D, C> {
        let Self { inv, q, query_norm, key_norm, attended, lse, behind, adapters } = self;
        let [query_norm, key_norm, behind] =
            [query_norm, key_norm, behind].map(|norm| norm.map(|n| n.map(&mut f)));
        let (q, attended) = (f(q), f(attended));
        Attention { inv, q, query_norm, key_norm, attended, lse, behind, adapters }
    }

    /// Routing of the adapters, in the order of their slots.
    pub(super) fn into_routing(self) -> Vec<Option<Routing<D::Elem>>> {
        routing_of(self.adapters, None)
    }
}

impl<D: AdapterKernels> Model<D> {
    /// Attention onto the skip connection. New keys and values go to `rows` of `kv`; all rows up
    /// to the last of them are attended to.
    pub(super) fn attention(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        (k, v): (&mut D::Buf, &mut D::Buf),
        rows: Range<usize>,
    ) -> Attention<D> {
        let n = positions.len();
        let dim = self.spec.head_dim;
        let (q_width, kv_width) = (self.spec.heads * dim, self.spec.kv_heads * dim);
        let (normed, inv) = self.normed(b, Norm::Attention, x);
        let h = self.view(&normed);
        let mut q = self.device.unwritten(n * q_width);
        let new = rows.start * kv_width..rows.end * kv_width;
        let (aq, query_norm) =
            self.heads(b, (Proj::Q, Norm::Query), h, self.view_mut(&mut q), positions, mode);
        let keys = self.view_mut(k).at(new.clone());
        let (ak, key_norm) = self.heads(b, (Proj::K, Norm::Key), h, keys, positions, mode);
        let av = self.apply(b, Proj::V, h, self.view_mut(v).at(new), mode, false);
        let mut attended = self.device.unwritten(n * q_width);
        let mut lse = self.device.unwritten(n * self.spec.heads);
        let seen = 0..rows.end * kv_width;
        self.device.attention(
            shape,
            self.view(&q),
            self.view(k).at(seen.clone()),
            self.view(v).at(seen),
            self.view_mut(&mut attended),
            self.view_mut(&mut lse),
        );
        let (ao, behind) = self.join(b, Norm::PostAttention, x, |y| {
            self.apply(b, Proj::O, self.view(&attended), y, mode, true)
        });
        let adapters = [aq, ak, av, ao];
        Attention { inv, q, query_norm, key_norm, attended, lse, behind, adapters }
    }

    /// Queries or keys: the map, the norm of each head where there is one, the rotation.
    fn heads(
        &self,
        b: usize,
        (proj, norm): (Proj, Norm),
        h: View<D>,
        mut y: ViewMut<D>,
        positions: &[u32],
        mode: Mode,
    ) -> (Option<AnySaved<D>>, Option<Normed<D>>) {
        let (saved, normed) = if self.spec.family.has_query_key_norms() {
            let mut input = self.device.unwritten(y.len);
            let saved = self.apply(b, proj, h, self.view_mut(&mut input), mode, false);
            let inv = self.norm(b, norm, self.view(&input), y.rb());
            (saved, inv.map(|inv| Normed { input, inv }))
        } else {
            (self.apply(b, proj, h, y.rb(), mode, false), None)
        };
        self.device.rotary(y, self.rope_view(), positions, self.spec.head_dim, false);
        (saved, normed)
    }

    /// Turns slopes by rotated heads into slopes by their map's output, in place.
    fn heads_backward(
        &self,
        b: usize,
        norm: Norm,
        saved: Option<Normed<D, D::Kept>>,
        dy: &mut D::Buf,
        positions: &[u32],
        grads: &mut D::Buf,
    ) {
        let (rope, dim) = (self.rope_view(), self.spec.head_dim);
        self.device.rotary(self.view_mut(dy), rope, positions, dim, true);
        if let Some(Normed { input, inv }) = saved {
            let input = self.device.recall(input);
            let mut dinput = self.device.zeros(self.device.len(dy));
            let (x, target) = (self.view(&input), self.view_mut(&mut dinput));
            self.norm_backward(b, norm, x, &inv, self.view(dy), target, grads);
            *dy = dinput;
        }
    }

    /// The backward pass of [`Model::attention`] over whole sequences with input `x`, in place on
    /// `dx`. Returns the adapters' routing.
    pub(super) fn attention_backward(
        &self,
        b: usize,
        x: D::Kept,
        (k, v): (D::Kept, D::Kept),
        saved: Attention<D, D::Kept>,
        dx: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) -> Vec<Option<Routing<D::Elem>>> {
        let Attention { inv, q, query_norm, key_norm, attended, lse, behind, mut adapters } = saved;
        let [aq, ak, av, ao] = &mut adapters;
        let attended = self.device.recall(attended);
        let mut dattended = self.device.unwritten(self.device.len(&attended));
        let dpart = self.join_backward(b, Norm::PostAttention, behind, dx, grads);
        let dy = self.view(dpart.as_ref().unwrap_or(dx));
        let (out, target) = (self.view(&attended), Some(self.view_mut(&mut dattended)));
        self.apply_backward(b, Proj::O, out, dy, target, false, ao.as_mut(), mode, scales, grads);
        let [q, k, v] = [q, k, v].map(|kept| self.device.recall(kept));
        let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| self.device.zeros(self.device.len(x)));
        self.device.attention_backward(
            shape,
            self.view(&q),
            self.view(&k),
            self.view(&v),
            out,
            self.view(&lse),
            self.view(&dattended),
            self.view_mut(&mut dq),
            self.view_mut(&mut dk),
            self.view_mut(&mut dv),
        );
        drop((q, k, v, attended, dattended));
        self.heads_backward(b, Norm::Query, query_norm, &mut dq, positions, grads);
        self.heads_backward(b, Norm::Key, key_norm, &mut dk, positions, grads);
        let x = self.device.recall(x);
        let (normed, _) = self.normed(b, Norm::Attention, &x);
        let mut dnormed = self.device.unwritten(self.device.len(dx));
        let maps = [(Proj::Q, &dq, aq), (Proj::K, &dk, ak), (Proj::V, &dv, av)];
        for (i, (proj, dy, saved)) in maps.into_iter().enumerate() {
            let target = Some(self.view_mut(&mut dnormed));
            let (x, dy, saved) = (self.view(&normed), self.view(dy), saved.as_mut());
            self.apply_backward(b, proj, x, dy, target, i > 0, saved, mode, scales, grads);
        }
        let (x, dy) = (self.view(&x), self.view(&dnormed));
        self.norm_backward(b, Norm::Attention, x, &inv, dy, self.view_mut(dx), grads);
        routing_of(adapters, None)
    }
}
