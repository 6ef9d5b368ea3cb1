//! Event files of a run, read by TensorBoard itself. Needs Python, so it is no part of CI.

use crate::{DEMO_BASE, cargo, python};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;

const OUT: &str = "target/tensorboard";
const REQUIREMENTS: &str = "xtask/python/tensorboard.txt";

/// Trains a little; every value of `metrics.jsonl` must be found.
pub(crate) fn tensorboard() -> Result<()> {
    let out = Path::new(OUT);
    fs::create_dir_all(out)?;
    let python = python(&out.join("venv"), REQUIREMENTS)?;
    let run = out.join("run");
    if run.exists() {
        fs::remove_dir_all(&run)?;
    }
    let line =
        |i: usize| format!("{{\"instruction\": \"Order {i}\", \"output\": \"order {i}\"}}\n");
    fs::write(out.join("data.jsonl"), (0..40).map(line).collect::<String>())?;
    let config = out.join("run.yaml");
    let text = format!(
        "model: {DEMO_BASE}\nadapter: {{kind: lora, rank: 2}}\ndata: {{train: [{{path: \
         {OUT}/data.jsonl}}], cutoff_len: 64}}\ntrain: {{max_steps: 12, eval_steps: 4}}\n\
         output_dir: {OUT}/run\n"
    );
    fs::write(&config, text)?;
    let config = config.to_str().context("path is not UTF-8")?;
    cargo(&["run", "--quiet", "--", "train", config], &[])?;
    let status = Command::new(python).arg("xtask/python/check_events.py").arg(&run).status()?;
    ensure!(status.success(), "TensorBoard's reader finds something else than metrics.jsonl has");
    Ok(())
}
