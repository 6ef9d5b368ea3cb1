//! Short-lived buffers of one thread.
//!
//! A pass over a block of tokens makes dozens of buffers of some kilobytes and drops them again, on every
//! thread at the same time. From the allocator they cost waits for its lock, and memory between what
//! other threads hold. So a thread takes them one behind the other from chunks of its own, and a chunk
//! begins anew when all that was taken from it is dropped. Packed operands are such buffers, too: what a
//! product has packed into serves the trees after it.

use bytemuck::Pod;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;
use std::slice;

/// What chunks are counted in.
const LINE: usize = 64;
/// Lines of the smallest chunk; the n-th has n times as many, so that there are never many chunks.
const LEAST: usize = 1024;

/// A buffer that stays on the thread which made it.
///
/// Buffers should be dropped soon and the newest first: the room of one is used again when those behind
/// it are gone.
pub struct Scratch<T> {
    at: NonNull<T>,
    len: usize,
    /// Where its lines are; none where it is empty.
    from: Option<(Rc<Chunk>, usize)>,
}

#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "reached through pointers")] [u8; LINE]);

struct Chunk {
    lines: Box<[UnsafeCell<Line>]>,
    /// Lines from here on are free.
    used: Cell<usize>,
}

thread_local! {
    static CHUNKS: RefCell<Vec<Rc<Chunk>>> = const { RefCell::new(Vec::new()) };
}

impl Chunk {
    fn of(lines: usize) -> Rc<Self> {
        let lines = (0..lines).map(|_| UnsafeCell::new(Line([0; LINE]))).collect();
        Rc::new(Self { lines, used: Cell::new(0) })
    }

    fn rest(&self) -> usize {
        self.lines.len() - self.used.get()
    }

    /// A chunk of this thread with so many free lines: of those that have them the one with the fewest.
    fn with(lines: usize) -> Rc<Self> {
        CHUNKS.with_borrow_mut(|chunks| {
            let enough = chunks.iter().filter(|chunk| chunk.rest() >= lines);
            if let Some(chunk) = enough.min_by_key(|chunk| chunk.rest()) {
                return Rc::clone(chunk);
            }
            // One that is too small and that nobody uses goes instead of staying beside the new one.
            let unused = (0..chunks.len()).filter(|&i| Rc::strong_count(&chunks[i]) == 1);
            if let Some(largest) = unused.max_by_key(|&i| chunks[i].lines.len()) {
                chunks.swap_remove(largest);
            }
            let chunk = Self::of(lines.max(LEAST * (chunks.len() + 1)));
            chunks.push(Rc::clone(&chunk));
            chunk
        })
    }
}

impl<T: Pod> Scratch<T> {
    /// Zeros.
    pub fn zeros(len: usize) -> Self {
        let mut all = Self::unwritten(len);
        all.fill(T::zeroed());
        all
    }

    /// The row so many times.
    pub fn repeat(row: &[T], times: usize) -> Self {
        let mut all = Self::unwritten(row.len() * times);
        if !row.is_empty() {
            all.chunks_exact_mut(row.len()).for_each(|part| part.copy_from_slice(row));
        }
        all
    }

    /// The same elements.
    pub fn copy(from: &[T]) -> Self {
        Self::repeat(from, 1)
    }

    /// What lay there before, and NaN where debug assertions are on.
    pub(crate) fn unwritten(len: usize) -> Self {
        const { assert!(align_of::<T>() <= LINE) };
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        if lines == 0 {
            return Self { at: NonNull::dangling(), len, from: None };
        }
        let chunk = Chunk::with(lines);
        let first = chunk.used.replace(chunk.used.get() + lines);
        let start: *const UnsafeCell<Line> = chunk.lines[first..first + lines].as_ptr();
        let at = NonNull::new(start.cast_mut().cast()).expect("an address in a chunk");
        let mut all = Self { at, len, from: Some((chunk, first)) };
        if cfg!(debug_assertions) {
            bytemuck::cast_slice_mut::<T, u8>(&mut all).fill(0xff);
        }
        all
    }
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { at: NonNull::dangling(), len: 0, from: None }
    }
}

impl<T> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the lines are this buffer's alone until it is dropped and live as long as the chunk; they
        // hold bytes that were written, and only `Pod` elements are made of them.
        unsafe { slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; what is written inside a cell may be reached by others.
        unsafe { slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let Some((chunk, first)) = &self.from else { return };
        let lines = (self.len * size_of::<T>()).div_ceil(LINE);
        // Held by this buffer and by the thread alone.
        if Rc::strong_count(chunk) <= 2 {
            chunk.used.set(0);
        } else if first + lines == chunk.used.get() {
            chunk.used.set(*first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> usize {
        CHUNKS.with_borrow(|chunks| chunks.iter().map(|chunk| chunk.lines.len() * LINE).sum())
    }

    /// Buffers of all sizes, made and dropped in any order: each keeps what was written to it.
    #[test]
    fn buffers_do_not_meet() {
        let mut state = 7u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let mut alive: Vec<(u64, Scratch<u64>)> = Vec::new();
        for round in 0..4000 {
            if !alive.is_empty() && draw(20) < 10 {
                let (mark, buffer) = alive.swap_remove(draw(alive.len() as u64) as usize);
                assert!(buffer.iter().all(|&x| x == mark), "round {round}");
            } else {
                let len = draw(3000) as usize * usize::from(draw(9) > 0);
                alive.push((round, Scratch::copy(&vec![round; len])));
            }
        }
        assert!(alive.iter().all(|(mark, buffer)| buffer.iter().all(|x| x == mark)));
        alive.clear();
        assert!(CHUNKS.with_borrow(|chunks| chunks.iter().all(|chunk| chunk.used.get() == 0)));
    }

    #[test]
    fn room_is_used_again() {
        let block = || {
            let first = Scratch::<f32>::zeros(10_000);
            let second = Scratch::<f32>::zeros(20_000);
            drop(first);
            let third = Scratch::<f64>::zeros(5_000);
            assert!(second.iter().all(|&x| x == 0.0) && third.iter().all(|&x| x == 0.0));
        };
        block();
        let before = held();
        for _ in 0..100 {
            block();
        }
        assert_eq!(held(), before);
        // A larger one takes the place of those that are too small.
        drop(Scratch::<u8>::zeros(3 * before));
        assert!(held() >= 3 * before && held() < 4 * before);
        // The newest gives its room back at once.
        let _first = Scratch::<f32>::zeros(100);
        let at = Scratch::<f32>::zeros(100).as_ptr();
        assert_eq!(Scratch::<f32>::zeros(100).as_ptr(), at);
    }

    #[test]
    fn elements_are_those_asked_for() {
        drop(Scratch::copy(&[u8::MAX; 5000]));
        assert!(Scratch::<f32>::zeros(1000).iter().all(|x| x.to_bits() == 0));
        assert_eq!(*Scratch::repeat(&[1u16, 2, 3], 3), [1, 2, 3, 1, 2, 3, 1, 2, 3]);
        assert_eq!(*Scratch::copy(&[0.5f64, -1.0]), [0.5, -1.0]);
        assert!(Scratch::<f32>::repeat(&[], 3).is_empty() && Scratch::<f32>::default().is_empty());
    }
}
