//! Recorded numbers.

use super::scalar;
use crate::error::{Error, Result};
use crate::verify::case::{Tensors, data_error, read};
use serde_json::Value;
use std::path::Path;

/// A recorded number's meaning.
#[derive(Clone, Copy)]
pub(super) enum Figure {
    /// Cross-entropy per label and balance loss.
    Loss,
    /// Cross-entropy over this many instead of the labels, and balance loss.
    LossOver(f64),
    CrossEntropy,
    Balance,
    GradNorm,
}

/// Meaning of a figure's name, and whether it is of training.
pub(super) fn figure(name: &str) -> Option<(Figure, bool)> {
    let (rest, train) = match name.split_once('.') {
        Some(("train", rest)) => (rest, true),
        Some(("eval", rest)) => (rest, false),
        _ if name == "eval_loss" => ("loss", false),
        _ => (name, true),
    };
    let figure = match rest {
        "loss" => Figure::Loss,
        "ce" => Figure::CrossEntropy,
        "balance_loss" => Figure::Balance,
        "grad_norm" if train => Figure::GradNorm,
        _ => Figure::LossOver(rest.strip_prefix("loss_num_items_in_batch_")?.parse().ok()?),
    };
    Some((figure, train))
}

/// A file's JSON.
pub(super) fn json(file: &Path) -> Result<Value> {
    let bytes = read(file, "recorded figures")?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Data {
        file: file.to_path_buf(),
        line: Some(e.line()),
        message: format!("not valid JSON: {e}"),
    })
}

/// Adds the numbers of `fixture.json` as tensors: `loss`, `eval.loss` and so on. Keys outside of
/// `eval` and `train` that are no figures are about the recording itself.
pub(super) fn add_figures(file: &Path, json: &Value, tensors: &mut Tensors) -> Result<()> {
    let Some(keys) = json.as_object() else {
        return Err(data_error(file, "expected an object of figures".into()));
    };
    let inner = ["eval", "train"].into_iter().flat_map(|part| {
        let figures = json[part].as_object().into_iter().flatten();
        figures.map(move |(key, value)| (format!("{part}.{key}"), value))
    });
    let outer = keys.iter().filter(|(k, _)| figure(k).is_some() || *k == "n_trainable");
    for (name, value) in outer.map(|(k, v)| (k.clone(), v)).chain(inner) {
        match value {
            Value::Null => {}
            Value::Number(x) => {
                tensors.insert(name, scalar(x.as_f64().unwrap_or(f64::NAN)));
            }
            _ => return Err(data_error(file, format!("`{name}` is {value}; expected a number"))),
        }
    }
    Ok(())
}
