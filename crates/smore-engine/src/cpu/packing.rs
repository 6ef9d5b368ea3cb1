//! The order in which the innermost loop of a packed product reads its operands.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;

use crate::{Dtype, HostMatrix};

/// Rows and columns of the tile whose sums stay in registers: 24 of 32.
pub(super) const ROWS: usize = 12;
pub(super) const COLS: usize = 32;
pub(super) const LANES: usize = 16;

/// What one 32-bit lane of an operand holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// One element in f32, widened where W has 16 bits.
    Wide,
    /// Two elements in bf16 that follow each other in depth.
    Pairs,
}

impl Words {
    pub(super) fn elements(self) -> usize {
        match self {
            Self::Wide => 1,
            Self::Pairs => 2,
        }
    }

    /// Words that hold so many elements.
    pub(super) fn holding(self, elements: usize) -> usize {
        elements.div_ceil(self.elements())
    }
}

/// The right operand: W or its transpose.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) w: &'a HostMatrix,
    pub(super) transposed: bool,
}

impl Right<'_> {
    pub(super) fn depth(&self) -> usize {
        if self.transposed { self.w.cols } else { self.w.rows }
    }

    pub(super) fn cols(&self) -> usize {
        if self.transposed { self.w.rows } else { self.w.cols }
    }
}

pub(super) fn mask(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// For the elements of 16 words.
fn mask_halves(n: usize) -> __mmask32 {
    ((1u64 << n.min(2 * LANES)) - 1) as __mmask32
}

/// [rows, length] out of A as `[words, ROWS]`; rows that are missing stay what they are, and a pair's
/// missing half is 0.
///
/// # Safety
/// The processor has the words, and A so many rows and columns, `stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_left(
    words: Words,
    a: &[f32],
    stride: usize,
    rows: usize,
    length: usize,
    block: &mut [u32],
) {
    let elements = LANES * words.elements();
    for (first, block) in (0..length).step_by(elements).zip(block.chunks_mut(LANES * ROWS)) {
        let elements = elements.min(length - first);
        // SAFETY: as promised by the caller.
        unsafe {
            let mut part = [_mm512_setzero_si512(); LANES];
            for (r, part) in part.iter_mut().enumerate().take(rows) {
                let at = &a[r * stride + first..][..elements];
                *part = match words {
                    Words::Wide => {
                        _mm512_castps_si512(_mm512_maskz_loadu_ps(mask(elements), at.as_ptr()))
                    }
                    Words::Pairs => narrow(at),
                };
            }
            transpose(&mut part);
            for (part, to) in part.iter().zip(block.chunks_exact_mut(ROWS)) {
                _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), mask(ROWS), *part);
            }
        }
    }
}

/// Up to 32 elements rounded to bf16, to nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bf16")]
fn narrow(from: &[f32]) -> __m512i {
    let (low, high) = (mask(from.len()), mask(from.len().saturating_sub(LANES)));
    // SAFETY: masks keep to `from`, a pointer past it is not followed, and a register is a register.
    unsafe {
        let low = _mm512_maskz_loadu_ps(low, from.as_ptr());
        let high = _mm512_maskz_loadu_ps(high, from.as_ptr().wrapping_add(LANES));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// The stretch of B from `first` on in its columns `col..` as `[words, COLS]`, zeros beyond B.
///
/// # Safety
/// The processor has the words, and W 16 bits, in bf16 where words are pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_right(
    words: Words,
    b: Right,
    first: usize,
    col: usize,
    panel: &mut [u32],
) {
    // SAFETY: as promised by the caller.
    unsafe {
        if b.transposed {
            pack_columns(words, b.w, first, col, panel);
        } else {
            assert_eq!(words, Words::Pairs, "rows are packed in pairs");
            pack_rows(b.w, first, col, panel);
        }
    }
}

/// Of B = W^T: each column is a row of W, whose words lie one after the other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_columns(words: Words, w: &HostMatrix, first: usize, col: usize, panel: &mut [u32]) {
    let elements = LANES * words.elements();
    for (i, block) in panel.chunks_mut(LANES * COLS).enumerate() {
        let from = first + i * elements;
        let length = elements.min(w.cols - from);
        for half in 0..2 {
            let col = col + half * LANES;
            let mut part = [_mm512_setzero_si512(); LANES];
            for (j, part) in part.iter_mut().enumerate().take(w.rows.saturating_sub(col)) {
                // SAFETY: the row is one of W's and the elements are inside it.
                *part = unsafe { load(words, w, col + j, from, length) };
            }
            transpose(&mut part);
            for (part, to) in part.iter().zip(block.chunks_exact_mut(COLS)) {
                // SAFETY: `to` has two times LANES elements.
                unsafe { _mm512_storeu_si512(to[half * LANES..].as_mut_ptr().cast(), *part) };
            }
        }
    }
}

