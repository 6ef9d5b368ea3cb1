//! Products with frozen weights in 16 bits on processors with AVX-512: y = x W^T, and dx = dy W.
//!
//! The blocked product of Goto and van de Geijn (2008): a stretch of both operands is copied into the
//! order in which the innermost loop reads it (`packing`). Every sum runs over its depth in one order,
//! whatever the number of threads and of tokens.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;
use std::sync::LazyLock;

use rayon::prelude::*;

use super::packing::{COLS, LANES, ROWS, Right, Words, mask, pack_left, pack_right};
use crate::Dtype;

/// Words of depth in a stretch. Longer ones pass over C less often; shorter ones keep panels nearer.
const DEPTH: usize = 512;
/// Columns that a task packs: [DEPTH, WIDTH] words fit in the second cache.
const WIDTH: usize = 128;

/// The words for frozen weights of this kind on this processor, if any.
///
/// Pairs are for AMD, where one instruction takes twice the elements in the time of a multiply-add in
/// f32. On Intel it takes longer than two of those (docs/performance.md).
pub(super) fn words(dtype: Dtype) -> Option<Words> {
    static PAIRS: LazyLock<bool> = LazyLock::new(|| available(Words::Pairs) && is_amd());
    match dtype {
        Dtype::F32 => None,
        Dtype::Bf16 if *PAIRS => Some(Words::Pairs),
        Dtype::Bf16 | Dtype::F16 => available(Words::Wide).then_some(Words::Wide),
    }
}

fn available(words: Words) -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && (words == Words::Wide || is_x86_feature_detected!("avx512bf16"))
}

