//! `smore sweep SWEEP.yaml`

use crate::interrupt::Interrupt;
use crate::table::{self, count};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use smore_tune::error::Error;
use smore_tune::sweep::{Event, Sweep, Table};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The sweep: a run's configuration, keys of it and values to try
    file: PathBuf,
    /// List the candidates with their trained parameters, and train nothing
    #[arg(long)]
    list: bool,
    /// Print the table as one JSON object on standard output and nothing else
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let sweep = Sweep::load(&args.file)?;
    if args.list {
        list(&sweep, args.json);
        return Ok(());
    }
    let result = run_shown(&sweep, &args.file, args.json, &Interrupt::listen()?)?;
    if args.json {
        println!("{}", serde_json::to_string(&result)?);
        return Ok(());
    }
    let (columns, rows) = result.cells();
    table::print(&columns, &rows);
    let folder = sweep.output_dir().display();
    match result.best() {
        Some(best) => println!(
            "best: {}; {folder}/best.yaml is ready to run, {folder}/report.html to look at",
            best.name
        ),
        None => println!("every trial failed; {folder}/report.html says why"),
    }
    Ok(())
}

/// Runs a sweep with a bar and a line for each trial, unless `quiet`.
pub(crate) fn run_shown(
    sweep: &Sweep,
    file: &Path,
    quiet: bool,
    interrupt: &Interrupt,
) -> Result<Table> {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:28.cyan/dim} {pos}/{len} trials  {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let interactive = !bar.is_hidden();
    let say = |line: &str| {
        if interactive {
            bar.println(line);
        } else if !quiet {
            eprintln!("{line}");
        }
    };
    let watch = |event: Event| match event {
        Event::Begun { done, trials, left_out } => {
            bar.set_length(trials as u64);
            bar.set_position(done as u64);
            bar.reset_eta();
            say(&format!(
                "{trials} trials, {done} of them done; {} candidates are beyond the budget",
                left_out.len()
            ));
        }
        Event::Ended(name, t) => {
            bar.inc(1);
            let came_to = match (t.loss, &t.error) {
                (Some(loss), _) => format!("held-out loss {loss:.4}"),
                (None, why) => format!("failed: {}", why.as_deref().unwrap_or_default()),
            };
            say(&format!("{name}, seed {}: {came_to}, {:.0} s", t.seed, t.seconds));
        }
    };
    let result = sweep.run(&watch, &|| interrupt.asked());
    bar.finish_and_clear();
    if let Err(error @ Error::Interrupted { .. }) = result {
        let file = file.display();
        let context = format!("interrupted; `smore sweep {file}` goes on");
        return Err(anyhow::Error::from(error).context(context));
    }
    Ok(result?)
}

fn list(sweep: &Sweep, json: bool) {
    let (candidates, left_out): (Vec<_>, _) = (sweep.candidates().collect(), sweep.left_out());
    if json {
        let out = serde_json::json!({"candidates": candidates, "left_out": left_out});
        println!("{out}");
        return;
    }
    let rows: Vec<Vec<String>> =
        candidates.iter().map(|(name, n)| vec![(*name).to_owned(), count(*n)]).collect();
    table::print(&["candidate", "parameters"], &rows);
    for (name, why) in left_out {
        println!("  left out: {name}: {why}");
    }
}
