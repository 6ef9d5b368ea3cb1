//! `smore plan MODEL ADAPTER_OR_CONFIG`

mod view;

use crate::table::count;
use anyhow::Result;
use serde_json::json;
use smore::config::SmoreConfig;
use smore_tune::checkpoint::read_settings;
use smore_tune::config::{AdapterConfig, AdapterSection, RunConfig};
use smore_tune::error::Error;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::plan::{Amount, Budget, Cost, Pace, Setting, Timing, Work, loras, models, search};
use std::path::{Path, PathBuf};
use std::time::Duration;
use view::{MANY, View};

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
    /// Time it on this machine, for about ten seconds, longer for large models: an epoch of the
    /// run's data, or a million tokens
    #[arg(long)]
    time: bool,
    /// Also search S'MoRE adapters on the same targets that take at most so many parameters (20M),
    /// so much memory (8GiB) or so much time for an epoch (30min), and list those that no other
    /// beats
    #[arg(long, value_name = "AMOUNT")]
    budget: Option<Budget>,
    /// Write a self-contained page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object on standard output instead of tables
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let spec = read_model(&args.model)?;
    let subject = Subject::read(args, &spec)?;
    let Subject { config, router_widths, setting, .. } = &subject;
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
    let mut costs = vec![Cost::of(own.to_owned(), config, widths, &spec, *setting).map_err(wrong)?];
    let loras = loras(config, costs[0].parameters, &spec).map_err(wrong)?;
    for (name, lora) in &loras {
        costs.push(Cost::of(name.clone(), lora, None, &spec, *setting).map_err(wrong)?);
    }
    let timed = args.time || matches!(args.budget, Some(Budget::Time(_)));
    let amount = if timed { subject.amount()? } else { None };
    let mut paces = vec![None; costs.len()];
    if timed {
        let configs = std::iter::once(config).chain(loras.iter().map(|(_, lora)| lora));
        // The adapter itself is what matters most.
        let budgets = [5, 3, 2].map(Duration::from_secs);
        for (i, (pace, config)) in paces.iter_mut().zip(configs).enumerate() {
            if !args.json {
                eprintln!("timing {} on this machine", costs[i].name);
            }
            let widths = if i == 0 { widths } else { None };
            let work = subject.work(&spec, config, widths, amount);
            *pace = Pace::measure(work, budgets[i]).map_err(wrong)?;
        }
    }
    if timed && paces[0].is_none() && !args.json {
        eprintln!("time is measured of adapters alone, not of training the base itself");
    }
    let found = match args.budget {
        Some(budget) => {
            let timing = paces[0].map(|pace| Timing {
                pace,
                frozen_flops: 2.0 * spec.multiplied() as f64,
                adapter_flops: costs[0].flops.executed as f64,
                tokens: amount.map_or(MANY, |a| a.tokens),
                updates: amount.map_or(MANY / setting.tokens.max(1), |a| a.updates),
            });
            if matches!(budget, Budget::Time(_)) && timing.is_none() {
                return Err(wrong("a budget of time needs an adapter to time".into()).into());
            }
            let smore = match config {
                AdapterConfig::Smore(c) => c.clone(),
                other => SmoreConfig {
                    targets: other.targets().cloned().unwrap_or_default(),
                    ..SmoreConfig::new(vec![])
                },
            };
            let kind = (subject.bf16, subject.gradient_checkpointing);
            Some((budget, search(&smore, &spec, *setting, kind, timing, budget).map_err(wrong)?))
        }
        None => None,
    };
    let tokens = setting.tokens;
    let view = View {
        model: format!(
            "{}: {} parameters in {} blocks",
            args.model,
            count(spec.parameters()),
            spec.blocks
        ),
        costs: &costs,
        paces: &paces,
        tokens,
        amount,
        found: found.as_ref().map(|(budget, found)| (*budget, &found[..])),
    };
    if let Some(file) = &args.html {
        view.report().write(file)?;
    }
    if args.json {
        let base = json!({"parameters": spec.parameters(), "blocks": spec.blocks,
            "hidden": spec.hidden, "intermediate": spec.intermediate});
        let facts = json!({"model": args.model, "base": base, "adapter": config,
            "tokens_per_forward_pass": tokens, "costs": costs, "paces": paces, "data": amount,
            "within_budget": found.as_ref().map(|(_, found)| found)});
        println!("{facts}");
        return Ok(());
    }
    view.print();
    if let Some(file) = &args.html {
        println!("\n{} is a page to look at", file.display());
    }
    Ok(())
}

/// What is planned.
struct Subject {
    config: AdapterConfig,
    /// Router width of every layer, where an adapter's folder says so.
    router_widths: Option<Vec<usize>>,
    setting: Setting,
    recipe: Option<RunConfig>,
    /// Frozen weights are kept as bf16.
    bf16: bool,
    gradient_checkpointing: bool,
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
            keeps_best: recipe.as_ref().is_some_and(|r| r.train.load_best_model_at_end),
            mixed: recipe.as_ref().is_some_and(|r| r.train.bf16),
        };
        let (config, router_widths) = match config {
            AdapterConfig::Saved(saved) => {
                let settings = read_settings(&saved.path)?;
                (settings.config, Some(settings.router_widths))
            }
            config => (config, None),
        };
        let train = recipe.as_ref().map(|r| &r.train);
        Ok(Self {
            bf16: spec.bf16 || train.is_some_and(|t| t.bf16),
            gradient_checkpointing: train.is_some_and(|t| t.gradient_checkpointing),
            config,
            router_widths,
            setting,
            recipe,
        })
    }

    /// What the run trains on; none where there is no run or its model is not the one planned for.
    fn amount(&self) -> Result<Option<Amount>, Error> {
        match &self.recipe {
            Some(recipe) if recipe.model.is_dir() => Amount::of(recipe),
            _ => Ok(None),
        }
    }

    fn work<'a>(
        &self,
        spec: &'a DecoderSpec,
        config: &'a AdapterConfig,
        router_widths: Option<&'a [usize]>,
        amount: Option<Amount>,
    ) -> Work<'a> {
        let most = self.setting.tokens.min(spec.max_positions);
        // As long as the run's samples are.
        let length = amount.map_or(most, |a| a.tokens.div_ceil(a.samples.max(1)).clamp(1, most));
        let sequences = self.recipe.as_ref().map_or(1, |r| r.train.per_device_train_batch_size);
        let tokens = amount.map_or(self.setting.tokens, |_| length * sequences);
        Work {
            spec,
            config,
            router_widths,
            tokens,
            length,
            bf16: self.bf16,
            mixed: self.setting.mixed,
            gradient_checkpointing: self.gradient_checkpointing,
        }
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
