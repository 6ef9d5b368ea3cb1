//! Records of an evaluation set: JSON, JSONL and Parquet.

use crate::error::{Error, Result};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A record and the line (or row) it is on, counted from 1.
pub(super) struct Record {
    pub(super) line: usize,
    pub(super) value: Value,
}

pub(super) fn data_error(file: &Path, line: usize, message: impl Into<String>) -> Error {
    Error::Data { file: file.to_owned(), line: Some(line), message: message.into() }
}

/// All records; where answers lie in a file of their own (`dev-labels.lst` beside `dev.jsonl`),
/// they are put in as `answer`.
pub(super) fn read(file: &Path) -> Result<Vec<Record>> {
    let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let values = match ending.as_str() {
        "parquet" => parquet_rows(file)?,
        "jsonl" | "ndjson" | "json" => json_records(file, &text(file)?)?,
        _ => {
            let message = format!("file ending is `{ending}`; expected .jsonl, .json or .parquet");
            return Err(Error::Data { file: file.to_owned(), line: None, message });
        }
    };
    if values.is_empty() {
        let message = "no records; expected at least one".into();
        return Err(Error::Data { file: file.to_owned(), line: None, message });
    }
    with_labels(file, values)
}

fn text(file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => {
            let message = "not UTF-8 text; convert it to UTF-8".into();
            Error::Data { file: file.to_owned(), line: None, message }
        }
        _ => Error::reading(file, "an evaluation set", e),
    })?;
    Ok(text.strip_prefix('\u{FEFF}').map(String::from).unwrap_or(text))
}

/// An array, or one record a line.
fn json_records(file: &Path, text: &str) -> Result<Vec<Record>> {
    if text.trim_start().starts_with('[') {
        let values: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| data_error(file, e.line(), format!("not valid JSON: {e}")))?;
        let record = |(i, value)| Record { line: i + 1, value };
        return Ok(values.into_iter().enumerate().map(record).collect());
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let value = serde_json::from_str(line)
                .map_err(|e| data_error(file, i + 1, format!("not valid JSON: {e}")))?;
            Ok(Record { line: i + 1, value })
        })
        .collect()
}

fn parquet_rows(file: &Path) -> Result<Vec<Record>> {
    let bad = |e: parquet::errors::ParquetError| Error::Data {
        file: file.to_owned(),
        line: None,
        message: format!("not read as Parquet: {e}"),
    };
    let open = fs::File::open(file).map_err(|e| Error::reading(file, "an evaluation set", e))?;
    let reader = SerializedFileReader::new(open).map_err(bad)?;
    let rows = reader.get_row_iter(None).map_err(bad)?;
    rows.enumerate()
        .map(|(i, row)| Ok(Record { line: i + 1, value: row.map_err(bad)?.to_json_value() }))
        .collect()
}

fn with_labels(file: &Path, mut records: Vec<Record>) -> Result<Vec<Record>> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let labels = file.with_file_name(format!("{stem}-labels.lst"));
    let answered =
        |r: &Record| ["answer", "label", "answerKey"].iter().any(|&k| r.value.get(k).is_some());
    if !labels.is_file() || records.iter().any(answered) {
        return Ok(records);
    }
    let list = text(&labels)?;
    let list: Vec<&str> = list.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    if list.len() != records.len() {
        let message = format!("{} labels for {} records", list.len(), records.len());
        return Err(Error::Data { file: labels, line: None, message });
    }
    for (record, label) in records.iter_mut().zip(list) {
        if let Some(object) = record.value.as_object_mut() {
            object.insert("label".into(), label.into());
        }
    }
    Ok(records)
}
