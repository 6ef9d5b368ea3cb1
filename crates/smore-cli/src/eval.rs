//! `smore eval --task NAME --data FILE --model DIR [--adapter DIR]`

use crate::models::Loaded;
use crate::table;
use anyhow::Result;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use smore_tune::eval::results::{Sample, Setting, SideFolder};
use smore_tune::eval::sandbox::{Limits, Sandbox};
use smore_tune::eval::score::Answerer;
use smore_tune::eval::statistics::{Paired, Verdict};
use smore_tune::eval::task::Item;
use smore_tune::eval::{Protocol, Task};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, ValueEnum)]
enum ProtocolArg {
    /// The model writes its answer to the prompts that the paper's authors use
    Generation,
    /// The likeliest choice counts, as in lm-evaluation-harness
    Loglikelihood,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// arc_challenge, arc_easy, commonsense_qa, openbookqa, winogrande, piqa, social_iqa, boolq,
    /// gsm8k, humaneval, or a YAML file with name, prompt, choices and answer
    #[arg(long)]
    task: String,
    /// The set: .jsonl, .json or .parquet, as it is published
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter; the base answers the same samples
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// How answers are scored; log-likelihood where there are choices, if not named
    #[arg(long)]
    protocol: Option<ProtocolArg>,
    /// Only so many samples, from the start
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Folder of samples and results; what is there already is not asked again
    #[arg(long, value_name = "DIR", default_value = "eval")]
    output: PathBuf,
    /// Print one JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let task = Task::open(&args.task)?;
    let protocol = match args.protocol {
        Some(ProtocolArg::Generation) => Protocol::Generation,
        Some(ProtocolArg::Loglikelihood) => Protocol::Loglikelihood,
        None => task.default_protocol(),
    };
    let items = task.items(&args.data, protocol, args.limit.map(|n| n as usize))?;
    let needs_sandbox = task.runs_programs();
    let sandbox = needs_sandbox.then(|| Sandbox::open(Limits::default())).transpose()?;
    let bench = Bench {
        named: &args.task,
        task: &task,
        protocol,
        items: &items,
        sandbox: sandbox.as_ref(),
        data: &args.data,
        model: &args.model,
        output: &args.output,
        limit: args.limit.map(|n| n as usize),
        quiet: args.json,
    };
    let (base, base_sums) = bench.side("base", None)?;
    let adapted = args.adapter.as_deref().map(|a| bench.side("adapter", Some(a))).transpose()?;
    let pairs = match &adapted {
        Some((samples, _)) => paired(&base, samples),
        None => Vec::new(),
    };
    let sums = |side: Option<&(Vec<Sample>, Value)>| side.map(|(_, sums)| sums.clone());
    let result = json!({
        "task": task.name, "protocol": protocol, "samples": items.len(), "base": base_sums,
        "adapter": sums(adapted.as_ref()),
        "paired": pairs.iter().map(|(name, pair)| {
            (name.clone(), json!({"pair": pair, "verdict": pair.verdict()}))
        }).collect::<serde_json::Map<_, _>>(),
    });
    if adapted.is_some() {
        let file = args.output.join(format!("paired_{}.json", task.name));
        let text = serde_json::to_string_pretty(&result)? + "\n";
        smore_tune::checkpoint::write(&file, text.as_bytes())?;
    }
    if args.json {
        println!("{result}");
        return Ok(());
    }
    print(args, &result, &pairs);
    Ok(())
}

/// What the base and adapters on it are asked.
pub(crate) struct Bench<'a> {
    /// The task, as the user named it.
    pub(crate) named: &'a str,
    pub(crate) task: &'a Task,
    pub(crate) protocol: Protocol,
    pub(crate) items: &'a [Item],
    pub(crate) sandbox: Option<&'a Sandbox>,
    /// The file that the items are of.
    pub(crate) data: &'a Path,
    pub(crate) model: &'a Path,
    /// Each side gets a folder in it.
    pub(crate) output: &'a Path,
    pub(crate) limit: Option<usize>,
    /// No progress is shown.
    pub(crate) quiet: bool,
}

