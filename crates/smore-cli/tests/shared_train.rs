//! Training on a real tiny Llama and real text, in the folder that `SMORE_SHARED` names. Run by
//! `cargo xtask parity`.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

use assert_cmd::Command;
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
    let json: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
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
