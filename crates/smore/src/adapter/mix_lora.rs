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
//! token and expert once: expert by expert, on the rows of its tokens, some at a time, in memory
//! that is used again. Nothing as large as `n x k x intermediate` ever exists, and backward computes
//! h_e again.

use super::dropout::{Input, Stack};
use super::{Adapter, Mode};
use crate::config::GateKind;
use crate::init;
use crate::kernel::Routing;
use crate::layout::{ExpertFactors, MixLoraLayout, Param};
use crate::router::{Gate, flat};
use crate::spec::MixLoraSpec;
use crate::tree::TreeLayer;
use rand::Rng;
use smore_engine::{Device, Dropout, Mat, MatMut, MatrixRef, View, ViewMut};
use std::ops::Range;

/// Pairs of token and expert whose values are alive at once.
const PIECE: usize = 128;

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
        let stack = params.at(0..self.layout.stack_end);
        let z = self.stack().project(device, mode.dropout, stack, None, input.x);
        let logits = self.logits(device, View::new(&z, n * width));
        let mut routing = flat::route(self.gate(), balance_weight, &logits, mode.valid);
        if let Some(removed) = mode.removed {
            routing.tree.remove(removed.what);
        }
        device.clear(inner.rb());
        let pairs = Pairs::new(device, &routing.tree.layers[0], self.spec);
        let mut rows = Rows::new(device, &self.spec, pairs.nodes.len(), false);
        for piece in &pairs.pieces {
            let pass = Pass::new(self, device, mode, params, &pairs, piece);
            pass.hidden(&mut rows, View::new(&z, n * width), input);
            pass.forward(&mut rows, inner.rb(), y.rb());
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
        let mut rows = Rows::new(device, &self.spec, pairs.nodes.len(), true);
        for piece in &pairs.pieces {
            let pass = Pass::new(self, device, mode, params, &pairs, piece);
            pass.hidden(&mut rows, z, input);
            let dots = ViewMut::new(&mut dweights, n * fanout).at(piece.pairs.clone());
            pass.down_backward(&mut rows, dy, dinner, grads.rb(), dots);
            pass.gated_backward(&mut rows);
            pass.factors_backward(&mut rows, grads.rb(), ViewMut::new(&mut dz, n * width));
            if let Some(d) = &mut dinput {
                pass.scatter(&rows.gate, self.spec.intermediate, d.gate.rb());
                pass.scatter(&rows.up, self.spec.intermediate, d.up.rb());
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
        let (dz, stack) = (View::new(&dz, n * width), 0..self.layout.stack_end);
        let (map, dmap, dx) = (params.at(stack.clone()), grads.at(stack), dinput.map(|d| d.x));
        self.stack().backward(device, mode.dropout, map, input.x, dz, dmap, dx);
    }

    fn stack(&self) -> Stack {
        let rows = self.spec.stack_width();
        Stack { d_in: self.spec.hidden, rows, down: self.spec.logits() }
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
    /// At most [`PIECE`] pairs each, of one expert.
    pieces: Vec<Piece>,
}

struct Piece {
    expert: usize,
    pairs: Range<usize>,
}

impl<D: Device> Pairs<D> {
    fn new(device: &D, layer: &TreeLayer<D::Elem>, spec: MixLoraSpec) -> Self {
        let expert = |&node: &usize| usize::from(layer.expert_idx[node]);
        let mut nodes: Vec<usize> = (0..layer.expert_idx.len()).collect();
        // A stable sort: an expert's tokens stay in order.
        nodes.sort_by_key(expert);
        let mut pieces: Vec<Piece> = Vec::new();
        let of_experts = nodes.chunk_by(|a, b| expert(a) == expert(b));
        for piece in of_experts.flat_map(|nodes| nodes.chunks(PIECE)) {
            let start = pieces.last().map_or(0, |p| p.pairs.end);
            pieces.push(Piece { expert: expert(&piece[0]), pairs: start..start + piece.len() });
        }
        let weights: Vec<_> = nodes.iter().map(|&node| layer.gate_weight[node]).collect();
        Self {
            tokens: nodes.iter().map(|node| (node / spec.fanout) as u32).collect(),
            weights: device.upload(&weights),
            nodes,
            pieces,
        }
    }

    /// One number per pair, in the order of the tree.
    fn by_node(&self, values: &[D::Elem]) -> Vec<D::Elem> {
        let mut ordered = values.to_vec();
        for (&node, &value) in self.nodes.iter().zip(values) {
            ordered[node] = value;
        }
        ordered
    }
}

/// Values of the pairs at hand, one row per pair; those of the next take their place.
struct Rows<D: Device> {
    /// Rows of the stacked projection, `[m, stack_width]`, and slopes by them
    z: D::Buf,
    dz: D::Buf,
    /// g_e and u_e, in the end slopes by them; h_e and slopes by it: `[m, intermediate]`
    gate: D::Buf,
    up: D::Buf,
    inner: D::Buf,
    dinner: D::Buf,
    /// h_e without what is dropped in front of A_down, and slopes by it, `[m, intermediate]`
    dropped: D::Buf,
    /// A_down h_e, `[m, r]`, and slopes by it
    low: D::Buf,
    dlow: D::Buf,
    /// What is added to y or slopes by y, `[m, hidden]`
    y: D::Buf,
}

impl<D: Device> Rows<D> {
    fn new(device: &D, spec: &MixLoraSpec, pairs: usize, backward: bool) -> Self {
        let rows = |width: usize| device.zeros(pairs.min(PIECE) * width);
        let slopes = |width: usize| rows(if backward { width } else { 0 });
        Self {
            z: rows(spec.stack_width()),
            dz: slopes(spec.stack_width()),
            gate: rows(spec.intermediate),
            up: rows(spec.intermediate),
            inner: rows(spec.intermediate),
            dinner: slopes(spec.intermediate),
            // Given its room where there is dropout.
            dropped: device.zeros(0),
            low: rows(spec.rank),
            dlow: slopes(spec.rank),
            y: rows(spec.hidden),
        }
    }
}

/// One expert at work on m of its tokens.
struct Pass<'a, D: Device> {
    adapter: &'a MixLora,
    device: &'a D,
    params: View<'a, D>,
    expert: usize,
    tokens: &'a [u32],
    /// p_e of each token
    weights: View<'a, D>,
    /// On h_e in front of A_down
    dropout: Option<Dropout>,
}

impl<'a, D: Device> Pass<'a, D> {
    fn new(
        adapter: &'a MixLora,
        device: &'a D,
        mode: Mode,
        params: View<'a, D>,
        pairs: &'a Pairs<D>,
        piece: &Piece,
    ) -> Self {
        let weights = View::new(&pairs.weights, pairs.nodes.len()).at(piece.pairs.clone());
        let tokens = &pairs.tokens[piece.pairs.clone()];
        let first = piece.pairs.start * adapter.spec.intermediate;
        let dropout = mode.dropout.map(|d| d.from(Input::Inner, first));
        Self { adapter, device, params, expert: piece.expert, tokens, weights, dropout }
    }

    /// The rows in use.
    fn rows<'b>(&self, buf: &'b D::Buf, width: usize) -> View<'b, D> {
        View::new(buf, self.tokens.len() * width)
    }

    fn rows_mut<'b>(&self, buf: &'b mut D::Buf, width: usize) -> ViewMut<'b, D> {
        ViewMut::new(buf, self.tokens.len() * width)
    }

    fn mat<'b>(&self, buf: &'b D::Buf, width: usize) -> Mat<'b, D> {
        self.rows(buf, width).mat(self.tokens.len(), width)
    }

    fn mat_mut<'b>(&self, buf: &'b mut D::Buf, width: usize) -> MatMut<'b, D> {
        self.rows_mut(buf, width).mat(self.tokens.len(), width)
    }

    /// The tokens' rows of `all`, which are `width` wide.
    fn gather(&self, all: View<D>, width: usize, rows: &mut D::Buf) {
        let table = MatrixRef::Trained(all, all.len / width, width);
        self.device.embedding(self.tokens, table, self.rows_mut(rows, width));
    }

    /// Adds `rows` to the tokens' rows of `all`.
    fn scatter(&self, rows: &D::Buf, width: usize, all: ViewMut<D>) {
        self.device.embedding_backward(self.tokens, self.rows(rows, width), all);
    }

    /// Elements of the expert's A or B, of which the first expert's starts at `first`.
    fn factor(&self, first: usize, rows: usize, cols: usize) -> Range<usize> {
        let len = rows * cols;
        first + self.expert * len..first + (self.expert + 1) * len
    }

    /// First column of the expert's A x in the stacked projection.
    fn column(&self, factors: ExpertFactors) -> usize {
        factors.a / self.adapter.spec.hidden + self.expert * self.adapter.spec.rank
    }

    /// The expert's A x in rows of the stacked projection, `[m, r]`.
    fn projected<'b>(&self, factors: ExpertFactors, z: &'b D::Buf) -> Mat<'b, D> {
        let MixLoraSpec { rank, .. } = self.adapter.spec;
        let width = self.adapter.spec.stack_width();
        let z = self.rows(z, width);
        z.at(self.column(factors)..z.len).mat_strided(self.tokens.len(), rank, width)
    }

    /// g_e, u_e and h_e.
    fn hidden(&self, rows: &mut Rows<D>, z: View<D>, input: FfnInput<D>) {
        let MixLoraSpec { intermediate, rank, scale, .. } = self.adapter.spec;
        let layout = &self.adapter.layout;
        self.gather(z, self.adapter.spec.stack_width(), &mut rows.z);
        let maps = [
            (input.gate, layout.gate_proj, &mut rows.gate),
            (input.up, layout.up_proj, &mut rows.up),
        ];
        for (base, factors, out) in maps {
            self.gather(base, intermediate, out);
            if let Some(f) = factors {
                let b = self.params.at(self.factor(f.b, intermediate, rank));
                let (b, low) = (b.mat(intermediate, rank), self.projected(f, &rows.z));
                self.device.gemm(scale, low, b.t(), 1.0, self.mat_mut(out, intermediate));
            }
        }
        let (gate, up) = (self.rows(&rows.gate, intermediate), self.rows(&rows.up, intermediate));
        let act = self.adapter.spec.activation;
        self.device.gated(act, gate, up, self.rows_mut(&mut rows.inner, intermediate));
    }

    /// A_down h_e, of h_e with elements dropped where there is dropout.
    fn project_down(&self, factors: ExpertFactors, rows: &mut Rows<D>) {
        let MixLoraSpec { intermediate, rank, .. } = self.adapter.spec;
        let a = self.params.at(self.factor(factors.a, rank, intermediate)).mat(rank, intermediate);
        if let Some(dropout) = self.dropout {
            rows.dropped = self.device.zeros(self.tokens.len() * intermediate);
            let target = self.rows_mut(&mut rows.dropped, intermediate);
            self.device.dropout(dropout, self.rows(&rows.inner, intermediate), target);
        }
        let inner = if self.dropout.is_some() { &rows.dropped } else { &rows.inner };
        let inner = self.mat(inner, intermediate);
        self.device.gemm(1.0, inner, a.t(), 0.0, self.mat_mut(&mut rows.low, rank));
    }

    /// inner += p h_e and y += p s B_down A_down h_e.
    fn forward(&self, rows: &mut Rows<D>, inner: ViewMut<D>, y: ViewMut<D>) {
        let MixLoraSpec { hidden, intermediate, rank, scale, .. } = self.adapter.spec;
        if let Some(f) = self.adapter.layout.down_proj {
            self.project_down(f, rows);
            self.device.scale_rows(self.weights, self.rows_mut(&mut rows.low, rank));
            let b = self.params.at(self.factor(f.b, hidden, rank)).mat(hidden, rank);
            let target = self.mat_mut(&mut rows.y, hidden);
            self.device.gemm(scale, self.mat(&rows.low, rank), b.t(), 0.0, target);
            self.scatter(&rows.y, hidden, y);
        }
        self.device.scale_rows(self.weights, self.rows_mut(&mut rows.inner, intermediate));
        self.scatter(&rows.inner, intermediate, inner);
    }

    /// The backward pass of [`Pass::forward`]: slopes by h_e, and by p_e into `dweights [m]`, which
    /// holds zeros.
    fn down_backward(
        &self,
        rows: &mut Rows<D>,
        dy: View<D>,
        dinner: View<D>,
        mut grads: ViewMut<D>,
        mut dweights: ViewMut<D>,
    ) {
        let MixLoraSpec { hidden, intermediate, rank, scale, .. } = self.adapter.spec;
        let device = self.device;
        let by_weight = |rows: &mut D::Buf, width| {
            device.scale_rows(self.weights, self.rows_mut(rows, width));
        };
        self.gather(dinner, intermediate, &mut rows.dinner);
        let dinner = self.rows(&rows.dinner, intermediate);
        device.row_dots(dinner, self.rows(&rows.inner, intermediate), dweights.rb());
        by_weight(&mut rows.dinner, intermediate);
        let Some(f) = self.adapter.layout.down_proj else { return };
        let (a, b) = (self.factor(f.a, rank, intermediate), self.factor(f.b, hidden, rank));
        self.gather(dy, hidden, &mut rows.y);
        self.project_down(f, rows);
        let (dy, target) = (self.mat(&rows.y, hidden), self.mat_mut(&mut rows.dlow, rank));
        device.gemm(scale, dy, self.params.at(b.clone()).mat(hidden, rank), 0.0, target);
        device.row_dots(self.rows(&rows.dlow, rank), self.rows(&rows.low, rank), dweights);
        by_weight(&mut rows.low, rank);
        by_weight(&mut rows.dlow, rank);
        let (low, dlow) = (self.mat(&rows.low, rank), self.mat(&rows.dlow, rank));
        device.gemm(scale, dy.t(), low, 1.0, grads.rb().at(b).mat(hidden, rank));
        let inner = if self.dropout.is_some() { &rows.dropped } else { &rows.inner };
        let inner = self.mat(inner, intermediate);
        device.gemm(1.0, dlow.t(), inner, 1.0, grads.at(a.clone()).mat(rank, intermediate));
        let a = self.params.at(a).mat(rank, intermediate);
        let Some(dropout) = self.dropout else {
            return device.gemm(1.0, dlow, a, 1.0, self.mat_mut(&mut rows.dinner, intermediate));
        };
        device.gemm(1.0, dlow, a, 0.0, self.mat_mut(&mut rows.dropped, intermediate));
        let slopes = self.rows(&rows.dropped, intermediate);
        device.dropout(dropout, slopes, self.rows_mut(&mut rows.dinner, intermediate));
    }

    /// Slopes by g_e and u_e, in their place.
    fn gated_backward(&self, rows: &mut Rows<D>) {
        let width = self.adapter.spec.intermediate;
        self.device.gated_backward(
            self.adapter.spec.activation,
            self.rows(&rows.dinner, width),
            self.rows_mut(&mut rows.gate, width),
            self.rows_mut(&mut rows.up, width),
        );
    }

    /// Gradients of the factors B on the gate and up maps, and slopes by A x onto `dz`.
    fn factors_backward(&self, rows: &mut Rows<D>, mut grads: ViewMut<D>, dz: ViewMut<D>) {
        let MixLoraSpec { intermediate, rank, scale, .. } = self.adapter.spec;
        let (layout, width) = (&self.adapter.layout, self.adapter.spec.stack_width());
        let m = self.tokens.len();
        self.device.clear(self.rows_mut(&mut rows.dz, width));
        for (factors, d) in [(layout.gate_proj, &rows.gate), (layout.up_proj, &rows.up)] {
            let Some(f) = factors else { continue };
            let (b, d) = (self.factor(f.b, intermediate, rank), self.mat(d, intermediate));
            let db = grads.rb().at(b.clone()).mat(intermediate, rank);
            self.device.gemm(scale, d.t(), self.projected(f, &rows.z), 1.0, db);
            let target = self.rows_mut(&mut rows.dz, width).at(self.column(f)..m * width);
            let b = self.params.at(b).mat(intermediate, rank);
            self.device.gemm(scale, d, b, 0.0, target.mat_strided(m, rank, width));
        }
        self.scatter(&rows.dz, width, dz);
    }
}
