//! Chat templates: how a conversation becomes one text, and which of its bytes are trained.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;

use minijinja::{Environment, ErrorKind, Value as Jinja, context};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, read_json};

mod jinja;

/// Put around each answer to find it again in the rendered text. Noncharacters: no text that is
/// meant to be read contains them, and no template trims them as space.
const ANSWER_START: char = '\u{FDD0}';
const ANSWER_END: char = '\u{FDD1}';
/// Put around what a template itself marks with `{% generation %}`.
const TRAINED_START: char = '\u{FDD2}';
const TRAINED_END: char = '\u{FDD3}';
const MARKS: [char; 4] = [ANSWER_START, ANSWER_END, TRAINED_START, TRAINED_END];

/// The role whose messages are answers.
pub const ASSISTANT: &str = "assistant";

/// The keys of [`Message::extra`] under which templates look for calls of tools and for the thought
/// in front of an answer.
pub(crate) const CALLS: &str = "tool_calls";
pub(crate) const REASONING: &str = "reasoning_content";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
    /// Whether it is trained, if it is an answer.
    pub trained: bool,
    /// What else a template may read: `tool_calls`, `reasoning_content`, `tool_call_id`, `name`.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let (role, content) = (role.into(), content.into());
        Self { role, content, trained: true, extra: Map::new() }
    }

    /// Whether the assistant says it.
    pub fn is_answer(&self) -> bool {
        self.role == ASSISTANT
    }

    /// The tools it calls.
    fn calls(&self) -> Option<&Value> {
        self.extra.get(CALLS)
    }

    /// What it thinks before it answers.
    fn reasoning(&self) -> Option<&str> {
        self.extra.get(REASONING)?.as_str()
    }
}

/// Turns conversations into text, as the model was trained to read them.
#[derive(Clone, Debug)]
pub struct Template {
    kind: Kind,
    bos_token: String,
    eos_token: String,
}

#[derive(Clone, Debug)]
enum Kind {
    Plain,
    Jinja(Box<JinjaTemplate>),
}

#[derive(Clone, Debug)]
struct JinjaTemplate {
    name: String,
    environment: Environment<'static>,
    /// Whether the template says itself what is trained.
    marks_answers: bool,
    added_tokens: BTreeSet<String>,
}

impl Template {
    /// The template of the model in `model_dir`: `chat_template.jinja` if there is one, else
    /// `chat_template` of `tokenizer_config.json` (a list gives its entry `default`), else
    /// [`Template::plain`].
    pub fn open(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let file = model_dir.join("chat_template.jinja");
        match fs::read_to_string(&file) {
            Ok(source) => {
                return Self::from_source(&file.display().to_string(), &source, tokenizer);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Io { path: file, source }),
        }
        let file = model_dir.join("tokenizer_config.json");
        let name = file.display().to_string();
        let notes = read_json(&file)?;
        let chat_template = &notes["chat_template"];
        if chat_template.is_null() {
            return Ok(Self::plain(tokenizer));
        }
        if let Some(source) = chat_template.as_str() {
            return Self::from_source(&name, source, tokenizer);
        }
        let named = chat_template.as_array().into_iter().flatten();
        let default = named
            .filter(|entry| entry["name"] == "default")
            .find_map(|entry| entry["template"].as_str());
        match default {
            Some(source) => Self::from_source(&name, source, tokenizer),
            None => Err(Error::Template {
                name,
                message: "chat_template is neither a string nor a list with an entry named \
                          `default`; put the template to use into chat_template.jinja"
                    .into(),
            }),
        }
    }

    /// The form for base models without a chat template: every message that is not an answer is
    /// its text and a line break; an answer is its text and EOS, with a line break after it if
    /// more follows.
    pub fn plain(tokenizer: &Tokenizer) -> Self {
        Self::with(Kind::Plain, tokenizer)
    }

    /// A template given as Jinja source; `name` stands for its file in messages.
    pub fn from_source(name: &str, source: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let (source, marks_answers) = jinja::generation_as_filter(source);
        let mut environment = jinja::environment();
        environment.add_template_owned("chat", source).map_err(|e| template_error(name, &e))?;
        let kind = Kind::Jinja(Box::new(JinjaTemplate {
            name: name.to_owned(),
            environment,
            marks_answers,
            added_tokens: tokenizer.added_tokens(),
        }));
        Ok(Self::with(kind, tokenizer))
    }

    fn with(kind: Kind, tokenizer: &Tokenizer) -> Self {
        Self {
            kind,
            bos_token: tokenizer.bos_token().unwrap_or_default().to_owned(),
            eos_token: tokenizer.eos_token().unwrap_or_default().to_owned(),
        }
    }

