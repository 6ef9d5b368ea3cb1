//! `smore generate --model DIR [--adapter DIR] --prompt TEXT`

use crate::clock::now;
use crate::models::Loaded;
use anyhow::Result;
use smore_tune::audit::{Asked, Log, Made, Record, RoutingDigest};
use smore_tune::error::Error;
use smore_tune::generate::{Sampling, generate_routed};
use smore_tune::routing::{self, Counts, Split, Window};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
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
    /// Append a record to this log: hashes of prompt, output, base and adapter, and which experts
    /// acted on every token. The text is printed once its record is kept
    #[arg(long, value_name = "LOG")]
    audit: Option<PathBuf>,
    /// Keep prompt and output in the record too
    #[arg(long, requires = "audit")]
    audit_text: bool,
    /// Write here, as Parquet, how often which expert was chosen
    #[arg(long, value_name = "FILE", requires = "adapter")]
    routing: Option<PathBuf>,
    /// Print one JSON object on standard output instead of the text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // A log that cannot be continued is found before anything is generated.
    let log = args.audit.as_deref().map(Log::open).transpose()?;
    let mut loaded = Loaded::open(&args.model, args.adapter.as_deref())?;
    let layout = loaded.layout(args.raw, args.chat);
    let prompt = layout.encode(&loaded.template, &loaded.tokenizer, &args.prompt)?;
    let context = loaded.folder.spec.max_positions.min(prompt.len() + args.max_new_tokens);
    let model = loaded.model(context);
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
    };
    let mut counts = Counts::new(&model.adapters);
    if args.routing.is_some() && !counts.is_routed() {
        let message = "--routing is given, but the adapter has no router".into();
        return Err(Error::Config { file: "generate".into(), message }.into());
    }
    let mut out = std::io::stdout().lock();
    let (mut failed, mut digest) = (Ok(()), RoutingDigest::default());
    // Nothing leaves before its record is kept.
    let at_once = !args.json && log.is_none();
    let generated = generate_routed(
        &model,
        &loaded.tokenizer,
        &prompt,
        args.max_new_tokens,
        sampling,
        |piece| {
            if at_once && failed.is_ok() {
                failed = write!(out, "{piece}").and_then(|()| out.flush());
            }
        },
        |places| {
            if log.is_some() {
                digest.see(places);
            }
            if args.routing.is_some() {
                counts.see(places);
            }
        },
    )?;
    failed?;
    if let Some(file) = &args.routing {
        routing::write(file, &[Window::of(Split::Generation, (1, 1), &counts)])?;
    }
    if let Some(log) = &log {
        let made = Made::of(&args.model, args.adapter.as_deref())?;
        let max_new_tokens = args.max_new_tokens;
        let asked = Asked { prompt: &args.prompt, ids: &prompt, layout, max_new_tokens, sampling };
        let record = Record::new(now(), made, &asked, &generated, digest, args.audit_text);
        let head = log.append(record)?;
        eprintln!("audit: record {}, head {}", head.number, head.hash);
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&generated)?)?;
    } else {
        writeln!(out, "{}", if at_once { "" } else { &generated.text })?;
    }
    Ok(())
}
