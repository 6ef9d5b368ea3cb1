//! What can go wrong, and the exit code that goes with it.

use std::io;
use std::path::{Path, PathBuf};

/// Any failure of this crate. Messages are lower-case fragments that name the thing, what was
/// expected, what was found and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run's configuration is wrong (exit code 2).
    #[error("{file}: {message}")]
    Config {
        /// The configuration's name, usually its path.
        file: String,
        /// What is wrong, with line or key.
        message: String,
    },
    /// A file that was named by the user does not exist (exit code 2).
    #[error("{}: not found; expected {what}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was to be there.
        what: String,
    },
    /// A data file is wrong (exit code 2).
    #[error("{}{}: {message}", file.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Data {
        /// The data file.
        file: PathBuf,
        /// Line on which the record starts, counted from 1; absent if the whole file is meant.
        line: Option<usize>,
        /// What is wrong, with the field.
        message: String,
    },
    /// A model folder is incomplete or not understood (exit code 2).
    #[error("{}: {message}", file.display())]
    Model {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong, with the tensor or key.
        message: String,
    },
    /// A chat template does not compile or refuses a conversation (exit code 2).
    #[error("chat template {name}: {message}")]
    Template {
        /// Where the template comes from.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// An adapter folder is incomplete or does not fit the model (exit code 2).
    #[error("{}: {message}", file.display())]
    Adapter {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong, with the tensor or key.
        message: String,
    },
    /// Reading or writing failed (exit code 1).
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The run was asked to stop and did, with a checkpoint (exit code 130).
    #[error("stopped after step {step} of {total_steps}; {} holds it", checkpoint.display())]
    Interrupted {
        /// Steps done.
        step: usize,
        /// Steps of the whole run.
        total_steps: usize,
        /// The checkpoint.
        checkpoint: PathBuf,
    },
    /// The run itself failed (exit code 1).
    #[error("{0}")]
    Run(String),
}

/// A result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The program's exit code: 2 for bad arguments, configuration, data or folders, 1 for a run
    /// that failed, 130 for one that was interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. }
            | Self::Missing { .. }
            | Self::Data { .. }
            | Self::Model { .. }
            | Self::Template { .. }
            | Self::Adapter { .. } => 2,
            Self::Io { .. } | Self::Run(_) => 1,
            Self::Interrupted { .. } => 130,
        }
    }

    /// The error of a failed read of `path`, which was to hold `what`: [`Error::Missing`] if there
    /// is nothing, [`Error::Io`] otherwise.
    pub fn reading(path: &Path, what: &str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound {
            Self::Missing { path: path.to_owned(), what: what.to_owned() }
        } else {
            Self::Io { path: path.to_owned(), source }
        }
    }
}

/// The candidate most like `given`, if any is close enough to be a slip of the pen.
pub(crate) fn nearest<'a>(
    given: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| {
            let likeness = strsim::normalized_damerau_levenshtein(given, candidate)
                .max(strsim::jaro_winkler(given, candidate) - 0.25);
            (likeness, candidate)
        })
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_file_and_line() {
        let error = Error::Data {
            file: "a.jsonl".into(),
            line: Some(3),
            message: "field `output` is missing".into(),
        };
        assert_eq!(error.to_string(), "a.jsonl:3: field `output` is missing");
        let error =
            Error::Data { file: "a.jsonl".into(), line: None, message: "no records".into() };
        assert_eq!(error.to_string(), "a.jsonl: no records");
    }

    #[test]
    fn a_missing_file_is_the_users_fault_and_a_failed_read_is_not() {
        let path = Path::new("x/tokenizer.json");
        let missing = Error::reading(path, "the tokenizer", io::ErrorKind::NotFound.into());
        assert_eq!(missing.exit_code(), 2);
        assert_eq!(missing.to_string(), "x/tokenizer.json: not found; expected the tokenizer");
        let denied = Error::reading(path, "the tokenizer", io::ErrorKind::PermissionDenied.into());
        assert_eq!(denied.exit_code(), 1);
    }

    #[test]
    fn nearest_finds_slips_and_refuses_strangers() {
        let keys = ["learning_rate", "seed", "save_steps", "eval_steps"];
        assert_eq!(nearest("learning_rat", keys), Some("learning_rate"));
        assert_eq!(nearest("lerning_rate", keys), Some("learning_rate"));
        assert_eq!(nearest("save_step", keys), Some("save_steps"));
        assert_eq!(nearest("zzz", keys), None);
    }
}