    /// Whether this is the plain form.
    pub fn is_plain(&self) -> bool {
        matches!(self.kind, Kind::Plain)
    }

    /// The conversation as one text; with `add_generation_prompt`, what opens an answer is put at
    /// the end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let text = match &self.kind {
            Kind::Plain => self.render_plain(messages, None).0,
            Kind::Jinja(jinja) => {
                self.render_jinja(jinja, messages, None, add_generation_prompt)?
            }
        };
        Ok(without_marks(&text))
    }

    /// The ids to feed a model that is to answer `messages`: exactly the tokens in front of the
    /// answer in training. A chat template writes BOS itself; the plain form leaves that to the
    /// tokenizer.
    pub fn encode_prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        let text = self.render(messages, true)?;
        if self.is_plain() { tokenizer.encode_with_special(&text) } else { tokenizer.encode(&text) }
    }

    /// The conversation up to its last answer as one text, and the bytes of it that are trained:
    /// each answer with its end-of-turn token, not the role header and not the line break after it.
    ///
    /// Where the template marks answers with `{% generation %}`, its marks decide. Otherwise an
    /// answer begins where the generation prompt in front of it ends.
    ///
    /// # Errors
    /// The conversation has no answer, or the template changes an answer so much that it cannot be
    /// found again.
    pub fn render_training(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>)> {
        self.render_training_with(messages, None)
    }

    /// As [`Template::render_training`], for a conversation that may use `tools`, a list as chat
    /// templates expect it. The plain form writes them and calls of them as JSON, each on a line.
    ///
    /// # Errors
    /// Also where a chat template passes over the tools or over a message.
    pub fn render_training_with(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let Some(last) = messages.iter().rposition(Message::is_answer) else {
            return Err(self.error(
                "the conversation has no assistant message, so there is nothing to learn; add one \
                 or use the format `text`",
            ));
        };
        let messages = &messages[..=last];
        if messages.iter().any(|message| message.content.contains(MARKS)) {
            return Err(self.error(
                "a message contains one of the noncharacters U+FDD0 to U+FDD3, which mark answers \
                 while rendering; remove it",
            ));
        }
        let (text, ranges) = match &self.kind {
            Kind::Plain => return Ok(self.render_plain(messages, tools)),
            Kind::Jinja(jinja) if jinja.marks_answers => {
                let marked = self.render_jinja(jinja, messages, tools, false)?;
                let ranges = marked_ranges(&marked, TRAINED_START, TRAINED_END);
                (without_marks(&marked), ranges)
            }
            Kind::Jinja(jinja) => self.find_answers(jinja, messages, tools)?,
        };
        self.check_complete(&text, messages, tools)?;
        Ok((text, ranges))
    }

    /// A template must not pass over what the data has.
    fn check_complete(
        &self,
        text: &str,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<()> {
        let says = |part: &str| {
            let part = part.trim();
            let json = Value::from(part).to_string();
            text.contains(part) || text.contains(&json[1..json.len() - 1])
        };
        for (i, message) in messages.iter().enumerate() {
            if !message.is_answer() && !says(&message.content) {
                return Err(self.error(&format!(
                    "passes over message {i} of the conversation, of role `{}`; use a template that \
                     knows this role, or take such messages out",
                    message.role
                )));
            }
            if message.reasoning().is_some_and(|thought| message.trained && !says(thought)) {
                return Err(self.error(&format!(
                    "passes over the reasoning of message {i} of the conversation, so that its \
                     answer would be trained without; give that message weight 0, end the \
                     conversation with it, or use a template that keeps it"
                )));
            }
        }
        match &self.kind {
            Kind::Jinja(jinja)
                if tools.is_some() || messages.iter().any(|m| m.calls().is_some()) =>
            {
                self.check_tools(jinja, messages, tools)
            }
            _ => Ok(()),
        }
    }

    /// Finds the names of tools and of those that are called by rendering once more with a mark behind
    /// each: the name alone may also be a word of the conversation.
    fn check_tools(
        &self,
        jinja: &JinjaTemplate,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<()> {
        let mut marked = messages.to_vec();
        for calls in marked.iter_mut().filter_map(|m| m.extra.get_mut(CALLS)) {
            mark_names(calls, ANSWER_START);
        }
        let mut marked_tools = tools.cloned();
        if let Some(tools) = &mut marked_tools {
            mark_names(tools, ANSWER_END);
        }
        let text = self.render_jinja(jinja, &marked, marked_tools.as_ref(), false)?;
        let says = |name: &str| text.contains(name);
        for (i, message) in marked.iter().enumerate() {
            if message.calls().is_some_and(|calls| !names(calls).all(says)) {
                return Err(self.error(&format!(
                    "passes over the tool calls of message {i} of the conversation; use a template \
                     that knows tool_calls, or take such conversations out"
                )));
            }
        }
        if marked_tools.is_some_and(|tools| !names(&tools).all(says)) {
            return Err(self.error(
                "passes over the tools of the conversation; use a template that knows tools, or \
                 leave the field out with columns: {tools: null}",
            ));
        }
        Ok(())
    }

    fn render_plain(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> (String, Vec<Range<usize>>) {
        let mut text = tools.map_or_else(String::new, |tools| format!("{tools}\n"));
        let mut answers = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            let start = text.len();
            if let Some(thought) = message.reasoning() {
                text.push_str(thought);
                text.push('\n');
            }
            text.push_str(&message.content);
            if let Some(calls) = message.calls() {
                text.push_str(&calls.to_string());
            }
            if message.is_answer() {
                text.push_str(&self.eos_token);
                answers.push(start..text.len());
            }
            if !message.is_answer() || i + 1 < messages.len() {
                text.push('\n');
            }
        }
        (text, answers)
    }

    fn render_jinja(
        &self,
        jinja: &JinjaTemplate,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let one = |m: &Message| {
            let message = context! { role => m.role.as_str(), content => m.content.as_str() };
            if m.extra.is_empty() {
                return message;
            }
            let extra = m.extra.iter().map(|(key, value)| (key.as_str(), jinja::value(value)));
            context! { ..message, ..Jinja::from_pairs(extra) }
        };
        let messages: Vec<Jinja> = messages.iter().map(one).collect();
        let context = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            tools => tools.map_or_else(|| Jinja::from(()), jinja::value),
            documents => Jinja::from(()),
        };
        jinja
            .environment
            .get_template("chat")
            .and_then(|template| template.render(context))
            .map_err(|e| template_error(&jinja.name, &e))
    }

    /// Finds the answers by rendering once more with marks around each. `messages` ends with an
    /// answer.
    fn find_answers(
        &self,
        jinja: &JinjaTemplate,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        if messages.iter().any(|m| m.calls().is_some() || m.reasoning().is_some()) {
            return self.find_whole(jinja, messages, tools);
        }
        let text = without_marks(&self.render_jinja(jinja, messages, tools, false)?);
        let marked: Vec<Message> = messages.iter().map(mark_answer).collect();
        let marked = self.render_jinja(jinja, &marked, tools, false)?;
        let ends = mark_places(&marked, ANSWER_END);
        let answers: Vec<usize> =
            (0..messages.len()).filter(|&i| messages[i].is_answer()).collect();
        if without_marks(&marked) != text || ends.len() != answers.len() {
            return Err(self.error(
                "an answer cannot be found in the rendered conversation, because the template \
                 changes or repeats it; mark the answers in the template with \
                 {% generation %} ... {% endgeneration %}",
            ));
        }
        let starts = mark_places(&marked, ANSWER_START);
        let end_of_turn = self.end_of_turn(jinja, &text[*ends.last().unwrap_or(&text.len())..]);
        let mut ranges = Vec::with_capacity(answers.len());
        for (nth, (&i, &end)) in answers.iter().zip(&ends).enumerate() {
            let prompt = without_marks(&self.render_jinja(jinja, &messages[..i], tools, true)?);
            let content = starts.get(nth).copied().filter(|_| starts.len() == ends.len());
            // A prompt that opens a thought, say, does not occur in front of a plain answer.
            let start = if text.starts_with(&prompt) && prompt.len() <= content.unwrap_or(end) {
                prompt.len()
            } else {
                content.ok_or_else(|| {
                    self.error(
                        "the start of an answer cannot be found in the rendered conversation: the \
                         generation prompt does not occur in it; mark the answers in the template \
                         with {% generation %} ... {% endgeneration %}",
                    )
                })?
            };
            let rest = &text[end..];
            let ending = if rest.starts_with(&end_of_turn) { end_of_turn.len() } else { 0 };
            ranges.push(start..end + ending);
        }
        Ok((text, ranges))
    }

    /// Finds the answers of a conversation with tool calls or reasoning, which cannot be marked: each
    /// is what the conversation up to it has more than its prompt.
    fn find_whole(
        &self,
        jinja: &JinjaTemplate,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let text = without_marks(&self.render_jinja(jinja, messages, tools, false)?);
        // `messages` ends with an answer, so the text ends with what closes one.
        let closes = |token: &&str| !token.is_empty() && text.trim_end().ends_with(*token);
        let added = jinja.added_tokens.iter().map(String::as_str);
        let ending = added.chain([self.eos_token.as_str()]).filter(closes).max_by_key(|t| t.len());
        let ending = ending.unwrap_or_default().to_owned();
        let mut ranges = Vec::new();
        for i in (0..messages.len()).filter(|&i| messages[i].is_answer()) {
            let prompt = without_marks(&self.render_jinja(jinja, &messages[..i], tools, true)?);
            let whole = without_marks(&self.render_jinja(jinja, &messages[..=i], tools, false)?);
            let whole = whole.trim_end();
            let end = if text.starts_with(whole) && prompt.len() <= whole.len() {
                Some(whole.len())
            } else {
                // Templates leave out what was thought for an earlier question.
                let rest = text.get(prompt.len()..).filter(|_| !ending.is_empty());
                let found = rest.and_then(|rest| rest.find(&ending));
                found.map(|n| prompt.len() + n + ending.len())
            };
            let Some(end) = end.filter(|_| text.starts_with(&prompt)) else {
                return Err(self.error(
                    "an answer cannot be found in the rendered conversation with tool calls or \
                     reasoning; mark the answers in the template with {% generation %} ... \
                     {% endgeneration %}",
                ));
            };
            ranges.push(prompt.len()..end);
        }
        Ok((text, ranges))
    }

    /// What closes an answer, found in `rest`, the text behind the last one: space and one added
    /// token, or nothing.
    fn end_of_turn(&self, jinja: &JinjaTemplate, rest: &str) -> String {
        let trimmed = rest.trim_start();
        let space = rest.len() - trimmed.len();
        let is_eos = |token: &&str| !token.is_empty() && trimmed.starts_with(*token);
        let added = jinja.added_tokens.iter().map(String::as_str);
        let token = added.chain([self.eos_token.as_str()]).filter(is_eos).max_by_key(|t| t.len());
        token.map_or_else(String::new, |token| rest[..space + token.len()].to_owned())
    }

    fn error(&self, message: &str) -> Error {
        let name = match &self.kind {
            Kind::Plain => "plain",
            Kind::Jinja(jinja) => &jinja.name,
        };
        Error::Template { name: name.to_owned(), message: message.to_owned() }
    }
}

