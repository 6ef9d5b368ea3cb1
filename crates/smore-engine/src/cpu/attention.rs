//! Causal attention with grouped queries: online softmax forward, recomputing backward (Dao 2023).
//! Scores may be soft-capped and a query's view limited to a window (Gemma 2).
//!
//! Scores exist for one block of queries and keys at a time, so memory grows with the length of a
//! sequence, not with its square. What is saved is the output and one log-sum-exp per row.

use super::gemm::{Strided, StridedMut, product_here};
use super::simd::{self, dot, simd};
use crate::{AttentionShape, Float, Span, team};
use std::ops::Range;

/// Queries and keys of one block of scores.
const BLOCK: usize = 64;

/// What the forward pass leaves for the backward pass.
pub(super) struct Saved<'a, T> {
    pub(super) q: &'a [T],
    pub(super) k: &'a [T],
    pub(super) v: &'a [T],
    pub(super) out: &'a [T],
    pub(super) lse: &'a [T],
}

/// One block of queries of one sequence.
struct QueryBlock<'a, T> {
    span: Span,
    /// First query, counted in its span.
    first: usize,
    out: &'a mut [T],
    lse: &'a mut [T],
}

pub(super) fn forward<T: Float>(
    mixed: bool,
    shape: &AttentionShape,
    q: &[T],
    k: &[T],
    v: &[T],
    mut out: &mut [T],
    mut lse: &mut [T],
) {
    let (heads, width) = (shape.heads, shape.heads * shape.head_dim);
    let mut blocks = Vec::new();
    let mut row = 0;
    for &span in &shape.spans {
        assert!(span.q_start == row && span.k_len >= span.q_len, "attention spans");
        for first in (0..span.q_len).step_by(BLOCK) {
            let rows = BLOCK.min(span.q_len - first);
            let (o, rest_o) = out.split_at_mut(rows * width);
            let (l, rest_l) = lse.split_at_mut(rows * heads);
            blocks.push(QueryBlock { span, first, out: o, lse: l });
            (out, lse) = (rest_o, rest_l);
            row += rows;
        }
    }
    team::each(blocks.into_iter(), |mut block| {
        let mut scores = [T::ZERO; BLOCK * BLOCK];
        for head in 0..heads {
            forward_head(mixed, shape, q, k, v, &mut block, head, &mut scores);
        }
    });
}

fn forward_head<T: Float>(
    mixed: bool,
    shape: &AttentionShape,
    q: &[T],
    k: &[T],
    v: &[T],
    block: &mut QueryBlock<T>,
    head: usize,
    scores: &mut [T],
) {
    let AttentionShape { heads, head_dim, .. } = *shape;
    let (width, kv_width) = (heads * head_dim, shape.kv_heads * head_dim);
    let kv_column = head / (heads / shape.kv_heads) * head_dim;
    let (span, first) = (block.span, block.first);
    let rows = block.lse.len() / heads;
    let q = &q[(span.q_start + first) * width + head * head_dim..];
    let hidden = span.k_len - span.q_len;
    let soft_cap = shape.soft_cap.map(T::from_f64);
    let mut max = [T::from_f64(f64::NEG_INFINITY); BLOCK];
    let mut sum = [T::ZERO; BLOCK];
    let blocks = key_blocks(shape, span, first, rows);
    let start = blocks.start;
    for k_first in blocks.clone().step_by(BLOCK) {
        let keys = BLOCK.min(blocks.end - k_first);
        let kv_at = (span.k_start + k_first) * kv_width + kv_column;
        let s = &mut scores[..rows * keys];
        product_here(
            mixed,
            T::from_f64(shape.scale),
            Strided::rows_apart(q, rows, head_dim, width),
            Strided::rows_apart(&k[kv_at..], keys, head_dim, kv_width).t(),
            T::ZERO,
            StridedMut::new(s, rows, keys),
        );
        for r in 0..rows {
            let seen = seen(shape, hidden + first + r, k_first, keys);
            let row = &mut s[r * keys..(r + 1) * keys];
            let out = &mut block.out[r * width + head * head_dim..][..head_dim];
            simd!({
                if let Some(cap) = soft_cap {
                    cap_scores(cap, &mut row[seen.clone()]);
                }
                let top = simd::max(max[r], &row[seen.clone()]);
                // Nothing seen yet: there is nothing to fade.
                let fade = if sum[r] > T::ZERO { (max[r] - top).exp() } else { T::ZERO };
                for x in &mut row[seen.clone()] {
                    *x = (*x - top).exp();
                }
                row[..seen.start].fill(T::ZERO);
                row[seen.end..].fill(T::ZERO);
                let total = simd::sum(row);
                // The first block finds whatever the buffer held: it must not survive.
                for o in out {
                    *o = if k_first == start { T::ZERO } else { *o * fade };
                }
                (max[r], sum[r]) = (top, sum[r] * fade + total);
            });
        }
        product_here(
            mixed,
            T::ONE,
            Strided::new(s, rows, keys),
            Strided::rows_apart(&v[kv_at..], keys, head_dim, kv_width),
            T::ONE,
            StridedMut::rows_apart(&mut block.out[head * head_dim..], rows, head_dim, width),
        );
    }
    for r in 0..rows {
        let out = &mut block.out[r * width + head * head_dim..][..head_dim];
        simd!({
            for o in out {
                *o /= sum[r];
            }
        });
        block.lse[r * heads + head] = max[r] + sum[r].ln();
    }
}

