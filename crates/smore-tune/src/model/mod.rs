//! The decoder: one forward pass for training, evaluation and generation, and its backward pass.
//!
//! [`spec`] says what a decoder is and [`family`] how the families differ, [`folder`] opens one on disk, [`weights`] holds its tensors,
//! frozen or trained, [`block`] computes a transformer block both ways, and this module strings
//! the blocks together.

mod attention;
pub mod block;
pub mod family;
mod ffn;
pub mod folder;
pub mod rope;
pub mod spec;
mod traced;
pub mod weights;

use crate::inject::{Adapters, Site, Slot};
use block::{BlockSaved, KvCache};
use folder::ModelFolder;
use smore::adapter::{BlockAdapter, Halved, InputDropout, MapAdapter, Mode, Noise};
use smore::kernel::{AdapterKernels, Routing};
use smore_engine::{AttentionShape, Cpu, CrossEntropy, Float, Span, View, ViewMut};
use spec::{DecoderSpec, Proj};
use std::sync::OnceLock;
use weights::Weights;

/// A decoder on a device, with the adapters on it and the values of everything trained.
pub struct Model<D: AdapterKernels> {
    /// The machine.
    pub device: D,
    /// The decoder's shape.
    pub spec: DecoderSpec,
    /// Its tensors.
    pub weights: Weights<D>,
    /// The adapters on its linear maps.
    pub adapters: Adapters,
    /// Values of all trained parameters, in one buffer.
    params: D::Buf,
    /// The adapters' matrices as decoding reads them, made of `params` when first wanted; by slot.
    halved: OnceLock<Vec<Option<Halved<D>>>>,
    /// Rotary table for `context` positions.
    rope: D::Buf,
    /// Longest sequence this model can be given.
    pub context: usize,
    /// A step keeps only each block's input and computes the block again in the backward sweep:
    /// less memory for a third more time, and the same bits.
    pub gradient_checkpointing: bool,
    /// Share of the adapters' inputs that is dropped in a step whose noise is drawn.
    pub dropout: f64,
    /// Label smoothing of a step; evaluation has none.
    pub label_smoothing: f64,
    /// Sees what every adapted map is given and what its adapter adds.
    pub(crate) tap: Option<Tap<D>>,
}

/// What a training step computes on: with `bf16` in the recipe, products may round their factors.
pub fn training_device(bf16: bool) -> Cpu<f32> {
    if bf16 { Cpu::mixed() } else { Cpu::new() }
}

/// A function of block, map, the map's input `[n, d_in]` and the adapter's output `[n, d_out]`.
pub(crate) type Tap<D> = Box<dyn Fn(usize, Proj, View<D>, View<D>) + Send + Sync>;

/// Routing of every adapted place, in the order of the adapters; none for LoRA.
pub type Routings<D> = Vec<Option<Routing<<D as smore_engine::Device>::Elem>>>;

/// What a step keeps of a block until its backward pass.
enum Kept<D: AdapterKernels> {
    All(Box<BlockSaved<D>>),
    /// `[n, hidden]`
    Input(D::Buf),
}

/// Sequences laid one after the other, without padding.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    /// First token and length of each sequence.
    pub sequences: Vec<(usize, usize)>,
    /// (row, token that is to be predicted there).
    pub targets: Vec<(u32, u32)>,
}

impl Batch {
    /// Adds a sequence; `trained[i]` makes token i a target, predicted from token i - 1.
    pub fn push(&mut self, ids: &[u32], trained: &[bool]) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.sequences.push((start, ids.len()));
        for i in 1..ids.len() {
            if trained[i] {
                self.targets.push(((start + i - 1) as u32, ids[i]));
            }
        }
    }
}

/// Numbers that enter a training step's gradients.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// Factor on the summed cross-entropy: 1 / trained tokens of the accumulation window.
    pub loss: f64,
    /// Factor on the balance losses of this micro-batch.
    pub balance: f64,
}

/// What a training step says besides its gradients.
pub struct StepOutput<T> {
    /// -ln p of every target.
    pub losses: Vec<f64>,
    /// Sum of all balance losses, not scaled.
    pub balance_loss: f64,
    /// Routing of every adapted linear map, in the order of the adapters; `None` for LoRA.
    pub routing: Vec<Option<Routing<T>>>,
}

impl<D: AdapterKernels> Model<D> {
    /// A frozen decoder with adapters on it, or a trained one without.
    ///
    /// `params` are the starting values of everything trained.
    pub fn new(
        device: D,
        folder: &ModelFolder,
        adapters: Adapters,
        params: &[f32],
        context: usize,
    ) -> Self {
        let weights = Weights::frozen(&device, folder);
        Self::assemble(device, folder.spec.clone(), weights, adapters, params, context)
    }

