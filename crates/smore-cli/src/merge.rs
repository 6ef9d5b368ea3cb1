//! `smore merge --model DIR --adapter DIR --out DIR`

use crate::folders::{must_be_new, note_other_base};
use anyhow::Result;
use clap::ValueEnum;
use serde_json::json;
use smore_tune::checkpoint::load_adapter;
use smore_tune::merge::merge;
use smore_tune::model::folder::ModelFolder;
use smore_tune::sample_text;
use smore_tune::tokenizer::Tokenizer;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of a LoRA
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder to write the merged model to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Storage type of the result; the base's own where absent
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Compare on this text instead of a built-in passage
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    must_be_new(&args.out)?;
    let folder = ModelFolder::open(&args.model)?;
    let tokenizer = Tokenizer::open(&args.model)?;
    let context = folder.spec.max_positions;
    let batch = sample_text::batch(&tokenizer, context, args.text.as_deref())?;
    let adapter = load_adapter(&args.adapter, &folder.spec)?;
    note_other_base(&args.adapter, &args.model)?;
    let dtype = args.dtype.map(|dtype| match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    });
    let difference = merge(&folder, adapter, &args.out, dtype, &batch)?;
    if args.json {
        println!("{}", json!({"out": args.out, "difference": difference}));
        return Ok(());
    }
    println!("{difference}");
    let narrow = folder.tensors().any(|t| t.dtype.bytes() == 2);
    if dtype.map_or(narrow, |d| d != safetensors::Dtype::F32) {
        println!(
            "the difference is rounding: merged weights are stored in 16 bits, the adapter was not; \
             --dtype f32 keeps it"
        );
    }
    println!("written to {}", args.out.display());
    Ok(())
}
