//! Results of evaluations side by side, each pair on the samples that both have.

use super::results::{Sample, Setting};
use super::statistics::Paired;
use crate::error::{Error, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The samples of one side under each task.
pub struct Evaluated {
    /// By task.
    pub tasks: BTreeMap<String, (Setting, Vec<Sample>)>,
}

/// Two sides under one metric of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The task.
    pub task: String,
    /// How it was scored.
    pub protocol: super::Protocol,
    /// The metric with its filter.
    pub metric: String,
    /// The numbers.
    #[serde(flatten)]
    pub paired: Paired,
}

/// The folder of results that is meant by one of a side or of a whole evaluation.
pub fn side_of(folder: &Path) -> Option<PathBuf> {
    let has = |f: &Path| {
        fs::read_dir(f).into_iter().flatten().flatten().any(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            name.starts_with("setting_") && name.ends_with(".json")
        })
    };
    let places = [folder.to_owned(), folder.join("adapter"), folder.join("base")];
    places.into_iter().find(|f| has(f))
}

impl Evaluated {
    /// Reads a side's folder.
    ///
    /// # Errors
    /// If a file of it cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
        let mut tasks = BTreeMap::new();
        for entry in fs::read_dir(folder).map_err(|e| io(folder, e))? {
            let file = entry.map_err(|e| io(folder, e))?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let task = name.strip_prefix("setting_").and_then(|n| n.strip_suffix(".json"));
            let Some(task) = task else { continue };
            let bad = |line, e: serde_json::Error| Error::Data {
                file: file.clone(),
                line,
                message: format!("not written by `smore eval`: {e}"),
            };
            let text = fs::read_to_string(&file).map_err(|e| io(&file, e))?;
            let setting = serde_json::from_str(&text).map_err(|e| bad(None, e))?;
            let lines = folder.join(format!("samples_{task}.jsonl"));
            let text = fs::read_to_string(&lines)
                .map_err(|e| Error::reading(&lines, "the samples of an evaluation", e))?;
            let samples: Result<Vec<Sample>> = text
                .lines()
                .enumerate()
                .map(|(i, l)| serde_json::from_str(l).map_err(|e| bad(Some(i + 1), e)))
                .collect();
            tasks.insert(task.to_owned(), (setting, samples?));
        }
        Ok(Self { tasks })
    }

    /// Differences to another side, task by task, on the samples of both.
    ///
    /// # Errors
    /// If a task was scored on another set or by another protocol.
    pub fn differences(&self, other: &Self, seed: u64) -> Result<Vec<Difference>> {
        let mut all = Vec::new();
        for (task, (setting, samples)) in &self.tasks {
            let Some((theirs, others)) = other.tasks.get(task) else { continue };
            if setting.protocol != theirs.protocol {
                return Err(Error::Run(format!(
                    "{task} was scored by {} on one side and by {} on the other; the two are never \
                     compared",
                    setting.protocol, theirs.protocol
                )));
            }
            if setting.data != theirs.data || setting.description != theirs.description {
                return Err(Error::Run(format!(
                    "{task} was scored on different files; evaluate both on the same"
                )));
            }
            let n = samples.len().min(others.len());
            for metric in metrics(samples) {
                let right = |s: &[Sample]| -> Vec<bool> {
                    s[..n].iter().map(|s| s.metrics.get(metric).is_some_and(|&x| x > 0.5)).collect()
                };
                let paired = Paired::of(&right(samples), &right(others), seed);
                let (task, metric) = (task.clone(), metric.to_owned());
                all.push(Difference { task, protocol: setting.protocol, metric, paired });
            }
        }
        Ok(all)
    }
}

/// Metrics of answers that are right or wrong.
pub fn metrics(samples: &[Sample]) -> impl Iterator<Item = &str> {
    let names = samples.first().into_iter().flat_map(|s| s.metrics.keys());
    names.map(String::as_str).filter(|n| !n.starts_with("unread"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::manifest::BaseFiles;
    use crate::eval::Protocol;
    use serde_json::json;

    fn side(right: &[bool], protocol: Protocol) -> Evaluated {
        let setting = Setting {
            task: "t".into(),
            protocol,
            data: "d".into(),
            model: BaseFiles::default(),
            adapter: BTreeMap::new(),
            description: None,
        };
        let sample = |(i, &is): (usize, &bool)| Sample {
            doc_id: i,
            target: String::new(),
            gold: json!(0),
            arguments: json!([]),
            resps: json!([]),
            filtered_resps: json!([]),
            metrics: [("acc,none".to_owned(), f64::from(u8::from(is)))].into(),
        };
        let samples = right.iter().enumerate().map(sample).collect();
        Evaluated { tasks: [("t".to_owned(), (setting, samples))].into() }
    }

    #[test]
    fn sides_are_paired_on_what_both_have_and_never_across_protocols() {
        let first = side(&[true, true, false, true], Protocol::Loglikelihood);
        let second = side(&[true, false, true], Protocol::Loglikelihood);
        let found = first.differences(&second, 0).unwrap();
        assert_eq!(found.len(), 1);
        let p = found[0].paired;
        assert_eq!((p.samples, p.only_first, p.only_second, p.difference), (3, 1, 1, 0.0));
        let written = side(&[true], Protocol::Generation);
        let error = first.differences(&written, 0).unwrap_err().to_string();
        assert!(error.contains("never"), "{error}");
    }
}
