//! `smore reproduce paper --model DIR --data DIR`

use crate::eval::{Bench, paired};
use crate::interrupt::Interrupt;
use crate::sweep::run_shown;
use crate::table::{self, count};
use anyhow::{Context, Result};
use smore_tune::eval::results::Sample;
use smore_tune::eval::sandbox::{Limits, Sandbox};
use smore_tune::eval::statistics::{Paired, mean_and_error};
use smore_tune::eval::task::Item;
use smore_tune::eval::{Protocol, Task};
use smore_tune::model::spec::DecoderSpec;
use smore_tune::paper::{Cell, Files, Method, PaperTask, Study, Table};
use smore_tune::plan::Budget;
use smore_tune::sweep::Sweep;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base; the paper has Llama-3.2-1B, Llama-3-8B and Gemma-2-9B
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder with a folder for each set, as it is published: arc_challenge, arc_easy,
    /// commonsense_qa, openbookqa, winogrande, gsm8k, humaneval and code_alpaca
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// These tasks alone; may be given several times. Without it, those that are in the folder
    #[arg(long, value_parser = PaperTask::by_name)]
    task: Vec<PaperTask>,
    /// These methods alone: lora, hydra-lora, mix-lora, smore or smore-3-layers; may be given several
    /// times
    #[arg(long, value_parser = method)]
    method: Vec<Method>,
    /// Trained parameters that no candidate may exceed; without it, those of LoRA of rank 64
    #[arg(long, value_name = "AMOUNT")]
    budget: Option<Budget>,
    /// Seeds of every candidate
    #[arg(long, default_values_t = [42])]
    seed: Vec<u64>,
    /// End every run after so many steps instead of two epochs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_steps: Option<u32>,
    /// At most so many records of each training set
    #[arg(long, value_parser = clap::value_parser!(u32).range(10..))]
    max_samples: Option<u32>,
    /// At most so many test questions of each task
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Write the files and list the candidates, and train nothing
    #[arg(long)]
    list: bool,
    /// Folder to write, or to go on with
    #[arg(long, default_value = "runs/paper")]
    output: PathBuf,
    /// Print one JSON object on standard output and nothing else
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let study = study(args)?;
    study.write()?;
    if args.list {
        list(&study);
        return Ok(());
    }
    let interrupt = Interrupt::listen()?;
    let mut table = Table { budget: study.budget, cells: Vec::new() };
    let results = study.output.join("results.json");
    for (task, files) in &study.tasks {
        let asked = Asked::open(args, &study, *task, files)?;
        let base = asked.answers("base", None)?;
        table.cells.push(asked.cell(None, std::slice::from_ref(&base), None));
        for &method in &study.methods {
            let file = study.sweep_file(*task, method);
            let sweep = match Sweep::load(&file) {
                Ok(sweep) => sweep,
                // A budget may be too small for all of a grid.
                Err(error) if error.to_string().contains("within budget") => {
                    if !args.json {
                        eprintln!("{}, {}: nothing fits the budget", task.name(), method.name());
                    }
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if !args.json {
                eprintln!("{}, {}", task.name(), method.name());
            }
            let searched = run_shown(&sweep, &file, args.json, &interrupt)?;
            let best = searched.best().with_context(|| {
                format!("every trial failed; {}/report.html says why", sweep.output_dir().display())
            })?;
            let mut sides = Vec::new();
            for (seed, adapter) in study.seeds.iter().zip(sweep.adapters(best)) {
                let name = format!("{}-seed-{seed}", method.key());
                sides.push(asked.answers(&name, Some(adapter))?);
            }
            let winner = Some((best.name.clone(), best.parameters));
            let cell = Cell { method: Some(method), ..asked.cell(Some(&base), &sides, winner) };
            table.cells.push(cell);
            let text = serde_json::to_string_pretty(&table)? + "\n";
            smore_tune::checkpoint::write(&results, text.as_bytes())?;
            table.page(&subtitle(&study)).write(&study.output.join("report.html"))?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&table)?);
        return Ok(());
    }
    table.worse().iter().for_each(|line| println!("{line}"));
    for (columns, rows) in [table.accuracies(), table.winners()] {
        println!();
        table::print(&columns.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    }
    println!("\nEverything is in {}; look at report.html there", study.output.display());
    Ok(())
}

fn subtitle(study: &Study) -> String {
    format!("{}, at most {} trained parameters", study.model.display(), count(study.budget))
}

fn study(args: &Args) -> Result<Study> {
    let spec = DecoderSpec::read(&args.model.join("config.json"))?;
    let budget = match args.budget {
        None => Study::usual_budget(&spec)?,
        Some(Budget::Parameters(n)) => n as usize,
        Some(_) => anyhow::bail!("--budget is of parameters here, such as 20M"),
    };
    let mut tasks = Vec::new();
    let wanted = if args.task.is_empty() { &PaperTask::ALL[..] } else { &args.task };
    for &task in wanted {
        match task.find(&args.data) {
            Ok(files) => tasks.push((task, files)),
            Err(error) if !args.task.is_empty() => return Err(error.into()),
            Err(error) if !args.json => eprintln!("{} is left out: {error}", task.name()),
            Err(_) => {}
        }
    }
    anyhow::ensure!(!tasks.is_empty(), "{} holds none of the paper's sets", args.data.display());
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).with_context(|| format!("the place of {}", path.display()))
    };
    Ok(Study {
        model: absolute(&args.model)?,
        data: absolute(&args.data)?,
        output: absolute(&args.output)?,
        tasks,
        methods: if args.method.is_empty() { Method::ALL.to_vec() } else { args.method.clone() },
        budget,
        seeds: args.seed.clone(),
        max_steps: args.max_steps.map(|n| n as usize),
        max_samples: args.max_samples.map(|n| n as usize),
    })
}

