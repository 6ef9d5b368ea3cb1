//! `smore reproduce paper` on sets of a few records: the files it writes, the searches it runs, the
//! table it ends with, and that a second call does nothing again.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

fn smore(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("smore").unwrap();
    let output = command.current_dir(folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn put(folder: &Path, file: &str, lines: impl IntoIterator<Item = String>) {
    let path = folder.join("data").join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, lines.into_iter().collect::<Vec<_>>().join("\n")).unwrap();
}

fn choice(i: usize) -> String {
    let (right, label) = if i.is_multiple_of(2) { ("this", "A") } else { ("that", "B") };
    format!(
        r#"{{"question": {{"stem": "Which is number {i}, {right}?", "choices": [{{"label": "A", "text": "this"}}, {{"label": "B", "text": "that"}}]}}, "answerKey": "{label}"}}"#
    )
}

fn sum(i: usize) -> String {
    format!(r#"{{"question": "{i} + 1?", "answer": "One more than {i}.\n#### {}"}}"#, i + 1)
}

#[test]
fn every_method_is_searched_and_its_winner_asked() {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo-base");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    put(folder, "ARC-Easy/train.jsonl", (0..20).map(choice));
    put(folder, "ARC-Easy/test.jsonl", (20..26).map(choice));
    put(folder, "gsm8k/train.jsonl", (0..20).map(sum));
    put(folder, "gsm8k/test.jsonl", (20..23).map(sum));
    let mut args = vec!["reproduce", "paper", "--model", base, "--data", "data", "--output", "out"];
    args.extend(["--budget", "26K", "--max-steps", "2", "--limit", "4"]);

    let (code, out, err) = smore(folder, &[&args[..], &["--list"]].concat());
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("winogrande is left out") && out.contains("runs in all"), "{out}{err}");
    let run = std::fs::read_to_string(folder.join("out/arc_easy/run.yaml")).unwrap();
    assert!(run.contains("num_train_epochs: 2") && run.contains("max_steps: 2"), "{run}");
    let lessons = std::fs::read_to_string(folder.join("out/arc_easy/train.jsonl")).unwrap();
    assert_eq!(lessons.lines().count(), 20);
    assert!(lessons.contains("Please choose the correct answer to the question"));

    args.push("--json");
    let (code, out, err) = smore(folder, &args);
    assert_eq!(code, 0, "{err}");
    let table: Value = serde_json::from_str(&out).unwrap();
    let cells = table["cells"].as_array().unwrap();
    for task in ["arc_easy", "gsm8k"] {
        let of_task: Vec<&Value> = cells.iter().filter(|c| c["task"] == task).collect();
        assert!(of_task[0]["method"].is_null() && of_task.len() >= 3, "{of_task:?}");
        assert!(of_task.iter().any(|c| c["method"] == "lora"));
        for cell in of_task {
            let accuracy = cell["accuracy"].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&accuracy));
            assert!(cell["parameters"].as_u64().unwrap() <= 26_000);
            assert_eq!(cell["questions"], if task == "gsm8k" { 3 } else { 4 });
            assert_eq!(cell["method"].is_null(), cell["paired"].is_null());
        }
    }
    let page = std::fs::read_to_string(folder.join("out/report.html")).unwrap();
    assert!(page.contains("What was chosen") && page.contains("arc_easy"));

    let (code, again, err) = smore(folder, &args);
    assert_eq!(code, 0, "{err}");
    assert_eq!(again, out, "a finished study is told again");

    // A search over S'MoRE, in a folder of its own.
    let mut args = vec!["reproduce", "paper", "--model", base, "--data", "data", "--output", "two"];
    args.extend(["--budget", "170K", "--max-steps", "1", "--limit", "2", "--json"]);
    args.extend(["--task", "arc_easy", "--method", "smore", "--seed", "1", "--seed", "2"]);
    let (code, out, err) = smore(folder, &args);
    assert_eq!(code, 0, "{err}");
    let table: Value = serde_json::from_str(&out).unwrap();
    let cell = &table["cells"][1];
    assert_eq!((&cell["method"], &cell["seeds"]), (&"smore".into(), &2.into()));
    assert!(cell["winner"].as_str().unwrap().contains("smore"), "{cell}");

    let (code, _, err) = smore(folder, &[&args[..], &["--task", "winogrande"]].concat());
    assert!(code == 2 && err.contains("data/winogrande"), "{err}");
}
