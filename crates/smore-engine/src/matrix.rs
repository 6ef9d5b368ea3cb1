//! Frozen matrices as they lie in a file.

use crate::team;
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
                    .for_each(|(out, b)| put(out, half::f16::from_le_bytes(*b).to_f32())),
                Dtype::Bf16 => out.zip(from.as_chunks::<2>().0).for_each(|(out, b)| *out = *b),
            }
        });
        Self::new(self.rows, self.cols, Dtype::Bf16, Arc::new(bytes), 0)
    }

    /// Bytes of rows `first..first + n`.
    pub fn row_bytes(&self, first: usize, n: usize) -> &[u8] {
        let width = self.cols * self.dtype.bytes();
        let start = self.start + first * width;
        &(*self.owner).as_ref()[start..start + n * width]
    }
}