/// Of B = W, in pairs: an element of a row with the one below it.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_rows(w: &HostMatrix, first: usize, col: usize, panel: &mut [u32]) {
    // Low halves from one row and high halves from the next, of columns 0 to 15 and 16 to 31.
    let (mut low, mut high) = ([0i16; 32], [0i16; 32]);
    for lane in 0..LANES as i16 {
        let at = 2 * lane as usize;
        [low[at], low[at + 1]] = [lane, lane + 32];
        [high[at], high[at + 1]] = [lane + 16, lane + 48];
    }
    // SAFETY: registers are as long as the arrays; masks keep to the rows of W.
    unsafe {
        let (low, high) =
            (_mm512_loadu_si512(low.as_ptr().cast()), _mm512_loadu_si512(high.as_ptr().cast()));
        let keep = mask_halves(w.cols - col);
        for (i, to) in panel.chunks_exact_mut(COLS).enumerate() {
            let row = |row: usize| match row < w.rows {
                true => _mm512_maskz_loadu_epi16(keep, at(w, row, col)),
                false => _mm512_setzero_si512(),
            };
            let (upper, lower) = (row(first + 2 * i), row(first + 2 * i + 1));
            let to = to.as_mut_ptr();
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(upper, low, lower));
            _mm512_storeu_si512(
                to.add(LANES).cast(),
                _mm512_permutex2var_epi16(upper, high, lower),
            );
        }
    }
}

fn at(w: &HostMatrix, row: usize, col: usize) -> *const i16 {
    w.row_bytes(row, 1)[col * w.dtype.bytes()..].as_ptr().cast()
}

/// `length` elements of a row of W from `col` on, in words.
///
/// # Safety
/// They are inside the row and fill at most 16 words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn load(words: Words, w: &HostMatrix, row: usize, col: usize, length: usize) -> __m512i {
    let at = at(w, row, col);
    // SAFETY: as promised by the caller; no load needs an alignment.
    unsafe {
        match (words, w.dtype) {
            (Words::Pairs, Dtype::Bf16) => _mm512_maskz_loadu_epi16(mask_halves(length), at),
            (Words::Wide, Dtype::Bf16) => {
                let half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(length), at));
                _mm512_slli_epi32::<16>(half)
            }
            (Words::Wide, Dtype::F16) => {
                _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(length), at)))
            }
            _ => unreachable!("W has 16 bits, in pairs those of bf16"),
        }
    }
}

/// Transposes 16 x 16 elements.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: &mut [__m512i; LANES]) {
    // Pairs of rows, then fours within 128 bits, then the 128-bit parts themselves.
    let mut fours = [_mm512_setzero_pd(); LANES];
    for i in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|r| _mm512_castsi512_ps(rows[4 * i + r]));
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
        rows[j] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0x88>(ab, cd));
        rows[j + 8] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0xdd>(ab, cd));
        rows[j + 4] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
        rows[j + 12] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
    }
}
