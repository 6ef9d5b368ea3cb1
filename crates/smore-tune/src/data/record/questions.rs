//! Questions with their answers: multiple choice, a blank with two options, and free ones.

use serde_json::Value;

use super::chat::parsed;
use super::{Content, Record, kind};
use crate::config::Format;
use crate::error::Result;
use crate::template::{ASSISTANT, Message};

impl Record<'_> {
    /// The prompt is that of S'MoRE's authors.
    pub(super) fn choice(&self) -> Result<Content> {
        let (question, choices) = self.question_and_choices()?;
        let key = self.text_or_number("answerKey", Format::Choice)?;
        if !choices.iter().any(|(label, _)| *label == key) {
            let labels: Vec<&str> = choices.iter().map(|(label, _)| label.as_str()).collect();
            return Err(self.origin.error(format!(
                "field `answerKey` is `{key}`; expected one of the labels {}",
                labels.join(", ")
            )));
        }
        let mut prompt = format!("Please choose the correct answer to the question: {question}");
        for (label, text) in &choices {
            prompt.extend([" (", label, ") ", text, " "]);
        }
        Ok(answered(prompt, key))
    }

    /// `question` or `question_stem`; CommonsenseQA keeps both inside `question`.
    fn question_and_choices(&self) -> Result<(String, Vec<(String, String)>)> {
        let key = if self.get("question").is_none() && self.get("question_stem").is_some() {
            "question_stem"
        } else {
            "question"
        };
        let question = self.required(key, Format::Choice)?;
        if let Some(inner) = question.as_object().filter(|inner| inner.contains_key("stem")) {
            let stem = self.string("question.stem", &inner["stem"])?;
            let choices = self.required_in(inner, "question", "choices", Format::Choice)?;
            return Ok((stem, self.choices("question.choices", choices)?));
        }
        let choices = self.required("choices", Format::Choice)?;
        Ok((self.string(key, question)?, self.choices("choices", choices)?))
    }

    /// `{text: [...], label: [...]}` or `[{text, label}, ...]`
    fn choices(&self, place: &str, value: &Value) -> Result<Vec<(String, String)>> {
        let value = &parsed(value);
        let wrong = |what: String| {
            self.origin.error(format!(
                "field `{place}` {what}; expected {{text: [...], label: [...]}} of equal lengths"
            ))
        };
        let one = |label: &Value, text: &Value, i: usize| {
            Ok((
                self.string(&format!("{place}.label[{i}]"), label)?,
                self.string(&format!("{place}.text[{i}]"), text)?,
            ))
        };
        if let Some(list) = value.as_array() {
            let pairs = list.iter().enumerate();
            let pairs: Result<Vec<_>> =
                pairs.map(|(i, choice)| one(&choice["label"], &choice["text"], i)).collect();
            return pairs.and_then(|pairs| {
                if pairs.is_empty() { Err(wrong("is empty".into())) } else { Ok(pairs) }
            });
        }
        let (texts, labels) = (value["text"].as_array(), value["label"].as_array());
        let (Some(texts), Some(labels)) = (texts, labels) else {
            return Err(wrong(format!("is {} without lists text and label", kind(value))));
        };
        if texts.len() != labels.len() || texts.is_empty() {
            return Err(wrong(format!("has {} texts and {} labels", texts.len(), labels.len())));
        }
        labels.iter().zip(texts).enumerate().map(|(i, (label, text))| one(label, text, i)).collect()
    }

    /// The prompt is that of S'MoRE's authors.
    pub(super) fn two_options(&self) -> Result<Content> {
        let field = |key: &str| self.string(key, self.required(key, Format::TwoOptions)?);
        let (sentence, first, second) = (field("sentence")?, field("option1")?, field("option2")?);
        let answer = self.text_or_number("answer", Format::TwoOptions)?;
        let label = match answer.as_str() {
            "1" => "A",
            "2" => "B",
            _ => {
                return Err(self
                    .origin
                    .error(format!("field `answer` is `{answer}`; expected 1 or 2")));
            }
        };
        let prompt = format!(
            "Please choose the correct answer to fill in the blank to complete the given \
             sentence.\nSentence: {sentence}\n(A) {first}\n(B) {second}"
        );
        Ok(answered(prompt, label))
    }

    pub(super) fn question_answer(&self) -> Result<Content> {
        let field = |key: &str| self.string(key, self.required(key, Format::QuestionAnswer)?);
        Ok(answered(field("question")?, field("answer")?))
    }

    fn text_or_number(&self, key: &str, format: Format) -> Result<String> {
        let value = self.required(key, format)?;
        if value.is_u64() { Ok(value.to_string()) } else { self.string(key, value) }
    }
}

fn answered(question: String, answer: impl Into<String>) -> Content {
    Content::Chat(vec![Message::new("user", question), Message::new(ASSISTANT, answer)])
}
