//! `smore demo`

use crate::progress::Progress;
use crate::table::{self, bytes, count};
use anyhow::Result;
use smore_tune::demo::compare::{Comparison, Side, compare};
use smore_tune::demo::skills::Skill;
use smore_tune::routing::LayerUsage;
use std::path::Path;

/// The base model, made by `cargo xtask demo-base`.
pub(crate) const BASE: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../assets/demo-base/config.json")),
    ("generation_config.json", include_bytes!("../assets/demo-base/generation_config.json")),
    ("model.safetensors", include_bytes!("../assets/demo-base/model.safetensors")),
    ("tokenizer.json", include_bytes!("../assets/demo-base/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../assets/demo-base/tokenizer_config.json")),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seed of the data, the starting values and the order of the samples
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Print one JSON object on standard output and nothing else
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.json {
        introduce();
    }
    let json = args.json;
    let mut watch = |name: &str, steps: usize| -> Box<dyn smore_tune::sft::Observer> {
        let label = if name == "lora" { "LoRA   " } else { "S'MoRE " };
        Box::new(Progress::new(label, (0, steps), json))
    };
    let result = compare(Path::new("runs/demo"), &BASE, args.seed, &mut watch)?;
    if args.json {
        println!("{}", serde_json::to_string(&result)?);
    } else {
        show(&result);
    }
    Ok(())
}

fn introduce() {
    println!("A frozen 0.8 M-parameter Llama learns six skills of a maintenance desk:");
    for skill in Skill::ALL {
        println!("  {:8} {}", skill.name(), skill.description());
    }
    println!("LoRA and S'MoRE train equally many parameters on the same samples.\n");
}

fn show(c: &Comparison) {
    let percent = |x: f64| format!("{:.1}%", 100.0 * x);
    let row = |name: &str, s: &Side| {
        vec![
            name.to_owned(),
            count(s.trainable_parameters),
            format!("{:.3}", s.loss),
            percent(s.accuracy),
            format!("{:.1}", s.seconds),
            bytes(s.peak_memory_bytes),
        ]
    };
    let sides = [("base", &c.base), ("LoRA", &c.lora), ("S'MoRE", &c.smore)];
    println!();
    table::print(
        &["", "trained parameters", "held-out loss", "accuracy", "seconds", "peak memory"],
        &sides.map(|(name, side)| row(name, side)),
    );
    println!();
    let by_skill = |skill: &Skill| {
        let cells =
            sides.map(|(_, s)| s.by_skill.get(skill.name()).map_or(String::new(), |&x| percent(x)));
        [vec![skill.name().to_owned()], cells.to_vec()].concat()
    };
    table::print(&["accuracy", "base", "LoRA", "S'MoRE"], &Skill::ALL.map(|s| by_skill(&s)));
    println!();
    routers(&c.usage);
    println!("\nOne seed decides little: try `--seed 1`, `--seed 2`, ...");
    println!(
        "Everything is in {}; look at {}",
        c.folder.display(),
        c.folder.join("report.html").display()
    );
}

/// How the routers used their experts, a line for each adapted map.
fn routers(usage: &[LayerUsage]) {
    println!("How S'MoRE's routers used their experts on the held-out questions");
    let mut rows = Vec::new();
    for u in usage {
        let bars: Vec<String> = u.share.iter().map(|s| format!("{:3.0}", 100.0 * s)).collect();
        rows.push(vec![
            u.path.trim_start_matches("model.layers.").to_owned(),
            u.layer.to_string(),
            bars.join(" "),
            format!("{:.2}", u.evenness()),
            u.idle().to_string(),
        ]);
    }
    table::print(&["block and map", "layer", "% of selections", "evenness", "idle"], &rows);
}
