//! Shapes of common models, by name.

use crate::error::nearest;
use crate::model::spec::DecoderSpec;
use serde_json::json;

/// Name, `model_type`, hidden, intermediate, blocks, heads, key and value heads, width of a head,
/// tokens, tied.
type Row = (&'static str, &'static str, [usize; 7], bool);

const MODELS: [Row; 10] = [
    ("llama-3.2-1b", "llama", [2048, 8192, 16, 32, 8, 64, 128_256], true),
    ("llama-3-8b", "llama", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
    ("llama-3.1-8b", "llama", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
    ("mistral-7b", "mistral", [4096, 14_336, 32, 32, 8, 128, 32_000], false),
    ("qwen2.5-0.5b", "qwen2", [896, 4864, 24, 14, 2, 64, 151_936], true),
    ("qwen3-0.6b", "qwen3", [1024, 3072, 28, 16, 8, 128, 151_936], true),
    ("qwen3-4b", "qwen3", [2560, 9728, 36, 32, 8, 128, 151_936], true),
    ("qwen3-32b", "qwen3", [5120, 25_600, 64, 64, 8, 128, 151_936], false),
    ("gemma-2-2b", "gemma2", [2304, 9216, 26, 8, 4, 256, 256_000], true),
    ("gemma-2-9b", "gemma2", [3584, 14_336, 42, 16, 8, 256, 256_000], true),
];

/// All names.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(name, ..)| *name)
}

/// The shape of the model with this name, whatever its case.
///
/// # Errors
/// An unknown name, with the nearest known one.
///
/// # Panics
/// Never: every row of the table is a valid model.
pub fn by_name(name: &str) -> Result<DecoderSpec, String> {
    let lower = name.to_lowercase();
    let Some((_, kind, n, tied)) = MODELS.iter().find(|(known, ..)| *known == lower) else {
        let near =
            nearest(&lower, names()).map_or(String::new(), |n| format!("; did you mean {n}?"));
        let known: Vec<_> = names().collect();
        return Err(format!(
            "no file, folder or known model; expected a model's folder, its config.json, or one of \
             {}{near}",
            known.join(", ")
        ));
    };
    let [hidden, intermediate, blocks, heads, kv_heads, head_dim, vocabulary] = *n;
    let config = json!({
        "model_type": kind, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    });
    Ok(DecoderSpec::from_json(&config).expect("the table holds valid models"))
}
