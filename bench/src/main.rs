//! The benchmarks: `cargo xtask bench --help`.
//!
//! Every number is a median over runs that alternate with what they are compared to, in one call
//! on one machine. Ratios are what to keep; times alone depend on the machine's mood.

// Its output is its purpose.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod case;
mod planned;
mod random;
mod suite;
mod work;
mod worker;

use anyhow::Result;
use clap::Parser;

/// Speed and memory of the layer, the training step and decoding, as ratios.
#[derive(Parser, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line")]
#[command(name = "cargo xtask bench")]
pub(crate) struct Args {
    /// Fewer runs, and no model with a billion weights
    #[arg(long)]
    quick: bool,
    /// End with one JSON line
    #[arg(long)]
    json: bool,
    /// Do the same work in PyTorch, by turns: `python`, or the path of one that has torch,
    /// transformers and peft (`bench/peer/requirements.txt`)
    #[arg(long)]
    peer: Option<String>,
    /// Hold `smore plan` against training steps, and nothing else
    #[arg(long)]
    plan: bool,
    /// Do the work that comes in on the standard input
    #[arg(long, hide = true)]
    worker: bool,
}

fn main() -> Result<()> {
    smore_engine::heap::prepare();
    let args = Args::parse();
    if args.worker {
        return work::serve();
    }
    if args.plan {
        let ratios = planned::compare()?;
        if args.json {
            println!("{}", serde_json::json!({ "planned_to_measured": ratios }));
        }
        return Ok(());
    }
    suite::run(&args)
}
