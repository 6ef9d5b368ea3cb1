//! The order in which the matrix unit reads operands: pairs in bf16 of elements that follow each other in
//! depth, 16 x 16 of them a tile, in one part or in three of which an element is the sum.
//!
//! Functions here are fast where memory is read in long runs, so each of the four cases (left or right operand, lines
//! or steps of depth contiguous) has a loop of its own.

#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;

use super::amx::{PAIR, SIDE};
use super::packing::{LANES, Operand, Stretch, mask, transpose};
use crate::Dtype;

/// Rows of memory that prefetching runs ahead: each may be in a page of its own, where nothing is
/// foreseen.
const AHEAD: usize = 6;

/// Words of 32 lines of so many elements in one part.
pub(super) fn words_of(length: usize) -> usize {
    length.div_ceil(2).next_multiple_of(LANES) * SIDE
}

/// How elements are stored.
trait Stored {
    const BYTES: usize;
    /// Whether they are in bf16.
    const BF16: bool = false;

    /// 16 elements, 0 where none is seen.
    ///
    /// # Safety
    /// Those that are seen may be read.
    unsafe fn load(at: *const u8, seen: __mmask16) -> __m512;
}

struct InF32;
struct InBf16;
struct InF16;

impl Stored for InF32 {
    const BYTES: usize = 4;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(at: *const u8, seen: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe { _mm512_maskz_loadu_ps(seen, at.cast()) }
    }
}

impl Stored for InBf16 {
    const BYTES: usize = 2;
    const BF16: bool = true;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(at: *const u8, seen: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        widened(unsafe { _mm256_maskz_loadu_epi16(seen, at.cast()) })
    }
}

impl Stored for InF16 {
    const BYTES: usize = 2;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(at: *const u8, seen: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(seen, at.cast()) })
    }
}

/// Calls the function for the type in which an operand is stored.
macro_rules! stored {
    ($from:expr, $function:ident<$parts:ident>($($argument:expr),*)) => {
        match $from.dtype {
            Dtype::F32 => $function::<InF32, $parts>($from, $($argument),*),
            Dtype::Bf16 => $function::<InBf16, $parts>($from, $($argument),*),
            Dtype::F16 => $function::<InF16, $parts>($from, $($argument),*),
        }
    };
}

/// A block of the left operand: 32 lines from `line` on as `[depth / 16, P, 2, 16, 16]`, zeros where lines or
/// elements are missing.
///
/// # Safety
/// The matrix unit is available, and the operand was checked and has the stretch.
pub(super) unsafe fn pack_block<const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    to: &mut [u32],
) {
    assert_eq!(to.len(), words_of(stretch.length) * P, "room for a block");
    for half in 0..2 {
        let (line, to) = (line + half * LANES, &mut to[half * PAIR / 2..]);
        // SAFETY: as promised by the caller.
        unsafe {
            if from.across() {
                stored!(from, block_across<P>(line, stretch, to));
            } else {
                stored!(from, block_along<P>(line, stretch, to));
            }
        }
    }
}

/// Panels of the right operand that follow each other, `room` words each: 32 lines as `[depth / 16, P, 16, 32]`,
/// zeros where lines or elements are missing. The sums over each line are added to `sums`, where there are any: 32 for
/// every panel.
///
/// # Panics
/// If there is too little room, or sums are wanted of lines that are not beside each other in f32.
///
/// # Safety
/// As [`pack_block`].
pub(super) unsafe fn pack_panels<const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    panels: &mut [u32],
    room: usize,
    sums: Option<&mut [f32]>,
) {
    assert!(room >= words_of(stretch.length) * P, "room for a panel");
    let summed = from.across() && from.dtype == Dtype::F32;
    assert!(sums.is_none() || summed, "sums of an operand's lines");
    // SAFETY: as promised by the caller.
    unsafe {
        if from.across() {
            stored!(from, panels_across<P>(line, stretch, panels, room, sums));
        } else {
            for (j, panel) in panels.chunks_exact_mut(room).enumerate() {
                for half in 0..2 {
                    let (line, to) = (line + j * SIDE + half * LANES, &mut panel[half * LANES..]);
                    stored!(from, panel_along<P>(line, stretch, to));
                }
            }
        }
    }
}

/// 16 lines, each contiguous, as rows of the first of two tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn block_along<S: Stored, const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    to: &mut [u32],
) {
    let Stretch { first, length } = stretch;
    let (row, lines) = (from.step() * S::BYTES, from.lines.saturating_sub(line));
    for r in 0..LANES {
        let at = from.at(line + r, first);
        for (k, to) in (0..length).step_by(SIDE).zip(to.chunks_mut(P * PAIR)) {
            let at = at.wrapping_add(k * S::BYTES);
            for line in (0..SIDE * S::BYTES).step_by(64) {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD * row + line).cast());
            }
            let left = if r < lines { length - k } else { 0 };
            // SAFETY: the elements are inside the line.
            let words = unsafe { along::<S, P>(at, left) };
            for (part, words) in words.into_iter().enumerate() {
                put(words, &mut to[part * PAIR + r * LANES..]);
            }
        }
    }
}

