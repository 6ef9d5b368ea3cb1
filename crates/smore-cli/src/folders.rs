//! What commands ask of the folders they are given.

use anyhow::Result;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::error::Error;
use std::path::Path;

/// Nothing that exists is written over.
pub(crate) fn must_be_new(out: &Path) -> Result<()> {
    if out.exists() {
        let message = format!("{} exists; name a new folder", out.display());
        return Err(Error::Config { file: "--out".into(), message }.into());
    }
    Ok(())
}

/// Says so where an adapter was trained on another model than the one it meets.
pub(crate) fn note_other_base(adapter: &Path, model: &Path) -> Result<()> {
    if let Some(manifest) = Manifest::read(adapter)?
        && let Some(file) = manifest.base.quick_difference(model)?
    {
        eprintln!(
            "note: {} was trained on a model whose {file} is not that of {}",
            adapter.display(),
            model.display()
        );
    }
    Ok(())
}
