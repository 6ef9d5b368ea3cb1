//! MixLoRA (Li et al. 2024): the experts of an FFN are that FFN with LoRAs of their own, behind one
//! gate on its input.
//!
//! ```text
//! p    = top-k of softmax(R x), divided by its sum
//! g_e  = W_gate x + s B_gate,e A_gate,e x,   u_e likewise
//! h_e  = act(g_e) * u_e
//! FFN  = sum_e p_e (W_down h_e + s B_down,e A_down,e h_e)
//! ```
//!
//! W_down is linear, so it meets the mixture sum_e p_e h_e once: the caller's part, as are the base
//! products W_gate x and W_up x, which all experts share. What is left costs each chosen pair of
//! token and expert once: expert by expert, on the rows of its tokens. Nothing as large as
//! `n x E x intermediate` ever exists, and backward computes h_e again.

use super::{Adapter, Mode};
use crate::config::GateKind;
use crate::init;
use crate::kernel::Routing;
use crate::layout::{ExpertFactors, MixLoraLayout, Param};
use crate::router::{Gate, flat};
use crate::spec::MixLoraSpec;
use crate::tree::TreeLayer;
use rand::Rng;
use smore_engine::{Device, Mat, MatrixRef, View, ViewMut};
use std::ops::Range;

/// MixLoRA in one FFN.
pub struct MixLora {
    /// Its validated description.
    pub spec: MixLoraSpec,
    /// Where its parameters lie.
    pub layout: MixLoraLayout,
}

/// The stacked projection and the routing: the rest is computed again.
pub struct MixLoraSaved<D: Device> {
    /// A x of all experts and the router's logits, `[n, stack_width]`
    z: D::Buf,
    /// Experts of every token, statistics and balance loss.
    pub routing: Routing<D::Elem>,
}

/// What an FFN has computed when its experts take over.
pub struct FfnInput<'a, D: Device> {
    /// Input of the FFN, `[n, hidden]`.
    pub x: View<'a, D>,
    /// W_gate x, `[n, intermediate]`.
    pub gate: View<'a, D>,
    /// W_up x, `[n, intermediate]`.
    pub up: View<'a, D>,
}

impl<D: Device> Clone for FfnInput<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for FfnInput<'_, D> {}

/// Slopes by an [`FfnInput`], added to. The base maps' share of the slopes by x is the caller's.
pub struct FfnSlopes<'a, D: Device> {
    /// `[n, hidden]`
    pub x: ViewMut<'a, D>,
    /// `[n, intermediate]`
    pub gate: ViewMut<'a, D>,
    /// `[n, intermediate]`
    pub up: ViewMut<'a, D>,
}

impl MixLora {
    /// An adapter for `spec`; it holds no values.
    pub fn new(spec: MixLoraSpec) -> Self {
        Self { layout: MixLoraLayout::new(&spec), spec }
    }

    /// `inner` = sum_e p_e h_e, and y += sum_e p_e s B_down,e A_down,e h_e.
    ///
    /// # Shapes
    /// inner `[n, intermediate]`, y `[n, hidden]`
    pub fn forward<D: Device>(
        &self,
        device: &D,
        mode: Mode,
        params: View<D>,
        input: FfnInput<D>,
        mut inner: ViewMut<D>,
        mut y: ViewMut<D>,
    ) -> MixLoraSaved<D> {
        let MixLoraSpec { hidden, balance_weight, .. } = self.spec;
        let (n, width) = (input.x.len / hidden, self.spec.stack_width());
        let mut z = device.zeros(n * width);
        let stack = params.at(0..self.layout.stack_end).mat(width, hidden);
        let target = ViewMut::new(&mut z, n * width).mat(n, width);
        device.gemm(1.0, input.x.mat(n, hidden), stack.t(), 0.0, target);
        let logits = self.logits(device, View::new(&z, n * width));
        let routing = flat::route(self.gate(), balance_weight, &logits, mode.valid);
        device.clear(inner.rb());
        let pairs = Pairs::new(device, &routing.tree.layers[0], self.spec);
        for run in &pairs.runs {
            let pass = Pass { adapter: self, device, params, e: run.expert };
            let tokens = &pairs.tokens[run.range.clone()];
            let rows = pass.hidden(tokens, View::new(&z, n * width), input);
            pass.forward(tokens, pairs.weights(run), rows, inner.rb(), y.rb());
        }
        MixLoraSaved { z, routing }
    }

