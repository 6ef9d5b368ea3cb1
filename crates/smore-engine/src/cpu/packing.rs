//! The order in which the innermost loop of a packed product reads its operands.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;

use super::gemm::Strided;
use crate::{Dtype, HostMatrix};

/// Words of one register.
pub(super) const LANES: usize = 16;
/// Steps of depth that reading across rows runs ahead: each is in a cache line of its own.
const AHEAD: usize = 16;

/// What one 32-bit word of a packed operand holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// One element in f32.
    Wide,
    /// Two elements in bf16 that follow each other in depth.
    Pairs,
}

impl Words {
    /// Elements of a word.
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

/// An operand as lines of one depth: rows of the left one, columns of the right one.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    pub(super) lines: usize,
    pub(super) depth: usize,
    /// Elements from one line to the next, and from one step of depth to the next: one of them is 1.
    strides: (usize, usize),
}

impl<'a> Operand<'a> {
    /// Lines are the rows of `m`; `None` where neither its rows nor its columns are contiguous.
    pub(super) fn rows_of(m: Strided<'a, f32>) -> Option<Self> {
        let strides = (m.row_stride, m.col_stride);
        let bytes = bytemuck::cast_slice(m.data);
        let operand = Self { bytes, dtype: Dtype::F32, lines: m.rows, depth: m.cols, strides };
        (strides.0 == 1 || strides.1 == 1).then_some(operand)
    }

    /// Lines are the rows of W.
    pub(super) fn rows_of_weight(w: &'a HostMatrix) -> Self {
        let bytes = w.row_bytes(0, w.rows);
        let (lines, depth) = (w.rows, w.cols);
        Self { bytes, dtype: w.dtype, lines, depth, strides: (w.cols, 1) }
    }

    /// Depth becomes lines.
    pub(super) fn t(self) -> Self {
        let (lines, depth, strides) = (self.depth, self.lines, (self.strides.1, self.strides.0));
        Self { lines, depth, strides, ..self }
    }

    /// Whether words of this kind can be made of the elements.
    pub(super) fn fits(&self, words: Words) -> bool {
        words == Words::Wide || self.dtype != Dtype::F16
    }

    /// # Panics
    /// If strides reach past the bytes.
    pub(super) fn check(&self) {
        let (lines, depth) = (self.lines.max(1) - 1, self.depth.max(1) - 1);
        let last = lines * self.strides.0 + depth * self.strides.1;
        assert!((last + 1) * self.dtype.bytes() <= self.bytes.len(), "operand ends too early");
    }

    fn at(&self, line: usize, depth: usize) -> *const u8 {
        let element = line * self.strides.0 + depth * self.strides.1;
        self.bytes.as_ptr().wrapping_add(element * self.dtype.bytes())
    }
}

/// A stretch of an operand's depth.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub(super) first: usize,
    /// Elements, not words.
    pub(super) length: usize,
}

