//! Adapters to and from the Python packages that users know: PEFT, and the formats of the authors,
//! MoE-PEFT and HydraLoRA. Needs Python and gigabytes of torch, so it is no part of CI; some of its
//! cases are recorded in `crates/smore-tune/tests/recorded/adapters`.

use crate::{DEMO_BASE, cargo, python};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OUT: &str = "target/ecosystem";
const CASES: &str = "target/ecosystem/cases/";
const SCRIPTS: &str = "xtask/python/ecosystem";
const REQUIREMENTS: &str = "xtask/python/requirements.txt";
const RECORDED: &str = "crates/smore-tune/tests/recorded";
const FAMILIES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gemma2"];

/// LoRAs of every shape that PEFT has a key for.
const LORAS: [(&str, &str); 5] = [
    ("plain", "{kind: lora, rank: 3, alpha: 5}"),
    ("rslora", "{kind: lora, rank: 3, alpha: 2, rslora: true, targets: [o_proj, gate_proj]}"),
    (
        "patterns",
        "{kind: lora, rank: 2, targets: all-linear, rank_pattern: {'1\\.mlp\\.up_proj': 4, k_proj: 3}, \
         alpha_pattern: {down_proj: 7.5, '0\\..*v_proj': 1}}",
    ),
    ("all_linear", "{kind: lora, rank: 2, alpha: 3, targets: all-linear}"),
    (
        "q_and_v",
        "{kind: lora, rank: 2, targets: {modules: [q_proj, v_proj], exclude: '.*1.*q_proj', \
         blocks: [0, 1]}}",
    ),
];

/// S'MoREs that differ in which tensors they have.
const SMORES: [(&str, &str); 6] = [
    ("switch", "{layers: [{experts: 4, fanout: 2, rank: 2}, {experts: 3, fanout: 2, rank: 4}]}"),
    (
        "dense_prelu",
        "{layers: [{experts: 2, fanout: 2, rank: 2, lora_alpha: 3}, {experts: 3, fanout: 3, rank: \
         2}], gate: {kind: dense, activation: prelu|0.25}, activation: prelu|0.5}",
    ),
    (
        "noisy",
        "{layers: [{experts: 4, fanout: 2, rank: 2}, {experts: 4, fanout: 2, rank: 2}], gate: \
         {kind: noisy_topk, router_width: 6}}",
    ),
    (
        "shared_pool",
        "{layers: [{experts: 4, fanout: 2, rank: 2}, {experts: 4, fanout: 1, rank: 2}], \
         shared_pool: true, targets: [q_proj, down_proj]}",
    ),
    (
        "linear",
        "{layers: [{experts: 4, fanout: 2, rank: 2}], gate: {architecture: linear, \
         router_input_width: 0}}",
    ),
    (
        "three_layers",
        "{layers: [{experts: 2, fanout: 1, rank: 1}, {experts: 3, fanout: 2, rank: 2}, {experts: 2, \
         fanout: 1, rank: 3}], targets: [v_proj, up_proj], activation_position: child}",
    ),
];

/// Runs all of it; the figures are printed and kept in `target/ecosystem`.
pub(crate) fn ecosystem() -> Result<()> {
    let tools = Tools::new()?;
    for part in ["cases", "refused", "runs", "smore", "again"] {
        let folder = Path::new(OUT).join(part);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
    }
    println!("\n--- LoRAs from smore, in PEFT");
    for (name, section) in LORAS {
        tools.train(name, section, "cases/lora_out")?;
        for family in FAMILIES {
            tools.draw(&format!("{family}__{name}"), section, family, "cases/lora_out")?;
        }
    }
    tools.python("lora_out.py", &["cases/lora_out"])?;
    println!("\n--- LoRAs from PEFT, in smore");
    tools.python("lora_in.py", &["cases/lora_in", "refused"])?;
    println!("\n--- MoE-PEFT's and HydraLoRA's adapters, in smore");
    tools.python("mixtures.py", &["cases/mixtures", "refused"])?;
    tools.verify()?;
    tools.refuse()?;
    println!("\n--- S'MoREs from smore, by the authors' rules");
    tools.official()?;
    println!("\necosystem: all passed");
    Ok(())
}

struct Tools {
    python: PathBuf,
    smore: PathBuf,
    adapters: PathBuf,
}

impl Tools {
    fn new() -> Result<Self> {
        let python = python(&Path::new(OUT).join("venv"), REQUIREMENTS)?;
        cargo(&["build", "--release", "-p", "smore-cli"], &[])?;
        cargo(&["build", "--release", "-p", "smore-tune", "--example", "adapters"], &[])?;
        let built = PathBuf::from("target/release");
        Ok(Self { python, smore: built.join("smore"), adapters: built.join("examples/adapters") })
    }

    /// Runs a script with arguments that are folders in [`OUT`].
    fn python(&self, script: &str, folders: &[&str]) -> Result<()> {
        let folders = folders.iter().map(|f| Path::new(OUT).join(f));
        // Some warnings are made errors by the scripts; all others are about these versions.
        let mut command = Command::new(&self.python);
        succeed(command.args(["-W", "ignore"]).arg(Path::new(SCRIPTS).join(script)).args(folders))
    }

