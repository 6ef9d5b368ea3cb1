//! `smore data CONFIG`

use anyhow::{Result, bail};
use serde_json::json;
use smore_tune::config::RunConfig;
use smore_tune::data::{Dataset, Duplicate, FileReport, Sample, Survey, duplicates, survey};
use smore_tune::doctor::{Area, Examined, Severity, Subject, examine};
use smore_tune::error::Error;
use smore_tune::template::Template;
use smore_tune::tokenizer::Tokenizer;
use std::io::IsTerminal;
use std::path::PathBuf;

use crate::table::{self, count};

/// Bars of the histogram of lengths, and their width in characters.
const BARS: usize = 12;
const BAR_WIDTH: usize = 40;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The configuration of a run
    config: PathBuf,
    /// Show this training sample, counted from 1: its text, and what of it is trained
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// List at most so many dropped records and duplicates
    #[arg(long, value_name = "N", default_value_t = 5)]
    show: usize,
    /// Print everything as one JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = RunConfig::load(&args.config)?;
    let mut examined = examine(&Subject {
        adapter: None,
        data: None,
        train: None,
        output_dir: None,
        name: args.config.display().to_string(),
        ..Subject::from(&config)
    });
    let tokenizer = Tokenizer::open(&config.model)?;
    let template = Template::open(&config.model, &tokenizer)?;
    if let Some(positions) = examined.max_positions() {
        config.data.cutoff_len = config.data.cutoff_len.min(positions);
    }
    let survey = survey(&config.data, config.train.seed, &tokenizer, &template)?;
    let duplicates = duplicates(&survey.data);
    let shown = args.sample.map(|n| sample(&survey.data, n, &tokenizer)).transpose()?;
    let problems = problems(&examined, &survey);
    if args.json {
        println!("{}", as_json(&survey, &duplicates, shown.as_ref(), &problems));
    } else {
        show(args, &survey, &duplicates, shown.as_ref());
        for problem in &problems {
            println!("  error: {problem}");
        }
    }
    match (problems.len(), examined.accept()) {
        (0, _) => Ok(()),
        (_, Err(error @ (Error::Model { .. } | Error::Template { .. }))) => Err(error.into()),
        _ => Err(Error::Config {
            file: args.config.display().to_string(),
            message: "`smore train` would refuse this data; correct what is listed above".into(),
        }
        .into()),
    }
}

/// What stops a run: of tokenizer and template, and of the records.
fn problems(examined: &Examined, survey: &Survey) -> Vec<String> {
    let findings = examined.findings.iter().filter(|finding| {
        finding.severity == Severity::Error
            && matches!(finding.area, Area::Tokenizer | Area::Template)
    });
    let mut problems: Vec<String> = findings
        .map(|finding| match &finding.remedy {
            Some(remedy) => format!("{}; {remedy}", finding.message),
            None => finding.message.clone(),
        })
        .collect();
    for file in survey.files.iter().filter(|file| !file.faults.is_empty()) {
        problems.push(format!(
            "{}: {} cannot be trained on; correct or remove them",
            file.path.display(),
            places(file.faults.len())
        ));
    }
    if survey.data.train.is_empty() {
        problems.push("no sample is left to train on; give data.train other files".into());
    }
    problems
}

fn places(n: usize) -> String {
    if n == 1 { "1 record".into() } else { format!("{} records", count(n)) }
}

fn as_json(
    survey: &Survey,
    duplicates: &[Duplicate],
    shown: Option<&Shown>,
    problems: &[String],
) -> serde_json::Value {
    let data = &survey.data;
    let lengths = |samples: &[Sample]| {
        let histogram = Histogram::of(samples);
        json!({"samples": samples.len(), "shortest": histogram.shortest, "longest":
            histogram.longest, "width": histogram.width, "counts": histogram.counts})
    };
    json!({
        "files": survey.files,
        "train": lengths(&data.train),
        "held_out": lengths(&data.validation),
        "held_out_from": data.report.validation_from,
        "trained_tokens": data.report.trained_tokens,
        "tokens": data.report.total_tokens,
        "duplicates": duplicates,
        "sample": shown.map(|shown| json!({
            "place": shown.place, "tokens": shown.tokens, "truncated": shown.truncated,
            "parts": shown.parts.iter()
                .map(|(trained, text)| json!({"trained": trained, "text": text}))
                .collect::<Vec<_>>(),
        })),
        "problems": problems,
    })
}

