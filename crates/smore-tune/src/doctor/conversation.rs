//! Tokenizer and template together: a conversation is laid out as in training, and looked at.

use super::{Area, Examined, Subject};
use crate::error::{Error, Result};
use crate::template::{ASSISTANT, Message, Template};
use crate::tokenizer::Tokenizer;
use std::path::Path;

pub(super) fn check(subject: &Subject, examined: &mut Examined) {
    let Some(tokenizer) = &examined.tokenizer else { return };
    let end = end_token(tokenizer, &subject.model);
    let size = tokenizer.vocab_size();
    let rendered = examined.template.as_ref().map(|template| render(template, tokenizer));
    let plain = examined.template.as_ref().is_some_and(Template::is_plain);
    if let Some(end) = examined.keep(Area::Tokenizer, end) {
        examined.good(Area::Tokenizer, format!("{size} tokens, end token `{end}`"));
        let rendered = rendered.and_then(|result| examined.keep(Area::Template, result));
        match rendered {
            Some(Ending::Stops) if plain => examined.good(
                Area::Template,
                "no chat template: a prompt, a line break, the answer and the end token",
            ),
            Some(Ending::Stops) => {
                examined.good(Area::Template, "renders a conversation; its end token is trained");
            }
            Some(Ending::RunsOn(token)) => examined.warn(
                Area::Template,
                format!("answers end in `{token}`, at which generation does not stop"),
                format!(
                    "add the id of `{token}` to eos_token_id in generation_config.json of the \
                     model's folder"
                ),
            ),
            None => {}
        }
    }
}

/// Without an end token a model cannot learn to stop.
fn end_token(tokenizer: &Tokenizer, model: &Path) -> Result<String> {
    tokenizer.eos_token().map(str::to_owned).ok_or_else(|| Error::Model {
        file: model.join("tokenizer_config.json"),
        message: "names no end token, so that the model would never learn to stop; give it \
                  `eos_token`, or generation_config.json an `eos_token_id`"
            .into(),
    })
}

/// How a rendered answer ends.
enum Ending {
    Stops,
    /// In a special token at which nothing stops.
    RunsOn(String),
}

fn render(template: &Template, tokenizer: &Tokenizer) -> Result<Ending> {
    let bad = |message: String| Error::Template { name: "of the model".into(), message };
    let messages = [Message::new("user", "What is 2 + 2?"), Message::new(ASSISTANT, "It is 4.")];
    let (text, ranges) = template.render_training(&messages)?;
    let tokens = tokenizer.encode_with_offsets(&text)?;
    let mut ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
    if template.is_plain() {
        ids.splice(0..0, tokenizer.bos_to_add(&ids));
    }
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id(), &ids[..])
        && *first == bos
        && *second == bos
    {
        return Err(bad(format!(
            "writes the token `{}` twice at the start; remove one from the template",
            tokenizer.bos_token().unwrap_or_default()
        )));
    }
    let trained = |bytes: &std::ops::Range<usize>| {
        ranges.iter().any(|range| bytes.start < range.end && bytes.end > range.start)
    };
    let Some((last, bytes)) = tokens.iter().rev().find(|(_, bytes)| trained(bytes)) else {
        return Err(bad(format!(
            "nothing of an answer is trained in {text:?}; correct its {{% generation %}} marks"
        )));
    };
    if tokenizer.stop_ids().contains(last) {
        return Ok(Ending::Stops);
    }
    let written = text[bytes.clone()].to_owned();
    if tokenizer.added_tokens().contains(&written) {
        return Ok(Ending::RunsOn(written));
    }
    Err(bad(format!(
        "the last trained token of an answer is {written:?}, so that the model would never learn \
         to stop; let the template write `{{{{ eos_token }}}}` at the end of an answer"
    )))
}
