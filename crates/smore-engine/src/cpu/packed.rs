//! Packed products on processors with AVX-512: C = s A B (+ C).
//!
//! The blocked product of Goto and van de Geijn (2008): a stretch of both operands is copied into the
//! order in which the innermost loop reads it (`packing`). Every sum runs over its depth in one order,
//! whatever the number of threads and of rows.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "a kernel is written in them")]
use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::amx;
use super::gemm::{Shared, StridedMut};
use super::packing::{
    LANES, Operand, Powers, Stretch, Words, largest, mask, pack_halves, pack_pairs, pack_wide,
};
use super::tiles::{self, Product};
use crate::{Scratch, team};

/// Rows and columns of the tile whose sums stay in registers: 24 of 32.
const ROWS: usize = 12;
const COLS: usize = 2 * LANES;
/// Words of depth in a stretch. Longer ones pass over C less often; shorter ones keep panels nearer.
const DEPTH: usize = 512;
/// Columns that a task packs: [DEPTH, WIDTH] words fit in the second cache.
const WIDTH: usize = 128;
/// Steps of depth, a page each at worst, that the panels of a task read one after the other.
const NEAR: usize = 32;
/// Words of the left operand that are packed at a time: 1,032 rows of a stretch, with their powers of two.
const LEFT: usize = 86 * ROWS * (DEPTH + 1);
/// Tasks of a thread, so that one whose core is busy with other things leaves some to the others.
const TASKS: usize = 4;
/// The fewest rows for which a task packs columns that another one packs, too.
const TASK_ROWS: usize = 16 * ROWS;

/// Words of depth whose products are summed in f16 before the sum is added to one in f32: with 64 a
/// product errs no more than one of factors in bf16 unless all its terms have one sign
/// (docs/performance.md), and two such sums of magnitudes below 16 times 16 stay below f16's largest, 65504.
const CHAIN: usize = 64;
/// Steps of depth between two looks at a loop's end, which shows where another thread works on the same
/// core and leaves half of its instructions a cycle (docs/performance.md).
const UNROLLED: usize = 4;

/// Whether this processor has what a product of such words needs.
pub(super) fn available(words: Words) -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && match words {
            Words::Wide => true,
            Words::Pairs => is_x86_feature_detected!("avx512bf16"),
            Words::Tiles | Words::Thirds => {
                is_x86_feature_detected!("avx512bf16") && amx::available()
            }
            Words::Halves => is_x86_feature_detected!("avx512fp16"),
        }
}

/// The words of 16-bit elements whose products are faster here than those of f32. On AMD one
/// instruction takes two elements in bf16 in the time of one in f32; on Intel it takes longer than two
/// in f32, and one of 32 elements in f16 as long as one of 16 in f32 (docs/performance.md).
pub(super) fn faster_than_wide() -> Option<Words> {
    static FASTER: LazyLock<Option<Words>> = LazyLock::new(|| {
        let cpu = __cpuid(0);
        let vendor = [cpu.ebx, cpu.edx, cpu.ecx].map(u32::to_le_bytes).concat();
        let pairs = available(Words::Pairs) && vendor == b"AuthenticAMD";
        let of = |words| available(words).then_some(words);
        of(Words::Tiles).or(pairs.then_some(Words::Pairs)).or_else(|| of(Words::Halves))
    });
    *FASTER
}

/// The words of a product with so many rows, and so many rows, columns and steps of depth at least. In f16
/// scaling lines takes a second look at every element, and what is split in three takes six products: few
/// do not repay it.
pub(super) fn words(mixed: bool, rows: usize, least: usize) -> Words {
    let slim = faster_than_wide().filter(|&words| words != Words::Halves || least >= 128);
    let thirds = rows >= 64 && available(Words::Thirds);
    let wide = if thirds { Words::Thirds } else { Words::Wide };
    slim.filter(|_| mixed).unwrap_or(wide)
}

/// From so many rows, columns and steps of depth on a product of such words fills blocks of ours well enough.
pub(super) fn slim(words: Words) -> usize {
    if matches!(words, Words::Tiles | Words::Thirds) { 8 } else { 32 }
}

