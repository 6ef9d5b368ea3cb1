//! The seam between model code and the machine: some thirty operations on device buffers.

use crate::{Float, HostMatrix, Mat, MatMut, View, ViewMut};

/// A machine that holds buffers and computes on them.
///
/// Operations that end in `_backward` *add* to the gradients they are given, so that a value used
/// twice collects both shares; forward operations overwrite. Both but where they say otherwise.
///
/// # Panics
/// Every operation panics when a shape does not fit: shapes are settled when a model is built, so
/// a mismatch here is our bug.
pub trait Device: Clone + Send + Sync + Sized + 'static {
    /// Scalar of every buffer.
    type Elem: Float;
    /// Memory on the device.
    type Buf: Send + Sync;
    /// Memory that holds a buffer from the forward to the backward pass.
    type Kept: Send + Sync;
    /// A frozen matrix, laid out as the device reads it best.
    type Weight: Send + Sync;

    /// Does two works that do not need each other, side by side where that is faster.
    fn both<A: Send, B: Send>(
        &self,
        one: impl FnOnce() -> A + Send,
        other: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        (one(), other())
    }

    /// A buffer of `len` zeros.
    fn zeros(&self, len: usize) -> Self::Buf;
    /// A buffer of `len` elements that the next operation overwrites: it holds anything, and NaN
    /// where debug assertions are on, so that whoever reads it first is found.
    fn unwritten(&self, len: usize) -> Self::Buf;
    /// A buffer with the same elements.
    fn copy(&self, view: View<Self>) -> Self::Buf;
    /// Puts a buffer away from the forward to the backward pass.
    fn keep(&self, buf: Self::Buf) -> Self::Kept;
    /// Puts a copy away.
    fn keep_copy(&self, view: View<Self>) -> Self::Kept;
    /// Fetches what was put away: the same elements, or those nearest in bf16 where the device is to
    /// compute in that.
    fn recall(&self, kept: Self::Kept) -> Self::Buf;
    /// A buffer holding `host`.
    fn upload(&self, host: &[Self::Elem]) -> Self::Buf;
    /// The elements of a view.
    fn download(&self, view: View<Self>) -> Vec<Self::Elem>;
    /// Overwrites a view with `host`, of the same length.
    fn write(&self, view: ViewMut<Self>, host: &[Self::Elem]);
    /// Sets every element to 0.
    fn clear(&self, view: ViewMut<Self>);
    /// Number of elements of a buffer.
    fn len(&self, buf: &Self::Buf) -> usize;

    /// Takes over a frozen matrix.
    fn weight(&self, host: HostMatrix) -> Self::Weight;
    /// A trained matrix rounded to 16 bits, to be read token by token beside `w`; `None` where `w` itself is
    /// held in more, or where the device computes in f64.
    fn halved(
        &self,
        w: MatrixRef<Self>,
        values: View<Self>,
        rows: usize,
        cols: usize,
    ) -> Option<Self::Weight>;
    /// `[rows, cols]` of a frozen matrix.
    fn weight_shape(&self, weight: &Self::Weight) -> (usize, usize);

    /// C = alpha A B + beta C. With beta = 0, C is not read.
    fn gemm(&self, alpha: f64, a: Mat<Self>, b: Mat<Self>, beta: f64, c: MatMut<Self>);

    /// y = x W^T + bias (+ y where `accumulate`).
    ///
    /// # Shapes
    /// x `[n, d_in]`, W `[d_out, d_in]`, bias `[d_out]`, y `[n, d_out]`
    fn linear(
        &self,
        x: View<Self>,
        w: MatrixRef<Self>,
        bias: Option<View<Self>>,
        y: ViewMut<Self>,
        n: usize,
        accumulate: bool,
    );

    /// dx = dy W (+ dx where `accumulate`).
    ///
    /// # Shapes
    /// dy `[n, d_out]`, W `[d_out, d_in]`, dx `[n, d_in]`
    fn linear_backward(
        &self,
        dy: View<Self>,
        w: MatrixRef<Self>,
        dx: ViewMut<Self>,
        n: usize,
        accumulate: bool,
    );

    /// [`Device::linear`] of two maps added up: y = x W^T + bias + x' W'^T + bias' (+ y where `accumulate`). A map
    /// and what an adapter adds to it, without y being read and written again.
    fn linear_sum(&self, terms: [Term<Self>; 2], mut y: ViewMut<Self>, n: usize, accumulate: bool) {
        let [one, other] = terms;
        self.linear(one.x, one.w, one.bias, y.rb(), n, accumulate);
        self.linear(other.x, other.w, other.bias, y, n, true);
    }

    /// [`Device::linear_backward`] of two maps with the same dy, which may be read once for both.
    fn linear_backward_both(&self, dy: View<Self>, maps: [Slopes<Self>; 2], n: usize) {
        for Slopes { w, dx, accumulate } in maps {
            self.linear_backward(dy, w, dx, n, accumulate);
        }
    }

    /// dW += dy^T x and dbias += the sums over dy's columns: gradients of [`Device::linear`] by W and by a bias that
    /// lies behind it.
    ///
    /// # Shapes
    /// dy `[n, d_out]`, x `[n, d_in]`, to `[d_out, d_in]` and `[d_out]`
    fn linear_gradients(&self, dy: View<Self>, x: View<Self>, to: ViewMut<Self>, n: usize);

    /// y_i = row `ids[i]` of the table.
    fn embedding(&self, ids: &[u32], table: MatrixRef<Self>, y: ViewMut<Self>);
    /// Adds row i of dy to row `ids[i]` of dtable.
    fn embedding_backward(&self, ids: &[u32], dy: View<Self>, dtable: ViewMut<Self>);

    /// y = x / sqrt(mean(x^2) + eps) * (offset + gain), row by row; the inverse root goes to
    /// `inv_rms [n]`.
    fn rms_norm(
        &self,
        norm: RmsNorm,
        x: View<Self>,
        gain: View<Self>,
        y: ViewMut<Self>,
        inv_rms: ViewMut<Self>,
    );
    /// Gradients of [`Device::rms_norm`] by x and, where wanted, by the gain.
    fn rms_norm_backward(
        &self,
        norm: RmsNorm,
        x: View<Self>,
        gain: View<Self>,
        inv_rms: View<Self>,
        dy: View<Self>,
        dx: ViewMut<Self>,
        dgain: Option<ViewMut<Self>>,
    );

    /// Rotates pairs (i, i + head_dim/2) of every head by the angle of its position, in place.
    /// `inverse` turns back, which is also the backward pass.
    ///
    /// # Shapes
    /// x `[positions.len(), heads * head_dim]`, `table` cos and sin for every position:
    /// `[max_position, 2, head_dim / 2]`
    fn rotary(
        &self,
        x: ViewMut<Self>,
        table: View<Self>,
        positions: &[u32],
        head_dim: usize,
        inverse: bool,
    );

    /// Causal attention with grouped queries; the log-sum-exp of each row's scores goes to `lse`.
    ///
    /// # Shapes
    /// q, out `[n_queries, heads * head_dim]`, k, v `[n_keys, kv_heads * head_dim]`,
    /// lse `[n_queries, heads]`
    fn attention(
        &self,
        shape: &AttentionShape,
        q: View<Self>,
        k: View<Self>,
        v: View<Self>,
        out: ViewMut<Self>,
        lse: ViewMut<Self>,
    );
    /// Gradients of [`Device::attention`]; the scores are computed again from q, k and `lse`.
    fn attention_backward(
        &self,
        shape: &AttentionShape,
        q: View<Self>,
        k: View<Self>,
        v: View<Self>,
        out: View<Self>,
        lse: View<Self>,
        dout: View<Self>,
        dq: ViewMut<Self>,
        dk: ViewMut<Self>,
        dv: ViewMut<Self>,
    );

    /// y = act(gate) * up
    fn gated(&self, act: GateActivation, gate: View<Self>, up: View<Self>, y: ViewMut<Self>);
    /// Gradients of [`Device::gated`], in the place of its inputs.
    fn gated_backward(
        &self,
        act: GateActivation,
        dy: View<Self>,
        gate: ViewMut<Self>,
        up: ViewMut<Self>,
    );

    /// As [`Device::gated`], of what was kept.
    fn gated_kept(&self, act: GateActivation, gate: &Self::Kept, up: &Self::Kept, y: ViewMut<Self>);
    /// Gradients of [`Device::gated_kept`] by gate and by up.
    fn gated_kept_backward(
        &self,
        act: GateActivation,
        dy: View<Self>,
        gate: Self::Kept,
        up: Self::Kept,
    ) -> [Self::Buf; 2];

    /// Cross-entropy of the output head at the rows that are trained, and its gradients.
    ///
    /// `targets` lists (row of h, target token). Returns the loss of each, in f64; see
    /// [`CrossEntropy`]. Where `dh` is given, adds `loss.scale` times the gradient of their sum,
    /// and likewise for `dhead`. Logits exist for a few rows at a time only.
    ///
    /// # Shapes
    /// h, dh `[n, d]`; head, dhead `[vocabulary, d]`
    fn cross_entropy(
        &self,
        h: View<Self>,
        targets: &[(u32, u32)],
        head: MatrixRef<Self>,
        loss: CrossEntropy,
        dh: Option<ViewMut<Self>>,
        dhead: Option<ViewMut<Self>>,
    ) -> Vec<f64>;

    /// x = cap tanh(x / cap)
    fn soft_cap(&self, cap: f64, x: ViewMut<Self>);
    /// y += dropout(x): elements are 0 or times 1 / (1 - rate). On slopes it is its own backward
    /// pass.
    fn dropout(&self, dropout: Dropout, x: View<Self>, y: ViewMut<Self>);
    /// y += x
    fn add(&self, x: View<Self>, y: ViewMut<Self>);
    /// Adds `row [d]` to every row of `y [n, d]`.
    fn add_row(&self, row: View<Self>, y: ViewMut<Self>);
    /// Adds the sum of the rows of `y [n, d]` to `sum [d]`.
    fn sum_rows(&self, y: View<Self>, sum: ViewMut<Self>);
    /// Sum of squares in f64, in an order that does not depend on the number of threads.
    fn sum_squares(&self, x: View<Self>) -> f64;
    /// x_i *= weights_i, row by row.
    ///
    /// # Shapes
    /// weights `[n]`, x `[n, d]`
    fn scale_rows(&self, weights: View<Self>, x: ViewMut<Self>);
    /// Adds x_i . y_i to dots_i, row by row: the slope by weights_i of [`Device::scale_rows`].
    ///
    /// # Shapes
    /// x, y `[n, d]`, dots `[n]`
    fn row_dots(&self, x: View<Self>, y: View<Self>, dots: ViewMut<Self>);
    /// x *= factor
    fn scale(&self, factor: f64, x: ViewMut<Self>);

    /// One AdamW step (Loshchilov & Hutter 2019): moments m and v, bias-corrected, decoupled decay.
    fn adamw(
        &self,
        step: &AdamW,
        values: ViewMut<Self>,
        grads: View<Self>,
        m: ViewMut<Self>,
        v: ViewMut<Self>,
    );
}

