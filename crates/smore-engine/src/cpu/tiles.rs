//! Products by the matrix unit ([`super::amx`]): C = s A B (+ C).
//!
//! As in `packed` both operands are copied into the order in which the innermost loop reads them. The unit
//! is so fast that the caches above bound it: a task packs its own columns, keeps sums of all of its rows
//! and columns in the second cache and goes over both operands a short stretch of depth at a time.
//!
//! Factors in f32 are split into three in bf16, whose 3 x 8 bits hold all 24: x = x1 + x2 + x3. Six of the nine
//! products of parts are multiplied, the others are below 2^-24 of the whole (Henry, Tang and Heinecke
//! 2019). What is stored in bf16 is one part. An infinity gives NaN, since its other parts are none.

use super::amx::{AHEAD, SIDE, Unit, multiply};
use super::gemm::{Shared, StridedMut};
use super::packed::{Tile, store_sums};
use super::packing::{Operand, Stretch};
use super::tiling::{pack_block, pack_panels, turn, words_of};
use crate::{Dtype, Scratch, team};
use std::ops::Range;

/// Elements of depth that are packed at a time, in one part; a third of them in three, after which sums are added to
/// C: with longer ones a product errs more than one in f32 does.
const DEPTH: usize = 4096;
/// Words of the left operand that are packed at a time: [`HIGH`] rows of that depth, and an eighth more for what
/// lies between blocks.
const ROOM: usize = 9 << 17;
/// The most rows and columns of a task, whose sums stay in the second cache.
const HIGH: usize = 512;
const WIDE: usize = 256;
/// The fewest columns, where there are not enough tasks.
const NARROW: usize = 128;
/// An operand with so many times the lines of the other is packed by tasks, not as a whole.
const THIN: usize = 4;
/// The fewest rows of a task, where columns are few.
const LOW: usize = 256;
/// Tasks of a thread, so that one whose core is busy with other things leaves some to the others.
const TASKS: usize = 4;

/// Words of depth after which sums leave the tiles: panels of as many steps stay in the first cache while
/// blocks of the left operand pass.
const fn stretch_of(parts: usize) -> usize {
    if parts == 1 { 128 } else { 64 }
}

/// C = scale (A_1 B_1 + A_2 B_2 + ..) + bias, + C where `add`: one of several that have all A in common.
pub(super) struct Product<'a> {
    /// B_1, B_2, ..
    pub(super) rights: &'a [Operand<'a>],
    pub(super) scale: f32,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) c: StridedMut<'a, f32>,
    pub(super) add: bool,
}

/// A product of one A and one B, with A in one part or in three. The sums over A's rows are added to `row_sums`
/// where it is turned; says whether that was done.
///
/// # Safety
/// As [`products`]; there is a sum for each row.
pub(super) unsafe fn product<'a>(
    parts: usize,
    a: Operand<'a>,
    product: Product<'a>,
    row_sums: Option<&mut [f32]>,
) -> bool {
    // What is left is packed as a whole, and where lines are beside each other it has to be turned for
    // that: let it be the smaller one, and turn what comes of it.
    let b = product.rights[0];
    let words = b.lines.div_ceil(SIDE) * words_of(a.depth) * parts;
    let thin = b.lines * THIN <= a.lines && words <= ROOM / 2;
    let turned = parts_of(&b, parts) == parts && (thin || a.across() && b.lines < a.lines);
    let (a, b) = if turned { (b, a) } else { (a, b) };
    let lines = row_sums.filter(|_| turned).map(|sums| Shared(sums.as_mut_ptr()));
    let done = lines.is_some();
    let sum = Sum { rights: &[b], turned, lines, ..Sum::of(product) };
    // SAFETY: as promised by the caller.
    unsafe { sums(parts, &[a], vec![sum]) };
    done
}

/// Products of `lefts`, which are packed once for all, in one part or in three, and added up in f32.
///
/// # Safety
/// As [`packed::products`](super::packed::products) checks: the unit is available, shapes fit, and operands
/// and C have what their strides reach.
pub(super) unsafe fn products(parts: usize, lefts: &[Operand], products: Vec<Product>) {
    // SAFETY: as promised by the caller.
    unsafe { sums(parts, lefts, products.into_iter().map(Sum::of).collect()) };
}

