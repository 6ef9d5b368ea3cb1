//! Parquet, row by row. A row's number stands for its line.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::SerializedFileReader;
use serde_json::Value;

use crate::data::{Origin, file_error};
use crate::error::Result;

pub(super) fn records(
    path: Arc<Path>,
    file: File,
) -> Result<impl Iterator<Item = Result<(Origin, Value)>>> {
    let reader = SerializedFileReader::new(file).map_err(|e| {
        file_error(&path, format!("not a whole Parquet file: {e}; write or copy the file again"))
    })?;
    let mut rows = reader.into_iter().enumerate();
    let mut failed = false;
    Ok(std::iter::from_fn(move || {
        let (i, row) = if failed { None } else { rows.next() }?;
        let origin = Origin { file: path.clone(), line: i + 1 };
        failed = row.is_err();
        Some(match row {
            Ok(row) => Ok((origin, row.to_json_value())),
            Err(e) => Err(origin
                .error(format!("row {} cannot be read: {e}; write or copy the file again", i + 1))),
        })
    }))
}
