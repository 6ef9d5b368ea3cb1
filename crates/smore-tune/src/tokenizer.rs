//! The model's tokenizer, with its special tokens.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// A tokenizer and what its model folder says about special tokens.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    pad_id: Option<u32>,
    stop_ids: Vec<u32>,
    adds_bos: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of `model_dir`, and the special tokens from `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` and `config.json`, all of which may be
    /// absent.
    pub fn open(model_dir: &Path) -> Result<Self> {
        let file = model_dir.join("tokenizer.json");
        if !file.is_file() {
            return Err(Error::Model {
                message: format!(
                    "no tokenizer.json in {}; expected a Hugging Face model folder with its \
                     tokenizer",
                    model_dir.display()
                ),
                file,
            });
        }
        let bytes = fs::read(&file).map_err(|e| Error::reading(&file, "the tokenizer", e))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::Model { file: file.clone(), message: e.to_string() })?;
        let notes = Notes::read(model_dir)?;
        Self::assemble(inner, file, &notes)
    }

    /// A tokenizer that is already in memory; `bos` and `eos` must be in its vocabulary.
    pub fn from_parts(
        inner: tokenizers::Tokenizer,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self> {
        let mut tokenizer_config = serde_json::Map::new();
        for (key, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                tokenizer_config.insert(key.into(), token.into());
            }
        }
        let notes = Notes { tokenizer_config: tokenizer_config.into(), ..Notes::default() };
        Self::assemble(inner, PathBuf::from("tokenizer"), &notes)
    }

    fn assemble(mut inner: tokenizers::Tokenizer, file: PathBuf, notes: &Notes) -> Result<Self> {
        // Both are for batches in Python; here they would silently change what is trained on.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::Model { file: file.clone(), message: e.to_string() })?;

        let bos = special(&mut inner, &file, notes, "bos")?;
        let eos = special(&mut inner, &file, notes, "eos")?;
        let pad_id = notes.token("pad").and_then(|token| inner.token_to_id(&token));
        let mut stop_ids: BTreeSet<u32> = eos.iter().map(|(_, id)| *id).collect();
        stop_ids.extend(ids(&notes.generation_config["eos_token_id"]));
        stop_ids.extend(ids(&notes.config["eos_token_id"]));

        let mut tokenizer = Self {
            inner,
            file,
            bos,
            eos,
            pad_id,
            stop_ids: stop_ids.into_iter().collect(),
            adds_bos: false,
        };
        let first = tokenizer.encode_with("", true)?.get_ids().first().copied();
        let says_so = notes.tokenizer_config["add_bos_token"].as_bool();
        tokenizer.adds_bos =
            tokenizer.bos.is_some() && says_so.unwrap_or_else(|| first == tokenizer.bos_id());
        Ok(tokenizer)
    }

    /// The ids of `text` alone, no special token added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_with(text, false)?.get_ids().to_vec())
    }

    /// The ids of `text` after a BOS, where this tokenizer puts one in front. A text that starts
    /// with BOS itself does not get a second one; nothing is added at the end.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.bos_to_add(&ids) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The BOS that belongs in front of `ids`, if this tokenizer adds one and it is not yet there.
    pub(crate) fn bos_to_add(&self, ids: &[u32]) -> Option<u32> {
        self.bos_id().filter(|bos| self.adds_bos && ids.first() != Some(bos))
    }

    /// The ids of `text` with the bytes each one covers, no special token added.
    ///
    /// Some tokenizers leave the space in front of a word out of its token's range; it is put
    /// back, so that the ranges have no gaps. The tokens of one character that is spelt in several
    /// all cover the whole character.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.encode_with(text, false)?;
        let mut covered = 0;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(tokens
            .map(|(&id, &(start, end))| {
                let start = start.min(covered);
                covered = covered.max(end);
                (id, start..end)
            })
            .collect())
    }

    /// The text of `ids`; special tokens are left out if `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.error(&e))
    }

    /// Decodes token by token, special tokens left out.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), prefix: 0, read: 0 }
    }

    /// The id that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(_, id)| *id)
    }

    /// The id that ends a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// The id that fills up a batch, if the folder names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad_id
    }

    /// Every id that ends a generation, in ascending order: the tokenizer's EOS and those of
    /// `generation_config.json` and `config.json`.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Number of ids, added tokens included. The model's may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The text of BOS.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_ref().map(|(token, _)| token.as_str())
    }

    /// The text of EOS.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_ref().map(|(token, _)| token.as_str())
    }

    /// The id of the token that is written exactly `token`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The wrapped tokenizer, to be saved beside a model.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Texts of all added tokens, special or not.
    pub(crate) fn added_tokens(&self) -> BTreeSet<String> {
        self.inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect()
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<tokenizers::Encoding> {
        self.inner.encode(text, special).map_err(|e| self.error(&e))
    }

    fn error(&self, error: &tokenizers::Error) -> Error {
        Error::Model { file: self.file.clone(), message: error.to_string() }
    }
}

