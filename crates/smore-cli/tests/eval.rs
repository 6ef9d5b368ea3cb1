//! `smore eval` and `smore compare` as a user runs them, on the demo's base.

mod workplace;

use serde_json::Value;
use std::fs;
use std::path::Path;
use workplace::{as_is, base, refused, smore, write_run};

fn write_sets(folder: &Path) {
    let line = |i: usize| {
        format!(
            "{{\"id\": \"{i}\", \"question\": {{\"stem\": \"Which press is number {i}?\", \
             \"choices\": [{{\"label\": \"A\", \"text\": \"press {i}\"}}, {{\"label\": \"B\", \
             \"text\": \"lathe\"}}]}}, \"answerKey\": \"{}\"}}\n",
            if i.is_multiple_of(3) { "B" } else { "A" }
        )
    };
    fs::write(folder.join("arc.jsonl"), (0..12).map(line).collect::<String>()).unwrap();
    let line = |i: usize| {
        format!("{{\"q\": \"Order {i}\", \"options\": [\"one\", \"two\", \"three\"], \"a\": 1}}\n")
    };
    fs::write(folder.join("own.jsonl"), (0..5).map(line).collect::<String>()).unwrap();
    let task = "name: own\nprompt: \"Question: {q}\\nAnswer:\"\nchoices: [options]\nanswer: a\n";
    fs::write(folder.join("own.yaml"), task).unwrap();
}

fn eval(folder: &Path, more: &[&str]) -> Value {
    let base = base();
    let mut args = vec!["eval", "--model", base.to_str().unwrap(), "--json"];
    args.extend(more);
    let output = smore(folder, &args).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

#[test]
fn an_adapter_is_paired_with_its_base_and_a_killed_evaluation_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_sets(folder);
    write_run(folder, "run", as_is);
    smore(folder, &["train", "run.yaml"]).assert().success();
    let arc = ["--task", "ARC-Easy", "--data", "arc.jsonl"];
    let with = ["--adapter", "run/adapter", "--output", "run/eval"];
    let first = eval(folder, &[&arc[..], &with[..]].concat());
    assert_eq!(first["protocol"], "loglikelihood");
    assert_eq!(first["samples"], 12);
    assert_eq!(first["paired"]["acc,none"]["pair"]["samples"], 12);
    let results = fs::read_to_string(folder.join("run/eval/base/results.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    assert!(results["results"]["arc_easy"]["acc_norm_stderr,none"].is_number(), "{results}");
    assert_eq!(results["configs"]["arc_easy"]["protocol"], "loglikelihood");

    // Cut in the middle of the sixth line, as by a kill.
    let file = folder.join("run/eval/adapter/samples_arc_easy.jsonl");
    let whole = fs::read_to_string(&file).unwrap();
    let keep: usize = whole.lines().take(5).map(|l| l.len() + 1).sum();
    fs::write(&file, &whole[..keep + 20]).unwrap();
    assert_eq!(eval(folder, &[&arc[..], &with[..]].concat()), first);
    // Samples that share a batch with others differ by rounding.
    let again = fs::read_to_string(&file).unwrap();
    assert_eq!(again.lines().count(), 12);
    for (a, b) in again.lines().zip(whole.lines()) {
        let (mut a, mut b): (Value, Value) =
            (serde_json::from_str(a).unwrap(), serde_json::from_str(b).unwrap());
        let scores = |x: &mut Value| -> Vec<f64> {
            let scores = x["resps"].take();
            scores.as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect()
        };
        let (own, expected) = (scores(&mut a), scores(&mut b));
        assert!(own.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-4), "{own:?}");
        assert_eq!(a, b);
    }

    // The other protocol is another evaluation.
    let base = base();
    let other = ["--protocol", "generation", "--model", base.to_str().unwrap()];
    let said = refused(folder, &[&["eval"], &arc[..], &with[..], &other[..]].concat());
    assert!(said.contains("name another --output"), "{said}");

    let compare = ["compare", "run", "run/eval/base", "--json", "--html", "page.html"];
    let output = smore(folder, &compare).assert().success().get_output().stdout.clone();
    let found: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(found["subjects"][0]["kind"], "smore");
    assert!(found["subjects"][0]["flops_per_token"].as_u64().unwrap() > 0, "{found}");
    let pair = &found["pairs"][0]["tasks"][0];
    let there = &first["paired"]["acc,none"]["pair"];
    assert_eq!((&pair["first"], &pair["second"]), (&there["second"], &there["first"]));
    assert!(fs::read_to_string(folder.join("page.html")).unwrap().contains("arc_easy"));
}

#[test]
fn users_sets_and_both_protocols_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_sets(folder);
    let own = ["--task", "own.yaml", "--data", "own.jsonl", "--limit", "4"];
    let scored = eval(folder, &[&own[..], &["--output", "a"]].concat());
    assert_eq!((&scored["task"], &scored["samples"]), (&"own".into(), &4.into()));
    let written = ["--output", "b", "--protocol", "generation"];
    let written = eval(folder, &[&own[..], &written[..]].concat());
    assert_eq!(written["protocol"], "generation");
    let samples = fs::read_to_string(folder.join("b/base/samples_own.jsonl")).unwrap();
    assert!(samples.contains("(A) one  (B) two  (C) three"), "{samples}");
    assert_eq!(samples.lines().count(), 4);
    // More samples than before: the first four are not asked again.
    let more = ["--task", "own.yaml", "--data", "own.jsonl", "--output", "a"];
    assert_eq!(eval(folder, &more)["samples"], 5);
}

#[test]
fn what_cannot_be_scored_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_sets(folder);
    let base = base();
    let say = |more: &[&str]| {
        let model = ["eval", "--model", base.to_str().unwrap()];
        refused(folder, &[&model[..], more].concat())
    };
    let said = say(&["--task", "arc_eazy", "--data", "arc.jsonl"]);
    assert!(said.contains("did you mean arc_easy?"), "{said}");
    let said = say(&["--task", "piqa", "--data", "arc.jsonl"]);
    assert!(said.contains("arc.jsonl:1: field `goal` is missing"), "{said}");
    fs::write(folder.join("g.jsonl"), "{\"question\": \"1+1?\", \"answer\": \"#### 2\"}\n")
        .unwrap();
    let said = say(&["--task", "gsm8k", "--data", "g.jsonl", "--protocol", "loglikelihood"]);
    assert!(said.contains("use generation"), "{said}");
}
