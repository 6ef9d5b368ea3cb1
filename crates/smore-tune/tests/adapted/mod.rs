//! Adapters on the recorded decoders.

use smore_tune::checkpoint::{LoadedAdapter, Settings};
use smore_tune::config::AdapterConfig;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use std::path::{Path, PathBuf};

/// A recorded decoder's folder.
pub(crate) fn base(family: &str) -> PathBuf {
    Path::new("tests/recorded").join(family)
}

/// An adapter none of whose values is zero.
pub(crate) fn adapter(folder: &ModelFolder, section: &str) -> LoadedAdapter {
    let config: AdapterConfig = serde_json::from_str(section).unwrap();
    let adapters = Adapters::new(&config, &folder.spec).unwrap();
    let mut values = adapters.init(4);
    for (i, v) in values.iter_mut().enumerate() {
        *v += 0.05 * (((i * 37) % 23) as f32 - 11.0) / 11.0;
    }
    let settings = Settings::new(config, Path::new("base"));
    LoadedAdapter { settings, adapters, values }
}