/// # Safety
/// As [`products`].
unsafe fn sums(parts: usize, lefts: &[Operand], mut sums: Vec<Sum>) {
    let (m, threads) = (lefts[0].lines, rayon::current_num_threads());
    for pieces in passes(parts, lefts) {
        let blocks = Blocks::of(parts, pieces);
        let high = alike(m, ROOM / blocks.apart() * SIDE, SIDE);
        let words = high.div_ceil(SIDE) * blocks.apart();
        let mut packed = Scratch::unwritten(room_for(words, ROOM));
        let packed = &mut packed[..words];
        for top in (0..m).step_by(high) {
            blocks.fill(packed, |piece, line, to| {
                let (a, line) = (&lefts[piece.of], top + line);
                // SAFETY: as promised by the caller.
                unsafe {
                    match parts {
                        1 => pack_block::<1>(a, line, piece.stretch, to),
                        _ => pack_block::<3>(a, line, piece.stretch, to),
                    }
                }
            });
            let pass = Pass { blocks: &blocks, left: packed, top };
            let of_sum = |sum| pass.tasks(sum, high.min(m - top), TASKS * threads);
            let tasks: Vec<Vec<Task>> = sums.iter().map(of_sum).collect();
            let most = |words: &dyn Fn(&Task) -> usize| {
                tasks.iter().flatten().map(words).max().unwrap_or(0)
            };
            let (sums, panels) = (most(&|task| task.sums()), most(&|task| pass.panels(task)));
            let widest = WIDE * stretch_of(parts) * parts;
            let own = || Own {
                unit: Unit::configured(),
                sums: Scratch::unwritten(room_for(sums, HIGH * WIDE)),
                panels: Scratch::unwritten(room_for(panels, widest)),
                lines: [0.0; WIDE],
            };
            // Every thread begins with its share of each sum.
            let share = |tasks: &[Task], thread| tasks.len() * thread / threads;
            let shares = (0..threads).flat_map(|thread| {
                tasks.iter().flat_map(move |t| &t[share(t, thread)..share(t, thread + 1)])
            });
            // SAFETY: as promised by the caller; no other task has these rows and columns.
            team::each_with(shares, own, |own, task| unsafe { pass.run(own, task) });
        }
        for sum in &mut sums {
            (sum.add, sum.bias) = (true, None);
        }
    }
}

/// A stretch of depth of one of the left operands.
#[derive(Clone, Copy)]
struct Piece {
    of: usize,
    stretch: Stretch,
}

/// What is packed at a time of the left operands: each in pieces that are alike, a short one with the last of the one
/// before it.
fn passes(parts: usize, lefts: &[Operand]) -> Vec<Vec<Piece>> {
    let (most, short) = (DEPTH / parts, 2 * stretch_of(parts));
    let mut passes: Vec<Vec<Piece>> = vec![];
    for (of, a) in lefts.iter().enumerate() {
        let whole = Stretch { first: 0, length: a.depth };
        for deep in whole.pieces(alike(a.depth, most, short).max(1)) {
            let pieces = deep.pieces(short).map(|stretch| Piece { of, stretch });
            let before = passes.last_mut().filter(|_| deep.first == 0);
            let before = before.filter(|before| {
                before.iter().map(|piece| piece.stretch.length).sum::<usize>() + deep.length <= most
            });
            match before {
                Some(before) => before.extend(pieces),
                None => passes.push(pieces.collect()),
            }
        }
    }
    passes
}

/// The parts of a right operand where the left one is in so many.
fn parts_of(b: &Operand, parts: usize) -> usize {
    if b.dtype == Dtype::Bf16 { 1 } else { parts }
}

/// Where products are added up, and how.
struct Sum<'a> {
    rights: &'a [Operand<'a>],
    at: Shared<f32>,
    stride: usize,
    rows: usize,
    cols: usize,
    bias: Option<&'a [f32]>,
    scale: f32,
    add: bool,
    /// Whether a product's rows are columns here.
    turned: bool,
    /// To what the sums over the right operand's lines are added.
    lines: Option<Shared<f32>>,
}

impl<'a> Sum<'a> {
    fn of(product: Product<'a>) -> Self {
        let Product { rights, scale, bias, c, add } = product;
        let StridedMut { data, rows, cols, row_stride: stride } = c;
        let at = Shared(data.as_mut_ptr());
        Self { rights, at, stride, rows, cols, bias, scale, add, turned: false, lines: None }
    }

