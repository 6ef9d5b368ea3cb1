//! The base's folder: settings, tokenizer, template, every tensor.

use super::{Area, Examined, Subject};
use crate::model::folder::ModelFolder;
use crate::model::spec::DecoderSpec;
use crate::template::Template;
use crate::tokenizer::Tokenizer;
use smore_engine::Dtype;

pub(super) fn check(subject: &Subject, examined: &mut Examined) {
    let model = &subject.model;
    let spec = DecoderSpec::read(&model.join("config.json"));
    examined.spec = examined.keep(Area::Model, spec);
    let tokenizer = Tokenizer::open(model);
    examined.tokenizer = examined.keep(Area::Tokenizer, tokenizer);
    if let Some(tokenizer) = &examined.tokenizer {
        let template = Template::open(model, tokenizer);
        examined.template = examined.keep(Area::Template, template);
    }
    let Some(spec) = &examined.spec else { return };
    let family = spec.family.name();
    if subject.draws_weights() {
        let message = format!("{family} of {} blocks, to be drawn anew", spec.blocks);
        return examined.good(Area::Model, message);
    }
    let folder = ModelFolder::open(model);
    examined.folder = examined.keep(Area::Model, folder);
    let Some(folder) = &examined.folder else { return };
    let count: usize = folder.tensors().map(|t| t.rows * t.cols).sum();
    let stored = |dtype: Dtype| folder.tensors().any(|t| t.dtype == dtype);
    let types = [(Dtype::F32, "f32"), (Dtype::F16, "f16"), (Dtype::Bf16, "bf16")];
    let types: Vec<&str> =
        types.into_iter().filter(|(dtype, _)| stored(*dtype)).map(|(_, name)| name).collect();
    let message = format!(
        "{family} of {} blocks, {:.1} M parameters in {}, all tensors there",
        folder.spec.blocks,
        count as f64 / 1e6,
        types.join(" and ")
    );
    examined.good(Area::Model, message);
}
