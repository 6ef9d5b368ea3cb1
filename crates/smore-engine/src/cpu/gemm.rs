//! Matrix products behind checked, strided views of slices: ours where they serve, else the `gemm`
//! crate's.

use super::Cpu;
use super::elementwise;
#[cfg(target_arch = "x86_64")]
use super::{
    packed,
    packing::{Operand, Words},
    small,
};
use crate::{Float, Mat, team};
use std::ops::Range;

/// A matrix operand inside a slice.
#[derive(Clone, Copy)]
pub struct Strided<'a, T> {
    /// Element (0, 0) is `data[0]`.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a, T> Strided<'a, T> {
    /// `rows` x `cols`, rows one after the other.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// `rows` x `cols`, rows `row_stride` apart.
    pub fn rows_apart(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// The same in f32, if `T` is that.
    pub(super) fn cast(self) -> Option<Strided<'a, f32>>
    where
        T: Float,
    {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        let data = (size_of::<T>() == size_of::<f32>()).then(|| bytemuck::cast_slice(data))?;
        Some(Strided { data, rows, cols, row_stride, col_stride })
    }

    pub(super) fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.row_stride
            + self.cols.saturating_sub(1) * self.col_stride;
        assert!(
            self.rows == 0 || self.cols == 0 || last < self.data.len(),
            "matrix {}x{} reaches past its {} elements",
            self.rows,
            self.cols,
            self.data.len()
        );
    }
}

/// A matrix inside a slice that receives a product.
pub struct StridedMut<'a, T> {
    /// Element (0, 0) is `data[0]`.
    pub data: &'a mut [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
}

impl<'a, T> StridedMut<'a, T> {
    /// As [`Strided::cast`].
    pub(super) fn cast(self) -> Option<StridedMut<'a, f32>>
    where
        T: Float,
    {
        let Self { data, rows, cols, row_stride } = self;
        let data = (size_of::<T>() == size_of::<f32>()).then(|| bytemuck::cast_slice_mut(data))?;
        Some(StridedMut { data, rows, cols, row_stride })
    }

    pub(super) fn check(&self) {
        Strided::rows_apart(self.data, self.rows, self.cols, self.row_stride).check();
    }

    /// `rows` x `cols`, rows one after the other.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols }
    }

    /// `rows` x `cols`, rows `row_stride` apart.
    pub fn rows_apart(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }
}

pub(super) fn operand<'a, T: Float>(m: &Mat<'a, Cpu<T>>) -> Strided<'a, T> {
    Strided {
        data: Cpu::slice(m.view),
        rows: m.rows,
        cols: m.cols,
        row_stride: m.row_stride,
        col_stride: m.col_stride,
    }
}

/// Below this many multiplications one thread is faster than waking others.
const PARALLEL_FROM: usize = 1 << 18;

/// Rows and columns of a task.
const SIDE: usize = 256;

/// As [`gemm`] on several threads, in 16-bit words where `mixed` and those are faster here.
pub(super) fn product<T: Float>(
    mixed: bool,
    alpha: T,
    a: Strided<T>,
    b: Strided<T>,
    beta: T,
    c: StridedMut<T>,
) {
    #[cfg(target_arch = "x86_64")]
    if let least = a.rows.min(a.cols).min(b.cols)
        && let words = packed::words(mixed, a.rows, least)
        && least >= packed::slim(words)
        && packed::available(words)
        && let Some((left, right)) = operands(a, b, beta)
    {
        let (alpha, c) = (alpha.to_f64() as f32, c.cast().expect("f32"));
        return packed::product(words, alpha, left, right, None, c, beta == T::ONE);
    }
    let _ = mixed;
    gemm(true, alpha, a, b, beta, c);
}

/// dW += dy^T x and dbias += the sums over dy's columns, in one pass over dy where that is faster.
pub(super) fn gradients<T: Float>(
    mixed: bool,
    dy: Strided<T>,
    x: Strided<T>,
    dw: StridedMut<T>,
    dbias: &mut [T],
) {
    #[cfg(target_arch = "x86_64")]
    if let least = dy.rows.min(dy.cols).min(x.cols)
        && let words = packed::words(mixed, dy.cols, least)
        && least >= packed::slim(words)
        && packed::available(words)
        && words.tiled().is_some()
        && let Some((left, right)) = operands(dy.t(), x, T::ONE)
    {
        let (c, sums) = (dw.cast().expect("f32"), bytemuck::cast_slice_mut(dbias));
        if !packed::product_and_sums(words, left, right, c, sums) {
            elementwise::sum_rows(dy.data, dbias);
        }
        return;
    }
    product(mixed, T::ONE, dy.t(), x, T::ONE, dw);
    elementwise::sum_rows(dy.data, dbias);
}

