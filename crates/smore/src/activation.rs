//! The pointwise non-linearities, forward and backward.

use crate::config::Activation;
use smore_engine::Float;
use smore_engine::cpu::simd;

/// An activation with its current slope, where it has one.
#[derive(Clone, Copy)]
pub(crate) enum Act<T> {
    Identity,
    Relu,
    Tanh,
    Prelu(T),
}

impl<T: Float> Act<T> {
    pub(crate) fn new(activation: Activation, slope: Option<T>) -> Self {
        match activation {
            Activation::Identity => Self::Identity,
            Activation::Relu => Self::Relu,
            Activation::Tanh => Self::Tanh,
            Activation::Prelu(start) => Self::Prelu(slope.unwrap_or(T::from_f64(start))),
        }
    }

    /// y = sigma(x)
    pub(crate) fn forward(self, x: &[T], y: &mut [T]) {
        simd!(match self {
            Self::Identity => y.copy_from_slice(x),
            Self::Relu => map(x, y, |x| if x > T::ZERO { x } else { T::ZERO }),
            Self::Tanh => map(x, y, T::tanh),
            Self::Prelu(a) => map(x, y, |x| if x > T::ZERO { x } else { a * x }),
        });
    }

    /// dy *= sigma'(x), given x and y = sigma(x); returns the gradient of the slope.
    pub(crate) fn backward(self, x: &[T], y: &[T], dy: &mut [T]) -> T {
        simd!(match self {
            Self::Identity => T::ZERO,
            Self::Relu => {
                for (dy, &x) in dy.iter_mut().zip(x) {
                    *dy = if x > T::ZERO { *dy } else { T::ZERO };
                }
                T::ZERO
            }
            Self::Tanh => {
                for (dy, &y) in dy.iter_mut().zip(y) {
                    *dy *= T::ONE - y * y;
                }
                T::ZERO
            }
            Self::Prelu(a) => {
                let mut dslope = T::ZERO;
                for (dy, &x) in dy.iter_mut().zip(x) {
                    if x <= T::ZERO {
                        dslope += *dy * x;
                        *dy *= a;
                    }
                }
                dslope
            }
        })
    }
}

#[inline(always)]
fn map<T: Float>(x: &[T], y: &mut [T], f: impl Fn(T) -> T) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
}
