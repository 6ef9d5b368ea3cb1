//! The audit log: one line of JSON for every generation, chained by hashes, from which an output
//! can be derived again.
//!
//! A line is a [`Record`] whose last field, `hash`, is the SHA-256 of everything before it: of the
//! bytes from the line's first up to the comma in front of `"hash"`. The field `previous` holds
//! the `hash` of the line before, the first line's [`GENESIS`]. So a changed byte breaks the line
//! it is in, and a removed, inserted or reordered line breaks the chain. What no chain can show by
//! itself is a missing end, or an end written anew by someone who can write the file: for those
//! note the head (the last `hash`, see [`Head`]) elsewhere and ask for it with [`Chain::holds`].
//!
//! Texts are held as SHA-256 unless asked for. A record without text can be derived again by
//! whoever has the prompt.

mod digest;
mod log;
mod reproduce;

pub use digest::RoutingDigest;
pub use log::{Chain, Fault, Head, Log, read};
pub use reproduce::{Difference, Rerun, difference};

use crate::checkpoint::manifest::{BaseFiles, hex, sha256};
use crate::error::Result;
use crate::generate::{FinishReason, Generated, Sampling};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// What the first record has in front of it.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// How a prompt's text became tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptLayout {
    /// Through the template, as one message of the user.
    Chat,
    /// As it is, with the tokenizer's special tokens.
    Raw,
}

/// What was generated with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// SHA-256 of the base's files.
    pub base: BaseFiles,
    /// SHA-256 of the adapter's settings and tensors, by file name; empty without an adapter.
    pub adapter: BTreeMap<String, String>,
}

impl Made {
    /// Hashes the files of a model folder and of an adapter's.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn of(model: &Path, adapter: Option<&Path>) -> Result<Self> {
        let mut files = BTreeMap::new();
        let names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];
        for (folder, name) in adapter.iter().flat_map(|a| names.map(|name| (a, name))) {
            let file = folder.join(name);
            if file.is_file() {
                files.insert(name.to_owned(), sha256(&file)?);
            }
        }
        Ok(Self { base: BaseFiles::of(model)?, adapter: files })
    }

    /// The first file in which two differ, as words.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if let Some(file) = self.base.difference(&other.base) {
            return Some(format!("another base ({file} differs)"));
        }
        let names = self.adapter.keys().chain(other.adapter.keys());
        let changed = names.into_iter().find(|&n| self.adapter.get(n) != other.adapter.get(n));
        changed.map(|file| match (self.adapter.is_empty(), other.adapter.is_empty()) {
            (true, _) => "no adapter".to_owned(),
            (_, true) => "an adapter, and none is given".to_owned(),
            _ => format!("another adapter ({file} differs)"),
        })
    }
}

/// One generation. The order of the fields is that of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Counts records from 1.
    pub number: u64,
    /// `hash` of the record before, or [`GENESIS`].
    pub previous: String,
    /// When, as RFC 3339 in UTC.
    pub time: String,
    /// Version of this program.
    pub version: String,
    /// Base and adapter.
    #[serde(flatten)]
    pub made: Made,
    /// How the prompt became tokens.
    pub layout: PromptLayout,
    /// Limit of new tokens.
    pub max_new_tokens: usize,
    /// How tokens were picked, and the seed.
    pub sampling: Sampling,
    /// SHA-256 of the prompt's text.
    pub prompt_sha256: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// SHA-256 of their ids, 4 bytes each, little-endian.
    pub prompt_ids_sha256: String,
    /// SHA-256 of the generated text.
    pub output_sha256: String,
    /// New tokens.
    pub output_tokens: usize,
    /// SHA-256 of their ids, 4 bytes each, little-endian.
    pub output_ids_sha256: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One digest for every token the model read; see [`RoutingDigest`].
    pub routing: Vec<String>,
    /// SHA-256 of all gate weights' bits.
    pub gate_weights_sha256: String,
    /// The prompt, where text was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The generated text, where text was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// What a generation was asked for.
#[derive(Clone, Debug)]
pub struct Asked<'a> {
    /// The prompt's text.
    pub prompt: &'a str,
    /// Its tokens.
    pub ids: &'a [u32],
    /// How it became tokens.
    pub layout: PromptLayout,
    /// Limit of new tokens.
    pub max_new_tokens: usize,
    /// How tokens are picked.
    pub sampling: Sampling,
}

impl Record {
    /// A record that has no place in a chain yet; `text` keeps prompt and output.
    pub fn new(
        time: String,
        made: Made,
        asked: &Asked,
        generated: &Generated,
        routing: RoutingDigest,
        text: bool,
    ) -> Self {
        let (routing, gate_weights_sha256) = routing.finish();
        Self {
            number: 0,
            previous: String::new(),
            time,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            made,
            layout: asked.layout,
            max_new_tokens: asked.max_new_tokens,
            sampling: asked.sampling,
            prompt_sha256: text_hash(asked.prompt),
            prompt_tokens: asked.ids.len(),
            prompt_ids_sha256: ids_hash(asked.ids),
            output_sha256: text_hash(&generated.text),
            output_tokens: generated.ids.len(),
            output_ids_sha256: ids_hash(&generated.ids),
            finish_reason: generated.finish_reason,
            routing,
            gate_weights_sha256,
            prompt: text.then(|| asked.prompt.to_owned()),
            output: text.then(|| generated.text.clone()),
        }
    }
}

/// SHA-256 of a text, as records hold it.
pub fn text_hash(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn ids_hash(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    hex(&Sha256::digest(&bytes))
}

#[cfg(test)]
mod tests;
