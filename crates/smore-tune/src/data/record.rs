//! One record of a data file, checked field by field.

use serde_json::{Map, Value};

use super::Origin;
use crate::config::Format;
use crate::error::{Result, nearest};
use crate::template::{ASSISTANT, Message};

/// One record, ready to be turned into tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What it says.
    pub content: Content,
    /// Where it stands.
    pub origin: Origin,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A conversation; every answer in it is trained.
    Chat(Vec<Message>),
    /// The messages of a prompt, and those that complete it: answers in the prompt are not trained.
    Completion(Vec<Message>, Vec<Message>),
    /// A text, trained whole.
    Text(String),
}

/// The format that a record's keys speak for.
pub(super) fn detect(record: &Value, origin: &Origin) -> Result<Format> {
    let record = Record::new(record, origin)?;
    let has = |key: &str| record.fields.contains_key(key);
    if has("messages") {
        Ok(Format::Messages)
    } else if has("instruction") {
        Ok(Format::Alpaca)
    } else if has("prompt") || has("completion") {
        Ok(Format::PromptCompletion)
    } else if has("text") {
        Ok(Format::Text)
    } else {
        Err(origin.error(format!(
            "format not recognised: {}; expected instruction and output (alpaca), messages, \
             prompt and completion, or text",
            record.found()
        )))
    }
}

/// Reads one record of a known format.
pub(super) fn parse(record: &Value, format: Format, origin: &Origin) -> Result<Content> {
    let record = Record::new(record, origin)?;
    match format {
        Format::Alpaca => record.alpaca(),
        Format::Messages => {
            let field = record.required("messages", format)?;
            Ok(Content::Chat(record.messages("messages", field)?))
        }
        Format::PromptCompletion => Ok(Content::Completion(
            record.string_or_messages("prompt", "user")?,
            record.string_or_messages("completion", ASSISTANT)?,
        )),
        Format::Text => {
            let field = record.required("text", format)?;
            let text = record.string("text", field)?;
            if text.trim().is_empty() {
                return Err(origin.error("field `text` is empty; expected text to train on"));
            }
            Ok(Content::Text(text))
        }
    }
}

/// A record's fields and its place.
struct Record<'a> {
    fields: &'a Map<String, Value>,
    origin: &'a Origin,
}

impl<'a> Record<'a> {
    fn new(value: &'a Value, origin: &'a Origin) -> Result<Self> {
        match value.as_object() {
            Some(fields) => Ok(Self { fields, origin }),
            None => Err(origin.error(format!("the record is {}; expected an object", kind(value)))),
        }
    }

    fn alpaca(&self) -> Result<Content> {
        let instruction =
            self.string("instruction", self.required("instruction", Format::Alpaca)?)?;
        let output = self.string("output", self.required("output", Format::Alpaca)?)?;
        let input = self.optional_string("input")?.filter(|input| !input.is_empty());
        let mut messages = Vec::new();
        if let Some(system) = self.optional_string("system")?.filter(|system| !system.is_empty()) {
            messages.push(Message::new("system", system));
        }
        messages.extend(self.history()?);
        let question = match input {
            Some(input) => format!("{instruction}\n{input}"),
            None => instruction,
        };
        messages.push(Message::new("user", question));
        messages.push(Message::new(ASSISTANT, output));
        Ok(Content::Chat(messages))
    }

    /// `history: [[question, answer], ...]`
    fn history(&self) -> Result<Vec<Message>> {
        let Some(history) = self.fields.get("history").filter(|history| !history.is_null()) else {
            return Ok(Vec::new());
        };
        let wrong = |place: &str, value: &Value| {
            self.origin.error(format!(
                "field `{place}` is {}; expected a list of [question, answer] pairs",
                kind(value)
            ))
        };
        let mut messages = Vec::new();
        for (i, turn) in
            history.as_array().ok_or_else(|| wrong("history", history))?.iter().enumerate()
        {
            let place = format!("history[{i}]");
            match turn.as_array().map(Vec::as_slice) {
                Some([question, answer]) => {
                    let question = self.string(&format!("{place}[0]"), question)?;
                    let answer = self.string(&format!("{place}[1]"), answer)?;
                    messages.push(Message::new("user", question));
                    messages.push(Message::new(ASSISTANT, answer));
                }
                _ => return Err(wrong(&place, turn)),
            }
        }
        Ok(messages)
    }

