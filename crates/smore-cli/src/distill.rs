//! `smore distill-lora --model DIR --adapter DIR --rank K --text FILE --out DIR`

use crate::folders::{must_be_new, note_other_base};
use anyhow::Result;
use serde_json::json;
use smore_engine::Cpu;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{Settings, load_adapter, save_adapter};
use smore_tune::distill::{Distilled, Fit, distill, sequences};
use smore_tune::error::Error;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use smore_tune::tokenizer::Tokenizer;
use std::path::PathBuf;

/// Fewer tokens say too little about a map's inputs.
const MIN_TOKENS: usize = 64;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter: S'MoRE, HydraLoRA, or a LoRA of higher rank
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Rank of the LoRA
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Text like that the model will meet; its last tenth measures the result
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Folder to write the LoRA to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Added to every direction of the inputs, as a share of their mean square
    #[arg(long, value_name = "X", default_value_t = 1e-4, value_parser = positive)]
    ridge: f64,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    must_be_new(&args.out)?;
    let folder = ModelFolder::open(&args.model)?;
    let tokenizer = Tokenizer::open(&args.model)?;
    let (fitted, unseen) = texts(args, &tokenizer, folder.spec.max_positions)?;
    let adapter = load_adapter(&args.adapter, &folder.spec)?;
    note_other_base(&args.adapter, &args.model)?;
    let loss_base = loss(&folder, Adapters::none(&folder.spec), &[], &unseen);
    let again = load_adapter(&args.adapter, &folder.spec)?;
    let loss_adapter = loss(&folder, again.adapters, &again.values, &unseen);

    let bar = indicatif::ProgressBar::new(folder.spec.blocks as u64).with_style(
        indicatif::ProgressStyle::with_template(
            "fitting block {pos} of {len} {wide_bar} {eta} left",
        )?,
    );
    let watch = |done: usize, _: usize| bar.set_position(done as u64);
    let wrong = |message: String| Error::Config { file: "--adapter".into(), message };
    let rank = usize::from(args.rank);
    let out = distill(&folder, adapter, &fitted, rank, args.ridge, watch).map_err(wrong)?;
    bar.finish_and_clear();

    let settings = Settings::new(out.config.clone(), &args.model);
    let mut manifest = Manifest::new(&args.model)?;
    manifest.from = Some(args.adapter.display().to_string());
    save_adapter(&args.out, &settings, &out.adapters, &out.values, &manifest)?;
    let Distilled { adapters, values, fits, .. } = out;
    let loss_lora = loss(&folder, adapters, &values, &unseen);
    let losses = [loss_base, loss_adapter, loss_lora];
    if args.json {
        println!(
            "{}",
            json!({"out": args.out, "rank": rank, "fits": fits, "loss_base": loss_base,
                "loss_adapter": loss_adapter, "loss_lora": loss_lora})
        );
    } else {
        print(args, &fits, losses, &unseen);
    }
    Ok(())
}

/// What is fitted to, and the last tenth, which is not.
fn texts(args: &Args, tokenizer: &Tokenizer, context: usize) -> Result<(Vec<Batch>, Vec<Batch>)> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| Error::reading(&args.text, "text to fit the LoRA on", e))?;
    let ids = tokenizer.encode_with_special(&text)?;
    if ids.len() < MIN_TOKENS {
        let message =
            format!("has {} tokens; a fit needs {MIN_TOKENS}, better some thousands", ids.len());
        let file = args.text.clone();
        return Err(Error::Data { file, line: None, message }.into());
    }
    let (fitted, unseen) = ids.split_at(ids.len() - ids.len().div_ceil(10));
    Ok((sequences(fitted, context), sequences(unseen, context)))
}

/// Mean loss per token.
fn loss(folder: &ModelFolder, adapters: Adapters, values: &[f32], text: &[Batch]) -> f64 {
    let context = text.iter().map(|b| b.ids.len()).max().unwrap_or(1);
    let model = Model::new(Cpu::<f32>::new(), folder, adapters, values, context);
    let losses: Vec<f64> = text.iter().flat_map(|batch| model.losses(batch)).collect();
    losses.iter().sum::<f64>() / losses.len().max(1) as f64
}

fn print(args: &Args, fits: &[Fit], [base, adapter, lora]: [f64; 3], unseen: &[Batch]) {
    let mean = fits.iter().map(|f| f.residual).sum::<f64>() / fits.len().max(1) as f64;
    if let Some(worst) = fits.iter().max_by(|a, b| a.residual.total_cmp(&b.residual)) {
        println!(
            "of what the adapter adds, the LoRA misses {:.1}% on a map (worst {:.1}%, {})",
            100.0 * mean,
            100.0 * worst.residual,
            worst.path
        );
    }
    let tokens: usize = unseen.iter().map(|b| b.ids.len()).sum();
    println!("loss on {tokens} tokens it was not fitted to, in nats per token:");
    println!("  base {base:.4}, adapter {adapter:.4}, LoRA {lora:.4} (gap {:+.4})", lora - adapter);
    if lora > base {
        println!("the LoRA is worse than the base here: give a higher rank or more of such text");
    }
    println!("written to {}", args.out.display());
}
