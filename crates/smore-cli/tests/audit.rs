//! `smore generate --audit` and `smore audit verify`, each in a process of its own.

mod workplace;

use serde_json::Value;
use std::path::Path;
use workplace::{as_is, base, refused, smore, write_run};

fn generate(folder: &Path, prompt: &str, extra: &[&str]) -> (String, String) {
    let base = base();
    let args = ["generate", "--model", base.to_str().unwrap(), "--adapter", "run/adapter"];
    let rest = ["--prompt", prompt, "--max-new-tokens", "12", "--audit", "log.jsonl"];
    let output = smore(folder, &[&args[..], &rest, extra].concat()).assert().success();
    let output = output.get_output();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

fn verify(folder: &Path, code: i32, extra: &[&str]) -> Value {
    let args = ["audit", "verify", "log.jsonl", "--json"];
    let run = smore(folder, &[&args[..], extra].concat()).assert().code(code);
    serde_json::from_slice(&run.get_output().stdout).unwrap()
}

#[test]
fn every_honest_record_reproduces_and_tampering_shows() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", as_is);
    write_run(folder, "other", |c| c.replace("seed: 42", "seed: 7"));
    for name in ["run", "other"] {
        smore(folder, &["train", &format!("{name}.yaml")]).assert().success();
    }
    let base = base();
    let model = ["--model", base.to_str().unwrap(), "--adapter", "run/adapter"];
    generate(folder, "Order 17 of the", &["--audit-text"]);
    generate(folder, "Order 17 of the", &["--audit-text", "--temperature", "1", "--seed", "5"]);
    generate(folder, "The pump", &["--audit-text", "--chat", "--top-k", "3", "--temperature", "2"]);
    let (said, noted) = generate(folder, "Secret", &[]);
    let log = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    let last = log.lines().last().unwrap();
    assert!(!last.contains("Secret") && !last.contains(said.trim()) && log.contains("The pump"));

    let whole = verify(folder, 0, &model);
    let outcomes: Vec<&str> =
        (0..4).map(|i| whole["checked"][i]["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["reproduced", "reproduced", "reproduced", "not_rerun"]);
    let given = verify(folder, 0, &[&model[..], &["--prompt", "Secret"]].concat());
    assert_eq!(given["checked"][3]["outcome"], "reproduced");
    let wrong = verify(folder, 1, &["--model", model[1], "--adapter", "other/adapter"]);
    let why = wrong["checked"][0]["why"].as_str().unwrap();
    assert!(why.contains("adapter_model.safetensors"), "{why}");

    // The head that was noted shows a missing end.
    let head = noted.trim().rsplit(' ').next().unwrap();
    assert_eq!(whole["head"]["hash"], head);
    verify(folder, 0, &["--head", head]);
    let lines: Vec<&str> = log.split_inclusive('\n').collect();
    let write = |text: &str| std::fs::write(folder.join("log.jsonl"), text).unwrap();
    write(&lines[..3].concat());
    verify(folder, 0, &[]);
    verify(folder, 1, &["--head", head]);
    // One flipped byte, a removed record, reordered ones, half a line.
    let place = |text: &str| {
        write(text);
        verify(folder, 1, &[])["faults"][0]["line"].as_u64().unwrap()
    };
    assert_eq!(place(&log.replacen("pump", "pumq", 1)), 3);
    assert_eq!(place(&[lines[0], lines[2], lines[3]].concat()), 2);
    assert_eq!(place(&[lines[0], lines[2], lines[1], lines[3]].concat()), 2);
    assert_eq!(place(&log[..log.len() - 9]), 4);
    let args = ["generate", "--model", model[1], "--prompt", "x", "--audit", "log.jsonl"];
    let run = smore(folder, &args).assert().code(1).stdout("").get_output().clone();
    assert!(String::from_utf8(run.stderr).unwrap().contains("half a line"));
    let said = refused(folder, &["audit", "verify", "none.jsonl"]);
    assert!(said.contains("none.jsonl: not found"), "{said}");
}

/// A record that lies about its output, with hashes made to fit, is found by deriving it again.
#[test]
fn a_forged_record_does_not_reproduce() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", as_is);
    smore(folder, &["train", "run.yaml"]).assert().success();
    generate(folder, "Order 17 of the", &["--audit-text"]);
    let log = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    let (body, _) = log.trim_end().rsplit_once(",\"hash\":\"").unwrap();
    let seed = body
        .replace("\"seed\":42", "\"seed\":43")
        .replace("\"temperature\":0.0", "\"temperature\":3.0");
    assert_ne!(seed, body);
    let hash = smore_tune::audit::text_hash(&seed);
    let forged = format!("{seed},\"hash\":\"{hash}\"}}\n");
    std::fs::write(folder.join("log.jsonl"), forged).unwrap();
    let base = base();
    let model = ["--model", base.to_str().unwrap(), "--adapter", "run/adapter"];
    let found = verify(folder, 1, &model);
    assert_eq!(found["faults"].as_array().unwrap().len(), 0);
    assert_eq!(found["checked"][0]["outcome"], "not_reproduced");
}
