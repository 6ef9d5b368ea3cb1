//! `smore trace --model DIR --adapter DIR --prompt TEXT`

use crate::models::Loaded;
use crate::progress::bar;
use crate::table;
use anyhow::Result;
use serde_json::json;
use smore_tune::checkpoint::write;
use smore_tune::error::Error;
use smore_tune::generate::{Sampling, generate};
use smore_tune::model::Batch;
use smore_tune::trace::{Effect, Trace, ablate, page, removals};
use std::path::PathBuf;

/// Rows of the table of effects.
const ROWS: usize = 20;

#[derive(clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter: S'MoRE, HydraLoRA or MixLoRA
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The text
    #[arg(long, value_name = "TEXT", required_unless_present = "file")]
    prompt: Option<String>,
    /// A file whose whole content is the text
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// The answer to trace behind the text; without it, the likeliest one of at most 32 tokens
    #[arg(long, value_name = "TEXT")]
    answer: Option<String>,
    /// Give the text to the model as it is, without its chat template
    #[arg(long, conflicts_with = "chat")]
    raw: bool,
    /// Lay out the text as training laid out instructions
    #[arg(long)]
    chat: bool,
    /// Write the trees here, a line for every place and token
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// Write a page here on which to look at them
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Measure what the answer's log-probability loses without each expert and sub-tree
    #[arg(long)]
    ablate: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let text = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => {
            std::fs::read_to_string(file).map_err(|e| Error::reading(file, "a text", e))?
        }
        (None, None) => String::new(),
    };
    let mut loaded = Loaded::open(&args.model, Some(&args.adapter))?;
    let layout = loaded.layout(args.raw, args.chat);
    let prompt = layout.encode(&loaded.template, &loaded.tokenizer, &text)?;
    let mut ids = prompt.clone();
    if let Some(answer) = &args.answer {
        ids.extend(loaded.tokenizer.encode(answer)?);
    }
    let most = loaded.folder.spec.max_positions;
    if prompt.is_empty() || ids.len() > most {
        let message =
            format!("text and answer have {} tokens; the model takes 1 to {most}", ids.len());
        return Err(Error::Config { file: "trace".into(), message }.into());
    }
    let model = loaded.model(most.min(ids.len() + ANSWER));
    if args.answer.is_none() {
        let likeliest = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
        ids.extend(generate(&model, &loaded.tokenizer, &prompt, ANSWER, likeliest, |_| {})?.ids);
    }
    ids.truncate(most);
    let mut batch = Batch::default();
    let answer: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
    batch.push(&ids, &answer);
    let trace = Trace::of(&model, &loaded.tokenizer, &batch)?;
    if let Some(file) = &args.jsonl {
        let mut lines = Vec::new();
        trace.write_jsonl(&mut lines)?;
        write(file, &lines)?;
    }
    if let Some(file) = &args.html {
        write(file, page(&trace, "Which experts act on which tokens").as_bytes())?;
    }
    let effects = if args.ablate {
        if batch.targets.is_empty() {
            return Err(Error::Run("the answer has no token; give one with --answer".into()).into());
        }
        let all = removals(&model, &batch);
        let bar = bar("taking out", all.len());
        let effects = ablate(&model, &batch, all, |done| bar.set_position(done as u64));
        bar.finish_and_clear();
        Some(effects)
    } else {
        None
    };
    let places = trace.places.len();
    if args.json {
        let answer = loaded.tokenizer.decode(&ids[prompt.len()..], true)?;
        let (whole, effects) = effects.map_or((None, None), |(w, e)| (Some(w), Some(e)));
        println!(
            "{}",
            json!({"tokens": ids.len(), "places": places, "answer": answer, "log_p": whole,
                "effects": effects})
        );
        return Ok(());
    }
    println!("{} tokens at {places} places", ids.len());
    for file in args.jsonl.iter().chain(&args.html) {
        println!("wrote {}", file.display());
    }
    if let Some((whole, effects)) = effects {
        print(whole, &effects);
    }
    Ok(())
}

/// Tokens of an answer that is not given.
const ANSWER: usize = 32;

fn print(whole: f64, effects: &[Effect]) {
    println!("ln p(answer) = {whole:.4}; what it changes by without an expert, most needed first:");
    let row = |e: &Effect| {
        let path: Vec<String> = e.path.iter().rev().map(u16::to_string).collect();
        let kind = if e.path.len() > 1 { "sub-tree" } else { "expert" };
        let name = format!("{} layer {} {kind} {}", e.place, e.layer, path.join(" > "));
        vec![name, e.nodes.to_string(), format!("{:+.4}", e.change)]
    };
    let rows: Vec<Vec<String>> = effects.iter().take(ROWS).map(row).collect();
    table::print(&["taken out", "nodes", "change"], &rows);
    if effects.len() > ROWS {
        println!("  and {} more; --json lists all", effects.len() - ROWS);
    }
}