    /// A decoder all of whose parameters are trained.
    pub fn full(device: D, spec: DecoderSpec, params: &[f32], context: usize) -> Self {
        let weights = Weights::trained(&spec);
        let adapters = Adapters::none(&spec);
        Self::assemble(device, spec, weights, adapters, params, context)
    }

    fn assemble(
        device: D,
        spec: DecoderSpec,
        weights: Weights<D>,
        adapters: Adapters,
        params: &[f32],
        context: usize,
    ) -> Self {
        let values: Vec<D::Elem> = params.iter().map(|&x| D::Elem::from_f32(x)).collect();
        let table = spec.rope.table(context, spec.head_dim);
        let table: Vec<D::Elem> = table.iter().map(|&x| D::Elem::from_f64(x)).collect();
        let (params, rope) = (device.upload(&values), device.upload(&table));
        Self {
            device,
            spec,
            weights,
            adapters,
            params,
            halved: OnceLock::new(),
            rope,
            context,
            gradient_checkpointing: false,
            dropout: 0.0,
            label_smoothing: 0.0,
            tap: None,
        }
    }

    /// Number of trained parameters.
    pub fn trained(&self) -> usize {
        self.device.len(&self.params)
    }

    /// All trained values.
    pub fn params(&self) -> &D::Buf {
        &self.params
    }

    /// All trained values, to be changed.
    pub fn params_mut(&mut self) -> &mut D::Buf {
        self.halved.take();
        &mut self.params
    }

    /// The matrices of the adapter at `slot` in 16 bits, where it has a use for them.
    fn halved(&self, slot: &Slot) -> Option<&Halved<D>> {
        let of_slot = |slot: &Slot| match (slot.site, &slot.adapter) {
            (Site::Map(proj), BlockAdapter::Map(adapter)) => {
                let w = self.weights.map(self, slot.block, proj);
                adapter.halved(&self.device, w, self.params_view().at(slot.range.clone()))
            }
            _ => None,
        };
        let all = || self.adapters.slots.iter().map(of_slot).collect();
        self.halved.get_or_init(all)[slot.place].as_ref()
    }