fn show(args: &Args, survey: &Survey, duplicates: &[Duplicate], shown: Option<&Shown>) {
    show_files(&survey.files);
    for file in &survey.files {
        for fault in file.faults.iter().take(args.show) {
            let line = fault.line.map_or_else(String::new, |line| format!(":{line}"));
            println!("  dropped: {}{line}: {}", file.path.display(), fault.message);
        }
        if file.faults.len() > args.show {
            println!("  dropped: {} more", count(file.faults.len() - args.show));
        }
    }
    let Dataset { train, validation, report } = &survey.data;
    println!(
        "\n  {} samples to train on, {} held out (from {}); {} trained tokens of {}\n",
        count(train.len()),
        count(validation.len()),
        report.validation_from,
        count(report.trained_tokens),
        count(report.total_tokens)
    );
    Histogram::of(train).print();
    match duplicates.len() {
        0 => println!("\n  no held-out sample is trained on as well"),
        n => println!("\n  warning: {} of the held-out samples are trained on as well", count(n)),
    }
    for Duplicate { train, held_out } in duplicates.iter().take(args.show) {
        println!("    {held_out} is {train}");
    }
    if let Some(shown) = shown {
        println!();
        shown.print();
    }
}

fn show_files(files: &[FileReport]) {
    let header = ["file", "format", "read", "kept", "not drawn", "dropped", "samples", "truncated"];
    let rows: Vec<Vec<String>> = files
        .iter()
        .map(|file| {
            let format = file.format.map_or_else(|| "?".into(), |format| format.to_string());
            let mut row = vec![file.path.display().to_string(), format];
            let numbers = [file.read, file.kept, file.not_drawn, file.dropped];
            row.extend(numbers.into_iter().chain([file.samples, file.truncated]).map(count));
            row
        })
        .collect();
    table::print(&header, &rows);
}

/// How long samples are, in tokens.
struct Histogram {
    shortest: usize,
    longest: usize,
    width: usize,
    counts: Vec<usize>,
}

impl Histogram {
    fn of(samples: &[Sample]) -> Self {
        let lengths = || samples.iter().map(Sample::len);
        let (shortest, longest) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
        let width = (longest - shortest + 1).div_ceil(BARS);
        let mut counts = vec![0; (longest - shortest) / width + 1];
        for length in lengths() {
            counts[(length - shortest) / width] += 1;
        }
        Self { shortest, longest, width, counts }
    }

    fn print(&self) {
        let most = self.counts.iter().max().copied().unwrap_or(0).max(1);
        println!("  {:>13}   samples", "tokens");
        for (i, &n) in self.counts.iter().enumerate() {
            let from = self.shortest + i * self.width;
            let to = (from + self.width - 1).min(self.longest);
            let eighths = (n * BAR_WIDTH * 8).div_ceil(most);
            let mut bar = "\u{2588}".repeat(eighths / 8);
            bar.extend(char::from_u32(0x2590 - (eighths % 8) as u32).filter(|_| eighths % 8 > 0));
            println!("  {:>13}   {bar} {}", format!("{from}\u{2013}{to}"), count(n));
        }
    }
}

/// A sample's text, in parts that are trained and parts that are not.
struct Shown {
    place: String,
    tokens: usize,
    truncated: bool,
    parts: Vec<(bool, String)>,
}

fn sample(data: &Dataset, n: usize, tokenizer: &Tokenizer) -> Result<Shown> {
    let Some(sample) = n.checked_sub(1).and_then(|i| data.train.get(i)) else {
        bail!("--sample is {n}; expected 1 to {}", data.train.len());
    };
    let mut parts = Vec::new();
    let (mut from, mut text) = (0, String::new());
    // Decoded from the start, since a token's text depends on those before it.
    for end in 1..=sample.len() {
        let trained = sample.trained()[end - 1];
        if sample.trained().get(end) == Some(&trained) {
            continue;
        }
        let whole = tokenizer.decode(&sample.ids()[..end], false)?;
        let common = whole.char_indices().zip(text.chars()).take_while(|((_, a), b)| a == b);
        from = common.last().map_or(from, |((at, c), _)| at + c.len_utf8());
        parts.push((trained, whole[from..].to_owned()));
        text = whole;
    }
    let origin = &sample.origin;
    Ok(Shown {
        place: format!("{}:{}", origin.file.display(), origin.line),
        tokens: sample.len(),
        truncated: sample.truncated,
        parts,
    })
}

impl Shown {
    fn print(&self) {
        // The program's own terminal test: pagers and files get marks they can show.
        let (on, off) = if std::io::stdout().is_terminal() {
            ("\u{1b}[30;42m", "\u{1b}[0m")
        } else {
            ("\u{27e6}", "\u{27e7}")
        };
        let cut = if self.truncated { ", cut" } else { "" };
        println!(
            "  {} ({} tokens{cut}); trained: {on}like this{off}",
            self.place,
            count(self.tokens)
        );
        for (trained, text) in &self.parts {
            if *trained { print!("{on}{text}{off}") } else { print!("{text}") }
        }
        println!();
    }
}
