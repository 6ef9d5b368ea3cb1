//! Products of matrices that lie in a core's own cache, on processors with AVX-512.
//!
//! There a general product spends its time on laying out operands and on choosing how. Here A and C are
//! used where they lie, and so is B where its rows are contiguous; else B is transposed first. Every
//! sum runs over its depth in one order, whatever the shapes: a row's bits do not depend on the others.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;
use std::ops::Range;

use super::gemm::{Strided, StridedMut};
use super::packed::available;
use super::packing::{LANES, Operand, Powers, Stretch, Words, mask, pack_wide};
use crate::Scratch;

/// Columns at a time: four registers of sums for each row.
const WIDE: usize = 4 * LANES;
/// The most elements of B: half a second cache of 1 MiB.
const LARGEST: usize = 1 << 17;

/// Rows that are not worth a tile of more.
const FEW: usize = 4;
/// From this many rows on it pays to transpose B.
const ROWS: usize = 8;

/// Whether [`product`] takes such operands: A `[m, B's rows]`.
pub(super) fn serves(m: usize, b: &Strided<f32>) -> bool {
    let right = b.col_stride == 1 || (b.row_stride == 1 && m >= ROWS);
    available(Words::Wide) && right && b.rows * b.cols <= LARGEST
}

/// C = alpha A B + beta C on this thread; with beta = 0, C is not read.
///
/// # Panics
/// If the shapes do not fit each other or their slices, or [`serves`] does not hold.
pub(super) fn product(alpha: f32, a: Strided<f32>, b: Strided<f32>, beta: f32, c: StridedMut<f32>) {
    assert_eq!((a.rows, a.cols, b.cols), (c.rows, b.rows, c.cols), "shapes of a small product");
    assert!(serves(a.rows, &b), "operands of a small product");
    a.check();
    b.check();
    c.check();
    let (n, depth) = (c.cols, a.cols);
    let padded = n.next_multiple_of(LANES);
    let mut room = Scratch::<u32>::unwritten(if b.col_stride == 1 { 0 } else { depth * padded });
    let (right, stride) = if b.col_stride == 1 {
        (b.data.as_ptr(), b.row_stride)
    } else {
        let lines = Operand::rows_of(b.t()).expect("contiguous columns");
        let (words, stretch) = (&mut room, Stretch { first: 0, length: depth });
        for line in (0..if depth > 0 { n } else { 0 }).step_by(LANES) {
            // SAFETY: the processor has the instructions, `b` was checked, and there is room for
            // every line.
            unsafe {
                pack_wide(&lines, line, stretch, &mut words[line..], padded, LANES, &Powers::ONE);
            }
        }
        (room.as_ptr().cast::<f32>(), padded)
    };
    for col in (0..n).step_by(WIDE) {
        let cols = WIDE.min(n - col);
        let at = c.data.as_mut_ptr().wrapping_add(col);
        let part = Part {
            a,
            b: right.wrapping_add(col),
            stride,
            c: at,
            row_stride: c.row_stride,
            cols,
            alpha,
            beta,
        };
        // SAFETY: the processor has the instructions, and the operands were checked.
        unsafe {
            match cols {
                49.. => rows::<4, 6>(&part),
                33.. => rows::<3, 8>(&part),
                17.. => rows::<2, 12>(&part),
                _ => rows::<1, 12>(&part),
            }
        }
    }
}

/// At most [`WIDE`] columns of a product.
struct Part<'a> {
    a: Strided<'a, f32>,
    /// The first of B's columns, its rows `stride` apart.
    b: *const f32,
    stride: usize,
    /// The same of C.
    c: *mut f32,
    row_stride: usize,
    cols: usize,
    alpha: f32,
    beta: f32,
}

/// All rows, `R` at a time and the last few by themselves.
///
/// # Safety
/// The processor has the instructions, A was checked, and B and C have the rows and columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn rows<const V: usize, const R: usize>(part: &Part) {
    let m = part.a.rows;
    let whole = if m % R <= FEW { m - m % R } else { m };
    // SAFETY: as promised by the caller.
    unsafe {
        tiles::<V, R>(part, 0..whole);
        tiles::<V, FEW>(part, whole..m);
    }
}

