//! Products with few tokens, as in decoding: every row of W is read once, widened in registers, and
//! meets all tokens there.

use super::Cpu;
#[cfg(target_arch = "x86_64")]
use super::dots;
use super::linear::{bf16, f16, shape};
use super::simd::simd;
use crate::{Dtype, Float, MatrixRef, team};

/// Up to this many tokens, reading W once by dot products beats a packed product.
pub(super) const FEW_TOKENS: usize = 4;
/// Rows that go together: as many streams from memory keep more of it busy than one, and each
/// piece of x is loaded once for all.
const GROUP: usize = 4;
/// How many bytes ahead of the sums rows that follow each other are asked for, at least.
const AHEAD: usize = 1 << 14;

/// y = x W^T + bias, + y where `accumulate`, for up to [`FEW_TOKENS`] tokens.
pub(super) fn forward<T: Float>(
    x: &[T],
    w: &MatrixRef<Cpu<T>>,
    bias: Option<&[T]>,
    y: &mut [T],
    n: usize,
    accumulate: bool,
) {
    /// Rows of a task at least and at most, where a row is short.
    const ROWS: [usize; 2] = [32, 256];
    /// Bytes of a task, so that handing it out costs little.
    const BYTES: usize = 1 << 16;
    let (d_out, d_in) = shape(w);
    let task = (BYTES / stored(w, 0, 1).0.len().max(1)).clamp(ROWS[0], ROWS[1]);
    // Outputs from `first` on, [rows, n].
    let products = |first: usize, out: &mut [T]| {
        let rows = out.len() / n;
        let (bytes, stored) = stored(w, first, rows);
        let width = bytes.len() / rows;
        let row = |r: usize| {
            let row = &bytes[r * width..(r + 1) * width];
            (row, row.as_ptr().wrapping_add((GROUP * width).max(AHEAD)))
        };
        let (fours, rest) = out.split_at_mut(rows / GROUP * GROUP * n);
        for (i, out) in fours.chunks_exact_mut(GROUP * n).enumerate() {
            group([0, 1, 2, 3].map(|r| row(i * GROUP + r)), stored, x, d_in, out);
        }
        for (i, out) in rest.chunks_exact_mut(n).enumerate() {
            group([row(rows / GROUP * GROUP + i)], stored, x, d_in, out);
        }
    };
    let write = |y: &mut T, o: usize, product: T| {
        let product = bias.map_or(product, |bias| product + bias[o]);
        *y = if accumulate { *y + product } else { product };
    };
    if n == 1 {
        team::each(y.chunks_mut(task).enumerate(), |(i, y)| {
            let mut sums = [T::ZERO; ROWS[1]];
            let sums = &mut sums[..y.len()];
            products(i * task, sums);
            for (r, (y, &sum)) in y.iter_mut().zip(sums.iter()).enumerate() {
                write(y, i * task + r, sum);
            }
        });
        return;
    }
    // [d_out, n]: each task owns consecutive outputs of all tokens.
    let mut transposed = vec![T::ZERO; d_out * n];
    let tasks = transposed.chunks_mut(task * n).enumerate();
    team::each(tasks, |(i, out)| products(i * task, out));
    for (o, column) in transposed.chunks_exact(n).enumerate() {
        for (i, &value) in column.iter().enumerate() {
            write(&mut y[i * d_out + o], o, value);
        }
    }
}