/// Products that have their left operands in common, by the matrix unit.
///
/// # Panics
/// If the shapes do not fit, the processor has no such words or they are not the unit's.
pub(super) fn products(words: Words, lefts: &[Operand], products: Vec<Product>) {
    let parts = words.tiled().expect("words of the matrix unit");
    for Product { rights, bias, c, .. } in &products {
        assert_eq!(lefts.len(), rights.len(), "operands of a product");
        lefts.iter().zip(*rights).for_each(|(a, b)| check(words, a, b, c));
        assert!(bias.is_none_or(|bias| bias.len() == c.cols), "bias of a product");
    }
    // SAFETY: the words are available, and operands and C were checked.
    unsafe { tiles::products(parts, lefts, products) };
}

/// C += A B by the matrix unit, and where that goes along with it the sums over A's rows are added to `row_sums`
/// `[c.rows]`; says whether it did.
///
/// # Panics
/// As [`products`].
pub(super) fn product_and_sums(
    words: Words,
    a: Operand,
    b: Operand,
    c: StridedMut<f32>,
    row_sums: &mut [f32],
) -> bool {
    check(words, &a, &b, &c);
    assert_eq!(row_sums.len(), c.rows, "sums of a product's rows");
    let parts = words.tiled().expect("words of the matrix unit");
    let product = Product { rights: &[b], scale: 1.0, bias: None, c, add: true };
    // SAFETY: the words are available, and operands, C and sums were checked.
    unsafe { tiles::product(parts, a, product, Some(row_sums)) }
}

/// C = scale A B + bias, + C where `add`.
///
/// # Shapes
/// A `[c.rows, depth]`, B `[depth, c.cols]`, bias `[c.cols]`
///
/// # Panics
/// If the shapes do not fit or the processor has no such words.
pub(super) fn product(
    words: Words,
    scale: f32,
    a: Operand,
    b: Operand,
    bias: Option<&[f32]>,
    c: StridedMut<f32>,
    add: bool,
) {
    check(words, &a, &b, &c);
    let (m, n, depth) = (c.rows, c.cols, a.depth);
    assert!(bias.is_none_or(|bias| bias.len() == n), "bias of a product");
    if let Some(parts) = words.tiled() {
        let product = Product { rights: &[b], scale, bias, c, add };
        // SAFETY: the words are available, and operands and C were checked.
        unsafe { tiles::product(parts, a, product, None) };
        return;
    }
    let stride = c.row_stride;
    let out = Shared(c.data.as_mut_ptr());
    let (words_deep, threads) =
        (DEPTH.min(words.holding(depth)).max(1), rayon::current_num_threads());
    let [high_room, wide_room] = [ROWS, COLS].map(|width| words.room(width, words_deep));
    let blocks_at_once = (LEFT / high_room).min(m.div_ceil(ROWS));
    let rows_at_once = (blocks_at_once * ROWS).min(m);
    let all = Stretch { first: 0, length: depth };
    let stretches: Vec<Stretch> = all.pieces(DEPTH * words.elements()).collect();
    let of_stretch = blocks_at_once * high_room;
    let stretches_at_once = (LEFT / of_stretch.max(1)).clamp(1, stretches.len().max(1));
    let mut left = Scratch::unwritten(stretches_at_once * of_stretch);
    let width = n.div_ceil(threads).next_multiple_of(COLS).min(WIDTH);
    let across = n.div_ceil(width);
    for top in (0..m).step_by(rows_at_once) {
        let rows = rows_at_once.min(m - top);
        let blocks = rows.div_ceil(ROWS);
        // Few columns and many rows: tasks share columns.
        let high = rows.div_ceil((TASKS * threads).div_ceil(across)).max(TASK_ROWS);
        let high = high.next_multiple_of(ROWS);
        for stretches in stretches.chunks(stretches_at_once) {
            let left = &mut left[..stretches.len() * blocks * high_room];
            team::each(left.chunks_mut(high_room).enumerate(), |(i, block)| {
                let (stretch, line) = (stretches[i / blocks], top + i % blocks * ROWS);
                // SAFETY: the words are available, and the operand was checked.
                unsafe { pack(words, &a, line, stretch, block) };
            });
            let left = &*left;
            let task = |room: &mut Scratch<u32>, task: usize| {
                let (from, row) = (task % across * width, task / across * high);
                let cols = width.min(n - from);
                let panels = &mut room[..cols.div_ceil(COLS) * wide_room];
                // This task's part of C stays in the second cache from stretch to stretch.
                for (&stretch, left) in stretches.iter().zip(left.chunks_exact(blocks * high_room))
                {
                    let [high_packed, wide_packed] =
                        [ROWS, COLS].map(|width| words.room(width, words.holding(stretch.length)));
                    // SAFETY: as above.
                    unsafe { pack_panels(words, &b, from, stretch, panels, wide_room) };
                    let mine = left.chunks_exact(high_room).skip(row / ROWS);
                    for (i, block) in mine.enumerate().take(high.min(rows - row).div_ceil(ROWS)) {
                        for (j, panel) in panels.chunks_exact(wide_room).enumerate() {
                            let (row, col) = (top + row + i * ROWS, from + j * COLS);
                            let start = stretch.first == 0;
                            let tile = Tile {
                                at: out.at(row * stride + col),
                                stride,
                                rows: ROWS.min(m - row),
                                cols: COLS.min(n - col),
                                bias: bias.filter(|_| start).map(|bias| &bias[col..]),
                                scale,
                                add: add || !start,
                            };
                            let (block, panel) = (&block[..high_packed], &panel[..wide_packed]);
                            // SAFETY: the tile is inside C, and no other task has it.
                            unsafe { multiply(words, block, panel, &tile) };
                        }
                    }
                }
            };
            let tasks = 0..across * rows.div_ceil(high);
            team::each_with(tasks, || Scratch::unwritten(width / COLS * wide_room), task);
        }
    }
}

