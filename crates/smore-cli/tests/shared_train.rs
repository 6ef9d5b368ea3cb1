//! Training on a real tiny Llama and real text, in the folder that `SMORE_SHARED` names. Run by
//! `cargo xtask parity`.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

#[path = "../../smore-tune/tests/table/mod.rs"]
mod table;

use assert_cmd::Command;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn train(shared: &Path, data: &str, adapter: &str) -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    let config = format!(
        "model: {}
adapter: {adapter}
data: {{train: [{{path: {}}}], max_samples: 300, cutoff_len: 256}}
train: {{learning_rate: 3.0e-3, max_steps: 40, per_device_train_batch_size: 4, gradient_accumulation_steps: 1, eval_steps: 0}}
output_dir: run
",
        shared.join("data/models/stories260K").display(),
        shared.join(data).display(),
    );
    std::fs::write(dir.path().join("run.yaml"), config).unwrap();
    let mut command = Command::cargo_bin("smore").unwrap();
    let run =
        command.current_dir(dir.path()).args(["train", "--json", "run.yaml"]).assert().success();
    let json: Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    println!("{data}: {json}");
    let generate = |extra: &[&str]| {
        let model = shared.join("data/models/stories260K");
        let mut command = Command::cargo_bin("smore").unwrap();
        let args = ["generate", "--model", model.to_str().unwrap(), "--prompt", "Once upon a time"];
        command.current_dir(dir.path()).args(args).args(["--max-new-tokens", "40"]).args(extra);
        String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
    };
    assert!(generate(&[]).contains("there was a little girl named Lily"));
    assert_ne!(generate(&[]), generate(&["--adapter", "run/adapter"]));
    let loss = |key: &str| json[key].as_f64().unwrap();
    (loss("eval_loss_before"), loss("eval_loss_after"))
}

#[test]
fn held_out_loss_falls_below_the_bases() {
    let Some(shared) = std::env::var_os("SMORE_SHARED").map(PathBuf::from) else { return };
    let smore = "{kind: smore, layers: [{experts: 4, fanout: 2, rank: 4}, \
                 {experts: 4, fanout: 2, rank: 4}]}";
    for data in
        ["data/corpus/tinystories_sample.jsonl", "data/datasets/codealpaca/code_alpaca_2k.json"]
    {
        let (before, after) = train(&shared, data, smore);
        assert!(after < before, "{data}: {before} -> {after}");
    }
}