    /// Of a product's row and column.
    fn tile(&self, row: usize, col: usize) -> Tile<'_> {
        let (row, col) = if self.turned { (col, row) } else { (row, col) };
        Tile {
            at: self.at.at(row * self.stride + col),
            stride: self.stride,
            rows: SIDE.min(self.rows - row),
            cols: SIDE.min(self.cols - col),
            bias: self.bias.map(|bias| &bias[col..]),
            scale: self.scale,
            add: self.add,
        }
    }
}

/// Blocks `rows` times as many panels from column `from` on.
struct Task<'a> {
    sum: &'a Sum<'a>,
    rows: Range<usize>,
    from: usize,
    panels: usize,
}

impl Task<'_> {
    fn sums(&self) -> usize {
        self.rows.len() * self.panels * SIDE * SIDE
    }
}

/// A stretch of depth for some rows of the left operands, which are packed.
struct Pass<'a> {
    blocks: &'a Blocks,
    left: &'a [u32],
    /// The first of the rows.
    top: usize,
}

/// What a thread needs for its tasks.
struct Own {
    unit: Unit,
    /// 32 x 32 for every block of a task's rows and every panel of its columns.
    sums: Scratch<f32>,
    /// A stretch of a task's columns.
    panels: Scratch<u32>,
    /// Sums over a task's columns.
    lines: [f32; WIDE],
}

impl Pass<'_> {
    /// By rows: what a thread has packed and what it writes stays in its own cache.
    fn tasks<'a>(&self, sum: &'a Sum<'a>, rows: usize, wanted: usize) -> Vec<Task<'a>> {
        let n = sum.rights[0].lines;
        let (high, wide) = task(self.blocks.parts, rows, n, wanted);
        let blocks =
            (0..rows).step_by(high).map(|row| row / SIDE..rows.min(row + high).div_ceil(SIDE));
        let all = blocks.flat_map(|rows| {
            (0..n).step_by(wide).map(move |from| {
                let panels = wide.min(n - from).div_ceil(SIDE);
                Task { sum, rows: rows.clone(), from, panels }
            })
        });
        all.collect()
    }

    /// Words of a panel of what a left operand is multiplied with.
    fn room(&self, sum: &Sum) -> usize {
        let words = |piece: &Piece| {
            words_of(piece.stretch.length) * parts_of(&sum.rights[piece.of], self.blocks.parts)
        };
        self.blocks.pieces.iter().map(words).max().unwrap_or(0)
    }

    /// Words of all panels of a task.
    fn panels(&self, task: &Task) -> usize {
        task.panels * self.room(task.sum)
    }

    /// # Safety
    /// As [`product`], and nobody else reads or writes these rows and columns of C.
    unsafe fn run(&self, own: &mut Own, task: &Task) {
        let (Task { sum, rows, from, .. }, room) = (task, self.room(task.sum));
        let words = &mut own.panels[..task.panels * room];
        // Once for each column.
        let lines = sum.lines.as_ref().filter(|_| self.top + rows.start == 0);
        own.lines.fill(0.0);
        for (s, Piece { of, stretch }) in self.blocks.pieces.iter().enumerate() {
            let b = &sum.rights[*of];
            let parts = (self.blocks.parts, parts_of(b, self.blocks.parts));
            let line_sums = lines.map(|_| &mut own.lines[..]);
            // SAFETY: as promised by the caller.
            unsafe {
                match parts.1 {
                    1 => pack_panels::<1>(b, *from, *stretch, words, room, line_sums),
                    _ => pack_panels::<3>(b, *from, *stretch, words, room, line_sums),
                }
            }
            let last = s + 1 == self.blocks.pieces.len();
            let mut sums = own.sums.chunks_exact_mut(SIDE * SIDE);
            for i in rows.clone() {
                let block = self.blocks.block(self.left, s, i);
                // What is multiplied after it.
                let next = match (i + 1 < rows.end, last) {
                    (true, _) => self.blocks.block(self.left, s, i + 1),
                    (false, false) => self.blocks.block(self.left, s + 1, rows.start),
                    (false, true) => block,
                };
                for (j, panel) in words.chunks_exact(room).enumerate() {
                    let panel = &panel[..words_of(stretch.length) * parts.1];
                    let sums = sums.next().expect("room for all blocks and panels");
                    // A share of it with every panel.
                    let ahead = next.as_ptr().wrapping_add(j * AHEAD * block.len() / SIDE);
                    let tile = sum.tile(self.top + i * SIDE, from + j * SIDE);
                    if last {
                        tile.ask();
                    }
                    multiply(&own.unit, parts, block, panel, sums, s > 0, ahead);
                    if last {
                        // SAFETY: the tile is inside C and this task's; the processor has the instructions.
                        unsafe {
                            if sum.turned {
                                turn(sums);
                            }
                            store_sums(sums, &tile);
                        }
                    }
                }
            }
        }
        let cols = (task.panels * SIDE).min(sum.rights[0].lines - from);
        for (i, x) in own.lines.iter().enumerate().take(lines.map_or(0, |_| cols)) {
            // SAFETY: there is one for each line, and these are this task's.
            unsafe { *sum.lines.as_ref().expect("sums").at(from + i) += x };
        }
    }
}