fn check(words: Words, a: &Operand, b: &Operand, c: &StridedMut<f32>) {
    assert_eq!((a.lines, b.lines, b.depth), (c.rows, c.cols, a.depth), "shapes of a product");
    assert!(available(words) && a.fits(words) && b.fits(words), "words of a product");
    a.check();
    b.check();
    c.check();
}

/// # Safety
/// The words are available and the operand checked.
unsafe fn pack(words: Words, from: &Operand, line: usize, stretch: Stretch, block: &mut [u32]) {
    let mut powers = Powers::ONE;
    if words == Words::Halves {
        let mut tops = [0; LANES];
        // SAFETY: as promised by the caller.
        unsafe { largest(from, line, stretch, ROWS, &mut tops) };
        powers = Powers::of(&tops);
        let steps = words.holding(stretch.length);
        block[steps * ROWS..][..ROWS].copy_from_slice(&powers.undone[..ROWS]);
    }
    // SAFETY: as promised by the caller.
    unsafe { pack_lines(words, from, line, stretch, block, ROWS, &powers) };
}

/// Panels that follow each other, `room` words each. Where steps of depth are far apart, in pages of their
/// own, all panels take theirs from a few steps before the next few.
///
/// # Safety
/// As [`pack`].
unsafe fn pack_panels(
    words: Words,
    b: &Operand,
    line: usize,
    stretch: Stretch,
    panels: &mut [u32],
    room: usize,
) {
    let most = if b.across() { NEAR } else { stretch.length.max(1) };
    let halves = panels.len() / room * 2;
    let mut powers = [Powers::ONE; WIDTH / LANES];
    if words == Words::Halves {
        let mut tops = [[0; LANES]; WIDTH / LANES];
        for piece in stretch.pieces(most) {
            for (half, tops) in tops.iter_mut().enumerate().take(halves) {
                // SAFETY: as promised by the caller.
                unsafe { largest(b, line + half * LANES, piece, LANES, tops) };
            }
        }
        powers = tops.map(|tops| Powers::of(&tops));
    }
    let at = |half: usize, steps: usize| half / 2 * room + half % 2 * LANES + steps * COLS;
    for piece in stretch.pieces(most) {
        let steps = words.holding(piece.first - stretch.first);
        for (half, powers) in powers.iter().enumerate().take(halves) {
            let (line, to) = (line + half * LANES, &mut panels[at(half, steps)..]);
            // SAFETY: as promised by the caller.
            unsafe { pack_lines(words, b, line, piece, to, COLS, powers) };
        }
    }
    if words == Words::Halves {
        for (half, powers) in powers.iter().enumerate().take(halves) {
            let undone = at(half, words.holding(stretch.length));
            panels[undone..][..LANES].copy_from_slice(&powers.undone);
        }
    }
}

