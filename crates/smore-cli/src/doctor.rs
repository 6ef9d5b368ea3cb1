//! `smore doctor CONFIG`, or `smore doctor --model DIR [--adapter DIR] [--data FILE]`

use anyhow::{Result, bail};
use serde_json::json;
use smore_tune::config::{AdapterConfig, DataConfig, SavedConfig};
use smore_tune::doctor::{Examined, Finding, Severity, Subject, examine, examine_file};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("subject").required(true).args(["config", "model"]))]
pub(crate) struct Args {
    /// The configuration of a run that is to be looked at before it starts
    config: Option<PathBuf>,
    /// Folder of a base model
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of an adapter on it
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// A data file for it
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Option<PathBuf>,
    /// Print the findings as one JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let examined = match (&args.config, &args.model) {
        (Some(config), _) => examine_file(config)?,
        (None, model) => examine(&subject(args, model.clone().unwrap_or_default())?),
    };
    let (errors, warnings) = (examined.count(Severity::Error), examined.count(Severity::Warning));
    if args.json {
        let findings = &examined.findings;
        println!("{}", json!({"errors": errors, "warnings": warnings, "findings": findings}));
    } else {
        show(&examined);
    }
    match errors {
        0 => Ok(()),
        1 => bail!("1 check failed"),
        n => bail!("{n} checks failed"),
    }
}

fn subject(args: &Args, model: PathBuf) -> Result<Subject> {
    let adapter = args.adapter.clone();
    let data: Option<DataConfig> = match &args.data {
        Some(path) => Some(serde_json::from_value(json!({"train": [{"path": path}]}))?),
        None => None,
    };
    Ok(Subject {
        model,
        adapter: adapter.map(|path| AdapterConfig::Saved(SavedConfig { path })),
        data,
        train: None,
        output_dir: None,
        name: "the command line".into(),
    })
}

fn show(examined: &Examined) {
    for Finding { area, severity, message, remedy } in &examined.findings {
        let word = match severity {
            Severity::Good => "ok",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        println!("{word:<8} {area:<10} {message}");
        if let Some(remedy) = remedy {
            println!("{:<19} remedy: {remedy}", "");
        }
    }
}
