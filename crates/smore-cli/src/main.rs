//! The program `smore`: one file per command; all printing happens here.

// A program's output is its interface.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod audit;
mod clock;
mod compare;
mod data;
mod demo;
mod distill;
mod doctor;
mod drift;
mod eval;
mod folders;
mod generate;
mod grow;
mod import;
mod inspect;
mod interrupt;
mod merge;
mod models;
mod plan;
mod progress;
mod reproduce;
mod routes;
mod sweep;
mod table;
mod trace;
mod train;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Fine-tune frozen Hugging Face models with S'MoRE, a structural mixture of residual experts.
#[derive(Parser)]
#[command(name = "smore", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show on this machine, with nothing but this program, what S'MoRE does
    Demo(demo::Args),
    /// Put adapters, runs, configurations or results of `eval` side by side
    Compare(compare::Args),
    /// Train an adapter (or a whole model) as a YAML file says
    Train(train::Args),
    /// Continue a prompt with a model and, if given, an adapter
    Generate(generate::Args),
    /// Check the log of generations that `generate --audit` keeps
    Audit(audit::Args),
    /// Show what of the data files a run trains on: counts, lengths, a sample and its mask
    Data(data::Args),
    /// Fit the best LoRA of a given rank to an adapter, for servers that know only LoRA
    DistillLora(distill::Args),
    /// Look at model, adapter, data and machine before anything long starts
    Doctor(doctor::Args),
    /// Compare the routing of new traffic with that of the held-out samples; exit code 1 on alarm
    Drift(drift::Args),
    /// Answer a question set with a model and, on the same samples, with an adapter
    Eval(eval::Args),
    /// Make a deeper S'MoRE of an adapter that exists, with the same function
    Grow(grow::Args),
    /// Turn a configuration of LLaMA-Factory or of S'MoRE's authors into one for `train`
    ImportConfig(import::Args),
    /// Show an adapter's structure, size, cost and flexibility, from its folder or a configuration
    Inspect(inspect::Args),
    /// Merge a LoRA into its base model
    Merge(merge::Args),
    /// Tell parameters, file size, FLOPs and memory before a run, beside LoRA; needs no weights
    Plan(plan::Args),
    /// Studies that anyone can run again
    Reproduce(reproduce::Args),
    /// Show how a run's or an adapter's routers use their experts, on the terminal or as a page
    Routes(routes::Args),
    /// Train many runs that differ in some keys, under one budget; goes on where it stopped
    Sweep(sweep::Args),
    /// Show which experts act on which tokens, and what an answer loses without them
    Trace(trace::Args),
    /// Compute recorded cases of other implementations again and compare
    Verify(verify::Args),
}

fn main() -> ExitCode {
    // `smore ... | head` ends quietly, as other programs do.
    sigpipe::reset();
    smore_engine::heap::prepare();
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Audit(args) => return ended(audit::run(&args)),
        Command::Data(args) => data::run(&args),
        Command::DistillLora(args) => distill::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Drift(args) => return ended(drift::run(&args)),
        Command::Eval(args) => eval::run(&args),
        Command::Grow(args) => grow::run(&args),
        Command::ImportConfig(args) => import::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Reproduce(args) => reproduce::run(&args),
        Command::Routes(args) => routes::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    ended(result.map(|()| ExitCode::SUCCESS))
}

/// The exit code, with an error told.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 1: the run failed; 2: bad arguments, config, data or folders; 130: interrupted.
fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<smore_tune::error::Error>().map_or(1, smore_tune::error::Error::exit_code)
}