/// Some rows, `R` at a time, in `V` registers each.
///
/// # Safety
/// As [`rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn tiles<const V: usize, const R: usize>(part: &Part, all: Range<usize>) {
    let a = &part.a;
    let mut masks = [0; V];
    for v in 0..V {
        masks[v] = mask(part.cols.saturating_sub(v * LANES));
    }
    let (alpha, beta) = (_mm512_set1_ps(part.alpha), _mm512_set1_ps(part.beta));
    for first in all.clone().step_by(R) {
        let rows = R.min(all.end - first);
        // Rows that are missing repeat the last one, and nobody takes their sums.
        let mut at = [a.data.as_ptr(); R];
        for r in 0..R {
            at[r] = at[r].wrapping_add((first + r.min(rows - 1)) * a.row_stride);
        }
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for k in 0..a.cols {
            let mut b = [_mm512_setzero_ps(); V];
            for v in 0..V {
                let at = part.b.wrapping_add(k * part.stride + v * LANES);
                // SAFETY: masks keep to the columns of B.
                b[v] = unsafe { _mm512_maskz_loadu_ps(masks[v], at) };
            }
            for r in 0..R {
                // SAFETY: an element of A.
                let a = _mm512_set1_ps(unsafe { *at[r].wrapping_add(k * a.col_stride) });
                for v in 0..V {
                    sums[r][v] = _mm512_fmadd_ps(a, b[v], sums[r][v]);
                }
            }
        }
        // Indexed by constants alone, so that the sums stay in registers.
        for r in 0..R {
            if r < rows {
                for v in 0..V {
                    let at = part.c.wrapping_add((first + r) * part.row_stride + v * LANES);
                    // SAFETY: masks keep to the columns of C.
                    unsafe {
                        let mut sum = _mm512_mul_ps(alpha, sums[r][v]);
                        if part.beta != 0.0 {
                            let before = _mm512_maskz_loadu_ps(masks[v], at);
                            sum = _mm512_fmadd_ps(beta, before, sum);
                        }
                        _mm512_mask_storeu_ps(at, masks[v], sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.4).collect()
    }

    fn strided(data: &[f32], rows: usize, cols: usize, turned: bool) -> Strided<'_, f32> {
        // Lines stand three elements apart.
        if turned {
            Strided::rows_apart(data, cols, rows, rows + 3).t()
        } else {
            Strided::rows_apart(data, rows, cols, cols + 3)
        }
    }

    fn serving() -> bool {
        available(Words::Wide)
    }

    /// Every width of a tile and beyond, tails of rows, both ways round, against sums in f64; what
    /// lies between C's rows stays.
    #[test]
    fn agrees_with_the_definition() {
        let shapes = [(1, 1, 1), (4, 16, 9), (5, 17, 3), (13, 33, 40), (21, 64, 16), (29, 130, 70)];
        let ways = [(false, false), (false, true), (true, false), (true, true)];
        let all = shapes.into_iter().flat_map(|s| ways.map(|w| (s, w)));
        for (((m, n, k), (left, right)), beta) in
            all.flat_map(|s| [0.0, 1.0, -0.5].map(|beta| (s, beta)))
        {
            let a = numbers((m + 3) * (k + 3), 1);
            let b = numbers((n + 3) * (k + 3), 2);
            let (a, b) = (strided(&a, m, k, left), strided(&b, k, n, right));
            if !serving() || !serves(m, &b) {
                continue;
            }
            let before =
                if beta == 0.0 { vec![f32::NAN; m * (n + 2)] } else { numbers(m * (n + 2), 3) };
            let mut c = before.clone();
            product(0.5, a, b, beta, StridedMut::rows_apart(&mut c, m, n, n + 2));
            for i in 0..m {
                for j in 0..n {
                    let at = |s: &Strided<f32>, r: usize, c: usize| {
                        f64::from(s.data[r * s.row_stride + c * s.col_stride])
                    };
                    let sum: f64 = (0..k).map(|l| at(&a, i, l) * at(&b, l, j)).sum();
                    let kept = if beta == 0.0 { 0.0 } else { beta * before[i * (n + 2) + j] };
                    let (want, got) = (0.5 * sum + f64::from(kept), c[i * (n + 2) + j]);
                    assert!((f64::from(got) - want).abs() < 1e-5, "{m} {n} {k}: {got} {want}");
                }
                let between = i * (n + 2) + n..(i + 1) * (n + 2);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&c[between.clone()]), bits(&before[between]));
            }
        }
    }

    #[test]
    fn no_depth_leaves_a_share_of_what_was_there() {
        let mut c = [1.0f32, 2.0, 3.0];
        let (a, b) = (Strided::new(&[][..], 3, 0), Strided::new(&[][..], 0, 1));
        if serving() {
            product(1.0, a, b, 2.0, StridedMut::new(&mut c, 3, 1));
            assert_eq!(c, [2.0, 4.0, 6.0]);
        }
    }

    /// A row has the same bits wherever it stands and whatever stands around it.
    #[test]
    fn rows_do_not_depend_on_each_other() {
        let (k, n) = (33, 70);
        let (a, b) = (numbers(40 * k, 4), numbers(k * n, 5));
        let run = |first: usize, m: usize| {
            let mut c = vec![0f32; m * n];
            let (a, b) = (Strided::new(&a[first * k..], m, k), Strided::new(&b, k, n));
            product(1.0, a, b, 0.0, StridedMut::new(&mut c, m, n));
            c
        };
        if serving() {
            let all = run(0, 40);
            for (first, m) in [(0, 1), (3, 4), (7, 13), (11, 29)] {
                assert!(run(first, m) == all[first * n..(first + m) * n]);
            }
        }
    }
}
