//! Checkpoints of a run: everything it takes to go on to the bit, and finding the newest one.
//!
//! `checkpoint-N/` holds the adapter (or model) as other tools read it, and beside it
//! `training_state.json`, `training_state.safetensors` (parameters, AdamW's moments, the best
//! values), the `config.yaml` and `checkpoint.json` with the hashes of all of these. Order of data
//! and random numbers need no state: they are functions of the seed and the step.

use super::metric::EvalMetric;
use super::routers::RoutersState;
use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::{
    Settings, check_seal, fill_adapter, fill_model, read_named, seal, write, write_folder,
    write_named,
};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::optimizer::Optimizer;
use crate::selection::{Best, Selection};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use smore_engine::Cpu;
use std::path::{Path, PathBuf};

const STATE: &str = "training_state.json";
const TENSORS: &str = "training_state.safetensors";

/// Where a run stands between two steps.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Steps done.
    pub(super) step: usize,
    /// Tokens read in training.
    pub(super) tokens: usize,
    /// Seconds of training.
    pub(super) seconds: f64,
    /// The evaluation before training, and the last one.
    pub(super) before: Option<EvalMetric>,
    pub(super) after: Option<EvalMetric>,
    /// What the model answered before training.
    pub(super) answers: Vec<String>,
}

/// `training_state.json`
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(flatten)]
    progress: Progress,
    /// Step and held-out loss of the best evaluation.
    best: Option<(usize, f64)>,
    waited: usize,
    routers: RoutersState,
    /// What the run is made from.
    manifest: Manifest,
}

/// A checkpoint, read and checked.
pub(super) struct Resumed {
    pub(super) progress: Progress,
    /// What a person should know.
    pub(super) notes: Vec<String>,
    best: Option<Best>,
    waited: usize,
    pub(super) routers: RoutersState,
    params: Vec<f32>,
    moments: [Vec<f32>; 2],
}

/// Writes a run's checkpoints.
pub(super) struct Checkpoints<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) settings: &'a Settings,
    pub(super) manifest: &'a Manifest,
}

impl Checkpoints<'_> {
    /// Writes `checkpoint-N`, then removes the oldest beyond `save_total_limit`. `fill` adds files.
    ///
    /// # Errors
    /// If writing fails; earlier checkpoints stay.
    pub(super) fn write(
        &self,
        progress: &Progress,
        model: &Model<Cpu<f32>>,
        optimizer: &Optimizer,
        selection: &Selection,
        routers: &RoutersState,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let run = &self.config.output_dir;
        let path = run.join(format!("checkpoint-{}", progress.step));
        let best = selection.best.as_ref();
        let stored = Stored {
            progress: progress.clone(),
            best: best.map(|best| (best.step, best.loss)),
            waited: selection.waited,
            routers: routers.clone(),
            manifest: self.manifest.clone(),
        };
        write_folder(&path, |dir| {
            if model.weights.is_trained() {
                fill_model(dir, &model.spec, &self.config.model, model.params())?;
            } else {
                let manifest = Manifest { steps: Some(progress.step), ..self.manifest.clone() };
                fill_adapter(dir, self.settings, &model.adapters, model.params(), &manifest)?;
            }
            let text = serde_json::to_string_pretty(&stored)
                .map_err(|e| Error::Run(format!("the state cannot be written as JSON: {e}")))?;
            write(&dir.join(STATE), text.as_bytes())?;
            let [m, v] = optimizer.moments();
            let mut tensors =
                vec![("params", &model.params()[..]), ("exp_avg", m), ("exp_avg_sq", v)];
            tensors.extend(best.map(|best| ("best", &best.values[..])));
            write_named(&dir.join(TENSORS), &tensors)?;
            write(&dir.join("config.yaml"), self.config.to_yaml()?.as_bytes())?;
            fill(dir)?;
            seal(dir)
        })
        .map_err(|error| self.not_written(&path, &error))?;
        if let Some(limit) = self.config.train.save_total_limit {
            for (_, old) in list(run)?.into_iter().skip(limit) {
                remove(&old)?;
            }
        }
        Ok(path)
    }

    fn not_written(&self, path: &Path, error: &Error) -> Error {
        let run = &self.config.output_dir;
        let earlier = match list(run).unwrap_or_default().first() {
            Some((_, earlier)) => format!("{} is whole", earlier.display()),
            None => "there is no earlier one".into(),
        };
        Error::Run(format!(
            "{} was not written: {error}; {earlier}; make room, then go on with `smore train \
             --resume {}`",
            path.display(),
            run.display()
        ))
    }
}

impl Resumed {
    /// The newest whole checkpoint of the run that `config` describes; none where it has not
    /// written any.
    ///
    /// # Errors
    /// If every checkpoint is damaged, or the newest whole one is of another config, base or data.
    pub(super) fn find(config: &RunConfig, manifest: &Manifest) -> Result<Option<Self>> {
        let run = &config.output_dir;
        let refused = |message| Error::Adapter { file: run.clone(), message };
        if run.join("report.html").is_file() {
            return Err(refused(
                "this run has ended, there is nothing to resume; leave out --resume to train anew"
                    .into(),
            ));
        }
        let mut notes = Vec::new();
        for (_, path) in list(run)? {
            match Self::read(&path) {
                Ok((stored, mut resumed)) => {
                    same_inputs(&path, config, manifest, &stored)?;
                    resumed.notes.splice(0..0, notes);
                    return Ok(Some(resumed));
                }
                Err(error) => notes.push(format!("skipped a damaged checkpoint: {error}")),
            }
        }
        if notes.is_empty() {
            return Ok(None);
        }
        Err(refused(format!(
            "no whole checkpoint is left ({}); leave out --resume to train anew",
            notes.join("; ")
        )))
    }

