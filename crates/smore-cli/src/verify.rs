//! `smore verify CASE...`

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use smore_tune::error::Error;
use smore_tune::verify::{CaseReport, Kind, case_name, check_case, find_cases, write_tensors};
use std::path::{Path, PathBuf};

const LAYOUT: &str = include_str!("verify_layout.txt");

#[derive(clap::Args)]
#[command(after_long_help = LAYOUT)]
pub(crate) struct Args {
    /// A layer case's .json file, the folder of a whole model's case, or a folder above any of them
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,
    /// Allow this error for everything but indices, in place of what the long help lists
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
    let width = paths.iter().map(|p| case_name(p).chars().count()).max().unwrap_or(0);
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
    let (report, computed) = match args.device {
        Device::Cpu => check_case(path, args.tolerance)?,
    };
    if let Some(out) = &args.dump {
        write_tensors(&computed, out)?;
    }
    Ok(report)
}

/// Verdict, name, largest errors, worst tensor; what else there is to say on lines below.
fn line(path: &Path, width: usize, result: &Result<CaseReport, Error>) -> String {
    let name = case_name(path);
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
    let parameters = match report.largest(Kind::Parameter) {
        Some(e) => format!("parameters {e:<7.1e}  "),
        None => String::new(),
    };
    let notes = [&[String::new()], &report.notes[..]].concat().join("\n      ");
    format!(
        "{verdict:5} {name:width$}  values {values:<7}  gradients {gradients:<7}  {parameters}\
         {worst}{notes}"
    )
}

fn row(path: &Path, result: &Result<CaseReport, Error>) -> Value {
    match result {
        Ok(report) => json!({
            "case": path.display().to_string(),
            "name": report.name,
            "passed": report.passed(),
            "values": report.largest(Kind::Value),
            "gradients": report.largest(Kind::Gradient),
            "parameters": report.largest(Kind::Parameter),
            "worst": report.worst(),
            "checks": report.checks,
            "notes": report.notes,
        }),
        Err(error) => json!({
            "case": path.display().to_string(),
            "name": case_name(path),
            "passed": false,
            "error": error.to_string(),
        }),
    }
}
