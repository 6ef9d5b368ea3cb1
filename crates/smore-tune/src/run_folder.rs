//! The run folder: the resolved config, the metrics, and what was trained.

use crate::checkpoint::{UNFINISHED, write};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::sft::Metric;
use crate::tensorboard::EventFile;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

const METRICS: &str = "metrics.jsonl";

/// A run folder being written.
pub struct RunFolder {
    path: PathBuf,
    metrics_file: File,
    metrics: Vec<Metric>,
    events: EventFile,
    /// Held as long as this run writes.
    _lock: File,
}

impl RunFolder {
    /// Makes the folder with its `config.yaml` and an empty `metrics.jsonl`. An earlier run in the
    /// same place is moved aside, never overwritten; where to is the second value.
    ///
    /// # Errors
    /// If the folder cannot be written, or another run is writing it.
    pub fn create(config: &RunConfig) -> Result<(Self, Option<PathBuf>)> {
        let path = config.output_dir.clone();
        let mut moved = None;
        if path.join("config.yaml").exists() {
            drop(lock(&path)?);
            moved = Some(move_aside(&path)?);
        }
        std::fs::create_dir_all(&path).map_err(|e| failed(&path, e))?;
        let folder = Self::open(config, Vec::new(), 0)?;
        Ok((folder, moved))
    }

    /// Goes on with a run after `step`; what was noted of later steps is forgotten.
    ///
    /// # Errors
    /// If the folder cannot be written, or another run is writing it.
    pub fn reopen(config: &RunConfig, step: usize) -> Result<Self> {
        let path = &config.output_dir;
        let text = match std::fs::read(path.join(METRICS)) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(failed(&path.join(METRICS), e)),
        };
        // A line that a kill or a full disk cut off is of a later step.
        let metrics = text.lines().filter_map(|line| serde_json::from_str::<Metric>(line).ok());
        Self::open(config, metrics.filter(|metric| metric.step() <= step).collect(), step)
    }

    fn open(config: &RunConfig, metrics: Vec<Metric>, step: usize) -> Result<Self> {
        let path = config.output_dir.clone();
        let lock = lock(&path)?;
        sweep(&path)?;
        write(&path.join("config.yaml"), config.to_yaml()?.as_bytes())?;
        let (file, fresh) = (path.join(METRICS), path.join(".metrics.jsonl"));
        let lines = metrics.iter().map(line).collect::<Result<String>>()?;
        write(&fresh, lines.as_bytes())?;
        std::fs::rename(&fresh, &file).map_err(|e| failed(&file, e))?;
        let metrics_file =
            OpenOptions::new().append(true).open(&file).map_err(|e| failed(&file, e))?;
        let events = EventFile::create(&path.join("runs"), step)?;
        Ok(Self { path, metrics_file, metrics, events, _lock: lock })
    }

    /// Appends a line to `metrics.jsonl` and to TensorBoard's file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn metric(&mut self, metric: &Metric) -> Result<()> {
        let file = || self.path.join(METRICS);
        let written = self.metrics_file.write_all(line(metric)?.as_bytes());
        written.map_err(|e| failed(&file(), e))?;
        self.events.metric(metric)?;
        self.metrics.push(metric.clone());
        Ok(())
    }

    /// All lines so far.
    pub fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// Brings `metrics.jsonl` onto the disk, so that a checkpoint never knows more than it.
    ///
    /// # Errors
    /// If that fails.
    pub fn sync(&self) -> Result<()> {
        self.metrics_file.sync_all().map_err(|e| failed(&self.path.join(METRICS), e))
    }

    /// All lines written.
    pub fn into_metrics(self) -> Vec<Metric> {
        self.metrics
    }
}

fn failed(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

fn line(metric: &Metric) -> Result<String> {
    let text = serde_json::to_string(metric);
    text.map(|text| format!("{text}\n"))
        .map_err(|e| Error::Run(format!("a metric cannot be written as JSON: {e}")))
}

/// The lock of a folder, which one run at a time holds.
fn lock(path: &Path) -> Result<File> {
    let name = path.join(".lock");
    let file = File::create(&name).map_err(|e| failed(&name, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Adapter {
            file: path.to_owned(),
            message: "another run is writing this folder; wait for it, or choose another \
                      output_dir"
                .into(),
        }),
        Err(TryLockError::Error(e)) => Err(failed(&name, e)),
    }
}

/// Removes what a killed run left half-written.
fn sweep(path: &Path) -> Result<()> {
    for entry in std::fs::read_dir(path).map_err(|e| failed(path, e))? {
        let entry = entry.map_err(|e| failed(path, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(UNFINISHED) || name.starts_with(".removing-") {
            std::fs::remove_dir_all(entry.path()).map_err(|e| failed(&entry.path(), e))?;
        }
    }
    Ok(())
}

/// Renames a folder, so that what it holds is not overwritten; returns its new name.
///
/// # Errors
/// If it cannot be renamed.
pub fn move_aside(path: &Path) -> Result<PathBuf> {
    let free = free_name(path);
    std::fs::rename(path, &free).map_err(|e| failed(path, e))?;
    Ok(free)
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
