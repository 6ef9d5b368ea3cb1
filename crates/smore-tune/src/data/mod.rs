//! From data files to token sequences with a mask of what is trained.

pub(crate) mod dataset_info;
mod duplicates;
mod load;
mod read;
mod record;
mod store;
mod tokenize;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::seq::SliceRandom;
use serde::Serialize;
use smore::rng::{self, Purpose};

use crate::config::{DataConfig, Format, SourceConfig};
use crate::error::{Error, Result};

pub use dataset_info::resolve;
pub use duplicates::{Duplicate, duplicates};
pub use load::{load, survey};
pub use read::read_documents;
pub use record::{Content, Document};
pub use tokenize::tokenize;

use store::Tokens;

/// Where a sample comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The data file.
    pub file: Arc<Path>,
    /// The line on which its record starts, counted from 1.
    pub line: usize,
}

impl Origin {
    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::Data {
            file: self.file.to_path_buf(),
            line: Some(self.line),
            message: message.into(),
        }
    }
}

/// One sequence to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    tokens: Tokens,
    /// Where it comes from.
    pub origin: Origin,
    /// Number of tokens in front of the first target.
    pub prompt_len: usize,
    /// Whether tokens were cut off to fit `data.cutoff_len`.
    pub truncated: bool,
    n_trained: usize,
}

impl Sample {
    /// A sample of `ids`, of which those marked in `trained` are targets; nothing where none is.
    fn new(ids: Vec<u32>, trained: Vec<bool>, origin: Origin, truncated: bool) -> Option<Self> {
        let prompt_len = trained.iter().position(|&trained| trained)?;
        let n_trained = trained.iter().filter(|&&trained| trained).count();
        let tokens = Tokens::held(ids, trained);
        Some(Self { tokens, origin, prompt_len, truncated, n_trained })
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        self.tokens.ids()
    }

    /// Whether each token is a target. At least one is; the first never is, as nothing predicts it.
    pub fn trained(&self) -> &[bool] {
        self.tokens.trained()
    }

    /// Number of tokens.
    #[expect(clippy::len_without_is_empty, reason = "a sample has a target")]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Number of targets.
    pub fn n_trained(&self) -> usize {
        self.n_trained
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

/// What became of one data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// Whether it is held out as a whole.
    pub held_out: bool,
    /// Its format, as named or detected; absent if that failed.
    pub format: Option<Format>,
    /// Its records: `kept`, `not_drawn` and `dropped` add up to it.
    pub read: usize,
    /// Records that became samples.
    pub kept: usize,
    /// Records that `max_samples` left out.
    pub not_drawn: usize,
    /// Records that cannot be trained on, each of which stops a run.
    pub dropped: usize,
    /// The same, with their places.
    pub faults: Vec<Fault>,
    /// Samples of the kept records: several for a text, one for all others.
    pub samples: usize,
    /// Samples that were cut at `data.cutoff_len`.
    pub truncated: usize,
    /// Tokens of the samples.
    pub tokens: usize,
    /// Targets among them.
    pub trained_tokens: usize,
}

/// A record that cannot be trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Its line, where there is one.
    pub line: Option<usize>,
    /// What is wrong.
    pub message: String,
}

/// Everything that was read, with what is wrong in it.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Every file, those to train on first.
    pub files: Vec<FileReport>,
    /// What is left to train on and to evaluate with.
    pub data: Dataset,
}

/// Every data file of a run, those to train on first, by path.
fn sources(config: &DataConfig) -> Result<(Vec<SourceConfig>, Option<SourceConfig>)> {
    let train = config.train.iter().map(resolve).collect::<Result<_>>()?;
    let held_out = config.validation.source();
    Ok((train, held_out.as_ref().map(resolve).transpose()?))
}

/// The paths of every data file of a run, those to train on first.
///
/// # Errors
/// A data set that `dataset_info.json` does not list.
pub fn files(config: &DataConfig) -> Result<Vec<PathBuf>> {
    let (train, held_out) = sources(config)?;
    Ok(train.into_iter().chain(held_out).map(|source| source.path).collect())
}

/// Checks that every data file exists, before anything heavy is loaded.
pub fn check_files(config: &DataConfig) -> Result<()> {
    if let Some(folder) = config.cache_dir.as_ref().filter(|folder| !folder.is_dir()) {
        let what = "a folder for tokens that do not fit in memory (data.cache_dir)".into();
        return Err(Error::Missing { path: folder.clone(), what });
    }
    let (train, held_out) = sources(config)?;
    let train = train.iter().map(|source| (source, "training data"));
    for (source, what) in train.chain(held_out.iter().map(|source| (source, "held-out data"))) {
        if !source.path.is_file() {
            let what = format!("a file of {what} ({})", read::ENDINGS);
            return Err(Error::Missing { path: source.path.clone(), what });
        }
        read::check_kind(&source.path, source.format)?;
    }
    Ok(())
}

/// The draws that [`load`] makes, each from a stream of its own.
#[derive(Clone, Copy)]
enum Draw {
    HeldOut = 0,
    MaxSamples = 1,
    SourceSamples = 2,
    Weight = 3,
}

/// `n` of `0..len`, drawn at random, marked; `place` is that of the source among all.
fn draw(len: usize, n: usize, seed: u64, what: Draw, place: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut rng::stream(seed, Purpose::Split, what as u64, place as u64));
    let mut drawn = vec![false; len];
    for &i in order.iter().take(n) {
        drawn[i] = true;
    }
    drawn
}

/// At most `n` of `items`, drawn at random, in their old order.
fn pick<T>(items: Vec<T>, n: usize, seed: u64, what: Draw, place: usize) -> Vec<T> {
    if items.len() <= n {
        return items;
    }
    let drawn = draw(items.len(), n, seed, what, place);
    items.into_iter().zip(drawn).filter_map(|(item, drawn)| drawn.then_some(item)).collect()
}

/// Holds out `fraction` of `items`, at least one if there is more than one and never all.
fn split<T>(items: Vec<T>, fraction: f64, seed: u64) -> (Vec<T>, Vec<T>) {
    if items.len() < 2 || fraction <= 0.0 {
        return (items, Vec::new());
    }
    let n = ((items.len() as f64 * fraction).round() as usize).clamp(1, items.len() - 1);
    let held_out = draw(items.len(), n, seed, Draw::HeldOut, 0);
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
