//! y = x W^T over a frozen or trained W, and dx = dy W.

use super::Cpu;
use super::gemm::{Strided, StridedMut, gemm};
#[cfg(target_arch = "x86_64")]
use super::packed;
use super::simd::simd;
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
    #[cfg(target_arch = "x86_64")]
    if let Some((x, w, y)) = packed_operands(x, w, y) {
        return packed::product(x, w, y, n, accumulate);
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

/// The operands of a product for which there is a kernel of our own: weights in 16 bits, on this
/// processor.
#[cfg(target_arch = "x86_64")]
fn packed_operands<'a, T: Float>(
    x: &'a [T],
    w: &'a MatrixRef<Cpu<T>>,
    y: &'a mut [T],
) -> Option<(&'a [f32], &'a HostMatrix, &'a mut [f32])> {
    let MatrixRef::Frozen(w) = w else { return None };
    if size_of::<T>() != size_of::<f32>() || w.dtype == Dtype::F32 || !packed::available() {
        return None;
    }
    Some((bytemuck::cast_slice(x), w, bytemuck::cast_slice_mut(y)))
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

/// Decoding: every row of W is read once, widened in registers, and meets all tokens while it is in
/// cache.
fn few_tokens<T: Float>(x: &[T], w: &MatrixRef<Cpu<T>>, y: &mut [T], n: usize, accumulate: bool) {
    const ROWS: usize = 32;
    let (d_out, d_in) = shape(w);
    // Outputs from `first` on, [rows, n].
    let products = |first: usize, out: &mut [T]| {
        let rows = out.len() / n;
        match w {
            MatrixRef::Trained(view, ..) => {
                let w = &Cpu::slice(*view)[first * d_in..(first + rows) * d_in];
                dot_rows(w, x, d_in, out, |w| w);
            }
            MatrixRef::Frozen(host) => dot_stored(host, first, x, out),
        }
    };
    if n == 1 {
        y.par_chunks_mut(ROWS).enumerate().for_each(|(i, y)| {
            let mut sums = [T::ZERO; ROWS];
            let sums = &mut sums[..y.len()];
            products(i * ROWS, sums);
            for (y, &sum) in y.iter_mut().zip(sums.iter()) {
                *y = if accumulate { *y + sum } else { sum };
            }
        });
        return;
    }
    // [d_out, n]: each task owns consecutive outputs of all tokens.
    let mut transposed = vec![T::ZERO; d_out * n];
    let tasks = transposed.par_chunks_mut(ROWS * n).enumerate();
    tasks.for_each(|(i, out)| products(i * ROWS, out));
    for (o, column) in transposed.chunks_exact(n).enumerate() {
        for (i, &value) in column.iter().enumerate() {
            let y = &mut y[i * d_out + o];
            *y = if accumulate { *y + value } else { value };
        }
    }
}

/// The products of one token with the rows of `w [.., d_in]` named by `rows`.
///
/// # Shapes
/// x `[d_in]`, out as long as `rows`
pub fn chosen_rows<T: Float>(w: &[T], rows: &[usize], x: &[T], out: &mut [T]) {
    /// Rows of a task: a router reads 16, and two threads are to share them.
    const ROWS: usize = 8;
    assert_eq!(rows.len(), out.len(), "rows and their products");
    let d_in = x.len();
    out.par_chunks_mut(ROWS).zip(rows.par_chunks(ROWS)).for_each(|(out, rows)| {
        let row = |r: usize| &w[r * d_in..(r + 1) * d_in];
        simd(|| {
            let (fours, rest) = rows.as_chunks::<GROUP>();
            let (out_fours, out_rest) = out.as_chunks_mut::<GROUP>();
            for (rows, out) in fours.iter().zip(out_fours) {
                *out = dot_group(rows.map(row), x, |w| w);
            }
            for (&r, out) in rest.iter().zip(out_rest) {
                [*out] = dot_group([row(r)], x, |w| w);
            }
        });
    });
}

/// [`dot_rows`] over the rows of `w` from `first` on.
fn dot_stored<T: Float>(w: &HostMatrix, first: usize, x: &[T], out: &mut [T]) {
    let d_in = w.cols;
    let bytes = w.row_bytes(first, out.len() * d_in / x.len());
    match w.dtype {
        Dtype::F32 => {
            let widen = |b| T::from_f32(f32::from_le_bytes(b));
            dot_rows(bytes.as_chunks::<4>().0, x, d_in, out, widen);
        }
        Dtype::Bf16 => dot_rows(bytes.as_chunks::<2>().0, x, d_in, out, |b| T::from_f32(bf16(b))),
        Dtype::F16 => dot_rows(bytes.as_chunks::<2>().0, x, d_in, out, |b| T::from_f32(f16(b))),
    }
}

/// Rows that go together: as many streams from memory keep more of it busy than one, and each
/// piece of x is loaded once for all.
const GROUP: usize = 4;

/// The products of every row of `w [rows, d_in]` with every token of `x [n, d_in]`:
/// `out [rows, n]`.
fn dot_rows<T: Float, E: Copy>(
    w: &[E],
    x: &[T],
    d_in: usize,
    out: &mut [T],
    widen: impl Fn(E) -> T + Copy,
) {
    let n = x.len() / d_in;
    simd(
        #[inline(always)]
        || {
            let groups = w.chunks(GROUP * d_in).zip(out.chunks_mut(GROUP * n));
            for (rows, out) in groups {
                for (i, x) in x.chunks_exact(d_in).enumerate() {
                    if rows.len() == GROUP * d_in {
                        let four = std::array::from_fn(|r| &rows[r * d_in..(r + 1) * d_in]);
                        let sums: [T; GROUP] = dot_group(four, x, widen);
                        for (r, sum) in sums.into_iter().enumerate() {
                            out[r * n + i] = sum;
                        }
                    } else {
                        for (r, row) in rows.chunks_exact(d_in).enumerate() {
                            [out[r * n + i]] = dot_group([row], x, widen);
                        }
                    }
                }
            }
        },
    );
}

/// Sums that a product is spread over.
const LANES: usize = 16;

/// The products of `R` rows with x; each sum has the same order whatever `R` is.
#[inline(always)]
fn dot_group<T: Float, E: Copy, const R: usize>(
    rows: [&[E]; R],
    x: &[T],
    widen: impl Fn(E) -> T + Copy,
) -> [T; R] {
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let parts = rows.map(|row| row[..x.len()].as_chunks::<LANES>());
    let lanes = match parts.first_chunk::<GROUP>() {
        Some(four) => {
            // Sums with names of their own stay in registers; an array of them, indexed by a loop,
            // was kept in memory and added to one number at a time.
            let [a, b, c, d] = four.map(|(chunks, _)| &chunks[..x_chunks.len()]);
            let (mut la, mut lb, mut lc, mut ld) =
                ([T::ZERO; LANES], [T::ZERO; LANES], [T::ZERO; LANES], [T::ZERO; LANES]);
            for (at, x) in x_chunks.iter().enumerate() {
                add_products(&mut la, &a[at], x, widen);
                add_products(&mut lb, &b[at], x, widen);
                add_products(&mut lc, &c[at], x, widen);
                add_products(&mut ld, &d[at], x, widen);
            }
            let four = [la, lb, lc, ld];
            std::array::from_fn(|r| four[r])
        }
        None => parts.map(|(chunks, _)| {
            let mut lanes = [T::ZERO; LANES];
            for (row, x) in chunks.iter().zip(x_chunks) {
                add_products(&mut lanes, row, x, widen);
            }
            lanes
        }),
    };
    std::array::from_fn(|r: usize| {
        let tail: T = parts[r].1.iter().zip(x_rest).map(|(&w, &x)| widen(w) * x).sum();
        lanes[r].iter().copied().sum::<T>() + tail
    })
}

#[inline(always)]
fn add_products<T: Float, E: Copy>(
    lanes: &mut [T; LANES],
    row: &[E; LANES],
    x: &[T; LANES],
    widen: impl Fn(E) -> T,
) {
    for i in 0..LANES {
        lanes[i] += widen(row[i]) * x[i];
    }
}

#[inline(always)]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Without branches, so that loops over it become vector code: the bits stand 112 exponents too low,
/// and a product puts normal and subnormal values right alike.
#[inline(always)]
fn f16(bytes: [u8; 2]) -> f32 {
    let half = u32::from(u16::from_le_bytes(bytes));
    let magnitude = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (half & 0x8000) << 16)
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
            pool.install(|| forward(&x, &MatrixRef::Frozen(&host), &mut y, 1, false));
            y
        };
        let all = run(1);
        assert!(all == run(3));
        let rows: Vec<usize> = (0..d_out).step_by(3).chain([7, 5]).collect();
        let mut some = vec![0f32; rows.len()];
        chosen_rows(&w, &rows, &x, &mut some);
        assert!(rows.iter().zip(&some).all(|(&r, &y)| y == all[r]));
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