/// A matrix that is either frozen or trained.
pub enum MatrixRef<'a, D: Device> {
    /// Never gets a gradient; stored as the device likes.
    Frozen(&'a D::Weight),
    /// `[rows, cols]` elements of a buffer.
    Trained(View<'a, D>, usize, usize),
}

impl<D: Device> Clone for MatrixRef<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for MatrixRef<'_, D> {}

/// One of the linear maps of a sum.
pub struct Term<'a, D: Device> {
    /// Its input, `[n, d_in]`
    pub x: View<'a, D>,
    /// W `[d_out, d_in]`
    pub w: MatrixRef<'a, D>,
    /// `[d_out]`
    pub bias: Option<View<'a, D>>,
}

/// Slopes by the input of one of several linear maps.
pub struct Slopes<'a, D: Device> {
    /// W `[d_out, d_in]`
    pub w: MatrixRef<'a, D>,
    /// Where they go, `[n, d_in]`
    pub dx: ViewMut<'a, D>,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

/// Heads and spans of an attention call.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f64,
    /// Scores s become c tanh(s / c) before the softmax.
    pub soft_cap: Option<f64>,
    /// A query sees this many keys at most, the newest ones.
    pub window: Option<usize>,
    /// One entry per sequence; sequences never see each other.
    pub spans: Vec<Span>,
}

