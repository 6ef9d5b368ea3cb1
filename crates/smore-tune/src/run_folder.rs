//! The run folder: the resolved config, the metrics, and what was trained.

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::sft::Metric;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A run folder being written.
pub struct RunFolder {
    path: PathBuf,
    metrics_file: File,
    metrics: Vec<Metric>,
}

impl RunFolder {
    /// Makes the folder with its `config.yaml` and an empty `metrics.jsonl`. An earlier run in the
    /// same place is moved aside, never overwritten.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn create(config: &RunConfig) -> Result<Self> {
        let path = config.output_dir.clone();
        let failed = |source| Error::Io { path: path.clone(), source };
        if path.join("config.yaml").exists() {
            move_aside(&path)?;
        }
        std::fs::create_dir_all(&path).map_err(failed)?;
        crate::checkpoint::write(&path.join("config.yaml"), config.to_yaml()?.as_bytes())?;
        let metrics_file = File::create(path.join("metrics.jsonl")).map_err(failed)?;
        Ok(Self { path, metrics_file, metrics: Vec::new() })
    }

    /// Appends a line to `metrics.jsonl`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn metric(&mut self, metric: &Metric) -> Result<()> {
        let failed = |source| Error::Io { path: self.path.join("metrics.jsonl"), source };
        let line = serde_json::to_string(metric).map_err(|e| failed(std::io::Error::other(e)))?;
        writeln!(self.metrics_file, "{line}").map_err(failed)?;
        self.metrics.push(metric.clone());
        Ok(())
    }

    /// All lines written.
    pub fn into_metrics(self) -> Vec<Metric> {
        self.metrics
    }
}

/// Renames a folder, so that what it holds is not overwritten.
///
/// # Errors
/// If it cannot be renamed.
pub fn move_aside(path: &Path) -> Result<()> {
    std::fs::rename(path, free_name(path))
        .map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// `run` -> `run.1`, or the next number that is free.
fn free_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = |n: usize| path.with_file_name(format!("{name}.{n}"));
    let mut n = 1;
    while numbered(n).exists() {
        n += 1;
    }
    numbered(n)
}
