//! Model folders in Hugging Face's layout.

use super::folder::write_folder;
use super::tensors::{write_tensors, write_tensors_bf16};
use crate::error::{Error, Result};
use crate::model::spec::DecoderSpec;
use std::path::Path;

/// Writes a Hugging Face model folder: the tensors of `spec` with these values, and the settings
/// and tokenizer of the folder it came from.
///
/// # Errors
/// If reading the source or writing fails.
pub fn save_model(path: &Path, spec: &DecoderSpec, source: &Path, values: &[f32]) -> Result<()> {
    write_folder(path, |dir| fill_model(dir, spec, source, values))
}

/// As [`save_model`], among other files of a folder that is being written.
pub(crate) fn fill_model(
    dir: &Path,
    spec: &DecoderSpec,
    source: &Path,
    values: &[f32],
) -> Result<()> {
    copy_model_files(source, dir)?;
    let mut start = 0;
    let mut tensors = Vec::new();
    for (name, shape) in spec.tensors() {
        let len: usize = shape.iter().product();
        tensors.push((name, shape, &values[start..start + len]));
        start += len;
    }
    let file = dir.join("model.safetensors");
    if spec.bf16 { write_tensors_bf16(&file, &tensors) } else { write_tensors(&file, &tensors) }
}

/// Copies what a model folder holds besides weights.
///
/// # Errors
/// If reading or writing fails.
pub fn copy_model_files(from: &Path, to: &Path) -> Result<()> {
    for name in MODEL_FILES {
        let file = from.join(name);
        if file.is_file() {
            std::fs::copy(&file, to.join(name))
                .map_err(|source| Error::Io { path: file, source })?;
        }
    }
    Ok(())
}

/// What a model folder holds besides weights.
const MODEL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
