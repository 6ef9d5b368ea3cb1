//! AdamW (Loshchilov & Hutter 2019), in the order of PyTorch's implementation.

use super::simd::simd;
use crate::{AdamW, Float, team};

pub(super) fn adamw<T: Float>(
    step: &AdamW,
    values: &mut [T],
    grads: &[T],
    m: &mut [T],
    v: &mut [T],
) {
    const CHUNK: usize = 1 << 14;
    let power = |beta: f64| 1.0 - beta.powi(i32::try_from(step.step).unwrap_or(i32::MAX));
    let rate = T::from_f64(step.learning_rate / power(step.beta1));
    let root = T::from_f64(power(step.beta2).sqrt());
    let keep = T::from_f64(1.0 - step.learning_rate * step.weight_decay);
    let (b1, c1) = (T::from_f64(step.beta1), T::from_f64(1.0 - step.beta1));
    let (b2, c2) = (T::from_f64(step.beta2), T::from_f64(1.0 - step.beta2));
    let epsilon = T::from_f64(step.epsilon);
    let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
    let parameters = values.chunks_mut(CHUNK).zip(grads.chunks(CHUNK));
    team::each(parameters.zip(moments), |((values, grads), (m, v))| {
        simd!({
            let moments = m.iter_mut().zip(v);
            for ((p, &g), (m, v)) in values.iter_mut().zip(grads).zip(moments) {
                *m = b1 * *m + c1 * g;
                *v = b2 * *v + c2 * g * g;
                *p = *p * keep - rate * *m / (v.sqrt() / root + epsilon);
            }
        });
    });
}
