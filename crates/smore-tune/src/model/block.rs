//! One transformer block: attention and FFN around the skip connection, forward and backward.

use super::spec::Proj;
use super::{Model, Scales};
use smore::adapter::{AnySaved, MapAdapter, Mode};
use smore::kernel::{AdapterKernels, Routing};
use smore_engine::{AttentionShape, View, ViewMut};

/// What a block's backward pass needs.
pub struct BlockSaved<D: AdapterKernels> {
    /// Rows.
    n: usize,
    /// Input of the block `[n, hidden]`.
    x: D::Buf,
    /// Inverse roots of the attention norm `[n]`.
    attention_inv: D::Buf,
    /// Queries and keys after the rotation, values: `[n, heads * head_dim]`, `[n, kv * head_dim]`.
    q: D::Buf,
    k: D::Buf,
    v: D::Buf,
    /// Output of attention `[n, heads * head_dim]` and its log-sum-exp `[n, heads]`.
    attended: D::Buf,
    lse: D::Buf,
    /// After attention, on the skip connection `[n, hidden]`.
    middle: D::Buf,
    /// Inverse roots of the FFN norm `[n]`.
    ffn_inv: D::Buf,
    /// FFN gate and up `[n, intermediate]`.
    gate: D::Buf,
    up: D::Buf,
    /// What the adapters saved, in the order of [`Proj::ALL`].
    adapters: [Option<AnySaved<D>>; 7],
}

impl<D: AdapterKernels> BlockSaved<D> {
    /// Routing of the adapted maps, in the order of [`Proj::ALL`].
    pub(super) fn into_routing(self) -> Vec<Option<Routing<D::Elem>>> {
        let routing = |saved| match saved {
            AnySaved::Smore(s) => Some(s.routing),
            AnySaved::Lora(_) => None,
            AnySaved::HydraLora(s) => Some(s.routing),
        };
        self.adapters.into_iter().flatten().map(routing).collect()
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

fn all<D: AdapterKernels>(device: &D, buf: &D::Buf) -> usize {
    device.len(buf)
}

impl<D: AdapterKernels> Model<D> {
    fn view<'a>(&self, buf: &'a D::Buf) -> View<'a, D> {
        View::new(buf, all(&self.device, buf))
    }