    /// All trained values.
    pub fn params_view(&self) -> View<'_, D> {
        View::new(&self.params, self.trained())
    }

    fn rope_view(&self) -> View<'_, D> {
        View::new(&self.rope, self.context * self.spec.head_dim)
    }

    /// Attention over whole sequences in block `b`.
    fn attention_shape(&self, batch: &Batch, b: usize) -> AttentionShape {
        let spans = batch.sequences.iter().map(|&(start, len)| Span {
            q_start: start,
            q_len: len,
            k_start: start,
            k_len: len,
        });
        self.shape_of(spans.collect(), b)
    }

    fn shape_of(&self, spans: Vec<Span>, b: usize) -> AttentionShape {
        AttentionShape {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            scale: self.spec.attention_scale,
            soft_cap: self.spec.attention_soft_cap,
            window: self.spec.windows[b],
            spans,
        }
    }

    fn embed(&self, ids: &[u32]) -> D::Buf {
        let mut x = self.device.unwritten(ids.len() * self.spec.hidden);
        let target = ViewMut::new(&mut x, ids.len() * self.spec.hidden);
        self.device.embedding(ids, self.weights.embed(self), target);
        self.scale_embedding(&mut x);
        x
    }

    /// Forward on embeddings and backward on their slopes.
    fn scale_embedding(&self, x: &mut D::Buf) {
        if self.spec.embedding_scale != 1.0 {
            let len = self.device.len(x);
            self.device.scale(self.spec.embedding_scale, ViewMut::new(x, len));
        }
    }

    /// The last block's output through the final norm, and the norm's inverse roots.
    fn final_norm(&self, x: &D::Buf, n: usize) -> (D::Buf, D::Buf) {
        let width = n * self.spec.hidden;
        let (mut h, mut inv) = (self.device.unwritten(width), self.device.unwritten(n));
        self.device.rms_norm(
            self.spec.norm,
            View::new(x, width),
            self.weights.norm(self),
            ViewMut::new(&mut h, width),
            ViewMut::new(&mut inv, n),
        );
        (h, inv)
    }

    /// The lowest block that has something to train; the number of blocks where none has.
    fn lowest_trained(&self) -> usize {
        if self.weights.is_trained() { 0 } else { self.adapters.lowest_block() }
    }

    /// -ln p of every target, without gradients.
    pub fn losses(&self, batch: &Batch) -> Vec<f64> {
        self.losses_routed(batch).0
    }

    /// As [`Model::losses`], with the routing in the order of the adapters.
    pub fn losses_routed(&self, batch: &Batch) -> (Vec<f64>, Routings<D>) {
        self.losses_from(0, self.embed(&batch.ids), batch, Mode::plain())
    }

    /// -ln p of every target, given the input of block `first`, and the routing from there on.
    fn losses_from(
        &self,
        first: usize,
        mut x: D::Buf,
        batch: &Batch,
        mode: Mode,
    ) -> (Vec<f64>, Routings<D>) {
        let n = batch.ids.len();
        let mut routing = Vec::new();
        for b in first..self.spec.blocks {
            routing.extend(self.run_block(b, &mut x, batch, mode));
        }
        let (h, _) = self.final_norm(&x, n);
        let h = View::new(&h, n * self.spec.hidden);
        let head = self.weights.head(self);
        let loss = CrossEntropy { soft_cap: self.spec.logit_soft_cap, ..CrossEntropy::default() };
        (self.device.cross_entropy(h, &batch.targets, head, loss, None, None), routing)
    }

    /// Routing of every adapted linear map over a batch, in the order of the adapters.
    pub fn routing(&self, batch: &Batch) -> Routings<D> {
        let mut x = self.embed(&batch.ids);
        let blocks = 0..self.spec.blocks;
        blocks.flat_map(|b| self.run_block(b, &mut x, batch, Mode::plain())).collect()
    }

    /// What a training step is like: its noise, and dropout with the same key.
    fn training<'a>(&self, noise: Option<Noise<'a>>) -> Mode<'a> {
        let dropout = match noise {
            Some(Noise::Drawn(key)) if self.dropout > 0.0 => {
                Some(InputDropout { rate: self.dropout, key })
            }
            _ => None,
        };
        Mode { noise, dropout, ..Mode::plain() }
    }

    /// Losses of a batch; adds the gradients of `scales.loss * sum + scales.balance * balance` to
    /// `grads`, laid out like the parameters.
    pub fn step(
        &self,
        batch: &Batch,
        scales: Scales,
        noise: Option<Noise>,
        grads: &mut D::Buf,
    ) -> StepOutput<D::Elem> {
        let (n, hidden) = (batch.ids.len(), self.spec.hidden);
        let mode = self.training(noise);
        let lowest = self.lowest_trained();
        let mut x = self.embed(&batch.ids);
        let mut kept: Vec<Kept<D>> = Vec::new();
        for b in 0..self.spec.blocks {
            let shape = self.attention_shape(batch, b);
            let recompute = self.gradient_checkpointing && b >= lowest;
            if recompute {
                kept.push(Kept::Input(self.copy(&x)));
            }
            let keep = b >= lowest && !recompute;
            let saved = self.block_forward(b, &mut x, &shape, &batch.positions, mode, keep);
            kept.extend(saved.map(|saved| Kept::All(Box::new(saved))));
        }
        let (h, inv) = self.final_norm(&x, n);
        let mut dh = self.device.zeros(n * hidden);
        let total = self.device.len(grads);
        let losses = self.device.cross_entropy(
            View::new(&h, n * hidden),
            &batch.targets,
            self.weights.head(self),
            CrossEntropy {
                soft_cap: self.spec.logit_soft_cap,
                label_smoothing: self.label_smoothing,
                scale: scales.loss,
            },
            Some(ViewMut::new(&mut dh, n * hidden)),
            self.weights.head_grad(ViewMut::new(grads, total)),
        );
        let mut dx = self.device.zeros(n * hidden);
        self.device.rms_norm_backward(
            self.spec.norm,
            View::new(&x, n * hidden),
            self.weights.norm(self),
            View::new(&inv, n),
            View::new(&dh, n * hidden),
            ViewMut::new(&mut dx, n * hidden),
            self.weights.norm_grad(ViewMut::new(grads, total)),
        );
        drop((h, x, dh));
        let mut routing = Vec::new();
        for b in (lowest..self.spec.blocks).rev() {
            let shape = self.attention_shape(batch, b);
            let saved = match kept.pop() {
                Some(Kept::All(saved)) => Some(*saved),
                Some(Kept::Input(mut x)) => {
                    self.block_forward(b, &mut x, &shape, &batch.positions, mode, true)
                }
                None => None,
            };
            if let Some(saved) = saved {
                let positions = &batch.positions;
                let of_block =
                    self.block_backward(b, saved, &mut dx, &shape, positions, mode, scales, grads);
                routing.extend(of_block.into_iter().rev());
            }
        }
        routing.reverse();
        if let Some(dembed) = self.weights.embed_grad(ViewMut::new(grads, total)) {
            self.scale_embedding(&mut dx);
            self.device.embedding_backward(&batch.ids, View::new(&dx, n * hidden), dembed);
        }
        let balances = routing.iter().flatten().flat_map(|r: &Routing<_>| &r.balance_losses);
        StepOutput { losses, balance_loss: balances.sum(), routing }
    }

    /// The token embeddings of a batch, `[n, hidden]`.
    pub(crate) fn embedded(&self, batch: &Batch) -> D::Buf {
        self.embed(&batch.ids)
    }

    /// Runs block `b` over a batch, in place, and returns its routing.
    pub(crate) fn run_block(
        &self,
        b: usize,
        x: &mut D::Buf,
        batch: &Batch,
        mode: Mode,
    ) -> Routings<D> {
        let shape = self.attention_shape(batch, b);
        self.block_routed(b, x, &shape, &batch.positions, mode)
    }

    /// Hidden states as transformers lists them: after the embedding, after every block but the
    /// last, and after the final norm; and the logits of every token.
    pub fn states_and_logits(
        &self,
        batch: &Batch,
        noise: Option<Noise>,
    ) -> (Vec<Vec<D::Elem>>, Vec<D::Elem>) {
        let (n, width) = (batch.ids.len(), batch.ids.len() * self.spec.hidden);
        let mut x = self.embed(&batch.ids);
        let mut states = Vec::new();
        let mode = Mode { noise, ..Mode::plain() };
        for b in 0..self.spec.blocks {
            let shape = self.attention_shape(batch, b);
            states.push(self.device.download(View::new(&x, width)));
            self.block_forward(b, &mut x, &shape, &batch.positions, mode, false);
        }
        let (h, _) = self.final_norm(&x, n);
        states.push(self.device.download(View::new(&h, width)));
        let logits = self.logits_of(&x, n);
        (states, logits)
    }

    /// Logits `[n, vocabulary]` of the last block's output.
    fn logits_of(&self, x: &D::Buf, n: usize) -> Vec<D::Elem> {
        let (h, _) = self.final_norm(x, n);
        let len = n * self.spec.vocabulary;
        let mut logits = self.device.unwritten(len);
        let h = View::new(&h, n * self.spec.hidden);
        let (head, target) = (self.weights.head(self), ViewMut::new(&mut logits, len));
        self.device.linear(h, head, None, target, n, false);
        if let Some(cap) = self.spec.logit_soft_cap {
            self.device.soft_cap(cap, ViewMut::new(&mut logits, len));
        }
        self.device.download(View::new(&logits, len))
    }

    /// Runs `ids` behind what the cache holds and returns the logits after the last of them.
    ///
    /// # Panics
    /// If the sequence grows beyond the model's context: callers stop before.
    pub fn extend(&self, ids: &[u32], cache: &mut KvCache<D>) -> Vec<D::Elem> {
        self.extend_routed(ids, cache).0
    }

    /// As [`Model::extend`], with the routing of `ids` in the order of the adapters.
    ///
    /// # Panics
    /// As [`Model::extend`].
    pub fn extend_routed(
        &self,
        ids: &[u32],
        cache: &mut KvCache<D>,
    ) -> (Vec<D::Elem>, Routings<D>) {
        let (n, start) = (ids.len(), cache.len());
        assert!(n > 0 && start + n <= self.context, "sequence of {} tokens", start + n);
        let positions: Vec<u32> = (start as u32..(start + n) as u32).collect();
        let span = Span { q_start: 0, q_len: n, k_start: 0, k_len: start + n };
        let mut x = self.embed(ids);
        let mode = Mode { decoding: n == 1, ..Mode::plain() };
        let mut routing = Vec::new();
        for b in 0..self.spec.blocks {
            let shape = self.shape_of(vec![span], b);
            routing.extend(self.block_extend(b, &mut x, &shape, &positions, mode, cache));
        }
        cache.grow(n);
        let hidden = self.spec.hidden;
        let last = View::new(&x, n * hidden).at((n - 1) * hidden..n * hidden);
        let last = self.device.copy(last);
        (self.logits_of(&last, 1), routing)
    }

    /// An empty cache for this model's context.
    pub fn cache(&self) -> KvCache<D> {
        let width = self.spec.kv_heads * self.spec.head_dim;
        KvCache::new(&self.device, self.spec.blocks, self.context, width)
    }

    /// Inputs and outputs of a linear map.
    fn widths(&self, proj: Proj) -> (usize, usize) {
        let (d_out, d_in) = self.spec.shape(proj);
        (d_in, d_out)
    }
}
