//! The paper's tasks: where a folder has them, and what is learnt from them.

use crate::error::{Error, Result, nearest};
use crate::eval::Task;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A task of the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PaperTask {
    /// ARC, hard questions.
    ArcChallenge,
    /// ARC, easy questions.
    ArcEasy,
    /// CommonsenseQA.
    CommonsenseQa,
    /// OpenBookQA.
    #[serde(rename = "openbookqa")]
    OpenBookQa,
    /// WinoGrande.
    #[serde(rename = "winogrande")]
    WinoGrande,
    /// GSM8K.
    Gsm8k,
    /// Trained on CodeAlpaca, asked HumanEval.
    #[serde(rename = "humaneval")]
    HumanEval,
}

/// What a task is trained on and asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The training set.
    pub train: PathBuf,
    /// The questions.
    pub test: PathBuf,
}

const ENDINGS: [&str; 3] = ["jsonl", "json", "parquet"];

impl PaperTask {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ArcChallenge,
        Self::ArcEasy,
        Self::CommonsenseQa,
        Self::OpenBookQa,
        Self::WinoGrande,
        Self::Gsm8k,
        Self::HumanEval,
    ];

    /// Its name, as [`Task::open`] knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ArcChallenge => "arc_challenge",
            Self::ArcEasy => "arc_easy",
            Self::CommonsenseQa => "commonsense_qa",
            Self::OpenBookQa => "openbookqa",
            Self::WinoGrande => "winogrande",
            Self::Gsm8k => "gsm8k",
            Self::HumanEval => "humaneval",
        }
    }

    /// One of the five that the paper averages over.
    pub fn is_choice(self) -> bool {
        !matches!(self, Self::Gsm8k | Self::HumanEval)
    }

    /// The task of this name.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    pub fn by_name(name: &str) -> std::result::Result<Self, String> {
        let wanted = Task::open(name).map_or_else(|_| name.to_owned(), |task| task.name);
        Self::ALL.into_iter().find(|task| task.name() == wanted).ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            let near = nearest(name, names);
            let near = near.map_or_else(String::new, |n| format!("; did you mean {n}?"));
            format!("no task `{name}` in the paper; expected one of {}{near}", names.join(", "))
        })
    }

    /// Its files in a folder of sets: `<task>/train.*` and `<task>/test.*`, or `validation.*` or
    /// `dev.*` where the test set's answers are not published.
    ///
    /// # Errors
    /// What is not there, and what it is to be called.
    pub fn find(self, data: &Path) -> Result<Files> {
        let train = match self {
            Self::HumanEval => find(&data.join("code_alpaca"), &["train"])?,
            _ => find(&data.join(self.name()), &["train"])?,
        };
        let test = find(&data.join(self.name()), &["test", "validation", "dev"])?;
        Ok(Files { train, test })
    }

    /// What is learnt from a training set: records with `instruction`, `input` and `output`.
    pub(super) fn lessons(self, train: &Path) -> Result<Vec<Value>> {
        if self == Self::HumanEval {
            return crate::eval::records(train);
        }
        Task::open(self.name())?.lessons(train)
    }
}

fn find(folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let files = names.iter().flat_map(|name| ENDINGS.map(|end| folder.join(format!("{name}.{end}"))));
    files.into_iter().find(|file| file.is_file()).ok_or_else(|| Error::Missing {
        path: folder.join(format!("{}.jsonl", names[0])),
        what: format!(
            "the set {}, as it is published, in a file {} .jsonl, .json or .parquet",
            folder.file_name().unwrap_or_default().to_string_lossy(),
            names.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_under_the_tasks_name() {
        let dir = tempfile::tempdir().unwrap();
        let arc = dir.path().join("arc_easy");
        std::fs::create_dir(&arc).unwrap();
        let error = PaperTask::ArcEasy.find(dir.path()).unwrap_err().to_string();
        assert!(error.contains("arc_easy") && error.contains("train"), "{error}");
        std::fs::write(arc.join("train.json"), "[]").unwrap();
        std::fs::write(arc.join("dev.parquet"), "").unwrap();
        let files = PaperTask::ArcEasy.find(dir.path()).unwrap();
        assert_eq!(files.train, arc.join("train.json"));
        assert_eq!(files.test, arc.join("dev.parquet"));
        std::fs::write(arc.join("test.jsonl"), "").unwrap();
        assert_eq!(PaperTask::ArcEasy.find(dir.path()).unwrap().test, arc.join("test.jsonl"));
        assert_eq!(PaperTask::by_name("ARC-Easy"), Ok(PaperTask::ArcEasy));
        assert!(PaperTask::by_name("arc_esy").unwrap_err().contains("arc_easy"));
        assert!(PaperTask::by_name("piqa").is_err(), "not a task of the paper");
    }

    #[test]
    fn lessons_are_the_authors_prompts_and_labels() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("train.jsonl");
        std::fs::write(
            &file,
            r#"{"question": {"stem": "Which is hot?", "choices": [{"label": "A", "text": "ice"}, {"label": "B", "text": "fire"}]}, "answerKey": "B"}"#,
        )
        .unwrap();
        let [lesson] = &PaperTask::ArcEasy.lessons(&file).unwrap()[..] else { panic!() };
        let prompt = "Please choose the correct answer to the question: Which is hot? (A) ice  (B) fire";
        assert_eq!((&lesson["instruction"], &lesson["output"]), (&prompt.into(), &"B".into()));
        std::fs::write(&file, r##"{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}"##).unwrap();
        let [lesson] = &PaperTask::Gsm8k.lessons(&file).unwrap()[..] else { panic!() };
        assert_eq!(lesson["instruction"], "Question: 1 + 1?\nAnswer:");
        assert_eq!(lesson["output"], "It is 2.\n#### 2");
    }
}