/// Records of a file of records: elements of a JSON array, or lines that are not empty.
fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    if path.extension().unwrap() == "json" {
        return serde_json::from_str(&text).unwrap();
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write_records(path: &Path, records: &[Value]) {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n")).unwrap();
}

fn write_config(folder: &Path, shared: &Path, file: &Path, max_samples: &str) {
    let config = format!(
        "model: {}
adapter: {{kind: smore, layers: [{{experts: 4, fanout: 2, rank: 4}}]}}
data: {{train: [{{path: {}}}], max_samples: {max_samples}}}
train: {{learning_rate: 3.0e-3, max_steps: 3, per_device_train_batch_size: 2, eval_steps: 0}}
output_dir: run
",
        shared.join("data/models/stories260K").display(),
        file.display(),
    );
    std::fs::write(folder.join("run.yaml"), config).unwrap();
}

/// What `smore data` counts, in which everything that must add up does.
fn counts(folder: &Path) -> Value {
    let mut command = Command::cargo_bin("smore").unwrap();
    let output = command.current_dir(folder).args(["data", "run.yaml", "--json"]).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let file = &json["files"][0];
    let number = |value: &Value| value.as_u64().unwrap();
    let parts = ["kept", "not_drawn", "dropped"].map(|key| number(&file[key]));
    assert_eq!(number(&file["read"]), parts.iter().sum::<u64>(), "{file}");
    assert_eq!(file["dropped"], file["faults"].as_array().unwrap().len(), "{file}");
    let samples = number(&json["train"]["samples"]) + number(&json["held_out"]["samples"]);
    assert_eq!(samples, number(&file["samples"]), "{json}");
    assert!(number(&file["trained_tokens"]) >= number(&file["samples"]), "{json}");
    json
}

/// The files as they are published, counted on another way; then a run on them, without the records
/// that `smore data` names as too long for this base.
#[test]
fn every_format_is_counted_and_trained_on() {
    let Some(shared) = std::env::var_os("SMORE_SHARED").map(PathBuf::from) else { return };
    let sets = [
        ("llamafactory/alpaca_en_demo.json", "alpaca"),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt"),
        ("sharegpt/dummy_conversation.json", "sharegpt"),
        ("llamafactory/v1_sft_demo.jsonl", "messages"),
        ("llamafactory/reason_tool_use_demo_50.jsonl", "messages"),
        ("commonsenseqa/train_rand_split.jsonl", "choice"),
        ("winogrande/train_s.jsonl", "two_options"),
        ("gsm8k/train.jsonl", "question_answer"),
        ("llamafactory/wiki_demo.txt", "text"),
        ("llamafactory/c4_demo.jsonl", "text"),
        ("written.parquet", "alpaca"),
    ];
    for (name, format) in sets {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let datasets = shared.join("data/datasets");
        let is_written = name == "written.parquet";
        let published =
            datasets.join(if is_written { "llamafactory/alpaca_en_demo.json" } else { name });
        let mut file = published.clone();
        if is_written {
            let records = records(&published);
            let text = |r: &Value, key: &str| r[key].as_str().unwrap_or_default().to_owned();
            let keys = ["instruction", "input", "output"];
            let columns = keys.map(|key| (key, records.iter().map(|r| text(r, key)).collect()));
            file = folder.join(name);
            table::strings(&file, &columns, 400);
        }
        write_config(folder, &shared, &file, "null");
        let counted = counts(folder)["files"][0].clone();
        assert_eq!(counted["format"], format, "{name}");
        let keys = ["read", "dropped", "samples", "tokens", "trained_tokens"];
        let said = keys.map(|key| format!("{} {key}", counted[key])).join(", ");
        println!("{name}: {format}, {said}");
        if name.ends_with("txt") {
            assert_eq!((&counted["read"], &counted["dropped"]), (&1.into(), &0.into()), "{name}");
        } else {
            let mut records = records(&published);
            assert_eq!(counted["read"], records.len(), "{name}");
            // One record a line, so that a line names one.
            file = folder.join("records.jsonl");
            write_records(&file, &records);
            write_config(folder, &shared, &file, "null");
            let again = counts(folder)["files"][0].clone();
            for key in ["read", "kept", "dropped", "samples", "tokens", "trained_tokens"] {
                assert_eq!(again[key], counted[key], "{name}: {key}");
            }
            let faults = again["faults"].as_array().unwrap();
            let too_long =
                |f: &Value| f["message"].as_str().unwrap().contains("raise data.cutoff_len");
            assert!(faults.iter().all(too_long), "{name}: {faults:?}");
            let lines = faults.iter().map(|fault| fault["line"].as_u64().unwrap() as usize);
            for line in lines.rev() {
                records.remove(line - 1);
            }
            write_records(&file, &records);
        }
        write_config(folder, &shared, &file, "100");
        assert_eq!(counts(folder)["problems"], serde_json::json!([]), "{name}");
        let mut command = Command::cargo_bin("smore").unwrap();
        let run =
            command.current_dir(folder).args(["train", "--json", "run.yaml"]).assert().success();
        let said: Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
        assert_eq!(said["steps"], 3, "{name}");
        let loss = said["eval_loss_after"].as_f64().unwrap();
        assert!(
            loss.is_finite() && loss != said["eval_loss_before"].as_f64().unwrap(),
            "{name}: {said}"
        );
    }
}