    /// Adds parameter gradients to `grads` and, where wanted, the input's to `dinput`, given
    /// dinner = W_down^T dy. The balance loss enters times `balance_scale`.
    ///
    /// # Shapes
    /// as in [`MixLora::forward`], dy like y, dinner like inner
    pub fn backward<D: Device>(
        &self,
        device: &D,
        mode: Mode,
        balance_scale: f64,
        params: View<D>,
        saved: &MixLoraSaved<D>,
        input: FfnInput<D>,
        dy: View<D>,
        dinner: View<D>,
        mut grads: ViewMut<D>,
        mut dinput: Option<FfnSlopes<D>>,
    ) {
        let MixLoraSpec { hidden, fanout, experts, .. } = self.spec;
        let (n, width) = (input.x.len / hidden, self.spec.stack_width());
        let z = View::new(&saved.z, n * width);
        let pairs = Pairs::new(device, &saved.routing.tree.layers[0], self.spec);
        let (mut dz, mut dweights) = (device.zeros(n * width), device.zeros(n * fanout));
        for run in &pairs.runs {
            let pass = Pass { adapter: self, device, params, e: run.expert };
            let tokens = &pairs.tokens[run.range.clone()];
            let rows = pass.hidden(tokens, z, input);
            let dots = ViewMut::new(&mut dweights, n * fanout).at(run.range.clone());
            let weights = pairs.weights(run);
            let dh = pass.down_backward(tokens, weights, &rows, dy, dinner, grads.rb(), dots);
            let (dgate, dup) = pass.gated_backward(&rows, dh);
            let dz = ViewMut::new(&mut dz, n * width);
            pass.factors_backward(tokens, &rows, &dgate, &dup, grads.rb(), dz);
            if let Some(d) = &mut dinput {
                pass.scatter(tokens, &dgate, d.gate.rb());
                pass.scatter(tokens, &dup, d.up.rb());
            }
        }
        let dweights = pairs.by_node(&device.download(View::new(&dweights, n * fanout)));
        let logits = self.logits(device, z);
        let (gate, routing) = (self.gate(), &saved.routing);
        let dlogits =
            flat::route_backward(gate, balance_scale, &logits, mode.valid, routing, &dweights);
        let dlogits = flat::among_zeros(&dlogits, width, self.spec.logits(), experts);
        let dlogits = device.upload(&dlogits);
        device.add(View::new(&dlogits, n * width), ViewMut::new(&mut dz, n * width));
        let dz = View::new(&dz, n * width).mat(n, width);
        let stack = 0..self.layout.stack_end;
        let dstack = grads.at(stack.clone()).mat(width, hidden);
        device.gemm(1.0, dz.t(), input.x.mat(n, hidden), 1.0, dstack);
        if let Some(d) = dinput {
            let stack = params.at(stack).mat(width, hidden);
            device.gemm(1.0, dz, stack, 1.0, d.x.mat(n, hidden));
        }
    }

    /// The switch gate, dividing by the sum also where one expert is chosen: its weight is then 1
    /// and the router learns from the balance loss alone, as in MoE-PEFT.
    fn gate(&self) -> Gate {
        let MixLoraSpec { experts, fanout, .. } = self.spec;
        Gate { kind: GateKind::Switch, experts, fanout, renormalised: true }
    }

    /// R x on the host, `[n, E]`.
    fn logits<D: Device>(&self, device: &D, z: View<D>) -> Vec<D::Elem> {
        let (width, first) = (self.spec.stack_width(), self.spec.logits());
        flat::columns(&device.download(z), width, first, self.spec.experts)
    }
}

