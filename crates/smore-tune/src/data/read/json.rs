//! JSON: one array, or one record per line.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::{MAX_RECORD, NOT_UTF8, read_until, too_long};
use crate::data::Origin;
use crate::error::{Error, Result};

/// The records of a JSONL file; blank lines are skipped.
pub(super) struct Lines<R> {
    path: Arc<Path>,
    input: R,
    line: usize,
    bytes: Vec<u8>,
    done: bool,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(path: Arc<Path>, input: R) -> Self {
        Self { path, input, line: 0, bytes: Vec::new(), done: false }
    }

    fn record(&mut self) -> Result<Option<(Origin, Value)>> {
        loop {
            self.line += 1;
            let origin = Origin { file: self.path.clone(), line: self.line };
            let n = read_until(&mut self.input, b'\n', &mut self.bytes, &origin);
            self.done = !matches!(n, Ok(n) if n > 0);
            if n? == 0 {
                return Ok(None);
            }
            let line = std::str::from_utf8(&self.bytes).map_err(|_| origin.error(NOT_UTF8))?;
            let line = line.trim_end_matches(['\n', '\r']);
            if line.trim().is_empty() {
                continue;
            }
            return match serde_json::from_str(line) {
                Ok(value) => Ok(Some((origin, value))),
                Err(e) => Err(origin.error(format!(
                    "not valid JSON at column {}: {}; a .jsonl file holds one record per line",
                    e.column(),
                    without_place(&e)
                ))),
            };
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<(Origin, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done { None } else { self.record().transpose() }
    }
}

/// The elements of a JSON array, one after the other, each with the line on which it starts.
pub(super) struct Elements<R> {
    path: Arc<Path>,
    input: R,
    line: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    AfterElement,
    Done,
}

impl<R: BufRead> Elements<R> {
    pub(super) fn new(path: Arc<Path>, input: R) -> Self {
        Self { path, input, line: 1, state: State::Start }
    }

    fn next_element(&mut self) -> Result<Option<(Origin, Value)>> {
        match (self.state, self.peek()?) {
            (State::Start, Some(b'[')) => {
                self.advance(b'[');
                if self.peek()? == Some(b']') {
                    return self.end();
                }
            }
            (State::Start, _) => {
                return Err(self.error(
                    "expected a JSON array of records; for one record per line name the file .jsonl",
                ));
            }
            (State::AfterElement, Some(b',')) => self.advance(b','),
            (State::AfterElement, Some(b']')) => return self.end(),
            _ => return Err(self.error("expected `,` or `]` after a record")),
        }
        if self.peek()?.is_none() {
            return Err(self.error("the array is not closed; the file seems cut off"));
        }
        self.element().map(Some)
    }

    /// Parses the element that starts here.
    fn element(&mut self) -> Result<(Origin, Value)> {
        let origin = Origin { file: self.path.clone(), line: self.line };
        let bytes = self.element_bytes(&origin)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| origin.error(NOT_UTF8))?;
        if text.is_empty() {
            return Err(origin.error("not valid JSON: expected value"));
        }
        let value = serde_json::from_str(text).map_err(|e| {
            let line = origin.line + e.line().saturating_sub(1);
            let place = Origin { file: self.path.clone(), line };
            place.error(format!("not valid JSON: {}", without_place(&e)))
        })?;
        self.state = State::AfterElement;
        Ok((origin, value))
    }

    /// The bytes up to where brackets and quotes are closed; whether they are JSON is not asked.
    fn element_bytes(&mut self, origin: &Origin) -> Result<Vec<u8>> {
        let (mut bytes, mut depth, mut in_string, mut escaped) = (Vec::new(), 0usize, false, false);
        while let Some(byte) = self.look()? {
            let mut last = false;
            if in_string {
                in_string = byte != b'"' || escaped;
                escaped = byte == b'\\' && !escaped;
            } else {
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' | b',' if depth == 0 => break,
                    b'}' | b']' => {
                        depth -= 1;
                        last = depth == 0;
                    }
                    _ if depth == 0 && byte.is_ascii_whitespace() => break,
                    _ => {}
                }
            }
            bytes.push(byte);
            self.advance(byte);
            if last {
                break;
            }
            if bytes.len() > MAX_RECORD {
                return Err(too_long(origin));
            }
        }
        Ok(bytes)
    }

    /// After the closing bracket nothing may follow.
    fn end(&mut self) -> Result<Option<(Origin, Value)>> {
        self.advance(b']');
        match self.peek()? {
            None => {
                self.state = State::Done;
                Ok(None)
            }
            Some(_) => Err(self.error("text after the end of the array; expected nothing")),
        }
    }

    /// Skips space and looks at the next byte.
    fn peek(&mut self) -> Result<Option<u8>> {
        while let Some(byte) = self.look()?.filter(u8::is_ascii_whitespace) {
            self.advance(byte);
        }
        self.look()
    }

    fn look(&mut self) -> Result<Option<u8>> {
        let bytes = self.input.fill_buf();
        Ok(bytes.map_err(|e| Error::reading(&self.path, "a data file", e))?.first().copied())
    }

    fn advance(&mut self, byte: u8) {
        self.input.consume(1);
        self.line += usize::from(byte == b'\n');
    }

    fn error(&self, message: &str) -> Error {
        Origin { file: self.path.clone(), line: self.line }.error(message)
    }
}

impl<R: BufRead> Iterator for Elements<R> {
    type Item = Result<(Origin, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Done {
            return None;
        }
        let item = self.next_element().transpose();
        if matches!(item, Some(Err(_))) {
            self.state = State::Done;
        }
        item
    }
}

/// A JSON error without serde's own place, which counts from the start of the record.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}
