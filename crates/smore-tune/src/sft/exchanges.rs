//! What the model answers to held-out questions before training and after.

use crate::data::Sample;
use crate::error::Result;
use crate::generate::{Sampling, generate};
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use smore_engine::Cpu;

/// Longest answer in tokens.
const LONGEST: usize = 64;

/// A question and its answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exchange {
    /// What the model was given, as it was laid out.
    pub prompt: String,
    /// The answer of the data.
    pub expected: String,
    /// What the model answered before training.
    pub before: String,
    /// What it answers with what was exported.
    pub after: String,
}

/// The tokens in front of the first trained one, and what follows them.
fn parts(sample: &Sample) -> (&[u32], &[u32]) {
    let first = sample.trained().iter().position(|&t| t).unwrap_or(1).max(1);
    sample.ids().split_at(first.min(sample.len()))
}

/// The samples that are shown: the first few of the held-out ones that leave room for an answer.
pub(super) fn shown(samples: &[Sample], count: usize, context: usize) -> Vec<&Sample> {
    let fits = |s: &&Sample| s.len() > 1 && parts(s).0.len() < context;
    samples.iter().filter(fits).take(count).collect()
}

/// Greedy answers.
pub(super) fn answers(
    model: &Model<Cpu<f32>>,
    tokenizer: &Tokenizer,
    samples: &[&Sample],
) -> Result<Vec<String>> {
    let likeliest = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let answer = |sample: &&Sample| {
        let (prompt, expected) = parts(sample);
        let most = LONGEST.min(expected.len() + 16);
        Ok(generate(model, tokenizer, prompt, most, likeliest, |_| {})?.text)
    };
    samples.iter().map(answer).collect()
}

/// Question, expected answer and both answers of every sample.
pub(super) fn exchanges(
    tokenizer: &Tokenizer,
    samples: &[&Sample],
    before: Vec<String>,
    after: Vec<String>,
) -> Result<Vec<Exchange>> {
    let all = samples.iter().zip(before).zip(after);
    all.map(|((sample, before), after)| {
        let (prompt, expected) = parts(sample);
        let expected = &expected[..expected.len().min(LONGEST)];
        let text = |ids: &[u32]| tokenizer.decode(ids, true);
        Ok(Exchange { prompt: text(prompt)?, expected: text(expected)?, before, after })
    })
    .collect()
}