impl Adapter for MixLora {
    fn params(&self) -> &[Param] {
        &self.layout.params
    }

    fn init(&self, rng: &mut impl Rng) -> Vec<f32> {
        init::mix_lora(&self.layout, rng)
    }
}

/// All pairs of token and chosen expert, by expert and then by token.
struct Pairs<D: Device> {
    /// Token of each pair.
    tokens: Vec<u32>,
    /// Place of each pair in the tree.
    nodes: Vec<usize>,
    /// Gate weight of each pair.
    weights: D::Buf,
    /// Experts that were chosen at all.
    runs: Vec<Run>,
}

/// The pairs of one expert.
struct Run {
    expert: usize,
    range: Range<usize>,
}

impl<D: Device> Pairs<D> {
    fn new(device: &D, layer: &TreeLayer<D::Elem>, spec: MixLoraSpec) -> Self {
        let expert = |&node: &usize| usize::from(layer.expert_idx[node]);
        let mut nodes: Vec<usize> = (0..layer.expert_idx.len()).collect();
        // A stable sort: an expert's tokens stay in order.
        nodes.sort_by_key(expert);
        let same = |a: &usize, b: &usize| expert(a) == expert(b);
        let runs = nodes.chunk_by(same).scan(0, |start, run| {
            let range = *start..*start + run.len();
            *start = range.end;
            Some(Run { expert: expert(&run[0]), range })
        });
        let weights: Vec<_> = nodes.iter().map(|&node| layer.gate_weight[node]).collect();
        Self {
            runs: runs.collect(),
            tokens: nodes.iter().map(|node| (node / spec.fanout) as u32).collect(),
            weights: device.upload(&weights),
            nodes,
        }
    }

    fn weights(&self, run: &Run) -> View<'_, D> {
        View::new(&self.weights, self.nodes.len()).at(run.range.clone())
    }

    /// One number per pair, in the order of the tree.
    fn by_node<T: Copy + Default>(&self, values: &[T]) -> Vec<T> {
        let mut ordered = vec![T::default(); values.len()];
        for (&node, &value) in self.nodes.iter().zip(values) {
            ordered[node] = value;
        }
        ordered
    }
}

/// What expert e makes of its m tokens.
struct Rows<D: Device> {
    m: usize,
    /// Rows of the stacked projection, `[m, stack_width]`
    z: D::Buf,
    /// g_e and u_e, `[m, intermediate]`
    gate: D::Buf,
    up: D::Buf,
    /// h_e, `[m, intermediate]`
    inner: D::Buf,
}

/// Expert e at work.
struct Pass<'a, D: Device> {
    adapter: &'a MixLora,
    device: &'a D,
    params: View<'a, D>,
    e: usize,
}

