//! Random values, and models made of them.

use crate::case::{Precision, Shape};
use anyhow::Result;
use safetensors::{Dtype, View};
use smore_engine::HostMatrix;
use smore_tune::model::spec::DecoderSpec;
use std::borrow::Cow;
use std::path::Path;

/// `n` values between -1 and 1.
pub(crate) fn floats(seed: u64, n: usize) -> Vec<f32> {
    drawn(seed).take(n).collect()
}

/// Values between -1 and 1.
pub(crate) fn drawn(seed: u64) -> impl Iterator<Item = f32> {
    let mut x = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// A tensor whose values are drawn when they are written, so that a model is never whole in memory.
struct Drawn {
    shape: Vec<usize>,
    dtype: Precision,
    seed: u64,
}

impl View for Drawn {
    fn dtype(&self) -> Dtype {
        if self.dtype == Precision::Bfloat16 { Dtype::BF16 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let n: usize = self.shape.iter().product();
        let values: Vec<f32> = if self.shape.len() == 1 {
            vec![1.0; n]
        } else {
            let scale = (self.shape[1] as f32).sqrt().recip();
            drawn(self.seed).take(n).map(|v| v * scale).collect()
        };
        let host = HostMatrix::from_f32(1, n, &values);
        let host = if self.dtype == Precision::Bfloat16 { host.to_bf16() } else { host };
        Cow::Owned(host.row_bytes(0, 1).to_vec())
    }

    fn data_len(&self) -> usize {
        let size = if self.dtype == Precision::Bfloat16 { 2 } else { 4 };
        self.shape.iter().product::<usize>() * size
    }
}

/// Writes `config.json` and `model.safetensors` with random weights.
pub(crate) fn write_model(folder: &Path, shape: &Shape, dtype: Precision) -> Result<()> {
    let config = shape.config();
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let spec = DecoderSpec::from_json(&config).map_err(anyhow::Error::msg)?;
    let tensors = spec.tensors().into_iter().enumerate();
    let drawn = tensors.map(|(i, (name, shape))| (name, Drawn { shape, dtype, seed: i as u64 }));
    safetensors::serialize_to_file(drawn, None, &folder.join("model.safetensors"))?;
    Ok(())
}
