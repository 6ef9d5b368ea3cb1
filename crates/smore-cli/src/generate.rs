//! `smore generate --model DIR [--adapter DIR] --prompt TEXT`

use crate::folders::note_other_base;
use anyhow::Result;
use smore_engine::Cpu;
use smore_tune::checkpoint::load_adapter;
use smore_tune::generate::{Sampling, generate};
use smore_tune::inject::Adapters;
use smore_tune::model::Model;
use smore_tune::model::folder::ModelFolder;
use smore_tune::template::{Message, Template};
use smore_tune::tokenizer::Tokenizer;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long)]
    model: PathBuf,
    /// Folder of an adapter, such as runs/my-run/adapter
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The text to answer or continue
    #[arg(long)]
    prompt: String,
    /// Give the prompt to the model as it is, without its chat template
    #[arg(long, conflicts_with = "chat")]
    raw: bool,
    /// Lay out the prompt as training laid out instructions, also for a model without a chat
    /// template
    #[arg(long)]
    chat: bool,
    /// At most this many new tokens
    #[arg(long, alias = "max-tokens", default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 takes the likeliest token; higher samples more freely
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample only from the likeliest tokens that reach this probability together
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Sample only from this many of the likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Print one JSON object on standard output instead of the text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let tokenizer = Tokenizer::open(&args.model)?;
    let template = Template::open(&args.model, &tokenizer)?;
    let folder = ModelFolder::open(&args.model)?;
    let (adapters, values) = match &args.adapter {
        Some(path) => {
            let loaded = load_adapter(path, &folder.spec)?;
            note_other_base(path, &args.model)?;
            (loaded.adapters, loaded.values)
        }
        None => (Adapters::none(&folder.spec), Vec::new()),
    };
    // A model with a chat template is spoken to through it; a bare base continues the text.
    let prompt = if args.chat || !(args.raw || template.is_plain()) {
        template.encode_prompt(&tokenizer, &[Message::new("user", &args.prompt)])?
    } else {
        tokenizer.encode_with_special(&args.prompt)?
    };
    let context = folder.spec.max_positions.min(prompt.len() + args.max_new_tokens);
    let model = Model::new(Cpu::new(), &folder, adapters, &values, context);
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
    };
    let mut out = std::io::stdout().lock();
    let mut failed = Ok(());
    let generated =
        generate(&model, &tokenizer, &prompt, args.max_new_tokens, sampling, |piece| {
            if !args.json && failed.is_ok() {
                failed = write!(out, "{piece}").and_then(|()| out.flush());
            }
        })?;
    failed?;
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&generated)?)?;
    } else {
        writeln!(out)?;
    }
    Ok(())
}