    fn string_or_messages(&self, key: &str, role: &str) -> Result<Vec<Message>> {
        match self.required(key, Format::PromptCompletion)? {
            Value::String(text) => Ok(vec![Message::new(role, text)]),
            value @ Value::Array(_) => self.messages(key, value),
            other => Err(self.origin.error(format!(
                "field `{key}` is {}; expected a string or a list of messages",
                kind(other)
            ))),
        }
    }

    fn messages(&self, place: &str, value: &Value) -> Result<Vec<Message>> {
        let Some(list) = value.as_array() else {
            return Err(self.origin.error(format!(
                "field `{place}` is {}; expected a list of {{role, content}}",
                kind(value)
            )));
        };
        let messages = list
            .iter()
            .enumerate()
            .map(|(i, message)| self.message(&format!("{place}[{i}]"), message));
        let messages = messages.collect::<Result<Vec<_>>>()?;
        if messages.is_empty() {
            return Err(self
                .origin
                .error(format!("field `{place}` is an empty list; expected messages")));
        }
        Ok(messages)
    }

    fn message(&self, place: &str, value: &Value) -> Result<Message> {
        let Some(fields) = value.as_object() else {
            return Err(self
                .origin
                .error(format!("field `{place}` is {}; expected {{role, content}}", kind(value))));
        };
        let message = Record { fields, origin: self.origin };
        let field = |key: &str| message.required_at(place, key, Format::Messages);
        let role = self.string(&format!("{place}.role"), field("role")?)?;
        let content = self.content(&format!("{place}.content"), field("content")?)?;
        if role == ASSISTANT {
            message.refuse_weight(place)?;
        }
        Ok(Message { role, content })
    }

    /// A string, or a list of `{type: text, text}` parts.
    fn content(&self, place: &str, value: &Value) -> Result<String> {
        let Some(parts) = value.as_array() else {
            return self.string(place, value);
        };
        let mut text = String::new();
        for (i, part) in parts.iter().enumerate() {
            // LLaMA-Factory writes `value` where OpenAI writes `text`.
            let piece = part["text"].as_str().or_else(|| part["value"].as_str());
            let is_text = matches!(part["type"].as_str(), None | Some("text"));
            text.push_str(piece.filter(|_| is_text).ok_or_else(|| {
                self.origin.error(format!(
                    "field `{place}[{i}]` is not text; expected {{type: text, text: ...}}"
                ))
            })?);
        }
        Ok(text)
    }

    /// Weights of single messages are not supported; passing over one would train what the user
    /// took out.
    fn refuse_weight(&self, place: &str) -> Result<()> {
        for key in ["weight", "loss_weight", "train"] {
            let off = match self.fields.get(key) {
                None | Some(Value::Null | Value::Bool(true)) => false,
                Some(Value::Number(weight)) => weight.as_f64() != Some(1.0),
                Some(_) => true,
            };
            if off {
                return Err(self.origin.error(format!(
                    "field `{place}.{key}` is {}; only answers of weight 1 are supported; remove \
                     the field, or use prompt and completion to train the last answer alone",
                    self.fields[key]
                )));
            }
        }
        Ok(())
    }

    fn required(&self, key: &str, format: Format) -> Result<&'a Value> {
        self.required_at("", key, format)
    }

    fn required_at(&self, place: &str, key: &str, format: Format) -> Result<&'a Value> {
        self.fields.get(key).ok_or_else(|| {
            let near = nearest(key, self.fields.keys().map(String::as_str));
            let hint = near.map_or_else(String::new, |near| format!("; rename `{near}`?"));
            let dot = if place.is_empty() { "" } else { "." };
            self.origin.error(format!(
                "field `{place}{dot}{key}` is missing (format {format}); {}{hint}",
                self.found()
            ))
        })
    }

    fn optional_string(&self, key: &str) -> Result<Option<String>> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => self.string(key, value).map(Some),
        }
    }

    fn string(&self, place: &str, value: &Value) -> Result<String> {
        value.as_str().map(str::to_owned).ok_or_else(|| {
            self.origin.error(format!("field `{place}` is {}; expected a string", kind(value)))
        })
    }

    /// The keys there are, in words.
    fn found(&self) -> String {
        if self.fields.is_empty() {
            return "the record has no fields".to_owned();
        }
        let keys: Vec<&str> = self.fields.keys().map(String::as_str).collect();
        format!("found {}", keys.join(", "))
    }
}

/// A value's type in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
