//! The gated activation of an FFN: SwiGLU and GeGLU (Shazeer 2020).

use super::elementwise::CHUNK;
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
    match act {
        GateActivation::Silu => forward_with::<T, Silu>(gate, up, y),
        GateActivation::GeluTanh => forward_with::<T, GeluTanh>(gate, up, y),
    }
}

fn forward_with<T: Float, A: Act>(gate: &[T], up: &[T], y: &mut [T]) {
    let inputs = gate.chunks(CHUNK).zip(up.chunks(CHUNK));
    team::each(y.chunks_mut(CHUNK).zip(inputs), |(y, (gate, up))| {
        simd!({
            for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                *y = A::value(g) * u;
            }
        });
    });
}

/// In place: gate and up become the slopes by them.
pub(super) fn backward<T: Float>(act: GateActivation, dy: &[T], gate: &mut [T], up: &mut [T]) {
    match act {
        GateActivation::Silu => backward_with::<T, Silu>(dy, gate, up),
        GateActivation::GeluTanh => backward_with::<T, GeluTanh>(dy, gate, up),
    }
}

fn backward_with<T: Float, A: Act>(dy: &[T], gate: &mut [T], up: &mut [T]) {
    assert!(dy.len() == gate.len() && dy.len() == up.len(), "gated shapes");
    let slopes = gate.chunks_mut(CHUNK).zip(up.chunks_mut(CHUNK));
    team::each(slopes.zip(dy.chunks(CHUNK)), |((gate, up), dy)| {
        simd!({
            for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
                let (value, slope) = A::value_and_slope(*g);
                (*g, *u) = (dy * *u * slope, dy * value);
            }
        });
    });
}
