//! `smore reproduce`

mod paper;

use crate::{demo, table};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use smore_tune::pilot::{Event, Family, Study, Verdict, reproduce};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Does structure help? LoRA, HydraLoRA, MixLoRA, S'MoRE and S'MoRE without parts of it at equal
    /// trained parameters on a small base, from nothing but this program; goes on where it stopped
    Pilot(PilotArgs),
    /// The paper's Tables 2 to 5 on a base and sets of your own: every method searched over the
    /// paper's grid under one budget, the winners asked the test questions; goes on where it
    /// stopped. Made for a large machine: see --list first
    Paper(paper::Args),
}

#[derive(clap::Args)]
struct PilotArgs {
    /// A smaller study: no ablations, fewer samples, seeds and learning rates
    #[arg(long)]
    quick: bool,
    /// Seeds of data and training that every contender meets
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=100))]
    seeds: Option<u64>,
    /// Training samples of a trial
    #[arg(long, value_parser = clap::value_parser!(u32).range(16..=100_000))]
    samples: Option<u32>,
    /// Held-out questions of a trial
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    questions: Option<u32>,
    /// Ask on these tasks alone; may be given several times
    #[arg(long, value_parser = family)]
    family: Vec<Family>,
    /// Choose every contender's learning rate among these; may be given several times
    #[arg(long, value_name = "RATE")]
    learning_rate: Vec<f64>,
    /// Folder to write, or of a study to go on with
    #[arg(long, default_value = "runs/pilot")]
    output: PathBuf,
    /// Print one JSON object on standard output and nothing else
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Pilot(args) => pilot(args),
        What::Paper(args) => paper::run(args),
    }
}

fn pilot(args: &PilotArgs) -> Result<()> {
    let mut study = if args.quick { Study::quick() } else { Study::full() };
    study.seeds = args.seeds.unwrap_or(study.seeds);
    study.train = args.samples.map_or(study.train, |n| n as usize);
    study.held_out = args.questions.map_or(study.held_out, |n| n as usize);
    if !args.learning_rate.is_empty() {
        let wrong = args.learning_rate.iter().find(|rate| !(**rate > 0.0 && **rate < 1.0));
        anyhow::ensure!(wrong.is_none(), "--learning-rate is a number between 0 and 1");
        study.learning_rates.clone_from(&args.learning_rate);
    }
    if !args.family.is_empty() {
        study.families.clone_from(&args.family);
    }
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:28.cyan/dim} {pos}/{len} trials  {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let interactive = !bar.is_hidden();
    let watch = |event: Event| match event {
        Event::Begun(done, trials) => {
            bar.set_length(trials as u64);
            bar.set_position(done as u64);
            bar.reset_eta();
        }
        Event::Ended(t) => {
            bar.inc(1);
            let line = format!(
                "{:6} {:28} rate {:.0e}, seed {:4}: loss {:.3}, accuracy {:.3}, {:.0} s",
                t.family.name(),
                t.contender.name(),
                t.learning_rate,
                t.seed,
                t.loss,
                t.accuracy,
                t.seconds
            );
            if interactive {
                bar.println(line);
            } else if !args.json {
                eprintln!("{line}");
            }
        }
    };
    let verdict = reproduce(&args.output, &demo::BASE, &study, &watch)?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string(&verdict)?);
        return Ok(());
    }
    show(&verdict);
    println!("\nEverything is in {}; look at report.html there", args.output.display());
    Ok(())
}

fn family(name: &str) -> Result<Family, String> {
    let known = Family::ALL.map(Family::name);
    let found = Family::ALL.into_iter().find(|family| family.name() == name);
    found.ok_or_else(|| format!("expected one of {}", known.join(", ")))
}

fn show(verdict: &Verdict) {
    for family in &verdict.study.families {
        println!("\n{}: {}", family.name(), family.description());
        let (columns, rows) = verdict.table(*family);
        table::print(&columns.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    }
    println!("\nMeans over the seeds with 95% intervals; differences are taken seed by seed.");
    for answer in verdict.answers() {
        println!("{answer}");
    }
}
