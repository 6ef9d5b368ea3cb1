//! Dot products of rows with few tokens in the processor's own instructions. Decoding is these:
//! compilers make code of them that adds a number at a time, or that shuffles more than it adds.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;

use super::linear::{bf16, f16};
use crate::Dtype;

/// The products of `R` rows, stored as `dtype`, with every token of x; false, and nothing done,
/// where the processor has no instructions for it. Each sum has the same order whatever `R` and the
/// number of tokens are.
///
/// `next` is asked for meanwhile, as long as the rows are: the processor itself stops at the end of a page.
///
/// # Shapes
/// rows `[R, d_in]`, x `[n, d_in]` for n up to 4, out `[R, n]`
pub(super) fn group<const R: usize>(
    rows: [&[u8]; R],
    next: [*const u8; R],
    dtype: Dtype,
    x: &[f32],
    d_in: usize,
    out: &mut [f32],
) -> bool {
    let n = x.len() / d_in;
    let whole = rows.iter().all(|row| row.len() == d_in * dtype.bytes());
    assert!(whole && x.len() == n * d_in && out.len() == R * n, "shapes of dot products");
    let of_dtype = match dtype {
        Dtype::F32 => of_storage::<F32, R>,
        Dtype::Bf16 => of_storage::<Bf16, R>,
        Dtype::F16 => of_storage::<F16, R>,
    };
    of_dtype(rows, next, x, d_in, n, out)
}

fn of_storage<S: Storage, const R: usize>(
    rows: [&[u8]; R],
    next: [*const u8; R],
    x: &[f32],
    d_in: usize,
    n: usize,
    out: &mut [f32],
) -> bool {
    match n {
        1 => of_tokens::<S, R, 1>(rows, next, x, d_in, out),
        2 => of_tokens::<S, R, 2>(rows, next, x, d_in, out),
        3 => of_tokens::<S, R, 3>(rows, next, x, d_in, out),
        4 => of_tokens::<S, R, 4>(rows, next, x, d_in, out),
        _ => false,
    }
}

fn of_tokens<S: Storage, const R: usize, const N: usize>(
    rows: [&[u8]; R],
    next: [*const u8; R],
    x: &[f32],
    d_in: usize,
    out: &mut [f32],
) -> bool {
    // SAFETY: the processor has the instructions; `group` has compared the shapes.
    let sums = unsafe {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            avx512::<S, R, N>(rows, next, x, d_in)
        } else if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            avx2::<S, R, N>(rows, next, x, d_in)
        } else {
            return false;
        }
    };
    for (out, sums) in out.chunks_exact_mut(N).zip(sums) {
        out.copy_from_slice(&sums);
    }
    true
}

/// How weights lie in memory.
trait Storage {
    const BYTES: usize;

    /// # Safety
    /// One element lies at `at`.
    unsafe fn one(at: *const u8) -> f32;

    /// # Safety
    /// 8 elements lie at `at`; the processor has AVX2 and F16C.
    unsafe fn eight(at: *const u8) -> __m256;

    /// # Safety
    /// 16 elements lie at `at`; the processor has AVX-512.
    unsafe fn sixteen(at: *const u8) -> __m512;
}

struct F32;
struct Bf16;
struct F16;

impl Storage for F32 {
    const BYTES: usize = 4;

    unsafe fn one(at: *const u8) -> f32 {
        // SAFETY: as promised by the caller; the load needs no alignment.
        f32::from_le_bytes(unsafe { at.cast::<[u8; 4]>().read() })
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn eight(at: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512vl")]
    #[inline]
    unsafe fn sixteen(at: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(at.cast()) }
    }
}

impl Storage for Bf16 {
    const BYTES: usize = 2;

    unsafe fn one(at: *const u8) -> f32 {
        // SAFETY: as promised by the caller; the load needs no alignment.
        bf16(unsafe { at.cast::<[u8; 2]>().read() })
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn eight(at: *const u8) -> __m256 {
        // SAFETY: as above.
        let half = unsafe { _mm_loadu_si128(at.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
    }

    #[target_feature(enable = "avx512f,avx512vl")]
    #[inline]
    unsafe fn sixteen(at: *const u8) -> __m512 {
        // SAFETY: as above.
        let half = unsafe { _mm256_loadu_si256(at.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
    }
}

impl Storage for F16 {
    const BYTES: usize = 2;

    unsafe fn one(at: *const u8) -> f32 {
        // SAFETY: as promised by the caller; the load needs no alignment.
        f16(unsafe { at.cast::<[u8; 2]>().read() })
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn eight(at: *const u8) -> __m256 {
        // SAFETY: as above.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    #[target_feature(enable = "avx512f,avx512vl")]
    #[inline]
    unsafe fn sixteen(at: *const u8) -> __m512 {
        // SAFETY: as above.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }
}

macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $load:ident, $zero:ident, $loadu:ident,
     $fmadd:ident, $storeu:ident) => {
        /// Lane by lane, the rest of a row at the end.
        #[target_feature(enable = $features)]
        unsafe fn $name<S: Storage, const R: usize, const N: usize>(
            rows: [&[u8]; R],
            next: [*const u8; R],
            x: &[f32],
            d_in: usize,
        ) -> [[f32; N]; R] {
            let mut lanes = [[$zero(); N]; R];
            let whole = d_in - d_in % $lanes;
            for at in (0..whole).step_by($lanes) {
                let mut w = [$zero(); R];
                for r in 0..R {
                    // SAFETY: `at` and the lanes after it are inside the row; a prefetch may go
                    // anywhere.
                    unsafe {
                        w[r] = S::$load(rows[r].as_ptr().add(at * S::BYTES));
                        let next = next[r].wrapping_add(at * S::BYTES);
                        _mm_prefetch::<_MM_HINT_T1>(next.cast());
                    }
                }
                for i in 0..N {
                    // SAFETY: inside token i.
                    let x = unsafe { $loadu(x.as_ptr().add(i * d_in + at)) };
                    for r in 0..R {
                        lanes[r][i] = $fmadd(w[r], x, lanes[r][i]);
                    }
                }
            }
            let mut sums = [[0f32; N]; R];
            for r in 0..R {
                for i in 0..N {
                    let mut stored = [0f32; $lanes];
                    // SAFETY: as many elements as lanes.
                    unsafe { $storeu(stored.as_mut_ptr(), lanes[r][i]) };
                    // Halves onto halves: in a short row, one after the other would take longer
                    // than the products.
                    let mut half = $lanes / 2;
                    while half > 0 {
                        for l in 0..half {
                            stored[l] += stored[l + half];
                        }
                        half /= 2;
                    }
                    let mut sum = stored[0];
                    for at in whole..d_in {
                        // SAFETY: inside the row.
                        let w = unsafe { S::one(rows[r].as_ptr().add(at * S::BYTES)) };
                        sum += w * x[i * d_in + at];
                    }
                    sums[r][i] = sum;
                }
            }
            sums
        }
    };
}

kernel! {
    avx512, "avx512f,avx512vl", 16, sixteen, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_fmadd_ps,
    _mm512_storeu_ps
}
kernel! {
    avx2, "avx2,fma,f16c", 8, eight, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_fmadd_ps,
    _mm256_storeu_ps
}