/// What is taken for so many words: those that need a good part of `most` are alike, so that one finds room where another
/// was.
fn room_for(words: usize, most: usize) -> usize {
    if words > most / 8 { words.max(most) } else { words }
}

/// The length of pieces that are alike, `most` at most, multiples of `of` unless there is but one.
fn alike(length: usize, most: usize, of: usize) -> usize {
    let pieces = length.div_ceil(most.max(1)).max(1);
    length.div_ceil(pieces).next_multiple_of(of).min(length)
}

/// Rows and columns of a task: narrow before they are low, since every task packs its columns. In one part
/// packing weighs more than the room that sums of more rows take from the second cache.
fn task(parts: usize, rows: usize, cols: usize, wanted: usize) -> (usize, usize) {
    let cut = |lines: usize, parts: usize| lines.div_ceil(parts).next_multiple_of(SIDE);
    let highest = if parts == 1 && cols >= wanted * WIDE { 2 * HIGH } else { HIGH };
    let high = rows.div_ceil(highest);
    let wide = cut(cols, wanted.div_ceil(high)).clamp(NARROW.min(cut(cols, 1)), WIDE);
    let high = wanted.div_ceil(cols.div_ceil(wide)).min(rows.div_ceil(LOW)).max(high);
    (cut(rows, high), wide)
}

/// Where the blocks of packed left operands are: for every [`SIDE`] lines their pieces, in one part or in three.
struct Blocks {
    parts: usize,
    pieces: Vec<Piece>,
    /// Words of a piece of a block.
    room: usize,
}

impl Blocks {
    fn of(parts: usize, pieces: Vec<Piece>) -> Self {
        let longest = pieces.iter().map(|piece| words_of(piece.stretch.length)).max();
        Self { parts, pieces, room: longest.unwrap_or(0) * parts }
    }

    /// Words from one block to the next. Blocks whose distance is a large power of two would take each
    /// other's place in the cache.
    fn apart(&self) -> usize {
        self.pieces.len() * self.room + self.room / 2
    }

    fn fill(&self, words: &mut [u32], pack: impl Fn(&Piece, usize, &mut [u32]) + Sync) {
        let blocks = words.chunks_mut(self.apart()).enumerate().flat_map(|(block, words)| {
            let pieces = words.chunks_mut(self.room).zip(&self.pieces);
            pieces.map(move |(to, piece)| (piece, block * SIDE, to))
        });
        team::each(blocks, |(piece, line, to)| {
            pack(piece, line, &mut to[..words_of(piece.stretch.length) * self.parts]);
        });
    }

    fn block<'a>(&self, words: &'a [u32], piece: usize, block: usize) -> &'a [u32] {
        let length = words_of(self.pieces[piece].stretch.length) * self.parts;
        &words[block * self.apart() + piece * self.room..][..length]
    }
}