pub(super) fn mask(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// Makes `pack`: at most 16 lines from `line` on as `[words, width]` in `to`, zeros where lines or
/// halves of a pair are missing. `along` gives words that follow each other in a line, `across` one
/// word of lines that follow each other.
macro_rules! pack {
    ($name:ident, $features:literal, $words:expr, $along:ident, $across:ident) => {
        /// # Safety
        /// The processor has the instructions, the operand was checked and has the stretch; `to` holds
        /// `width` words from its start on for each word of the stretch, of which `lanes` are written.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(
            from: &Operand,
            line: usize,
            stretch: Stretch,
            to: &mut [u32],
            width: usize,
            lanes: usize,
        ) {
            let Stretch { first, length } = stretch;
            let lines = lanes.min(from.lines.saturating_sub(line));
            let (seen, written) = (mask(lines), mask(lanes));
            let elements = $words.elements();
            assert!(to.len() + width >= $words.holding(length) * width + lanes, "room to pack in");
            let mut to = to.as_mut_ptr();
            if from.strides.1 == 1 {
                let row = from.strides.0 * from.dtype.bytes();
                for k in (0..length).step_by(LANES * elements) {
                    let length = (length - k).min(LANES * elements);
                    let start = from.at(line, first + k);
                    let mut part = [_mm512_setzero_si512(); LANES];
                    for r in 0..LANES {
                        if r < lines {
                            let at = start.wrapping_add(r * row);
                            // The next lines, which are packed next, at the same place.
                            let next = at.wrapping_add(lanes * row);
                            _mm_prefetch::<_MM_HINT_T1>(next.cast());
                            if from.dtype == Dtype::F32 {
                                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64).cast());
                            }
                            // SAFETY: the elements are inside the line.
                            part[r] = unsafe { $along(from.dtype, at, length) };
                        }
                    }
                    transpose(&mut part);
                    for part in &part[..length.div_ceil(elements)] {
                        // SAFETY: there is room, as asserted.
                        unsafe { _mm512_mask_storeu_epi32(to.cast(), written, *part) };
                        to = to.wrapping_add(width);
                    }
                }
                return;
            }
            let row = from.strides.1 * from.dtype.bytes();
            for k in (0..length).step_by(elements) {
                let at = from.at(line, first + k);
                let below = (k + 1 < length).then(|| at.wrapping_add(row));
                for ahead in 0..elements {
                    let next = at.wrapping_add((AHEAD + ahead) * row);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
                // SAFETY: masks keep to the lines, which are inside the operand; there is room.
                unsafe {
                    let word = $across(from.dtype, at, below, seen);
                    _mm512_mask_storeu_epi32(to.cast(), written, word);
                }
                to = to.wrapping_add(width);
            }
        }
    };
}

pack!(pack_wide, "avx512f,avx512bw,avx512vl", Words::Wide, along_wide, across_wide);
pack!(pack_pairs, "avx512f,avx512bw,avx512vl,avx512bf16", Words::Pairs, along_pairs, across_pairs);

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn along_wide(dtype: Dtype, at: *const u8, length: usize) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe { across_wide(dtype, at, None, mask(length)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn across_wide(
    dtype: Dtype,
    at: *const u8,
    _below: Option<*const u8>,
    seen: __mmask16,
) -> __m512i {
    // SAFETY: as promised by the caller; no load needs an alignment.
    unsafe {
        match dtype {
            Dtype::F32 => _mm512_maskz_loadu_epi32(seen, at.cast()),
            Dtype::Bf16 => {
                let half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(seen, at.cast()));
                _mm512_slli_epi32::<16>(half)
            }
            Dtype::F16 => {
                _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(seen, at.cast())))
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn along_pairs(dtype: Dtype, at: *const u8, length: usize) -> __m512i {
    // SAFETY: as promised by the caller; a register is a register.
    unsafe {
        match dtype {
            Dtype::Bf16 => {
                let seen = ((1u64 << length) - 1) as __mmask32;
                _mm512_maskz_loadu_epi16(seen, at.cast())
            }
            Dtype::F32 => {
                let at: *const f32 = at.cast();
                let low = _mm512_maskz_loadu_ps(mask(length), at);
                let beyond = mask(length.saturating_sub(LANES));
                let high = _mm512_maskz_loadu_ps(beyond, at.wrapping_add(LANES));
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            }
            Dtype::F16 => unreachable!("operands of pairs fit"),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn across_pairs(
    dtype: Dtype,
    at: *const u8,
    below: Option<*const u8>,
    seen: __mmask16,
) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe {
        let upper = halves(dtype, at, seen);
        let Some(below) = below else { return upper };
        _mm512_or_si512(upper, _mm512_slli_epi32::<16>(halves(dtype, below, seen)))
    }
}

/// 16 elements in bf16, each in the low half of a word.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn halves(dtype: Dtype, at: *const u8, seen: __mmask16) -> __m512i {
    // SAFETY: as promised by the caller; a register is a register.
    let halves = unsafe {
        match dtype {
            Dtype::Bf16 => _mm256_maskz_loadu_epi16(seen, at.cast()),
            Dtype::F32 => {
                let wide = _mm512_maskz_loadu_ps(seen, at.cast());
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(wide))
            }
            Dtype::F16 => unreachable!("operands of pairs fit"),
        }
    };
    _mm512_cvtepu16_epi32(halves)
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
