//! Writes the folder that the demo's base model is pre-trained from: config, tokenizer and corpus.
//! Run by `cargo xtask demo-base`.

use smore_tune::demo::write_base_folder;
use std::path::Path;

/// Documents of the corpus: about 10 million tokens.
const DOCUMENTS: usize = 240_000;
const SEED: u64 = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::args().nth(1).ok_or("usage: demo_base OUT")?;
    write_base_folder(Path::new(&out), SEED, DOCUMENTS)?;
    Ok(())
}