/// Puts the marks around an answer's text, inside the space around it: templates trim that.
fn mark_answer(message: &Message) -> Message {
    if !message.is_answer() {
        return message.clone();
    }
    let content = &message.content;
    let text = content.trim();
    let before =
        if text.is_empty() { content.len() } else { content.len() - content.trim_start().len() };
    let (space, rest) = content.split_at(before);
    let (text, tail) = rest.split_at(text.len());
    let content = format!("{space}{ANSWER_START}{text}{ANSWER_END}{tail}");
    Message { content, ..message.clone() }
}

/// The names of tools, or of the tools that are called.
fn names(tools: &Value) -> impl Iterator<Item = &str> {
    tools.as_array().into_iter().flatten().filter_map(|tool| tool["function"]["name"].as_str())
}

/// Puts a mark behind those names.
fn mark_names(tools: &mut Value, mark: char) {
    for tool in tools.as_array_mut().into_iter().flatten() {
        if let Some(Value::String(name)) = tool.pointer_mut("/function/name") {
            name.push(mark);
        }
    }
}

/// Where `mark` stands, counted in bytes of the text without any marks.
fn mark_places(marked: &str, mark: char) -> Vec<usize> {
    let mut at = 0;
    let mut places = Vec::new();
    for c in marked.chars() {
        if c == mark {
            places.push(at);
        }
        if !MARKS.contains(&c) {
            at += c.len_utf8();
        }
    }
    places
}

fn marked_ranges(marked: &str, start: char, end: char) -> Vec<Range<usize>> {
    let (starts, ends) = (mark_places(marked, start), mark_places(marked, end));
    starts.into_iter().zip(ends).map(|(start, end)| start..end).collect()
}

fn without_marks(text: &str) -> String {
    text.replace(MARKS, "")
}

fn template_error(name: &str, error: &minijinja::Error) -> Error {
    let message = match (error.kind(), error.detail()) {
        // What a template raises is meant for the user as it stands.
        (ErrorKind::InvalidOperation, Some(detail)) if detail.starts_with(jinja::RAISED) => {
            format!("refused the conversation: {}", &detail[jinja::RAISED.len()..])
        }
        _ => error.to_string(),
    };
    Error::Template { name: name.to_owned(), message }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