fn method(key: &str) -> Result<Method, String> {
    let known = Method::ALL.map(Method::key);
    let found = Method::ALL.into_iter().find(|method| method.key() == key);
    found.ok_or_else(|| format!("expected one of {}", known.join(", ")))
}

/// What would be trained.
fn list(study: &Study) {
    let (mut rows, mut runs) = (Vec::new(), 0);
    for (task, _) in &study.tasks {
        for &method in &study.methods {
            let file = study.sweep_file(*task, method);
            let fit = Sweep::load(&file).map_or(0, |sweep| sweep.candidates().count());
            runs += fit * study.seeds.len();
            let file = file.display().to_string();
            rows.push(vec![task.name().to_owned(), method.name().to_owned(), count(fit), file]);
        }
    }
    println!("at most {} trained parameters\n", count(study.budget));
    table::print(&["task", "method", "candidates", "sweep"], &rows);
    println!("\n{} runs in all; `smore plan --time` tells how long one takes", count(runs));
}

/// A task's questions.
struct Asked<'a> {
    args: &'a Args,
    task: PaperTask,
    opened: Task,
    items: Vec<Item>,
    sandbox: Option<Sandbox>,
    files: &'a Files,
    output: PathBuf,
}

impl<'a> Asked<'a> {
    fn open(args: &'a Args, study: &Study, task: PaperTask, files: &'a Files) -> Result<Self> {
        let opened = Task::open(task.name())?;
        let limit = args.limit.map(|n| n as usize);
        let items = opened.items(&files.test, Protocol::Generation, limit)?;
        let sandbox =
            opened.runs_programs().then(|| Sandbox::open(Limits::default())).transpose()?;
        let output = study.folder(task).join("eval");
        Ok(Self { args, task, opened, items, sandbox, files, output })
    }

    /// Of the base or of an adapter, by generation.
    fn answers(&self, name: &str, adapter: Option<PathBuf>) -> Result<Vec<Sample>> {
        let bench = Bench {
            named: self.task.name(),
            task: &self.opened,
            protocol: Protocol::Generation,
            items: &self.items,
            sandbox: self.sandbox.as_ref(),
            data: &self.files.test,
            model: &self.args.model,
            output: &self.output,
            limit: self.args.limit.map(|n| n as usize),
            quiet: self.args.json,
        };
        Ok(bench.side(name, adapter.as_deref())?.0)
    }

    /// The mean over sides, which differ in their seeds alone.
    fn cell(
        &self,
        base: Option<&Vec<Sample>>,
        sides: &[Vec<Sample>],
        winner: Option<(String, usize)>,
    ) -> Cell {
        let each: Vec<(f64, f64)> = sides.iter().map(|s| mean_and_error(&right(s))).collect();
        let n = each.len().max(1) as f64;
        let (winner, parameters) = winner.unwrap_or_default();
        Cell {
            method: None,
            task: self.task,
            accuracy: each.iter().map(|e| e.0).sum::<f64>() / n,
            // Of one seed: seeds answer the same questions.
            standard_error: each.iter().map(|e| e.1).sum::<f64>() / n,
            paired: base.zip(sides.first()).and_then(|(base, first)| difference(base, first)),
            questions: self.items.len(),
            parameters,
            winner,
            seeds: sides.len(),
        }
    }
}

/// The metric that the paper counts: what is right, however it was written.
fn metric(sample: &Sample) -> Option<&str> {
    let names = || sample.metrics.keys().map(String::as_str);
    names().find(|n| n.contains("flexible")).or_else(|| names().find(|n| !n.starts_with("unread")))
}

fn right(samples: &[Sample]) -> Vec<f64> {
    samples.iter().map(|s| metric(s).map_or(0.0, |name| s.metrics[name])).collect()
}

fn difference(base: &[Sample], adapter: &[Sample]) -> Option<Paired> {
    let name = metric(base.first()?)?;
    paired(base, adapter).into_iter().find(|(n, _)| n == name).map(|(_, pair)| pair)
}
