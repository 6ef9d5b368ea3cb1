//! y = x W^T over a frozen or trained W, and dx = dy W.

use super::Cpu;
use super::elementwise::add_row;
use super::few;
use super::gemm::{Strided, StridedMut, gemm};
#[cfg(target_arch = "x86_64")]
use super::packed;
#[cfg(target_arch = "x86_64")]
use super::packing::{Operand, Words};
use super::simd::simd;
#[cfg(target_arch = "x86_64")]
use super::tiles::Product;
use crate::{Dtype, Float, HostMatrix, MatrixRef, Slopes, Term, team};

/// Rows of W that are widened at a time. Every product packs x anew, so that few rows cost more
/// than the memory for many (docs/performance.md).
const PANEL_ROWS: usize = 1024;

impl<T: Float> Cpu<T> {
    /// y = x W^T + bias, + y where `accumulate`.
    pub(super) fn forward(
        self,
        x: &[T],
        w: &MatrixRef<Self>,
        bias: Option<&[T]>,
        y: &mut [T],
        n: usize,
        accumulate: bool,
    ) {
        let (d_out, d_in) = shape(w);
        assert_eq!((x.len(), y.len()), (n * d_in, n * d_out), "linear shapes");
        if n <= few::FEW_TOKENS {
            return few::forward(x, w, bias, y, n, accumulate);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some((words, b)) = self.packed(w, n) {
            let a = rows_of(x, n, d_in);
            let (c, bias) = (StridedMut::new(y, n, d_out).cast(), bias.map(bytemuck::cast_slice));
            return packed::product(words, 1.0, a, b, bias, c.expect("f32"), accumulate);
        }
        let x = Strided::new(x, n, d_in);
        let beta = if accumulate || bias.is_some() { T::ONE } else { T::ZERO };
        if let Some(bias) = bias {
            add_row(bias, y, accumulate);
        }
        for_panels(w, |first, panel| {
            let rows = panel.len() / d_in;
            let c = StridedMut::rows_apart(&mut y[first..], n, rows, d_out);
            gemm(true, T::ONE, x, Strided::new(panel, rows, d_in).t(), beta, c);
        });
    }

    /// dx = dy W, + dx where `accumulate`.
    pub(super) fn backward(
        self,
        dy: &[T],
        w: &MatrixRef<Self>,
        dx: &mut [T],
        n: usize,
        accumulate: bool,
    ) {
        let (d_out, d_in) = shape(w);
        assert_eq!((dy.len(), dx.len()), (n * d_out, n * d_in), "linear shapes");
        #[cfg(target_arch = "x86_64")]
        if let Some((words, b)) = self.packed(w, n) {
            let a = rows_of(dy, n, d_out);
            let c = StridedMut::new(dx, n, d_in).cast().expect("f32");
            return packed::product(words, 1.0, a, b.t(), None, c, accumulate);
        }
        for_panels(w, |first, panel| {
            let rows = panel.len() / d_in;
            let a = Strided::rows_apart(&dy[first..], n, rows, d_out);
            let c = StridedMut::new(dx, n, d_in);
            let beta = if accumulate || first > 0 { T::ONE } else { T::ZERO };
            gemm(true, T::ONE, a, Strided::new(panel, rows, d_in), beta, c);
        });
    }

    /// y = x W^T + bias, summed over two maps, + y where `accumulate`.
    pub(super) fn forward_sum(
        self,
        terms: &[Term<Self>; 2],
        y: &mut [T],
        n: usize,
        accumulate: bool,
    ) {
        #[cfg(target_arch = "x86_64")]
        if n > few::FEW_TOKENS
            && let Some((words, rights)) = self.tiled([&terms[0].w, &terms[1].w], n)
        {
            let d_out = rights[0].lines;
            let lefts = terms.each_ref().map(|term| {
                let d_in = shape(&term.w).1;
                assert_eq!((term.x.len, y.len()), (n * d_in, n * d_out), "linear shapes");
                rows_of(Self::slice(term.x), n, d_in)
            });
            let biases =
                terms.each_ref().map(|term| Some(bytemuck::cast_slice(Self::slice(term.bias?))));
            let both: Vec<f32>;
            let bias = match biases {
                [Some(one), Some(other)] => {
                    both = one.iter().zip(other).map(|(a, b): (&f32, &f32)| a + b).collect();
                    Some(&both[..])
                }
                [one, other] => one.or(other),
            };
            let c = StridedMut::new(y, n, d_out).cast().expect("f32");
            let product = Product { rights: &rights, scale: 1.0, bias, c, add: accumulate };
            return packed::products(words, &lefts, vec![product]);
        }
        let mut accumulate = accumulate;
        for term in terms {
            let bias = term.bias.map(Self::slice);
            self.forward(Self::slice(term.x), &term.w, bias, y, n, accumulate);
            accumulate = true;
        }
    }

    /// dx = dy W of two maps, + dx where added to.
    pub(super) fn backward_both(self, dy: &[T], maps: [Slopes<Self>; 2], n: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some((words, rights)) = self.tiled([&maps[0].w, &maps[1].w], n) {
            let rights = rights.map(Operand::t);
            let product = |(Slopes { dx, accumulate: add, .. }, right)| {
                let right: &Operand = right;
                let c = StridedMut::new(Self::slice_mut(dx), n, right.lines).cast().expect("f32");
                let rights = std::slice::from_ref(right);
                Product { rights, scale: 1.0, bias: None, c, add }
            };
            let products = maps.into_iter().zip(&rights).map(product).collect();
            return packed::products(words, &[rows_of(dy, n, rights[0].depth)], products);
        }
        for Slopes { w, dx, accumulate } in maps {
            self.backward(dy, &w, Self::slice_mut(dx), n, accumulate);
        }
    }

    /// The rows of both W where the matrix unit multiplies them with the same words of `n` others.
    #[cfg(target_arch = "x86_64")]
    fn tiled<'a>(
        self,
        [one, other]: [&MatrixRef<'a, Self>; 2],
        n: usize,
    ) -> Option<(Words, [Operand<'a>; 2])> {
        let (one, other) = (self.packed(one, n)?, self.packed(other, n)?);
        let alike = one.0 == other.0 && one.0.tiled().is_some();
        alike.then_some((one.0, [one.1, other.1]))
    }

    /// The rows of W where a kernel of our own multiplies them with `n` others, and in which words.
    #[cfg(target_arch = "x86_64")]
    fn packed<'a>(self, w: &MatrixRef<'a, Self>, n: usize) -> Option<(Words, Operand<'a>)> {
        if size_of::<T>() != size_of::<f32>() {
            return None;
        }
        let (rows, cols) = shape(w);
        let least = rows.min(cols).min(n);
        let (mixed, rows, trained) = match *w {
            MatrixRef::Frozen(host) => {
                let mixed = self.mixed && host.dtype == Dtype::Bf16;
                (mixed, Operand::rows_of_weight(host), false)
            }
            MatrixRef::Trained(view, rows, cols) => {
                let w = Strided::new(Cpu::slice(view), rows, cols).cast()?;
                (self.mixed, Operand::rows_of(w)?, true)
            }
        };
        let words = packed::words(mixed, n, least);
        if trained && least < packed::slim(words) {
            return None;
        }
        packed::available(words).then_some((words, rows))
    }
}

/// What [`Cpu::packed`] multiplies with.
#[cfg(target_arch = "x86_64")]
fn rows_of<T: Float>(x: &[T], n: usize, width: usize) -> Operand<'_> {
    Strided::new(x, n, width).cast().and_then(Operand::rows_of).expect("rows of f32")
}

