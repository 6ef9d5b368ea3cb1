//! `smore reproduce pilot` as a user runs it, on very few samples.

mod workplace;

use serde_json::Value;
use workplace::{refused, smore};

/// Two workers and a stopped study give the figures of a whole one: what a stopped one leaves is a
/// shorter `trials.jsonl`.
#[test]
fn a_study_ends_with_a_page_and_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let args = "reproduce pilot --quick --family pairs --samples 16 --questions 4 --seeds 2 --json";
    let args: Vec<&str> = args.split(' ').collect();
    let run = || -> Value {
        let output = smore(dir.path(), &args).assert().success().get_output().stdout.clone();
        serde_json::from_slice(&output).unwrap()
    };
    let whole = run();
    assert_eq!(whole["rows"].as_array().unwrap().len(), 5);
    for size in whole["parameters"].as_array().unwrap() {
        let n = size[1].as_f64().unwrap();
        assert!((n / 264_960.0 - 1.0).abs() <= 0.02, "{size}");
    }
    let folder = dir.path().join("runs/pilot");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    assert!(read("report.html").contains("Does structure help?"));
    assert!(read("verdict.md").contains("| S'MoRE, 2 layers |"));
    let trials = read("trials.jsonl");
    assert_eq!(trials.lines().count(), 20);
    let kept = trials.lines().take(18).collect::<Vec<_>>().join("\n") + "\n";
    std::fs::write(folder.join("trials.jsonl"), kept).unwrap();
    let again = run();
    for (a, b) in whole["rows"].as_array().unwrap().iter().zip(again["rows"].as_array().unwrap()) {
        for key in ["contender", "learning_rate", "accuracy", "loss", "loss_over_lora"] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    let args = "reproduce pilot --quick --family desk --samples 16 --questions 4 --seeds 2 \
                --learning-rate 5e-3 --output other --json";
    let args: Vec<&str> = args.split_whitespace().collect();
    let output = smore(dir.path(), &args).assert().success().get_output().stdout.clone();
    let other: Value = serde_json::from_slice(&output).unwrap();
    assert!(other["rows"].as_array().unwrap().iter().all(|row| row["learning_rate"] == 5e-3));
    let said = refused(dir.path(), &["reproduce", "pilot"]);
    assert!(said.contains("choose another folder"), "{said}");
    let wrong = ["reproduce", "pilot", "--family", "pears"];
    let said = smore(dir.path(), &wrong).assert().code(2).get_output().stderr.clone();
    assert!(String::from_utf8(said).unwrap().contains("expected one of desk, pairs, branch"));
}