/// Keys that any of `rows` queries from `first` on sees, from the start of a block of keys.
fn key_blocks(shape: &AttentionShape, span: Span, first: usize, rows: usize) -> Range<usize> {
    let at = span.k_len - span.q_len + first;
    let lowest = shape.window.map_or(0, |w| (at + 1).saturating_sub(w));
    lowest / BLOCK * BLOCK..at + rows
}

/// Which of `keys` keys from `k_first` on the query at position `at` sees.
#[inline(always)]
fn seen(shape: &AttentionShape, at: usize, k_first: usize, keys: usize) -> Range<usize> {
    let end = (at + 1).saturating_sub(k_first).min(keys);
    let start = shape.window.map_or(0, |w| (at + 1).saturating_sub(w + k_first));
    start.min(end)..end
}

#[inline(always)]
fn cap_scores<T: Float>(cap: T, scores: &mut [T]) {
    for s in scores {
        *s = cap * (*s / cap).tanh();
    }
}

/// Gradients of one sequence and one key head, contiguous; added to the outputs afterwards.
struct HeadGrads<T> {
    span: Span,
    kv_head: usize,
    /// `[q_len, group * head_dim]`
    dq: Vec<T>,
    /// `[k_len, head_dim]`
    dk: Vec<T>,
    /// `[k_len, head_dim]`
    dv: Vec<T>,
}

pub(super) fn backward<T: Float>(
    mixed: bool,
    shape: &AttentionShape,
    saved: &Saved<T>,
    dout: &[T],
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let group = heads / kv_heads;
    let (q_width, width) = (group * head_dim, head_dim);
    // Made by one thread: those that ask the allocator at the same time wait for each other.
    let part = |(&span, kv_head): (&Span, usize)| HeadGrads {
        span,
        kv_head,
        dq: Vec::with_capacity(span.q_len * q_width),
        dk: Vec::with_capacity(span.k_len * width),
        dv: Vec::with_capacity(span.k_len * width),
    };
    let heads_of = |span| (0..kv_heads).map(move |head| (span, head));
    let mut parts: Vec<HeadGrads<T>> = shape.spans.iter().flat_map(heads_of).map(part).collect();
    team::each(parts.iter_mut(), |part| backward_kv_head(mixed, shape, saved, dout, part));
    let head = |part: &HeadGrads<T>| part.kv_head * width;
    add_parts(dq, heads * head_dim, q_width, &parts, |part| {
        (part.span.q_start, part.kv_head * q_width, &part.dq)
    });
    let stride = kv_heads * head_dim;
    add_parts(dk, stride, width, &parts, |part| (part.span.k_start, head(part), &part.dk));
    add_parts(dv, stride, width, &parts, |part| (part.span.k_start, head(part), &part.dv));
}

/// Adds to `target`, of rows `stride` long, one block `[.., width]` of every part, which begins at the
/// row and column that `block` tells.
fn add_parts<T: Float>(
    target: &mut [T],
    stride: usize,
    width: usize,
    parts: &[HeadGrads<T>],
    block: impl for<'a> Fn(&'a HeadGrads<T>) -> (usize, usize, &'a [T]) + Sync,
) {
    team::each(target.chunks_mut(BLOCK * stride).enumerate(), |(i, rows)| {
        let first = i * BLOCK;
        for part in parts {
            let (row, column, block) = block(part);
            let from = row.max(first);
            let to = (row + block.len() / width).min(first + rows.len() / stride);
            for r in from..to {
                let target = &mut rows[(r - first) * stride + column..][..width];
                let block = &block[(r - row) * width..][..width];
                simd!({
                    for (t, &b) in target.iter_mut().zip(block) {
                        *t += b;
                    }
                });
            }
        }
    });
}

fn backward_kv_head<T: Float>(
    mixed: bool,
    shape: &AttentionShape,
    saved: &Saved<T>,
    dout: &[T],
    grads: &mut HeadGrads<T>,
) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let group = heads / kv_heads;
    let (span, kv_head) = (grads.span, grads.kv_head);
    grads.dq.resize(span.q_len * group * head_dim, T::ZERO);
    grads.dk.resize(span.k_len * head_dim, T::ZERO);
    grads.dv.resize(span.k_len * head_dim, T::ZERO);
    let mut p = [T::ZERO; BLOCK * BLOCK];
    let mut dp = [T::ZERO; BLOCK * BLOCK];
    for member in 0..group {
        let head = kv_head * group + member;
        for first in (0..span.q_len).step_by(BLOCK) {
            let rows = BLOCK.min(span.q_len - first);
            let mut delta = [T::ZERO; BLOCK];
            for (r, delta) in delta.iter_mut().enumerate().take(rows) {
                let at = ((span.q_start + first + r) * heads + head) * head_dim;
                let (slopes, out) = (&dout[at..at + head_dim], &saved.out[at..at + head_dim]);
                *delta = simd!(dot(slopes, out));
            }
            let blocks = key_blocks(shape, span, first, rows);
            for k_first in blocks.clone().step_by(BLOCK) {
                let keys = BLOCK.min(blocks.end - k_first);
                let tile = Tile { mixed, shape, span, head, kv_head, first, rows, k_first, keys };
                let (p, dp) = (&mut p[..rows * keys], &mut dp[..rows * keys]);
                tile.scores(saved, dout, &delta, p, dp);
                tile.accumulate(saved, dout, p, dp, member, grads);
            }
        }
    }
}

