//! Writes adapters for `cargo xtask ecosystem` on bases that have no tokenizer to train with.
//!
//! ```text
//! adapters random SECTION.yaml BASE OUT    every value drawn
//! adapters resave ADAPTER BASE OUT         read, and written again
//! ```

use rand_distr::{Distribution, Normal};
use smore::rng::{Purpose, stream};
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{LoadedAdapter, Settings, load_adapter, save_adapter};
use smore_tune::config::AdapterSection;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use std::error::Error;
use std::path::Path;

/// Standard deviation of what is added to the starting values, some of which are zero.
const DRAWN: f32 = 0.2;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [task, from, base, out] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] else {
        return Err("usage: adapters (random SECTION.yaml | resave ADAPTER) BASE OUT".into());
    };
    let folder = ModelFolder::open(Path::new(base))?;
    let LoadedAdapter { settings, adapters, values } = match task {
        "random" => random(Path::new(from), base, &folder)?,
        "resave" => load_adapter(Path::new(from), &folder.spec)?,
        other => return Err(format!("unknown task `{other}`").into()),
    };
    save_adapter(Path::new(out), &settings, &adapters, &values, &Manifest::default())?;
    Ok(())
}

fn random(
    section: &Path,
    base: &str,
    folder: &ModelFolder,
) -> Result<LoadedAdapter, Box<dyn Error>> {
    let config = AdapterSection::load(section)?.adapter;
    let adapters = Adapters::new(&config, &folder.spec)?;
    let mut values = adapters.init(1);
    let mut rng = stream(2, Purpose::AdapterInit, 0, 0);
    let noise = Normal::new(0.0, DRAWN)?;
    for value in &mut values {
        *value += noise.sample(&mut rng);
    }
    Ok(LoadedAdapter { settings: Settings::new(config, Path::new(base)), adapters, values })
}