/// A product with both operands in one part, on this thread alone, of which both fit in the second cache.
///
/// # Safety
/// As [`products`].
pub(super) unsafe fn product_here(a: &Operand, product: Product) {
    let (b, sum) = (&product.rights[0], Sum::of(product));
    let (m, n) = (sum.rows, sum.cols);
    let (whole, room) = (Stretch { first: 0, length: a.depth }, words_of(a.depth).max(1));
    let mut left = Scratch::unwritten(m.div_ceil(SIDE) * room);
    for (i, to) in left.chunks_exact_mut(room).enumerate() {
        // SAFETY: as promised by the caller.
        unsafe { pack_block::<1>(a, i * SIDE, whole, to) };
    }
    let (unit, mut sums) = (Unit::configured(), Scratch::unwritten(SIDE * SIDE));
    let mut panel = Scratch::unwritten(room);
    for col in (0..n).step_by(SIDE) {
        // SAFETY: as promised by the caller.
        unsafe { pack_panels::<1>(b, col, whole, &mut panel, room, None) };
        for (i, block) in left.chunks_exact(room).enumerate() {
            multiply(&unit, (1, 1), block, &panel, &mut sums, false, block.as_ptr());
            // SAFETY: the tile is inside C.
            unsafe { store_sums(&sums, &sum.tile(i * SIDE, col)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemm::Strided;
    use super::super::packed::{available, product};
    use super::super::packing::Words;
    use super::*;
    use crate::HostMatrix;

    fn draw(n: usize, spread: i32) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|i| next() * 2f32.powi((i as i32 * 5) % (2 * spread + 1) - spread)).collect()
    }

    fn multiplied(words: Words, a: &[f32], b: &HostMatrix, depth: usize) -> Vec<f32> {
        let (m, n) = (a.len() / depth, b.rows);
        let from = Operand::rows_of(Strided::new(a, m, depth)).expect("rows");
        let mut c = vec![0.0; m * n];
        let to = StridedMut::new(&mut c, m, n);
        product(words, 1.0, from, Operand::rows_of_weight(b), None, to, false);
        c
    }

    /// In three parts a product is as exact as one that is computed in f32, for weights in f32 and in bf16 and for
    /// elements of many sizes beside each other.
    #[test]
    fn three_parts_err_no_more_than_f32() {
        if !available(Words::Thirds) {
            return;
        }
        let (m, n, depth) = (70, 40, 3000);
        for spread in [0, 6, 20] {
            let (a, b) = (draw(m * depth, spread), draw(n * depth, spread / 2));
            let whole = HostMatrix::from_f32(n, depth, &b);
            for w in [whole.to_bf16(), whole] {
                let mut b = vec![0f64; n * depth];
                crate::cpu::linear::widen(&w, 0, &mut b);
                let error = |words| -> f64 {
                    let c = multiplied(words, &a, &w, depth);
                    let far = c.iter().enumerate().map(|(at, &c)| {
                        let (a, b) = (&a[at / n * depth..][..depth], &b[at % n * depth..][..depth]);
                        let terms = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * b);
                        (f64::from(c) - terms.clone().sum::<f64>()).powi(2)
                            / terms.map(|x| x * x).sum::<f64>()
                    });
                    (far.sum::<f64>() / c.len() as f64).sqrt()
                };
                let (thirds, wide) = (error(Words::Thirds), error(Words::Wide));
                assert!(thirds > 0.0 && thirds < wide, "{spread}: {thirds:e}, not below {wide:e}");
            }
        }
    }

    /// What is not finite spoils its own row and nothing else; the largest and smallest numbers do no harm.
    #[test]
    fn what_is_not_finite_keeps_to_its_row() {
        for words in [Words::Tiles, Words::Thirds] {
            if !available(words) {
                return;
            }
            let (m, n, depth) = (67, 35, 70);
            let mut a = vec![1f32; m * depth];
            a[3 * depth + 7] = f32::INFINITY;
            a[40 * depth + 69] = f32::NAN;
            a[5 * depth..6 * depth].fill(0.0);
            a[6 * depth..7 * depth].fill(f32::from_bits(1));
            a[7 * depth] = 3e38;
            let w = HostMatrix::from_f32(n, depth, &vec![1.0; n * depth]);
            for (at, c) in multiplied(words, &a, &w, depth).into_iter().enumerate() {
                let right = match at / n {
                    3 | 40 => !c.is_finite(),
                    5 | 6 => c.abs() < 1e-30,
                    7 => (c / 3e38 - 1.0).abs() < 4e-3,
                    _ => c == depth as f32,
                };
                assert!(right, "{words:?}, row {}: {c}", at / n);
            }
        }
    }

    #[test]
    fn pieces_cover_their_length_and_are_alike() {
        for length in [1, 31, 32, 33, 500, 513, 1000, 4097] {
            for most in [32, 500, 512] {
                let piece = alike(length, most, SIDE);
                assert!(piece <= length && piece < most + SIDE);
                assert!(piece == length || piece.is_multiple_of(SIDE));
                assert!(length.div_ceil(piece) <= length.div_ceil(most));
            }
        }
    }
}
