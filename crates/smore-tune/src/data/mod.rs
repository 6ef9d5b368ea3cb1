//! From data files to token sequences with a mask of what is trained.

mod read;
mod record;
mod tokenize;

use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use rayon::prelude::*;
use smore::rng::{self, Purpose};

use crate::config::DataConfig;
use crate::error::{Error, Result};
use crate::template::Template;
use crate::tokenizer::Tokenizer;

pub use read::read_documents;
pub use record::{Content, Document};
pub use tokenize::tokenize;

/// Where a sample comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The data file.
    pub file: PathBuf,
    /// The line on which its record starts, counted from 1.
    pub line: usize,
}

impl Origin {
    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::Data { file: self.file.clone(), line: Some(self.line), message: message.into() }
    }
}

/// One sequence to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether each token is a target. At least one is; the first never is, as nothing predicts it.
    pub trained: Vec<bool>,
    /// Where it comes from.
    pub origin: Origin,
    /// Number of tokens in front of the first target.
    pub prompt_len: usize,
    /// Whether tokens were cut off to fit `data.cutoff_len`.
    pub truncated: bool,
}

impl Sample {
    /// Number of targets.
    pub fn n_trained(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// Everything a run trains and evaluates on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Samples to train on, in the order of the files.
    pub train: Vec<Sample>,
    /// Held-out samples, in the order of the files.
    pub validation: Vec<Sample>,
    /// What was read and kept.
    pub report: DataReport,
}

/// What was read and kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DataReport {
    /// Records in the training files.
    pub read: usize,
    /// Samples kept for training and for validation from them.
    pub kept: usize,
    /// Training samples that were cut at `data.cutoff_len`.
    pub truncated: usize,
    /// Targets in the training samples.
    pub trained_tokens: usize,
    /// Tokens in the training samples.
    pub total_tokens: usize,
    /// Where the held-out samples come from, in words.
    pub validation_from: String,
}

/// Checks that every data file exists, before anything heavy is loaded.
pub fn check_files(config: &DataConfig) -> Result<()> {
    let train = config.train.iter().map(|source| (&source.path, source.format, "training data"));
    let validation = &config.validation;
    let held_out = validation.path.iter().map(|path| (path, validation.format, "held-out data"));
    for (path, format, what) in train.chain(held_out) {
        if !path.is_file() {
            let what = format!("a file of {what} (.json, .jsonl or .txt)");
            return Err(Error::Missing { path: path.clone(), what });
        }
        read::check_kind(path, format)?;
    }
    Ok(())
}

/// Reads, tokenizes and splits the data of a run. The same configuration, seed and files give the
/// same samples in the same order.
pub fn load(
    config: &DataConfig,
    seed: u64,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<Dataset> {
    check_files(config)?;
    let mut documents = Vec::new();
    for source in &config.train {
        documents.extend(read_documents(&source.path, source.format)?);
    }
    let read = documents.len();
    let max_samples = config.max_samples.unwrap_or(usize::MAX);
    let documents = pick(documents, max_samples, seed);
    let tokenize_all = |documents: &[Document]| -> Result<Vec<Vec<Sample>>> {
        // Collecting keeps the order; of several errors the one to report must be the first.
        let samples: Vec<Result<_>> = documents
            .par_iter()
            .map(|document| tokenize(document, tokenizer, template, config.cutoff_len))
            .collect();
        samples.into_iter().collect()
    };
    let mut groups = tokenize_all(&documents)?;
    if groups.len() == 1 {
        // One long text: its pieces are the samples to pick from and to split.
        let pieces = groups.remove(0).into_iter().map(|sample| vec![sample]).collect();
        groups = pick(pieces, max_samples, seed);
    }
    let kept = groups.iter().map(Vec::len).sum();

    let (train, validation, validation_from) = if let Some(path) = &config.validation.path {
        let held_out = read_documents(path, config.validation.format)?;
        (groups, tokenize_all(&held_out)?, path.display().to_string())
    } else {
        let fraction = config.validation.fraction;
        let (train, validation) = split(groups, fraction, seed);
        let from = if validation.is_empty() {
            "none".to_owned()
        } else {
            format!("{}% of the training data", fraction * 100.0)
        };
        (train, validation, from)
    };
    let train: Vec<Sample> = train.into_iter().flatten().collect();
    let report = DataReport {
        read,
        kept,
        truncated: train.iter().filter(|sample| sample.truncated).count(),
        trained_tokens: train.iter().map(Sample::n_trained).sum(),
        total_tokens: train.iter().map(|sample| sample.ids.len()).sum(),
        validation_from,
    };
    Ok(Dataset { train, validation: validation.into_iter().flatten().collect(), report })
}

/// The two draws that [`load`] makes, each from a stream of its own.
#[derive(Clone, Copy)]
enum Draw {
    HeldOut = 0,
    MaxSamples = 1,
}

/// `n` of `0..len`, drawn at random, marked.
fn draw(len: usize, n: usize, seed: u64, what: Draw) -> Vec<bool> {
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut rng::stream(seed, Purpose::Split, what as u64, 0));
    let mut drawn = vec![false; len];
    for &i in order.iter().take(n) {
        drawn[i] = true;
    }
    drawn
}

/// At most `n` of `items`, drawn at random, in their old order.
fn pick<T>(items: Vec<T>, n: usize, seed: u64) -> Vec<T> {
    if items.len() <= n {
        return items;
    }
    let drawn = draw(items.len(), n, seed, Draw::MaxSamples);
    items.into_iter().zip(drawn).filter_map(|(item, drawn)| drawn.then_some(item)).collect()
}

/// Holds out `fraction` of `items`, at least one if there is more than one and never all.
fn split<T>(items: Vec<T>, fraction: f64, seed: u64) -> (Vec<T>, Vec<T>) {
    if items.len() < 2 || fraction <= 0.0 {
        return (items, Vec::new());
    }
    let n = ((items.len() as f64 * fraction).round() as usize).clamp(1, items.len() - 1);
    let held_out = draw(items.len(), n, seed, Draw::HeldOut);
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (item, held_out) in items.into_iter().zip(held_out) {
        if held_out {
            validation.push(item);
        } else {
            train.push(item);
        }
    }
    (train, validation)
}

/// The file's name for messages of a whole file.
fn file_error(file: &Path, message: impl Into<String>) -> Error {
    Error::Data { file: file.to_owned(), line: None, message: message.into() }
}

#[cfg(test)]
mod tests;
