//! One transformer block: attention and FFN around the skip connection, forward and backward.
//!
//! The two halves are in `attention.rs` and `ffn.rs`; what both are made of, an
//! adapted linear map, a norm, a part's way onto the skip connection, is here.

use super::attention::Attention;
use super::ffn::Ffn;
use super::spec::{Norm, Proj};
use super::{Model, Scales};
use smore::adapter::{AnySaved, Map, MapAdapter, MixLoraSaved, Mode};
use smore::kernel::{AdapterKernels, Routing};
use smore_engine::{AttentionShape, Device, View, ViewMut};

/// What a block's backward pass needs.
pub struct BlockSaved<D: AdapterKernels> {
    /// Input of the block `[n, hidden]`.
    x: D::Kept,
    /// Keys after norm and rotation, and values: `[n, kv_heads * head_dim]`.
    k: D::Kept,
    v: D::Kept,
    pub(super) attention: Attention<D, D::Kept>,
    /// After attention, on the skip connection `[n, hidden]`.
    middle: D::Kept,
    pub(super) ffn: Ffn<D, D::Kept>,
}

/// Routing of the adapters on maps, and of that in the FFN, where there are any.
pub(super) fn routing_of<D: AdapterKernels>(
    adapters: impl IntoIterator<Item = Option<AnySaved<D>>>,
    mix: Option<MixLoraSaved<D>>,
) -> Vec<Option<Routing<D::Elem>>> {
    let maps = adapters.into_iter().flatten().map(AnySaved::into_routing);
    maps.chain(mix.map(|saved| Some(saved.routing))).collect()
}

/// What a norm's backward pass needs, its input as `B`.
pub(super) struct Normed<D: AdapterKernels, B = <D as Device>::Buf> {
    /// `[n, width]`
    pub(super) input: B,
    /// Inverse roots `[n]`
    pub(super) inv: D::Buf,
}

impl<D: AdapterKernels, B> Normed<D, B> {
    pub(super) fn map<C>(self, f: impl FnOnce(B) -> C) -> Normed<D, C> {
        Normed { input: f(self.input), inv: self.inv }
    }
}

/// Keys and values of everything read so far, for one sequence.
pub struct KvCache<D: AdapterKernels> {
    /// Per block: keys and values, `[context, width]` each.
    blocks: Vec<(D::Buf, D::Buf)>,
    context: usize,
    width: usize,
    len: usize,
}

