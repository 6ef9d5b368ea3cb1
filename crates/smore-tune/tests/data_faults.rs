//! Data files that are wrong, by name: each gives one clear message that names file, place and
//! field; none panics, and none touches a file.

use serde_json::json;
use smore_tune::config::{DataConfig, SourceConfig};
use smore_tune::data;
use smore_tune::template::Template;
use smore_tune::tokenizer::Tokenizer;
use std::collections::BTreeSet;
use std::path::Path;

/// A name, the file, its bytes, the rest of its source, what the message must contain.
type Fault = (&'static str, &'static str, &'static str, &'static str, &'static [&'static str]);

const FAULTS: &[Fault] = &[
    ("unknown ending", "a.tsv", "x", "{}", &["a.tsv: file ending is `tsv`", ".parquet"]),
    ("empty file", "a.jsonl", "", "{}", &["a.jsonl: no records"]),
    ("empty text", "a.txt", " \n", "{}", &["a.txt: the file is empty"]),
    ("empty array", "a.json", "[]", "{}", &["a.json: no records"]),
    ("empty CSV", "a.csv", "", "{}", &["a.csv: no records"]),
    ("only a header", "a.csv", "prompt,completion\n", "{}", &["a.csv: no records"]),
    ("empty Parquet", "a.parquet", "", "{}", &["a.parquet: not a whole Parquet file"]),
    (
        "cut Parquet",
        "a.parquet",
        "PAR1abcdefgh",
        "{}",
        &["a.parquet: not a whole Parquet", "again"],
    ),
    (
        "lines in .json",
        "a.json",
        "{\"text\": \"a\"}\n",
        "{}",
        &["a.json:1", "name the file .jsonl"],
    ),
    ("array cut off", "a.json", "[{\"text\": \"a\"},\n", "{}", &["a.json:2", "cut off"]),
    ("record cut off", "a.json", "[{\"text\": \"a", "{}", &["a.json:1", "not valid JSON"]),
    ("bad JSON", "a.jsonl", "{\"text\": \"a\"}\n{\"text\"}\n", "{}", &["a.jsonl:2", "column 8"]),
    ("a list for a record", "a.jsonl", "[1]", "{}", &["a.jsonl:1: the record is a list"]),
    ("unknown format", "a.jsonl", "{\"x\": 1}", "{}", &["not recognised: found x", "columns"]),
    (
        "wrong type",
        "a.jsonl",
        r#"{"instruction": 3, "output": "a"}"#,
        "{}",
        &["a.jsonl:1", "field `instruction` is a number; expected a string"],
    ),
    (
        "answer missing",
        "a.jsonl",
        r#"{"instruction": "q", "outptu": "a"}"#,
        "{}",
        &["a.jsonl:1", "field `output` is missing", "rename `outptu`?"],
    ),
    (
        "null answer",
        "a.jsonl",
        r#"{"prompt": "q", "completion": null}"#,
        "{}",
        &["field `completion` is null"],
    ),
    (
        "nested nulls",
        "a.jsonl",
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}"#,
        "{}",
        &["field `messages[0].content[0]` is not text"],
    ),
    (
        "unknown role",
        "a.jsonl",
        r#"{"messages": [{"role": "asistant", "content": "a"}]}"#,
        "{}",
        &["messages[0].role` is `asistant`; expected one of user", "did you mean `assistant`?"],
    ),
    (
        "unknown speaker",
        "a.jsonl",
        r#"{"conversations": [{"from": "bot", "value": "a"}]}"#,
        "{}",
        &["conversations[0].from` is `bot`; expected one of human, gpt"],
    ),
    (
        "no messages",
        "a.jsonl",
        r#"{"conversations": []}"#,
        "{}",
        &["field `conversations` is an empty list"],
    ),
    (
        "call that is no JSON",
        "a.jsonl",
        r#"{"conversations": [{"from": "function_call", "value": "f(x)"}]}"#,
        "{}",
        &["conversations[0].value` is not JSON; expected a call"],
    ),
    (
        "tools that are no list",
        "a.jsonl",
        r#"{"conversations": [{"from": "gpt", "value": "a"}], "tools": 3}"#,
        "{}",
        &["field `tools` is a number; expected a list of tools"],
    ),
    (
        "nobody answers",
        "a.jsonl",
        r#"{"messages": [{"role": "user", "content": "q"}]}"#,
        "{}",
        &["a.jsonl:1", "no assistant message"],
    ),
    (
        "all masked",
        "a.jsonl",
        r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}"#,
        "{}",
        &["a.jsonl:1: no trained token: every answer has weight 0"],
    ),
    (
        "half a weight",
        "a.jsonl",
        r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}"#,
        "{}",
        &["messages[0].weight` is 0.5; expected 1 (trained) or 0"],
    ),
    (
        "label outside the choices",
        "a.jsonl",
        r#"{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}"#,
        "{}",
        &["field `answerKey` is `C`; expected one of the labels A, B"],
    ),
    (
        "fewer labels than texts",
        "a.jsonl",
        r#"{"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"}"#,
        "{}",
        &["field `choices` has 2 texts and 1 labels"],
    ),
    (
        "key of the answer missing",
        "a.jsonl",
        r#"{"question": "q", "choices": {"text": ["x"], "label": ["A"]}}"#,
        "{}",
        &["field `answerKey` is missing"],
    ),
    (
        "third of two options",
        "a.jsonl",
        r#"{"sentence": "s", "option1": "a", "option2": "b", "answer": "3"}"#,
        "{}",
        &["field `answer` is `3`; expected 1 or 2"],
    ),
    ("ragged row", "a.csv", "prompt,completion\nq\n", "{}", &["a.csv:2", "1 cells, the header 2"]),
    ("column twice", "a.csv", "text,text\na,b\n", "{}", &["a.csv:1", "`text` is twice"]),
    (
        "column not there",
        "a.jsonl",
        r#"{"q": "q", "a": "a"}"#,
        r#"{"format": "question_answer", "columns": {"question": "q", "answer": "ans"}}"#,
        &["column `ans` is not there (columns.answer); found q, a"],
    ),
    (
        "column of another format",
        "a.jsonl",
        r#"{"text": "t"}"#,
        r#"{"columns": {"output": "text"}}"#,
        &["columns names `output`, which format text does not have"],
    ),
    (
        "format of another kind of file",
        "a.txt",
        "t",
        r#"{"format": "alpaca"}"#,
        &["format is alpaca, but a .txt file can only be text"],
    ),
    (
        "prompt that fills everything",
        "a.jsonl",
        r#"{"prompt": "one two three four five six seven eight nine ten", "completion": "a"}"#,
        "{}",
        &["a.jsonl:1: no trained token", "raise data.cutoff_len"],
    ),
    (
        "format for formatting",
        "dataset_info.json",
        r#"{"mine": {"file_name": "a.json", "format": "sharegpt"}}"#,
        r#"{"dataset": "mine"}"#,
        &["dataset_info.json", "unknown key `format`; rename it `formatting`"],
    ),
    (
        "data set not listed",
        "dataset_info.json",
        r#"{"alpaca_demo": {"file_name": "a.json"}}"#,
        r#"{"dataset": "alpaca_dem"}"#,
        &["`alpaca_dem` is not listed; did you mean `alpaca_demo`?"],
    ),
    (
        "data set on a hub",
        "dataset_info.json",
        r#"{"mine": {"hf_hub_url": "x/y"}}"#,
        r#"{"dataset": "mine"}"#,
        &["has no file_name", "put a copy"],
    ),
    (
        "pairs to choose from",
        "dataset_info.json",
        r#"{"mine": {"file_name": "a.json", "ranking": true}}"#,
        r#"{"dataset": "mine"}"#,
        &["holds pairs to choose from"],
    ),
];

