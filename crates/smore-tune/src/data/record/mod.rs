//! One record of a data file, checked field by field.

mod chat;
mod questions;

use serde_json::{Map, Value};

use super::Origin;
use crate::config::{Columns, Format, SourceConfig, Tags};
use crate::error::{Result, nearest};
use crate::template::Message;

/// One record, ready to be turned into tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What it says.
    pub content: Content,
    /// The tools that its conversation may use: a list, as chat templates expect it.
    pub tools: Option<Value>,
    /// Where it stands.
    pub origin: Origin,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A conversation; every answer in it is trained, but for those that say they are not.
    Chat(Vec<Message>),
    /// The messages of a prompt, and those that complete it: answers in the prompt are not trained.
    Completion(Vec<Message>, Vec<Message>),
    /// A text, trained whole.
    Text(String),
}

/// What a file calls its fields.
pub(super) struct Fields {
    columns: Columns,
    tags: Tags,
}

impl Fields {
    pub(super) fn new(source: &SourceConfig) -> Self {
        Self { columns: source.columns.clone(), tags: source.tags.clone() }
    }
}

/// The format that a record's keys speak for.
pub(super) fn detect(record: &Value, fields: &Fields, origin: &Origin) -> Result<Format> {
    let record = Record::new(record, fields, origin)?;
    let has = |key: &str| record.get(key).is_some();
    let formats = [
        (Format::Messages, has("messages")),
        (Format::Sharegpt, has("conversations")),
        (Format::Alpaca, has("instruction")),
        (Format::PromptCompletion, has("prompt") || has("completion")),
        (Format::Choice, has("choices") || has("answerKey")),
        (Format::TwoOptions, has("option1") || has("option2")),
        (Format::QuestionAnswer, has("question") && has("answer")),
        (Format::Text, has("text")),
    ];
    formats.iter().find(|(_, speaks)| *speaks).map(|(format, _)| *format).ok_or_else(|| {
        origin.error(format!(
            "format not recognised: {}; expected instruction and output (alpaca), conversations \
             (sharegpt), messages, prompt and completion, choices and answerKey, sentence, option1 \
             and option2, question and answer, or text; map other names with columns",
            record.found()
        ))
    })
}

/// Reads one record of a known format. Of the `first` one a column that is named must be there.
pub(super) fn parse(
    record: &Value,
    format: Format,
    fields: &Fields,
    first: bool,
    origin: &Origin,
) -> Result<Document> {
    let record = Record::new(record, fields, origin)?;
    record.check_columns(format, first)?;
    let content = match format {
        Format::Alpaca => record.alpaca()?,
        Format::Sharegpt => record.sharegpt()?,
        Format::Messages => record.messages()?,
        Format::PromptCompletion => record.completion()?,
        Format::Choice => record.choice()?,
        Format::TwoOptions => record.two_options()?,
        Format::QuestionAnswer => record.question_answer()?,
        Format::Text => record.text()?,
    };
    let tools = if keys(format).contains(&"tools") { record.tools()? } else { None };
    Ok(Document { content, tools, origin: origin.clone() })
}

/// The fields that a format reads.
fn keys(format: Format) -> &'static [&'static str] {
    match format {
        Format::Alpaca => &["instruction", "output", "input", "system", "history", "tools"],
        Format::Sharegpt => &["conversations", "system", "tools"],
        Format::Messages => &["messages", "tools"],
        Format::PromptCompletion => &["prompt", "completion", "tools"],
        Format::Choice => &["question", "question_stem", "choices", "answerKey"],
        Format::TwoOptions => &["sentence", "option1", "option2", "answer"],
        Format::QuestionAnswer => &["question", "answer"],
        Format::Text => &["text"],
    }
}

/// A record's fields and its place.
struct Record<'a> {
    object: &'a Map<String, Value>,
    fields: &'a Fields,
    origin: &'a Origin,
}

impl<'a> Record<'a> {
    fn new(value: &'a Value, fields: &'a Fields, origin: &'a Origin) -> Result<Self> {
        match value.as_object() {
            Some(object) => Ok(Self { object, fields, origin }),
            None => Err(origin.error(format!("the record is {}; expected an object", kind(value)))),
        }
    }

    fn check_columns(&self, format: Format, first: bool) -> Result<()> {
        for (ours, theirs) in &self.fields.columns {
            if !keys(format).contains(&ours.as_str()) {
                return Err(self.origin.error(format!(
                    "columns names `{ours}`, which format {format} does not have; expected some of \
                     {}",
                    keys(format).join(", ")
                )));
            }
            if let Some(theirs) = theirs.as_ref().filter(|c| first && !self.object.contains_key(*c))
            {
                return Err(self.origin.error(format!(
                    "column `{theirs}` is not there (columns.{ours}); {}",
                    self.found()
                )));
            }
        }
        Ok(())
    }

    fn text(&self) -> Result<Content> {
        let text = self.string("text", self.required("text", Format::Text)?)?;
        if text.trim().is_empty() {
            return Err(self.origin.error("field `text` is empty; expected text to train on"));
        }
        Ok(Content::Text(text))
    }

    /// What the file calls one of our fields; nothing where it is not to be read.
    fn column<'k>(&'k self, key: &'k str) -> Option<&'k str> {
        self.fields.columns.get(key).map_or(Some(key), |theirs| theirs.as_deref())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(self.column(key)?)
    }

    fn required(&self, key: &str, format: Format) -> Result<&'a Value> {
        self.required_in(self.object, "", self.column(key).unwrap_or(key), format)
    }

    fn required_in<'v>(
        &self,
        object: &'v Map<String, Value>,
        place: &str,
        key: &str,
        format: Format,
    ) -> Result<&'v Value> {
        object.get(key).ok_or_else(|| {
            let near = nearest(key, object.keys().map(String::as_str));
            let hint = near.map_or_else(String::new, |near| format!("; rename `{near}`?"));
            let dot = if place.is_empty() { "" } else { "." };
            self.origin.error(format!(
                "field `{place}{dot}{key}` is missing (format {format}); {}{hint}",
                found(object)
            ))
        })
    }

    fn optional_string(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => self.string(key, value).map(Some),
        }
    }

    fn string(&self, place: &str, value: &Value) -> Result<String> {
        let place = self.column(place).unwrap_or(place);
        value.as_str().map(str::to_owned).ok_or_else(|| {
            self.origin.error(format!("field `{place}` is {}; expected a string", kind(value)))
        })
    }

    fn found(&self) -> String {
        found(self.object)
    }
}

/// The keys there are, in words.
fn found(object: &Map<String, Value>) -> String {
    if object.is_empty() {
        return "the record has no fields".to_owned();
    }
    let keys: Vec<&str> = object.keys().map(String::as_str).collect();
    format!("found {}", keys.join(", "))
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