/// # Safety
/// As [`pack`].
unsafe fn pack_lines(
    words: Words,
    from: &Operand,
    line: usize,
    stretch: Stretch,
    to: &mut [u32],
    width: usize,
    powers: &Powers,
) {
    let lanes = width.min(LANES);
    // SAFETY: as promised by the caller.
    unsafe {
        match words {
            Words::Wide => pack_wide(from, line, stretch, to, width, lanes, powers),
            Words::Pairs => pack_pairs(from, line, stretch, to, width, lanes, powers),
            Words::Tiles | Words::Thirds => unreachable!("tiles have products of their own"),
            Words::Halves => pack_halves(from, line, stretch, to, width, lanes, powers),
        }
    }
}

/// As [`product`], on this thread alone and for operands of which both fit in the second cache.
pub(super) fn product_here(
    words: Words,
    scale: f32,
    a: Operand,
    b: Operand,
    c: StridedMut<f32>,
    add: bool,
) {
    check(words, &a, &b, &c);
    if words == Words::Tiles {
        let product = Product { rights: &[b], scale, bias: None, c, add };
        // SAFETY: the words are available, and operands and C were checked.
        return unsafe { tiles::product_here(&a, product) };
    }
    let (m, n, depth) = (c.rows, c.cols, a.depth);
    let (out, stride) = (c.data.as_mut_ptr(), c.row_stride);
    let (stretch, steps) = (Stretch { first: 0, length: depth }, words.holding(depth));
    let [high_room, wide_room] = [ROWS, COLS].map(|width| words.room(width, steps));
    let left = m.div_ceil(ROWS) * high_room;
    let mut room = Scratch::unwritten(left + n.div_ceil(COLS) * wide_room);
    let (left, right) = room.split_at_mut(left);
    for (i, block) in left.chunks_exact_mut(high_room).enumerate() {
        // SAFETY: the words are available, and the operand was checked.
        unsafe { pack(words, &a, i * ROWS, stretch, block) };
    }
    for (j, panel) in right.chunks_exact_mut(wide_room).enumerate() {
        // SAFETY: as above.
        unsafe { pack_panels(words, &b, j * COLS, stretch, panel, wide_room) };
        for (i, block) in left.chunks_exact(high_room).enumerate() {
            let (row, col) = (i * ROWS, j * COLS);
            let at = out.wrapping_add(row * stride + col);
            let (rows, cols) = (ROWS.min(m - row), COLS.min(n - col));
            let tile = Tile { at, stride, rows, cols, bias: None, scale, add };
            // SAFETY: the tile is inside C.
            unsafe { multiply(words, block, panel, &tile) };
        }
    }
}

/// # Safety
/// The words are available, and the tile is inside a matrix that nobody else reads or writes there.
unsafe fn multiply(words: Words, block: &[u32], panel: &[u32], tile: &Tile) {
    // SAFETY: as promised by the caller.
    unsafe {
        match words {
            Words::Wide => wide(block, panel, tile),
            Words::Pairs => pairs(block, panel, tile),
            Words::Halves => halves(block, panel, tile),
            Words::Tiles | Words::Thirds => unreachable!("tiles have products of their own"),
        }
    }
}

/// At most [`ROWS`] x [`COLS`] elements of C, or `amx::SIDE` x as many.
pub(super) struct Tile<'a> {
    pub(super) at: *mut f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// What is added to every row, `cols` or more.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) scale: f32,
    pub(super) add: bool,
}

impl Tile<'_> {
    /// Asks for the memory before it is written, while sums are on their way.
    pub(super) fn ask(&self) {
        for r in 0..self.rows {
            for half in 0..2 {
                let at = self.at.wrapping_add(r * self.stride + half * LANES);
                // SAFETY: every x86-64 processor has it, and what is asked for need not be there.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
            }
        }
    }
}

