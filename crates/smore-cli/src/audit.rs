//! `smore audit verify LOG`

use crate::models::Loaded;
use anyhow::Result;
use serde_json::json;
use smore_tune::audit::{self, Chain, Difference, Made, Record, Rerun, text_hash};
use smore_tune::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Check a log's chain and, with a model, derive its outputs again
    Verify(Verify),
}

#[derive(clap::Args)]
struct Verify {
    /// The log that `smore generate --audit` wrote
    log: PathBuf,
    /// A head that was noted earlier: a record with this hash must be in the log. Shows a missing
    /// end, which no chain shows by itself
    #[arg(long, value_name = "HASH")]
    head: Vec<String>,
    /// Folder of the base model: derive again every record whose prompt is there
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// A prompt of records that hold none; may be given several times
    #[arg(long, value_name = "TEXT", requires = "model")]
    prompt: Vec<String>,
    /// A file whose whole content is such a prompt
    #[arg(long, value_name = "FILE", requires = "model")]
    prompt_file: Vec<PathBuf>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// What became of a record that was to be derived again.
#[derive(serde::Serialize)]
struct Checked {
    record: u64,
    line: usize,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(serde::Serialize)]
#[serde(tag = "outcome", content = "why", rename_all = "snake_case")]
enum Outcome {
    Reproduced,
    ReproducedButForRounding,
    NotReproduced(String),
    NotRerun(String),
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let Command::Verify(args) = &args.command;
    let chain = audit::read(&args.log)?;
    let missing: Vec<&String> = args.head.iter().filter(|h| !chain.holds(h)).collect();
    let checked = rerun(args, &chain)?;
    let failed = |c: &&Checked| matches!(c.outcome, Outcome::NotReproduced(_));
    let bad = checked.iter().filter(failed).count();
    let none = args.model.is_some()
        && !chain.records.is_empty()
        && checked.iter().all(|c| matches!(c.outcome, Outcome::NotRerun(_)));
    let ok = chain.faults.is_empty() && missing.is_empty() && bad == 0 && !none;
    if args.json {
        println!(
            "{}",
            json!({"ok": ok, "records": chain.records.len(), "head": chain.head(),
                "faults": chain.faults, "missing_heads": missing, "checked": checked})
        );
    } else {
        print(args, &chain, &missing, &checked);
        if none {
            println!("no record could be derived again with what was given");
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print(args: &Verify, chain: &Chain, missing: &[&String], checked: &[Checked]) {
    for fault in &chain.faults {
        let record = fault.record.map_or_else(String::new, |n| format!("record {n} "));
        println!("{}:{}: {record}{}", args.log.display(), fault.line, fault.message);
    }
    for head in missing {
        println!("no record has the hash {head}: the log's end is missing or was written anew");
    }
    let head = chain.head();
    if chain.faults.is_empty() {
        println!("{} records, chain whole, head {}", chain.records.len(), head.hash);
    } else {
        let (whole, faults) = (chain.records.len(), chain.faults.len());
        println!("{whole} records are what was written; {faults} faults");
    }
    for Checked { record, line, outcome } in checked {
        let said = match outcome {
            Outcome::Reproduced => "reproduced to the bit".to_owned(),
            Outcome::ReproducedButForRounding => {
                "reproduced: same output, same experts; gate weights differ by rounding".to_owned()
            }
            Outcome::NotReproduced(why) => format!("NOT reproduced: {why}"),
            Outcome::NotRerun(why) => format!("not derived again: {why}"),
        };
        println!("record {record} (line {line}): {said}");
    }
    if args.model.is_none() && !chain.records.is_empty() {
        println!("give --model and --adapter to derive outputs again");
    }
}

fn rerun(args: &Verify, chain: &Chain) -> Result<Vec<Checked>> {
    let Some(model) = &args.model else { return Ok(Vec::new()) };
    let mut prompts = args.prompt.clone();
    for file in &args.prompt_file {
        let text =
            std::fs::read_to_string(file).map_err(|e| Error::reading(file, "a prompt", e))?;
        prompts.push(text);
    }
    let made = Made::of(model, args.adapter.as_deref())?;
    let prompt_of = |record: &Record| {
        let own = record.prompt.iter().chain(&prompts);
        own.into_iter().find(|p| text_hash(p) == record.prompt_sha256).cloned()
    };
    let mut loaded = Loaded::open(model, args.adapter.as_deref())?;
    let longest = chain.records.iter().map(|(_, r, _)| r.prompt_tokens + r.max_new_tokens).max();
    let context = longest.unwrap_or(1).min(loaded.folder.spec.max_positions);
    let built = loaded.model(context);
    let rerun = Rerun { model: &built, tokenizer: &loaded.tokenizer, template: &loaded.template };
    let bar = crate::progress::bar("deriving again", chain.records.len());
    let mut checked = Vec::new();
    for (line, record, _) in &chain.records {
        let outcome = if let Some(what) = record.made.difference(&made) {
            Outcome::NotRerun(format!("it was made with {what}"))
        } else if let Some(prompt) = prompt_of(record) {
            match audit::difference(record, &rerun.of(record, &prompt)?) {
                Difference::None => Outcome::Reproduced,
                Difference::Rounding => Outcome::ReproducedButForRounding,
                Difference::Other(why) => Outcome::NotReproduced(why),
            }
        } else {
            Outcome::NotRerun("it holds no prompt; give --prompt or --prompt-file".into())
        };
        checked.push(Checked { record: record.number, line: *line, outcome });
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(checked)
}
