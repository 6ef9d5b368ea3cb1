//! Multiple-choice questions out of the records that the sets are published in.

use super::TaskKind;
use super::read::{Record, data_error};
use crate::error::Result;
use serde_json::Value;
use std::path::Path;

/// A question with its answers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Question {
    /// What the question is about, if that is told apart.
    pub(super) passage: String,
    /// The question; of WinoGrande the sentence with a `_`.
    pub(super) stem: String,
    pub(super) choices: Vec<String>,
    /// Place of the right choice.
    pub(super) gold: usize,
}

impl Question {
    /// Reads a record of any published form.
    pub(super) fn read(task: TaskKind, file: &Path, record: &Record) -> Result<Self> {
        let parsed = match task {
            _ if record.value.get("instruction").is_some() => instruction(task, &record.value),
            TaskKind::WinoGrande => winogrande(&record.value),
            TaskKind::Piqa => piqa(&record.value),
            TaskKind::Siqa => siqa(&record.value),
            TaskKind::BoolQ => boolq(&record.value),
            _ => labelled(&record.value),
        };
        parsed.map_err(|message| data_error(file, record.line, message))
    }
}

type Parsed<T> = std::result::Result<T, String>;

fn string<'a>(value: &'a Value, key: &str) -> Parsed<&'a str> {
    match &value[key] {
        Value::String(s) => Ok(s),
        Value::Null => Err(format!("field `{key}` is missing")),
        _ => Err(format!("field `{key}` is not a text")),
    }
}

/// A label as published: text or number.
fn label(value: &Value, keys: &[&str]) -> Parsed<String> {
    let found = keys.iter().map(|&k| &value[k]).find(|v| !v.is_null());
    match found {
        Some(Value::String(s)) if !s.is_empty() => Ok(s.clone()),
        Some(Value::Number(n)) => Ok(n.to_string()),
        Some(Value::Bool(b)) => Ok(b.to_string()),
        _ => Err(format!(
            "no answer: field `{}` is missing or empty; a test set without answers cannot be \
             scored",
            keys.join("` or `")
        )),
    }
}

fn place(labels: &[&str], label: &str) -> Parsed<usize> {
    labels
        .iter()
        .position(|&l| l == label)
        .ok_or_else(|| format!("the answer is `{label}`; expected one of {}", labels.join(", ")))
}

/// ARC, CommonsenseQA and OpenBookQA: choices as objects or as columns, inside the question or
/// beside it.
fn labelled(value: &Value) -> Parsed<Question> {
    let inner = &value["question"];
    let (question, choices) = if inner.is_object() {
        (string(inner, "stem")?, &inner["choices"])
    } else {
        let key = if inner.is_null() { "question_stem" } else { "question" };
        (string(value, key)?, &value["choices"])
    };
    let column = |key: &str| -> Parsed<Vec<String>> {
        let texts: Vec<&Value> = match choices {
            Value::Array(list) => list.iter().map(|c| &c[key]).collect(),
            Value::Object(columns) => {
                columns.get(key).and_then(Value::as_array).into_iter().flatten().collect()
            }
            _ => return Err("field `choices` is missing".into()),
        };
        let text = |v: &Value| v.as_str().map(String::from);
        let texts: Option<Vec<String>> = texts.into_iter().map(text).collect();
        texts.filter(|t| t.len() > 1).ok_or_else(|| format!("field `choices` has no `{key}`s"))
    };
    let (texts, labels) = (column("text")?, column("label")?);
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let gold = place(&labels, &label(value, &["answerKey"])?)?;
    if texts.len() != labels.len() {
        return Err(format!("{} choices with {} labels", texts.len(), labels.len()));
    }
    Ok(Question { passage: String::new(), stem: question.into(), choices: texts, gold })
}

fn winogrande(value: &Value) -> Parsed<Question> {
    let sentence = string(value, "sentence")?;
    blank(sentence)?;
    Ok(Question {
        passage: String::new(),
        stem: sentence.into(),
        choices: vec![string(value, "option1")?.into(), string(value, "option2")?.into()],
        gold: place(&["1", "2"], &label(value, &["answer", "label"])?)?,
    })
}

fn blank(sentence: &str) -> Parsed<()> {
    if sentence.contains('_') { Ok(()) } else { Err("the sentence has no `_` to fill in".into()) }
}

fn piqa(value: &Value) -> Parsed<Question> {
    Ok(Question {
        passage: String::new(),
        stem: string(value, "goal")?.into(),
        choices: vec![string(value, "sol1")?.into(), string(value, "sol2")?.into()],
        gold: place(&["0", "1"], &label(value, &["label"])?)?,
    })
}

fn siqa(value: &Value) -> Parsed<Question> {
    let choices = ["answerA", "answerB", "answerC"].map(|k| string(value, k).map(String::from));
    let given = label(value, &["label", "correct"])?;
    let numbered = place(&["1", "2", "3"], &given);
    Ok(Question {
        passage: string(value, "context")?.into(),
        stem: string(value, "question")?.into(),
        choices: choices.into_iter().collect::<Parsed<_>>()?,
        gold: numbered.or_else(|_| place(&["A", "B", "C"], &given))?,
    })
}

fn boolq(value: &Value) -> Parsed<Question> {
    let given = label(value, &["answer", "label"])?;
    let truth = place(&["false", "true"], &given).or_else(|_| place(&["0", "1"], &given))?;
    Ok(Question {
        passage: string(value, "passage")?.into(),
        stem: string(value, "question")?.into(),
        choices: vec!["no".into(), "yes".into()],
        gold: truth,
    })
}

/// The instructions of LLM-Adapters: question and answers in one text.
fn instruction(task: TaskKind, value: &Value) -> Parsed<Question> {
    let text = string(value, "instruction")?;
    let answer = label(value, &["answer"])?;
    // Ahead of the question stands what to do, up to the first colon.
    let (_, body) = text.split_once(": ").ok_or("the instruction has no `: `")?;
    let body = body.rsplit_once("Answer format:").map_or(body, |(b, _)| b).trim();
    if task == TaskKind::BoolQ {
        return Ok(Question {
            passage: String::new(),
            stem: body.trim_end_matches('?').into(),
            choices: vec!["no".into(), "yes".into()],
            gold: place(&["false", "true"], &answer)?,
        });
    }
    let name = match task {
        TaskKind::WinoGrande => "Option",
        TaskKind::Piqa => "Solution",
        _ => "Answer",
    };
    let mut rest = body;
    let mut parts = Vec::new();
    for n in 1.. {
        let Some((before, after)) = rest.split_once(&format!("{name}{n}:")) else { break };
        parts.push(before.trim().to_owned());
        rest = after;
    }
    parts.push(rest.trim().to_owned());
    if parts.len() < 3 {
        return Err(format!("the instruction has no `{name}1:` and `{name}2:`"));
    }
    let question = parts.remove(0);
    if task == TaskKind::WinoGrande {
        blank(&question)?;
    }
    let labels: Vec<String> =
        (1..=parts.len()).map(|n| format!("{}{n}", name.to_lowercase())).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    Ok(Question {
        passage: String::new(),
        stem: question,
        gold: place(&labels, &answer)?,
        choices: parts,
    })
}