/// Calls `$step(a, b)` for every step of depth, a `[ROWS]`, b the two registers of a panel's `[COLS]`.
macro_rules! steps {
    ($a:expr, $b:expr, $step:expr) => {
        let mut step = |a: &[u32], b: &[u32]| {
            let b = b.as_chunks::<LANES>().0;
            // SAFETY: 16 words each.
            let b = unsafe { [0, 1].map(|half| _mm512_loadu_si512(b[half].as_ptr().cast())) };
            $step(a, b);
        };
        let (a, rest_a) = $a.as_chunks::<{ UNROLLED * ROWS }>();
        let (b, rest_b) = $b.as_chunks::<{ UNROLLED * COLS }>();
        for (a, b) in a.iter().zip(b) {
            for i in 0..UNROLLED {
                step(&a[i * ROWS..][..ROWS], &b[i * COLS..][..COLS]);
            }
        }
        for (a, b) in rest_a.chunks_exact(ROWS).zip(rest_b.chunks_exact(COLS)) {
            step(a, b);
        }
    };
}

/// A step of depth for the rows named, whose element of A is spread by both instructions that use it. Spread
/// once beforehand, as the other rows' is, it costs an instruction more; so for all rows, it costs more loads
/// than the processor has time for (docs/performance.md).
macro_rules! spread_where_used {
    ($sums:ident, $a:ident, $b:ident, $($r:literal)*) => {$({
        let [low, high] = &mut $sums[$r];
        // SAFETY: reads word r of A and nothing else.
        unsafe {
            asm!(
                "vfmadd231ps {low}, {b_low}, dword ptr [{a} + {at}]{{1to16}}",
                "vfmadd231ps {high}, {b_high}, dword ptr [{a} + {at}]{{1to16}}",
                low = inout(zmm_reg) *low,
                high = inout(zmm_reg) *high,
                b_low = in(zmm_reg) $b[0],
                b_high = in(zmm_reg) $b[1],
                a = in(reg) $a.as_ptr(),
                at = const $r * size_of::<u32>(),
                options(pure, readonly, nostack, preserves_flags),
            );
        }
    })*};
}

/// The product of one stretch for one tile, in f32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn wide(a: &[u32], b: &[u32], c: &Tile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    steps!(a, b, |a: &[u32], b: [__m512i; 2]| {
        let b = b.map(|b| _mm512_castsi512_ps(b));
        spread_where_used!(sums, a, b, 0 1 2 3 4 5 6 7);
        for r in 8..ROWS {
            let a = _mm512_castsi512_ps(_mm512_set1_epi32(a[r].cast_signed()));
            sums[r] = [0, 1].map(|half| _mm512_fmadd_ps(a, b[half], sums[r][half]));
        }
    });
    // SAFETY: as promised by the caller.
    unsafe { store(&sums, c) };
}

/// The same for pairs in bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pairs(a: &[u32], b: &[u32], c: &Tile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    steps!(a, b, |a: &[u32], b: [__m512i; 2]| {
        for r in 0..ROWS {
            let a = _mm512_set1_epi32(a[r].cast_signed());
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], as_bf16(a), as_bf16(b[0]));
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], as_bf16(a), as_bf16(b[1]));
        }
    });
    // SAFETY: as promised by the caller.
    unsafe { store(&sums, c) };
}

/// The register as one of bf16.
#[target_feature(enable = "avx512f")]
#[inline]
fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any value is good.
    unsafe { std::mem::transmute(x) }
}

/// As [`pairs`], in f16: even and odd steps of depth apart from each other, [`CHAIN`] words at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512fp16")]
unsafe fn halves(a: &[u32], b: &[u32], c: &Tile) {
    let (a, a_powers) = a.split_at(a.len() - ROWS);
    let (b, b_powers) = b.split_at(b.len() - COLS);
    let mut totals = [[_mm512_setzero_ps(); 2]; ROWS];
    for (a, b) in a.chunks(CHAIN * ROWS).zip(b.chunks(CHAIN * COLS)) {
        let mut sums = [[_mm512_setzero_ph(); 2]; ROWS];
        steps!(a, b, |a: &[u32], b: [__m512i; 2]| {
            let b = b.map(|b| _mm512_castsi512_ph(b));
            for r in 0..ROWS {
                let a = _mm512_castsi512_ph(_mm512_set1_epi32(a[r].cast_signed()));
                sums[r][0] = _mm512_fmadd_ph(a, b[0], sums[r][0]);
                sums[r][1] = _mm512_fmadd_ph(a, b[1], sums[r][1]);
            }
        });
        for r in 0..ROWS {
            for half in 0..2 {
                totals[r][half] = add_pairs(sums[r][half], totals[r][half]);
            }
        }
    }
    for r in 0..ROWS {
        let a = _mm512_set1_ps(f32::from_bits(a_powers[r]));
        for half in 0..2 {
            // SAFETY: both halves are inside.
            let b = unsafe { _mm512_loadu_ps(b_powers[half * LANES..].as_ptr().cast()) };
            totals[r][half] = _mm512_mul_ps(totals[r][half], _mm512_mul_ps(a, b));
        }
    }
    // SAFETY: as promised by the caller.
    unsafe { store(&totals, c) };
}

