//! Text on which two models are compared before one takes the other's place.

use crate::error::{Error, Result};
use crate::model::Batch;
use crate::tokenizer::Tokenizer;
use std::path::Path;

/// Prose, figures, a question and a little code, for when the user gives no text.
const PASSAGE: &str = include_str!("sample_text.txt");

/// Most tokens of a text that are looked at.
const MAX_TOKENS: usize = 512;

/// The tokens of the file `text`, or of a passage of our own, as one sequence of at most `context`
/// tokens, every one a target.
///
/// # Errors
/// A file that cannot be read, is not text or has fewer than two tokens.
pub fn batch(tokenizer: &Tokenizer, context: usize, text: Option<&Path>) -> Result<Batch> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => bad(path, "is not UTF-8 text"),
            _ => Error::reading(path, "a text to compare the models on", e),
        })
    };
    let content = text.map_or(Ok(PASSAGE.to_owned()), read)?;
    let mut ids = tokenizer.encode_with_special(&content)?;
    ids.truncate(context.min(MAX_TOKENS));
    if ids.len() < 2 {
        let name = text.unwrap_or(Path::new("the built-in passage"));
        return Err(bad(name, "has fewer than two tokens; give a text of a few sentences"));
    }
    let mut batch = Batch::default();
    batch.push(&ids, &vec![true; ids.len()]);
    Ok(batch)
}

fn bad(file: &Path, message: &str) -> Error {
    Error::Data { file: file.to_owned(), line: None, message: message.into() }
}
