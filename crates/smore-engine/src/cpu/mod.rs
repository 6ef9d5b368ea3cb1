//! The CPU as a [`Device`]: buffers are vectors, work is split over threads ([`crate::team`]).
//!
//! Results do not depend on the number of threads: work is cut into pieces whose size depends on
//! the shapes alone, and every sum has a fixed order.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod dots;
mod dropout;
mod elementwise;
mod embedding;
mod few;
mod gated;
mod gemm;
mod kept;
mod linear;
mod loss;
mod norm;
mod optimizer;
#[cfg(target_arch = "x86_64")]
mod packed;
#[cfg(target_arch = "x86_64")]
mod packing;
mod rotary;
mod rows;
mod simd;
#[cfg(target_arch = "x86_64")]
mod small;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
mod tiling;

pub use few::chosen_rows;
pub use gemm::{Strided, StridedMut, gemm};
pub use kept::Kept;
pub use loss::logit_rows;
pub use simd::{dispatch, dot, simd};

use crate::{
    AdamW, AttentionShape, CrossEntropy, Device, Dropout, Dtype, Float, GateActivation, HostMatrix,
    Mat, MatMut, MatrixRef, RmsNorm, Slopes, Term, View, ViewMut, team,
};
use std::marker::PhantomData;

/// The CPU, computing in `T`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu<T> {
    mixed: bool,
    numbers: PhantomData<T>,
}

impl<T> Cpu<T> {
    /// The machine's CPU, with all products in `T`.
    pub fn new() -> Self {
        Self { mixed: false, numbers: PhantomData }
    }
}

