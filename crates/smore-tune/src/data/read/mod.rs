//! Data files, split into records. A file is read record by record and never held whole.

mod csv;
mod json;
mod parquet;
mod text;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::record::{Document, Fields, detect, parse};
use super::{Origin, file_error};
use crate::config::{Format, SourceConfig};
use crate::error::{Error, Result};

/// Longest record; a file whose record does not end must not fill the memory.
const MAX_RECORD: usize = 256 << 20;

const NOT_UTF8: &str = "not UTF-8 text; convert it to UTF-8";

/// What every file ending stands for.
pub(super) const ENDINGS: &str = ".json, .jsonl, .csv, .parquet or .txt";

/// How a file is divided into records.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One array of records.
    Json,
    /// One record per line.
    JsonLines,
    /// A header, and one record per row.
    Csv,
    /// Columns with a schema.
    Parquet,
    /// The whole file is one text.
    Text,
}

/// Checks that a file's ending is known and agrees with the format, without opening it.
pub(super) fn check_kind(path: &Path, format: Option<Format>) -> Result<()> {
    match (layout(path)?, format) {
        (Layout::Text, Some(format)) if format != Format::Text => Err(file_error(
            path,
            format!(
                "format is {format}, but a .txt file can only be text; expected .json or .jsonl"
            ),
        )),
        _ => Ok(()),
    }
}

pub(super) fn layout(path: &Path) -> Result<Layout> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension.as_str() {
        "json" => Ok(Layout::Json),
        "jsonl" | "ndjson" => Ok(Layout::JsonLines),
        "csv" => Ok(Layout::Csv),
        "parquet" => Ok(Layout::Parquet),
        "txt" => Ok(Layout::Text),
        _ => Err(file_error(path, format!("file ending is `{extension}`; expected {ENDINGS}"))),
    }
}

type Records = Box<dyn Iterator<Item = Result<(Origin, Value)>>>;

/// The records of a file, one after the other.
pub(super) struct Documents {
    path: Arc<Path>,
    kind: Kind,
    /// Records so far.
    read: usize,
    done: bool,
}

enum Kind {
    Text(text::Pieces),
    Records { records: Records, fields: Fields, format: Option<Format> },
}

/// Opens a file. Where its format is absent, the first record decides.
pub(super) fn documents(source: &SourceConfig) -> Result<Documents> {
    check_kind(&source.path, source.format)?;
    let path: Arc<Path> = source.path.as_path().into();
    let file = File::open(&path).map_err(|e| Error::reading(&path, "a data file", e))?;
    let records: Records = match layout(&path)? {
        Layout::Text => {
            let pieces = text::Pieces::new(path.clone(), open_text(file, &path)?);
            return Ok(Documents { path, kind: Kind::Text(pieces), read: 0, done: false });
        }
        Layout::Json => Box::new(json::Elements::new(path.clone(), open_text(file, &path)?)),
        Layout::JsonLines => Box::new(json::Lines::new(path.clone(), open_text(file, &path)?)),
        Layout::Csv => Box::new(csv::records(path.clone(), open_text(file, &path)?)?),
        Layout::Parquet => Box::new(parquet::records(path.clone(), file)?),
    };
    let fields = Fields::new(source);
    let kind = Kind::Records { records, fields, format: source.format };
    Ok(Documents { path, kind, read: 0, done: false })
}

/// Reads every record of a file.
///
/// # Errors
/// The first record that is wrong, with its place.
pub fn read_documents(path: &Path, format: Option<Format>) -> Result<Vec<Document>> {
    documents(&SourceConfig { path: path.to_owned(), format, ..SourceConfig::default() })?.collect()
}

/// A reader behind the byte order mark, where there is one.
fn open_text(file: File, path: &Path) -> Result<BufReader<File>> {
    let mut input = BufReader::with_capacity(1 << 16, file);
    let start = input.fill_buf().map_err(|e| Error::reading(path, "a data file", e))?;
    if start.starts_with(&[0xEF, 0xBB, 0xBF]) {
        input.consume(3);
    }
    Ok(input)
}

/// Reads up to and including `end`; what is longer than a record may be is an error at `origin`.
fn read_until(
    input: &mut impl BufRead,
    end: u8,
    bytes: &mut Vec<u8>,
    origin: &Origin,
) -> Result<usize> {
    bytes.clear();
    let n = input.take(MAX_RECORD as u64 + 1).read_until(end, bytes);
    let n = n.map_err(|e| Error::reading(&origin.file, "a data file", e))?;
    if n > MAX_RECORD { Err(too_long(origin)) } else { Ok(n) }
}

fn too_long(origin: &Origin) -> Error {
    origin.error(format!(
        "a record of more than {} MiB; correct it, or divide it into several",
        MAX_RECORD >> 20
    ))
}

impl Documents {
    /// The format, where it is known yet.
    pub(super) fn format(&self) -> Option<Format> {
        match &self.kind {
            Kind::Text(_) => Some(Format::Text),
            Kind::Records { format, .. } => *format,
        }
    }

    fn advance(&mut self) -> Option<Result<Document>> {
        match &mut self.kind {
            Kind::Text(pieces) => pieces.next(),
            Kind::Records { records, fields, format } => {
                Some(records.next()?.and_then(|(origin, value)| {
                    let known = match *format {
                        Some(format) => format,
                        None => *format.insert(detect(&value, fields, &origin)?),
                    };
                    parse(&value, known, fields, self.read == 0, &origin)
                }))
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.advance();
        if next.is_none() {
            self.done = true;
            if self.read == 0 {
                return Some(Err(file_error(
                    &self.path,
                    match self.kind {
                        Kind::Text(_) => "the file is empty; expected text",
                        Kind::Records { .. } => "no records; expected at least one",
                    },
                )));
            }
        }
        self.read += 1;
        // Of what no format is known, no further record need be looked at.
        self.done |= self.format().is_none();
        next
    }
}
