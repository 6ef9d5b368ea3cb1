//! Deriving an output again.

use super::{Asked, Record, RoutingDigest};
use crate::error::Result;
use crate::generate::generate_routed;
use crate::model::Model;
use crate::template::{Message, Template};
use crate::tokenizer::Tokenizer;
use smore_engine::Cpu;

/// How a generation done again differs from its record.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// Nothing differs to the bit.
    None,
    /// The same output by the same experts; gate weights differ in their last bits, as on another
    /// processor.
    Rounding,
    /// The record is not reproduced; says where.
    Other(String),
}

/// A generation done again: as a record would hold it.
pub struct Rerun<'a> {
    /// The model with its adapters; its context holds prompt and new tokens.
    pub model: &'a Model<Cpu<f32>>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its template.
    pub template: &'a Template,
}

impl Rerun<'_> {
    /// Generates again as `record` says, from the text of its prompt.
    ///
    /// # Errors
    /// As [`crate::generate::generate`].
    pub fn of(&self, record: &Record, prompt: &str) -> Result<Record> {
        let ids = record.layout.encode(self.template, self.tokenizer, prompt)?;
        let asked = Asked {
            prompt,
            ids: &ids,
            layout: record.layout,
            max_new_tokens: record.max_new_tokens,
            sampling: record.sampling,
        };
        let mut routing = RoutingDigest::default();
        let generated = generate_routed(
            self.model,
            self.tokenizer,
            &ids,
            record.max_new_tokens,
            record.sampling,
            |_| {},
            |places| routing.see(places),
        )?;
        Ok(Record::new(record.time.clone(), record.made.clone(), &asked, &generated, routing, true))
    }
}

impl super::PromptLayout {
    /// A prompt's tokens.
    ///
    /// # Errors
    /// If the template refuses it.
    pub fn encode(
        self,
        template: &Template,
        tokenizer: &Tokenizer,
        prompt: &str,
    ) -> Result<Vec<u32>> {
        match self {
            Self::Chat => template.encode_prompt(tokenizer, &[Message::new("user", prompt)]),
            Self::Raw => tokenizer.encode_with_special(prompt),
        }
    }
}

/// Holds a generation done again against its record.
pub fn difference(record: &Record, again: &Record) -> Difference {
    if record.prompt_ids_sha256 != again.prompt_ids_sha256 {
        return Difference::Other("the prompt gives other tokens".into());
    }
    let routes = || record.routing.iter().zip(&again.routing);
    if let Some(token) = routes().position(|(a, b)| a != b) {
        return Difference::Other(format!(
            "other experts act on token {token} of {} (the prompt has {})",
            record.routing.len(),
            record.prompt_tokens
        ));
    }
    if record.output_ids_sha256 != again.output_ids_sha256
        || record.output_sha256 != again.output_sha256
        || record.finish_reason != again.finish_reason
    {
        return Difference::Other(format!(
            "the output differs ({} tokens, now {})",
            record.output_tokens, again.output_tokens
        ));
    }
    if record.routing.len() != again.routing.len() {
        return Difference::Other("the routing of another number of tokens was recorded".into());
    }
    if record.output.as_ref().is_some_and(|text| super::text_hash(text) != record.output_sha256) {
        return Difference::Other("the output's text is not that of its hash".into());
    }
    if record.gate_weights_sha256 == again.gate_weights_sha256 {
        Difference::None
    } else {
        Difference::Rounding
    }
}