/// Whether products are computed by a matrix unit (Intel's AMX): those in bf16, and those in f32 with 64 rows
/// or more, whose factors it takes as sums of three in bf16.
pub fn matrix_unit() -> bool {
    #[cfg(target_arch = "x86_64")]
    return packed::available(packing::Words::Thirds);
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl Cpu<f32> {
    /// As [`Cpu::new`], but what waits for the backward pass is kept in bf16, and products have factors
    /// of 16 bits where this processor multiplies those faster ([`Cpu::factors`]). Products with few
    /// tokens stay in f32 all the same.
    pub fn mixed() -> Self {
        Self { mixed: true, numbers: PhantomData }
    }

    /// What factors of products are rounded to here. Sums of those in bf16 are in f32, and where there is a
    /// matrix unit small products have such factors, too. Those in f16 are
    /// scaled by powers of two, one for each line of an operand, so that f16's range suffices; up to 64
    /// products are summed in f16, and such sums in f32; attention's and other small products stay in f32.
    pub fn factors(self) -> Dtype {
        #[cfg(target_arch = "x86_64")]
        if self.mixed {
            return match packed::faster_than_wide() {
                Some(packing::Words::Pairs | packing::Words::Tiles) => Dtype::Bf16,
                Some(packing::Words::Halves) => Dtype::F16,
                Some(packing::Words::Wide | packing::Words::Thirds) | None => Dtype::F32,
            };
        }
        Dtype::F32
    }
}

impl<T: Float> Cpu<T> {
    /// The elements of a view.
    pub fn slice(view: View<'_, Self>) -> &[T] {
        &view.buf[view.start..view.start + view.len]
    }

    /// The elements of a view.
    pub fn slice_mut(view: ViewMut<'_, Self>) -> &mut [T] {
        &mut view.buf[view.start..view.start + view.len]
    }
}

/// Frozen weights stay in their storage type; products widen them piece by piece.
impl<T: Float> Device for Cpu<T> {
    type Elem = T;
    type Buf = Vec<T>;
    type Kept = Kept<T>;
    type Weight = HostMatrix;

    fn both<A: Send, B: Send>(
        &self,
        one: impl FnOnce() -> A + Send,
        other: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        team::both(one, other)
    }

    fn zeros(&self, len: usize) -> Vec<T> {
        elementwise::zeros(len)
    }

    fn unwritten(&self, len: usize) -> Vec<T> {
        elementwise::unwritten(len)
    }

    fn copy(&self, view: View<Self>) -> Vec<T> {
        Self::slice(view).to_vec()
    }

    fn keep(&self, buf: Vec<T>) -> Kept<T> {
        if self.mixed { kept::halves(&buf) } else { Kept::Whole(buf) }
    }

    fn keep_copy(&self, view: View<Self>) -> Kept<T> {
        let x = Self::slice(view);
        if self.mixed { kept::halves(x) } else { Kept::Whole(x.to_vec()) }
    }

    fn recall(&self, kept: Kept<T>) -> Vec<T> {
        kept.recall()
    }

    fn upload(&self, host: &[T]) -> Vec<T> {
        host.to_vec()
    }

    fn download(&self, view: View<Self>) -> Vec<T> {
        Self::slice(view).to_vec()
    }

    fn write(&self, view: ViewMut<Self>, host: &[T]) {
        Self::slice_mut(view).copy_from_slice(host);
    }

    fn clear(&self, view: ViewMut<Self>) {
        elementwise::clear(Self::slice_mut(view));
    }

    fn len(&self, buf: &Vec<T>) -> usize {
        buf.len()
    }

    fn weight(&self, host: HostMatrix) -> HostMatrix {
        host
    }

    fn halved(
        &self,
        w: MatrixRef<Self>,
        values: View<Self>,
        rows: usize,
        cols: usize,
    ) -> Option<HostMatrix> {
        let MatrixRef::Frozen(w) = w else { return None };
        let both = w.dtype != Dtype::F32 && size_of::<T>() == size_of::<f32>();
        let values = || bytemuck::cast_slice(Self::slice(values));
        both.then(|| HostMatrix::halved(rows, cols, values()))
    }

    fn weight_shape(&self, weight: &HostMatrix) -> (usize, usize) {
        (weight.rows, weight.cols)
    }

    fn gemm(&self, alpha: f64, a: Mat<Self>, b: Mat<Self>, beta: f64, c: MatMut<Self>) {
        let (a, b) = (gemm::operand(&a), gemm::operand(&b));
        let (rows, cols, row_stride) = (c.rows, c.cols, c.row_stride);
        let data = Self::slice_mut(c.view);
        let c = StridedMut { data, rows, cols, row_stride };
        gemm::product(self.mixed, T::from_f64(alpha), a, b, T::from_f64(beta), c);
    }

    fn linear(
        &self,
        x: View<Self>,
        w: MatrixRef<Self>,
        bias: Option<View<Self>>,
        y: ViewMut<Self>,
        n: usize,
        accumulate: bool,
    ) {
        let bias = bias.map(Self::slice);
        self.forward(Self::slice(x), &w, bias, Self::slice_mut(y), n, accumulate);
    }

    fn linear_backward(
        &self,
        dy: View<Self>,
        w: MatrixRef<Self>,
        dx: ViewMut<Self>,
        n: usize,
        accumulate: bool,
    ) {
        self.backward(Self::slice(dy), &w, Self::slice_mut(dx), n, accumulate);
    }

    fn linear_sum(&self, terms: [Term<Self>; 2], y: ViewMut<Self>, n: usize, accumulate: bool) {
        self.forward_sum(&terms, Self::slice_mut(y), n, accumulate);
    }

    fn linear_backward_both(&self, dy: View<Self>, maps: [Slopes<Self>; 2], n: usize) {
        self.backward_both(Self::slice(dy), maps, n);
    }

    fn linear_gradients(&self, dy: View<Self>, x: View<Self>, to: ViewMut<Self>, n: usize) {
        if n == 0 {
            return;
        }
        let (d_out, d_in) = (dy.len / n, x.len / n);
        assert_eq!((dy.len, x.len, to.len), (n * d_out, n * d_in, d_out * (d_in + 1)), "shapes");
        let (dw, dbias) = Self::slice_mut(to).split_at_mut(d_out * d_in);
        let (dy, x) = (Self::slice(dy), Self::slice(x));
        let (dy, x) = (Strided::new(dy, n, d_out), Strided::new(x, n, d_in));
        gemm::gradients(self.mixed, dy, x, StridedMut::new(dw, d_out, d_in), dbias);
    }

    fn embedding(&self, ids: &[u32], table: MatrixRef<Self>, y: ViewMut<Self>) {
        embedding::forward(ids, &table, Self::slice_mut(y));
    }

    fn embedding_backward(&self, ids: &[u32], dy: View<Self>, dtable: ViewMut<Self>) {
        embedding::backward(ids, Self::slice(dy), Self::slice_mut(dtable));
    }

    fn rms_norm(
        &self,
        norm: RmsNorm,
        x: View<Self>,
        gain: View<Self>,
        y: ViewMut<Self>,
        inv_rms: ViewMut<Self>,
    ) {
        norm::forward(
            norm,
            Self::slice(x),
            Self::slice(gain),
            Self::slice_mut(y),
            Self::slice_mut(inv_rms),
        );
    }

    fn rms_norm_backward(
        &self,
        norm: RmsNorm,
        x: View<Self>,
        gain: View<Self>,
        inv_rms: View<Self>,
        dy: View<Self>,
        dx: ViewMut<Self>,
        dgain: Option<ViewMut<Self>>,
    ) {
        norm::backward(
            norm,
            Self::slice(x),
            Self::slice(gain),
            Self::slice(inv_rms),
            Self::slice(dy),
            Self::slice_mut(dx),
            dgain.map(Self::slice_mut),
        );
    }

    fn rotary(
        &self,
        x: ViewMut<Self>,
        table: View<Self>,
        positions: &[u32],
        head_dim: usize,
        inverse: bool,
    ) {
        rotary::rotate(Self::slice_mut(x), Self::slice(table), positions, head_dim, inverse);
    }

    fn attention(
        &self,
        shape: &AttentionShape,
        q: View<Self>,
        k: View<Self>,
        v: View<Self>,
        out: ViewMut<Self>,
        lse: ViewMut<Self>,
    ) {
        attention::forward(
            self.mixed,
            shape,
            Self::slice(q),
            Self::slice(k),
            Self::slice(v),
            Self::slice_mut(out),
            Self::slice_mut(lse),
        );
    }

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
    ) {
        let saved = attention::Saved {
            q: Self::slice(q),
            k: Self::slice(k),
            v: Self::slice(v),
            out: Self::slice(out),
            lse: Self::slice(lse),
        };
        attention::backward(
            self.mixed,
            shape,
            &saved,
            Self::slice(dout),
            Self::slice_mut(dq),
            Self::slice_mut(dk),
            Self::slice_mut(dv),
        );
    }

    fn gated(&self, act: GateActivation, gate: View<Self>, up: View<Self>, y: ViewMut<Self>) {
        gated::forward(act, Self::slice(gate), Self::slice(up), Self::slice_mut(y));
    }

    fn gated_backward(
        &self,
        act: GateActivation,
        dy: View<Self>,
        gate: ViewMut<Self>,
        up: ViewMut<Self>,
    ) {
        gated::backward(act, Self::slice(dy), Self::slice_mut(gate), Self::slice_mut(up));
    }

    fn gated_kept(&self, act: GateActivation, gate: &Kept<T>, up: &Kept<T>, y: ViewMut<Self>) {
        gated::forward_kept(act, gate, up, Self::slice_mut(y));
    }

    fn gated_kept_backward(
        &self,
        act: GateActivation,
        dy: View<Self>,
        gate: Kept<T>,
        up: Kept<T>,
    ) -> [Vec<T>; 2] {
        gated::backward_kept(act, Self::slice(dy), gate, up)
    }

    fn cross_entropy(
        &self,
        h: View<Self>,
        targets: &[(u32, u32)],
        head: MatrixRef<Self>,
        loss: CrossEntropy,
        dh: Option<ViewMut<Self>>,
        dhead: Option<ViewMut<Self>>,
    ) -> Vec<f64> {
        loss::cross_entropy(
            *self,
            Self::slice(h),
            targets,
            &head,
            loss,
            dh.map(Self::slice_mut),
            dhead.map(Self::slice_mut),
        )
    }

    fn soft_cap(&self, cap: f64, x: ViewMut<Self>) {
        elementwise::soft_cap(T::from_f64(cap), Self::slice_mut(x));
    }

    fn dropout(&self, dropout: Dropout, x: View<Self>, y: ViewMut<Self>) {
        dropout::add(dropout, Self::slice(x), Self::slice_mut(y));
    }

    fn add(&self, x: View<Self>, y: ViewMut<Self>) {
        elementwise::add(Self::slice(x), Self::slice_mut(y));
    }

    fn add_row(&self, row: View<Self>, y: ViewMut<Self>) {
        elementwise::add_row(Self::slice(row), Self::slice_mut(y), true);
    }

    fn sum_rows(&self, y: View<Self>, sum: ViewMut<Self>) {
        elementwise::sum_rows(Self::slice(y), Self::slice_mut(sum));
    }

    fn sum_squares(&self, x: View<Self>) -> f64 {
        elementwise::sum_squares(Self::slice(x))
    }

    fn scale_rows(&self, weights: View<Self>, x: ViewMut<Self>) {
        rows::scale(Self::slice(weights), Self::slice_mut(x));
    }

    fn row_dots(&self, x: View<Self>, y: View<Self>, dots: ViewMut<Self>) {
        rows::dots(Self::slice(x), Self::slice(y), Self::slice_mut(dots));
    }

    fn scale(&self, factor: f64, x: ViewMut<Self>) {
        elementwise::scale(T::from_f64(factor), Self::slice_mut(x));
    }

    fn adamw(
        &self,
        step: &AdamW,
        values: ViewMut<Self>,
        grads: View<Self>,
        m: ViewMut<Self>,
        v: ViewMut<Self>,
    ) {
        optimizer::adamw(
            step,
            Self::slice_mut(values),
            Self::slice(grads),
            Self::slice_mut(m),
            Self::slice_mut(v),
        );
    }
}
