//! The gated activation of an FFN: SwiGLU and GeGLU (Shazeer 2020).

use super::elementwise::{CHUNK, unwritten};
use super::kept::{Kept, Widen};
use super::simd::simd;
use crate::{Float, GateActivation, team};

/// An activation and its slope.
trait Act {
    fn value<T: Float>(x: T) -> T;
    fn value_and_slope<T: Float>(x: T) -> (T, T);
}

struct Silu;

impl Act for Silu {
    #[inline(always)]
    fn value<T: Float>(x: T) -> T {
        x * x.sigmoid()
    }

    /// With s = sigmoid(x): s (1 + x (1 - s)).
    #[inline(always)]
    fn value_and_slope<T: Float>(x: T) -> (T, T) {
        let s = x.sigmoid();
        (x * s, s * (T::ONE + x * (T::ONE - s)))
    }
}

struct GeluTanh;

impl GeluTanh {
    /// sqrt(2 / pi)
    const ROOT: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    const CUBIC: f64 = 0.044_715;

    /// t = tanh(sqrt(2/pi) (x + 0.044715 x^3))
    #[inline(always)]
    fn tanh<T: Float>(x: T) -> T {
        (T::from_f64(Self::ROOT) * (x + T::from_f64(Self::CUBIC) * x * x * x)).tanh()
    }
}

impl Act for GeluTanh {
    #[inline(always)]
    fn value<T: Float>(x: T) -> T {
        T::from_f64(0.5) * x * (T::ONE + Self::tanh(x))
    }

    /// (1 + t)/2 + x/2 (1 - t^2) sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    #[inline(always)]
    fn value_and_slope<T: Float>(x: T) -> (T, T) {
        let (half, t) = (T::from_f64(0.5), Self::tanh(x));
        let inner = T::from_f64(Self::ROOT) * (T::ONE + T::from_f64(3.0 * Self::CUBIC) * x * x);
        let left = half * (T::ONE + t);
        (x * left, left + half * x * (T::ONE - t * t) * inner)
    }
}

pub(super) fn forward<T: Float>(act: GateActivation, gate: &[T], up: &[T], y: &mut [T]) {
    assert!(y.len() == gate.len() && y.len() == up.len(), "gated shapes");
    forward_pieces(act, gate.chunks(CHUNK), up.chunks(CHUNK), y);
}

/// As [`forward`], of what was kept.
pub(super) fn forward_kept<T: Float>(
    act: GateActivation,
    gate: &Kept<T>,
    up: &Kept<T>,
    y: &mut [T],
) {
    match (gate, up) {
        (Kept::Whole(gate), Kept::Whole(up)) => forward(act, gate, up, y),
        (Kept::Halves(gate), Kept::Halves(up)) => {
            assert!([gate, up].map(|x| elements(x)) == [y.len(); 2], "gated shapes");
            let [gate, up] = [gate, up].map(|pieces| pieces.iter().map(Vec::as_slice));
            forward_pieces(act, gate, up, y);
        }
        _ => unreachable!("a device keeps all alike"),
    }
}

fn elements(pieces: &[Vec<u16>]) -> usize {
    pieces.iter().map(Vec::len).sum()
}

/// Pieces of `CHUNK` elements.
fn forward_pieces<'a, T: Float, E: Widen<T> + 'a>(
    act: GateActivation,
    gate: impl Iterator<Item = &'a [E]>,
    up: impl Iterator<Item = &'a [E]>,
    y: &mut [T],
) {
    let pieces = y.chunks_mut(CHUNK).zip(gate.zip(up));
    match act {
        GateActivation::Silu => team::each(pieces, values::<T, E, Silu>),
        GateActivation::GeluTanh => team::each(pieces, values::<T, E, GeluTanh>),
    }
}

fn values<T: Float, E: Widen<T>, A: Act>((y, (gate, up)): (&mut [T], (&[E], &[E]))) {
    simd!({
        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
            *y = A::value(g.widened()) * u.widened();
        }
    });
}

/// In place: gate and up become the slopes by them.
pub(super) fn backward<T: Float>(act: GateActivation, dy: &[T], gate: &mut [T], up: &mut [T]) {
    assert!(dy.len() == gate.len() && dy.len() == up.len(), "gated shapes");
    let slopes = gate.chunks_mut(CHUNK).zip(up.chunks_mut(CHUNK));
    let pieces = slopes.zip(dy.chunks(CHUNK));
    match act {
        GateActivation::Silu => team::each(pieces, slopes_in_place::<T, Silu>),
        GateActivation::GeluTanh => team::each(pieces, slopes_in_place::<T, GeluTanh>),
    }
}

fn slopes_in_place<T: Float, A: Act>(((gate, up), dy): (Written<T>, &[T])) {
    simd!({
        for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
            (*g, *u) = slopes::<T, A>(dy, *g, *u);
        }
    });
}

/// Those by gate and up.
#[inline(always)]
fn slopes<T: Float, A: Act>(dy: T, gate: T, up: T) -> (T, T) {
    let (value, slope) = A::value_and_slope(gate);
    (dy * up * slope, dy * value)
}

/// The slopes by a gate and an up that were kept.
pub(super) fn backward_kept<T: Float>(
    act: GateActivation,
    dy: &[T],
    gate: Kept<T>,
    up: Kept<T>,
) -> [Vec<T>; 2] {
    let (gate, up) = match (gate, up) {
        (Kept::Whole(mut gate), Kept::Whole(mut up)) => {
            backward(act, dy, &mut gate, &mut up);
            return [gate, up];
        }
        (Kept::Halves(gate), Kept::Halves(up)) => (gate, up),
        _ => unreachable!("a device keeps all alike"),
    };
    assert!([&gate, &up].map(|x| elements(x)) == [dy.len(); 2], "gated shapes");
    let [mut dgate, mut dup] = [(); 2].map(|()| unwritten(dy.len()));
    let written = dgate.chunks_mut(CHUNK).zip(dup.chunks_mut(CHUNK));
    let pieces = written.zip(dy.chunks(CHUNK).zip(gate.into_iter().zip(up)));
    match act {
        GateActivation::Silu => team::each(pieces, slopes_of_kept::<T, Silu>),
        GateActivation::GeluTanh => team::each(pieces, slopes_of_kept::<T, GeluTanh>),
    }
    [dgate, dup]
}

/// A piece of the slopes by gate and up.
type Written<'a, T> = (&'a mut [T], &'a mut [T]);
/// A piece of dy, and of gate and up as they were kept.
type Read<'a, T> = (&'a [T], (Vec<u16>, Vec<u16>));

fn slopes_of_kept<T: Float, A: Act>(((dgate, dup), (dy, (gate, up))): (Written<T>, Read<T>)) {
    simd!({
        let inputs = dy.iter().zip(gate.iter().zip(&up));
        for ((dg, du), (&dy, (&g, &u))) in dgate.iter_mut().zip(dup).zip(inputs) {
            (*dg, *du) = slopes::<T, A>(dy, g.widened(), u.widened());
        }
    });
}
