//! Data files, split into records.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::record::{Content, Document, detect, parse};
use super::{Origin, file_error};
use crate::config::Format;
use crate::error::{Error, Result};

/// How a file is divided into records.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// One array of records.
    Json,
    /// One record per line.
    JsonLines,
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

fn layout(path: &Path) -> Result<Layout> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension.as_str() {
        "json" => Ok(Layout::Json),
        "jsonl" | "ndjson" => Ok(Layout::JsonLines),
        "txt" => Ok(Layout::Text),
        _ => Err(file_error(
            path,
            format!("file ending is `{extension}`; expected .json, .jsonl or .txt"),
        )),
    }
}

/// Reads every record of a file. Where `format` is absent, the first record decides.
pub fn read_documents(path: &Path, format: Option<Format>) -> Result<Vec<Document>> {
    check_kind(path, format)?;
    let layout = layout(path)?;
    let text = fs::read_to_string(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => file_error(path, "not UTF-8 text; convert it to UTF-8"),
        _ => Error::reading(path, "a data file", e),
    })?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text);
    let documents = match layout {
        Layout::Text => return Ok(vec![whole_file(path, text)?]),
        Layout::Json => parse_all(array_elements(path, text), format)?,
        Layout::JsonLines => parse_all(lines(path, text), format)?,
    };
    if documents.is_empty() {
        return Err(file_error(path, "no records; expected at least one"));
    }
    Ok(documents)
}

fn whole_file(path: &Path, text: &str) -> Result<Document> {
    if text.trim().is_empty() {
        return Err(file_error(path, "the file is empty; expected text"));
    }
    let origin = Origin { file: path.to_owned(), line: 1 };
    Ok(Document { content: Content::Text(text.to_owned()), origin })
}

fn parse_all(
    records: impl Iterator<Item = Result<(Origin, Value)>>,
    mut format: Option<Format>,
) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for record in records {
        let (origin, value) = record?;
        let format = match format {
            Some(format) => format,
            None => *format.insert(detect(&value, &origin)?),
        };
        let content = parse(&value, format, &origin)?;
        documents.push(Document { content, origin });
    }
    Ok(documents)
}

/// The records of a JSONL file; blank lines are skipped.
fn lines<'a>(path: &'a Path, text: &'a str) -> impl Iterator<Item = Result<(Origin, Value)>> + 'a {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(move |(i, line)| {
        let origin = Origin { file: path.to_owned(), line: i + 1 };
        match serde_json::from_str(line) {
            Ok(value) => Ok((origin, value)),
            Err(e) => Err(origin.error(format!(
                "not valid JSON at column {}: {}; a .jsonl file holds one record per line",
                e.column(),
                without_place(&e)
            ))),
        }
    })
}

/// The elements of a JSON array, one after the other, each with the line on which it starts.
fn array_elements<'a>(
    path: &'a Path,
    text: &'a str,
) -> impl Iterator<Item = Result<(Origin, Value)>> + 'a {
    let mut cursor = Cursor { path, text, at: 0, line: 1, state: State::Start };
    std::iter::from_fn(move || {
        let item = cursor.next_element().transpose();
        if matches!(item, Some(Err(_))) {
            cursor.state = State::Done;
        }
        item
    })
}

/// A place in the text of a JSON array.
struct Cursor<'a> {
    path: &'a Path,
    text: &'a str,
    at: usize,
    line: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    AfterElement,
    Done,
}

impl Cursor<'_> {
    fn next_element(&mut self) -> Result<Option<(Origin, Value)>> {
        match (self.state, self.peek()) {
            (State::Done, _) => return Ok(None),
            (State::Start, Some('[')) => {
                self.advance(1);
                if self.peek() == Some(']') {
                    return self.end();
                }
            }
            (State::Start, _) => {
                return Err(self.error(
                    "expected a JSON array of records; for one record per line name the file .jsonl",
                ));
            }
            (State::AfterElement, Some(',')) => self.advance(1),
            (State::AfterElement, Some(']')) => return self.end(),
            (State::AfterElement, _) => {
                return Err(self.error("expected `,` or `]` after a record"));
            }
        }
        self.peek();
        self.element().map(Some)
    }

    /// Parses the element that starts here.
    fn element(&mut self) -> Result<(Origin, Value)> {
        let origin = Origin { file: self.path.to_owned(), line: self.line };
        let rest = &self.text[self.at..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => {
                let len = values.byte_offset();
                self.advance(len);
                self.state = State::AfterElement;
                Ok((origin, value))
            }
            Some(Err(e)) => {
                self.line += e.line().saturating_sub(1);
                Err(self.error(&format!("not valid JSON: {}", without_place(&e))))
            }
            None => Err(self.error("the array is not closed; the file seems cut off")),
        }
    }

    /// After the closing bracket nothing may follow.
    fn end(&mut self) -> Result<Option<(Origin, Value)>> {
        self.state = State::Done;
        self.advance(1);
        match self.peek() {
            None => Ok(None),
            Some(_) => Err(self.error("text after the end of the array; expected nothing")),
        }
    }

    /// Skips space and looks at the next character.
    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.advance(rest.len() - rest.trim_start().len());
        self.text[self.at..].chars().next()
    }

    fn advance(&mut self, n: usize) {
        let passed = &self.text[self.at..self.at + n];
        self.line += passed.matches('\n').count();
        self.at += n;
    }

    fn error(&self, message: &str) -> Error {
        Origin { file: self.path.to_owned(), line: self.line }.error(message)
    }
}

/// A JSON error without serde's own place, which counts from the start of the record.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}
