//! What an evaluation leaves: a line for every sample as it is done, and the sums in
//! lm-evaluation-harness's layout. An evaluation that was killed goes on where it stopped.

use super::score::Answerer;
use super::statistics::mean_and_error;
use super::task::{Item, Protocol, Task};
use crate::checkpoint::manifest::{BaseFiles, sha256};
use crate::checkpoint::write;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The name of the summed results.
pub const RESULTS: &str = "results.json";

/// An answered item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Place in the file, from 0.
    pub doc_id: usize,
    /// The right answer, for people.
    pub target: String,
    /// The right answer as it is compared.
    pub gold: Value,
    /// What the model was given: pairs of context and continuation, or the prompt.
    pub arguments: Value,
    /// Log-likelihoods, or the text it wrote.
    pub resps: Value,
    /// What was read out of that.
    pub filtered_resps: Value,
    /// 0 or 1 under each metric, named with its filter as in the results.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

/// What must be the same for samples to belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The task's name.
    pub task: String,
    /// How it is scored.
    pub protocol: Protocol,
    /// SHA-256 of the set's file.
    pub data: String,
    /// SHA-256 of the model's files.
    pub model: BaseFiles,
    /// SHA-256 of the adapter's weights and settings; empty for the base.
    pub adapter: BTreeMap<String, String>,
    /// SHA-256 of a user's description of the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

impl Setting {
    /// Hashes everything the answers depend on.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of(
        task: &Task,
        named: &str,
        protocol: Protocol,
        data: &Path,
        model: &Path,
        adapter: Option<&Path>,
    ) -> Result<Self> {
        let mut hashes = BTreeMap::new();
        for name in ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"] {
            let file = adapter.map(|a| a.join(name)).filter(|f| f.is_file());
            if let Some(file) = file {
                hashes.insert(name.to_owned(), sha256(&file)?);
            }
        }
        let file = Path::new(named);
        let description = file.is_file().then(|| sha256(file)).transpose()?;
        Ok(Self {
            task: task.name.clone(),
            protocol,
            data: sha256(data)?,
            model: BaseFiles::of(model)?,
            adapter: hashes,
            description,
        })
    }
}

/// The folder of one side of an evaluation.
pub struct SideFolder {
    folder: PathBuf,
    task: String,
    setting: Setting,
    samples: Vec<Sample>,
}

impl SideFolder {
    /// Opens a folder, with the samples that an earlier evaluation of the same left there.
    ///
    /// # Errors
    /// If the folder is of another evaluation.
    pub fn open(folder: &Path, setting: Setting) -> Result<Self> {
        let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
        fs::create_dir_all(folder).map_err(|e| io(folder, e))?;
        let task = setting.task.clone();
        let mut side = Self { folder: folder.to_owned(), task, setting, samples: Vec::new() };
        let file = side.setting_file();
        if file.is_file() {
            let text = fs::read_to_string(&file).map_err(|e| io(&file, e))?;
            let found: Option<Setting> = serde_json::from_str(&text).ok();
            if found.as_ref() != Some(&side.setting) {
                return Err(Error::Config {
                    file: file.display().to_string(),
                    message: "is of another model, adapter, set or protocol; name another --output"
                        .into(),
                });
            }
        } else {
            write(&file, pretty(&json!(side.setting))?.as_bytes())?;
        }
        side.read_samples()?;
        Ok(side)
    }

    /// Keeps whole lines in order; what a kill cut off is done again.
    fn read_samples(&mut self) -> Result<()> {
        let file = self.samples_file();
        let io = |source| Error::Io { path: file.clone(), source };
        let Ok(bytes) = fs::read(&file) else { return Ok(()) };
        let mut kept = 0;
        for line in bytes.split_inclusive(|&b| b == b'\n') {
            let sample: Option<Sample> = serde_json::from_slice(line).ok();
            match sample.filter(|s| line.ends_with(b"\n") && s.doc_id == self.samples.len()) {
                Some(sample) => self.samples.push(sample),
                None => break,
            }
            kept += line.len();
        }
        if kept < bytes.len() {
            let open = OpenOptions::new().write(true).open(&file).map_err(io)?;
            open.set_len(kept as u64).map_err(io)?;
        }
        Ok(())
    }

