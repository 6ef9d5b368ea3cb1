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

    /// Its files in a folder of sets: a folder with the task's name, in it the largest file with
    /// `train` in its name, and one with `test`, `dev` or `validation`. Where the answers of the
    /// test set are not published, that comes last.
    ///
    /// # Errors
    /// What is not there, and what it is to be called.
    pub fn find(self, data: &Path) -> Result<Files> {
        let trained = if self == Self::HumanEval { "code_alpaca" } else { self.name() };
        let train = find(data, trained, &["train", "alpaca"])?;
        let order: &[&str] = match self {
            Self::CommonsenseQa | Self::WinoGrande => &["dev", "validation", "test"],
            Self::HumanEval => &["test", "humaneval"],
            _ => &["test", "validation", "dev"],
        };
        Ok(Files { train, test: find(data, self.name(), order)? })
    }

    /// What is learnt from a training set: records with `instruction`, `input` and `output`.
    pub(super) fn lessons(self, train: &Path) -> Result<Vec<Value>> {
        if self == Self::HumanEval {
            return crate::eval::records(train);
        }
        Task::open(self.name())?.lessons(train)
    }
}

/// Of the files of a set those with the first of `words` that any has in its name, and of these the
/// largest.
fn find(data: &Path, set: &str, words: &[&str]) -> Result<PathBuf> {
    let plain = |name: &str| name.to_lowercase().replace(['-', '_'], "");
    let inside = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let name = |path: &Path| plain(&path.file_name().unwrap_or_default().to_string_lossy());
    let folder = inside(data).into_iter().find(|f| f.is_dir() && name(f) == plain(set));
    let folder = folder.unwrap_or_else(|| data.join(set));
    let readable = |file: &PathBuf| {
        let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        file.is_file() && ENDINGS.contains(&ending.as_str())
    };
    let files: Vec<PathBuf> = inside(&folder).into_iter().filter(readable).collect();
    let size = |file: &Path| std::fs::metadata(file).map_or(0, |m| m.len());
    let of_word = |word: &&str| {
        let named = files.iter().filter(|file| name(file).contains(*word));
        named.max_by_key(|file| size(file)).cloned()
    };
    words.iter().find_map(of_word).ok_or_else(|| Error::Missing {
        path: folder,
        what: format!(
            "the set {set}, as it is published: a .jsonl, .json or .parquet file with `{}` in its \
             name",
            words.join("` or `")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_under_the_tasks_name() {
        let dir = tempfile::tempdir().unwrap();
        let arc = dir.path().join("ARC-Easy");
        std::fs::create_dir(&arc).unwrap();
        let error = PaperTask::ArcEasy.find(dir.path()).unwrap_err().to_string();
        assert!(error.contains("ARC-Easy") && error.contains("`train`"), "{error}");
        let put = |name: &str, text: &str| {
            std::fs::write(arc.join(name), text).unwrap();
            arc.join(name)
        };
        let dev = put("ARC-Easy-Dev.parquet", "");
        put("train_s.jsonl", "{}");
        put("train-labels.lst", "many, many, many labels");
        let train = put("train_l.jsonl", "{} and more");
        let files = PaperTask::ArcEasy.find(dir.path()).unwrap();
        assert_eq!(files, Files { train, test: dev });
        let test = put("test.jsonl", "");
        assert_eq!(PaperTask::ArcEasy.find(dir.path()).unwrap().test, test);
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
        let prompt =
            "Please choose the correct answer to the question: Which is hot? (A) ice  (B) fire";
        assert_eq!((&lesson["instruction"], &lesson["output"]), (&prompt.into(), &"B".into()));
        std::fs::write(&file, r#"{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}"#).unwrap();
        let [lesson] = &PaperTask::Gsm8k.lessons(&file).unwrap()[..] else { panic!() };
        assert_eq!(lesson["instruction"], "Question: 1 + 1?\nAnswer:");
        assert_eq!(lesson["output"], "It is 2.\n#### 2");
    }
}
