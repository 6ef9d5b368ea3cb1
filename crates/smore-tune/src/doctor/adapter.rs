//! What is trained or used on the base.

use super::{Area, Examined, Subject};
use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::{LoadedAdapter, Settings, load_adapter};
use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::learning_rates::rates;
use crate::model::spec::DecoderSpec;

pub(super) fn check(subject: &Subject, examined: &mut Examined) {
    let (Some(config), Some(spec)) = (&subject.adapter, &examined.spec) else { return };
    let start = start(subject, config, spec).and_then(|start| {
        let routers = subject.train.as_ref().map(|train| &train.router_lr_multiplier);
        let fits = routers.map_or(Ok(()), |r| rates(&start.adapters, r, 0).map(drop));
        fits.map_err(|message| Error::Config { file: subject.name.clone(), message })?;
        Ok(start)
    });
    examined.start = examined.keep(Area::Adapter, start);
    if let AdapterConfig::Saved(saved) = config {
        let other = Manifest::read(&saved.path).and_then(|manifest| {
            let base = manifest.map(|manifest| manifest.base);
            let file = base.as_ref().map(|base| base.quick_difference(&subject.model)).transpose();
            Ok(file?.flatten().map(str::to_owned))
        });
        if let Some(Some(file)) = examined.keep(Area::Adapter, other) {
            let message = format!(
                "{} was trained on a model whose {file} is not that of {}",
                saved.path.display(),
                subject.model.display()
            );
            examined.warn(Area::Adapter, message, "name the model that it was trained on");
        }
    }
    let Some(start) = &examined.start else { return };
    let (slots, len) = (start.adapters.slots.len(), start.adapters.len());
    let kind = start.settings.config.kind();
    examined.good(
        Area::Adapter,
        if let AdapterConfig::Full(_) = config {
            "none: every parameter of the base is trained".to_owned()
        } else {
            format!("{kind} on {slots} modules, {len} parameters")
        },
    );
}

/// The adapter to train: as the config describes it, with its initial values, or as a folder has it.
fn start(subject: &Subject, config: &AdapterConfig, spec: &DecoderSpec) -> Result<LoadedAdapter> {
    let dropout = subject.train.as_ref().map_or(0.0, |train| train.lora_dropout);
    let base = subject.model.to_string_lossy().into_owned();
    if let AdapterConfig::Saved(saved) = config {
        let mut loaded = load_adapter(&saved.path, spec)?;
        loaded.settings.base = Some(base);
        loaded.settings.dropout = dropout;
        return Ok(loaded);
    }
    let adapters = Adapters::new(config, spec)
        .map_err(|message| Error::Config { file: subject.name.clone(), message })?;
    let values = adapters.init(subject.seed());
    let settings = Settings { dropout, ..Settings::new(config.clone(), &subject.model) };
    Ok(LoadedAdapter { settings, adapters, values })
}
