use std::fs;
use std::path::Path;

use super::*;
use crate::config::{Format, SourceConfig, ValidationConfig};
use crate::template::Message;
use crate::template::Template;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::tests::byte_level;

/// One token per byte, `<s>` and `</s>`; BOS is added where a folder says so.
fn tokenizer(adds_bos: bool) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    byte_level().save(dir.path().join("tokenizer.json"), false).unwrap();
    let notes = serde_json::json!({
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": adds_bos,
    });
    fs::write(dir.path().join("tokenizer_config.json"), notes.to_string()).unwrap();
    Tokenizer::open(dir.path()).unwrap()
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

/// The message about a data file, without the folder.
fn message(path: &Path, format: Option<Format>) -> String {
    let error = read_documents(path, format).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let folder = format!("{}/", path.parent().unwrap().display());
    error.to_string().replace(&folder, "")
}

fn contents(path: &Path) -> Vec<Content> {
    read_documents(path, None).unwrap().into_iter().map(|document| document.content).collect()
}

fn user(text: &str) -> Message {
    Message::new("user", text)
}

fn assistant(text: &str) -> Message {
    Message::new("assistant", text)
}

#[test]
fn every_format_is_detected() {
    let files = Files::new();
    let alpaca = files.write(
        "alpaca.json",
        r#"[{"instruction": "I", "input": "X", "output": "O", "answer": 3},
            {"instruction": "I", "input": "", "output": "O", "system": "S", "history": [["q", "a"]]}]"#,
    );
    assert_eq!(
        contents(&alpaca),
        [
            Content::Chat(vec![user("I\nX"), assistant("O")]),
            Content::Chat(vec![
                Message::new("system", "S"),
                user("q"),
                assistant("a"),
                user("I"),
                assistant("O")
            ]),
        ]
    );
    let messages = files.write(
        "messages.jsonl",
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}], "loss_weight": 0.0}, {"role": "assistant", "content": "A", "weight": 1}]}"#,
    );
    assert_eq!(contents(&messages), [Content::Chat(vec![user("Q"), assistant("A")])]);
    let pairs = files.write(
        "pairs.jsonl",
        "{\"prompt\": \"P\", \"completion\": \"C\"}\n\n{\"prompt\": [{\"role\": \"user\", \"content\": \"P\"}], \
         \"completion\": [{\"role\": \"assistant\", \"content\": \"C\"}]}\n",
    );
    assert_eq!(
        contents(&pairs),
        vec![Content::Completion(vec![user("P")], vec![assistant("C")]); 2]
    );
    assert_eq!(contents(&files.write("t.jsonl", r#"{"text": "T"}"#)), [Content::Text("T".into())]);
    assert_eq!(contents(&files.write("t.txt", "A\nB\n")), [Content::Text("A\nB\n".into())]);
}

#[test]
fn records_know_their_line() {
    let files = Files::new();
    let lines = files.write("a.jsonl", "{\"text\": \"A\"}\n\n{\"text\": \"B\"}\n");
    let array = files.write("a.json", "\n[\n  {\"text\":\n \"A\"},\n  {\"text\": \"B\"}\n]\n");
    for (path, expected) in [(lines, [1, 3]), (array, [3, 5])] {
        let found: Vec<usize> = read_documents(&path, None)
            .unwrap()
            .iter()
            .map(|document| document.origin.line)
            .collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn a_wrong_field_names_file_line_field_and_what_was_found() {
    let files = Files::new();
    let good = r#"{"instruction": "I", "output": "O"}"#;
    let cases = [
        (
            r#"{"instruction": "I", "outptu": "O"}"#,
            "field `output` is missing (format alpaca); found instruction, outptu; rename `outptu`?",
        ),
        ("{}", "field `instruction` is missing (format alpaca); the record has no fields"),
        (r#"{"instruction": "I", "output": 3}"#, "field `output` is a number; expected a string"),
        (
            r#"{"instruction": null, "output": "O"}"#,
            "field `instruction` is null; expected a string",
        ),
        (
            r#"{"instruction": "I", "output": "O", "history": [["q"]]}"#,
            "field `history[0]` is a list; expected a list of [question, answer] pairs",
        ),
        ("[]", "the record is a list; expected an object"),
        (
            "{\"instruction\": }",
            "not valid JSON at column 17: expected value; a .jsonl file holds one record per line",
        ),
    ];
    for (bad, expected) in cases {
        let path = files.write("bad.jsonl", &format!("{good}\n{bad}\n"));
        assert_eq!(message(&path, None), format!("bad.jsonl:2: {expected}"));
    }
    let path = files.write("bad.json", &format!("[\n{good},\n\n{{\"instruction\": 1}}]"));
    assert_eq!(
        message(&path, None),
        "bad.json:4: field `instruction` is a number; expected a string"
    );
}

#[test]
fn a_wrong_message_names_its_place() {
    let files = Files::new();
    let cases = [
        (r#""hi""#, "field `messages` is a string; expected a list of {role, content}"),
        ("[]", "field `messages` is an empty list; expected messages"),
        ("[3]", "field `messages[0]` is a number; expected {role, content}"),
        (
            r#"[{"rol": "user", "content": "Q"}]"#,
            "field `messages[0].role` is missing (format messages); found rol, content; rename `rol`?",
        ),
        (
            r#"[{"role": "user", "content": {}}]"#,
            "field `messages[0].content` is an object; expected a string",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image"}]}]"#,
            "field `messages[0].content[0]` is not text; expected {type: text, text: ...}, {type: \
             reasoning, value: ...} or {type: tool_call, value: ...}",
        ),
        (
            r#"[{"role": "assistant", "content": "A", "weight": 0.5}]"#,
            "field `messages[0].weight` is 0.5; expected 1 (trained) or 0 (not trained)",
        ),
    ];
    for (messages, expected) in cases {
        let path = files.write("m.jsonl", &format!("{{\"messages\": {messages}}}"));
        assert_eq!(message(&path, None), format!("m.jsonl:1: {expected}"));
    }
}

#[test]
fn a_wrong_file_is_told_as_a_whole() {
    let files = Files::new();
    let cases = [
        (
            "a.tsv",
            "x",
            "a.tsv: file ending is `tsv`; expected .json, .jsonl, .csv, .parquet or .txt",
        ),
        ("a.jsonl", "\n", "a.jsonl: no records; expected at least one"),
        ("a.json", "[ ]", "a.json: no records; expected at least one"),
        ("a.txt", " \n", "a.txt: the file is empty; expected text"),
        (
            "b.json",
            "{\"text\": \"A\"}\n",
            "b.json:1: expected a JSON array of records; for one record per line name the file .jsonl",
        ),
        ("c.json", "[{\"text\": \"A\"}\n{}]", "c.json:2: expected `,` or `]` after a record"),
        (
            "d.json",
            "[{\"text\": \"A\"},\n",
            "d.json:2: the array is not closed; the file seems cut off",
        ),
        (
            "e.json",
            "[{\"text\": \"A\"},\n{\"text\": x}]",
            "e.json:2: not valid JSON: expected value",
        ),
        (
            "f.json",
            "[{\"text\": \"A\"}]\n]",
            "f.json:2: text after the end of the array; expected nothing",
        ),
        (
            "g.jsonl",
            r#"{"turns": []}"#,
            "g.jsonl:1: format not recognised: found turns; expected instruction and output \
             (alpaca), conversations (sharegpt), messages, prompt and completion, choices and \
             answerKey, sentence, option1 and option2, question and answer, or text; map other \
             names with columns",
        ),
    ];
    for (name, text, expected) in cases {
        assert_eq!(message(&files.write(name, text), None), expected);
    }
    let path = files.write("h.txt", "x");
    assert_eq!(
        message(&path, Some(Format::Alpaca)),
        "h.txt: format is alpaca, but a .txt file can only be text; expected .json or .jsonl"
    );
    fs::write(&path, [0xFF]).unwrap();
    assert_eq!(message(&path, None), "h.txt: not UTF-8 text; convert it to UTF-8");
}

fn samples(content: Content, adds_bos: bool, cutoff_len: usize) -> Result<Vec<Sample>> {
    let tokenizer = tokenizer(adds_bos);
    let origin = Origin { file: Path::new("f.jsonl").into(), line: 9 };
    tokenize(
        &Document { content, tools: None, origin },
        &tokenizer,
        &Template::plain(&tokenizer),
        cutoff_len,
    )
}

/// The tokens as text, a bar in front of each target.
fn shown(sample: &Sample) -> String {
    let tokenizer = tokenizer(true);
    assert_eq!(sample.ids().len(), sample.trained().len());
    assert_eq!(sample.trained().iter().position(|&trained| trained), Some(sample.prompt_len));
    let tokens = sample.ids().iter().zip(sample.trained());
    tokens
        .flat_map(|(&id, &trained)| {
            let bar = if trained { "|" } else { "" };
            [bar.to_owned(), tokenizer.decode(&[id], false).unwrap()]
        })
        .collect()
}

fn question() -> Content {
    Content::Chat(vec![user("Q a"), assistant("A a")])
}

#[test]
fn only_the_answer_and_eos_are_trained() {
    let sample = samples(question(), true, 100).unwrap().remove(0);
    assert_eq!(shown(&sample), "<s>Q a\n|A| a|</s>");
    assert!(!sample.truncated);
    assert_eq!((sample.prompt_len, sample.n_trained()), (4, 3));
    let sample = samples(question(), false, 100).unwrap().remove(0);
    assert_eq!(shown(&sample), "Q a\n|A| a|</s>");
    let written = Content::Chat(vec![user("<s>Q"), assistant("A")]);
    assert_eq!(shown(&samples(written, true, 100).unwrap()[0]), "<s>Q\n|A|</s>");
}

#[test]
fn an_answer_in_the_prompt_is_not_trained() {
    let prompt = vec![user("Q"), assistant("A"), user("R")];
    let content = Content::Completion(prompt, vec![assistant("B")]);
    assert_eq!(shown(&samples(content, true, 100).unwrap()[0]), "<s>Q\nA</s>\nR\n|B|</s>");
}

#[test]
fn the_end_of_the_answer_is_cut_and_the_prompt_kept() {
    let sample = samples(question(), true, 5).unwrap().remove(0);
    assert_eq!(shown(&sample), "<s>Q a\n|A");
    assert!(sample.truncated);
    assert!(!samples(question(), true, 7).unwrap()[0].truncated);
    let error = samples(question(), true, 4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "f.jsonl:9: no trained token: data.cutoff_len is 4, the sample has 7 tokens and nothing of \
         its answer is left; raise data.cutoff_len or shorten the prompt"
    );
}

#[test]
fn every_token_of_a_text_is_a_target_once() {
    let text = || Content::Text("abcde".into());
    let shown_all = |adds_bos, cutoff_len| -> Vec<String> {
        samples(text(), adds_bos, cutoff_len).unwrap().iter().map(shown).collect()
    };
    assert_eq!(shown_all(true, 100), ["<s>|a|b|c|d|e|</s>"]);
    assert_eq!(shown_all(true, 3), ["<s>|a|b", "<s>|c|d", "<s>|e|</s>"]);
    assert_eq!(shown_all(false, 100), ["a|b|c|d|e|</s>"]);
    assert_eq!(shown_all(false, 3), ["a|b|c", "c|d|e", "e|</s>"]);
    let written = Content::Text("<s>a</s>".into());
    assert_eq!(shown(&samples(written, true, 9).unwrap()[0]), "<s>|a|</s>");
}

#[test]
fn a_refused_conversation_names_its_line() {
    let tokenizer = tokenizer(true);
    let template = Template::from_source("t", "{{ raise_exception('no') }}", &tokenizer).unwrap();
    let origin = Origin { file: Path::new("f.jsonl").into(), line: 9 };
    let error =
        tokenize(&Document { content: question(), tools: None, origin }, &tokenizer, &template, 9)
            .unwrap_err();
    assert_eq!(error.to_string(), "f.jsonl:9: chat template t: refused the conversation: no");
    let error = samples(Content::Chat(vec![user("Q")]), true, 9).unwrap_err();
    assert!(
        error.to_string().contains("f.jsonl:9: chat template plain: the conversation has no"),
        "{error}"
    );
}

fn config(path: PathBuf) -> DataConfig {
    DataConfig {
        train: vec![SourceConfig { path, ..SourceConfig::default() }],
        validation: ValidationConfig::default(),
        max_samples: None,
        cutoff_len: 64,
        cache_dir: None,
    }
}

fn load_plain(config: &DataConfig, seed: u64) -> Result<Dataset> {
    let tokenizer = tokenizer(true);
    load(config, seed, &tokenizer, &Template::plain(&tokenizer))
}

fn lines(samples: &[Sample]) -> Vec<usize> {
    samples.iter().map(|sample| sample.origin.line).collect()
}

fn forty(files: &Files) -> PathBuf {
    let lines: Vec<String> =
        (0..40).map(|i| format!("{{\"prompt\": \"{i}\", \"completion\": \"c\"}}")).collect();
    files.write("forty.jsonl", &lines.join("\n"))
}

#[test]
fn the_split_depends_on_the_seed_alone() {
    let files = Files::new();
    let config = config(forty(&files));
    let (first, again, other) = (
        load_plain(&config, 1).unwrap(),
        load_plain(&config, 1).unwrap(),
        load_plain(&config, 2).unwrap(),
    );
    assert_eq!((first.train.len(), first.validation.len()), (36, 4));
    assert_eq!(first.train, again.train);
    assert_eq!(first.validation, again.validation);
    assert_ne!(lines(&first.validation), lines(&other.validation));
    let mut all = [lines(&first.train), lines(&first.validation)].concat();
    assert!(all[..36].is_sorted() && all[36..].is_sorted());
    all.sort_unstable();
    assert_eq!(all, (1..=40).collect::<Vec<_>>());
    let report = first.report;
    assert_eq!((report.read, report.kept, report.truncated), (40, 40, 0));
    assert_eq!(report.trained_tokens, 72);
    assert_eq!(report.total_tokens, first.train.iter().map(Sample::len).sum::<usize>());
    assert_eq!(report.validation_from, "10% of the training data");
}

#[test]
fn max_samples_draws_from_the_whole() {
    let files = Files::new();
    let mut config = config(forty(&files));
    config.max_samples = Some(10);
    let data = load_plain(&config, 1).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (9, 1));
    assert_eq!((data.report.read, data.report.kept), (40, 10));
    assert!(lines(&data.train).iter().any(|&line| line > 10), "drawn, not taken from the start");
    assert!(lines(&data.train).is_sorted());
}

#[test]
fn small_shares_hold_out_one_and_none_holds_out_none() {
    let files = Files::new();
    let mut config = config(forty(&files));
    config.validation.fraction = 0.001;
    assert_eq!(load_plain(&config, 1).unwrap().validation.len(), 1);
    config.validation.fraction = 0.999;
    assert_eq!(load_plain(&config, 1).unwrap().train.len(), 1);
    config.validation.fraction = 0.0;
    let data = load_plain(&config, 1).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (40, 0));
    assert_eq!(data.report.validation_from, "none");
}

#[test]
fn a_file_of_held_out_samples_wins() {
    let files = Files::new();
    let mut config = config(forty(&files));
    config.validation.path =
        Some(files.write("held.jsonl", r#"{"prompt": "P", "completion": "C"}"#));
    config.max_samples = Some(5);
    let data = load_plain(&config, 1).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (5, 1));
    assert!(data.report.validation_from.ends_with("held.jsonl"));
}

#[test]
fn one_long_text_is_split_by_pieces() {
    let files = Files::new();
    let mut config = config(files.write("long.txt", &"abcdefgh\n".repeat(50)));
    config.cutoff_len = 10;
    let data = load_plain(&config, 1).unwrap();
    // 450 tokens and EOS in pieces of 9.
    assert_eq!((data.train.len(), data.validation.len()), (46, 5));
    config.max_samples = Some(7);
    assert_eq!(load_plain(&config, 1).unwrap().report.kept, 7);
}

#[test]
fn the_first_bad_record_is_reported() {
    let files = Files::new();
    let long = "x".repeat(100);
    let good = "{\"prompt\": \"Q\", \"completion\": \"A\"}\n";
    let bad = format!("{{\"prompt\": \"{long}\", \"completion\": \"A\"}}\n");
    let config = config(files.write("d.jsonl", &[good, &bad, good, &bad].concat()));
    for _ in 0..5 {
        assert!(
            load_plain(&config, 1).unwrap_err().to_string().contains("d.jsonl:2: no trained token")
        );
    }
}

#[test]
fn missing_files_are_found_before_anything_is_read() {
    let files = Files::new();
    let mut config = config(files.write("broken.jsonl", "{"));
    config.validation.path = Some("no/such.jsonl".into());
    let error = load_plain(&config, 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no/such.jsonl: not found; expected a file of held-out data (.json, .jsonl, .csv, .parquet or .txt)"
    );
    assert_eq!(error.exit_code(), 2);
    config.train[0].path = files.write("x.tsv", "");
    assert!(check_files(&config).unwrap_err().to_string().contains("x.tsv: file ending is `tsv`"));
}

/// Where the tokens are held changes nothing.
#[test]
fn samples_in_a_file_are_those_in_memory() {
    let files = Files::new();
    let mut config = config(forty(&files));
    config.train[0].weight = 1.5;
    config.train.push(SourceConfig {
        path: files.write("long.txt", &"abcde fgh\n".repeat(50)),
        ..SourceConfig::default()
    });
    let folder = tempfile::tempdir().unwrap();
    config.cache_dir = Some(folder.path().to_owned());
    let tokenizer = tokenizer(true);
    let template = Template::plain(&tokenizer);
    let held = |limit| {
        let survey = load::gather(&config, 1, &tokenizer, &template, true, limit).unwrap();
        (survey.data, survey.files)
    };
    let (memory, reports) = held(usize::MAX);
    for limit in [0, 100, 1000] {
        let (data, files) = held(limit);
        assert_eq!(data.train, memory.train);
        assert_eq!(data.validation, memory.validation);
        assert_eq!(files, reports);
        assert_eq!(duplicates(&data), duplicates(&memory));
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    // The folder is used: where no file can be made, there is nowhere to go.
    #[cfg(target_os = "linux")]
    {
        config.cache_dir = Some("/proc".into());
        let error = load::gather(&config, 1, &tokenizer, &template, true, 0).unwrap_err();
        assert!(error.to_string().contains("give data.cache_dir a folder"), "{error}");
    }
    config.cache_dir = Some(folder.path().join("none"));
    let error = load(&config, 1, &tokenizer, &template).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("none: not found; expected a folder for tokens"), "{error}");
}