/// The same of lines that are beside each other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn block_across<S: Stored, const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    to: &mut [u32],
) {
    let Stretch { first, length } = stretch;
    let row = from.step() * S::BYTES;
    let seen = mask(from.lines.saturating_sub(line));
    for (k, to) in (0..length).step_by(SIDE).zip(to.chunks_mut(P * PAIR)) {
        let mut tiles = [[_mm512_setzero_si512(); LANES]; P];
        for w in 0..LANES {
            let at = from.at(line, first + k + 2 * w);
            for ahead in [2 * AHEAD, 2 * AHEAD + 1] {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead * row).cast());
            }
            let there = [2 * w, 2 * w + 1].map(|i| if k + i < length { seen } else { 0 });
            // SAFETY: masks keep to the lines and steps that are there.
            let words = unsafe { [S::load(at, there[0]), S::load(at.wrapping_add(row), there[1])] };
            for (tile, words) in tiles.iter_mut().zip(interleaved::<P>(words)) {
                tile[w] = words;
            }
        }
        for (part, tile) in tiles.iter_mut().enumerate() {
            transpose(tile);
            for (r, words) in tile.iter().enumerate() {
                put(*words, &mut to[part * PAIR + r * LANES..]);
            }
        }
    }
}

/// 16 lines, each contiguous, as one half of a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn panel_along<S: Stored, const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    to: &mut [u32],
) {
    let Stretch { first, length } = stretch;
    let (row, lines) = (from.step() * S::BYTES, from.lines.saturating_sub(line));
    for (k, to) in (0..length).step_by(SIDE).zip(to.chunks_mut(P * PAIR)) {
        let mut tiles = [[_mm512_setzero_si512(); LANES]; P];
        for r in 0..LANES {
            let at = from.at(line + r, first + k);
            // The lines that are packed next, at the same place.
            for line in (0..SIDE * S::BYTES).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(LANES * row + line).cast());
            }
            let left = if r < lines { length - k } else { 0 };
            // SAFETY: the elements are inside the line.
            let words = unsafe { along::<S, P>(at, left) };
            for (tile, words) in tiles.iter_mut().zip(words) {
                tile[r] = words;
            }
        }
        for (part, tile) in tiles.iter_mut().enumerate() {
            transpose(tile);
            for (w, words) in tile.iter().enumerate() {
                put(*words, &mut to[part * PAIR + w * SIDE..]);
            }
        }
    }
}

/// Lines that are beside each other as panels, two steps of depth of all panels at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn panels_across<S: Stored, const P: usize>(
    from: &Operand,
    line: usize,
    stretch: Stretch,
    panels: &mut [u32],
    room: usize,
    mut sums: Option<&mut [f32]>,
) {
    let Stretch { first, length } = stretch;
    let row = from.step() * S::BYTES;
    let lines = from.lines.saturating_sub(line);
    for w in 0..words_of(length) / SIDE {
        let there = [2 * w < length, 2 * w + 1 < length];
        let start = from.at(line, first + 2 * w);
        for (j, panel) in panels.chunks_exact_mut(room).enumerate() {
            let lines = lines.saturating_sub(j * SIDE);
            let at = start.wrapping_add(j * SIDE * S::BYTES);
            for line in (0..SIDE * S::BYTES).step_by(64) {
                for ahead in [2 * AHEAD, 2 * AHEAD + 1] {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead * row + line).cast());
                }
            }
            let to = &mut panel[w / LANES * P * PAIR + w % LANES * SIDE..];
            if P == 1 && S::BF16 {
                let seen = ((1u64 << lines.min(SIDE)) - 1) as __mmask32;
                let [upper, lower] = there.map(|there| if there { seen } else { 0 });
                // SAFETY: masks keep to the lines and steps that are there.
                let rows = unsafe {
                    [
                        _mm512_maskz_loadu_epi16(upper, at.cast()),
                        _mm512_maskz_loadu_epi16(lower, at.wrapping_add(row).cast()),
                    ]
                };
                for half in 0..2 {
                    // SAFETY: 32 places.
                    let order = unsafe { _mm512_loadu_si512(WORDS[half].as_ptr().cast()) };
                    let words = _mm512_permutex2var_epi16(rows[0], order, rows[1]);
                    put(words, &mut to[half * LANES..]);
                }
                continue;
            }
            for half in 0..2 {
                let seen = mask(lines.saturating_sub(half * LANES));
                let at = at.wrapping_add(half * LANES * S::BYTES);
                let [upper, lower] = there.map(|there| if there { seen } else { 0 });
                // SAFETY: as above.
                let words = unsafe { [S::load(at, upper), S::load(at.wrapping_add(row), lower)] };
                if let Some(sums) = &mut sums {
                    let sums = &mut sums[j * SIDE + half * LANES..][..LANES];
                    // SAFETY: 16 elements.
                    unsafe {
                        let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), words[0]);
                        _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_add_ps(sum, words[1]));
                    }
                }
                for (part, words) in interleaved::<P>(words).into_iter().enumerate() {
                    put(words, &mut to[part * PAIR + half * LANES..]);
                }
            }
        }
    }
}