pub(super) fn shape<T: Float>(w: &MatrixRef<Cpu<T>>) -> (usize, usize) {
    match w {
        MatrixRef::Frozen(w) => (w.rows, w.cols),
        MatrixRef::Trained(view, rows, cols) => {
            assert_eq!(view.len, rows * cols, "trained matrix");
            (*rows, *cols)
        }
    }
}

/// Calls `f(first row, rows as T)` over all of W: in one piece where it already lies in memory as
/// `T`, else panel by panel through a scratch buffer.
fn for_panels<T: Float>(w: &MatrixRef<Cpu<T>>, mut f: impl FnMut(usize, &[T])) {
    let host = match w {
        MatrixRef::Trained(view, ..) => return f(0, Cpu::slice(*view)),
        MatrixRef::Frozen(host) => host,
    };
    if let Some(all) = as_elements::<T>(host, 0, host.rows) {
        return f(0, all);
    }
    let mut scratch = vec![T::ZERO; PANEL_ROWS.min(host.rows) * host.cols];
    for first in (0..host.rows).step_by(PANEL_ROWS) {
        let rows = PANEL_ROWS.min(host.rows - first);
        let panel = &mut scratch[..rows * host.cols];
        team::each(panel.chunks_mut(16 * host.cols).enumerate(), |(i, chunk)| {
            widen(host, first + i * 16, chunk);
        });
        f(first, panel);
    }
}

