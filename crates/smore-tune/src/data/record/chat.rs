//! Conversations: alpaca, sharegpt, messages, and prompt with completion.

use serde_json::{Map, Value, json};

use super::{Content, Record, kind};
use crate::config::Format;
use crate::error::{Result, nearest};
use crate::template::{ASSISTANT, CALLS, Message, REASONING};

/// What a conversation calls its keys and roles.
struct Names<'a> {
    role: &'a str,
    content: &'a str,
    /// The file's name of a role, and ours.
    roles: Vec<(&'a str, &'a str)>,
}

/// Our name of the role that calls a tool; templates know it as an answer with `tool_calls`.
const FUNCTION_CALL: &str = "function_call";

/// What a message's content holds.
#[derive(Default)]
struct Parts {
    text: String,
    reasoning: String,
    calls: Vec<Value>,
}

impl<'a> Record<'a> {
    pub(super) fn alpaca(&self) -> Result<Content> {
        let instruction =
            self.string("instruction", self.required("instruction", Format::Alpaca)?)?;
        let output = self.string("output", self.required("output", Format::Alpaca)?)?;
        let input = self.optional_string("input")?.filter(|input| !input.is_empty());
        let mut messages = self.system()?;
        messages.extend(self.history()?);
        let question = match input {
            Some(input) => format!("{instruction}\n{input}"),
            None => instruction,
        };
        messages.push(Message::new("user", question));
        messages.push(Message::new(ASSISTANT, output));
        Ok(Content::Chat(messages))
    }

    fn system(&self) -> Result<Vec<Message>> {
        let text = self.optional_string("system")?.filter(|system| !system.is_empty());
        Ok(text.map(|text| Message::new("system", text)).into_iter().collect())
    }

