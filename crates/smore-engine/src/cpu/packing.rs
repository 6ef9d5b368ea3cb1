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
    /// The same in the order of the matrix unit (`tiling`).
    Tiles,
    /// The same, an element being the sum of three in bf16 if it is not stored in bf16 itself.
    Thirds,
    /// As pairs, but in f16, times a power of two that brings the largest of the line's stretch to [8, 16):
    /// sums of products then stay in f16's range, and an element is exact to 11 bits unless it is less
    /// than 2^-17 of the largest.
    Halves,
}

impl Words {
    /// Elements of a word.
    pub(super) fn elements(self) -> usize {
        match self {
            Self::Wide | Self::Thirds => 1,
            Self::Pairs | Self::Tiles | Self::Halves => 2,
        }
    }

    /// Words that hold so many elements.
    pub(super) fn holding(self, elements: usize) -> usize {
        elements.div_ceil(self.elements())
    }

    /// Words of `width` packed lines of so many steps: `[steps, width]`, behind them what undoes each
    /// line's power of two, in f32, where there is one.
    pub(super) fn room(self, width: usize, steps: usize) -> usize {
        width * (steps + usize::from(self == Self::Halves))
    }

    /// In how many parts the matrix unit takes an element, where such words are for it.
    pub(super) fn tiled(self) -> Option<usize> {
        match self {
            Self::Tiles => Some(1),
            Self::Thirds => Some(3),
            Self::Wide | Self::Pairs | Self::Halves => None,
        }
    }
}

/// An operand as lines of one depth: rows of the left one, columns of the right one.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    bytes: &'a [u8],
    pub(super) dtype: Dtype,
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

    /// Whether steps of depth stand further apart than lines.
    pub(super) fn across(&self) -> bool {
        self.strides.1 != 1
    }

    /// Whether words of this kind can be made of the elements.
    pub(super) fn fits(&self, words: Words) -> bool {
        words != Words::Pairs || self.dtype != Dtype::F16
    }

    /// # Panics
    /// If strides reach past the bytes.
    pub(super) fn check(&self) {
        let (lines, depth) = (self.lines.max(1) - 1, self.depth.max(1) - 1);
        let last = lines * self.strides.0 + depth * self.strides.1;
        assert!((last + 1) * self.dtype.bytes() <= self.bytes.len(), "operand ends too early");
    }

    /// Elements from one row of memory to the next, whether those are lines or steps of depth.
    pub(super) fn step(&self) -> usize {
        if self.across() { self.strides.1 } else { self.strides.0 }
    }

    pub(super) fn at(&self, line: usize, depth: usize) -> *const u8 {
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

impl Stretch {
    /// In pieces of at most `most` elements.
    pub(super) fn pieces(self, most: usize) -> impl Iterator<Item = Self> {
        let end = self.first + self.length;
        (self.first..end)
            .step_by(most)
            .map(move |first| Self { first, length: most.min(end - first) })
    }
}

pub(super) fn mask(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// The powers of two of 16 lines.
#[derive(Clone, Copy)]
pub(super) struct Powers {
    /// Exponents as f32 writes them, 127 for 1.
    exponents: [u32; LANES],
    /// Bits of what undoes them; NaN for a line that holds an infinity or NaN.
    pub(super) undone: [u32; LANES],
}

impl Powers {
    pub(super) const ONE: Self = Self { exponents: [127; LANES], undone: [127 << 23; LANES] };

    /// Of lines whose largest magnitudes have these bits, in f32.
    pub(super) fn of(largest: &[u32; LANES]) -> Self {
        // 2^(3 - (e - 127)), at most 2^111: what is below 2^-108 ends nearer to 0.
        let exponents = largest.map(|bits| (127 + 127 + 3 - (bits >> 23)).min(127 + 111));
        let mut undone = exponents.map(|power| (2 * 127 - power) << 23);
        for (undone, bits) in undone.iter_mut().zip(largest) {
            if bits >> 23 == 0xff {
                *undone = f32::NAN.to_bits();
            }
        }
        Self { exponents, undone }
    }
}

/// Makes `pack`: at most 16 lines from `line` on as `[words, width]` in `to`, zeros where lines or
/// halves of a pair are missing. `along` gives words that follow each other in a line, `across` one
/// word of lines that follow each other; both take the exponents of their lines' powers of two.
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
            powers: &Powers,
        ) {
            let Stretch { first, length } = stretch;
            let lines = lanes.min(from.lines.saturating_sub(line));
            let (seen, written) = (mask(lines), mask(lanes));
            let elements = $words.elements();
            assert!(to.len() + width >= $words.holding(length) * width + lanes, "room to pack in");
            let mut to = to.as_mut_ptr();
            let exponents = &powers.exponents;
            // SAFETY: 16 words.
            let all = unsafe { _mm512_loadu_si512(exponents.as_ptr().cast()) };
            if !from.across() {
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
                            part[r] = unsafe { $along(from.dtype, at, length, exponents[r]) };
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
                    let word = $across(from.dtype, at, below, seen, all);
                    _mm512_mask_storeu_epi32(to.cast(), written, word);
                }
                to = to.wrapping_add(width);
            }
        }
    };
}