    fn setting_file(&self) -> PathBuf {
        self.folder.join(format!("setting_{}.json", self.task))
    }

    fn samples_file(&self) -> PathBuf {
        self.folder.join(format!("samples_{}.jsonl", self.task))
    }

    /// Samples that need no answer any more.
    pub fn done(&self) -> usize {
        self.samples.len()
    }

    /// Has the rest of the items answered; `watch` is told how many are done.
    ///
    /// # Errors
    /// If an answer fails or cannot be written.
    pub fn finish(
        &mut self,
        items: &[Item],
        answerer: &Answerer,
        watch: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let file = self.samples_file();
        let io = |source| Error::Io { path: file.clone(), source };
        let mut open: File =
            OpenOptions::new().create(true).append(true).open(&file).map_err(io)?;
        let rest = &items[self.samples.len().min(items.len())..];
        let samples = &mut self.samples;
        answerer.answer(rest, |sample| {
            let line = serde_json::to_string(&sample)
                .map_err(|e| Error::Run(format!("a sample cannot be written as JSON: {e}")))?;
            open.write_all(format!("{line}\n").as_bytes()).map_err(io)?;
            samples.push(sample);
            watch(samples.len());
            Ok(())
        })?;
        open.sync_all().map_err(io)
    }

    /// The first `n` samples.
    pub fn samples(&self, n: usize) -> &[Sample] {
        &self.samples[..n.min(self.samples.len())]
    }

    /// Writes the sums over the first `n` samples beside those of other tasks.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_results(
        &self,
        n: usize,
        model: &Path,
        adapter: Option<&Path>,
        limit: Option<usize>,
    ) -> Result<Value> {
        let file = self.folder.join(RESULTS);
        let old = fs::read_to_string(&file).ok();
        let old: Option<Value> = old.and_then(|text| serde_json::from_str(&text).ok());
        let mut all = old.unwrap_or_else(|| json!({}));
        let task = &self.task;
        let protocol = self.setting.protocol;
        let sums = sums(task, self.samples(n));
        all["results"][task] = sums.clone();
        all["configs"][task] = json!({
            "task": task, "protocol": protocol,
            "output_type": match protocol {
                Protocol::Generation => "generate_until",
                Protocol::Loglikelihood => "multiple_choice",
            },
            "num_fewshot": 0,
        });
        all["versions"][task] = json!(1);
        all["n-shot"][task] = json!(0);
        all["n-samples"][task] = json!({"original": n, "effective": n});
        all["config"] = json!({
            "model": "smore", "model_args": model, "adapter": self.setting.adapter,
            "adapter_path": adapter.map(|a| a.canonicalize().unwrap_or_else(|_| a.to_owned())),
            "limit": limit,
        });
        all["smore_version"] = json!(env!("CARGO_PKG_VERSION"));
        write(&file, pretty(&all)?.as_bytes())?;
        Ok(sums)
    }
}

pub(crate) fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|e| Error::Run(format!("the result cannot be written as JSON: {e}")))
}

/// Means and standard errors under the harness's names: `acc,none` and `acc_stderr,none`.
fn sums(task: &str, samples: &[Sample]) -> Value {
    let mut all = Map::from_iter([("alias".to_owned(), json!(task))]);
    for name in samples.first().iter().flat_map(|s| s.metrics.keys()) {
        let values: Vec<f64> =
            samples.iter().filter_map(|s| s.metrics.get(name).copied()).collect();
        let (mean, error) = mean_and_error(&values);
        let (metric, filter) = name.split_once(',').unwrap_or((name, "none"));
        all.insert(name.clone(), json!(mean));
        all.insert(format!("{metric}_stderr,{filter}"), json!(error));
    }
    Value::Object(all)
}
