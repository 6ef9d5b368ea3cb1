//! `smore drift --model DIR --adapter DIR --data FILE`

use crate::models::Loaded;
use crate::progress::bar;
use crate::table::{self, count};
use anyhow::Result;
use serde_json::json;
use smore_tune::config::{DataConfig, Format, RunConfig, SourceConfig, ValidationConfig};
use smore_tune::data::{Sample, load};
use smore_tune::error::Error;
use smore_tune::report::{Report, Section};
use smore_tune::routing::count_samples;
use smore_tune::routing::drift::{Drift, LayerDrift, Reference, Sampled};
use std::path::PathBuf;
use std::process::ExitCode;

/// Rows of the table of places.
const ROWS: usize = 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter, which holds the routing of its held-out samples
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The new traffic: a data file as `train` takes it, or a run's configuration (.yaml), whose
    /// training files are taken; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// The data files' format, where the first record does not tell it
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    format: Option<Format>,
    /// Longest text in tokens; what is beyond is cut, as in training
    #[arg(long, value_name = "N", default_value_t = 2048)]
    cutoff_len: usize,
    /// Also test the texts in windows of at least this many tokens, in their order, to see when it
    /// began
    #[arg(long, value_name = "TOKENS")]
    window: Option<u64>,
    /// How often traffic like the held-out samples may raise an alarm
    #[arg(long, value_name = "RATE", default_value_t = 0.01)]
    false_alarms: f64,
    /// Seed of the permutations
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Write a page here on which to look at it
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn format(name: &str) -> Result<Format, String> {
    serde_json::from_value(name.into()).map_err(|e| e.to_string())
}