pack!(pack_wide, "avx512f,avx512bw,avx512vl", Words::Wide, along_wide, across_wide);
pack!(pack_pairs, "avx512f,avx512bw,avx512vl,avx512bf16", Words::Pairs, along_pairs, across_pairs);
pack!(pack_halves, "avx512f,avx512bw,avx512vl", Words::Halves, along_halves, across_halves);

/// Raises `tops`, bits of magnitudes in f32, to the largest of at most 16 lines' stretch.
///
/// # Safety
/// As for packing.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn largest(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    lanes: usize,
    tops: &mut [u32; LANES],
) {
    let Stretch { first, length } = stretch;
    let lines = lanes.min(from.lines.saturating_sub(line));
    let wide = from.dtype == Dtype::F32;
    let magnitude = _mm512_set1_epi32(if wide { 0x7fff_ffff } else { 0x7fff_7fff });
    // A magnitude's bits rise with it in every type.
    let mut found = [0u32; LANES];
    if from.strides.1 == 1 {
        let step = if wide { LANES } else { 2 * LANES };
        let row = from.strides.0 * from.dtype.bytes();
        for (r, found) in found.iter_mut().enumerate().take(lines) {
            let mut top = _mm512_setzero_si512();
            for k in (0..length).step_by(step) {
                let (at, left) = (from.at(line + r, first + k), (length - k).min(step));
                // The next line, at the same place: a line is often a page, where nothing is foreseen.
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(row).cast());
                // SAFETY: the elements are inside the line.
                top = unsafe {
                    if wide {
                        let x = _mm512_maskz_loadu_epi32(mask(left), at.cast());
                        _mm512_max_epu32(top, _mm512_and_si512(x, magnitude))
                    } else {
                        let x = _mm512_maskz_loadu_epi16(((1u64 << left) - 1) as u32, at.cast());
                        _mm512_max_epu16(top, _mm512_and_si512(x, magnitude))
                    }
                };
            }
            if !wide {
                let low = _mm512_and_si512(top, _mm512_set1_epi32(0xffff));
                top = _mm512_max_epu32(_mm512_srli_epi32::<16>(top), low);
            }
            *found = _mm512_reduce_max_epu32(top);
        }
    } else {
        let row = from.strides.1 * from.dtype.bytes();
        let mut top = _mm512_setzero_si512();
        for k in 0..length {
            let at = from.at(line, first + k);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD * row).cast());
            // SAFETY: masks keep to the lines.
            let x = unsafe {
                if wide {
                    _mm512_maskz_loadu_epi32(mask(lines), at.cast())
                } else {
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(lines), at.cast()))
                }
            };
            top = _mm512_max_epu32(top, _mm512_and_si512(x, magnitude));
        }
        // SAFETY: 16 words.
        unsafe { _mm512_storeu_si512(found.as_mut_ptr().cast(), top) };
    }
    for (top, found) in tops.iter_mut().zip(found) {
        *top = (*top).max(match from.dtype {
            Dtype::F32 => found,
            Dtype::Bf16 => found << 16,
            Dtype::F16 => half::f16::from_bits(found as u16).to_f32().to_bits(),
        });
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn along_wide(dtype: Dtype, at: *const u8, length: usize, _exponent: u32) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe { across_wide(dtype, at, None, mask(length), _mm512_setzero_si512()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn across_wide(
    dtype: Dtype,
    at: *const u8,
    _below: Option<*const u8>,
    seen: __mmask16,
    _exponents: __m512i,
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
unsafe fn along_pairs(dtype: Dtype, at: *const u8, length: usize, _exponent: u32) -> __m512i {
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
    _exponents: __m512i,
) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe {
        let upper = low_bf16(dtype, at, seen);
        let Some(below) = below else { return upper };
        _mm512_or_si512(upper, _mm512_slli_epi32::<16>(low_bf16(dtype, below, seen)))
    }
}

/// 16 elements in bf16, each in the low half of a word.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn low_bf16(dtype: Dtype, at: *const u8, seen: __mmask16) -> __m512i {
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn along_halves(dtype: Dtype, at: *const u8, length: usize, exponent: u32) -> __m512i {
    let exponents = _mm512_set1_epi32(exponent.cast_signed());
    // SAFETY: as promised by the caller.
    unsafe {
        if dtype == Dtype::Bf16 {
            let seen = ((1u64 << length) - 1) as __mmask32;
            return from_bf16(_mm512_maskz_loadu_epi16(seen, at.cast()), exponents);
        }
        let (first, more) = (mask(length), mask(length.saturating_sub(LANES)));
        let low = from_wide(across_wide(dtype, at, None, first, exponents), exponents);
        let beyond = at.wrapping_add(LANES * dtype.bytes());
        let high = from_wide(across_wide(dtype, beyond, None, more, exponents), exponents);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn across_halves(
    dtype: Dtype,
    at: *const u8,
    below: Option<*const u8>,
    seen: __mmask16,
    exponents: __m512i,
) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe {
        let half = |at: *const u8| {
            _mm512_cvtepu16_epi32(if dtype == Dtype::Bf16 {
                _mm256_maskz_loadu_epi16(seen, at.cast())
            } else {
                from_wide(across_wide(dtype, at, None, seen, exponents), exponents)
            })
        };
        let below = below.map_or(_mm512_setzero_si512(), half);
        let pair = _mm512_or_si512(half(at), _mm512_slli_epi32::<16>(below));
        if dtype == Dtype::Bf16 { from_bf16(pair, exponents) } else { pair }
    }
}

/// 16 numbers in f32, times their powers of two, in f16.
#[target_feature(enable = "avx512f")]
#[inline]
fn from_wide(x: __m512i, exponents: __m512i) -> __m256i {
    let powers = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponents));
    _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_mul_ps(_mm512_castsi512_ps(x), powers))
}

/// 32 numbers in bf16, times the powers of two of the words they stand in, in f16: all bits of a
/// normal number have room there, so that only its exponent changes; smaller ones become 0.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn from_bf16(x: __m512i, exponents: __m512i) -> __m512i {
    // e - 127 + power - 127 = e' - 15
    let lower = _mm512_sub_epi32(_mm512_set1_epi32(127 + 127 - 15), exponents);
    let lower = _mm512_slli_epi32::<7>(_mm512_or_si512(lower, _mm512_slli_epi32::<16>(lower)));
    let magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7fff_7fff));
    let moved = _mm512_subs_epu16(magnitude, lower);
    let normal = _mm512_cmpge_epu16_mask(moved, _mm512_set1_epi16(1 << 7));
    let sign = _mm512_andnot_si512(_mm512_set1_epi32(0x7fff_7fff), x);
    _mm512_or_si512(sign, _mm512_maskz_slli_epi16::<3>(normal, moved))
}

/// Transposes 16 x 16 elements.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose(rows: &mut [__m512i; LANES]) {
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