/// The rows as they lie in the file, where the storage type is `T` and the bytes are aligned.
fn as_elements<T: Float>(w: &HostMatrix, first: usize, rows: usize) -> Option<&[T]> {
    let same = w.dtype == Dtype::F32 && size_of::<T>() == 4;
    same.then(|| bytemuck::try_cast_slice(w.row_bytes(first, rows)).ok()).flatten()
}

/// Writes the rows from `first` on into `out`, as many as fit.
pub(super) fn widen<T: Float>(w: &HostMatrix, first: usize, out: &mut [T]) {
    let bytes = w.row_bytes(first, out.len() / w.cols);
    simd!(match w.dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = T::from_f32(f32::from_le_bytes(*b));
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = T::from_f32(bf16(*b));
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = T::from_f32(f16(*b));
            }
        }
    });
}

#[inline(always)]
pub(super) fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Without branches, so that loops over it become vector code: the bits stand 112 exponents too low,
/// and a product puts normal and subnormal values right alike.
#[inline(always)]
pub(super) fn f16(bytes: [u8; 2]) -> f32 {
    let half = u32::from(u16::from_le_bytes(bytes));
    let magnitude = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{View, ViewMut};
    use std::sync::Arc;

    fn value(i: usize) -> f32 {
        ((i * 29) % 83) as f32 / 64.0 - 0.5
    }

    fn stored(rows: usize, cols: usize, dtype: Dtype, offset: usize) -> HostMatrix {
        let mut bytes = vec![0u8; offset];
        for i in 0..rows * cols {
            match dtype {
                Dtype::F32 => bytes.extend(value(i).to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(value(i)).to_le_bytes()),
                Dtype::Bf16 => bytes.extend(half::bf16::from_f32(value(i)).to_le_bytes()),
            }
        }
        HostMatrix::new(rows, cols, dtype, Arc::new(bytes), offset)
    }

    #[test]
    fn half_floats_widen_as_their_definition_says() {
        for bits in 0..=u16::MAX {
            let (ours, want) = (f16(bits.to_le_bytes()), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == want.to_bits() || ours.is_nan() && want.is_nan(), "{bits:x}");
        }
    }

    /// Alone, in a group, on one thread or three: the same bits.
    #[test]
    fn rows_give_the_same_bits_wherever_they_are_computed() {
        let (d_out, d_in) = (203, 77);
        let host = stored(d_out, d_in, Dtype::F32, 0);
        let mut w = vec![0f32; d_out * d_in];
        widen(&host, 0, &mut w);
        let x: Vec<f32> = (0..d_in).map(|i| value(i * 5 + 1)).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![0f32; d_out];
            let w = MatrixRef::Frozen(&host);
            pool.install(|| Cpu::new().forward(&x, &w, None, &mut y, 1, false));
            y
        };
        let all = run(1);
        assert!(all == run(3));
        let rows: Vec<usize> = (0..d_out).step_by(3).chain([7, 5]).collect();
        let mut some = vec![0f32; rows.len()];
        let len = w.len();
        for w in [MatrixRef::Frozen(&host), MatrixRef::Trained(View::new(&w, len), d_out, d_in)] {
            few::chosen_rows(w, &rows, &x, &mut some);
            assert!(rows.iter().zip(&some).all(|(&r, &y)| y == all[r]));
        }
    }

    /// For few and many tokens, depths that go together with the other map's and such that do not, on any number of
    /// threads with the same bits.
    #[test]
    fn two_maps_at_once_give_what_they_give_apart() {
        let values = |n: usize, by: usize| (0..n).map(|i| value(i * by + 3)).collect::<Vec<_>>();
        let apart = |a: &[f32], b: &[f32]| {
            let most = |x: &mut dyn Iterator<Item = f32>| x.fold(0f32, |most, x| most.max(x.abs()));
            most(&mut a.iter().zip(b).map(|(a, b)| a - b)) / most(&mut b.iter().copied())
        };
        for (device, allowed) in [(Cpu::new(), 2e-6), (Cpu::mixed(), 2e-6)] {
            for (n, d_in, rank, d_out) in
                [(3, 40, 8, 50), (70, 40, 8, 50), (70, 1300, 100, 90), (600, 1500, 130, 200)]
            {
                let w = stored(d_out, d_in, Dtype::Bf16, 0);
                let (x, h, dy) = (values(n * d_in, 7), values(n * rank, 5), values(n * d_out, 11));
                let (u, rows) = (values(d_out * rank, 13), [values(d_out, 3), values(d_out, 19)]);
                let maps = [
                    MatrixRef::Frozen(&w),
                    MatrixRef::Trained(View::new(&u, u.len()), d_out, rank),
                ];
                let inputs = [&x, &h];
                for (biases, accumulate) in [(0, false), (1, true), (2, true), (3, false)] {
                    let terms = [0, 1].map(|i| Term {
                        x: View::new(inputs[i], inputs[i].len()),
                        w: maps[i],
                        bias: (biases & (i + 1) > 0).then(|| View::new(&rows[i], d_out)),
                    });
                    let sum = |threads| {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                        let mut y = values(n * d_out, 17);
                        pool.unwrap().install(|| device.forward_sum(&terms, &mut y, n, accumulate));
                        y
                    };
                    let mut want = values(n * d_out, 17);
                    for (i, Term { x, w, bias }) in terms.iter().enumerate() {
                        let bias = bias.map(Cpu::slice);
                        let (x, more) = (Cpu::slice(*x), accumulate || i > 0);
                        device.forward(x, w, bias, &mut want, n, more);
                    }
                    let y = sum(1);
                    assert!(apart(&y, &want) < allowed, "{n} tokens: {}", apart(&y, &want));
                    assert!(y == sum(2) && y == sum(3), "{n} tokens on threads");

                    let both = |threads| {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                        let (mut dx, mut dh) = (x.clone(), h.clone());
                        let slopes = [
                            Slopes { w: maps[0], dx: ViewMut::new(&mut dx, x.len()), accumulate },
                            Slopes {
                                w: maps[1],
                                dx: ViewMut::new(&mut dh, h.len()),
                                accumulate: false,
                            },
                        ];
                        pool.unwrap().install(|| device.backward_both(&dy, slopes, n));
                        [dx, dh]
                    };
                    let mut want = [x.clone(), h.clone()];
                    device.backward(&dy, &maps[0], &mut want[0], n, accumulate);
                    device.backward(&dy, &maps[1], &mut want[1], n, false);
                    let slopes = both(1);
                    for (got, want) in slopes.iter().zip(&want) {
                        assert!(apart(got, want) < allowed, "{n} tokens: {}", apart(got, want));
                    }
                    assert!(slopes == both(2) && slopes == both(3), "{n} tokens on threads");
                }
            }
        }
    }

    /// With more outputs than inputs and fewer, in one pass over the tokens and in several, on any number of threads
    /// with the same bits.
    #[test]
    fn gradients_by_w_and_bias_are_those_of_their_definition() {
        use crate::Device;
        let values = |n: usize, by: usize| (0..n).map(|i| value(i * by + 3)).collect::<Vec<_>>();
        for (device, allowed) in [(Cpu::new(), 1e-5), (Cpu::mixed(), 1e-2)] {
            for (n, d_in, d_out) in
                [(3, 5, 7), (70, 16, 330), (1500, 40, 300), (70, 90, 24), (64, 600, 700)]
            {
                let (x, dy) = (values(n * d_in, 7), values(n * d_out, 11));
                let before = values(d_out * (d_in + 1), 5);
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let (mut to, len) = (before.clone(), before.len());
                    let (x, dy) = (View::new(&x, x.len()), View::new(&dy, dy.len()));
                    let target = ViewMut::new(&mut to, len);
                    pool.unwrap().install(|| device.linear_gradients(dy, x, target, n));
                    to
                };
                let got = run(1);
                let sum = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
                for o in 0..d_out {
                    let slope = |t: usize| f64::from(dy[t * d_out + o]);
                    let bias = d_out * d_in + o;
                    let want = f64::from(before[bias]) + sum(&slope);
                    assert!((f64::from(got[bias]) - want).abs() < 1e-4, "{n} tokens, sum {o}");
                    for i in 0..d_in {
                        let want = sum(&|t| slope(t) * f64::from(x[t * d_in + i]));
                        let at = o * d_in + i;
                        let far = f64::from(got[at]) - f64::from(before[at]) - want;
                        assert!(far.abs() < allowed * n as f64, "{n} tokens, {o}, {i}: {far}");
                    }
                }
                assert!(got == run(2) && got == run(3), "{n} tokens on threads");
            }
        }
    }

    /// Every dtype, token count, alignment and panel boundary against the definition in f64.
    #[test]
    fn agrees_with_the_definition() {
        let (d_out, d_in) = (PANEL_ROWS + 37, 19);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for (n, offset) in [(1, 0), (3, 1), (4, 2), (5, 3), (40, 8)] {
                let host = stored(d_out, d_in, dtype, offset);
                let mut w = vec![0f64; d_out * d_in];
                widen(&host, 0, &mut w);
                let x: Vec<f32> = (0..n * d_in).map(|i| value(i * 7 + 3)).collect();
                let bias: Vec<f32> = (0..d_out).map(|o| value(o * 3)).collect();
                let mut y = vec![1f32; n * d_out];
                Cpu::new().forward(&x, &MatrixRef::Frozen(&host), Some(&bias), &mut y, n, true);
                let mut own = vec![f32::NAN; n * d_out];
                Cpu::new().forward(&x, &MatrixRef::Frozen(&host), Some(&bias), &mut own, n, false);
                let mut dx = vec![2f32; n * d_in];
                Cpu::new().backward(&y, &MatrixRef::Frozen(&host), &mut dx, n, true);
                let mut alone = vec![f32::NAN; n * d_in];
                Cpu::new().backward(&y, &MatrixRef::Frozen(&host), &mut alone, n, false);
                for i in 0..n {
                    for o in 0..d_out {
                        let sum: f64 =
                            (0..d_in).map(|j| f64::from(x[i * d_in + j]) * w[o * d_in + j]).sum();
                        let sum = sum + f64::from(bias[o]);
                        assert!((f64::from(y[i * d_out + o]) - 1.0 - sum).abs() < 1e-5);
                        assert!((f64::from(own[i * d_out + o]) - sum).abs() < 1e-5);
                    }
                    for j in 0..d_in {
                        let sum: f64 =
                            (0..d_out).map(|o| f64::from(y[i * d_out + o]) * w[o * d_in + j]).sum();
                        assert!((f64::from(dx[i * d_in + j]) - 2.0 - sum).abs() < 1e-3);
                        assert!((f64::from(alone[i * d_in + j]) - sum).abs() < 1e-3);
                    }
                }
            }
        }
    }
}
