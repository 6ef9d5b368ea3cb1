//! `smore plan MODEL ADAPTER_OR_CONFIG`

use crate::table::{self, bytes, count};
use anyhow::Result;
use serde_json::json;
use smore_tune::checkpoint::read_settings;
use smore_tune::config::{AdapterConfig, AdapterSection, RunConfig};
use smore_tune::error::Error;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::plan::{Cost, Setting, loras, models};
use std::path::{Path, PathBuf};

/// Tokens of a forward pass where neither the command line nor a recipe says.
const TOKENS: usize = 2048;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A model's folder, its config.json, or the name of a common model such as llama-3.2-1b
    model: String,
    /// A run's configuration, a file that holds only the adapter section of one, or an adapter's
    /// folder
    #[arg(value_name = "ADAPTER_OR_CONFIG")]
    adapter: PathBuf,
    /// Tokens of one forward pass in training; without it as many as the run's configuration puts
    /// into one at most, else 2048
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Option<u32>,
    /// Print one JSON object on standard output instead of tables
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let spec = read_model(&args.model)?;
    let Subject { config, router_widths, setting } = Subject::read(args, &spec)?;
    let name = args.adapter.display().to_string();
    let wrong = |message: String| Error::Config { file: name.clone(), message };
    let own = match config.kind() {
        "smore" => "S'MoRE",
        "lora" => "LoRA",
        "hydra_lora" => "HydraLoRA",
        "mix_lora" => "MixLoRA",
        _ => "the base itself",
    };
    let widths = router_widths.as_deref();
    let mut costs = vec![Cost::of(own.to_owned(), &config, widths, &spec, setting).map_err(wrong)?];
    for (name, lora) in loras(&config, costs[0].parameters, &spec).map_err(wrong)? {
        costs.push(Cost::of(name, &lora, None, &spec, setting).map_err(wrong)?);
    }
    let tokens = setting.tokens;
    if args.json {
        let base = json!({"parameters": spec.parameters(), "blocks": spec.blocks,
            "hidden": spec.hidden, "intermediate": spec.intermediate});
        let facts = json!({"model": args.model, "base": base, "adapter": config,
            "tokens_per_forward_pass": tokens, "costs": costs});
        println!("{facts}");
        return Ok(());
    }
    println!("{}: {} parameters in {} blocks", args.model, count(spec.parameters()), spec.blocks);
    print_costs(&costs);
    print_structure(&costs[0]);
    print_memory(&costs, tokens);
    Ok(())
}

fn print_costs(costs: &[Cost]) {
    let row = |c: &Cost| {
        vec![
            c.name.clone(),
            count(c.parameters),
            c.file_bytes.map_or("\u{2013}".into(), |n| count(n as usize)),
            count(c.flops.active),
            count(c.flops.executed),
        ]
    };
    println!();
    let header = ["adapter", "parameters", "file, bytes", "FLOPs a token, active", "as trained"];
    table::print(&header, &costs.iter().map(row).collect::<Vec<_>>());
}

fn print_structure(cost: &Cost) {
    let Some(s) = &cost.structure else { return };
    println!(
        "\nabove LoRA of equal rank, biases and router aside: {} parameters ({:.1}%), propagation \
         {:.1}% of its multiplications",
        count(s.parameters_above_lora),
        100.0 * s.parameter_overhead,
        100.0 * s.propagation_overhead
    );
    if let Some(log10) = s.flexibility_log10 {
        println!("structural flexibility: 10^{log10:.1} outputs for a token on one linear map");
    }
}

fn print_memory(costs: &[Cost], tokens: usize) {
    println!("\nPeak memory of a training step of {} tokens, estimated:\n", count(tokens));
    let mut rows = Vec::new();
    for cost in costs {
        for peak in &cost.memory {
            let s = &peak.split;
            let parts = [s.weights, s.adapter_and_optimizer, s.activations, peak.total];
            let precision = if peak.bf16 { "bf16" } else { "f32" };
            let again = if peak.gradient_checkpointing { "yes" } else { "no" };
            let mut row = vec![cost.name.clone(), precision.into(), again.into()];
            row.extend(parts.map(bytes));
            rows.push(row);
        }
    }
    let header = [
        "adapter",
        "weights in",
        "recomputed",
        "weights",
        "adapter, optimizer",
        "activations",
        "in all",
    ];
    table::print(&header, &rows);
}

/// What is planned.
struct Subject {
    config: AdapterConfig,
    /// Router width of every layer, where an adapter's folder says so.
    router_widths: Option<Vec<usize>>,
    setting: Setting,
}

impl Subject {
    fn read(args: &Args, spec: &DecoderSpec) -> Result<Self, Error> {
        let path = &args.adapter;
        let (config, recipe) = if path.is_dir() {
            (AdapterConfig::Saved(smore_tune::config::SavedConfig { path: path.clone() }), None)
        } else {
            let config = AdapterSection::load(path)?.adapter;
            (config, RunConfig::load(path).ok())
        };
        let tokens = recipe.as_ref().map_or(TOKENS, |r| {
            let length = r.data.cutoff_len.min(spec.max_positions);
            length * r.train.per_device_train_batch_size
        });
        let setting = Setting {
            tokens: args.tokens.map_or(tokens, |n| n as usize),
            keeps_best: recipe.is_some_and(|r| r.train.load_best_model_at_end),
        };
        let AdapterConfig::Saved(saved) = &config else {
            return Ok(Self { config, router_widths: None, setting });
        };
        let settings = read_settings(&saved.path)?;
        let router_widths = Some(settings.router_widths);
        Ok(Self { config: settings.config, router_widths, setting })
    }
}

/// The shape of a model in a folder, in a `config.json`, or by name.
fn read_model(model: &str) -> Result<DecoderSpec, Error> {
    let path = Path::new(model);
    if path.is_dir() {
        return DecoderSpec::read(&path.join("config.json"));
    }
    if path.is_file() {
        return DecoderSpec::read(path);
    }
    let wrong = |message| Error::Config { file: format!("`{model}`"), message };
    models::by_name(model).map_err(wrong)
}
