//! One data file of a run, and how its records are written.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::check;

/// Our name of a field, and the name of the file's column that holds it; null: not to be read.
pub type Columns = BTreeMap<String, Option<String>>;

/// One data file: a path, or a name in LLaMA-Factory's `dataset_info.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceConfig {
    /// A `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file.
    #[serde(skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// In place of `path`: a name in `dataset_info.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// The folder of `dataset_info.json`; `data` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_dir: Option<PathBuf>,
    /// The file's format; detected from the first record where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where the file's columns have other names than the format's fields.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: Columns,
    /// Where its conversations name roles and keys otherwise.
    #[serde(skip_serializing_if = "Tags::is_default")]
    pub tags: Tags,
    /// How often each of its training samples is in an epoch. What is beyond a whole number is
    /// a share drawn by the seed: 0.5 takes half of them, 2.5 all twice and half a third time.
    #[serde(skip_serializing_if = "is_one")]
    pub weight: f64,
    /// At most this many of its records (pieces, of a `.txt` file), drawn by the seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<usize>,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            dataset: None,
            dataset_dir: None,
            format: None,
            columns: Columns::new(),
            tags: Tags::default(),
            weight: 1.0,
            max_samples: None,
        }
    }
}

impl SourceConfig {
    pub(super) fn validate(&self, key: &str) -> Result<(), String> {
        if self.dataset.is_some() != is_empty(&self.path) {
            return Err(format!("{key} needs one of path and dataset; expected {{path: FILE}}"));
        }
        if self.dataset.is_some()
            && (self.format.is_some() || !self.columns.is_empty() || !self.tags.is_default())
        {
            return Err(format!(
                "{key} names a dataset and gives format, columns or tags; dataset_info.json says \
                 those: remove them here, or name the file as path"
            ));
        }
        if self.dataset_dir.is_some() && self.dataset.is_none() {
            return Err(format!("{key}.dataset_dir is given without dataset; expected both"));
        }
        check(
            self.weight > 0.0 && self.weight <= 1000.0,
            &format!("{key}.weight"),
            self.weight,
            "a number above 0 and at most 1000",
        )?;
        check(
            self.max_samples != Some(0),
            &format!("{key}.max_samples"),
            0,
            "at least 1, or null for no limit",
        )
    }
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

// Serde hands over references.
#[expect(clippy::trivially_copy_pass_by_ref, clippy::float_cmp)]
fn is_one(weight: &f64) -> bool {
    *weight == 1.0
}

/// How the records of a data file are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `{instruction, output, input?, system?, history?}`
    Alpaca,
    /// `{conversations: [{from, value}], system?, tools?}`
    Sharegpt,
    /// `{messages: [{role, content, weight?}], tools?}`
    #[serde(alias = "openai")]
    Messages,
    /// `{prompt, completion}`, each a string or a list of messages.
    PromptCompletion,
    /// `{question, choices: {text, label}, answerKey}`: multiple choice.
    Choice,
    /// `{sentence, option1, option2, answer}`: a blank to fill in, as in WinoGrande.
    TwoOptions,
    /// `{question, answer}`, as in GSM8K.
    QuestionAnswer,
    /// `{text}`, or a whole `.txt` file: continued language modelling.
    Text,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt_completion",
            Self::Choice => "choice",
            Self::TwoOptions => "two_options",
            Self::QuestionAnswer => "question_answer",
            Self::Text => "text",
        })
    }
}

/// What a conversation calls its keys and roles; absent ones are those of its format.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tags {
    /// Key of a message's role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role_tag: Option<String>,
    /// Key of a message's text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_tag: Option<String>,
    /// The role that asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_tag: Option<String>,
    /// The role that answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assistant_tag: Option<String>,
    /// The role that gives a tool's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observation_tag: Option<String>,
    /// The role that calls a tool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_tag: Option<String>,
    /// The role that sets the scene.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_tag: Option<String>,
}

impl Tags {
    /// Whether none is given.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where the held-out samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationConfig {
    /// Share of the training records to hold out; not used where a file is given.
    pub fraction: f64,
    /// A file of held-out samples; wins over `fraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// In place of `path`: a name in `dataset_info.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// The folder of `dataset_info.json`; `data` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_dir: Option<PathBuf>,
    /// Format of that file; detected where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// As for a training file.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: Columns,
    /// As for a training file.
    #[serde(skip_serializing_if = "Tags::is_default")]
    pub tags: Tags,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self {
            fraction: 0.1,
            path: None,
            dataset: None,
            dataset_dir: None,
            format: None,
            columns: Columns::new(),
            tags: Tags::default(),
        }
    }
}

impl ValidationConfig {
    /// The file of held-out samples, if one is named.
    pub fn source(&self) -> Option<SourceConfig> {
        (self.path.is_some() || self.dataset.is_some()).then(|| SourceConfig {
            path: self.path.clone().unwrap_or_default(),
            dataset: self.dataset.clone(),
            dataset_dir: self.dataset_dir.clone(),
            format: self.format,
            columns: self.columns.clone(),
            tags: self.tags.clone(),
            ..SourceConfig::default()
        })
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        if let Some(source) = self.source() {
            return source.validate("data.validation");
        }
        let bare = Self { fraction: self.fraction, ..Self::default() };
        if *self != bare {
            let key = if self.format.is_some() { "format" } else { "columns, tags or dataset_dir" };
            return Err(format!(
                "data.validation.{key} is given without data.validation.path; expected both or \
                 neither"
            ));
        }
        Ok(())
    }
}
