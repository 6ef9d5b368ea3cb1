//! The pointwise non-linearities, forward and backward.

use crate::config::Activation;
use smore_engine::cpu::simd;
use smore_engine::{Float, Scratch};

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

    /// y = sigma(x), in the place of x where [`Act::backward`] does without x: it is empty then.
    pub(crate) fn forward(self, x: &mut Scratch<T>) -> Scratch<T> {
        let kept = matches!(self, Self::Prelu(_));
        let mut y = if kept { Scratch::copy(x) } else { std::mem::take(x) };
        simd!(match self {
            Self::Identity => {}
            Self::Relu => map(&mut y, |x| if x > T::ZERO { x } else { T::ZERO }),
            Self::Tanh => map(&mut y, T::tanh),
            Self::Prelu(a) => map(&mut y, |x| if x > T::ZERO { x } else { a * x }),
        });
        y
    }

    /// dy *= sigma'(x), given x and y as [`Act::forward`] left them; returns the gradient of the slope.
    pub(crate) fn backward(self, x: &[T], y: &[T], dy: &mut [T]) -> T {
        simd!(match self {
            Self::Identity => T::ZERO,
            Self::Relu => {
                for (dy, &y) in dy.iter_mut().zip(y) {
                    *dy = if y > T::ZERO { *dy } else { T::ZERO };
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
fn map<T: Float>(x: &mut [T], f: impl Fn(T) -> T) {
    for x in x {
        *x = f(*x);
    }
}
