//! `smore compare A B C ..`

use crate::table::{self, count};
use anyhow::Result;
use serde_json::{Value, json};
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::counting::Multiplications;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::read_settings;
use smore_tune::config::{AdapterConfig, AdapterSection};
use smore_tune::error::Error;
use smore_tune::eval::compare::{Difference, Evaluated, metrics, side_of};
use smore_tune::eval::results::RESULTS;
use smore_tune::eval::statistics::{Verdict, mean_and_error};
use smore_tune::inject::{Adapters, Slot};
use smore_tune::model::spec::DecoderSpec;
use smore_tune::report::{Report, Section};
use smore_tune::routing::LayerUsage;
use smore_tune::run_report::evenness_map;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Adapters, run folders, configurations or results of `smore eval`; the others are compared
    /// with the first. Results of an adapter or run are looked for in its folder `eval`
    #[arg(value_name = "SUBJECT", num_args = 2.., required = true)]
    subjects: Vec<PathBuf>,
    /// Folder of the base model, of which only config.json is read; else that each one names
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Write a self-contained page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object on standard output instead of tables
    #[arg(long)]
    json: bool,
}

/// One of those compared.
struct Subject {
    name: String,
    kind: String,
    /// Parameters and multiplications per token, where the model's widths are known.
    size: Option<(usize, usize)>,
    routing: Vec<LayerUsage>,
    evaluated: Option<Evaluated>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let subjects: Result<Vec<Subject>, Error> =
        args.subjects.iter().map(|p| Subject::read(p, args.model.as_deref())).collect();
    let subjects = subjects?;
    let mut differences = Vec::new();
    for other in &subjects[1..] {
        let found = match (&subjects[0].evaluated, &other.evaluated) {
            (Some(first), Some(second)) => first.differences(second, 0)?,
            _ => Vec::new(),
        };
        differences.push(found);
    }
    let page = Page { subjects: &subjects, differences: &differences };
    if let Some(file) = &args.html {
        page.report().write(file)?;
    }
    if args.json {
        println!("{}", page.json());
        return Ok(());
    }
    for line in page.worse() {
        println!("{line}");
    }
    let (header, rows) = page.costs();
    table::print(&header, &rows);
    let (header, rows) = page.results();
    if rows.is_empty() {
        println!("\nNo results to compare: run `smore eval --output FOLDER/eval` for each first.");
    } else {
        println!();
        table::print(&header, &rows);
    }
    if let Some(file) = &args.html {
        println!("\nwrote {}", file.display());
    }
    Ok(())
}

impl Subject {
    fn read(path: &Path, model: Option<&Path>) -> Result<Self, Error> {
        let name = path.display().to_string();
        let side = side_of(path).or_else(|| side_of(&path.join("eval")));
        // An adapter inside its run.
        let in_run = path.file_name().is_some_and(|n| n == "adapter");
        let side = side.or_else(|| side_of(&path.parent().filter(|_| in_run)?.join("eval")));
        let evaluated = side.as_deref().map(Evaluated::read).transpose()?;
        let adapter = [path.to_owned(), path.join("adapter")];
        let adapter = adapter.into_iter().find(|p| p.join("adapter_config.json").is_file());
        let adapter = adapter.or_else(|| adapter_of(side.as_deref()?));
        let mut subject =
            Self { name, kind: "base".into(), size: Some((0, 0)), routing: vec![], evaluated };
        let (config, widths, base) = if let Some(folder) = &adapter {
            subject.routing = Manifest::read(folder)?.map(|m| m.routing).unwrap_or_default();
            let settings = read_settings(folder)?;
            let base = settings.find_base(folder);
            (settings.config, Some(settings.router_widths), base)
        } else if subject.evaluated.is_some() {
            return Ok(subject);
        } else {
            let file = if path.is_dir() { path.join("config.yaml") } else { path.to_owned() };
            let section = AdapterSection::load(&file)?;
            (section.adapter, None, section.model)
        };
        config.kind().clone_into(&mut subject.kind);
        let base = model.map(Path::to_owned).or(base);
        let spec = base.and_then(|b| DecoderSpec::read_sizes(&b.join("config.json")).ok());
        let measured = spec.map(|s| size(&config, widths.as_deref(), &s)).transpose();
        subject.size =
            measured.map_err(|message| Error::Config { file: subject.name.clone(), message })?;
        Ok(subject)
    }

    fn least_even(&self) -> Option<f64> {
        self.routing.iter().map(LayerUsage::evenness).reduce(f64::min)
    }

    fn idle(&self) -> usize {
        self.routing.iter().map(LayerUsage::idle).sum()
    }
}

/// The adapter whose results lie in a folder, if it is still where it was.
fn adapter_of(side: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(side.join(RESULTS)).ok()?;
    let results: Value = serde_json::from_str(&text).ok()?;
    let path = PathBuf::from(results["config"]["adapter_path"].as_str()?);
    path.is_dir().then_some(path)
}

/// Parameters and multiplications per token.
fn size(
    config: &AdapterConfig,
    widths: Option<&[usize]>,
    spec: &DecoderSpec,
) -> Result<(usize, usize), String> {
    let adapters = match widths {
        Some(widths) => Adapters::stored(config, widths, spec)?,
        None => Adapters::new(config, spec)?,
    };
    Ok((adapters.len(), adapters.slots.iter().map(multiplications).sum()))
}

fn multiplications(slot: &Slot) -> usize {
    match &slot.adapter {
        BlockAdapter::Map(AnyAdapter::Smore(a)) => Multiplications::of(&a.spec).total(),
        // Every parameter is one multiplication.
        BlockAdapter::Map(AnyAdapter::Lora(_)) => slot.range.len(),
        BlockAdapter::Map(AnyAdapter::HydraLora(a)) => {
            Multiplications::of_hydra_lora(&a.spec).total()
        }
        BlockAdapter::Ffn(a) => Multiplications::of_mix_lora(&a.spec).total(),
    }
}

