//! y = x W^T over a frozen or trained W, and dx = dy W.

use super::Cpu;
use super::gemm::{Strided, StridedMut, gemm};
use super::simd::{dot, simd};
use crate::{Dtype, Float, HostMatrix, MatrixRef};
use rayon::prelude::*;

/// Rows of W that are widened at a time. Every product packs x anew, so that few rows cost more
/// than the memory for many (docs/performance.md).
const PANEL_ROWS: usize = 1024;
/// Up to this many tokens, reading W once by dot products beats a packed product.
const FEW_TOKENS: usize = 4;

pub(super) fn forward<T: Float>(
    x: &[T],
    w: &MatrixRef<Cpu<T>>,
    y: &mut [T],
    n: usize,
    accumulate: bool,
) {
    let (d_out, d_in) = shape(w);
    assert_eq!((x.len(), y.len()), (n * d_in, n * d_out), "linear shapes");
    if n <= FEW_TOKENS {
        return few_tokens(x, w, y, n, accumulate);
    }
    let beta = if accumulate { T::ONE } else { T::ZERO };
    let x = Strided::new(x, n, d_in);
    for_panels(w, |first, panel| {
        let rows = panel.len() / d_in;
        let c = StridedMut::rows_apart(&mut y[first..], n, rows, d_out);
        gemm(true, T::ONE, x, Strided::new(panel, rows, d_in).t(), beta, c);
    });
}

pub(super) fn backward<T: Float>(dy: &[T], w: &MatrixRef<Cpu<T>>, dx: &mut [T], n: usize) {
    let (d_out, d_in) = shape(w);
    assert_eq!((dy.len(), dx.len()), (n * d_out, n * d_in), "linear shapes");
    for_panels(w, |first, panel| {
        let rows = panel.len() / d_in;
        let a = Strided::rows_apart(&dy[first..], n, rows, d_out);
        let c = StridedMut::new(dx, n, d_in);
        gemm(true, T::ONE, a, Strided::new(panel, rows, d_in), T::ONE, c);
    });
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
        panel.par_chunks_mut(16 * host.cols).enumerate().for_each(|(i, chunk)| {
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
    simd(|| match w.dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = T::from_f32(f32::from_le_bytes(*b));
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = T::from_f32(f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16));
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = T::from_f32(half::f16::from_le_bytes(*b).to_f32());
            }
        }
    });
}

/// Decoding: every row of W is read once and meets all tokens while it is in cache.
fn few_tokens<T: Float>(x: &[T], w: &MatrixRef<Cpu<T>>, y: &mut [T], n: usize, accumulate: bool) {
    const ROWS: usize = 32;
    let (d_out, d_in) = shape(w);
    // [d_out, n]: each task owns consecutive outputs of all tokens.
    let mut transposed = vec![T::ZERO; d_out * n];
    transposed.par_chunks_mut(ROWS * n).enumerate().for_each(|(task, out)| {
        let (first, rows) = (task * ROWS, out.len() / n);
        let mut scratch = Vec::new();
        let block: &[T] = match w {
            MatrixRef::Trained(view, ..) => &Cpu::slice(*view)[first * d_in..(first + rows) * d_in],
            MatrixRef::Frozen(host) => as_elements(host, first, rows).unwrap_or_else(|| {
                scratch.resize(rows * d_in, T::ZERO);
                widen(host, first, &mut scratch);
                &scratch
            }),
        };
        simd(|| {
            for (row, out) in block.chunks_exact(d_in).zip(out.chunks_exact_mut(n)) {
                for (x, out) in x.chunks_exact(d_in).zip(out) {
                    *out = dot(row, x);
                }
            }
        });
    });
    for (o, column) in transposed.chunks_exact(n).enumerate() {
        for (i, &value) in column.iter().enumerate() {
            let y = &mut y[i * d_out + o];
            *y = if accumulate { *y + value } else { value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                let mut y = vec![1f32; n * d_out];
                forward(&x, &MatrixRef::Frozen(&host), &mut y, n, true);
                let mut dx = vec![2f32; n * d_in];
                backward(&y, &MatrixRef::Frozen(&host), &mut dx, n);
                for i in 0..n {
                    for o in 0..d_out {
                        let sum: f64 =
                            (0..d_in).map(|j| f64::from(x[i * d_in + j]) * w[o * d_in + j]).sum();
                        assert!((f64::from(y[i * d_out + o]) - 1.0 - sum).abs() < 1e-5);
                    }
                    for j in 0..d_in {
                        let sum: f64 =
                            (0..d_out).map(|o| f64::from(y[i * d_out + o]) * w[o * d_in + j]).sum();
                        assert!((f64::from(dx[i * d_in + j]) - 2.0 - sum).abs() < 1e-3);
                    }
                }
            }
        }
    }
}
