//! `smore train CONFIG.yaml`

use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::table::{bytes, count};
use anyhow::Result;
use smore_tune::config::RunConfig;
use smore_tune::doctor::Severity;
use smore_tune::error::Error;
use smore_tune::sft::{Outcome, Prepared};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The run's configuration, or the run folder, which holds it
    config: PathBuf,
    /// Go on from the newest whole checkpoint in the run folder, to the bit as if nothing had
    /// happened; from the beginning where there is none
    #[arg(long)]
    resume: bool,
    /// Print the outcome as one JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let file =
        if args.config.is_dir() { args.config.join("config.yaml") } else { args.config.clone() };
    let mut prepared = Prepared::new(RunConfig::load(&file)?, &file.display().to_string())?;
    if args.resume {
        prepared = prepared.resume()?;
    }
    if !args.json {
        announce(&prepared);
    }
    let steps = (prepared.steps_done(), prepared.total_steps);
    let mut progress = Progress::new("training", steps, args.json).stopped_by(Interrupt::listen()?);
    let result = prepared.run(&mut progress);
    progress.finish();
    if let Err(error @ Error::Interrupted { .. }) = result {
        let config = args.config.display();
        return Err(anyhow::Error::from(error)
            .context(format!("interrupted; go on with `smore train --resume {config}`")));
    }
    let (outcome, _) = result?;
    if args.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        summarise(&outcome);
    }
    Ok(())
}

fn announce(prepared: &Prepared) {
    let report = &prepared.data.report;
    eprintln!(
        "data     {} training samples, {} held out; {} trained tokens of {}, {} samples cut at {}",
        count(prepared.data.train.len()),
        count(prepared.data.validation.len()),
        count(report.trained_tokens),
        count(report.total_tokens),
        report.truncated,
        prepared.cutoff_len,
    );
    for finding in prepared.findings.iter().filter(|f| f.severity == Severity::Warning) {
        let remedy = finding.remedy.as_deref().unwrap_or_default();
        eprintln!("warning  {}; {remedy}", finding.message);
    }
    eprintln!(
        "adapter  {} trained parameters, {} steps",
        count(prepared.trainable_parameters()),
        count(prepared.total_steps)
    );
}

fn summarise(outcome: &Outcome) {
    if let (Some(before), Some(after)) = (outcome.eval_loss_before, outcome.eval_loss_after) {
        println!("held-out loss {before:.4} -> {after:.4}");
    }
    println!(
        "{} steps, {} tokens in {:.1} s ({:.0} tokens/s), peak memory {}",
        count(outcome.steps),
        count(outcome.tokens),
        outcome.seconds,
        outcome.tokens as f64 / outcome.seconds.max(1e-9),
        bytes(outcome.peak_memory_bytes)
    );
    let memory = outcome.memory;
    println!(
        "of which weights {}, adapter and optimizer {}, activations {}, program and data {}",
        bytes(memory.weights),
        bytes(memory.adapter_and_optimizer),
        bytes(memory.activations),
        bytes(memory.program_and_data)
    );
    if outcome.stopped_early {
        println!(
            "stopped early: no better held-out loss for train.early_stopping_patience evaluations"
        );
    }
    if outcome.exported_step != outcome.steps {
        println!("exported: step {}, which had the lowest held-out loss", outcome.exported_step);
    }
    for alarm in outcome.standing_alarms() {
        println!("alarm at step {}: {alarm}; {}", alarm.step, alarm.remedy());
    }
    println!("{}", outcome.trained.display());
}