/// Transposes 32 x 32 sums.
///
/// # Panics
/// If there are not so many.
#[target_feature(enable = "avx512f")]
pub(super) fn turn(sums: &mut [f32]) {
    assert_eq!(sums.len(), SIDE * SIDE, "sums to turn");
    let words: &mut [u32] = bytemuck::cast_slice_mut(sums);
    for i in 0..2 {
        for j in 0..=i {
            let corners = [(i, j), (j, i)].map(|(i, j)| (i * SIDE + j) * LANES);
            let tiles = corners.map(|corner| {
                let mut tile = [_mm512_setzero_si512(); LANES];
                for (r, row) in tile.iter_mut().enumerate() {
                    let from = &words[corner + r * SIDE..][..LANES];
                    // SAFETY: 16 words.
                    *row = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
                }
                transpose(&mut tile);
                tile
            });
            for (corner, tile) in corners.into_iter().zip([tiles[1], tiles[0]]) {
                for (r, row) in tile.into_iter().enumerate() {
                    put(row, &mut words[corner + r * SIDE..]);
                }
            }
        }
    }
}

/// Writes 16 words.
#[target_feature(enable = "avx512f")]
#[inline]
fn put(words: __m512i, to: &mut [u32]) {
    let to: &mut [u32; LANES] = (&mut to[..LANES]).try_into().expect("16 words");
    // SAFETY: there is room for all.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) };
}

/// At most 32 elements of a line, in parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn along<S: Stored, const P: usize>(at: *const u8, length: usize) -> [__m512i; P] {
    // SAFETY: as promised by the caller.
    unsafe {
        if P == 1 && S::BF16 {
            let seen = ((1u64 << length.min(SIDE)) - 1) as __mmask32;
            return [_mm512_maskz_loadu_epi16(seen, at.cast()); P];
        }
        let beyond = at.wrapping_add(LANES * S::BYTES);
        split([S::load(at, mask(length)), S::load(beyond, mask(length.saturating_sub(LANES)))])
    }
}

/// Elements of 16 lines and those below them, in parts, as words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn interleaved<const P: usize>(rows: [__m512; 2]) -> [__m512i; P] {
    // SAFETY: 32 places.
    let order = unsafe { _mm512_loadu_si512(HALVES.as_ptr().cast()) };
    split(rows).map(|words| _mm512_permutexvar_epi16(order, words))
}

/// Where each half of a word comes from: the lower ones from 16 places on from `first`, the upper ones from 16
/// on from `second`.
const fn order(first: u16, second: u16) -> [u16; SIDE] {
    let mut places = [0; SIDE];
    let mut word = 0;
    while word < LANES {
        places[2 * word] = first + word as u16;
        places[2 * word + 1] = second + word as u16;
        word += 1;
    }
    places
}

/// From the halves of one register.
const HALVES: [u16; SIDE] = order(0, 16);
/// From the first and from the second half of two registers.
const WORDS: [[u16; SIDE]; 2] = [order(0, 32), order(16, 48)];

/// 16 numbers in bf16 in f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn widened(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// 32 numbers in f32 as sums of `P` in bf16: the nearest to each, then the nearest to what is left.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn split<const P: usize>(mut left: [__m512; 2]) -> [__m512i; P] {
    let mut parts = [_mm512_setzero_si512(); P];
    for (i, part) in parts.iter_mut().enumerate() {
        let nearest = _mm512_cvtne2ps_pbh(left[1], left[0]);
        // SAFETY: both are 512 bits of which any value is good.
        *part = unsafe { std::mem::transmute::<__m512bh, __m512i>(nearest) };
        if i + 1 < P {
            let taken = [_mm512_castsi512_si256(*part), _mm512_extracti64x4_epi64::<1>(*part)];
            for (left, taken) in left.iter_mut().zip(taken) {
                *left = _mm512_sub_ps(*left, widened(taken));
            }
        }
    }
    parts
}