fn is_amd() -> bool {
    let cpu = __cpuid(0);
    [cpu.ebx, cpu.edx, cpu.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// C = A B, + C where `add`.
///
/// # Shapes
/// A `[m, b.depth()]`, C `[m, b.cols()]`
///
/// # Panics
/// If the shapes do not fit or the processor has no such words.
pub(super) fn product(words: Words, a: &[f32], b: Right, c: &mut [f32], m: usize, add: bool) {
    let (n, depth) = (b.cols(), b.depth());
    assert_eq!((a.len(), c.len()), (m * depth, m * n), "shapes of a product");
    assert!(available(words), "AVX-512");
    let stretch = DEPTH * words.elements();
    let mut left = vec![0u32; m.next_multiple_of(ROWS) * DEPTH.min(words.holding(depth))];
    let threads = rayon::current_num_threads();
    let width = n.div_ceil(threads).next_multiple_of(COLS).min(WIDTH);
    let out = Shared(c.as_mut_ptr());
    for first in (0..depth).step_by(stretch) {
        let length = stretch.min(depth - first);
        let steps = words.holding(length);
        left.par_chunks_mut(ROWS * steps).enumerate().for_each(|(i, block)| {
            let rows = ROWS.min(m.saturating_sub(i * ROWS));
            if rows > 0 {
                // SAFETY: the processor has the instructions; `rows` rows from i ROWS on are in A, and
                // `length` columns from `first` on.
                unsafe {
                    pack_left(words, &a[i * ROWS * depth + first..], depth, rows, length, block)
                };
            }
        });
        let add = add || first > 0;
        (0..n.div_ceil(width)).into_par_iter().for_each_init(Vec::new, |panels, task| {
            let from = task * width;
            let cols = width.min(n - from);
            panels.resize(cols.next_multiple_of(COLS) * steps, 0u32);
            for (j, panel) in panels.chunks_exact_mut(COLS * steps).enumerate() {
                // SAFETY: as above, for a part of B.
                unsafe { pack_right(words, b, first, from + j * COLS, panel) };
            }
            for (i, block) in left.chunks(ROWS * steps).enumerate().take(m.div_ceil(ROWS)) {
                for (j, panel) in panels.chunks_exact(COLS * steps).enumerate() {
                    let (row, col) = (i * ROWS, from + j * COLS);
                    let (rows, cols) = (ROWS.min(m - row), COLS.min(n - col));
                    // SAFETY: the tile of `rows` x `cols` is inside C, and no other task has its
                    // columns.
                    unsafe {
                        let at = out.at(row * n + col);
                        match words {
                            Words::Wide => wide(block, panel, at, n, rows, cols, add),
                            Words::Pairs => pairs(block, panel, at, n, rows, cols, add),
                        }
                    };
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

/// C (+)= A B over one stretch, for at most [`ROWS`] x [`COLS`] elements of C.
macro_rules! tile {
    ($name:ident, $features:literal, $step:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(
            a: &[u32],
            b: &[u32],
            c: *mut f32,
            stride: usize,
            rows: usize,
            cols: usize,
            add: bool,
        ) {
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<COLS>().0) {
                // SAFETY: both halves are inside b.
                let b = unsafe {
                    [
                        _mm512_loadu_si512(b.as_ptr().cast()),
                        _mm512_loadu_si512(b.as_ptr().add(LANES).cast()),
                    ]
                };
                for r in 0..ROWS {
                    let a = _mm512_set1_epi32(a[r].cast_signed());
                    sums[r][0] = $step(sums[r][0], a, b[0]);
                    sums[r][1] = $step(sums[r][1], a, b[1]);
                }
            }
            // SAFETY: as promised by the caller.
            unsafe { write(&sums, c, stride, rows, cols, add) };
        }
    };
}

tile!(wide, "avx512f,avx512bw,avx512vl", |sum, a, b| _mm512_fmadd_ps(
    _mm512_castsi512_ps(a),
    _mm512_castsi512_ps(b),
    sum
));
tile!(pairs, "avx512f,avx512bw,avx512vl,avx512bf16", |sum, a, b| _mm512_dpbf16_ps(
    sum,
    halves(a),
    halves(b)
));

/// The register as one of bf16.
#[target_feature(enable = "avx512f")]
#[inline]
fn halves(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any value is good.
    unsafe { std::mem::transmute(x) }
}

/// The sums of a tile into C.
///
/// # Safety
/// The tile is inside C, `stride` apart by rows.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn write(
    sums: &[[__m512; 2]; ROWS],
    c: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    add: bool,
) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostMatrix;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.4).collect()
    }

    /// Beyond one stretch, one task and one tile, against sums in f64 of what the words hold; and the
    /// same bits for any number of threads and wherever a row stands.
    #[test]
    fn agrees_with_the_definition_for_any_number_of_threads() {
        for (words, transposed) in
            [(Words::Wide, true), (Words::Pairs, true), (Words::Pairs, false)]
        {
            if !available(words) {
                continue;
            }
            let beyond = words.elements() * DEPTH + 17;
            for (m, n, depth) in [(1, 1, 1), (13, 33, 40), (30, 2 * WIDTH + 35, beyond)] {
                let a = numbers(m * depth, 1);
                let (rows, cols) = if transposed { (n, depth) } else { (depth, n) };
                let w = HostMatrix::from_f32(rows, cols, &numbers(n * depth, 2)).to_bf16();
                let mut wide = vec![0f64; n * depth];
                crate::cpu::linear::widen(&w, 0, &mut wide);
                let before = numbers(m * n, 3);
                let run = |threads: usize, rows: usize, add: bool| {
                    let pool =
                        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut c = before[..rows * n].to_vec();
                    let right = Right { w: &w, transposed };
                    pool.install(|| product(words, &a[..rows * depth], right, &mut c, rows, add));
                    c
                };
                let added = run(1, m, true);
                for i in 0..m {
                    for j in 0..n {
                        let term = |k: usize| {
                            let a = a[i * depth + k];
                            let a = match words {
                                Words::Wide => a,
                                Words::Pairs => half::bf16::from_f32(a).to_f32(),
                            };
                            f64::from(a) * wide[if transposed { j * depth + k } else { k * n + j }]
                        };
                        let want = (0..depth).map(term).sum::<f64>() + f64::from(before[i * n + j]);
                        let size = (0..depth).map(|k| term(k).abs()).sum::<f64>() + 1.0;
                        let got = f64::from(added[i * n + j]);
                        assert!((got - want).abs() < 2e-6 * size, "{words:?}: {got}, not {want}");
                    }
                }
                assert!(added == run(2, m, true) && added == run(5, m, true));
                let few = m.div_ceil(3);
                assert!(run(2, few, false) == run(1, m, false)[..few * n]);
            }
        }
    }
}
