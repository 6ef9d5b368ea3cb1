//! What CI runs, and how the demo's base model is made: `cargo xtask --help`.

// Its output is its purpose.
#![allow(clippy::print_stdout)]

mod ecosystem;
mod eval_peer;
mod pages;
mod tensorboard;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Checks, tests and builds of this workspace.
#[derive(Parser, Clone, PartialEq, Eq, Debug)]
#[command(name = "cargo xtask")]
enum Task {
    /// Everything CI does, cheapest first
    Ci,
    /// Formatting
    Fmt,
    /// Lints, warnings are errors
    Clippy,
    /// Documentation, warnings are errors
    Docs,
    /// Licences, duplicates and sources of the dependencies
    Deny,
    /// All tests
    Test,
    /// Comparison with recorded tensors and real models in ../shared
    Parity,
    /// The README's first command, and whether S'MoRE learned what the base could not
    Demo,
    /// Pre-train the demo's base model anew and put it in its place
    DemoBase,
    /// Adapters to and from PEFT and other Python packages; not in `ci`, since it installs
    /// gigabytes of torch (or takes the Python that SMORE_PYTHON names)
    Ecosystem,
    /// Every page of the program in headless Chromium, on a desk and on a phone, light and dark; not
    /// in `ci`, since it needs the browser
    Pages,
    /// Event files of a run read by TensorBoard; not in `ci`, since it installs TensorBoard (or takes
    /// the Python that SMORE_PYTHON names)
    Tensorboard,
    /// Log-likelihoods of `smore eval` on the real sets against transformers; not in `ci`, since it
    /// installs torch (or takes the Python that SMORE_PYTHON names)
    EvalPeer {
        /// Samples of each set that transformers scores
        #[arg(long, default_value_t = usize::MAX >> 1)]
        limit: usize,
    },
    /// Speed and memory as ratios, against PyTorch with `--peer`: `cargo xtask bench --help`
    #[command(disable_help_flag = true)]
    Bench {
        /// Handed on to the program in bench/
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// The demo's base model.
const DEMO_BASE: &str = "crates/smore-cli/assets/demo-base";

const CI: [Task; 7] =
    [Task::Fmt, Task::Clippy, Task::Docs, Task::Deny, Task::Test, Task::Parity, Task::Demo];

fn main() -> Result<()> {
    std::env::set_current_dir(root())?;
    match Task::parse() {
        Task::Ci => ci(),
        task => run(task),
    }
}

fn ci() -> Result<()> {
    let mut summary = Vec::new();
    for task in CI {
        println!("\n=== {task:?}");
        let start = Instant::now();
        let result = run(task.clone());
        let seconds = start.elapsed().as_secs_f64();
        let verdict = if result.is_ok() { "passed" } else { "failed" };
        println!("=== {task:?} {verdict} in {seconds:.1} s");
        summary.push(format!("{task:?} {seconds:.1} s"));
        result.with_context(|| format!("step {task:?} failed ({})", summary.join(", ")))?;
    }
    println!("\nci: all passed ({})", summary.join(", "));
    Ok(())
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Ci => ci(),
        Task::Fmt => cargo(&["fmt", "--all", "--check"], &[]),
        Task::Clippy => {
            cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])
        }
        Task::Docs => {
            cargo(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])
        }
        Task::Deny => deny(),
        Task::Test => cargo(&["test", "--workspace"], &[]),
        Task::Parity => parity(),
        Task::Demo => demo(),
        Task::DemoBase => demo_base(),
        Task::Ecosystem => ecosystem::ecosystem(),
        Task::Pages => pages::pages(),
        Task::Tensorboard => tensorboard::tensorboard(),
        Task::EvalPeer { limit } => eval_peer::eval_peer(limit),
        Task::Bench { args } => {
            let mut all = vec!["run", "--quiet", "--release", "--package", "smore-bench", "--"];
            all.extend(args.iter().map(String::as_str));
            cargo(&all, &[])
        }
    }
}