/// As [`product`], on this thread alone, for operands of which both fit in its cache.
pub(super) fn product_here<T: Float>(
    mixed: bool,
    alpha: T,
    a: Strided<T>,
    b: Strided<T>,
    beta: T,
    c: StridedMut<T>,
) {
    #[cfg(target_arch = "x86_64")]
    if let words = packed::words(mixed, a.rows, a.rows.min(a.cols).min(b.cols))
        && !matches!(words, Words::Wide | Words::Thirds)
        && let Some((left, right)) = operands(a, b, beta)
    {
        let (alpha, c) = (alpha.to_f64() as f32, c.cast().expect("f32"));
        return packed::product_here(words, alpha, left, right, c, beta == T::ONE);
    }
    let _ = mixed;
    gemm(false, alpha, a, b, beta, c);
}

/// The operands of a product as the packed kernels take them, where they can.
#[cfg(target_arch = "x86_64")]
fn operands<'a, T: Float>(
    a: Strided<'a, T>,
    b: Strided<'a, T>,
    beta: T,
) -> Option<(Operand<'a>, Operand<'a>)> {
    if beta != T::ZERO && beta != T::ONE {
        return None;
    }
    Some((Operand::rows_of(a.cast()?)?, Operand::rows_of(b.t().cast()?)?))
}

/// C = alpha A B + beta C; with beta = 0, C is not read. `parallel` allows several threads; without
/// it, the operands are taken to lie in a core's own cache.
///
/// # Panics
/// If the shapes do not fit each other or their slices.
pub fn gemm<T: Float>(
    parallel: bool,
    alpha: T,
    a: Strided<T>,
    b: Strided<T>,
    beta: T,
    c: StridedMut<T>,
) {
    assert_eq!((a.rows, a.cols, b.cols), (c.rows, b.rows, c.cols), "gemm shapes");
    let (m, n, k) = (c.rows, c.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if !parallel
        && let (Some(a), Some(b)) = (a.cast(), b.cast())
        && small::serves(m, &b)
    {
        let (alpha, beta) = (alpha.to_f64() as f32, beta.to_f64() as f32);
        return small::product(alpha, a, b, beta, c.cast().expect("f32"));
    }
    a.check();
    b.check();
    c.check();
    let out = Shared(c.data.as_mut_ptr());
    let part = |rows: Range<usize>, cols: Range<usize>| {
        // SAFETY: the three checks above keep every element that the strides reach inside its slice, and
        // the borrow checker keeps C apart from A and B. `T` is f32 or f64, the only two `Float`s.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                k,
                out.at(rows.start * c.row_stride + cols.start),
                1,
                c.row_stride as isize,
                beta != T::ZERO,
                a.data.as_ptr().wrapping_add(rows.start * a.row_stride),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().wrapping_add(cols.start * b.col_stride),
                b.col_stride as isize,
                b.row_stride as isize,
                beta,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    };
    if !parallel || m * n * k < PARALLEL_FROM {
        return part(0..m, 0..n);
    }
    // Every task packs its own operands, which costs less the higher and wider it is.
    let side = |across: usize| if across < SIDE { SIDE / 2 } else { SIDE };
    let (rows, cols) = (side(n), side(m));
    let tasks =
        (0..m).step_by(rows).flat_map(|row| (0..n).step_by(cols).map(move |col| (row, col)));
    team::each(tasks, |(row, col)| part(row..m.min(row + rows), col..n.min(col + cols)));
}

/// A pointer to what tasks write apart from each other.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

impl<T> Shared<T> {
    pub(super) fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

// SAFETY: tasks write disjoint elements.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f64> {
        (0..n as u32).map(|i| f64::from((i * 37 + seed * 101) % 97) / 97.0 - 0.4).collect()
    }

    #[test]
    fn agrees_with_the_definition_on_strided_and_transposed_operands() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (64, 33, 70), (130, 128, 9), (300, 270, 20)] {
            let (lda, ldb, ldc) = (m + 2, n + 3, n + 1);
            let (a, b) = (numbers(k * lda, 1), numbers(k * ldb, 2));
            let mut c = numbers(m * ldc, 3);
            let before = c.clone();
            gemm(
                true,
                0.5,
                Strided::rows_apart(&a, k, m, lda).t(),
                Strided::rows_apart(&b, k, n, ldb),
                2.0,
                StridedMut::rows_apart(&mut c, m, n, ldc),
            );
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k).map(|l| a[l * lda + i] * b[l * ldb + j]).sum();
                    let want = 0.5 * sum + 2.0 * before[i * ldc + j];
                    assert!((c[i * ldc + j] - want).abs() < 1e-12);
                }
                assert_eq!(c[i * ldc + n..(i + 1) * ldc], before[i * ldc + n..(i + 1) * ldc]);
            }
        }
    }

    #[test]
    fn gives_the_same_bits_for_any_number_of_threads() {
        let a: Vec<f32> = numbers(300 * 500, 4).iter().map(|&x| x as f32).collect();
        let b: Vec<f32> = numbers(500 * 200, 5).iter().map(|&x| x as f32).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0f32; 300 * 200];
            pool.install(|| {
                gemm(
                    true,
                    1.0,
                    Strided::new(&a, 300, 500),
                    Strided::new(&b, 500, 200),
                    0.0,
                    StridedMut::new(&mut c, 300, 200),
                );
            });
            c
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3) && one == run(5));
    }
}
