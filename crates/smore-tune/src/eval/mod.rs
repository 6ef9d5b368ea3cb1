//! Evaluation on question sets: by generation, as the paper does it, or by log-likelihood, as
//! lm-evaluation-harness does. The two give different numbers and are never mixed.
//!
//! [`task`] turns records into [`task::Item`]s, [`score`] has a model answer them, [`results`] keeps every
//! answer and sums up, [`statistics`] says what a difference is worth, [`sandbox`] runs programs.

pub mod compare;
pub mod extract;
mod program;
mod question;
mod read;
pub mod results;
pub mod sandbox;
pub mod score;
pub mod statistics;
pub mod task;

pub use program::{Program, programs};
pub use task::{Protocol, Task, TaskKind};

/// The records of a set, as they are.
///
/// # Errors
/// A file that is none of JSON, JSONL or Parquet.
pub(crate) fn records(file: &std::path::Path) -> crate::error::Result<Vec<serde_json::Value>> {
    Ok(read::read(file)?.into_iter().map(|record| record.value).collect())
}