/// The Python that SMORE_PYTHON names, or that of a virtual environment with what is required.
fn python(venv: &Path, requirements: &str) -> Result<PathBuf> {
    if let Some(python) = std::env::var_os("SMORE_PYTHON") {
        return Ok(python.into());
    }
    let python = venv.join("bin/python");
    let succeed = |command: &mut Command| -> Result<()> {
        let status = command.status().with_context(|| format!("{command:?}"))?;
        ensure!(status.success(), "{command:?} gave {status}");
        Ok(())
    };
    if !python.exists() {
        succeed(Command::new("python3").args(["-m", "venv"]).arg(venv))?;
    }
    let install = ["-m", "pip", "install", "--quiet", "--requirement", requirements];
    succeed(Command::new(&python).args(install))?;
    Ok(python)
}

/// Advisories are left out: their database needs a network.
fn deny() -> Result<()> {
    let installed = Command::new("cargo").args(["deny", "--version"]).output()?.status.success();
    if installed {
        return cargo(&["deny", "check", "bans", "licenses", "sources"], &[]);
    }
    ensure!(!in_ci(), "cargo-deny is not installed; .ci/run installs it");
    println!("skipped: `cargo install --locked cargo-deny` makes this step run");
    Ok(())
}

/// Test targets that look for SMORE_SHARED; without it they check nothing.
const SHARED_TESTS: [&str; 10] = [
    "init",
    "parity_layer",
    "parity_base",
    "parity_end_to_end",
    "shared_adapter_files",
    "shared_humaneval",
    "shared_params",
    "shared_templates",
    "shared_tokenizer",
    "shared_train",
];

fn parity() -> Result<()> {
    let shared = root().join("../shared");
    if !shared.is_dir() {
        ensure!(!in_ci(), "no folder ../shared beside the checkout");
        println!("skipped: there is no folder ../shared beside the checkout");
        return Ok(());
    }
    let shared = shared.canonicalize()?;
    let shared = shared.to_str().context("path of ../shared is not UTF-8")?;
    let mut args = vec!["test", "--workspace"];
    for target in SHARED_TESTS {
        args.extend(["--test", target]);
    }
    args.extend(["--", "--nocapture"]);
    cargo(&args, &[("SMORE_SHARED", shared)])
}

fn demo() -> Result<()> {
    println!("cargo run --release -- demo --json");
    let output =
        Command::new("cargo").args(["run", "--release", "--", "demo", "--json"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    for side in ["base", "lora", "smore"] {
        let number = |key: &str| result[side][key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{side:5} loss {:.3}, accuracy {:.3}, {:.0} s",
            number("loss"),
            number("accuracy"),
            number("seconds")
        );
    }
    let accuracy = |side: &str| result[side]["accuracy"].as_f64().unwrap_or(f64::NAN);
    let gain = accuracy("smore") - accuracy("base");
    ensure!(
        gain > 0.3,
        "S'MoRE answers only {gain:.2} more of the held-out questions than the base"
    );
    Ok(())
}

/// Corpus and tokenizer, pre-training with `kind: full`, and the result into the program's assets.
fn demo_base() -> Result<()> {
    let init = "target/demo-base/init";
    cargo(&["run", "--release", "-p", "smore-tune", "--example", "demo_base", "--", init], &[])?;
    let config = "xtask/demo-base.yaml";
    cargo(&["run", "--release", "-p", "smore-cli", "--", "train", config], &[])?;
    let (from, to) =
        (Path::new("target/demo-base/run/model"), Path::new("crates/smore-cli/assets/demo-base"));
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        println!("wrote {}", to.join(entry.file_name()).display());
    }
    Ok(())
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    println!("cargo {}", args.join(" "));
    let status = Command::new("cargo").args(args).envs(env.iter().copied()).status()?;
    if !status.success() {
        bail!("`cargo {}` gave {status}", args.join(" "));
    }
    Ok(())
}

fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