/// The products of one token with the rows of `w [.., d_in]` named by `rows`.
///
/// # Shapes
/// x `[d_in]`, out as long as `rows`
pub fn chosen_rows<T: Float>(w: MatrixRef<Cpu<T>>, rows: &[usize], x: &[T], out: &mut [T]) {
    /// Rows of a task: the 16 that a router reads are done sooner than a second thread wakes.
    const ROWS: usize = 32;
    assert_eq!(rows.len(), out.len(), "rows and their products");
    let d_in = x.len();
    assert_eq!(shape(&w).1, d_in, "inputs of chosen rows");
    team::each(out.chunks_mut(ROWS).zip(rows.chunks(ROWS)), |(out, rows)| {
        let row = |r: usize| stored(&w, r, 1);
        // Those of the next group; behind the last there is nothing worth asking for.
        let next = |i: usize| *rows.get(i + GROUP).unwrap_or(&rows[i]);
        let with_next = |i: usize| (row(rows[i]).0, row(next(i)).0.as_ptr());
        let stored = row(0).1;
        let (fours, rest) = out.as_chunks_mut::<GROUP>();
        for (i, out) in fours.iter_mut().enumerate() {
            group([0, 1, 2, 3].map(|r| with_next(i * GROUP + r)), stored, x, d_in, out);
        }
        let first = fours.len() * GROUP;
        for (i, out) in rest.iter_mut().enumerate() {
            group([with_next(first + i)], stored, x, d_in, std::slice::from_mut(out));
        }
    });
}

/// How rows lie in memory.
#[derive(Clone, Copy)]
enum Stored {
    /// As the numbers that are computed in.
    Own,
    /// As a file has them.
    As(Dtype),
}

/// Some rows of W.
fn stored<'a, T: Float>(
    w: &MatrixRef<'a, Cpu<T>>,
    first: usize,
    rows: usize,
) -> (&'a [u8], Stored) {
    match *w {
        MatrixRef::Trained(view, _, d_in) => {
            let rows = &Cpu::slice(view)[first * d_in..(first + rows) * d_in];
            let single = size_of::<T>() == size_of::<f32>();
            let stored = if single { Stored::As(Dtype::F32) } else { Stored::Own };
            (bytemuck::cast_slice(rows), stored)
        }
        MatrixRef::Frozen(host) => (host.row_bytes(first, rows), Stored::As(host.dtype)),
    }
}

/// The products of `R` rows with every token of `x [n, d_in]`: `out [R, n]`. Beside each row stands what is
/// read soon. Each sum has the same order whatever `R` and n are.
fn group<T: Float, const R: usize>(
    rows: [(&[u8], *const u8); R],
    stored: Stored,
    x: &[T],
    d_in: usize,
    out: &mut [T],
) {
    #[cfg(target_arch = "x86_64")]
    let next = rows.map(|(_, next)| next);
    let rows = rows.map(|(row, _)| row);
    #[cfg(target_arch = "x86_64")]
    if let (Stored::As(dtype), true) = (stored, size_of::<T>() == size_of::<f32>()) {
        let (x, out) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(out));
        if dots::group(rows, next, dtype, x, d_in, out) {
            return;
        }
    }
    let n = x.len() / d_in;
    for (row, out) in rows.into_iter().zip(out.chunks_exact_mut(n)) {
        simd!({
            for (x, out) in x.chunks_exact(d_in).zip(out) {
                *out = match stored {
                    Stored::Own => dot(bytemuck::cast_slice(row), x, |w| w),
                    Stored::As(Dtype::F32) => {
                        dot(row.as_chunks::<4>().0, x, |b| T::from_f32(f32::from_le_bytes(b)))
                    }
                    Stored::As(Dtype::Bf16) => {
                        dot(row.as_chunks::<2>().0, x, |b| T::from_f32(bf16(b)))
                    }
                    Stored::As(Dtype::F16) => {
                        dot(row.as_chunks::<2>().0, x, |b| T::from_f32(f16(b)))
                    }
                };
            }
        });
    }
}

/// Sum of the products of a row with x.
#[inline(always)]
fn dot<T: Float, E: Copy>(row: &[E], x: &[T], widen: impl Fn(E) -> T) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::ZERO; LANES];
    let (rows, row_rest) = row[..x.len()].as_chunks::<LANES>();
    let (xs, x_rest) = x.as_chunks::<LANES>();
    for (row, x) in rows.iter().zip(xs) {
        for i in 0..LANES {
            lanes[i] += widen(row[i]) * x[i];
        }
    }
    let rest: T = row_rest.iter().zip(x_rest).map(|(&w, &x)| widen(w) * x).sum();
    lanes.iter().copied().sum::<T>() + rest
}
