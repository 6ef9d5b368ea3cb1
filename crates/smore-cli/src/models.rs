//! A model, its adapter and what turns text into tokens, opened together.

use crate::folders::note_other_base;
use anyhow::Result;
use smore_engine::Cpu;
use smore_tune::audit::PromptLayout;
use smore_tune::checkpoint::load_adapter;
use smore_tune::inject::Adapters;
use smore_tune::model::Model;
use smore_tune::model::folder::ModelFolder;
use smore_tune::template::Template;
use smore_tune::tokenizer::Tokenizer;
use std::path::Path;

pub(crate) struct Loaded {
    pub(crate) folder: ModelFolder,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Template,
    adapters: Option<Adapters>,
    values: Vec<f32>,
}

impl Loaded {
    /// Opens the base at `model` and, if given, an adapter on it.
    pub(crate) fn open(model: &Path, adapter: Option<&Path>) -> Result<Self> {
        let tokenizer = Tokenizer::open(model)?;
        let template = Template::open(model, &tokenizer)?;
        let folder = ModelFolder::open(model)?;
        let (adapters, values) = match adapter {
            Some(path) => {
                let loaded = load_adapter(path, &folder.spec)?;
                note_other_base(path, model)?;
                (loaded.adapters, loaded.values)
            }
            None => (Adapters::none(&folder.spec), Vec::new()),
        };
        Ok(Self { folder, tokenizer, template, adapters: Some(adapters), values })
    }

    /// How a prompt is laid out: a model with a chat template is spoken to through it, a bare base
    /// continues the text.
    pub(crate) fn layout(&self, raw: bool, chat: bool) -> PromptLayout {
        let chat = chat || !(raw || self.template.is_plain());
        if chat { PromptLayout::Chat } else { PromptLayout::Raw }
    }

    /// The model, for sequences of at most `context` tokens; once.
    pub(crate) fn model(&mut self, context: usize) -> Model<Cpu<f32>> {
        let adapters = self.adapters.take().expect("a model is built once");
        Model::new(Cpu::new(), &self.folder, adapters, &self.values, context)
    }
}