impl<D: Device> Pass<'_, D> {
    fn view<'b>(&self, buf: &'b D::Buf) -> View<'b, D> {
        View::new(buf, self.device.len(buf))
    }

    fn view_mut<'b>(&self, buf: &'b mut D::Buf) -> ViewMut<'b, D> {
        let len = self.device.len(buf);
        ViewMut::new(buf, len)
    }

    /// The tokens' rows of `all`, which are `width` wide.
    fn gather(&self, tokens: &[u32], all: View<D>, width: usize) -> D::Buf {
        let mut rows = self.device.zeros(tokens.len() * width);
        let table = MatrixRef::Trained(all, all.len / width, width);
        self.device.embedding(tokens, table, self.view_mut(&mut rows));
        rows
    }

    /// Adds `rows` to the tokens' rows of `all`.
    fn scatter(&self, tokens: &[u32], rows: &D::Buf, all: ViewMut<D>) {
        self.device.embedding_backward(tokens, self.view(rows), all);
    }

    /// A or B, whose first expert's starts at `first`.
    fn factor(&self, first: usize, rows: usize, cols: usize) -> Range<usize> {
        let len = rows * cols;
        first + self.e * len..first + (self.e + 1) * len
    }

    /// First column of A x in the stacked projection.
    fn column(&self, factors: ExpertFactors) -> usize {
        factors.a / self.adapter.spec.hidden + self.e * self.adapter.spec.rank
    }

    /// A x of this expert in rows of the stacked projection.
    fn projected<'b>(&self, factors: ExpertFactors, z: &'b D::Buf, m: usize) -> Mat<'b, D> {
        let MixLoraSpec { rank, .. } = self.adapter.spec;
        let (width, z) = (self.adapter.spec.stack_width(), self.view(z));
        z.at(self.column(factors)..z.len).mat_strided(m, rank, width)
    }

    /// g_e, u_e and h_e.
    fn hidden(&self, tokens: &[u32], z: View<D>, input: FfnInput<D>) -> Rows<D> {
        let MixLoraSpec { intermediate, rank, scale, .. } = self.adapter.spec;
        let (layout, m) = (&self.adapter.layout, tokens.len());
        let z = self.gather(tokens, z, self.adapter.spec.stack_width());
        let adapted = |base: View<D>, factors: Option<ExpertFactors>| {
            let mut rows = self.gather(tokens, base, intermediate);
            if let Some(f) = factors {
                let b = self.params.at(self.factor(f.b, intermediate, rank));
                let (b, low) = (b.mat(intermediate, rank), self.projected(f, &z, m));
                let target = self.view_mut(&mut rows).mat(m, intermediate);
                self.device.gemm(scale, low, b.t(), 1.0, target);
            }
            rows
        };
        let gate = adapted(input.gate, layout.gate_proj);
        let up = adapted(input.up, layout.up_proj);
        let mut inner = self.device.zeros(m * intermediate);
        let target = self.view_mut(&mut inner);
        let act = self.adapter.spec.activation;
        self.device.gated(act, self.view(&gate), self.view(&up), target);
        Rows { m, z, gate, up, inner }
    }

    /// A_down h_e, `[m, r]`.
    fn low(&self, factors: ExpertFactors, rows: &Rows<D>) -> D::Buf {
        let MixLoraSpec { intermediate, rank, .. } = self.adapter.spec;
        let a = self.params.at(self.factor(factors.a, rank, intermediate)).mat(rank, intermediate);
        let mut low = self.device.zeros(rows.m * rank);
        let target = self.view_mut(&mut low).mat(rows.m, rank);
        let inner = self.view(&rows.inner).mat(rows.m, intermediate);
        self.device.gemm(1.0, inner, a.t(), 0.0, target);
        low
    }

    /// inner += p h_e and y += p s B_down A_down h_e.
    fn forward(
        &self,
        tokens: &[u32],
        weights: View<D>,
        mut rows: Rows<D>,
        inner: ViewMut<D>,
        y: ViewMut<D>,
    ) {
        let MixLoraSpec { hidden, rank, scale, .. } = self.adapter.spec;
        if let Some(f) = self.adapter.layout.down_proj {
            let mut low = self.low(f, &rows);
            self.device.scale_rows(weights, self.view_mut(&mut low));
            let b = self.params.at(self.factor(f.b, hidden, rank)).mat(hidden, rank);
            let mut out = self.device.zeros(rows.m * hidden);
            let target = self.view_mut(&mut out).mat(rows.m, hidden);
            self.device.gemm(scale, self.view(&low).mat(rows.m, rank), b.t(), 0.0, target);
            self.scatter(tokens, &out, y);
        }
        self.device.scale_rows(weights, self.view_mut(&mut rows.inner));
        self.scatter(tokens, &rows.inner, inner);
    }

    /// The backward pass of [`Pass::forward`]: slopes by h_e, `[m, intermediate]`, and by the gate
    /// weights into `dweights [m]`, which holds zeros.
    fn down_backward(
        &self,
        tokens: &[u32],
        weights: View<D>,
        rows: &Rows<D>,
        dy: View<D>,
        dinner: View<D>,
        mut grads: ViewMut<D>,
        mut dweights: ViewMut<D>,
    ) -> D::Buf {
        let MixLoraSpec { hidden, intermediate, rank, scale, .. } = self.adapter.spec;
        let (device, m) = (self.device, rows.m);
        let mut dh = self.gather(tokens, dinner, intermediate);
        device.row_dots(self.view(&dh), self.view(&rows.inner), dweights.rb());
        device.scale_rows(weights, self.view_mut(&mut dh));
        let Some(f) = self.adapter.layout.down_proj else { return dh };
        let (a, b) = (self.factor(f.a, rank, intermediate), self.factor(f.b, hidden, rank));
        let dy = self.gather(tokens, dy, hidden);
        let dy = self.view(&dy).mat(m, hidden);
        let (mut low, mut dlow) = (self.low(f, rows), device.zeros(m * rank));
        let target = self.view_mut(&mut dlow).mat(m, rank);
        device.gemm(scale, dy, self.params.at(b.clone()).mat(hidden, rank), 0.0, target);
        device.row_dots(self.view(&dlow), self.view(&low), dweights);
        for rows in [&mut low, &mut dlow] {
            device.scale_rows(weights, self.view_mut(rows));
        }
        let (low, dlow) = (self.view(&low).mat(m, rank), self.view(&dlow).mat(m, rank));
        device.gemm(scale, dy.t(), low, 1.0, grads.rb().at(b).mat(hidden, rank));
        let inner = self.view(&rows.inner).mat(m, intermediate);
        device.gemm(1.0, dlow.t(), inner, 1.0, grads.at(a.clone()).mat(rank, intermediate));
        let target = self.view_mut(&mut dh).mat(m, intermediate);
        device.gemm(1.0, dlow, self.params.at(a).mat(rank, intermediate), 1.0, target);
        dh
    }

    /// Slopes by g_e and u_e.
    fn gated_backward(&self, rows: &Rows<D>, dh: D::Buf) -> (D::Buf, D::Buf) {
        let len = self.device.len(&dh);
        let (mut dgate, mut dup) = (self.device.zeros(len), self.device.zeros(len));
        let (gate, up, dh) = (self.view(&rows.gate), self.view(&rows.up), self.view(&dh));
        let targets = (ViewMut::new(&mut dgate, len), ViewMut::new(&mut dup, len));
        let act = self.adapter.spec.activation;
        self.device.gated_backward(act, gate, up, dh, targets.0, targets.1);
        (dgate, dup)
    }

    /// Gradients of the factors B on the gate and up maps, and slopes by A x onto `dz`.
    fn factors_backward(
        &self,
        tokens: &[u32],
        rows: &Rows<D>,
        dgate: &D::Buf,
        dup: &D::Buf,
        mut grads: ViewMut<D>,
        dz: ViewMut<D>,
    ) {
        let MixLoraSpec { intermediate, rank, scale, .. } = self.adapter.spec;
        let (layout, m, width) = (&self.adapter.layout, rows.m, self.adapter.spec.stack_width());
        let mut own = self.device.zeros(m * width);
        for (factors, d) in [(layout.gate_proj, dgate), (layout.up_proj, dup)] {
            let Some(f) = factors else { continue };
            let (b, d) = (self.factor(f.b, intermediate, rank), self.view(d).mat(m, intermediate));
            let db = grads.rb().at(b.clone()).mat(intermediate, rank);
            self.device.gemm(scale, d.t(), self.projected(f, &rows.z, m), 1.0, db);
            let target = self.view_mut(&mut own).at(self.column(f)..m * width);
            let b = self.params.at(b).mat(intermediate, rank);
            self.device.gemm(scale, d, b, 0.0, target.mat_strided(m, rank, width));
        }
        self.scatter(tokens, &own, dz);
    }
}
