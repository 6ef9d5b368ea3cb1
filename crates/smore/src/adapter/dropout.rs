//! Dropout on an adapter's input, and the products that meet it.
//!
//! ```text
//! z = [A dropout(x); R x]
//! ```
//!
//! Down factors A see the input with elements dropped, as in LoRA; what chooses experts (R) sees
//! all of it, as in HydraLoRA and MixLoRA, so that dropout never changes a tree by itself. Which
//! elements are dropped is a function of the key: backward computes it again.

use super::NoiseKey;
use crate::rng::{Purpose, stream};
use rand::Rng;
use smore_engine::{Device, Dropout, MatrixRef, View, ViewMut};

/// Dropout in a training step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InputDropout {
    /// Share of the input's elements that is dropped.
    pub rate: f64,
    /// Names the stream of random numbers.
    pub key: NoiseKey,
}

/// Which of an adapter's inputs is dropped from.
#[derive(Clone, Copy)]
pub(super) enum Input {
    /// The input of the map or of the FFN.
    Outer,
    /// What MixLoRA's experts compute inside the FFN.
    Inner,
}

impl InputDropout {
    /// The elements from number `first` of an input on.
    pub(super) fn from(self, input: Input, first: usize) -> Dropout {
        let NoiseKey { seed, step, place } = self.key;
        let mut keys = stream(seed, Purpose::Dropout, step, place);
        let [outer, inner] = [keys.next_u64(), keys.next_u64()];
        let key = match input {
            Input::Outer => outer,
            Input::Inner => inner,
        };
        Dropout { key, first: first as u64, rate: self.rate }
    }
}

/// All that meets an adapter's input, as one matrix `[rows, d_in]`; the first `down` rows are down
/// factors.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    pub(super) d_in: usize,
    pub(super) rows: usize,
    pub(super) down: usize,
}

impl Stack {
    /// z `[n, rows]`, `biases [rows]` added where there are any
    pub(super) fn project<D: Device>(
        self,
        device: &D,
        dropout: Option<InputDropout>,
        stack: View<D>,
        biases: Option<View<D>>,
        x: View<D>,
    ) -> D::Buf {
        let Self { d_in, rows, down } = self;
        let n = x.len / d_in;
        let mut z = device.unwritten(n * rows);
        let mut z_view = ViewMut::new(&mut z, n * rows);
        let Some(dropout) = dropout else {
            device.linear(x, MatrixRef::Trained(stack, rows, d_in), biases, z_view, n, false);
            return z;
        };
        let mut dropped = device.zeros(x.len);
        device.dropout(dropout.from(Input::Outer, 0), x, ViewMut::new(&mut dropped, x.len));
        for (x, part) in [(View::new(&dropped, x.len), 0..down), (x, down..rows)] {
            if part.is_empty() {
                continue;
            }
            let map = stack.at(part.start * d_in..part.end * d_in).mat(part.len(), d_in);
            let target = z_view.rb().at(part.start..n * rows).mat_strided(n, part.len(), rows);
            device.gemm(1.0, x.mat(n, d_in), map.t(), 0.0, target);
        }
        if let Some(biases) = biases {
            device.add_row(biases, z_view);
        }
        z
    }

    /// The backward pass of [`Stack::project`].
    pub(super) fn backward<D: Device>(
        self,
        device: &D,
        dropout: Option<InputDropout>,
        stack: View<D>,
        x: View<D>,
        dz: View<D>,
        mut dstack: ViewMut<D>,
        mut dx: Option<ViewMut<D>>,
    ) {
        let Self { d_in, rows, down } = self;
        let n = x.len / d_in;
        let Some(dropout) = dropout.map(|d| d.from(Input::Outer, 0)) else {
            let dz = dz.mat(n, rows);
            device.gemm(1.0, dz.t(), x.mat(n, d_in), 1.0, dstack.mat(rows, d_in));
            if let Some(dx) = dx {
                device.gemm(1.0, dz, stack.mat(rows, d_in), 1.0, dx.mat(n, d_in));
            }
            return;
        };
        let mut dropped = device.zeros(x.len);
        device.dropout(dropout, x, ViewMut::new(&mut dropped, x.len));
        for (own, part) in [(Some(()), 0..down), (None, down..rows)] {
            if part.is_empty() {
                continue;
            }
            let (map, width) = (part.start * d_in..part.end * d_in, part.len());
            let dz = dz.at(part.start..n * rows).mat_strided(n, width, rows);
            let seen = own.map_or(x, |()| View::new(&dropped, x.len));
            let target = dstack.rb().at(map.clone()).mat(width, d_in);
            device.gemm(1.0, dz.t(), seen.mat(n, d_in), 1.0, target);
            let (Some(dx), map) = (&mut dx, stack.at(map).mat(width, d_in)) else { continue };
            if own.is_none() {
                device.gemm(1.0, dz, map, 1.0, dx.rb().mat(n, d_in));
                continue;
            }
            // In place of the dropped input, which is no longer needed.
            let mut slopes = ViewMut::new(&mut dropped, x.len);
            device.gemm(1.0, dz, map, 0.0, slopes.rb().mat(n, d_in));
            device.dropout(dropout, slopes.view(), dx.rb());
        }
    }
}