/// Finds BOS or EOS, and makes it a special token if `tokenizer.json` forgot to: otherwise its
/// text would be cut in pieces.
fn special(
    inner: &mut tokenizers::Tokenizer,
    file: &Path,
    notes: &Notes,
    which: &str,
) -> Result<Option<(String, u32)>> {
    if let Some(token) = notes.token(which) {
        let Some(id) = inner.token_to_id(&token) else {
            return Err(Error::Model {
                file: file.to_owned(),
                message: format!(
                    "{which}_token is `{token}`, which is not in the vocabulary; correct it in \
                     tokenizer_config.json"
                ),
            });
        };
        inner.add_special_tokens(&[AddedToken::from(token.clone(), true)]);
        return Ok(Some((token, id)));
    }
    let key = format!("{which}_token_id");
    let id =
        [&notes.generation_config, &notes.config].into_iter().find_map(|v| ids(&v[&key]).next());
    Ok(id.and_then(|id| {
        let token = inner.id_to_token(id)?;
        inner.add_special_tokens(&[AddedToken::from(token.clone(), true)]);
        Some((token, id))
    }))
}

/// The ids in a value that is an id or a list of ids.
fn ids(value: &Value) -> impl Iterator<Item = u32> {
    let one = value.as_u64();
    let many = value.as_array().into_iter().flatten().filter_map(Value::as_u64);
    one.into_iter().chain(many).filter_map(|id| u32::try_from(id).ok())
}

/// The JSON files around `tokenizer.json`; null where absent.
#[derive(Default)]
struct Notes {
    tokenizer_config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    config: Value,
}

impl Notes {
    fn read(model_dir: &Path) -> Result<Self> {
        Ok(Self {
            tokenizer_config: read_json(&model_dir.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&model_dir.join("special_tokens_map.json"))?,
            generation_config: read_json(&model_dir.join("generation_config.json"))?,
            config: read_json(&model_dir.join("config.json"))?,
        })
    }

    /// The text of `bos`, `eos` or `pad`: a string, or an object with `content`.
    fn token(&self, which: &str) -> Option<String> {
        let key = format!("{which}_token");
        [&self.tokenizer_config, &self.special_tokens_map].into_iter().find_map(|notes| {
            let token = &notes[&key];
            token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
        })
    }
}

/// The JSON at `path`, or null if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::Model {
            file: path.to_owned(),
            message: format!("not valid JSON: {e}"),
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(Error::Io { path: path.to_owned(), source }),
    }
}

/// Text as its tokens arrive. All pieces together, with that of [`DecodeStream::finish`], are the
/// text of [`Tokenizer::decode`] over all ids.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// The window starts here: the last group of tokens that gave text before `read`. A decoder
    /// may drop a space at the start of what it decodes, so new tokens are never decoded alone.
    prefix: usize,
    /// Text of the ids before this place has been given out.
    read: usize,
}

impl DecodeStream<'_> {
    /// Takes the next id; returns the text it completes, if any. Held back are an unfinished
    /// character and, where bytes are tokens of their own, a whole run of them: one bad byte
    /// changes how the decoder shows its neighbours.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        if self.is_byte_or_special(id) {
            return Ok(None);
        }
        self.piece(false)
    }

    /// Ends the stream; returns what was held back, if anything.
    pub fn finish(mut self) -> Result<Option<String>> {
        self.piece(true)
    }

    fn piece(&mut self, last: bool) -> Result<Option<String>> {
        let before = self.tokenizer.decode(&self.ids[self.prefix..self.read], true)?;
        let text = self.tokenizer.decode(&self.ids[self.prefix..], true)?;
        let Some(piece) = text.strip_prefix(before.as_str()) else {
            return Ok(None);
        };
        if piece.is_empty() || (!last && piece.ends_with(char::REPLACEMENT_CHARACTER)) {
            return Ok(None);
        }
        // A group without text of its own cannot keep a space alive: the window still needs the
        // one before it.
        if !self.tokenizer.decode(&self.ids[self.read..], true)?.is_empty() {
            self.prefix = self.read;
        }
        self.read = self.ids.len();
        Ok(Some(piece.to_owned()))
    }

    /// Whether the token is `<0xAB>`, one byte of a character that the vocabulary lacks, or has no
    /// text, so that a run of bytes goes on behind it.
    fn is_byte_or_special(&self, id: u32) -> bool {
        let inner = &self.tokenizer.inner;
        inner.id_to_token(id).is_none_or(|token| {
            let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
                || inner.get_added_vocabulary().is_special_token(&token)
        })
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
pub(crate) mod tests;
