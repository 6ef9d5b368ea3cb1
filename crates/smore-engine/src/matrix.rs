//! Frozen matrices as they lie in a file.

use crate::team;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Storage type of a frozen matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Largest values for which f16 serves well: it holds them, and its smallest step is at most 2^-14 of them.
const F16_SERVES: RangeInclusive<f32> = 1.0 / 1024.0..=65504.0;

/// A frozen matrix `[rows, cols]`: little-endian bytes owned by someone else, usually a memory
/// map, so that loading a model copies nothing.
#[derive(Clone)]
pub struct HostMatrix {
    /// Rows (outputs of a linear map).
    pub rows: usize,
    /// Columns (inputs of a linear map).
    pub cols: usize,
    /// How the elements are stored.
    pub dtype: Dtype,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
}

impl HostMatrix {
    /// A matrix whose elements start at byte `start` of `owner`.
    ///
    /// # Panics
    /// If `owner` ends before the matrix does: the reader of the file checks that first.
    pub fn new(
        rows: usize,
        cols: usize,
        dtype: Dtype,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        start: usize,
    ) -> Self {
        let end = start + rows * cols * dtype.bytes();
        assert!(end <= (*owner).as_ref().len(), "matrix reaches past its bytes");
        Self { rows, cols, dtype, owner, start }
    }

    /// A matrix that owns its `f32` elements.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols, "element count");
        let bytes: Vec<u8> = bytemuck::cast_slice(values).to_vec();
        Self::new(rows, cols, Dtype::F32, Arc::new(bytes), 0)
    }

    /// The same matrix rounded to bf16 (to the nearest, ties to even), in memory of its own.
    pub fn to_bf16(&self) -> Self {
        let mut bytes = vec![0u8; self.rows * self.cols * 2];
        let width = self.cols.max(1);
        team::each(bytes.chunks_mut(width * 2).enumerate(), |(row, out)| {
            let from = self.row_bytes(row, 1);
            let put = |out: &mut [u8; 2], x: f32| *out = half::bf16::from_f32(x).to_le_bytes();
            let out = out.as_chunks_mut::<2>().0.iter_mut();
            match self.dtype {
                Dtype::F32 => out
                    .zip(from.as_chunks::<4>().0)
                    .for_each(|(out, b)| put(out, f32::from_le_bytes(*b))),
                Dtype::F16 => out
                    .zip(from.as_chunks::<2>().0)
                    .for_each(|(out, b)| put(out, f16::from_le_bytes(*b).to_f32())),
                Dtype::Bf16 => out.zip(from.as_chunks::<2>().0).for_each(|(out, b)| *out = *b),
            }
        });
        Self::new(self.rows, self.cols, Dtype::Bf16, Arc::new(bytes), 0)
    }

    /// The matrix of these values rounded to 16 bits, in memory of its own: to f16, which keeps 11 bits of a
    /// value, where the largest is one of those that f16 serves well, else to bf16.
    pub fn halved(rows: usize, cols: usize, values: &[f32]) -> Self {
        const RUN: usize = 4096;
        assert_eq!(values.len(), rows * cols, "element count");
        // Of bits, since a comparison with NaN says nothing.
        let largest = values.iter().fold(0, |most, x| x.abs().to_bits().max(most));
        if !F16_SERVES.contains(&f32::from_bits(largest)) {
            return Self::from_f32(rows, cols, values).to_bf16();
        }
        let mut bytes = vec![0u8; values.len() * 2];
        team::each(bytes.chunks_mut(RUN * 2).zip(values.chunks(RUN)), |(out, values)| {
            let mut halves = [f16::ZERO; RUN];
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            let out = out.as_chunks_mut::<2>().0.iter_mut();
            out.zip(halves).for_each(|(out, half)| *out = half.to_le_bytes());
        });
        Self::new(rows, cols, Dtype::F16, Arc::new(bytes), 0)
    }

    /// Bytes of rows `first..first + n`.
    pub fn row_bytes(&self, first: usize, n: usize) -> &[u8] {
        let width = self.cols * self.dtype.bytes();
        let start = self.start + first * width;
        &(*self.owner).as_ref()[start..start + n * width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(matrix: &HostMatrix) -> Vec<f32> {
        let numbers = matrix.row_bytes(0, matrix.rows).as_chunks::<2>().0.iter();
        match matrix.dtype {
            Dtype::F16 => numbers.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            _ => numbers.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    /// To 2^-11 of a value in f16, or half of its smallest step, 2^-24; to 2^-8 in bf16, whatever the size.
    #[test]
    fn halved_values_are_near() {
        let (rows, cols) = (37, 300);
        let base: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 37) % 97) as f32 / 97.0 - 0.5).collect();
        for (factor, dtype) in [
            (1.0, Dtype::F16),
            (1e5, Dtype::F16),
            (3e-3, Dtype::F16),
            (1e-4, Dtype::Bf16),
            (1e6, Dtype::Bf16),
        ] {
            let values: Vec<f32> = base.iter().map(|x| x * factor).collect();
            let halved = HostMatrix::halved(rows, cols, &values);
            assert_eq!((halved.rows, halved.cols, halved.dtype), (rows, cols, dtype), "{factor}");
            let (relative, absolute) = if dtype == Dtype::F16 {
                (2f32.powi(-11), 2f32.powi(-25))
            } else {
                (2f32.powi(-8), 0.0)
            };
            let mut changed = 0;
            for (&x, got) in values.iter().zip(back(&halved)) {
                assert!(
                    (got - x).abs() <= (relative * x.abs()).max(absolute) * 1.001,
                    "{x}: {got}"
                );
                changed += usize::from(got != x);
            }
            assert!(changed > 0);
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let halved = HostMatrix::halved(1, 3, &[1.0, f32::NAN, f32::NEG_INFINITY]);
        let [one, nan, infinite] = back(&halved).try_into().unwrap();
        assert!(one == 1.0 && nan.is_nan() && infinite == f32::NEG_INFINITY);
        assert_eq!(back(&HostMatrix::halved(1, 2, &[0.0, -0.0])), [0.0, 0.0]);
    }
}
