//! LLaMA-Factory's `dataset_info.json`: names of data sets, and how their files are written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::file_error;
use crate::config::{Columns, Format, SourceConfig, Tags};
use crate::error::{Error, Result, nearest};

const FILE: &str = "dataset_info.json";

/// The keys an entry may have.
const KEYS: [&str; 14] = [
    "file_name",
    "formatting",
    "columns",
    "tags",
    "num_samples",
    "ranking",
    "split",
    "subset",
    "folder",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
];

/// The file that a source means; one that names a path is returned as it is.
///
/// # Errors
/// `dataset_info.json` is missing or wrong, or does not list the data set.
pub fn resolve(source: &SourceConfig) -> Result<SourceConfig> {
    let Some(name) = &source.dataset else { return Ok(source.clone()) };
    let dir = source.dataset_dir.clone().unwrap_or_else(|| "data".into());
    let mut found = look_up(&dir, name)?;
    found.weight = source.weight;
    found.max_samples = source.max_samples.or(found.max_samples);
    Ok(found)
}

/// A data set by its name in the file of the folder `dir`.
pub(crate) fn look_up(dir: &Path, name: &str) -> Result<SourceConfig> {
    let path = dir.join(FILE);
    let text = fs::read(&path)
        .map_err(|e| Error::reading(&path, "LLaMA-Factory's list of data sets", e))?;
    let entries: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| file_error(&path, format!("not valid JSON: {e}; expected {{NAME: ...}}")))?;
    let entry = entries.get(name).ok_or_else(|| {
        let hint = nearest(name, entries.keys().map(String::as_str))
            .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        file_error(&path, format!("data set `{name}` is not listed{hint}"))
    })?;
    read(entry, dir).map_err(|message| file_error(&path, format!("data set `{name}`: {message}")))
}

fn read(entry: &Value, dir: &Path) -> std::result::Result<SourceConfig, String> {
    let entry = entry.as_object().ok_or("not an object; expected {file_name: ...}")?;
    for key in entry.keys() {
        if !KEYS.contains(&key.as_str()) {
            // LLaMA-Factory passes over `format` and reads the file as alpaca.
            let near = if key == "format" { Some("formatting") } else { nearest(key, KEYS) };
            let hint = near.map_or_else(String::new, |near| format!("; rename it `{near}`"));
            return Err(format!("unknown key `{key}`{hint}"));
        }
    }
    if entry.get("ranking") == Some(&Value::Bool(true)) {
        return Err("holds pairs to choose from; expected answers to train on".into());
    }
    let file = entry.get("file_name").and_then(Value::as_str).ok_or(
        "has no file_name, so it is not a file on this machine; put a copy beside the list and name \
         it as file_name",
    )?;
    let path = dir.join(file);
    let formatting = match entry.get("formatting").map(|value| value.as_str().unwrap_or("?")) {
        None | Some("alpaca") => Format::Alpaca,
        Some("sharegpt") => Format::Sharegpt,
        Some("openai") => Format::Messages,
        Some("choice") => Format::Choice,
        Some("two_options") => Format::TwoOptions,
        Some(other) => {
            return Err(format!(
                "formatting is `{other}`; expected alpaca, sharegpt, openai, choice or two_options"
            ));
        }
    };
    let columns = match entry.get("columns") {
        None | Some(Value::Null) => None,
        Some(value) => Some(from_json::<BTreeMap<String, String>>("columns", value)?),
    };
    let tags: Tags = match entry.get("tags") {
        None | Some(Value::Null) => Tags::default(),
        Some(value) => from_json("tags", value)?,
    };
    let max_samples = match entry.get("num_samples") {
        None | Some(Value::Null) => None,
        Some(value) => Some(from_json("num_samples", value)?),
    };
    let (format, columns) = our_columns(formatting, columns)?;
    let is_text = path.extension().is_some_and(|extension| extension == "txt");
    let (format, columns) =
        if is_text { (Format::Text, Columns::new()) } else { (format, columns) };
    Ok(SourceConfig {
        path,
        format: Some(format),
        columns,
        tags,
        max_samples,
        ..SourceConfig::default()
    })
}

fn from_json<T: serde::de::DeserializeOwned>(
    key: &str,
    value: &Value,
) -> std::result::Result<T, String> {
    T::deserialize(value).map_err(|e| format!("{key}: {e}"))
}

/// Their names of fields to ours. Where columns are given, the others are not read.
fn our_columns(
    format: Format,
    columns: Option<BTreeMap<String, String>>,
) -> std::result::Result<(Format, Columns), String> {
    let names: &[(&str, &str)] = match format {
        Format::Alpaca => &[
            ("prompt", "instruction"),
            ("query", "input"),
            ("response", "output"),
            ("system", "system"),
            ("history", "history"),
            ("tools", "tools"),
        ],
        Format::Sharegpt => {
            &[("messages", "conversations"), ("system", "system"), ("tools", "tools")]
        }
        Format::Messages => &[("messages", "messages"), ("tools", "tools")],
        _ => &[
            ("question", "question"),
            ("choices", "choices"),
            ("answerKey", "answerKey"),
            ("sentence", "sentence"),
            ("option1", "option1"),
            ("option2", "option2"),
            ("answer", "answer"),
        ],
    };
    let Some(columns) = columns else { return Ok((format, Columns::new())) };
    let mut ours = Columns::new();
    for (theirs, column) in &columns {
        let Some((_, our)) = names.iter().find(|(name, _)| name == theirs) else {
            let known: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
            return Err(format!(
                "columns names `{theirs}`; of {format} {} can be read",
                known.join(", ")
            ));
        };
        ours.insert((*our).to_owned(), Some(column.clone()));
    }
    // A prompt that nothing answers is a text to go on with.
    if format == Format::Alpaca && !ours.contains_key("output") {
        let text = ours.remove("instruction").unwrap_or_default();
        return Ok((Format::Text, [("text".to_owned(), text)].into()));
    }
    for optional in ["input", "system", "history", "tools"] {
        if names.iter().any(|(_, our)| *our == optional) {
            ours.entry(optional.to_owned()).or_insert(None);
        }
    }
    Ok((format, ours))
}