/// One block of queries against one block of keys.
struct Tile<'a> {
    mixed: bool,
    shape: &'a AttentionShape,
    span: Span,
    head: usize,
    kv_head: usize,
    first: usize,
    rows: usize,
    k_first: usize,
    keys: usize,
}

impl Tile<'_> {
    /// This tile's rows of a query-shaped matrix.
    fn queries<'a, T: Float>(&self, x: &'a [T]) -> Strided<'a, T> {
        let width = self.shape.heads * self.shape.head_dim;
        let at = (self.span.q_start + self.first) * width + self.head * self.shape.head_dim;
        Strided::rows_apart(&x[at..], self.rows, self.shape.head_dim, width)
    }

    /// This tile's rows of a key-shaped matrix.
    fn keys<'a, T: Float>(&self, x: &'a [T]) -> Strided<'a, T> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let at = (self.span.k_start + self.k_first) * width + self.kv_head * self.shape.head_dim;
        Strided::rows_apart(&x[at..], self.keys, self.shape.head_dim, width)
    }

    /// p = exp(scores - lse); dscores = p (dout v^T - delta), times the cap's slope, left in `dp`.
    fn scores<T: Float>(
        &self,
        saved: &Saved<T>,
        dout: &[T],
        delta: &[T],
        p: &mut [T],
        dp: &mut [T],
    ) {
        let (rows, keys) = (self.rows, self.keys);
        let scale = T::from_f64(self.shape.scale);
        let (q, k) = (self.queries(saved.q), self.keys(saved.k));
        product_here(self.mixed, scale, q, k.t(), T::ZERO, StridedMut::new(p, rows, keys));
        let (g, v) = (self.queries(dout), self.keys(saved.v));
        product_here(self.mixed, T::ONE, g, v.t(), T::ZERO, StridedMut::new(dp, rows, keys));
        let hidden = self.span.k_len - self.span.q_len;
        let soft_cap = self.shape.soft_cap.map(T::from_f64);
        for r in 0..rows {
            let seen = seen(self.shape, hidden + self.first + r, self.k_first, keys);
            let lse =
                saved.lse[(self.span.q_start + self.first + r) * self.shape.heads + self.head];
            let (p, dp) = (&mut p[r * keys..(r + 1) * keys], &mut dp[r * keys..(r + 1) * keys]);
            // Indexed out here: with a check in it a loop stays scalar.
            let delta = delta[r];
            simd!({
                let (p, dp) = (&mut p[seen.clone()], &mut dp[seen.clone()]);
                if let Some(cap) = soft_cap {
                    for (p, dp) in p.iter_mut().zip(dp) {
                        let t = (*p / cap).tanh();
                        *p = (cap * t - lse).exp();
                        *dp = *p * (*dp - delta) * (T::ONE - t * t);
                    }
                } else {
                    for (p, dp) in p.iter_mut().zip(dp) {
                        *p = (*p - lse).exp();
                        *dp = *p * (*dp - delta);
                    }
                }
            });
            for x in [p, dp] {
                x[..seen.start].fill(T::ZERO);
                x[seen.end..].fill(T::ZERO);
            }
        }
    }

    /// dv += p^T dout, dk += scale dscores^T q, dq += scale dscores k.
    fn accumulate<T: Float>(
        &self,
        saved: &Saved<T>,
        dout: &[T],
        p: &[T],
        ds: &[T],
        member: usize,
        grads: &mut HeadGrads<T>,
    ) {
        let (rows, keys, dim) = (self.rows, self.keys, self.shape.head_dim);
        let scale = T::from_f64(self.shape.scale);
        let (p, ds) = (Strided::new(p, rows, keys), Strided::new(ds, rows, keys));
        let dv = StridedMut::new(&mut grads.dv[self.k_first * dim..], keys, dim);
        product_here(self.mixed, T::ONE, p.t(), self.queries(dout), T::ONE, dv);
        let dk = StridedMut::new(&mut grads.dk[self.k_first * dim..], keys, dim);
        product_here(self.mixed, scale, ds.t(), self.queries(saved.q), T::ONE, dk);
        let stride = self.shape.heads / self.shape.kv_heads * dim;
        let dq = &mut grads.dq[self.first * stride + member * dim..];
        let dq = StridedMut::rows_apart(dq, rows, dim, stride);
        product_here(self.mixed, scale, ds, self.keys(saved.k), T::ONE, dq);
    }
}
