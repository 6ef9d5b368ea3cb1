//! A run on the demo's base, for tests of the program.

#![allow(dead_code, reason = "every test binary uses its own part")]

use assert_cmd::Command;
use std::path::{Path, PathBuf};

pub(crate) fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-base")
}

pub(crate) fn smore(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("smore").unwrap();
    command.current_dir(folder).args(args);
    command
}

/// Writes a data file and a config that `change` may spoil.
pub(crate) fn write_run(folder: &Path, name: &str, change: impl Fn(String) -> String) {
    let line = |i: usize| {
        format!("{{\"instruction\": \"Order {i} of the press\", \"output\": \"order {i}\"}}\n")
    };
    std::fs::write(folder.join("data.jsonl"), (0..40).map(line).collect::<String>()).unwrap();
    let config = format!(
        "model: {}
adapter:
  kind: smore
  targets: [gate_proj, up_proj, down_proj]
  layers:
    - {{experts: 4, fanout: 2, rank: 2}}
    - {{experts: 4, fanout: 2, rank: 2}}
  gate: {{kind: switch, balance_weight: 0.01, router_width: 8, router_input_width: 8, activation: relu}}
  activation: tanh
  init: w_final_zero
data:
  train: [{{path: data.jsonl}}]
  validation: {{fraction: 0.1}}
  max_samples: null
  cutoff_len: 64
train: {{learning_rate: 1.0e-2, num_train_epochs: 1, max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, lr_scheduler_type: cosine, warmup_ratio: 0.1, max_grad_norm: 1.0, save_steps: 3, eval_steps: 3, seed: 42}}
output_dir: {name}
",
        base().display()
    );
    std::fs::write(folder.join(format!("{name}.yaml")), change(config)).unwrap();
}

pub(crate) fn as_is(config: String) -> String {
    config
}

/// A change of the run's adapter section.
pub(crate) fn adapter(section: &str) -> impl Fn(String) -> String {
    move |config| {
        let (head, rest) = config.split_once("adapter:").unwrap();
        let (_, tail) = rest.split_once("data:").unwrap();
        format!("{head}adapter: {section}\ndata:{tail}")
    }
}

/// What a command says that must fail as a user's mistake.
pub(crate) fn refused(folder: &Path, args: &[&str]) -> String {
    let output = smore(folder, args).assert().code(2).get_output().clone();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("error: ") && !said.contains("panicked"), "{said}");
    said
}
