//! A run's configuration: the YAML that `smore train` takes.
//!
//! Training keys carry LLaMA-Factory's names where the meaning is the same. A key that is not
//! known is an error at every level. Relative paths are taken from the current directory.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use smore::config::{HydraLoraConfig, LoraConfig, MixLoraConfig, SmoreConfig};
use smore::targets::Targets;

use crate::error::{Error, Result};
use crate::routing::health::HealthConfig;

mod foreign;
mod source;
mod train;
mod yaml;

pub(crate) use foreign::advice;
pub use source::{Columns, Format, SourceConfig, Tags, ValidationConfig};
pub use train::{BalanceReduction, LrScheduler, RouterLr, SchedulerKwargs, TrainConfig};
pub(crate) use yaml::from_yaml;

/// One training run, as the user wrote it and with the defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunConfig {
    /// Folder of the base model in Hugging Face layout.
    pub model: PathBuf,
    /// What is trained.
    pub adapter: AdapterConfig,
    /// What it is trained on.
    pub data: DataConfig,
    /// How it is trained.
    pub train: TrainConfig,
    /// How the routers are watched.
    pub health: HealthConfig,
    /// The run folder to write.
    pub output_dir: PathBuf,
}

/// What is trained, chosen by `kind`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AdapterConfig {
    /// A S'MoRE adapter on the frozen base.
    Smore(SmoreConfig),
    /// A plain LoRA on the frozen base.
    Lora(LoraConfig),
    /// A HydraLoRA on the frozen base.
    HydraLora(HydraLoraConfig),
    /// A MixLoRA on the frozen base.
    MixLora(MixLoraConfig),
    /// An adapter that exists, trained on.
    Saved(SavedConfig),
    /// Every parameter of the base, and no adapter.
    Full(FullConfig),
}

/// An adapter that exists (`kind: saved`): trained, grown, or made by another tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedConfig {
    /// Its folder.
    pub path: PathBuf,
}

impl AdapterConfig {
    /// The value of `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Smore(_) => "smore",
            Self::Lora(_) => "lora",
            Self::HydraLora(_) => "hydra_lora",
            Self::MixLora(_) => "mix_lora",
            Self::Saved(_) => "saved",
            Self::Full(_) => "full",
        }
    }

    /// The linear maps to adapt; none where the base itself is trained or a folder says so.
    pub fn targets(&self) -> Option<&Targets> {
        match self {
            Self::Smore(c) => Some(&c.targets),
            Self::Lora(c) => Some(&c.targets),
            Self::HydraLora(c) => Some(&c.targets),
            Self::MixLora(c) => Some(&c.targets),
            Self::Saved(_) | Self::Full(_) => None,
        }
    }
}

/// Training of the base itself (`kind: full`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FullConfig {
    /// Draw the weights anew instead of reading them: pre-training. The folder then needs only
    /// `config.json` and the tokenizer.
    pub from_scratch: bool,
}

/// The `data:` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Files to train on, in this order.
    pub train: Vec<SourceConfig>,
    /// Where the held-out samples come from.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// At most this many records of all training files together, picked by the seed.
    #[serde(default)]
    pub max_samples: Option<usize>,
    /// Longest sample in tokens; what is beyond is cut from the end.
    #[serde(default = "default_cutoff_len")]
    pub cutoff_len: usize,
    /// A folder on a disk for the tokens of data that is larger than 4 MiB of tokens; the system's
    /// folder for temporary files where absent. Nothing is left there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
}

fn default_cutoff_len() -> usize {
    2048
}

impl RunConfig {
    /// Reads, parses and validates the file at `path`.
    pub fn load(path: &Path) -> Result<Self> {
        Self::parse(&read_text(path, "a run configuration in YAML")?, &path.display().to_string())
    }

    /// As [`RunConfig::load`], with what is wrong with the values beside the configuration.
    pub(crate) fn load_unchecked(path: &Path) -> Result<(Self, Result<()>)> {
        let text = read_text(path, "a run configuration in YAML")?;
        Self::parse_unchecked(&text, &path.display().to_string())
    }

    fn parse_unchecked(text: &str, name: &str) -> Result<(Self, Result<()>)> {
        let mut config = yaml::parse(text, name)?;
        config.train.settle();
        let valid = config.validate().map_err(|message| config_error(name, message));
        Ok((config, valid))
    }

    /// Parses and validates `text`; `name` stands for the file in messages.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let (config, valid) = Self::parse_unchecked(text, name)?;
        valid.map(|()| config)
    }

    /// The configuration as YAML, every default written out; [`RunConfig::parse`] reads it back.
    pub fn to_yaml(&self) -> Result<String> {
        serde_saphyr::to_string(self)
            .map_err(|error| Error::Run(format!("cannot write the configuration as YAML: {error}")))
    }

    /// Checks what the types cannot say. The adapter's numbers are checked by `smore` itself.
    fn validate(&self) -> std::result::Result<(), String> {
        for (key, path) in [("model", &self.model), ("output_dir", &self.output_dir)] {
            check(!path.as_os_str().is_empty(), key, "empty", "a path")?;
        }
        self.data.validate()?;
        self.train.validate()?;
        self.health.validate()?;
        self.train.validate_for(&self.adapter)
    }
}

/// The adapter that a file describes: a run's configuration, or an adapter section by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSection {
    /// The adapter.
    pub adapter: AdapterConfig,
    /// The base model, where one is named.
    pub model: Option<PathBuf>,
}

impl AdapterSection {
    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// A missing file, or what is wrong in it, with its line.
    pub fn load(path: &Path) -> Result<Self> {
        Self::parse(
            &read_text(path, "a run's configuration or its adapter section")?,
            &path.display().to_string(),
        )
    }

    /// Parses `text`; `name` stands for the file in messages.
    ///
    /// # Errors
    /// What is wrong, with its line.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        yaml::parse_section(text, name)
    }
}

/// The YAML mapping `text` without asking what its keys are.
pub(crate) fn mapping(
    text: &str,
    name: &str,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    yaml::from_yaml(text, name)
}

pub(crate) fn read_text(path: &Path, what: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidData => {
            config_error(&path.display().to_string(), "not UTF-8 text; expected YAML")
        }
        _ => Error::reading(path, what, source),
    })
}

impl DataConfig {
    fn validate(&self) -> std::result::Result<(), String> {
        check(!self.train.is_empty(), "data.train", "empty", "at least one {path: FILE}")?;
        for (i, source) in self.train.iter().enumerate() {
            source.validate(&format!("data.train[{i}]"))?;
        }
        let fraction = self.validation.fraction;
        check(
            (0.0..1.0).contains(&fraction),
            "data.validation.fraction",
            fraction,
            "a number from 0 to below 1",
        )?;
        self.validation.validate()?;
        if let Some(n) = self.max_samples {
            check(n > 0, "data.max_samples", n, "at least 1, or null for no limit")?;
        }
        check(self.cutoff_len >= 2, "data.cutoff_len", self.cutoff_len, "at least 2 tokens")
    }
}

/// `Err("KEY is GOT; expected EXPECTED")` unless `holds`.
fn check(
    holds: bool,
    key: &str,
    got: impl fmt::Display,
    expected: &str,
) -> std::result::Result<(), String> {
    if holds { Ok(()) } else { Err(format!("{key} is {got}; expected {expected}")) }
}

fn config_error(file: &str, message: impl Into<String>) -> Error {
    Error::Config { file: file.to_owned(), message: message.into() }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