impl<D: AdapterKernels> KvCache<D> {
    pub(super) fn new(device: &D, blocks: usize, context: usize, width: usize) -> Self {
        let pair = || (device.zeros(context * width), device.zeros(context * width));
        Self { blocks: (0..blocks).map(|_| pair()).collect(), context, width, len: 0 }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn grow(&mut self, n: usize) {
        self.len += n;
    }
}

impl<D: AdapterKernels> Model<D> {
    pub(super) fn view<'a>(&self, buf: &'a D::Buf) -> View<'a, D> {
        View::new(buf, self.device.len(buf))
    }

    pub(super) fn view_mut<'a>(&self, buf: &'a mut D::Buf) -> ViewMut<'a, D> {
        let len = self.device.len(buf);
        ViewMut::new(buf, len)
    }

    /// y = W x + bias + adapter(x), or added to y where `accumulate`.
    pub(super) fn apply(
        &self,
        block: usize,
        proj: Proj,
        x: View<D>,
        mut y: ViewMut<D>,
        mode: Mode,
        accumulate: bool,
    ) -> Option<AnySaved<D>> {
        let n = x.len / self.widths(proj).0;
        let w = self.weights.map(self, block, proj);
        let bias = self.weights.bias(self, block, proj);
        let device = &self.device;
        let Some((slot, adapter)) = self.adapters.at(block, proj) else {
            device.linear(x, w, bias, y, n, accumulate);
            return None;
        };
        let (params, mode) = (self.params_view().at(slot.range.clone()), slot.mode(mode));
        if n > 1 && self.tap.is_none() {
            let map = Some(Map { w, bias, accumulate });
            return Some(adapter.forward_on(device, mode, params, map, x, y));
        }
        let halved = if mode.decoding { self.halved(slot) } else { None };
        // The tree of a single token is walked on one thread: the others read W meanwhile.
        let mut own = device.zeros(y.len);
        let target = self.view_mut(&mut own);
        let (saved, ()) = device.both(
            || match halved {
                Some(halved) => adapter.forward_token(device, params, halved, x, target),
                None => adapter.forward(device, mode, params, x, target),
            },
            || device.linear(x, w, bias, y.rb(), n, accumulate),
        );
        device.add(self.view(&own), y);
        if let Some(tap) = &self.tap {
            tap(block, proj, x, self.view(&own));
        }
        Some(saved)
    }

    /// The backward pass of [`Model::apply`]: adds to `grads` and writes `dx` where wanted, or adds to
    /// it where `accumulate`.
    pub(super) fn apply_backward(
        &self,
        block: usize,
        proj: Proj,
        x: View<D>,
        dy: View<D>,
        mut dx: Option<ViewMut<D>>,
        accumulate: bool,
        saved: Option<&mut AnySaved<D>>,
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) {
        let (d_in, d_out) = self.widths(proj);
        let n = x.len / d_in;
        let w = self.weights.map(self, block, proj);
        let adapted = self.adapters.at(block, proj).zip(saved);
        if let (None, Some(dx)) = (&adapted, &mut dx) {
            self.device.linear_backward(dy, w, dx.rb(), n, accumulate);
        }
        if let Some(dw) = self.weights.map_grad(self.view_mut(grads), block, proj) {
            let target = dw.mat(d_out, d_in);
            self.device.gemm(1.0, dy.mat(n, d_out).t(), x.mat(n, d_in), 1.0, target);
        }
        if let Some(dbias) = self.weights.bias_grad(self.view_mut(grads), block, proj) {
            self.device.sum_rows(dy, dbias);
        }
        if let Some(((slot, adapter), saved)) = adapted {
            let map = Some(Map { w, bias: None, accumulate });
            let params = self.params_view().at(slot.range.clone());
            let grads = self.view_mut(grads).at(slot.range.clone());
            let mode = slot.mode(mode);
            let (device, scale) = (&self.device, scales.balance);
            adapter.backward_on(device, mode, scale, params, map, saved, x, dy, grads, dx);
        }
    }

    /// y = norm(x), and the inverse roots; none where this decoder has no such norm.
    pub(super) fn norm(
        &self,
        block: usize,
        norm: Norm,
        x: View<D>,
        y: ViewMut<D>,
    ) -> Option<D::Buf> {
        let gain = self.weights.block_norm(self, block, norm)?;
        let n = x.len / gain.len;
        let mut inv = self.device.unwritten(n);
        self.device.rms_norm(self.spec.norm, x, gain, y, ViewMut::new(&mut inv, n));
        Some(inv)
    }

    /// As [`Model::norm`], into a buffer of its own.
    ///
    /// # Panics
    /// If this decoder has no such norm: every one has those before attention and FFN.
    pub(super) fn normed(&self, block: usize, norm: Norm, x: &D::Buf) -> (D::Buf, D::Buf) {
        let mut y = self.device.unwritten(self.device.len(x));
        let inv = self.norm(block, norm, self.view(x), self.view_mut(&mut y));
        (y, inv.expect("a block has norms before attention and FFN"))
    }

    /// Adds the slopes by a norm's input to `dx`, and by its gains to `grads` where they are
    /// trained.
    pub(super) fn norm_backward(
        &self,
        block: usize,
        norm: Norm,
        x: View<D>,
        inv: &D::Buf,
        dy: View<D>,
        dx: ViewMut<D>,
        grads: &mut D::Buf,
    ) {
        let Some(gain) = self.weights.block_norm(self, block, norm) else { return };
        let dgain = self.weights.block_norm_grad(self.view_mut(grads), block, norm);
        self.device.rms_norm_backward(self.spec.norm, x, gain, self.view(inv), dy, dx, dgain);
    }

    /// Adds what `fill` writes to the skip connection `x`, through the norm behind this part where
    /// there is one. `fill` adds to what it is given.
    pub(super) fn join<S>(
        &self,
        block: usize,
        behind: Norm,
        x: &mut D::Buf,
        fill: impl FnOnce(ViewMut<D>) -> S,
    ) -> (S, Option<Normed<D>>) {
        if self.weights.block_norm(self, block, behind).is_none() {
            return (fill(self.view_mut(x)), None);
        }
        let mut part = self.device.zeros(self.device.len(x));
        let saved = fill(self.view_mut(&mut part));
        let (out, inv) = self.normed(block, behind, &part);
        self.device.add(self.view(&out), self.view_mut(x));
        (saved, Some(Normed { input: part, inv }))
    }

    /// Slopes by what [`Model::join`] was given, where they are not those of the skip connection.
    pub(super) fn join_backward(
        &self,
        block: usize,
        behind: Norm,
        saved: Option<Normed<D, D::Kept>>,
        dx: &D::Buf,
        grads: &mut D::Buf,
    ) -> Option<D::Buf> {
        let Normed { input, inv } = saved?;
        let input = self.device.recall(input);
        let mut dpart = self.device.zeros(self.device.len(dx));
        let (target, x) = (self.view_mut(&mut dpart), self.view(&input));
        self.norm_backward(block, behind, x, &inv, self.view(dx), target, grads);
        Some(dpart)
    }

    /// Runs block `b` over whole sequences, in place on `x`; saves what backward needs if `keep`.
    pub(super) fn block_forward(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        keep: bool,
    ) -> Option<BlockSaved<D>> {
        let n = positions.len();
        let width = n * self.spec.kv_heads * self.spec.head_dim;
        let (mut k, mut v) = (self.device.unwritten(width), self.device.unwritten(width));
        let device = &self.device;
        let input = keep.then(|| device.keep_copy(self.view(x)));
        let attention = self.attention(b, x, shape, positions, mode, (&mut k, &mut v), 0..n);
        let Some(input) = input else {
            drop((k, v, attention));
            self.ffn(b, x, mode);
            return None;
        };
        let keep = |buf| device.keep(buf);
        let (k, v, attention) = (keep(k), keep(v), attention.map(keep));
        let middle = device.keep_copy(self.view(x));
        let ffn = self.ffn(b, x, mode).map(keep);
        Some(BlockSaved { x: input, k, v, attention, middle, ffn })
    }

    /// Runs block `b` over whole sequences, in place on `x`, and returns their routing.
    pub(super) fn block_routed(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
    ) -> Vec<Option<Routing<D::Elem>>> {
        let n = positions.len();
        let width = n * self.spec.kv_heads * self.spec.head_dim;
        let (mut k, mut v) = (self.device.unwritten(width), self.device.unwritten(width));
        let attention = self.attention(b, x, shape, positions, mode, (&mut k, &mut v), 0..n);
        drop((k, v));
        let mut routing = attention.into_routing();
        routing.extend(self.ffn(b, x, mode).into_routing());
        routing
    }

    /// Runs block `b` over tokens that follow what the cache holds, and returns their routing.
    pub(super) fn block_extend(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        cache: &mut KvCache<D>,
    ) -> Vec<Option<Routing<D::Elem>>> {
        let rows = cache.len..cache.len + positions.len();
        debug_assert!(rows.end <= cache.context && cache.width > 0);
        let (k, v) = &mut cache.blocks[b];
        let attention = self.attention(b, x, shape, positions, mode, (k, v), rows);
        let mut routing = attention.into_routing();
        routing.extend(self.ffn(b, x, mode).into_routing());
        routing
    }

    pub(super) fn copy(&self, x: &D::Buf) -> D::Buf {
        self.device.copy(self.view(x))
    }

    /// The backward pass of [`Model::block_forward`]: `dx` holds the slopes by the block's output
    /// on entry and by its input on exit (unless nothing below is trained). Returns the adapters'
    /// routing, in the order of their slots.
    pub(super) fn block_backward(
        &self,
        b: usize,
        saved: BlockSaved<D>,
        dx: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) -> Vec<Option<Routing<D::Elem>>> {
        let BlockSaved { x, k, v, attention, middle, ffn } = saved;
        // Nothing below the lowest adapter is differentiated.
        let below = self.weights.is_trained() || b > self.adapters.lowest_block();
        let attention_trained = Proj::ALL[..4].iter().any(|&p| self.adapters.at(b, p).is_some());
        let through = below || attention_trained;
        let in_ffn = self.ffn_backward(b, middle, ffn, dx, mode, scales, grads, through);
        let mut routing = if through {
            self.attention_backward(
                b,
                x,
                (k, v),
                attention,
                dx,
                shape,
                positions,
                mode,
                scales,
                grads,
            )
        } else {
            attention.into_routing()
        };
        routing.extend(in_ffn);
        routing
    }
}
