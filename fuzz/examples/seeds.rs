//! Puts the good files of every reader into its corpus: `cargo run --example seeds`.

fn main() -> std::io::Result<()> {
    for reader in &smore_fuzz::READERS {
        let corpus = std::path::Path::new("corpus").join(reader.name);
        std::fs::create_dir_all(&corpus)?;
        for (i, file) in (reader.good)().iter().enumerate() {
            std::fs::write(corpus.join(format!("good-{i}")), file)?;
        }
    }
    Ok(())
}
