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
use crate::{Dtype, Float, HostMatrix, MatrixRef, team};

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
        let x = Strided::new(x, n, d_in);
        #[cfg(target_arch = "x86_64")]
        if let Some((words, b)) = self.packed(w, n) {
            let a = x.cast().and_then(Operand::rows_of).expect("rows of f32");
            let (c, bias) = (StridedMut::new(y, n, d_out).cast(), bias.map(bytemuck::cast_slice));
            return packed::product(words, 1.0, a, b, bias, c.expect("f32"), accumulate);
        }
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
            let dy = Strided::new(dy, n, d_out).cast();
            let a = dy.and_then(Operand::rows_of).expect("rows of f32");
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
    use crate::View;
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
