//! `smore verify CASE...`

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use smore_tune::error::Error;
use smore_tune::verify::{CaseReport, Kind, LayerCase, Tolerance, find_cases, write_tensors};
use std::path::{Path, PathBuf};

const LAYOUT: &str = "\
Layout of a case: name.json and name.safetensors side by side; lists run from the leaves to the
root. You can record your own from PyTorch.

name.json
  d_in, d_out     of the adapted linear map
  config          s, f, r, d_g (lists), gate_type (switch, noisy_topk, dense), expert_act_fn
                  (identity, relu, tanh, prelu|0.25)
                  optional: gate_arch (mlp), gate_act_fn (relu), dim_downproj_x (0: as wide as x),
                  activation_position (all), lora_alpha (none), balance_loss_weight (0.01),
                  is_shared_expert_pool (false)
  optional        dtype (f32, bf16, mixed, autocast), train_mode, has_mask, base_bias

name.safetensors, needed
  x [B, T, d_in], base.weight [d_out, d_in], param.<every parameter, as in an adapter file>
  base.bias       if the map has one
  g [B, T, d_out] where gradients or losses were recorded; loss_y is the sum of y * g
  attention_mask [B, T]                                with a mask
  noise.<l> [B*T, f_{L-1}, .., f_{l+1}, s_l]           noisy gate in training

name.safetensors, optional; what is there is compared
  y [B, T, d_out] with the base's output, loss_y, balance_loss, loss
  topk_idx.<l>, topk_score.<l> [B*T, f_{L-1}, .., f_l]
  hidden.<l> [B*T, f_{L-1}, .., f_{l+1}, d_{l+1}]
  layer_balance_loss.<l>, load.<l>, importance.<l>
  grad.<parameter>, grad.x                             of loss = loss_y + balance_loss
  balance_grad.<parameter>, balance_grad.x             of balance_loss

Errors are relative to each recorded tensor's largest value. Allowed are, for values and gradients,
2e-5 and 2e-4 (f32, mixed) or 4e-2 and 6e-2 (bf16, autocast); in mixed cases 2^-6 for what ends in
bf16 (y, grad.x). Chosen experts must be equal.

Exit code: 0 all passed, 1 a case differs, 2 a case cannot be read or an argument is wrong.";

#[derive(clap::Args)]
#[command(after_long_help = LAYOUT)]
pub(crate) struct Args {
    /// A recorded case's .json file, or a folder of cases
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,
    /// Allow this error, relative to each tensor's largest value, for values and gradients alike
    #[arg(long, value_name = "X", value_parser = positive)]
    tolerance: Option<f64>,
    /// With one case: write what was computed, under the recording's names and shapes
    #[arg(long, value_name = "OUT.safetensors")]
    dump: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Print one JSON object with every tensor's error on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    Cpu,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut paths = Vec::new();
    for path in &args.cases {
        paths.extend(find_cases(path)?);
    }
    if args.dump.is_some() && paths.len() != 1 {
        let message = format!("needs exactly one case, but {} were given", paths.len());
        return Err(Error::Config { file: "--dump".into(), message }.into());
    }
    let width = paths.iter().map(|p| name(p).chars().count()).max().unwrap_or(0);
    let (mut passed, mut failed, mut broken) = (0, 0, Vec::new());
    let mut rows = Vec::new();
    for path in &paths {
        let result = check(args, path);
        match &result {
            Ok(report) if report.passed() => passed += 1,
            Ok(_) => failed += 1,
            Err(_) => {}
        }
        if args.json {
            rows.push(row(path, &result));
        } else {
            println!("{}", line(path, width, &result));
        }
        broken.extend(result.err());
    }
    let unreadable = broken.len();
    if args.json {
        let all = json!({
            "cases": rows, "passed": passed, "failed": failed, "unreadable": unreadable
        });
        println!("{all}");
    } else if unreadable == 0 {
        println!("{passed} passed, {failed} failed");
    } else {
        println!("{passed} passed, {failed} failed, {unreadable} unreadable");
    }
    if let Some(first) = broken.into_iter().next() {
        return Err(first.into());
    }
    match failed {
        0 => Ok(()),
        _ => Err(Error::Run("computed and recorded tensors differ".into()).into()),
    }
}

fn check(args: &Args, path: &Path) -> Result<CaseReport, Error> {
    let case = LayerCase::open(path)?;
    let computed = match args.device {
        Device::Cpu => case.compute::<f32>()?,
    };
    if let Some(out) = &args.dump {
        write_tensors(&computed, out)?;
    }
    let tolerance = match args.tolerance {
        Some(x) => Tolerance::same(x),
        None => Tolerance::of(case.precision),
    };
    Ok(case.compare(&computed, tolerance))
}

fn name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Verdict, name, largest errors, worst tensor.
fn line(path: &Path, width: usize, result: &Result<CaseReport, Error>) -> String {
    let name = name(path);
    let report = match result {
        Ok(report) => report,
        Err(error) => return format!("ERROR {name:width$}  {error}"),
    };
    let verdict = if report.passed() { "ok" } else { "MISS" };
    let error = |kind| report.largest(kind).map_or_else(|| "-".into(), |e| format!("{e:.1e}"));
    let worst = match report.worst() {
        None => "nothing to compare".into(),
        Some(w) if w.passed() => format!("worst {}", w.tensor),
        Some(w) if w.kind == Kind::Index => {
            format!("worst {} ({:.1}% differ)", w.tensor, 100.0 * w.error)
        }
        Some(w) => format!("worst {} ({:.1e}, allowed {:.1e})", w.tensor, w.error, w.allowed),
    };
    let (values, gradients) = (error(Kind::Value), error(Kind::Gradient));
    format!("{verdict:5} {name:width$}  values {values:<7}  gradients {gradients:<7}  {worst}")
}

fn row(path: &Path, result: &Result<CaseReport, Error>) -> Value {
    match result {
        Ok(report) => json!({
            "case": path.display().to_string(),
            "name": report.name,
            "passed": report.passed(),
            "values": report.largest(Kind::Value),
            "gradients": report.largest(Kind::Gradient),
            "worst": report.worst(),
            "checks": report.checks,
        }),
        Err(error) => json!({
            "case": path.display().to_string(),
            "name": name(path),
            "passed": false,
            "error": error.to_string(),
        }),
    }
}