/// The rows of one sequence. Its last query sees all its keys, the one before all but one, ...
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First query row.
    pub q_start: usize,
    /// Query rows.
    pub q_len: usize,
    /// First key row.
    pub k_start: usize,
    /// Key rows, at least `q_len`.
    pub k_len: usize,
}

/// The numbers of an RMS norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Added to every gain: 1 where gains are stored as their distance from 1, as Gemma does.
    pub offset: f64,
}

/// The activation of a gated FFN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GateActivation {
    /// x sigmoid(x)
    #[default]
    Silu,
    /// GELU by its tanh approximation: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    GeluTanh,
}

/// The numbers of a cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// With c the logits are c tanh(z / c).
    pub soft_cap: Option<f64>,
    /// With e the loss is (1 - e) (-ln p(target)) + e mean_j (-ln p_j); from 0 to 1.
    pub label_smoothing: f64,
    /// Factor on gradients, not on losses.
    pub scale: f64,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { soft_cap: None, label_smoothing: 0.0, scale: 1.0 }
    }
}

/// Which elements of a buffer are dropped. The same numbers give the same elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Names the stream of random numbers.
    pub key: u64,
    /// Place in the stream of the first element.
    pub first: u64,
    /// Share that is dropped, from 0 to below 1.
    pub rate: f64,
}

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps done, this one included; 1 at first.
    pub step: u64,
}