/// Exit code 1 where the routing has drifted.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let wrong = |message: String| Error::Config { file: "drift".into(), message };
    if !(args.false_alarms > 0.0 && args.false_alarms < 1.0) {
        let rate = args.false_alarms;
        return Err(
            wrong(format!("--false-alarms is {rate}; expected a share between 0 and 1")).into()
        );
    }
    let reference = Reference::read(&args.adapter)?;
    let mut loaded = Loaded::open(&args.model, Some(&args.adapter))?;
    let cutoff_len = args.cutoff_len.min(loaded.folder.spec.max_positions);
    let config = DataConfig {
        train: sources(args)?,
        validation: ValidationConfig { fraction: 0.0, ..ValidationConfig::default() },
        max_samples: None,
        cutoff_len,
        cache_dir: None,
    };
    let data = load(&config, args.seed, &loaded.tokenizer, &loaded.template)?;
    let model = loaded.model(cutoff_len);
    let samples: Vec<&Sample> = data.train.iter().collect();
    let bar = bar("routing", samples.len());
    let mut new = Vec::new();
    count_samples(&model, &samples, |counts| {
        new.push(Sampled::new(&counts));
        bar.set_position(new.len() as u64);
    });
    bar.finish_and_clear();
    if let Some(sample) = new.iter().find(|s| !reference.fits(s)) {
        let tokens = sample.tokens;
        return Err(wrong(format!(
            "the adapter's routing of {tokens} tokens has other places than its reference; the \
             adapter was changed after training: train it again"
        ))
        .into());
    }
    let whole = reference.compare(&new, args.false_alarms, args.seed)?;
    let windows = match args.window {
        Some(tokens) => windows(&new, tokens)
            .into_iter()
            .map(|w| reference.compare_window(w, tokens, args.false_alarms, args.seed))
            .collect::<Result<Vec<_>, _>>()?,
        None => Vec::new(),
    };
    if let Some(file) = &args.html {
        page(&whole, &windows, args.false_alarms).write(file)?;
    }
    if args.json {
        println!("{}", json!({"drift": whole, "windows": windows, "rate": args.false_alarms}));
    } else {
        show(&whole, &windows, args);
    }
    Ok(if whole.alarm { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn sources(args: &Args) -> Result<Vec<SourceConfig>> {
    let mut all = Vec::new();
    for path in &args.data {
        let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
        if yaml {
            all.extend(RunConfig::load(path)?.data.train);
        } else {
            let (path, format) = (path.clone(), args.format);
            all.push(SourceConfig { path, format, ..SourceConfig::default() });
        }
    }
    Ok(all)
}

/// Runs of samples of at least so many tokens; what is left at the end belongs to none.
fn windows(samples: &[Sampled], tokens: u64) -> Vec<&[Sampled]> {
    let (mut cuts, mut sum) = (vec![0], 0);
    for (i, sample) in samples.iter().enumerate() {
        sum += sample.tokens;
        if sum >= tokens {
            cuts.push(i + 1);
            sum = 0;
        }
    }
    cuts.windows(2).map(|cut| &samples[cut[0]..cut[1]]).collect()
}

fn row(layer: &LayerDrift) -> Vec<String> {
    let (psi, js, p) = (layer.psi, layer.js, layer.p);
    vec![
        format!("layer {} of {}", layer.layer, layer.place),
        format!("{psi:.3}"),
        format!("{js:.4}"),
        format!("{p:.4}"),
    ]
}

const COLUMNS: [&str; 4] = ["", "PSI", "JS, nats", "p"];

fn verdict(drift: &Drift, rate: f64) -> String {
    let Drift { samples, tokens, reference, p, alarm, .. } = drift;
    let words = if *alarm { "the routing has drifted" } else { "no sign of drift" };
    format!(
        "{words}: p = {p:.4}, alarm at {rate} or less; {} tokens of {} samples against {} held-out \
         samples",
        count(*tokens as usize),
        count(*samples),
        count(*reference)
    )
}

fn show(whole: &Drift, windows: &[Drift], args: &Args) {
    println!("{}", verdict(whole, args.false_alarms));
    let rows: Vec<Vec<String>> = whole.layers.iter().take(ROWS).map(row).collect();
    table::print(&COLUMNS, &rows);
    if whole.layers.len() > ROWS {
        println!("  and {} more; --json lists all", whole.layers.len() - ROWS);
    }
    if !windows.is_empty() {
        let alarms = windows.iter().filter(|w| w.alarm).count();
        println!("{alarms} of {} windows raise an alarm", windows.len());
        let rows: Vec<Vec<String>> = windows.iter().enumerate().map(window_row).collect();
        table::print(&["window", "samples", "tokens", "p", ""], &rows);
    }
    if let Some(file) = &args.html {
        println!("wrote {}", file.display());
    }
}

fn window_row((i, w): (usize, &Drift)) -> Vec<String> {
    let alarm = if w.alarm { "alarm" } else { "" };
    let (samples, tokens) = (count(w.samples), count(w.tokens as usize));
    vec![(i + 1).to_string(), samples, tokens, format!("{:.4}", w.p), alarm.into()]
}

fn page(whole: &Drift, windows: &[Drift], rate: f64) -> Report {
    let columns = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
    let mut sections = vec![Section::Table {
        heading: "Places, the farthest first".into(),
        note: "PSI: population stability index; JS: Jensen-Shannon divergence, at most 0.693; p: \
               chance of one so large at any place if nothing had changed."
            .into(),
        columns: columns(&COLUMNS),
        rows: whole.layers.iter().map(row).collect(),
    }];
    let far: Vec<&LayerDrift> = whole.layers.iter().take(ROWS).collect();
    let most = far.iter().map(|l| l.shares[0].len()).max().unwrap_or(0);
    let both = far.iter().flat_map(|l| {
        let name = format!("layer {} of {}", l.layer, l.place);
        [(format!("{name}: then"), &l.shares[0]), (format!("{name}: now"), &l.shares[1])]
    });
    let (rows, values) = both.map(|(name, shares)| (name, shares.clone())).unzip();
    sections.push(Section::HeatMap {
        heading: "Shares of the experts on the held-out samples and now".into(),
        note: format!("The {} places that are farthest.", far.len()),
        rows,
        columns: (0..most).map(|e| format!("expert {e}")).collect(),
        values,
    });
    if !windows.is_empty() {
        sections.push(Section::Table {
            heading: "Windows".into(),
            note: String::new(),
            columns: columns(&["window", "samples", "tokens", "p", ""]),
            rows: windows.iter().enumerate().map(window_row).collect(),
        });
    }
    let title = if whole.alarm { "The routing has drifted" } else { "No sign of drift" };
    Report { title: title.into(), subtitle: verdict(whole, rate), sections }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_have_their_configs_names() {
        assert!(format("alpaca").is_ok() && format("sharegpt").is_ok());
        assert!(format("alpacca").is_err());
    }
}