    /// `history: [[question, answer], ...]`
    fn history(&self) -> Result<Vec<Message>> {
        let Some(history) = self.get("history").filter(|value| !is_blank(value)) else {
            return Ok(Vec::new());
        };
        let history = &parsed(history);
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

    pub(super) fn sharegpt(&self) -> Result<Content> {
        let field = self.required("conversations", Format::Sharegpt)?;
        let turns = self.conversation("conversations", field, Format::Sharegpt)?;
        Ok(Content::Chat([self.system()?, turns].concat()))
    }

    pub(super) fn messages(&self) -> Result<Content> {
        let field = self.required("messages", Format::Messages)?;
        Ok(Content::Chat(self.conversation("messages", field, Format::Messages)?))
    }

    pub(super) fn completion(&self) -> Result<Content> {
        Ok(Content::Completion(
            self.string_or_messages("prompt", "user")?,
            self.string_or_messages("completion", ASSISTANT)?,
        ))
    }

    fn string_or_messages(&self, key: &str, role: &str) -> Result<Vec<Message>> {
        match self.required(key, Format::PromptCompletion)? {
            Value::String(text) => Ok(vec![Message::new(role, text)]),
            value @ Value::Array(_) => self.conversation(key, value, Format::Messages),
            other => Err(self.origin.error(format!(
                "field `{key}` is {}; expected a string or a list of messages",
                kind(other)
            ))),
        }
    }

    fn names(&self, format: Format) -> Names<'a> {
        let tags = &self.fields.tags;
        let sharegpt = format == Format::Sharegpt;
        let name = |tag: &'a Option<String>, theirs: &'static str, openai: &'static str| {
            tag.as_deref().unwrap_or(if sharegpt { theirs } else { openai })
        };
        let mut roles = vec![
            (name(&tags.user_tag, "human", "user"), "user"),
            (name(&tags.assistant_tag, "gpt", ASSISTANT), ASSISTANT),
            (name(&tags.observation_tag, "observation", "tool"), "tool"),
            (name(&tags.function_tag, FUNCTION_CALL, FUNCTION_CALL), FUNCTION_CALL),
            (name(&tags.system_tag, "system", "system"), "system"),
        ];
        if !sharegpt {
            roles.extend([("developer", "developer"), ("function", "function")]);
            roles.push(("ipython", "ipython"));
        }
        let role = name(&tags.role_tag, "from", "role");
        let content = name(&tags.content_tag, "value", "content");
        Names { role, content, roles }
    }

    fn conversation(&self, place: &str, value: &Value, format: Format) -> Result<Vec<Message>> {
        let names = self.names(format);
        let value = &parsed(value);
        let keys = format!("{{{}, {}}}", names.role, names.content);
        let Some(list) = value.as_array() else {
            return Err(self
                .origin
                .error(format!("field `{place}` is {}; expected a list of {keys}", kind(value))));
        };
        let mut messages = Vec::with_capacity(list.len());
        for (i, message) in list.iter().enumerate() {
            let place = format!("{place}[{i}]");
            let Some(object) = message.as_object() else {
                return Err(self
                    .origin
                    .error(format!("field `{place}` is {}; expected {keys}", kind(message))));
            };
            messages.push(self.message(&place, object, &names, format)?);
        }
        if messages.is_empty() {
            return Err(self
                .origin
                .error(format!("field `{place}` is an empty list; expected messages")));
        }
        Ok(messages)
    }

    fn message(
        &self,
        place: &str,
        object: &Map<String, Value>,
        names: &Names,
        format: Format,
    ) -> Result<Message> {
        let field = |key: &str| self.required_in(object, place, key, format);
        let (role_place, content_place) =
            (format!("{place}.{}", names.role), format!("{place}.{}", names.content));
        let theirs = self.string(&role_place, field(names.role)?)?;
        let Some((_, role)) = names.roles.iter().find(|(name, _)| *name == theirs) else {
            let known: Vec<&str> = names.roles.iter().map(|(name, _)| *name).collect();
            let hint = nearest(&theirs, known.iter().copied())
                .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            return Err(self.origin.error(format!(
                "field `{role_place}` is `{theirs}`; expected one of {}{hint}",
                known.join(", ")
            )));
        };
        let mut parts = match object.get(names.content) {
            // An answer that only calls tools says nothing.
            None | Some(Value::Null) if object.get("tool_calls").is_some_and(|c| !is_blank(c)) => {
                Parts::default()
            }
            _ => self.parts(&content_place, field(names.content)?)?,
        };
        if *role == FUNCTION_CALL {
            return self.function_call(&content_place, &parts.text);
        }
        if let Some(calls) = object.get("tool_calls").filter(|calls| !is_blank(calls)) {
            parts.calls.extend(with_parsed_arguments(calls));
        }
        if let Some(reasoning) = object.get(REASONING).filter(|value| !is_blank(value)) {
            parts.reasoning = self.string(&format!("{place}.{REASONING}"), reasoning)?;
        }
        let mut message = Message::new(*role, parts.text);
        if !parts.calls.is_empty() {
            message.extra.insert(CALLS.into(), Value::Array(parts.calls));
        }
        if !parts.reasoning.is_empty() {
            message.extra.insert(REASONING.into(), parts.reasoning.into());
        }
        for key in ["name", "tool_call_id"] {
            if let Some(value) = object.get(key).filter(|value| !value.is_null()) {
                message.extra.insert(key.into(), value.clone());
            }
        }
        if message.is_answer() {
            message.trained = self.is_trained(place, object)?;
        }
        Ok(message)
    }

    /// A string, or a list of parts: `{type: text, text}` and, as LLaMA-Factory writes them,
    /// `{type: text | reasoning | tool_call, value}`.
    fn parts(&self, place: &str, value: &Value) -> Result<Parts> {
        let Some(list) = value.as_array() else {
            return Ok(Parts { text: self.string(place, value)?, ..Parts::default() });
        };
        let mut parts = Parts::default();
        for (i, part) in list.iter().enumerate() {
            let said = part["text"].as_str().or_else(|| part["value"].as_str());
            match (part["type"].as_str(), said) {
                (None | Some("text"), Some(said)) => parts.text.push_str(said),
                (Some("reasoning"), Some(said)) => parts.reasoning.push_str(said),
                (Some("tool_call"), Some(said)) => {
                    parts.calls.extend(self.calls(&format!("{place}[{i}]"), said)?);
                }
                _ => {
                    return Err(self.origin.error(format!(
                        "field `{place}[{i}]` is not text; expected {{type: text, text: ...}}, \
                         {{type: reasoning, value: ...}} or {{type: tool_call, value: ...}}"
                    )));
                }
            }
        }
        Ok(parts)
    }

    fn function_call(&self, place: &str, text: &str) -> Result<Message> {
        let mut message = Message::new(ASSISTANT, "");
        message.extra.insert(CALLS.into(), Value::Array(self.calls(place, text)?));
        Ok(message)
    }

    /// `{name, arguments}` or a list of them as text, which templates want as `tool_calls`.
    fn calls(&self, place: &str, text: &str) -> Result<Vec<Value>> {
        let expected = "expected a call as JSON: {\"name\": ..., \"arguments\": {...}}";
        let value: Value = serde_json::from_str(text)
            .map_err(|_| self.origin.error(format!("field `{place}` is not JSON; {expected}")))?;
        let calls = if value.is_array() { value } else { json!([value]) };
        if calls.as_array().into_iter().flatten().any(|call| !call["name"].is_string()) {
            return Err(self.origin.error(format!("field `{place}` has no name; {expected}")));
        }
        Ok(with_parsed_arguments(&calls))
    }

    /// Whether an answer is trained: OpenAI's `weight`, LLaMA-Factory's `loss_weight` or Axolotl's
    /// `train`.
    fn is_trained(&self, place: &str, object: &Map<String, Value>) -> Result<bool> {
        let mut trained = true;
        for key in ["weight", "loss_weight", "train"] {
            trained &= match object.get(key) {
                None | Some(Value::Null) => true,
                Some(Value::Bool(on)) => *on,
                Some(value) if value.as_f64() == Some(1.0) => true,
                Some(value) if value.as_f64() == Some(0.0) => false,
                Some(value) => {
                    return Err(self.origin.error(format!(
                        "field `{place}.{key}` is {value}; expected 1 (trained) or 0 (not trained)"
                    )));
                }
            };
        }
        Ok(trained)
    }

    /// The tools a conversation may use, in the form that templates expect.
    pub(super) fn tools(&self) -> Result<Option<Value>> {
        let Some(value) = self.get("tools").filter(|value| !is_blank(value)) else {
            return Ok(None);
        };
        let tools = parsed(value);
        let Some(list) = tools.as_array() else {
            return Err(self.origin.error(format!(
                "field `tools` is {}; expected a list of tools, or one as JSON text",
                kind(&tools)
            )));
        };
        let wrapped = list.iter().map(|tool| {
            if tool["function"].is_object() {
                tool.clone()
            } else {
                json!({"type": "function", "function": tool})
            }
        });
        let wrapped: Vec<Value> = wrapped.collect();
        Ok((!wrapped.is_empty()).then_some(Value::Array(wrapped)))
    }
}

/// Templates write the arguments of a call as JSON; OpenAI has them as JSON text already.
fn with_parsed_arguments(calls: &Value) -> Vec<Value> {
    let calls = parsed(calls);
    let one = |call: &Value| {
        let function = if call["function"].is_object() { &call["function"] } else { call };
        let mut function = function.clone();
        if let Some(arguments) = function.get_mut("arguments") {
            *arguments = parsed(arguments);
        }
        json!({"type": "function", "function": function})
    };
    calls.as_array().into_iter().flatten().map(one).collect()
}

fn is_blank(value: &Value) -> bool {
    value.is_null() || value.as_str().is_some_and(|text| text.trim().is_empty())
}

/// Tables hold lists as JSON text.
pub(super) fn parsed(value: &Value) -> Value {
    let text = value.as_str().filter(|text| text.trim_start().starts_with(['[', '{']));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_else(|| value.clone())
}