/// What is shown, on the terminal, as a page and as JSON.
struct Page<'a> {
    subjects: &'a [Subject],
    /// Of each subject but the first to the first.
    differences: &'a [Vec<Difference>],
}

const DASH: &str = "\u{2013}";

impl Page<'_> {
    fn worse(&self) -> Vec<String> {
        let first = &self.subjects[0].name;
        let pairs = self.subjects[1..].iter().zip(self.differences);
        pairs
            .flat_map(|(s, all)| all.iter().map(move |d| (s, d)))
            .filter(|(_, d)| d.paired.verdict() == Verdict::Worse)
            .map(|(s, d)| {
                let (task, metric, p) = (&d.task, &d.metric, d.paired.p);
                format!("{} is worse than {first} in {task}, {metric}: p = {p:.1e}", s.name)
            })
            .collect()
    }

    fn costs(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let header = vec![
            "",
            "kind",
            "parameters",
            "bytes (f32)",
            "FLOPs/token",
            "least even router",
            "idle experts",
        ];
        let row = |s: &Subject| {
            let number = |f: fn((usize, usize)) -> usize| {
                s.size.map_or_else(|| DASH.into(), |n| count(f(n)))
            };
            let even = s.least_even().map_or_else(|| DASH.into(), |e| format!("{e:.3}"));
            let idle = if s.routing.is_empty() { DASH.into() } else { count(s.idle()) };
            vec![
                s.name.clone(),
                s.kind.clone(),
                number(|n| n.0),
                number(|n| 4 * n.0),
                number(|n| 2 * n.1),
                even,
                idle,
            ]
        };
        (header, self.subjects.iter().map(row).collect())
    }

    fn results(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let header =
            vec!["task", "metric", "of", "samples", "%", "difference, 95% interval", "McNemar's p"];
        let mut rows = Vec::new();
        let first = self.subjects[0].evaluated.iter().flat_map(|e| &e.tasks);
        for (task, (setting, samples)) in first {
            for metric in metrics(samples) {
                let values: Vec<f64> =
                    samples.iter().filter_map(|s| s.metrics.get(metric).copied()).collect();
                let label = format!("{task} ({})", setting.protocol);
                rows.push(vec![
                    label.clone(),
                    metric.to_owned(),
                    self.subjects[0].name.clone(),
                    count(values.len()),
                    format!("{:.2}", 100.0 * mean_and_error(&values).0),
                    DASH.into(),
                    DASH.into(),
                ]);
                for (subject, all) in self.subjects[1..].iter().zip(self.differences) {
                    let found = all.iter().find(|d| d.task == *task && d.metric == metric);
                    let Some(Difference { paired: p, .. }) = found else { continue };
                    let (low, high) = p.interval;
                    rows.push(vec![
                        label.clone(),
                        metric.to_owned(),
                        subject.name.clone(),
                        count(p.samples),
                        format!("{:.2}", 100.0 * p.second),
                        format!(
                            "{:+.2} [{:+.2}, {:+.2}]",
                            100.0 * p.difference,
                            100.0 * low,
                            100.0 * high
                        ),
                        format!("{:.3}", p.p),
                    ]);
                }
            }
        }
        (header, rows)
    }

    fn json(&self) -> Value {
        let one = |s: &Subject| {
            json!({
                "name": s.name, "kind": s.kind, "parameters": s.size.map(|n| n.0),
                "bytes_f32": s.size.map(|n| 4 * n.0),
                "flops_per_token": s.size.map(|n| 2 * n.1),
                "least_even_router": s.least_even(),
                "idle_experts": (!s.routing.is_empty()).then(|| s.idle()),
            })
        };
        let pairs = self.subjects[1..].iter().zip(self.differences).map(|(s, all)| {
            let with_verdict = |d: &Difference| {
                let mut value = json!(d);
                value["verdict"] = json!(d.paired.verdict());
                value
            };
            let first = &self.subjects[0].name;
            json!({"first": first, "second": s.name,
                   "tasks": all.iter().map(with_verdict).collect::<Vec<_>>()})
        });
        json!({
            "subjects": self.subjects.iter().map(one).collect::<Vec<_>>(),
            "pairs": pairs.collect::<Vec<_>>(),
        })
    }

    fn report(&self) -> Report {
        let table = |heading: &str, note: &str, (header, rows): (Vec<&str>, _)| Section::Table {
            heading: heading.into(),
            note: note.into(),
            columns: header.into_iter().map(String::from).collect(),
            rows,
        };
        let worse = self.worse();
        let first = &self.subjects[0].name;
        let mut sections = Vec::new();
        if !worse.is_empty() {
            sections.push(Section::Text { heading: "Worse".into(), paragraphs: worse });
        }
        sections.push(table(
            "Cost and routing",
            "FLOPs are what a token costs beyond the base's. Evenness is the entropy of a router's \
             shares over that of equal shares; an idle expert gets less than a tenth of its equal \
             share.",
            self.costs(),
        ));
        let results = self.results();
        if !results.1.is_empty() {
            let note = format!(
                "Differences in percentage points to {first} on the samples of both, with the 95% \
                 interval of a paired bootstrap and the p of McNemar's exact test."
            );
            sections.push(table("Results", &note, results));
        }
        for s in self.subjects.iter().filter(|s| !s.routing.is_empty()) {
            sections.push(evenness_map(&format!("Evenness of routers: {}", s.name), &s.routing));
        }
        let title = "smore compare".into();
        Report { title, subtitle: format!("the others beside {first}"), sections }
    }
}
