//! `smore routes RUN_OR_ADAPTER`

use crate::table::{self, count};
use anyhow::Result;
use serde_json::json;
use smore::counting::flexibility;
use smore::spec::SmoreSpec;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{read_settings, write};
use smore_tune::config::AdapterConfig;
use smore_tune::error::Error;
use smore_tune::routing::drift::REFERENCE;
use smore_tune::routing::{self, LayerUsage, Split, Window, page};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run folder, an adapter's folder, or a Parquet file that `generate --routing` wrote
    #[arg(value_name = "RUN_OR_ADAPTER")]
    subject: PathBuf,
    /// Show the last window up to this step; the newest where absent
    #[arg(long, value_name = "N")]
    step: Option<usize>,
    /// Show evaluations instead of training
    #[arg(long)]
    held_out: bool,
    /// Write a page here: heat maps, flows from parents to children, a slider over the steps
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let windows = windows(&args.subject)?;
    let wanted = |w: &&Window| !args.held_out || w.split == Split::HeldOut;
    let upto = |w: &&Window| args.step.is_none_or(|step| w.steps.1 <= step);
    let trained = windows.iter().any(|w| w.split == Split::Train);
    let own = |w: &&Window| args.held_out || !trained || w.split == Split::Train;
    let chosen: Vec<&Window> = windows.iter().filter(wanted).filter(own).collect();
    let shown = chosen.iter().copied().rfind(upto);
    let Some(shown) = shown else {
        let message = match args.step {
            Some(step) => format!("nothing was counted up to step {step}"),
            None => "nothing was counted there; a run counts where the adapter has routers and \
                     health.window_steps is not 0"
                .into(),
        };
        return Err(Error::Adapter { file: args.subject.clone(), message }.into());
    };
    // A reference has a window for each sample; the manifest has them together.
    let usage: Vec<LayerUsage> = match shown.split {
        Split::Reference => Manifest::read(&args.subject)?.map(|m| m.routing).unwrap_or_default(),
        _ => shown.layers.iter().map(|(usage, _)| usage.clone()).collect(),
    };
    if let Some(file) = &args.html {
        let name = args.subject.display().to_string();
        write(file, page(&windows, &format!("Routing of {name}")).as_bytes())?;
    }
    if args.json {
        println!(
            "{}",
            json!({"split": shown.split.name(), "first_step": shown.steps.0,
            "last_step": shown.steps.1, "windows": windows.len(), "layers": usage})
        );
        return Ok(());
    }
    let (first, last) = shown.steps;
    match shown.split {
        Split::Train => println!("training, steps {first} to {last}"),
        Split::HeldOut => println!("evaluation after step {last}"),
        Split::Reference => println!("the held-out samples at export"),
        Split::Generation => println!("a generation"),
    }
    print(&usage, &chosen, &args.subject);
    if let Some(file) = &args.html {
        println!("wrote {}", file.display());
    }
    Ok(())
}

fn windows(subject: &Path) -> Result<Vec<Window>> {
    if subject.is_file() {
        return Ok(routing::read(subject)?);
    }
    let run = routing::read_run(subject)?;
    let reference = subject.join(REFERENCE);
    if run.is_empty() && reference.is_file() {
        return Ok(routing::read(&reference)?);
    }
    if run.is_empty() && !subject.is_dir() {
        let message = "not found; expected a run folder, an adapter's folder or a Parquet file";
        return Err(Error::Adapter { file: subject.into(), message: message.into() }.into());
    }
    Ok(run)
}

/// A share as a block whose height is its part of twice an equal share.
fn block(share: f64, experts: usize) -> char {
    const BLOCKS: [char; 9] = [
        ' ', '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}',
        '\u{2588}',
    ];
    let height = (share * experts as f64 / 2.0 * 8.0).round();
    BLOCKS[(height as usize).min(8)]
}

/// Evenness over the windows of a run, low to high.
fn over_time(layer: &LayerUsage, windows: &[&Window]) -> String {
    const WIDTH: usize = 16;
    let values: Vec<f64> = windows
        .iter()
        .filter_map(|w| {
            let own = w.layers.iter().find(|(u, _)| u.path == layer.path && u.layer == layer.layer);
            own.map(|(u, _)| u.evenness())
        })
        .collect();
    let shown = WIDTH.min(values.len());
    let at = |i: usize| values[i * (values.len() - 1) / (shown - 1).max(1)];
    (0..shown).map(|i| block(at(i), 2)).collect()
}

fn print(usage: &[LayerUsage], windows: &[&Window], subject: &Path) {
    let rows: Vec<Vec<String>> = usage
        .iter()
        .map(|u| {
            let shares: String = u.share.iter().map(|&s| block(s, u.share.len())).collect();
            let parent = match u.parent {
                Some(p) => format!("{:.3} ({:.4})", p.information, p.bias),
                None => "\u{2013}".into(),
            };
            let trees = if u.layer == 0 { count(u.trees.round() as usize) } else { String::new() };
            vec![
                format!("{} layer {}", u.path.trim_start_matches("model.layers."), u.layer),
                format!("|{shares}|"),
                format!("{:.2}", u.evenness()),
                format!("{:.2}", u.imbalance()),
                u.idle().to_string(),
                parent,
                trees,
                over_time(u, windows),
            ]
        })
        .collect();
    let columns = [
        "",
        "experts",
        "evenness",
        "imbalance",
        "idle",
        "parent, nats",
        "trees",
        "evenness over time",
    ];
    table::print(&columns, &rows);
    let tokens = usage.first().map_or(0, |u| u.tokens);
    println!("{} tokens; a full block is twice an equal share, or more", count(tokens as usize));
    println!(
        "parent: what the parent tells of the child; in brackets what chance alone would show. Near \
         it, the hierarchy idles."
    );
    if let Some((formula, outputs)) = possible(subject) {
        println!("outputs that trees can give a token, by {formula}: {outputs}");
    }
}

/// By which formula, and how many outputs the trees of a token could give; none where there is no
/// formula.
fn possible(subject: &Path) -> Option<(&'static str, String)> {
    let inside = subject.join("adapter");
    let folder = if inside.is_dir() { inside } else { subject.to_owned() };
    let AdapterConfig::Smore(config) = read_settings(&folder).ok()?.config else { return None };
    // Widths of the map have no part in it.
    let (formula, outputs) = flexibility::of(&SmoreSpec::new(&config, 1, 1).ok()?)?;
    let number = match outputs.exact {
        Some(n) if n.to_string().len() < 16 => n.to_string(),
        _ => format!("10^{:.1}", outputs.log10()),
    };
    Some((formula.name(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_grow_with_the_share() {
        assert_eq!(
            [0.0, 0.25, 0.5, 1.0].map(|s| block(s, 4)),
            [' ', '\u{2584}', '\u{2588}', '\u{2588}']
        );
    }
}
