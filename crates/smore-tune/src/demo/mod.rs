//! The content of `smore demo`: the text that its base is pre-trained on, the skills that adapters
//! then learn, and the folder that pre-training starts from.
//!
//! Everything is generated from seeds; nothing is downloaded. [`corpus`] and [`skills`] share one
//! small world of machines, fault codes, crews and dates, but not their wording: the base has read
//! all that a skill needs and still fails at it until an adapter shows it what is asked.

pub mod compare;
pub mod corpus;
mod facts;
pub mod skills;
pub mod tokenizer;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Vocabulary of the demo's base.
pub const VOCAB_SIZE: usize = 512;

/// Tokens that one pre-training text has at most. With the two special tokens around it, a text
/// fits the context of [`base_config`].
const TOKENS_PER_TEXT: usize = 240;

/// Documents that the tokenizer is trained on at most; more of them would hardly move the counts.
const TOKENIZER_DOCUMENTS: usize = 20_000;

/// What keeps the demo's base folder from being written.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A file or folder could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The tokenizer could not be trained, used or saved.
    #[error("demo tokenizer: {0}")]
    Tokenizer(#[from] tokenizers::Error),
}

/// `config.json` of the demo's base: a Llama of four blocks and, with the vocabulary of
/// [`VOCAB_SIZE`], 803,968 parameters.
pub fn base_config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    })
}

/// `tokenizer_config.json` of the demo's base.
pub fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": tokenizer::BOS,
        "eos_token": tokenizer::EOS,
        "unk_token": tokenizer::UNK,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// `generation_config.json` of the demo's base.
pub fn generation_config() -> Value {
    json!({"bos_token_id": 0, "eos_token_id": 1, "do_sample": false})
}

/// Writes what pre-training of the demo's base starts from into `dir`: `config.json`,
/// `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `corpus.jsonl`. The
/// same arguments give the same bytes. Weights are not written: they are what training makes.
///
/// Returns the number of texts in `corpus.jsonl`. Each holds several documents, a blank line
/// between two, so that the context is used.
pub fn write_base_folder(dir: &Path, seed: u64, n_documents: usize) -> Result<usize, DemoError> {
    let documents = corpus::corpus(seed, n_documents);
    let sample = &documents[..documents.len().min(TOKENIZER_DOCUMENTS)];
    let tokenizer = tokenizer::train_tokenizer(sample, VOCAB_SIZE)?;
    let texts = join_documents(&documents, &tokenizer)?;
    let lines: String = texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect();
    let config = base_config(tokenizer.get_vocab_size(true));

    fs::create_dir_all(dir).map_err(|source| write_error(dir, source))?;
    write(dir, "config.json", &format!("{config:#}\n"))?;
    write(dir, "tokenizer.json", &tokenizer.to_string(true)?)?;
    write(dir, "tokenizer_config.json", &format!("{:#}\n", tokenizer_config()))?;
    write(dir, "generation_config.json", &format!("{:#}\n", generation_config()))?;
    write(dir, "corpus.jsonl", &lines)?;
    Ok(texts.len())
}

/// Fills texts of at most [`TOKENS_PER_TEXT`] tokens with documents in turn.
fn join_documents(documents: &[String], tokenizer: &Tokenizer) -> Result<Vec<String>, DemoError> {
    const SEPARATOR: &str = "\n\n";
    let mut texts = Vec::new();
    let mut text = String::new();
    let mut used = 0;
    for document in documents {
        // The separator counts with each document; its two newlines are two tokens at most.
        let tokens = tokenizer.encode(document.as_str(), false)?.len() + 2;
        if used + tokens > TOKENS_PER_TEXT && !text.is_empty() {
            texts.push(std::mem::take(&mut text));
            used = 0;
        }
        if !text.is_empty() {
            text.push_str(SEPARATOR);
        }
        text.push_str(document);
        used += tokens;
    }
    if !text.is_empty() {
        texts.push(text);
    }
    Ok(texts)
}

fn write(dir: &Path, name: &str, content: &str) -> Result<(), DemoError> {
    let path = dir.join(name);
    fs::write(&path, content).map_err(|source| write_error(&path, source))
}

fn write_error(path: &Path, source: std::io::Error) -> DemoError {
    DemoError::Write { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_has_the_stated_size() {
        let config = base_config(VOCAB_SIZE);
        let n = |key: &str| config[key].as_u64().unwrap();
        let (d, head) = (n("hidden_size"), n("head_dim"));
        let attention = 2 * d * head * (n("num_attention_heads") + n("num_key_value_heads"));
        let block = attention + 3 * d * n("intermediate_size") + 2 * d;
        assert_eq!(n("vocab_size") * d + n("num_hidden_layers") * block + d, 803_968);
    }

    #[test]
    fn the_folder_is_complete_and_repeats_byte_for_byte() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let n_texts = write_base_folder(a.path(), 5, 400).unwrap();
        write_base_folder(b.path(), 5, 400).unwrap();
        for name in [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "corpus.jsonl",
        ] {
            let read = |dir: &Path| fs::read(dir.join(name)).unwrap();
            assert_eq!(read(a.path()), read(b.path()), "{name}");
        }
        let tokenizer = Tokenizer::from_file(a.path().join("tokenizer.json")).unwrap();
        let corpus = fs::read_to_string(a.path().join("corpus.jsonl")).unwrap();
        assert_eq!(corpus.lines().count(), n_texts);
        let mut documents = 0;
        let mut longest = 0;
        for line in corpus.lines() {
            let value: Value = serde_json::from_str(line).unwrap();
            let text = value["text"].as_str().unwrap();
            documents += text.split("\n\n").count();
            longest = longest.max(tokenizer.encode(text, false).unwrap().len());
        }
        assert_eq!(documents, 400);
        assert!((150..=TOKENS_PER_TEXT).contains(&longest), "{longest}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write_base_folder(&file.join("base"), 1, 20).unwrap_err();
        assert!(error.to_string().contains("base"), "{error}");
    }
}
