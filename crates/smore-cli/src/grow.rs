//! `smore grow --from ADAPTER --into CONFIG --out DIR`

use crate::folders::{must_be_new, note_other_base};
use anyhow::Result;
use serde_json::json;
use smore_engine::Cpu;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{Settings, load_adapter, read_settings, save_adapter};
use smore_tune::config::{AdapterConfig, AdapterSection};
use smore_tune::error::Error;
use smore_tune::grow::{Difference, grow};
use smore_tune::model::Model;
use smore_tune::model::folder::ModelFolder;
use smore_tune::sample_text;
use smore_tune::tokenizer::Tokenizer;
use std::path::PathBuf;

/// Logits that are equal but for rounding differ by less than this, relative to the largest.
const EXACT: f64 = 1e-4;

const EXACTNESS: &str = "\
What keeps its function exactly

  from a LoRA              any S'MoRE whose top layer's gate weights sum to 1 (switch with fanout 2
                           or more, dense, noisy_topk with fanout 2 or more) and whose top layer
                           has at least its rank
  from a HydraLoRA         gate.kind dense; as many experts in the top layer as it has heads;
                           gate.router_input_width at least that; architecture linear, or mlp with
                           activation relu and a router_width of twice the heads
  from a one-layer S'MoRE  the same experts, fanout and gate in the top layer
  MixLoRA                  cannot be grown

Residuals of the top layer must not be bent: activation prelu|1.0 (the identity at the start, which
then learns), identity, relu with twice the rank, or activation_position child or child_v2. A
one-layer S'MoRE with an activation keeps it.

To train the grown adapter on, write in a run's configuration:
  adapter: {kind: saved, path: DIR}";

#[derive(clap::Args)]
#[command(after_long_help = EXACTNESS)]
pub(crate) struct Args {
    /// Folder of the adapter to grow: LoRA, HydraLoRA or S'MoRE of one layer, ours or PEFT's
    #[arg(long, value_name = "ADAPTER")]
    from: PathBuf,
    /// What it shall become: a run's configuration, or a YAML file with just its adapter section
    #[arg(long, value_name = "CONFIG")]
    into: PathBuf,
    /// Folder to write the grown adapter to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of the base model, where neither configuration nor adapter names it
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Compare on this text instead of a built-in passage
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Let the copies of a factor differ by this share of its size, at the price of exactness
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = share)]
    noise: f64,
    /// Seed of everything that starts at random
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..1.0).contains(&x) => Ok(x),
        _ => Err("expected a number from 0 to below 1, such as 0.01".into()),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let section = AdapterSection::load(&args.into)?;
    let wrong = |message: String| Error::Config { file: args.into.display().to_string(), message };
    let AdapterConfig::Smore(into) = section.adapter else {
        let kind = section.adapter.kind();
        return Err(wrong(format!("adapter.kind is {kind}; only smore can be grown into")).into());
    };
    must_be_new(&args.out)?;
    let base = base(args, section.model)?;
    let folder = ModelFolder::open(&base)?;
    let tokenizer = Tokenizer::open(&base)?;
    let context = folder.spec.max_positions;
    let batch = sample_text::batch(&tokenizer, context, args.text.as_deref())?;
    let context = batch.ids.len();
    let from = load_adapter(&args.from, &folder.spec)?;
    note_other_base(&args.from, &base)?;
    let (adapters, values) =
        grow(&from, &into, &folder.spec, args.seed, args.noise).map_err(wrong)?;

    let parameters = (from.adapters.len(), adapters.len());
    let before = Model::new(Cpu::new(), &folder, from.adapters, &from.values, context);
    let after = Model::new(Cpu::new(), &folder, adapters, &values, context);
    let difference = Difference::of(&before, &after, &batch);
    let exact = difference.largest <= EXACT * difference.largest_logit.max(1.0);
    if !exact && args.noise == 0.0 {
        return Err(Error::Run(format!(
            "the grown adapter's logits differ by {:.1e}, which is more than rounding; nothing was \
             written",
            difference.largest
        ))
        .into());
    }
    let settings = Settings::new(AdapterConfig::Smore(into), &base);
    let mut manifest = Manifest::new(&base)?;
    manifest.seed = Some(args.seed);
    manifest.from = Some(args.from.display().to_string());
    save_adapter(&args.out, &settings, &after.adapters, &values, &manifest)?;
    if args.json {
        println!(
            "{}",
            json!({"out": args.out, "difference": difference, "noise": args.noise,
                "parameters_before": parameters.0, "parameters_after": parameters.1})
        );
    } else {
        print(args, &difference, parameters);
    }
    Ok(())
}

fn print(args: &Args, difference: &Difference, (before, after): (usize, usize)) {
    println!("{difference}");
    println!("{before} parameters became {after}");
    println!(
        "written to {0}; train it on with\n  adapter: {{kind: saved, path: {0}}}",
        args.out.display()
    );
}

/// The base model: as told, or as the configuration or the adapter names it.
fn base(args: &Args, named: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(path) = args.model.clone().or(named) {
        return Ok(path);
    }
    let settings = read_settings(&args.from)?;
    settings.find_base(&args.from).ok_or_else(|| Error::Missing {
        path: settings.base.unwrap_or_default().into(),
        what: "the base model that the adapter names; give --model DIR".into(),
    })
}
