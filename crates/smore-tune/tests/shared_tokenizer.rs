//! Public tokenizers against recorded ids. The material lies outside the repository, in the
//! folder that `SMORE_SHARED` names or beside the checkout; without it there is nothing to check.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use smore_tune::config::DataConfig;
use smore_tune::data;
use smore_tune::template::Template;
use smore_tune::tokenizer::Tokenizer;

fn shared() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let folder = std::env::var_os("SMORE_SHARED").map_or_else(beside, PathBuf::from);
    let folder = folder.join("data");
    folder.is_dir().then_some(folder)
}

fn vectors(folder: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("vectors").join(name)).unwrap();
    let vectors: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(!vectors.is_empty());
    vectors
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn check(tokenizer: &Tokenizer, text: &str, expected: &[u32]) {
    assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
    let mut stream = tokenizer.stream();
    let mut streamed = String::new();
    for &id in expected {
        streamed.extend(stream.push(id).unwrap());
    }
    streamed.extend(stream.finish().unwrap());
    assert_eq!(streamed, tokenizer.decode(expected, true).unwrap(), "{text:?}");
    let covered = tokenizer.encode_with_offsets(text).unwrap().iter().map(|(_, r)| r.end).max();
    assert_eq!(covered.unwrap_or(0), text.len(), "{text:?}");
}

#[test]
fn stories260k_equals_sentencepiece() {
    let Some(folder) = shared() else { return };
    let tokenizer = Tokenizer::open(&folder.join("models/stories260K")).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!((tokenizer.stop_ids(), tokenizer.vocab_size()), ([2].as_slice(), 512));
    for vector in vectors(&folder, "stories260K.json") {
        let text = vector["text"].as_str().unwrap();
        check(&tokenizer, text, &ids(&vector["ids"]));
        let with_bos = tokenizer.encode_with_special(text).unwrap();
        assert_eq!(with_bos, ids(&vector["ids_with_bos"]), "{text:?}");
    }
}

#[test]
fn llama3_and_qwen_equal_the_recorded_ids() {
    let Some(folder) = shared() else { return };
    for (name, specials) in [("llama3", Some(128_000)), ("qwen2.5", None)] {
        let tokenizer = Tokenizer::open(&folder.join("tokenizers").join(name)).unwrap();
        for vector in vectors(&folder, "vectors.json") {
            check(&tokenizer, vector["text"].as_str().unwrap(), &ids(&vector[name]));
        }
        let start = tokenizer.encode_with_special("x").unwrap();
        assert_eq!(start.len(), 1 + usize::from(specials.is_some()), "{name}");
        assert_eq!(specials, (start.len() > 1).then(|| start[0]), "{name}");
    }
}

#[test]
fn public_datasets_load() {
    let Some(folder) = shared() else { return };
    let tokenizer = Tokenizer::open(&folder.join("models/stories260K")).unwrap();
    let template = Template::plain(&tokenizer);
    let files = [
        "datasets/llamafactory/alpaca_en_demo.json",
        "datasets/llamafactory/v1_sft_demo.jsonl",
        "datasets/llamafactory/c4_demo.jsonl",
        "datasets/llamafactory/wiki_demo.txt",
        "datasets/llm-adapters/ARC-Easy/test.json",
        "datasets/codealpaca/code_alpaca_2k.json",
        "corpus/tinystories_sample.jsonl",
        "corpus/tinyshakespeare.txt",
    ];
    for file in files {
        let path = folder.join(file);
        let config: DataConfig = serde_json::from_value(serde_json::json!({
            "train": [{"path": path}], "cutoff_len": 4096,
        }))
        .unwrap();
        let data = data::load(&config, 42, &tokenizer, &template).unwrap_or_else(|e| panic!("{e}"));
        let held_out = data.validation.len() as f64 / data.report.kept as f64;
        assert!((0.05..0.15).contains(&held_out), "{file}: {held_out}");
        for sample in data.train.iter().chain(&data.validation) {
            assert!(sample.len() <= 4096 && sample.n_trained() > 0, "{file}");
            assert!(!sample.trained()[0], "{file}");
        }
    }
}

#[test]
fn serving_reads_what_training_reads() {
    let Some(folder) = shared() else { return };
    let tokenizer = Tokenizer::open(&folder.join("models/stories260K")).unwrap();
    let template = Template::plain(&tokenizer);
    let path = folder.join("datasets/llm-adapters/ARC-Easy/test.json");
    let documents = data::read_documents(&path, None).unwrap();
    assert!(documents.len() > 1000);
    for document in documents {
        let sample = data::tokenize(&document, &tokenizer, &template, 4096).unwrap().remove(0);
        let data::Content::Chat(messages) = &document.content else { panic!("not a conversation") };
        let prompt = template.encode_prompt(&tokenizer, &messages[..messages.len() - 1]).unwrap();
        assert_eq!(prompt, sample.ids()[..sample.prompt_len], "line {}", document.origin.line);
        let answer = tokenizer.decode(&sample.ids()[sample.prompt_len..], true).unwrap();
        assert_eq!(answer.trim(), messages[messages.len() - 1].content.trim());
        assert_eq!(sample.ids().last().copied(), tokenizer.eos_id());
    }
}