    fn read(path: &Path) -> Result<(Stored, Self)> {
        check_seal(path)?;
        let bad = |name: &str, message: String| Error::Adapter { file: path.join(name), message };
        let text = std::fs::read_to_string(path.join(STATE))
            .map_err(|e| Error::reading(&path.join(STATE), "the state of a run", e))?;
        let stored: Stored = serde_json::from_str(&text)
            .map_err(|e| bad(STATE, format!("not the state of a run: {e}")))?;
        let mut tensors = read_named(&path.join(TENSORS))?;
        let mut take = |name: &str| {
            tensors.remove(name).ok_or_else(|| bad(TENSORS, format!("no tensor `{name}`")))
        };
        let params = take("params")?;
        let moments = [take("exp_avg")?, take("exp_avg_sq")?];
        let best = match stored.best {
            Some((step, loss)) => Some(Best { step, loss, values: take("best")? }),
            None => None,
        };
        let (progress, waited) = (stored.progress.clone(), stored.waited);
        let routers = stored.routers.clone();
        let notes = vec![format!("resumed from {}", path.display())];
        Ok((stored, Self { progress, notes, best, waited, routers, params, moments }))
    }

    /// Puts model, optimizer and selection where they were.
    pub(super) fn restore(
        self,
        model: &mut Model<Cpu<f32>>,
        optimizer: &mut Optimizer,
        selection: &mut Selection,
    ) -> Result<()> {
        if self.params.len() != model.trained() {
            return Err(Error::Run(format!(
                "the checkpoint has {} trained parameters, the run {}",
                self.params.len(),
                model.trained()
            )));
        }
        *model.params_mut() = self.params;
        optimizer.restore(self.moments);
        selection.best = self.best;
        selection.waited = self.waited;
        Ok(())
    }
}

/// Checkpoints of a run folder with their steps, the newest first.
fn list(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let io = |source| Error::Io { path: run.to_owned(), source };
    let mut all = Vec::new();
    let entries = match std::fs::read_dir(run) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        Err(e) => return Err(io(e)),
    };
    for entry in entries {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let step = name.strip_prefix("checkpoint-").and_then(|step| step.parse().ok());
        all.extend(step.map(|step: usize| (step, run.join(name))));
    }
    all.sort_unstable_by(|a, b| b.cmp(a));
    Ok(all)
}

/// Takes a checkpoint away; what a kill leaves of it is not called one any more.
fn remove(path: &Path) -> Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let hidden = path.with_file_name(format!(".removing-{}", std::process::id()));
    std::fs::rename(path, &hidden).map_err(io)?;
    std::fs::remove_dir_all(&hidden).map_err(io)
}

/// Keys that do not enter what is trained.
const FREE: [&str; 3] = ["output_dir", "train.save_steps", "train.save_total_limit"];

/// Refuses to go on with another config, base or data.
fn same_inputs(
    path: &Path,
    config: &RunConfig,
    manifest: &Manifest,
    stored: &Stored,
) -> Result<()> {
    let refused = |message| Error::Adapter { file: path.to_owned(), message };
    let way_out = "undo the change, or leave out --resume to train anew";
    let file = path.join("config.yaml");
    let before = flat(&RunConfig::load(&file)?)?;
    let now = flat(config)?;
    let value = |all: &[(String, Value)], key: &str| {
        let found = all.iter().find(|(k, _)| k == key);
        found.map_or_else(|| "absent".to_owned(), |(_, value)| value.to_string())
    };
    let mut keys: Vec<&String> = before.iter().chain(&now).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    let changes: Vec<String> = keys
        .into_iter()
        .filter(|key| !FREE.contains(&key.as_str()))
        .map(|key| (key, value(&before, key), value(&now, key)))
        .filter(|(_, before, now)| before != now)
        .map(|(key, before, now)| format!("{key} was {before} and is {now}"))
        .collect();
    if !changes.is_empty() {
        let changes = changes.join(", ");
        return Err(refused(format!("begun with another configuration: {changes}; {way_out}")));
    }
    if let Some(name) = stored.manifest.base.difference(&manifest.base) {
        let model = config.model.display();
        return Err(refused(format!("`{name}` of the base {model} has changed; {way_out}")));
    }
    let files = |m: &Manifest| m.data.as_ref().map(|data| data.files.clone()).unwrap_or_default();
    let (before, now) = (files(&stored.manifest), files(manifest));
    if let Some((name, _)) = before.iter().find(|(name, hash)| now.get(*name) != Some(hash)) {
        return Err(refused(format!("the data in {name} has changed; {way_out}")));
    }
    if stored.manifest.version != manifest.version {
        return Err(refused(format!(
            "written by version {} of this program; only that version goes on with it to the bit",
            stored.manifest.version
        )));
    }
    Ok(())
}

/// Every value of a configuration with its path of keys.
fn flat(config: &RunConfig) -> Result<Vec<(String, Value)>> {
    fn walk(key: String, value: Value, all: &mut Vec<(String, Value)>) {
        let join =
            |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
        match value {
            Value::Object(map) => {
                map.into_iter().for_each(|(name, value)| walk(join(&name), value, all));
            }
            Value::Array(list) => {
                let items = list.into_iter().enumerate();
                items.for_each(|(i, value)| walk(join(&i.to_string()), value, all));
            }
            value => all.push((key, value)),
        }
    }
    let value = serde_json::to_value(config)
        .map_err(|e| Error::Run(format!("the configuration cannot be compared: {e}")))?;
    let mut all = Vec::new();
    walk(String::new(), value, &mut all);
    Ok(all)
}
