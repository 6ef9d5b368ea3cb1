//! The data: names in `dataset_info.json`, and how much of them.

use super::{Made, Section, Source};
use crate::data::dataset_info::look_up;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

pub(super) fn convert(source: &mut Source, folder: &Path) -> Made<Value> {
    let dir = PathBuf::from(source.text("dataset_dir").unwrap_or_else(|| "data".into()));
    let info = Info::open(&dir, folder);
    let names = source.list("dataset").unwrap_or_default();
    let mut files = Vec::new();
    for name in &names {
        files.push(info.source(source, "dataset", name));
    }
    if files.is_empty() {
        source.note("dataset", Value::Null, "no training data is named; fill in data.train");
        files.push(json!({"path": "FILL-IN/train.jsonl"}));
    }
    let mut section = json!({"train": files, "validation": validation(source, &info)?});
    section["cutoff_len"] = source.number("cutoff_len")?.unwrap_or(json!(2048));
    if let Some(most) = source.number("max_samples")? {
        // It counts per data set there.
        for file in section["train"].as_array_mut().into_iter().flatten() {
            file["max_samples"] = most.clone();
        }
    }
    for (key, reason) in [
        ("template", "the model's own chat template is used"),
        ("train_on_prompt", "only answers are trained"),
        ("mask_history", "every answer of a conversation is trained"),
        ("streaming", "a file is read as it needs"),
        ("mix_strategy", "data sets are read one after the other and shuffled"),
        ("interleave_probs", "data sets are read one after the other and shuffled"),
    ] {
        if let Some(value) = source.take(key).filter(|value| *value != Value::Bool(false)) {
            source.note(key, value, reason);
        }
    }
    source.pass(&["preprocessing_num_workers", "preprocessing_batch_size"]);
    Ok(section)
}

fn validation(source: &mut Source, info: &Info) -> Made<Value> {
    let size = source.number("val_size")?.unwrap_or(json!(0));
    let names = source.list("eval_dataset").unwrap_or_default();
    for name in names.iter().skip(1) {
        source.note("eval_dataset", name.clone(), "one file is held out; this one was left out");
    }
    if let Some(name) = names.first() {
        return Ok(info.source(source, "eval_dataset", name));
    }
    match size.as_f64().unwrap_or(0.0) {
        share if share < 1.0 => Ok(json!({"fraction": share})),
        count => {
            let reason = "a count there and a share here; fill in data.validation.fraction (0.1 \
                          was taken)";
            source.note("val_size", json!(count), reason);
            Ok(json!({"fraction": 0.1}))
        }
    }
}

/// `dataset_info.json`, where it is found.
struct Info {
    dir: PathBuf,
    entries: Section,
}

impl Info {
    /// Looks from the current directory, then from the configuration's.
    fn open(dir: &Path, folder: &Path) -> Self {
        for dir in [dir.to_owned(), folder.join(dir)] {
            let text = std::fs::read_to_string(dir.join("dataset_info.json")).unwrap_or_default();
            if let Ok(Value::Object(entries)) = serde_json::from_str(&text) {
                return Self { dir, entries };
            }
        }
        Self { dir: dir.to_owned(), entries: Section::new() }
    }

    /// Our entry for a data set.
    fn source(&self, notes: &mut Source, key: &str, name: &Value) -> Value {
        let name = name.as_str().map_or_else(|| name.to_string(), str::to_owned);
        let path = |file: &str| self.dir.join(file).display().to_string();
        let Some(entry) = self.entries.get(&name) else {
            let info = self.dir.join("dataset_info.json");
            let reason = if self.entries.is_empty() {
                format!("{} was not found; fill in the path of this data set", info.display())
            } else {
                format!("{} does not list it; fill in its path", info.display())
            };
            notes.note(key, json!(name), reason);
            return json!({"path": path(&format!("{name}.json"))});
        };
        if entry["file_name"].is_null() {
            let reason = "it is not a file on this machine; fill in the path of a copy";
            notes.note(key, json!(name), reason);
            return json!({"path": path(&format!("{name}.json"))});
        }
        let found = look_up(&self.dir, &name).map_err(|e| e.to_string());
        match found.and_then(|found| serde_json::to_value(found).map_err(|e| e.to_string())) {
            Ok(ours) => ours,
            Err(reason) => {
                notes.note(key, json!(name), format!("{reason}; fill in its path and format"));
                json!({"path": path(&format!("{name}.json"))})
            }
        }
    }
}
