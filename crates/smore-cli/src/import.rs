//! `smore import-config FILE [--output OUT]`

use anyhow::Result;
use serde_json::json;
use smore_tune::import::{Imported, import};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A YAML or JSON file for LLaMA-Factory or for the fork of S'MoRE's authors
    file: PathBuf,
    /// File to write; standard output where absent
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the configuration and what was left out as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let imported = import(&args.file)?;
    if let Some(output) = &args.output {
        imported.write(output)?;
    }
    let Imported { yaml, config, notes } = imported;
    if args.json {
        println!("{}", json!({"config": config, "not_taken_over": notes}));
        return Ok(());
    }
    match &args.output {
        Some(output) => println!("written to {}", output.display()),
        None => print!("{yaml}"),
    }
    // Beside the configuration, so that `> run.yaml` stays one.
    for note in &notes {
        let value = if note.value.is_null() { String::new() } else { format!(": {}", note.value) };
        eprintln!("not taken over  {}{value}  ({})", note.key, note.reason);
    }
    if notes.is_empty() {
        eprintln!("every key was taken over");
    }
    Ok(())
}