    fn view_mut<'a>(&self, buf: &'a mut D::Buf) -> ViewMut<'a, D> {
        let len = all(&self.device, buf);
        ViewMut::new(buf, len)
    }

    /// y = W x + adapter(x), or added to y where `accumulate`.
    fn apply(
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
        self.device.linear(x, w, y.rb(), n, accumulate);
        let slot = self.adapters.at(block, proj)?;
        let params = self.params_view().at(slot.range.clone());
        let mode = Mode { noise: mode.noise.map(|key| slot.noise(key)), ..mode };
        Some(slot.adapter.forward(&self.device, mode, params, x, y))
    }

    /// The backward pass of [`Model::apply`]: adds to `grads` and, where wanted, to `dx`.
    fn apply_backward(
        &self,
        block: usize,
        proj: Proj,
        x: View<D>,
        dy: View<D>,
        mut dx: Option<ViewMut<D>>,
        saved: Option<&AnySaved<D>>,
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) {
        let (d_in, d_out) = self.widths(proj);
        let n = x.len / d_in;
        if let Some(dx) = &mut dx {
            let w = self.weights.map(self, block, proj);
            self.device.linear_backward(dy, w, dx.rb(), n);
        }
        if let Some(dw) = self.weights.map_grad(self.view_mut(grads), block, proj) {
            let target = dw.mat(d_out, d_in);
            self.device.gemm(1.0, dy.mat(n, d_out).t(), x.mat(n, d_in), 1.0, target);
        }
        if let (Some(slot), Some(saved)) = (self.adapters.at(block, proj), saved) {
            let params = self.params_view().at(slot.range.clone());
            let grads = self.view_mut(grads).at(slot.range.clone());
            let mode = Mode { noise: mode.noise.map(|key| slot.noise(key)), ..mode };
            let scale = scales.balance;
            slot.adapter.backward(&self.device, mode, scale, params, saved, x, dy, grads, dx);
        }
    }

    /// RMS norm of a block, before attention or before the FFN; also the inverse roots.
    fn normed(&self, block: usize, ffn: bool, x: &D::Buf, n: usize) -> (D::Buf, D::Buf) {
        let mut y = self.device.zeros(n * self.spec.hidden);
        let mut inv = self.device.zeros(n);
        let gain = self.weights.block_norm(self, block, ffn);
        let eps = self.spec.rms_eps;
        let (target, roots) = (self.view_mut(&mut y), ViewMut::new(&mut inv, n));
        self.device.rms_norm(self.view(x), gain, eps, target, roots);
        (y, inv)
    }

    fn normed_backward(
        &self,
        block: usize,
        ffn: bool,
        x: &D::Buf,
        inv: &D::Buf,
        dy: &D::Buf,
        dx: &mut D::Buf,
        grads: &mut D::Buf,
    ) {
        let gain = self.weights.block_norm(self, block, ffn);
        let dgain = self.weights.block_norm_grad(self.view_mut(grads), block, ffn);
        let (x, inv, dy) = (self.view(x), self.view(inv), self.view(dy));
        self.device.rms_norm_backward(x, gain, inv, dy, self.view_mut(dx), dgain);
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
        let (mut k, mut v) = (self.device.zeros(width), self.device.zeros(width));
        let input = keep.then(|| self.copy(x));
        let (kv, rows) = ((&mut k, &mut v), 0..n);
        let attention = self.attention(b, x, shape, positions, mode, kv, rows);
        let Attention { inv: attention_inv, q, attended, lse, saved: [aq, ak, av, ao] } = attention;
        let middle = keep.then(|| self.copy(x));
        let Ffn { inv: ffn_inv, gate, up, saved: [ag, au, ad] } = self.ffn(b, x, n, mode);
        let adapters = [aq, ak, av, ao, ag, au, ad];
        Some(BlockSaved {
            n,
            x: input?,
            attention_inv,
            q,
            k,
            v,
            attended,
            lse,
            middle: middle?,
            ffn_inv,
            gate,
            up,
            adapters,
        })
    }

    /// Runs block `b` over tokens that follow what the cache holds.
    pub(super) fn block_extend(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        cache: &mut KvCache<D>,
    ) {
        let rows = cache.len..cache.len + positions.len();
        debug_assert!(rows.end <= cache.context && cache.width > 0);
        let (k, v) = &mut cache.blocks[b];
        self.attention(b, x, shape, positions, mode, (k, v), rows);
        self.ffn(b, x, positions.len(), mode);
    }

    fn copy(&self, x: &D::Buf) -> D::Buf {
        let mut y = self.device.zeros(self.device.len(x));
        self.device.add(self.view(x), self.view_mut(&mut y));
        y
    }

    /// Attention onto the skip connection. New keys and values go to `rows` of `kv`; all rows up
    /// to the last of them are attended to.
    fn attention(
        &self,
        b: usize,
        x: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        (k, v): (&mut D::Buf, &mut D::Buf),
        rows: std::ops::Range<usize>,
    ) -> Attention<D> {
        let n = positions.len();
        let dim = self.spec.head_dim;
        let (q_width, kv_width) = (self.spec.heads * dim, self.spec.kv_heads * dim);
        let (normed, inv) = self.normed(b, false, x, n);
        let h = self.view(&normed);
        let mut q = self.device.zeros(n * q_width);
        let new = rows.start * kv_width..rows.end * kv_width;
        let aq = self.apply(b, Proj::Q, h, self.view_mut(&mut q), mode, false);
        let ak = self.apply(b, Proj::K, h, self.view_mut(k).at(new.clone()), mode, false);
        let av = self.apply(b, Proj::V, h, self.view_mut(v).at(new.clone()), mode, false);
        let rope = self.rope_view();
        self.device.rotary(self.view_mut(&mut q), rope, positions, dim, false);
        self.device.rotary(self.view_mut(k).at(new), rope, positions, dim, false);
        let mut attended = self.device.zeros(n * q_width);
        let mut lse = self.device.zeros(n * self.spec.heads);
        let seen = 0..rows.end * kv_width;
        self.device.attention(
            shape,
            self.view(&q),
            self.view(k).at(seen.clone()),
            self.view(v).at(seen),
            self.view_mut(&mut attended),
            self.view_mut(&mut lse),
        );
        let ao = self.apply(b, Proj::O, self.view(&attended), self.view_mut(x), mode, true);
        Attention { inv, q, attended, lse, saved: [aq, ak, av, ao] }
    }

    /// The FFN onto the skip connection.
    fn ffn(&self, b: usize, x: &mut D::Buf, n: usize, mode: Mode) -> Ffn<D> {
        let width = n * self.spec.intermediate;
        let (normed, inv) = self.normed(b, true, x, n);
        let h = self.view(&normed);
        let (mut gate, mut up) = (self.device.zeros(width), self.device.zeros(width));
        let ag = self.apply(b, Proj::Gate, h, self.view_mut(&mut gate), mode, false);
        let au = self.apply(b, Proj::Up, h, self.view_mut(&mut up), mode, false);
        let mut inner = self.device.zeros(width);
        self.device.swiglu(self.view(&gate), self.view(&up), self.view_mut(&mut inner));
        let ad = self.apply(b, Proj::Down, self.view(&inner), self.view_mut(x), mode, true);
        Ffn { inv, gate, up, saved: [ag, au, ad] }
    }

    /// The backward pass of [`Model::block_forward`]: `dx` holds the slopes by the block's output
    /// on entry and by its input on exit (unless nothing below is trained).
    pub(super) fn block_backward(
        &self,
        b: usize,
        saved: &BlockSaved<D>,
        dx: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) {
        // Nothing below the lowest adapter is differentiated.
        let below = self.weights.is_trained() || b > self.adapters.lowest_block();
        let attention_trained = Proj::ALL[..4].iter().any(|&p| self.adapters.at(b, p).is_some());
        let through = below || attention_trained;
        self.ffn_backward(b, saved, dx, mode, scales, grads, through);
        if through {
            self.attention_backward(b, saved, dx, shape, positions, mode, scales, grads);
        }
    }

    fn ffn_backward(
        &self,
        b: usize,
        saved: &BlockSaved<D>,
        dx: &mut D::Buf,
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
        through: bool,
    ) {
        let n = saved.n;
        let width = n * self.spec.intermediate;
        let (gate, up) = (self.view(&saved.gate), self.view(&saved.up));
        let [.., ag, au, ad] = &saved.adapters;
        let mut inner = self.device.zeros(width);
        self.device.swiglu(gate, up, self.view_mut(&mut inner));
        let mut dinner = self.device.zeros(width);
        self.apply_backward(
            b,
            Proj::Down,
            self.view(&inner),
            self.view(dx),
            Some(ViewMut::new(&mut dinner, width)),
            ad.as_ref(),
            mode,
            scales,
            grads,
        );
        drop(inner);
        let (mut dgate, mut dup) = (self.device.zeros(width), self.device.zeros(width));
        let dinner = self.view(&dinner);
        let (target, other) = (self.view_mut(&mut dgate), ViewMut::new(&mut dup, width));
        self.device.swiglu_backward(gate, up, dinner, target, other);
        let (normed, _) = self.normed(b, true, &saved.middle, n);
        let mut dnormed = self.device.zeros(n * self.spec.hidden);
        for (proj, dy, saved) in [(Proj::Gate, &dgate, ag), (Proj::Up, &dup, au)] {
            let target = through.then(|| ViewMut::new(&mut dnormed, n * self.spec.hidden));
            let (x, dy) = (self.view(&normed), self.view(dy));
            self.apply_backward(b, proj, x, dy, target, saved.as_ref(), mode, scales, grads);
        }
        if through {
            self.normed_backward(b, true, &saved.middle, &saved.ffn_inv, &dnormed, dx, grads);
        }
    }

    fn attention_backward(
        &self,
        b: usize,
        saved: &BlockSaved<D>,
        dx: &mut D::Buf,
        shape: &AttentionShape,
        positions: &[u32],
        mode: Mode,
        scales: Scales,
        grads: &mut D::Buf,
    ) {
        let n = saved.n;
        let dim = self.spec.head_dim;
        let (q_width, kv_width) = (n * self.spec.heads * dim, n * self.spec.kv_heads * dim);
        let [aq, ak, av, ao, ..] = &saved.adapters;
        let mut dattended = self.device.zeros(q_width);
        self.apply_backward(
            b,
            Proj::O,
            self.view(&saved.attended),
            self.view(dx),
            Some(ViewMut::new(&mut dattended, q_width)),
            ao.as_ref(),
            mode,
            scales,
            grads,
        );
        let mut dq = self.device.zeros(q_width);
        let (mut dk, mut dv) = (self.device.zeros(kv_width), self.device.zeros(kv_width));
        self.device.attention_backward(
            shape,
            self.view(&saved.q),
            self.view(&saved.k),
            self.view(&saved.v),
            self.view(&saved.attended),
            self.view(&saved.lse),
            self.view(&dattended),
            ViewMut::new(&mut dq, q_width),
            ViewMut::new(&mut dk, kv_width),
            ViewMut::new(&mut dv, kv_width),
        );
        let rope = self.rope_view();
        self.device.rotary(self.view_mut(&mut dq), rope, positions, dim, true);
        self.device.rotary(self.view_mut(&mut dk), rope, positions, dim, true);
        let (normed, _) = self.normed(b, false, &saved.x, n);
        let mut dnormed = self.device.zeros(n * self.spec.hidden);
        for (proj, dy, saved) in [(Proj::Q, &dq, aq), (Proj::K, &dk, ak), (Proj::V, &dv, av)] {
            let target = Some(ViewMut::new(&mut dnormed, n * self.spec.hidden));
            let (x, dy) = (self.view(&normed), self.view(dy));
            self.apply_backward(b, proj, x, dy, target, saved.as_ref(), mode, scales, grads);
        }
        self.normed_backward(b, false, &saved.x, &saved.attention_inv, &dnormed, dx, grads);
    }
}

struct Attention<D: AdapterKernels> {
    inv: D::Buf,
    q: D::Buf,
    attended: D::Buf,
    lse: D::Buf,
    saved: [Option<AnySaved<D>>; 4],
}

struct Ffn<D: AdapterKernels> {
    inv: D::Buf,
    gate: D::Buf,
    up: D::Buf,
    saved: [Option<AnySaved<D>>; 3],
}