impl Bench<'_> {
    /// Samples and sums of the base or an adapter, which are not in memory at the same time.
    pub(crate) fn side(&self, name: &str, adapter: Option<&Path>) -> Result<(Vec<Sample>, Value)> {
        let Self { named, data, model: base, output, .. } = *self;
        let setting = Setting::of(self.task, named, self.protocol, data, base, adapter)?;
        let mut folder = SideFolder::open(&output.join(name), setting)?;
        let mut loaded = Loaded::open(base, adapter)?;
        let context = loaded.folder.spec.max_positions;
        let model = loaded.model(context);
        let answerer = Answerer {
            model: &model,
            tokenizer: &loaded.tokenizer,
            template: &loaded.template,
            answer_tokens: self.task.answer_tokens().min(context / 2),
            sandbox: self.sandbox,
        };
        if folder.done() > 0 && !self.quiet {
            let there = folder.done().min(self.items.len());
            eprintln!("{name}: {} samples are there already", table::count(there));
        }
        let bar = bar(name, folder.done(), self.items.len(), self.quiet);
        folder.finish(self.items, &answerer, &mut |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let n = self.items.len();
        let sums = folder.write_results(n, base, adapter, self.limit)?;
        Ok((folder.samples(n).to_vec(), sums))
    }
}

fn bar(name: &str, done: usize, all: usize, quiet: bool) -> ProgressBar {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(all as u64) };
    let style =
        ProgressStyle::with_template("{prefix:.bold} {bar:28.cyan/dim} {pos}/{len}  {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    bar.set_prefix(name.to_owned());
    bar.set_position(done as u64);
    bar.reset_eta();
    bar
}

/// Each metric's pair.
pub(crate) fn paired(base: &[Sample], adapter: &[Sample]) -> Vec<(String, Paired)> {
    let names = base.first().into_iter().flat_map(|s| s.metrics.keys());
    let names = names.filter(|n| !n.starts_with("unread"));
    let right = |samples: &[Sample], name: &str| -> Vec<bool> {
        samples.iter().map(|s| s.metrics.get(name).is_some_and(|&x| x > 0.5)).collect()
    };
    names.map(|n| (n.clone(), Paired::of(&right(base, n), &right(adapter, n), 0))).collect()
}

fn print(args: &Args, result: &Value, pairs: &[(String, Paired)]) {
    for (name, pair) in pairs {
        let worse = pair.verdict() == Verdict::Worse;
        if worse {
            println!("The adapter is worse than the base in {name}: McNemar's p = {:.1e}.", pair.p);
        }
    }
    let (task, protocol) = (&result["task"], &result["protocol"]);
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    println!("{}, {} protocol, {} samples\n", text(task), text(protocol), result["samples"]);
    let base = result["base"].as_object();
    let metrics =
        base.into_iter().flatten().filter(|(k, _)| !k.contains("_stderr") && *k != "alias");
    let value = |side: &Value, name: &str| {
        let (metric, filter) = name.split_once(',').unwrap_or((name, "none"));
        let error = &side[format!("{metric}_stderr,{filter}")];
        match (side[name].as_f64(), error.as_f64()) {
            (Some(x), Some(e)) => format!("{:.2} \u{b1} {:.2}", 100.0 * x, 100.0 * e),
            _ => "\u{2013}".into(),
        }
    };
    let rows: Vec<Vec<String>> = metrics
        .map(|(name, _)| {
            let mut row = vec![name.clone(), value(&result["base"], name)];
            if args.adapter.is_some() {
                row.push(value(&result["adapter"], name));
                let pair = pairs.iter().find(|(n, _)| n == name).map(|(_, p)| p);
                let cells = pair.map(|p| {
                    let (low, high) = p.interval;
                    let points = format!(
                        "{:+.2} [{:+.2}, {:+.2}]",
                        100.0 * p.difference,
                        100.0 * low,
                        100.0 * high
                    );
                    [points, format!("{:.3}", p.p)]
                });
                row.extend(cells.unwrap_or_default());
            }
            row
        })
        .collect();
    let mut header = vec!["% \u{b1} standard error", "base"];
    if args.adapter.is_some() {
        header.extend(["adapter", "difference, 95% interval", "McNemar's p"]);
    }
    table::print(&header, &rows);
    println!("\nsamples and results in {}", args.output.display());
}
