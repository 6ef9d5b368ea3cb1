//! Log-likelihoods of the real sets' choices, computed again by transformers. Needs Python and
//! ../shared, so it is no part of CI.

use crate::{cargo, python, root};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OUT: &str = "target/eval-peer";
const REQUIREMENTS: &str = "xtask/python/eval.txt";
const SETS: [(&str, &str); 8] = [
    ("commonsense_qa", "commonsenseqa/dev_rand_split.jsonl"),
    ("winogrande", "winogrande/dev.jsonl"),
    ("arc_challenge", "llm-adapters/ARC-Challenge/test.json"),
    ("arc_easy", "llm-adapters/ARC-Easy/test.json"),
    ("openbookqa", "llm-adapters/openbookqa/test.json"),
    ("piqa", "llm-adapters/piqa/test.json"),
    ("social_iqa", "llm-adapters/social_i_qa/test.json"),
    ("boolq", "llm-adapters/boolq/test.json"),
];

/// Longest part of a question, in bytes, of which this model's 512 tokens hold any: a choice that is
/// longer is refused, as lm-evaluation-harness refuses it.
const LONGEST_PART: usize = 500;

/// Evaluates every set whole, but for PIQA's few questions with a choice that the model cannot take; transformers scores the first `limit` samples of each.
pub(crate) fn eval_peer(limit: usize) -> Result<()> {
    let out = Path::new(OUT);
    fs::create_dir_all(out)?;
    let python = python(&out.join("venv"), REQUIREMENTS)?;
    let data = root().join("../shared/data");
    ensure!(data.is_dir(), "no folder ../shared/data beside the checkout");
    let model = data.join("models/stories260K");
    let model = model.to_str().context("path is not UTF-8")?;
    let mut sets = Vec::new();
    for (task, file) in SETS {
        let mut file = data.join("datasets").join(file);
        if task == "piqa" {
            file = short_enough(&file, out)?;
        }
        let file = file.to_str().context("path is not UTF-8")?;
        let folder = format!("{OUT}/{task}");
        if Path::new(&folder).exists() {
            fs::remove_dir_all(&folder)?;
        }
        let args = ["run", "--quiet", "--", "eval", "--task", task, "--data", file];
        let more = ["--model", model, "--protocol", "loglikelihood", "--output", &folder];
        cargo(&[&args[..], &more[..]].concat(), &[])?;
        sets.push(format!("{task}={file}"));
    }
    let mut command = Command::new(python);
    command.args(["xtask/python/check_eval.py", model, OUT, &limit.to_string()]).args(&sets);
    ensure!(command.status()?.success(), "transformers scores the choices differently");
    Ok(())
}

/// The set without the questions of which a part is too long, as a file in `out`.
fn short_enough(file: &Path, out: &Path) -> Result<PathBuf> {
    let mut records: Vec<Value> = serde_json::from_str(&fs::read_to_string(file)?)?;
    let all = records.len();
    records.retain(|record| {
        let parts = record["instruction"].as_str().unwrap_or_default().split("\n\n");
        parts.map(str::len).max() <= Some(LONGEST_PART)
    });
    println!("{}: {} of {all} records are short enough", file.display(), records.len());
    let short = out.join("piqa.json");
    fs::write(&short, serde_json::to_string(&records)?)?;
    Ok(short)
}
