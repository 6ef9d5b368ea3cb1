//! Configurations of LLaMA-Factory, and of the authors' fork of it, turned into ours.
//!
//! Defaults are those of the other program and are written out, so that the run is the one its
//! file describes. Every key that is not taken over is listed with the reason.

mod adapter;
mod data;
mod recipe;

use crate::config::RunConfig;
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// What became of a foreign configuration.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Our configuration in YAML; it parses, but may name files that are to be filled in.
    pub yaml: String,
    /// The same, parsed.
    pub config: RunConfig,
    /// Keys that were not taken over, or not as they were, in the order of the file.
    pub notes: Vec<Note>,
}

impl Imported {
    /// Writes the configuration to a file that does not exist yet.
    ///
    /// # Errors
    /// A file that exists, or that cannot be written; half of it is never seen.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut file =
            tempfile::NamedTempFile::new_in(parent.unwrap_or(Path::new("."))).map_err(failed)?;
        file.write_all(self.yaml.as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        match file.persist_noclobber(path) {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
                let message = "exists; name a new file".into();
                Err(Error::Config { file: path.display().to_string(), message })
            }
            Err(error) => Err(failed(error.error)),
        }
    }
}

/// A key that was not taken over, or not as it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Note {
    /// Its name in the foreign file.
    pub key: String,
    /// Its value there; null where it is missing.
    pub value: Value,
    /// Why, and what to do.
    pub reason: String,
}

type Section = Map<String, Value>;
/// A section, or what is wrong.
type Made<T> = std::result::Result<T, String>;

/// Reads the YAML or JSON at `path`.
///
/// # Errors
/// A file that cannot be read, is no mapping, or asks for training that is not offered here.
pub fn import(path: &Path) -> Result<Imported> {
    let name = path.display().to_string();
    let text = crate::config::read_text(path, "a configuration of LLaMA-Factory")?;
    let folder = path.parent().unwrap_or(Path::new(""));
    parse(&text, &name, folder)
}

/// As [`import`], of a text; `folder` is where the file lies.
///
/// # Errors
/// As [`import`].
pub fn parse(text: &str, name: &str, folder: &Path) -> Result<Imported> {
    let bad = |message: String| Error::Config { file: name.to_owned(), message };
    let given: Section = crate::config::mapping(text, name)?;
    if given.contains_key("adapter") && given.contains_key("output_dir") {
        return Err(
            bad("this is a configuration of smore already; run `smore train` on it".into()),
        );
    }
    let mut source = Source::new(given);
    let sections = convert(&mut source, folder).map_err(bad)?;
    let yaml = serde_saphyr::to_string(&sections)
        .map_err(|e| bad(format!("cannot be written as YAML: {e}")))?;
    let config = RunConfig::parse(&yaml, name)?;
    Ok(Imported { yaml, config, notes: source.into_notes() })
}

fn convert(source: &mut Source, folder: &Path) -> Made<Value> {
    match source.text("stage").as_deref() {
        None | Some("sft") => {}
        Some(stage) => return Err(format!("stage is `{stage}`; only sft is offered")),
    }
    source.pass(&["do_train", "do_eval", "overwrite_cache", "overwrite_output_dir", "report_to"]);
    let zoo = source.take("model_zoo_name");
    let model = source.text("model_name_or_path").unwrap_or_else(|| {
        let reason = "the base model is not named by a folder; fill in `model`";
        source.note("model_name_or_path", zoo.unwrap_or_default(), reason);
        "FILL-IN/model-folder".into()
    });
    let output_dir = source.text("output_dir").unwrap_or_else(|| {
        source.note("output_dir", Value::Null, "not given; `runs/imported` was filled in");
        "runs/imported".into()
    });
    let adapter = adapter::convert(source)?;
    let data = data::convert(source, folder)?;
    let train = recipe::convert(source, adapter["kind"].as_str().unwrap_or_default())?;
    Ok(json!({"model": model, "adapter": adapter, "data": data, "train": train,
        "output_dir": output_dir}))
}

/// The foreign keys, and what was said about them.
struct Source {
    left: Section,
    order: Vec<String>,
    notes: Vec<Note>,
}

impl Source {
    fn new(given: Section) -> Self {
        let order = given.keys().cloned().collect();
        // A key without a value is a key that is not given.
        let left = given.into_iter().filter(|(_, value)| !value.is_null()).collect();
        Self { left, order, notes: Vec::new() }
    }

    /// The value of a key, which counts as taken over from here on.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.left.remove(key)
    }

    /// Keys that ask for nothing.
    fn pass(&mut self, keys: &[&str]) {
        for key in keys {
            self.take(key);
        }
    }

    fn text(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text),
            other => Some(other.to_string()),
        }
    }

    /// A number, also where YAML reads it as a text, as it does with `1e-4`.
    fn number(&mut self, key: &str) -> Made<Option<Value>> {
        self.take(key).map(|value| number(key, &value)).transpose()
    }

    fn flag(&mut self, key: &str) -> Made<bool> {
        match self.take(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(format!("{key} is {other}; expected true or false")),
        }
    }

    /// A list, a single entry, or entries with commas between them.
    fn list(&mut self, key: &str) -> Option<Vec<Value>> {
        Some(match self.take(key)? {
            Value::Array(list) => list,
            Value::String(text) => {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                parts.map(|part| json!(part)).collect()
            }
            other => vec![other],
        })
    }

    /// As [`Source::list`], of numbers.
    fn numbers(&mut self, key: &str) -> Made<Option<Vec<Value>>> {
        let list = self.list(key).map(|list| list.iter().map(|v| number(key, v)).collect());
        list.transpose()
    }

    fn note(&mut self, key: &str, value: Value, reason: impl Into<String>) {
        self.notes.push(Note { key: key.to_owned(), value, reason: reason.into() });
    }

    /// The notes, with one on every key that is left.
    fn into_notes(mut self) -> Vec<Note> {
        for (key, value) in std::mem::take(&mut self.left) {
            if value == Value::Bool(false) {
                continue;
            }
            let reason = crate::config::advice(&key).unwrap_or("unknown here");
            self.note(&key, value, reason);
        }
        let place = |key: &str| self.order.iter().position(|k| k == key).unwrap_or(usize::MAX);
        let mut notes = std::mem::take(&mut self.notes);
        notes.sort_by_key(|note| place(&note.key));
        notes
    }
}

fn number(key: &str, value: &Value) -> Made<Value> {
    let read = match value {
        Value::Number(_) => Some(value.clone()),
        Value::String(text) => {
            let whole = text.parse::<i64>().ok().map(Value::from);
            whole.or_else(|| serde_json::Number::from_f64(text.parse().ok()?).map(Value::Number))
        }
        _ => None,
    };
    read.ok_or_else(|| format!("{key} is {value}; expected a number"))
}

#[cfg(test)]
mod tests;
