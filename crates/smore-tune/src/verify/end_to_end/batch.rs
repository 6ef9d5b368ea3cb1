//! Recorded batches with right padding, laid out as [`Batch`] wants them.

use super::{Source, select};
use crate::error::Result;
use crate::model::Batch;
use crate::verify::case::Tensor;

/// The label of a token that is not trained.
const IGNORED: f64 = -100.0;

/// Recorded sequences without their padding.
pub(super) struct Tokens {
    /// The sequences one after the other, with the labels as targets.
    pub(super) batch: Batch,
    /// Of each token the row it has among `[B * T]`.
    pub(super) rows: Vec<usize>,
    /// `[B, T]`
    pub(super) shape: [usize; 2],
}

impl Tokens {
    /// Sequences `[B, T]` that all count, without labels.
    pub(super) fn whole(source: &Source, name: &str, vocabulary: usize) -> Result<Self> {
        let ids = source.tensor(name)?;
        let [batch, length] = ids.shape[..] else {
            let shape = &ids.shape;
            return Err(source.error(format!("`{name}` has shape {shape:?}; expected [B, T]")));
        };
        let ones = Tensor { shape: ids.shape.clone(), values: vec![1.0; batch * length] };
        Self::read(source, name, ids, &ones, None, vocabulary)
    }

    /// `input_ids`, `attention_mask` (all ones where absent) and `labels` (none where absent).
    pub(super) fn batch(source: &Source, vocabulary: usize) -> Result<Self> {
        Ok(Self::batches(source, 1, vocabulary)?.remove(0))
    }

    /// As [`Tokens::batch`], for `n` batches: tensors `[n, B, T]`, or `[B, T]` of one batch.
    pub(super) fn batches(source: &Source, n: usize, vocabulary: usize) -> Result<Vec<Self>> {
        let ids = source.tensor("input_ids")?;
        let shape = match ids.shape[..] {
            [batch, length] if n == 1 => [batch, length],
            [found, batch, length] if found == n => [batch, length],
            _ => {
                let expected = if n == 1 { "[B, T]".into() } else { format!("[{n}, B, T]") };
                let shape = &ids.shape;
                let message = format!("`input_ids` has shape {shape:?}; expected {expected}");
                return Err(source.error(message));
            }
        };
        if ids.values.is_empty() {
            return Err(source.error("`input_ids` holds no token".into()));
        }
        let like_ids = |name: &str| -> Result<Option<&Tensor>> {
            if source.tensors.contains_key(name) {
                source.shaped(name, &ids.shape).map(Some)
            } else {
                Ok(None)
            }
        };
        let ones = Tensor { shape: ids.shape.clone(), values: vec![1.0; ids.values.len()] };
        let mask = like_ids("attention_mask")?.unwrap_or(&ones);
        let labels = like_ids("labels")?;
        let part = |tensor: &Tensor, i: usize| {
            let len = shape[0] * shape[1];
            let values = tensor.values[i * len..(i + 1) * len].to_vec();
            Tensor { shape: shape.to_vec(), values }
        };
        (0..n)
            .map(|i| {
                let labels = labels.map(|labels| part(labels, i));
                let (ids, mask) = (part(ids, i), part(mask, i));
                Self::read(source, "input_ids", &ids, &mask, labels.as_ref(), vocabulary)
            })
            .collect()
    }

    fn read(
        source: &Source,
        name: &str,
        ids: &Tensor,
        mask: &Tensor,
        labels: Option<&Tensor>,
        vocabulary: usize,
    ) -> Result<Self> {
        let (n, length) = (ids.shape[0], ids.shape[1]);
        let id = |what: &str, at: usize, value: f64| {
            if value.fract() == 0.0 && (0.0..vocabulary as f64).contains(&value) {
                return Ok(value as u32);
            }
            let (row, column) = (at / length, at % length);
            Err(source.error(format!(
                "`{what}` has {value} at row {row}, position {column}; expected a token below \
                 {vocabulary}"
            )))
        };
        let mut tokens = Self { batch: Batch::default(), rows: vec![], shape: [n, length] };
        for row in 0..n {
            let at = row * length;
            let valid = right_padded(source, row, &mask.values[at..at + length])?;
            let start = tokens.batch.ids.len();
            let ids = (at..at + valid).map(|i| id(name, i, ids.values[i]));
            let ids = ids.collect::<Result<Vec<u32>>>()?;
            tokens.batch.push(&ids, &vec![false; valid]);
            tokens.rows.extend(at..at + valid);
            let Some(labels) = labels else { continue };
            // As in transformers the label of a token is what the token before it predicts.
            for next in 1..length {
                let label = labels.values[at + next];
                if label == IGNORED {
                    continue;
                }
                if next > valid {
                    return Err(source.error(format!(
                        "`labels` has {label} at row {row}, position {next}, behind padding; \
                         expected -100 there"
                    )));
                }
                let label = id("labels", at + next, label)?;
                tokens.batch.targets.push(((start + next - 1) as u32, label));
            }
        }
        Ok(tokens)
    }

    /// Values of tokens `[n, width]` in the recording's places `[B, T, width]`; 0 at padding.
    pub(super) fn spread(&self, values: &[f32], width: usize) -> Tensor {
        let [batch, length] = self.shape;
        let mut spread = vec![0.0; batch * length * width];
        for (&row, values) in self.rows.iter().zip(values.chunks_exact(width)) {
            let target = &mut spread[row * width..(row + 1) * width];
            for (to, &value) in target.iter_mut().zip(values) {
                *to = f64::from(value);
            }
        }
        Tensor { shape: vec![batch, length, width], values: spread }
    }

    /// Of a recorded `[B * T, ..]` the tokens' rows, `[n, ..]`.
    pub(super) fn gather(&self, values: &[f64]) -> Vec<f64> {
        let width = values.len() / (self.shape[0] * self.shape[1]);
        select(values, &self.rows, width)
    }

    /// Whether a sequence is shorter than the longest.
    pub(super) fn padded(&self) -> bool {
        self.rows.len() < self.shape[0] * self.shape[1]
    }
}

/// Number of tokens before the padding.
fn right_padded(source: &Source, row: usize, mask: &[f64]) -> Result<usize> {
    let valid = mask.iter().take_while(|&&m| m == 1.0).count();
    let wrong = if valid == 0 { Some(0) } else { (valid..mask.len()).find(|&i| mask[i] != 0.0) };
    let Some(wrong) = wrong else { return Ok(valid) };
    Err(source.error(format!(
        "`attention_mask` has {} at row {row}, position {wrong}; expected ones, then zeros: \
         sequences are padded on the right",
        mask[wrong]
    )))
}
