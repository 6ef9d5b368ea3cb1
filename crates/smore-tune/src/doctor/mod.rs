//! What can be known to be wrong before anything long starts: model folder, tokenizer, template,
//! adapter, data and machine, looked at one after the other.
//!
//! [`examine`] does not stop at the first thing it finds. `smore doctor` shows all of it, and
//! [`crate::sft::Prepared`] refuses a run with the first error.

mod adapter;
mod conversation;
mod data;
mod machine;
mod model;

use crate::checkpoint::LoadedAdapter;
use crate::config::{AdapterConfig, DataConfig, RunConfig, TrainConfig};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::memory::Split;
use crate::model::folder::ModelFolder;
use crate::model::spec::DecoderSpec;
use crate::template::Template;
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Good,
    /// It runs, but perhaps not as wished.
    Warning,
    /// It would fail, or train something else than what is meant.
    Error,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Area {
    /// The run's configuration.
    Config,
    /// Folder of the base: its settings and weights.
    Model,
    /// What turns text into tokens.
    Tokenizer,
    /// What turns conversations into text.
    Template,
    /// What is trained, or is to be used.
    Adapter,
    /// What it is trained on.
    Data,
    /// Memory, disk and processor.
    Machine,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Config => "config",
            Self::Model => "model",
            Self::Tokenizer => "tokenizer",
            Self::Template => "template",
            Self::Adapter => "adapter",
            Self::Data => "data",
            Self::Machine => "machine",
        })
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where.
    pub area: Area,
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub message: String,
    /// What to do about it; nothing for what is good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// What is to be looked at.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Folder of the base.
    pub model: PathBuf,
    /// What is trained or used on it, if anything.
    pub adapter: Option<AdapterConfig>,
    /// What it is trained on.
    pub data: Option<DataConfig>,
    /// How; absent where nothing is to be trained.
    pub train: Option<TrainConfig>,
    /// Where the run writes.
    pub output_dir: Option<PathBuf>,
    /// Stands for the configuration in messages.
    pub name: String,
}

impl From<&RunConfig> for Subject {
    fn from(config: &RunConfig) -> Self {
        Self {
            model: config.model.clone(),
            adapter: Some(config.adapter.clone()),
            data: Some(config.data.clone()),
            train: Some(config.train.clone()),
            output_dir: Some(config.output_dir.clone()),
            name: "the configuration".into(),
        }
    }
}

impl Subject {
    /// True where the weights are drawn anew.
    fn draws_weights(&self) -> bool {
        matches!(&self.adapter, Some(AdapterConfig::Full(full)) if full.from_scratch)
    }

    fn seed(&self) -> u64 {
        self.train.as_ref().map_or(TrainConfig::default().seed, |train| train.seed)
    }
}

/// What was found, and what of it can be worked with.
#[derive(Default)]
pub struct Examined {
    /// Everything that was looked at, in order.
    pub findings: Vec<Finding>,
    first_error: Option<Error>,
    /// The decoder's shape.
    pub(crate) spec: Option<DecoderSpec>,
    /// The base's weights; absent too where they are drawn anew.
    pub(crate) folder: Option<ModelFolder>,
    pub(crate) tokenizer: Option<Tokenizer>,
    template: Option<Template>,
    /// The adapters and their starting values.
    pub(crate) start: Option<LoadedAdapter>,
    /// Samples to train on and held out.
    pub(crate) data: Option<Dataset>,
    /// The memory that training is expected to take.
    pub(crate) planned: Option<Split>,
}

/// Looks at everything that `subject` names.
pub fn examine(subject: &Subject) -> Examined {
    let mut examined = Examined::default();
    let files = subject.data.as_ref().map(crate::data::check_files);
    let files = examined.keep(Area::Data, files.unwrap_or(Ok(()))).is_some();
    model::check(subject, &mut examined);
    conversation::check(subject, &mut examined);
    adapter::check(subject, &mut examined);
    if files {
        data::check(subject, &mut examined);
    }
    machine::check(subject, &mut examined);
    examined
}

/// Looks at the run that a configuration describes, as far as it can be read.
///
/// # Errors
/// A file that cannot be read or is no configuration: there is nothing to look at.
pub fn examine_file(path: &Path) -> Result<Examined> {
    let (config, valid) = RunConfig::load_unchecked(path)?;
    let name = path.display().to_string();
    let mut examined = examine(&Subject { name: name.clone(), ..Subject::from(&config) });
    if let Err(error) = valid {
        examined.findings.insert(0, bad(Area::Config, &error));
        examined.first_error = Some(error);
    } else {
        examined.findings.insert(0, good(Area::Config, format!("{name} can be read")));
    }
    Ok(examined)
}

fn good(area: Area, message: String) -> Finding {
    Finding { area, severity: Severity::Good, message, remedy: None }
}

/// An error's message says what is wrong, and often behind a semicolon what to do.
fn bad(area: Area, error: &Error) -> Finding {
    let whole = error.to_string();
    let said = whole.rsplit_once("; ").filter(|(_, rest)| !rest.starts_with("expected"));
    let (message, remedy) = said.unwrap_or_else(|| (&whole, remedy(error)));
    let (message, remedy) = (message.to_owned(), Some(remedy.to_owned()));
    Finding { area, severity: Severity::Error, message, remedy }
}

impl Examined {
    /// Refuses what would not run.
    ///
    /// # Errors
    /// The first error that was found.
    pub fn accept(&mut self) -> Result<()> {
        self.first_error.take().map_or(Ok(()), Err)
    }

    /// Positions of the model, where its settings could be read.
    pub fn max_positions(&self) -> Option<usize> {
        self.spec.as_ref().map(|spec| spec.max_positions)
    }

    /// How many findings are as bad as `severity`.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    fn good(&mut self, area: Area, message: impl Into<String>) {
        self.findings.push(good(area, message.into()));
    }

    fn warn(&mut self, area: Area, message: impl Into<String>, remedy: impl Into<String>) {
        let (message, remedy) = (message.into(), Some(remedy.into()));
        self.findings.push(Finding { area, severity: Severity::Warning, message, remedy });
    }

    fn fail(&mut self, area: Area, error: Error) {
        let finding = bad(area, &error);
        // One broken file may be read by several.
        if !self.findings.iter().any(|other| other.message == finding.message) {
            self.findings.push(finding);
        }
        self.first_error.get_or_insert(error);
    }

    /// The value, or nothing and one more finding.
    fn keep<T>(&mut self, area: Area, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(area, error);
                None
            }
        }
    }
}

/// What to do about an error whose message does not say it.
fn remedy(error: &Error) -> &'static str {
    match error {
        Error::Config { .. } => "correct the key in the configuration",
        Error::Missing { .. } => "correct the path, or put the file there",
        Error::Data { .. } => "correct the file at the line, or name its format",
        Error::Model { .. } => {
            "correct the named file, or fetch the model's folder again as it was published"
        }
        Error::Template { .. } => {
            "put a template that can render the data into chat_template.jinja of the model's folder"
        }
        Error::Adapter { .. } => {
            "name a whole adapter folder that was made for this model, or train a new one"
        }
        Error::Io { .. } => "make the file readable, or the folder writable",
        Error::Run(_) | Error::Interrupted { .. } => "change what the message names",
    }
}

#[cfg(test)]
mod tests;
