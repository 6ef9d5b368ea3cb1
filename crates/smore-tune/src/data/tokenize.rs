//! Records to token sequences.

use std::ops::Range;

use super::record::{Content, Document};
use super::{Origin, Sample};
use crate::error::{Error, Result};
use crate::template::{Message, Template};
use crate::tokenizer::Tokenizer;

/// The samples of one record: one for a conversation, as many as needed for a text.
///
/// # Errors
/// A sample would have no target, or the template refuses the conversation.
pub fn tokenize(
    document: &Document,
    tokenizer: &Tokenizer,
    template: &Template,
    cutoff_len: usize,
) -> Result<Vec<Sample>> {
    let origin = &document.origin;
    let tools = document.tools.as_ref();
    let chat = |messages: &[Message], n_untrained: usize| {
        let (text, ranges) =
            template.render_training_with(messages, tools).map_err(|e| at(e, origin))?;
        let mut ranges = weighted(ranges, messages, origin)?;
        ranges.drain(..n_untrained.min(ranges.len()));
        let bos = template.is_plain();
        let sample = chat_sample(&text, &ranges, bos, tokenizer, cutoff_len, origin)?;
        Ok(vec![sample])
    };
    match &document.content {
        Content::Chat(messages) => chat(messages, 0),
        Content::Completion(prompt, completion) => {
            let n_untrained = n_ranges(prompt, template, origin)?;
            chat(&[prompt.as_slice(), completion].concat(), n_untrained)
        }
        Content::Text(text) => text_samples(text, tokenizer, cutoff_len, origin),
    }
}

/// The ranges without those of answers that are not to be trained, whose places stay empty.
fn weighted(
    mut ranges: Vec<Range<usize>>,
    messages: &[Message],
    origin: &Origin,
) -> Result<Vec<Range<usize>>> {
    let answers: Vec<&Message> = messages.iter().filter(|message| message.is_answer()).collect();
    if answers.iter().all(|answer| answer.trained) {
        return Ok(ranges);
    }
    if answers.iter().all(|answer| !answer.trained) {
        return Err(origin.error(
            "no trained token: every answer has weight 0; remove the record or give one weight 1",
        ));
    }
    if ranges.len() != answers.len() {
        return Err(origin.error(format!(
            "the chat template marks {} parts of {} answers as trained, so that their weights cannot \
             be told apart; remove the weights, or mark each answer once",
            ranges.len(),
            answers.len()
        )));
    }
    for (range, answer) in ranges.iter_mut().zip(answers) {
        if !answer.trained {
            range.end = range.start;
        }
    }
    Ok(ranges)
}

/// Number of trained ranges that the answers among `messages` give.
fn n_ranges(messages: &[Message], template: &Template, origin: &Origin) -> Result<usize> {
    if !messages.iter().any(Message::is_answer) {
        return Ok(0);
    }
    Ok(template.render_training(messages).map_err(|e| at(e, origin))?.1.len())
}

/// A template's complaint, at the record it is about.
fn at(error: Error, origin: &Origin) -> Error {
    match error {
        Error::Template { name, message } => {
            origin.error(format!("chat template {name}: {message}"))
        }
        other => other,
    }
}

/// Tokenizes a rendered conversation once, so that training reads what serving writes.
fn chat_sample(
    text: &str,
    ranges: &[Range<usize>],
    may_add_bos: bool,
    tokenizer: &Tokenizer,
    cutoff_len: usize,
    origin: &Origin,
) -> Result<Sample> {
    let tokens = tokenizer.encode_with_offsets(text)?;
    let (mut ids, mut trained): (Vec<u32>, Vec<bool>) = tokens
        .into_iter()
        .map(|(id, bytes)| (id, ranges.iter().any(|r| overlap(r, &bytes))))
        .unzip();
    // A chat template writes BOS itself.
    if let Some(bos) = tokenizer.bos_to_add(&ids).filter(|_| may_add_bos) {
        ids.insert(0, bos);
        trained.insert(0, false);
    }
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id(), &ids[..])
        && may_add_bos
        && [*first, *second] == [bos; 2]
    {
        return Err(origin.error(format!(
            "begins with `{}` twice; take it out of the record",
            tokenizer.bos_token().unwrap_or_default()
        )));
    }
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    let full_len = ids.len();
    ids.truncate(cutoff_len);
    trained.truncate(cutoff_len);
    let truncated = full_len > cutoff_len;
    Sample::new(ids, trained, origin.clone(), truncated).ok_or_else(|| {
        origin.error(if truncated {
            format!(
                "no trained token: data.cutoff_len is {cutoff_len}, the sample has {full_len} \
                 tokens and nothing of its answer is left; raise data.cutoff_len or shorten the \
                 prompt"
            )
        } else {
            "no trained token: the answer is empty; remove the record or give it an answer".into()
        })
    })
}

fn overlap(range: &Range<usize>, bytes: &Range<usize>) -> bool {
    bytes.start < range.end && bytes.end > range.start && !range.is_empty()
}

/// Cuts a text in pieces of at most `cutoff_len` tokens. Every token of the text is a target once.
/// A piece begins with BOS or, if the tokenizer has none, with the token before.
fn text_samples(
    text: &str,
    tokenizer: &Tokenizer,
    cutoff_len: usize,
    origin: &Origin,
) -> Result<Vec<Sample>> {
    let mut ids = tokenizer.encode(text)?;
    ids.extend(tokenizer.eos_id().filter(|eos| ids.last() != Some(eos)));
    let bos = tokenizer.bos_to_add(&[]);
    let first = match bos {
        // The text may write BOS itself.
        Some(bos) if ids.first() != Some(&bos) => bos,
        _ if ids.is_empty() => return Err(origin.error(TOO_SHORT)),
        _ => ids.remove(0),
    };
    let mut samples = Vec::new();
    let mut before = first;
    for piece in ids.chunks(cutoff_len.max(2) - 1) {
        let mut piece_ids = vec![bos.unwrap_or(before)];
        piece_ids.extend_from_slice(piece);
        before = piece[piece.len() - 1];
        let mut trained = vec![true; piece_ids.len()];
        trained[0] = false;
        samples.extend(Sample::new(piece_ids, trained, origin.clone(), false));
    }
    if samples.is_empty() { Err(origin.error(TOO_SHORT)) } else { Ok(samples) }
}

const TOO_SHORT: &str = "no trained token: the text is a single token, and nothing predicts the \
                         first; remove the record or give it more text";
