//! y = x W^T over W in 16 bits on processors with AVX-512.
//!
//! The blocked product of Goto and van de Geijn (2008): a stretch of both operands is copied into the
//! order in which the innermost loop reads it. Weights are widened in that copy, so a wide matrix of
//! them never lies in memory. Every sum runs over its depth in one order, whatever the number of
//! threads and of tokens.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;

use rayon::prelude::*;

use crate::{Dtype, HostMatrix};

/// Rows and columns of the tile whose sums stay in registers: 24 of 32.
const ROWS: usize = 12;
const COLS: usize = 32;
const LANES: usize = 16;
/// Depth of a stretch. Longer ones pass over C less often; shorter ones keep panels nearer.
const DEPTH: usize = 512;
/// Outputs that a task packs: [DEPTH, WIDTH] fits in the second cache.
const WIDTH: usize = 128;

/// Whether this processor has what the product needs.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// C = A W^T, + C where `add`.
///
/// # Shapes
/// A `[m, w.cols]`, C `[m, w.rows]`
///
/// # Panics
/// If the shapes do not fit or the processor is not [`available`].
pub(super) fn product(a: &[f32], w: &HostMatrix, c: &mut [f32], m: usize, add: bool) {
    let (n, depth) = (w.rows, w.cols);
    assert_eq!((a.len(), c.len()), (m * depth, m * n), "shapes of a product");
    assert!(available(), "AVX-512");
    let mut packed = vec![0f32; m.next_multiple_of(ROWS) * DEPTH.min(depth)];
    let threads = rayon::current_num_threads();
    let width = n.div_ceil(threads).next_multiple_of(COLS).min(WIDTH);
    let out = Shared(c.as_mut_ptr());
    for first in (0..depth).step_by(DEPTH) {
        let steps = DEPTH.min(depth - first);
        packed.par_chunks_mut(ROWS * steps).enumerate().for_each(|(i, block)| {
            let rows = ROWS.min(m.saturating_sub(i * ROWS));
            if rows > 0 {
                // SAFETY: the processor has the instructions; `rows` rows from i ROWS on are in A, and
                // `steps` columns from `first` on.
                unsafe { pack_a(&a[i * ROWS * depth + first..], depth, rows, steps, block) };
            }
        });
        let add = add || first > 0;
        (0..n.div_ceil(width)).into_par_iter().for_each_init(Vec::new, |panels, task| {
            let from = task * width;
            let cols = width.min(n - from);
            panels.resize(cols.next_multiple_of(COLS) * steps, 0f32);
            for (j, panel) in panels.chunks_exact_mut(COLS * steps).enumerate() {
                // SAFETY: as above, for a part of W.
                unsafe { pack_w(w, first, from + j * COLS, panel) };
            }
            for (i, block) in packed.chunks(ROWS * steps).enumerate().take(m.div_ceil(ROWS)) {
                for (j, panel) in panels.chunks_exact(COLS * steps).enumerate() {
                    let (row, col) = (i * ROWS, from + j * COLS);
                    let (rows, cols) = (ROWS.min(m - row), COLS.min(n - col));
                    // SAFETY: the tile of `rows` x `cols` is inside C, and no other task has its
                    // columns.
                    unsafe { tile(block, panel, out.at(row * n + col), n, rows, cols, add) };
                }
            }
        });
    }
}

/// A pointer to what tasks write apart from each other.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

impl Shared {
    /// # Safety
    /// `index` is inside the slice it was made of.
    unsafe fn at(&self, index: usize) -> *mut f32 {
        // SAFETY: as promised by the caller.
        unsafe { self.0.add(index) }
    }
}

// SAFETY: tasks write disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

fn mask(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// C (+)= A B over one stretch, for at most [`ROWS`] x [`COLS`] elements of C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn tile(
    a: &[f32],
    b: &[f32],
    c: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    add: bool,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<COLS>().0) {
        // SAFETY: both halves are inside b.
        let b = unsafe { [_mm512_loadu_ps(b.as_ptr()), _mm512_loadu_ps(b.as_ptr().add(LANES))] };
        for r in 0..ROWS {
            let a = _mm512_set1_ps(a[r]);
            sums[r][0] = _mm512_fmadd_ps(a, b[0], sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(a, b[1], sums[r][1]);
        }
    }
    // Indexed by constants alone up to here, so that the sums stay in registers.
    let mut tile = [[[0f32; LANES]; 2]; ROWS];
    for r in 0..ROWS {
        // SAFETY: each half has LANES elements.
        unsafe {
            _mm512_storeu_ps(tile[r][0].as_mut_ptr(), sums[r][0]);
            _mm512_storeu_ps(tile[r][1].as_mut_ptr(), sums[r][1]);
        }
    }
    let masks = [mask(cols), mask(cols.saturating_sub(LANES))];
    for (r, halves) in tile.iter().enumerate().take(rows) {
        for (half, sums) in halves.iter().enumerate() {
            // SAFETY: masks keep to the columns of the tile; a pointer past them is not followed.
            unsafe {
                let at = c.wrapping_add(r * stride + half * LANES);
                let mut sum = _mm512_loadu_ps(sums.as_ptr());
                if add {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], at), sum);
                }
                _mm512_mask_storeu_ps(at, masks[half], sum);
            }
        }
    }
}

