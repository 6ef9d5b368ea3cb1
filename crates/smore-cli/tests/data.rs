//! `smore data` as a user sees it.

mod workplace;

use serde_json::Value;
use std::path::Path;
use workplace::{as_is, smore, write_run};

fn said(folder: &Path, args: &[&str]) -> String {
    let output = smore(folder, args).assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

fn json(folder: &Path, code: i32) -> Value {
    let output = smore(folder, &["data", "run.yaml", "--json"]).assert().code(code);
    serde_json::from_slice(&output.get_output().stdout).unwrap()
}

#[test]
fn counts_add_up() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", |config| config.replace("max_samples: null", "max_samples: 30"));
    let json = json(dir.path(), 0);
    let file = &json["files"][0];
    let number = |value: &Value| value.as_u64().unwrap();
    assert_eq!(number(&file["read"]), 40);
    assert_eq!(
        [&file["kept"], &file["not_drawn"], &file["dropped"]].map(number),
        [30, 10, 0],
        "{file}"
    );
    assert_eq!(number(&json["train"]["samples"]) + number(&json["held_out"]["samples"]), 30);
    let counts = json["train"]["counts"].as_array().unwrap();
    assert_eq!(counts.iter().map(number).sum::<u64>(), number(&json["train"]["samples"]));
    assert!(number(&json["trained_tokens"]) < number(&json["tokens"]));
    assert_eq!(json["problems"], serde_json::json!([]));
    assert!(!dir.path().join("run").exists(), "looking at data writes nothing");
    let text = said(dir.path(), &["data", "run.yaml"]);
    for part in ["alpaca", "27 samples to train on, 3 held out", "no held-out sample is trained on"]
    {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_sample_is_shown_as_it_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", as_is);
    let text = said(dir.path(), &["data", "run.yaml", "--sample", "2"]);
    assert!(text.contains("data.jsonl:"), "{text}");
    let (_, sample) = text.rsplit_once("trained: ").unwrap();
    let (prompt, answer) = sample.split_once('\n').unwrap().1.split_once('\u{27e6}').unwrap();
    assert!(prompt.starts_with("<s>Order ") && prompt.ends_with("of the press\n"), "{sample}");
    assert!(answer.starts_with("order ") && answer.trim_end().ends_with('\u{27e7}'), "{sample}");
    let said = smore(dir.path(), &["data", "run.yaml", "--sample", "99"]).assert().code(1);
    let said = String::from_utf8(said.get_output().stderr.clone()).unwrap();
    assert!(said.contains("--sample is 99; expected 1 to 36"), "{said}");
}

#[test]
fn everything_that_is_wrong_is_listed_and_the_rest_counted() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", as_is);
    let path = dir.path().join("data.jsonl");
    let mut lines: Vec<String> =
        std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    lines[4] = "{\"instruction\": \"I\"}".into();
    lines[9] = "{\"instruction\": \"I\", \"output\": \"\"".into();
    lines[20] = format!("{{\"instruction\": \"{}\", \"output\": \"o\"}}", "long ".repeat(100));
    std::fs::write(&path, lines.join("\n")).unwrap();
    let json = json(dir.path(), 2);
    let file = &json["files"][0];
    let places: Vec<u64> =
        file["faults"].as_array().unwrap().iter().map(|f| f["line"].as_u64().unwrap()).collect();
    assert_eq!(places, [5, 10, 21]);
    assert_eq!(file["read"], 40);
    assert_eq!((&file["kept"], &file["dropped"]), (&37.into(), &3.into()));
    let output = smore(dir.path(), &["data", "run.yaml", "--show", "2"]).assert().code(2);
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(text.contains("data.jsonl:5: field `output` is missing"), "{text}");
    assert!(text.contains("dropped: 1 more"), "{text}");
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(said.contains("`smore train` would refuse this data"), "{said}");
    // And it does, with the first of them.
    let said = workplace::refused(dir.path(), &["train", "run.yaml"]);
    assert!(said.contains("data.jsonl:5: field `output` is missing"), "{said}");
}

#[test]
fn what_is_trained_on_and_held_out_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", |config| {
        config.replace("validation: {fraction: 0.1}", "validation: {path: held.jsonl}")
    });
    let lines = std::fs::read_to_string(dir.path().join("data.jsonl")).unwrap();
    let third = lines.lines().nth(2).unwrap();
    let other = third.replace("order 2", "something else");
    std::fs::write(dir.path().join("held.jsonl"), format!("{other}\n{third}\n")).unwrap();
    let json = json(dir.path(), 0);
    let twins = json["duplicates"].as_array().unwrap();
    assert_eq!(twins.len(), 1, "{json}");
    assert!(twins[0]["train"].as_str().unwrap().ends_with("data.jsonl:3"));
    assert!(twins[0]["held_out"].as_str().unwrap().ends_with("held.jsonl:2"));
    let text = said(dir.path(), &["data", "run.yaml"]);
    assert!(text.contains("warning: 1 of the held-out samples are trained on as well"), "{text}");
}

/// A file larger than the memory that the system gives the process. With all tokens in memory it
/// fails.
#[cfg(target_os = "linux")]
#[test]
fn data_larger_than_memory_is_streamed() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", |config| {
        config
            .replace("max_steps: 6", "max_steps: 2")
            .replace("eval_steps: 3", "eval_steps: 0")
            .replace("cutoff_len: 64", "cutoff_len: 256\n  cache_dir: .")
            .replace("validation: {fraction: 0.1}", "validation: {path: held.jsonl}")
    });
    std::fs::copy(dir.path().join("data.jsonl"), dir.path().join("held.jsonl")).unwrap();
    let answer = "order of the press ".repeat(100);
    let line = |i| format!("{{\"instruction\": \"Check {i}\", \"output\": \"{answer}\"}}\n");
    let records = 40_000;
    std::fs::write(dir.path().join("data.jsonl"), (0..records).map(line).collect::<String>())
        .unwrap();
    let limit: u64 = 64 << 20;
    assert!(std::fs::metadata(dir.path().join("data.jsonl")).unwrap().len() > limit);
    let limited = |command: &str| {
        let smore = assert_cmd::cargo::cargo_bin("smore");
        let line = format!("ulimit -d {} && exec {} {command}", limit >> 10, smore.display());
        let mut shell = std::process::Command::new("sh");
        shell.current_dir(dir.path()).args(["-c", &line]).env("RAYON_NUM_THREADS", "2");
        shell.output().unwrap()
    };
    let output = limited("data run.yaml --json");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["files"][0]["kept"], records);
    let output = limited("train run.yaml");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
