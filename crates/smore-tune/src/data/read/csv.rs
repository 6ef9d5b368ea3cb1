//! CSV with a header: every cell is a string.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use csv::{ErrorKind, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::NOT_UTF8;
use crate::data::{Origin, file_error};
use crate::error::{Error, Result};

pub(super) fn records<R: Read>(
    path: Arc<Path>,
    input: R,
) -> Result<impl Iterator<Item = Result<(Origin, Value)>>> {
    let mut reader = ReaderBuilder::new().from_reader(input);
    let header = reader.headers().map_err(|e| error(&path, &e))?.clone();
    for (i, name) in header.iter().enumerate() {
        if header.iter().take(i).any(|other| other == name) {
            let message = format!("column `{name}` is twice in the header; rename one of them");
            return Err(Origin { file: path, line: 1 }.error(message));
        }
    }
    let mut row = StringRecord::new();
    let mut failed = false;
    Ok(std::iter::from_fn(move || {
        if failed {
            return None;
        }
        match reader.read_record(&mut row) {
            Ok(false) => None,
            Ok(true) => {
                let line = row.position().map_or(0, csv::Position::line) as usize;
                let cells = header.iter().zip(&row);
                let fields: Map<String, Value> =
                    cells.map(|(name, cell)| (name.to_owned(), cell.into())).collect();
                Some(Ok((Origin { file: path.clone(), line }, Value::Object(fields))))
            }
            Err(e) => {
                failed = e.is_io_error();
                Some(Err(error(&path, &e)))
            }
        }
    }))
}

fn error(path: &Path, error: &csv::Error) -> Error {
    let message = match error.kind() {
        ErrorKind::Utf8 { .. } => NOT_UTF8.to_owned(),
        ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
            "the row has {len} cells, the header {expected_len}; put cells that hold commas, quotes \
             or line breaks into double quotes"
        ),
        other => format!("not readable as CSV: {other:?}; expected rows of cells with commas"),
    };
    match error.position() {
        Some(position) => {
            Origin { file: path.into(), line: position.line() as usize }.error(message)
        }
        None => file_error(path, message),
    }
}