/// [rows, steps] out of A as `[steps, ROWS]`; rows that are missing stay what they are.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_a(a: &[f32], stride: usize, rows: usize, steps: usize, block: &mut [f32]) {
    for k in (0..steps).step_by(LANES) {
        let lanes = LANES.min(steps - k);
        let mut part = [_mm512_setzero_ps(); LANES];
        for (r, part) in part.iter_mut().enumerate().take(rows) {
            // SAFETY: the mask keeps to the stretch, which is inside A.
            *part = unsafe { _mm512_maskz_loadu_ps(mask(lanes), a[r * stride + k..].as_ptr()) };
        }
        transpose(&mut part);
        for (l, part) in part.iter().enumerate().take(lanes) {
            let to = &mut block[(k + l) * ROWS..(k + l + 1) * ROWS];
            // SAFETY: the mask keeps to `to`.
            unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask(ROWS), *part) };
        }
    }
}

/// The stretch from `first` on of the rows `col..` of W as `[steps, COLS]`, zeros beyond W.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_w(w: &HostMatrix, first: usize, col: usize, panel: &mut [f32]) {
    let steps = panel.len() / COLS;
    for half in 0..2 {
        let col = col + half * LANES;
        for k in (0..steps).step_by(LANES) {
            let lanes = LANES.min(steps - k);
            let mut part = [_mm512_setzero_ps(); LANES];
            for (j, part) in part.iter_mut().enumerate().take(w.rows.saturating_sub(col)) {
                // SAFETY: the row is one of W's and the stretch inside it.
                *part = unsafe { load(w, col + j, first + k, lanes) };
            }
            transpose(&mut part);
            for (l, part) in part.iter().enumerate().take(lanes) {
                let to = &mut panel[(k + l) * COLS + half * LANES..][..LANES];
                // SAFETY: `to` has that many elements.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), *part) };
            }
        }
    }
}

/// `lanes` elements of a row of W from `col` on.
///
/// # Safety
/// They are inside the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn load(w: &HostMatrix, row: usize, col: usize, lanes: usize) -> __m512 {
    let at = w.row_bytes(row, 1)[col * w.dtype.bytes()..].as_ptr();
    let mask = mask(lanes);
    // SAFETY: as promised by the caller; no load needs an alignment.
    unsafe {
        match w.dtype {
            Dtype::F32 => unreachable!("W has 16 bits"),
            Dtype::Bf16 => {
                let half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half))
            }
            Dtype::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
        }
    }
}

/// Transposes 16 x 16 elements.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: &mut [__m512; LANES]) {
    // Pairs of rows, then fours within 128 bits, then the 128-bit parts themselves.
    let mut fours = [_mm512_setzero_pd(); LANES];
    for i in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|r| rows[4 * i + r]);
        let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
        let (ab_hi, cd_hi) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
        let [ab, cd, ab_hi, cd_hi] = [ab, cd, ab_hi, cd_hi].map(|x| _mm512_castps_pd(x));
        fours[4 * i] = _mm512_unpacklo_pd(ab, cd);
        fours[4 * i + 1] = _mm512_unpackhi_pd(ab, cd);
        fours[4 * i + 2] = _mm512_unpacklo_pd(ab_hi, cd_hi);
        fours[4 * i + 3] = _mm512_unpackhi_pd(ab_hi, cd_hi);
    }
    for j in 0..4 {
        // Columns j, j + 4, j + 8, j + 12, four rows in each 128 bits.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| _mm512_castpd_ps(fours[4 * i + j]));
        let (ab, cd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        let (ab_odd, cd_odd) =
            (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        rows[j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        rows[j + 8] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
        rows[j + 4] = _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd);
        rows[j + 12] = _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.4).collect()
    }

    /// Beyond one stretch, one task and one tile, against sums in f64; and the same bits for any
    /// number of threads and wherever a row stands.
    #[test]
    fn agrees_with_the_definition_for_any_number_of_threads() {
        if !available() {
            return;
        }
        for (m, n, depth) in [(1, 1, 1), (30, 2 * WIDTH + 35, DEPTH + 17)] {
            let a = numbers(m * depth, 1);
            let w = HostMatrix::from_f32(n, depth, &numbers(n * depth, 2)).to_bf16();
            let mut wide = vec![0f64; n * depth];
            crate::cpu::linear::widen(&w, 0, &mut wide);
            let before = numbers(m * n, 3);
            let run = |threads: usize, rows: usize, add: bool| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = before[..rows * n].to_vec();
                pool.install(|| product(&a[..rows * depth], &w, &mut c, rows, add));
                c
            };
            let added = run(1, m, true);
            for i in 0..m {
                for j in 0..n {
                    let terms =
                        (0..depth).map(|k| f64::from(a[i * depth + k]) * wide[j * depth + k]);
                    let want = terms.sum::<f64>() + f64::from(before[i * n + j]);
                    assert!((f64::from(added[i * n + j]) - want).abs() < 1e-4);
                }
            }
            assert!(added == run(2, m, true) && added == run(5, m, true));
            let few = m.div_ceil(3);
            assert!(run(2, few, false) == run(1, m, false)[..few * n]);
        }
    }
}