fn tokenizer() -> Tokenizer {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-cli/assets/demo-base");
    Tokenizer::open(&base).unwrap()
}

fn load(dir: &Path, file: &str, bytes: &[u8], source: &str) -> Result<data::Dataset, String> {
    std::fs::write(dir.join(file), bytes).unwrap();
    let mut source: SourceConfig = serde_json::from_str(source).unwrap();
    if source.dataset.is_some() {
        source.dataset_dir = Some(dir.to_owned());
    } else {
        source.path = dir.join(file);
    }
    let config: DataConfig =
        serde_json::from_value(json!({"train": [source], "cutoff_len": 8})).unwrap();
    let tokenizer = tokenizer();
    let loaded = data::load(&config, 1, &tokenizer, &Template::plain(&tokenizer));
    assert_eq!(std::fs::read(dir.join(file)).unwrap(), bytes, "{file} was touched");
    loaded.map_err(|error| {
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    })
}

fn refuses(name: &str, file: &str, bytes: &[u8], source: &str, expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let said = load(dir.path(), file, bytes, source).map(drop).expect_err(name);
    for part in expected {
        assert!(said.contains(part), "{name}: {part:?} is not in {said:?}");
    }
    assert!(!said.contains('\n') && said.len() < 1000, "{name}: {said:?}");
}

#[test]
fn bad_data() {
    let names: BTreeSet<_> = FAULTS.iter().map(|fault| fault.0).collect();
    assert_eq!(names.len(), FAULTS.len());
    for (name, file, bytes, source, expected) in FAULTS {
        refuses(name, file, bytes.as_bytes(), source, expected);
    }
}

#[test]
fn bad_bytes() {
    let line = b"{\"text\": \"abc\"}\n";
    refuses(
        "invalid UTF-8",
        "a.jsonl",
        &[line, &b"\"\xff\"\n"[..]].concat(),
        "{}",
        &["a.jsonl:2: not UTF-8"],
    );
    refuses("UTF-16", "a.jsonl", b"\xff\xfe{\0", "{}", &["a.jsonl:1: not UTF-8"]);
    refuses("Latin-1 cells", "a.csv", b"text\nf\xfcr\n", "{}", &["a.csv:2: not UTF-8"]);
    refuses("Latin-1 text", "a.txt", b"f\xfcr", "{}", &["a.txt: not UTF-8"]);
    let long = format!("{{\"text\": \"{}", "a".repeat(10 << 20));
    refuses("open line of 10 MB", "a.jsonl", long.as_bytes(), "{}", &["a.jsonl:1: not valid JSON"]);
}

#[test]
fn a_byte_order_mark_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let files = [
        ("a.jsonl", "{\"text\": \"abc def\"}\r\n"),
        ("a.json", "[{\"text\": \"abc def\"}]"),
        ("a.csv", "text\r\nabc def\r\n"),
    ];
    let ids = files.map(|(file, text)| {
        let marked = format!("\u{feff}{text}");
        load(dir.path(), file, marked.as_bytes(), "{}").unwrap().train.remove(0).ids().to_vec()
    });
    assert_eq!(ids[0], ids[1]);
    assert_eq!(ids[0], ids[2]);
}
