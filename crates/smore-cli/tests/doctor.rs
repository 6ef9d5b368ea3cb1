//! `smore doctor`: everything in one go, and the same at the start of `train`.

mod workplace;

use serde_json::Value;
use std::path::Path;
use workplace::{as_is, base, smore, write_run};

/// Exit code, and the findings that `--json` prints.
fn findings(folder: &Path, args: &[&str]) -> (i32, Value) {
    let output = smore(folder, &[&["doctor", "--json"], args].concat()).output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code().unwrap(), json)
}

fn of<'a>(json: &'a Value, severity: &str) -> Vec<&'a Value> {
    let all = json["findings"].as_array().unwrap().iter();
    all.filter(|finding| finding["severity"] == severity).collect()
}

#[test]
fn a_good_run_passes() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", as_is);
    let (code, json) = findings(dir.path(), &["run.yaml"]);
    assert_eq!((code, &json["errors"]), (0, &0.into()), "{json}");
    for area in ["config", "model", "tokenizer", "template", "adapter", "data", "machine"] {
        assert!(of(&json, "good").iter().any(|finding| finding["area"] == area), "{area}");
    }
    assert!(!dir.path().join("run").exists(), "it only looks");
    let run = smore(dir.path(), &["doctor", "run.yaml"]).assert().success();
    let said = String::from_utf8(run.get_output().stdout.clone()).unwrap();
    assert!(said.contains("ok       adapter    smore on 12 modules"), "{said}");
}

/// Three things wrong at once are three findings, each with a remedy; `train` says the first.
#[test]
fn all_faults_are_listed_with_remedies() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", |c| {
        c.replace("fanout: 2", "fanout: 5")
            .replace("data.jsonl", "none.jsonl")
            .replace("warmup_ratio: 0.1", "warmup_ratio: 3")
    });
    let (code, json) = findings(dir.path(), &["run.yaml"]);
    let errors = of(&json, "error");
    assert_eq!((code, errors.len(), &json["errors"]), (1, 3, &3.into()), "{json}");
    for (finding, (area, part)) in errors.iter().zip([
        ("config", "warmup_ratio is 3"),
        ("data", "none.jsonl"),
        ("adapter", "fanout is 5"),
    ]) {
        assert_eq!(finding["area"], area);
        assert!(finding["message"].as_str().unwrap().contains(part), "{finding}");
        assert!(finding["remedy"].as_str().unwrap().len() > 10, "{finding}");
    }
    let run = smore(dir.path(), &["train", "run.yaml"]).assert().code(2);
    let said = String::from_utf8(run.get_output().stderr.clone()).unwrap();
    assert!(said.contains("warmup_ratio is 3") && said.lines().count() == 1, "{said}");
    let run = smore(dir.path(), &["doctor", "run.yaml"]).assert().code(1);
    let said = String::from_utf8(run.get_output().stdout.clone()).unwrap();
    assert_eq!(said.matches("remedy: ").count(), said.matches("error ").count(), "{said}");
}

/// Warnings are said by `train` too, and do not stop it.
#[test]
fn warnings_come_with_the_run() {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", |c| {
        c.replace("cutoff_len: 64", "cutoff_len: 100000").replace("max_steps: 6", "max_steps: 1")
    });
    let (code, json) = findings(dir.path(), &["run.yaml"]);
    assert_eq!(code, 0, "{json}");
    let said = of(&json, "warning")[0]["message"].to_string();
    assert!(said.contains("cutoff_len is 100000"), "{said}");
    let run = smore(dir.path(), &["train", "run.yaml"]).assert().success();
    let said = String::from_utf8(run.get_output().stderr.clone()).unwrap();
    assert!(said.contains("warning  data.cutoff_len is 100000"), "{said}");
    // A machine held back is said.
    let mut doctor = smore(dir.path(), &["doctor", "run.yaml"]);
    let output = doctor.env("RAYON_NUM_THREADS", "1").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let one_core = std::thread::available_parallelism().unwrap().get() == 1;
    assert!(one_core || said.contains("remedy: unset RAYON_NUM_THREADS"), "{said}");
}

#[test]
fn parts_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", |c| c.replace("max_steps: 6", "max_steps: 1"));
    smore(folder, &["train", "run.yaml"]).assert().success();
    let base = base();
    let model = ["--model", base.to_str().unwrap()];
    let whole = [&model[..], &["--adapter", "run/adapter", "--data", "data.jsonl"]].concat();
    let (code, json) = findings(folder, &whole);
    assert_eq!((code, &json["errors"]), (0, &0.into()), "{json}");
    std::fs::remove_file(folder.join("run/adapter/adapter_model.safetensors")).unwrap();
    std::fs::write(folder.join("data.jsonl"), "{\"instruction\": \"a\"}\n").unwrap();
    let (code, json) = findings(folder, &whole);
    let areas: Vec<&str> = of(&json, "error").iter().map(|f| f["area"].as_str().unwrap()).collect();
    assert_eq!((code, areas), (1, vec!["adapter", "data"]), "{json}");
    // Something must be named, and not both ways.
    smore(folder, &["doctor"]).assert().code(2);
    smore(folder, &["doctor", "run.yaml", "--model", "x"]).assert().code(2);
    smore(folder, &["doctor", "none.yaml"]).assert().code(2);
}

/// An adapter on a base that it was not trained on.
#[test]
fn another_base_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", |c| c.replace("max_steps: 6", "max_steps: 1"));
    smore(folder, &["train", "run.yaml"]).assert().success();
    std::fs::create_dir(folder.join("other")).unwrap();
    for entry in std::fs::read_dir(base()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join("other").join(entry.file_name())).unwrap();
    }
    let file = folder.join("other/config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replacen('{', "{\"note\": 1,", 1)).unwrap();
    let (code, json) = findings(folder, &["--model", "other", "--adapter", "run/adapter"]);
    assert_eq!(code, 0, "{json}");
    let warning = of(&json, "warning")[0]["message"].to_string();
    assert!(warning.contains("whose config.json is not that of other"), "{warning}");
}
