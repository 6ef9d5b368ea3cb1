//! Plain text: one document, or for a large file several pieces that end with a line.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use super::{NOT_UTF8, read_until};
use crate::data::record::{Content, Document};
use crate::data::{Origin, file_error};
use crate::error::Result;

/// A longer text is cut behind a line; each piece is tokenized by itself.
const PIECE: usize = 4 << 20;

pub(super) struct Pieces {
    path: Arc<Path>,
    input: BufReader<File>,
    line: usize,
    done: bool,
}

impl Pieces {
    pub(super) fn new(path: Arc<Path>, input: BufReader<File>) -> Self {
        Self { path, input, line: 1, done: false }
    }

    fn piece(&mut self) -> Result<Option<Document>> {
        let origin = Origin { file: self.path.clone(), line: self.line };
        let (mut piece, mut line) = (Vec::new(), Vec::new());
        while piece.len() < PIECE {
            if read_until(&mut self.input, b'\n', &mut line, &origin)? == 0 {
                self.done = true;
                break;
            }
            self.line += 1;
            piece.extend_from_slice(&line);
        }
        let text = String::from_utf8(piece).map_err(|_| file_error(&self.path, NOT_UTF8))?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(Document { content: Content::Text(text), tools: None, origin }))
    }
}

impl Iterator for Pieces {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            let piece = self.piece();
            self.done |= piece.is_err();
            if let Some(piece) = piece.transpose() {
                return Some(piece);
            }
        }
        None
    }
}
