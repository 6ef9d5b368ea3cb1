//! The paper's experiment as files that can be run: for every task its training set in the authors'
//! prompts, a run with the paper's recipe, and a sweep for every method over the paper's grid.
//!
//! Nothing here trains. [`Study::write`] lays the files out, [`crate::sweep`] runs them,
//! [`crate::eval`] asks the winners, and [`Table`] sets what came out beside the paper's figures.

mod table;
mod tasks;

pub use table::{Cell, Table};
pub use tasks::{Files, PaperTask};

use crate::checkpoint::write;
use crate::config::{AdapterConfig, from_yaml};
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::model::spec::DecoderSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use smore::config::LoraConfig;
use std::path::{Path, PathBuf};

/// The rank of the LoRA whose parameters are the budget where none is named.
const BUDGET_RANK: usize = 64;

/// What the paper compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// LoRA.
    Lora,
    /// HydraLoRA.
    HydraLora,
    /// MixLoRA.
    MixLora,
    /// S'MoRE with two layers.
    Smore,
    /// S'MoRE with three layers.
    Smore3,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Lora, Self::HydraLora, Self::MixLora, Self::Smore, Self::Smore3];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::HydraLora => "HydraLoRA",
            Self::MixLora => "MixLoRA",
            Self::Smore => "S'MoRE, 2 layers",
            Self::Smore3 => "S'MoRE, 3 layers",
        }
    }

    /// In file names.
    pub fn key(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::HydraLora => "hydra-lora",
            Self::MixLora => "mix-lora",
            Self::Smore => "smore",
            Self::Smore3 => "smore-3-layers",
        }
    }

    /// Its search, as the project's `sweeps` folder has it.
    fn sweep(self) -> &'static str {
        match self {
            Self::Lora => include_str!("../../../../sweeps/paper-lora.yaml"),
            Self::HydraLora => include_str!("../../../../sweeps/paper-hydra-lora.yaml"),
            Self::MixLora => include_str!("../../../../sweeps/paper-mix-lora.yaml"),
            Self::Smore => include_str!("../../../../sweeps/paper-smore.yaml"),
            Self::Smore3 => include_str!("../../../../sweeps/paper-smore-3-layers.yaml"),
        }
    }
}

/// What is to be reproduced.
#[derive(Clone, Debug)]
pub struct Study {
    /// Folder of the base.
    pub model: PathBuf,
    /// Folder of the sets.
    pub data: PathBuf,
    /// The folder to write.
    pub output: PathBuf,
    /// The tasks, and where their files are.
    pub tasks: Vec<(PaperTask, Files)>,
    /// The methods.
    pub methods: Vec<Method>,
    /// Trained parameters that no candidate may exceed.
    pub budget: usize,
    /// Seeds of every candidate.
    pub seeds: Vec<u64>,
    /// Steps after which a run ends, where the paper's two epochs are too long.
    pub max_steps: Option<usize>,
    /// Records of each training set, where all are too many.
    pub max_samples: Option<usize>,
}

impl Study {
    /// Trained parameters of LoRA of rank 64 on the FFN of a decoder.
    ///
    /// # Errors
    /// If the decoder takes no LoRA.
    pub fn usual_budget(spec: &DecoderSpec) -> Result<usize> {
        let lora = AdapterConfig::Lora(LoraConfig::new(BUDGET_RANK));
        Ok(Adapters::new(&lora, spec).map_err(Error::Run)?.len())
    }

    /// The folder of a task.
    pub fn folder(&self, task: PaperTask) -> PathBuf {
        self.output.join(task.name())
    }

    /// The file of a method's sweep on a task.
    pub fn sweep_file(&self, task: PaperTask, method: Method) -> PathBuf {
        self.folder(task).join(format!("{}.yaml", method.key()))
    }

    /// Writes training sets, runs and sweeps. What is there already is written again, and alike.
    ///
    /// # Errors
    /// A set that cannot be read as its task, or a file that cannot be written.
    pub fn write(&self) -> Result<()> {
        for (task, files) in &self.tasks {
            let folder = self.folder(*task);
            std::fs::create_dir_all(&folder)
                .map_err(|source| Error::Io { path: folder.clone(), source })?;
            let lessons = task.lessons(&files.train)?;
            let lines: Vec<String> = lessons.iter().map(Value::to_string).collect();
            let train = folder.join("train.jsonl");
            write(&train, (lines.join("\n") + "\n").as_bytes())?;
            let run = folder.join("run.yaml");
            write(&run, yaml(&self.recipe(&train, &folder))?.as_bytes())?;
            for &method in &self.methods {
                let sweep = self.sweep(*task, method, &run)?;
                write(&self.sweep_file(*task, method), yaml(&sweep)?.as_bytes())?;
            }
        }
        Ok(())
    }

    /// The paper's recipe: two epochs at 1e-4, cosine with a tenth of warm-up, one sample in eight
    /// accumulated passes, norm 1, 2048 tokens, bf16, a tenth of the training set held out.
    fn recipe(&self, train: &Path, folder: &Path) -> Value {
        json!({
            "model": self.model,
            "output_dir": folder.join("run"),
            // Every sweep puts its own in this place.
            "adapter": {"kind": "lora", "rank": 8},
            "data": {
                "train": [{"path": train}],
                "validation": {"fraction": 0.1},
                "cutoff_len": 2048,
                "max_samples": self.max_samples,
            },
            "train": {
                "num_train_epochs": 2.0, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.1, "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8, "max_grad_norm": 1.0, "bf16": true,
                "max_steps": self.max_steps,
            },
        })
    }

    fn sweep(&self, task: PaperTask, method: Method, run: &Path) -> Result<Value> {
        let mut sweep: Value = from_yaml(method.sweep(), "sweeps")?;
        sweep["run"] = json!(run);
        sweep["seeds"] = json!(self.seeds);
        sweep["budget"] = json!({"parameters": self.budget});
        sweep["output_dir"] = json!(self.folder(task).join(method.key()));
        Ok(sweep)
    }
}

fn yaml(value: &Value) -> Result<String> {
    serde_saphyr::to_string(value)
        .map_err(|error| Error::Run(format!("cannot write a configuration as YAML: {error}")))
}