    /// Trains an adapter on the demo's base, which is stored in bf16, for a few steps.
    fn train(&self, name: &str, adapter: &str, into: &str) -> Result<()> {
        let runs = Path::new(OUT).join("runs");
        let line =
            |i: usize| format!("{{\"prompt\": \"Order {i}\", \"completion\": \"{i} {i}\"}}\n");
        fs::write(runs.join("data.jsonl"), (0..24).map(line).collect::<String>())?;
        let file = runs.join(format!("{name}.yaml"));
        let config = format!(
            "model: {}\nadapter: {adapter}\ndata: {{train: [{{path: {}}}]}}\noutput_dir: {}\n\
             train: {{learning_rate: 0.01, max_steps: 6, gradient_accumulation_steps: 2, \
             lr_scheduler_type: constant}}\n",
            fs::canonicalize(DEMO_BASE)?.display(),
            runs.join("data.jsonl").display(),
            runs.join(name).display(),
        );
        fs::write(&file, config)?;
        succeed(Command::new(&self.smore).arg("train").arg(&file))?;
        copy(&runs.join(name).join("adapter"), &Path::new(OUT).join(into).join(name))
    }

    /// An adapter with drawn values on a recorded base, which has no tokenizer to train with.
    fn draw(&self, name: &str, adapter: &str, family: &str, into: &str) -> Result<()> {
        let file = Path::new(OUT).join("runs").join(format!("{name}.yaml"));
        fs::write(&file, adapter)?;
        let base = fs::canonicalize(Path::new(RECORDED).join(family))?;
        let out = Path::new(OUT).join(into).join(name);
        succeed(Command::new(&self.adapters).arg("random").args([&file, &base, &out]))
    }

    /// `smore verify` on all cases, with the largest difference of logits of each.
    fn verify(&self) -> Result<()> {
        let output = Command::new(&self.smore).args(["verify", CASES, "--json"]).output()?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        println!("\n--- what smore computes of all of them: largest differences");
        println!("{:42} {:>8} {:>10}", "case", "logits", "gradients");
        for case in report["cases"].as_array().context("no list of cases")? {
            let checks = case["checks"].as_array().map_or(&[][..], Vec::as_slice);
            let logits = checks.iter().find(|c| c["tensor"] == "logits").map(|c| &c["error"]);
            let name = case["case"].as_str().unwrap_or("?").trim_start_matches(CASES);
            let (logits, gradients) = (figure(logits), figure(case.get("gradients")));
            let miss = if case["passed"] == true { "" } else { "  MISS" };
            println!("{name:42} {logits:>8} {gradients:>10}{miss}");
            if let Some(error) = case["error"].as_str() {
                println!("      {error}");
            }
        }
        println!("{} passed, {} failed", report["passed"], report["failed"]);
        ensure!(output.status.success(), "smore computes something else than Python");
        Ok(())
    }

    /// Every folder in `refused` is called after a key that must be named, `__` and details.
    fn refuse(&self) -> Result<()> {
        println!("\n--- refused");
        for folder in folders(&Path::new(OUT).join("refused"))? {
            let name = name_of(&folder);
            let key = name.split("__").next().unwrap_or(&name);
            let output = Command::new(&self.smore).arg("verify").arg(&folder).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            // The folder is called after the key: only what follows its path may name it.
            let reason = said.trim().split_once(".json: ").map_or("", |(_, reason)| reason);
            let refused = output.status.code() == Some(2) && reason.contains(key);
            ensure!(refused, "{name} was not refused for its key: {} {said}", output.status);
            println!("{name:34} {reason}");
        }
        Ok(())
    }

    /// S'MoREs trained and drawn here and, where they are, the recorded official ones, by the
    /// authors' rules; and each read and written again.
    fn official(&self) -> Result<()> {
        for (name, section) in SMORES {
            let section = section.replacen('{', "{kind: smore, ", 1);
            self.train(name, &section, "smore")?;
            for family in FAMILIES {
                self.draw(&format!("{family}__{name}"), &section, family, "smore")?;
            }
        }
        let mut adapters = folders(&Path::new(OUT).join("smore"))?;
        let recorded = Path::new("../shared/fixtures/e2e");
        if recorded.is_dir() {
            let is_smore = |folder: &PathBuf| {
                fs::read_to_string(folder.join("adapter_config.json"))
                    .is_ok_and(|config| config.contains("HIER_MOE"))
            };
            adapters.extend(folders(recorded)?.into_iter().filter(is_smore));
        } else {
            println!("skipped: the official adapters; there is no folder ../shared");
        }
        let script = Path::new(SCRIPTS).join("official_names.py");
        succeed(Command::new(&self.python).arg(&script).args(&adapters))?;
        for adapter in adapters {
            let config = fs::read_to_string(adapter.join("adapter_config.json"))?;
            let config: Value = serde_json::from_str(&config)?;
            let base = config["base_model_name_or_path"].as_str().context("no base")?;
            let base = adapter.join(base);
            let again = Path::new(OUT).join("again").join(name_of(&adapter));
            succeed(Command::new(&self.adapters).arg("resave").args([&adapter, &base, &again]))?;
            succeed(
                Command::new(&self.python).arg(&script).arg("--same").args([&adapter, &again]),
            )?;
        }
        Ok(())
    }
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?} gave {status}");
    Ok(())
}

fn folders(above: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(above)? {
        folders.push(entry?.path());
    }
    folders.retain(|f| f.is_dir());
    folders.sort();
    ensure!(!folders.is_empty(), "{} is empty", above.display());
    Ok(folders)
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn figure(value: Option<&Value>) -> String {
    value.and_then(Value::as_f64).map_or_else(|| "-".into(), |x| format!("{x:.1e}"))
}
