//! What routers do while a run goes on: counted in windows of steps, kept in the run folder, judged.

use super::metric::{Metric, RoutersMetric};
use crate::checkpoint::{write, write_file};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::inject::Slot;
use crate::model::{Batch, Model, Routings};
use crate::routing::health::{HealthConfig, HealthState};
use crate::routing::{Counts, Split, Window, trace_lines, write as write_table};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use smore_engine::Cpu;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The folder in a run's.
pub(crate) const FOLDER: &str = "routing";
/// Trees of some tokens, a line for each token and place.
const TRACES: &str = "traces.jsonl";
/// Rows that are held in memory before they are written.
const ROWS: usize = 1 << 18;

/// What a checkpoint remembers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct RoutersState {
    /// Counts of the window that is open.
    open: Counts,
    /// Its first step.
    first: usize,
    health: HealthState,
}

/// Watches the routers of a run.
pub(super) struct Routers {
    config: HealthConfig,
    state: RoutersState,
    /// Closed windows that are not on the disk yet.
    closed: Vec<Window>,
    rows: usize,
    /// Lines of `traces.jsonl` that are not on the disk yet.
    traces: String,
    /// A step, and how many of its tokens are traced.
    traced: (usize, usize),
    /// Paths of the adapters.
    places: Vec<String>,
    folder: PathBuf,
}

impl Routers {
    /// Begins, or goes on after `step` and forgets what was kept of later steps.
    pub(super) fn open(
        config: &RunConfig,
        model: &mut Model<Cpu<f32>>,
        state: Option<RoutersState>,
        step: usize,
    ) -> Result<Self> {
        let folder = config.output_dir.join(FOLDER);
        forget(&folder, step)?;
        let mut state = state.unwrap_or_default();
        if state.open == Counts::default() {
            state.open = Counts::new(&model.adapters);
        }
        state.health.restore(&mut model.adapters);
        let config = HealthConfig {
            window_steps: if state.open.is_routed() { config.health.window_steps } else { 0 },
            ..config.health
        };
        Ok(Self {
            config,
            state,
            closed: Vec::new(),
            rows: 0,
            traces: String::new(),
            traced: (0, 0),
            places: model.adapters.slots.iter().map(Slot::path).collect(),
            folder,
        })
    }

    /// Counts a micro-batch of `step`.
    pub(super) fn see(&mut self, step: usize, batch: &Batch, routing: &Routings<Cpu<f32>>) {
        if self.config.window_steps == 0 {
            return;
        }
        self.state.open.see(routing);
        if self.config.trace_tokens > 0 && step.is_multiple_of(self.config.window_steps) {
            self.trace(step, batch, routing);
        }
    }

    /// Keeps the trees of the first tokens of the step.
    fn trace(&mut self, step: usize, batch: &Batch, routing: &Routings<Cpu<f32>>) {
        if self.traced.0 != step {
            self.traced = (step, 0);
        }
        let count = (self.config.trace_tokens - self.traced.1).min(batch.ids.len());
        self.traced.1 += count;
        self.traces.push_str(&trace_lines(&self.places, step, &batch.ids[..count], routing));
    }

    /// Empty counts for an evaluation.
    pub(super) fn for_evaluation(&self, model: &Model<Cpu<f32>>) -> Option<Counts> {
        (self.config.window_steps > 0).then(|| Counts::new(&model.adapters))
    }

    /// After a step: closes a window that is full and judges it.
    pub(super) fn stepped(
        &mut self,
        step: usize,
        last: bool,
        model: &mut Model<Cpu<f32>>,
    ) -> Result<Vec<Metric>> {
        let every = self.config.window_steps;
        if every == 0 || !(last || step.is_multiple_of(every)) {
            return Ok(Vec::new());
        }
        let counts = self.state.open.take();
        let first = std::mem::replace(&mut self.state.first, step) + 1;
        let mut metrics = vec![Metric::Routers(RoutersMetric::of(step, &counts.usage()))];
        let adapters = &mut model.adapters;
        let alarms = self.state.health.judge(&self.config, step, &counts, adapters);
        metrics.extend(alarms.into_iter().map(Metric::Alarm));
        self.keep(Window::of(Split::Train, (first, step), &counts))?;
        Ok(metrics)
    }

    /// After an evaluation.
    pub(super) fn evaluated(&mut self, step: usize, counts: &Counts) -> Result<()> {
        self.keep(Window::of(Split::HeldOut, (step, step), counts))
    }

    fn keep(&mut self, window: Window) -> Result<()> {
        self.rows += window.rows();
        self.closed.push(window);
        if self.rows > ROWS { self.flush() } else { Ok(()) }
    }

    /// Writes what is closed, so that a checkpoint never knows more than the run folder.
    pub(super) fn flush(&mut self) -> Result<()> {
        let steps = self.closed.iter().map(|w| w.steps);
        let Some((first, last)) = steps.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else {
            return Ok(());
        };
        let io = |source| Error::Io { path: self.folder.clone(), source };
        std::fs::create_dir_all(&self.folder).map_err(io)?;
        // An evaluation before the first step and one at a checkpoint end where others begin.
        let name = |n: usize| {
            let part = if n > 0 { format!("-{n}") } else { String::new() };
            self.folder.join(format!("steps-{first:08}-{last:08}{part}.parquet"))
        };
        if !self.traces.is_empty() {
            let path = self.folder.join(TRACES);
            let file = OpenOptions::new().create(true).append(true).open(&path);
            let written = file.and_then(|mut file| {
                file.write_all(self.traces.as_bytes()).and_then(|()| file.sync_all())
            });
            written.map_err(|source| Error::Io { path, source })?;
            self.traces.clear();
        }
        let free =
            (0..=usize::MAX).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0));
        write_file(&free, |fresh| write_table(fresh, &self.closed))?;
        self.closed.clear();
        self.rows = 0;
        Ok(())
    }

    /// What a checkpoint must remember.
    pub(super) fn state(&self) -> &RoutersState {
        &self.state
    }
}

/// Removes what was kept of steps after `step`.
fn forget(folder: &Path, step: usize) -> Result<()> {
    let traces = folder.join(TRACES);
    if let Ok(text) = std::fs::read_to_string(&traces) {
        let of = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
        let kept = text.lines().filter(|line| of(line).is_some_and(|s| s <= step as u64));
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        write_file(&traces, |fresh| write(fresh, kept.as_bytes()))?;
    }
    for (path, last) in parts(folder)? {
        if last > step {
            std::fs::remove_file(&path).map_err(|source| Error::Io { path, source })?;
        }
    }
    Ok(())
}

/// The parts of a run's statistics in the order of their steps, with their last steps.
///
/// # Errors
/// If the folder cannot be read; none where there is no folder.
pub(crate) fn parts(folder: &Path) -> Result<Vec<(PathBuf, usize)>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io(e)),
    };
    let mut parts = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let steps = name.strip_prefix("steps-").and_then(|name| name.strip_suffix(".parquet"));
        let last = steps.and_then(|s| s.split('-').nth(1)).and_then(|s| s.parse().ok());
        parts.extend(last.map(|last| (path, last)));
    }
    parts.sort();
    Ok(parts)
}