/// Adds the two halves of every word, in f16, to the sum in f32. What is not finite comes from a line
/// whose products are NaN anyway.
#[target_feature(enable = "avx512f,avx512fp16")]
#[inline]
fn add_pairs(pairs: __m512h, sum: __m512) -> __m512 {
    let words = _mm512_castph_si512(pairs);
    let low_above = _mm512_castsi512_ph(_mm512_slli_epi32::<16>(words));
    let added = _mm512_castph_si512(_mm512_add_ph(pairs, low_above));
    // The upper half's exponent and fraction where f32 has them, its exponent 112 too low.
    let moved = _mm512_srai_epi32::<3>(added);
    let bits = _mm512_and_si512(moved, _mm512_set1_epi32(0x8fff_e000_u32.cast_signed()));
    let higher = _mm512_set1_ps(f32::from_bits((112 + 127) << 23));
    _mm512_fmadd_ps(_mm512_castsi512_ps(bits), higher, sum)
}

/// Writes a tile's sums.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(sums: &[[__m512; 2]; ROWS], c: &Tile) {
    let after = After::of(c);
    // Indexed by constants alone, so that the sums stay in registers.
    for r in 0..ROWS {
        if r < c.rows {
            // SAFETY: as promised by the caller.
            unsafe { after.store(c, r, sums[r]) };
        }
    }
}

/// The same for sums in memory, `[rows, COLS]`.
///
/// # Safety
/// The processor has the instructions, and the tile is inside a matrix that nobody else reads or writes
/// there.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_sums(sums: &[f32], c: &Tile) {
    let after = After::of(c);
    for (r, row) in sums.chunks_exact(COLS).enumerate().take(c.rows) {
        let row = row.as_chunks::<LANES>().0;
        // SAFETY: 16 elements each; else as promised by the caller.
        unsafe {
            let row = [0, 1].map(|half| _mm512_loadu_ps(row[half].as_ptr()));
            after.store(c, r, row);
        }
    }
}

/// What is done to sums before they are written.
struct After {
    scale: __m512,
    bias: [__m512; 2],
    /// The columns that are there.
    masks: [__mmask16; 2],
}

impl After {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn of(c: &Tile) -> Self {
        let masks = [mask(c.cols), mask(c.cols.saturating_sub(LANES))];
        let mut bias = [_mm512_setzero_ps(); 2];
        if let Some(row) = c.bias {
            for half in 0..2 {
                let at = row.as_ptr().wrapping_add(half * LANES);
                // SAFETY: masks keep to the columns of the tile, which the row has.
                bias[half] = unsafe { _mm512_maskz_loadu_ps(masks[half], at) };
            }
        }
        Self { scale: _mm512_set1_ps(c.scale), bias, masks }
    }

    /// # Safety
    /// The tile has the row.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store(&self, c: &Tile, r: usize, sums: [__m512; 2]) {
        for half in 0..2 {
            let at = c.at.wrapping_add(r * c.stride + half * LANES);
            // SAFETY: masks keep to the columns of the tile; a pointer past them is not followed.
            unsafe {
                let mut sum = _mm512_fmadd_ps(sums[half], self.scale, self.bias[half]);
                if c.add {
                    let before = _mm512_maskz_loadu_ps(self.masks[half], at);
                    sum = _mm512_add_ps(sum, before);
                }
                _mm512_mask_storeu_ps(at, self.masks[half], sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cpu::gemm::Strided;
    use crate::{Dtype, HostMatrix};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.4).collect()
    }

    fn stored(rows: usize, cols: usize, x: &[f32], dtype: Dtype) -> HostMatrix {
        let w = HostMatrix::from_f32(rows, cols, x);
        match dtype {
            Dtype::F32 => w,
            Dtype::Bf16 => w.to_bf16(),
            Dtype::F16 => {
                let bytes: Vec<u8> =
                    x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
                HostMatrix::new(rows, cols, dtype, Arc::new(bytes), 0)
            }
        }
    }

    const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

    /// Beyond one stretch, one task and one tile, against sums in f64 of what the words hold; and the
    /// same bits for any number of threads and wherever a row stands.
    #[test]
    fn agrees_with_the_definition_for_any_number_of_threads() {
        for words in [Words::Wide, Words::Pairs, Words::Tiles, Words::Thirds, Words::Halves] {
            for (case, dtype) in (0..4).flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
                let served = words != Words::Pairs || dtype != Dtype::F16;
                if available(words) && served {
                    agrees(words, case & 1 > 0, case & 2 > 0, dtype);
                }
            }
        }
    }

    fn agrees(words: Words, left: bool, right: bool, dtype: Dtype) {
        // Sums of so few quarters of a quarter are exact in f16.
        let numbers = |n, seed| {
            let mut numbers = numbers(n, seed);
            if words == Words::Halves {
                for x in &mut numbers {
                    *x = (*x * 4.0).round() / 4.0;
                }
            }
            numbers
        };
        let beyond = words.elements() * DEPTH + 17;
        let high = LEFT / DEPTH * 2 + 30;
        let shapes = [
            (1, 1, 1),
            (13, 33, 40),
            (30, 2 * WIDTH + 35, beyond),
            (high, 35, beyond),
            (33, 35, 4500),
        ];
        for (m, n, depth) in shapes {
            let (a, b) = (numbers(m * depth, 1), numbers(n * depth, 2));
            let (rows, cols) = if right { (n, depth) } else { (depth, n) };
            let w = stored(rows, cols, &b, dtype);
            let mut b = vec![0f64; n * depth];
            crate::cpu::linear::widen(&w, 0, &mut b);
            let before = numbers(m * n, 3);
            let bias = numbers(n, 4);
            let run = |threads: usize, rows: usize, add: bool| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1));
                let mut c = before[..rows * n].to_vec();
                let from = if left {
                    Strided::rows_apart(&a, depth, rows, m).t()
                } else {
                    Strided::new(&a[..rows * depth], rows, depth)
                };
                let from = Operand::rows_of(from).unwrap();
                let by = Operand::rows_of_weight(&w);
                let by = if right { by } else { by.t() };
                let to = StridedMut::new(&mut c, rows, n);
                let bias = add.then_some(&bias[..]);
                pool.build().unwrap().install(|| match threads {
                    0 => product_here(words, 0.5, from, by, to, add),
                    _ => product(words, 0.5, from, by, bias, to, add),
                });
                c
            };
            let added = run(1, m, true);
            let rounds = |x: f32| match words {
                Words::Wide | Words::Thirds | Words::Halves => x,
                Words::Pairs | Words::Tiles => half::bf16::from_f32(x).to_f32(),
            };
            for i in (0..m).step_by(m.div_ceil(50)).chain([m - 1]) {
                for j in 0..n {
                    let term = |k: usize| {
                        let a = rounds(a[if left { k * m + i } else { i * depth + k }]);
                        let b = b[if right { j * depth + k } else { k * n + j }];
                        0.5 * f64::from(a) * f64::from(rounds(b as f32))
                    };
                    let start = f64::from(before[i * n + j]) + f64::from(bias[j]);
                    let want = start + (0..depth).map(term).sum::<f64>();
                    let size = (0..depth).map(|k| term(k).abs()).sum::<f64>() + 1.0;
                    let got = f64::from(added[i * n + j]);
                    assert!((got - want).abs() < 4e-6 * size, "{words:?}: {got}, not {want}");
                }
            }
            assert!(added == run(2, m, true) && added == run(5, m, true));
            if depth <= DEPTH && words != Words::Thirds {
                assert!(run(0, m, false) == run(1, m, false), "as a whole");
            }
            let few = m.div_ceil(3);
            assert!(run(2, few, false) == run(1, m, false)[..few * n]);
        }
    }

    /// Rows and columns of any size, with and without elements far above the others: no further from
    /// the exact product than with factors rounded to bf16.
    #[test]
    fn halves_err_less_than_factors_in_bf16() {
        if !available(Words::Halves) {
            return;
        }
        let (m, n, depth) = (25, 40, 1500);
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut lines = |count: usize, spread: i32, outlier: f32| -> Vec<f32> {
            let line = |i: usize| {
                let size = 2f32.powi((i as i32 * 7) % (2 * spread + 1) - spread);
                (0..depth).map(move |k| if k == i { outlier * size } else { size })
            };
            (0..count).flat_map(line).map(|size| size * draw()).collect()
        };
        for (high, wide) in [(1.0, 1.0), (300.0, 1.0), (300.0, 300.0)] {
            let (a, b) = (lines(m, 60, high), lines(n, 30, wide));
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let (ours, theirs) = errors(&a, &b, depth, dtype);
                let case = format!("{high} {wide} {dtype:?}");
                assert!(ours > 0.0 && ours < 0.95 * theirs, "{case}: {ours:e} {theirs:e}");
            }
        }
    }

    /// How far a product of halves and one of factors in bf16 are from the exact one, each element over
    /// the lengths of its row and column: roots of mean squares.
    fn errors(a: &[f32], b: &[f32], depth: usize, dtype: Dtype) -> (f64, f64) {
        let (m, n) = (a.len() / depth, b.len() / depth);
        let w = stored(n, depth, b, dtype);
        let mut b = vec![0f64; b.len()];
        crate::cpu::linear::widen(&w, 0, &mut b);
        let mut c = vec![0f32; m * n];
        let to = StridedMut::new(&mut c, m, n);
        let from = Operand::rows_of(Strided::new(a, m, depth)).unwrap();
        product(Words::Halves, 1.0, from, Operand::rows_of_weight(&w), None, to, false);
        let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (c, a) in c.chunks_exact(n).zip(a.chunks_exact(depth)) {
            let a: Vec<f64> = a.iter().map(|&a| f64::from(a)).collect();
            for (&c, b) in c.iter().zip(b.chunks_exact(depth)) {
                let sum = |f: &dyn Fn(f64) -> f64| -> f64 {
                    a.iter().zip(b).map(|(&a, &b)| f(a) * f(b)).sum()
                };
                let (want, size) = (sum(&|x| x), length(&a) * length(b));
                ours.push((f64::from(c) - want) / size);
                theirs.push((sum(&|x| half::bf16::from_f64(x).to_f64()) - want) / size);
            }
        }
        let root = ((m * n) as f64).sqrt();
        (length(&ours) / root, length(&theirs) / root)
    }

    /// An infinity or NaN spoils its own row or column and nothing else; zeros and the smallest numbers
    /// do no harm.
    #[test]
    fn halves_keep_what_is_not_finite_to_its_line() {
        if !available(Words::Halves) {
            return;
        }
        let (m, n, depth) = (14, 35, 50);
        let (mut a, mut b) = (vec![1f32; m * depth], vec![1f32; n * depth]);
        a[3 * depth + 7] = f32::INFINITY;
        b[20 * depth + 49] = f32::NAN;
        a[5 * depth..6 * depth].fill(0.0);
        a[6 * depth..7 * depth].fill(f32::from_bits(1));
        b[depth..2 * depth].fill(f32::MIN_POSITIVE);
        for across in [false, true] {
            let turned = |x: &[f32], lines: usize| -> Vec<f32> {
                (0..x.len()).map(|i| x[i % lines * depth + i / lines]).collect()
            };
            let (a, b) =
                if across { (turned(&a, m), turned(&b, n)) } else { (a.clone(), b.clone()) };
            let lines = |x, lines| {
                let along = if across {
                    Strided::new(x, depth, lines).t()
                } else {
                    Strided::new(x, lines, depth)
                };
                Operand::rows_of(along).unwrap()
            };
            let mut c = vec![0f32; m * n];
            let to = StridedMut::new(&mut c, m, n);
            product(Words::Halves, 1.0, lines(&a, m), lines(&b, n), None, to, false);
            for (i, c) in c.iter().enumerate() {
                let (row, col) = (i / n, i % n);
                let spoilt = row == 3 || col == 20;
                let want = if row == 5 || row == 6 || col == 1 { 0.0 } else { depth as f32 };
                assert!(
                    if spoilt { c.is_nan() } else { (c - want).abs() < 1e-30 },
                    "{row} {col}: {c}"
                );
            }
        }
    }
}
