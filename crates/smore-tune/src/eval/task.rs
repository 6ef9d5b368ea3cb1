//! The sets, and what of a record the model sees under either protocol.

use super::extract::{letter_of, number};
use super::program::Program;
use super::question::Question;
use super::read::{Record, data_error, read};
use crate::error::{Error, Result, nearest};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;

/// How answers are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// The model writes an answer, out of which a label, number or program is read.
    Generation,
    /// The choice whose text is likeliest is the answer.
    Loglikelihood,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Generation => "generation",
            Self::Loglikelihood => "loglikelihood",
        })
    }
}

/// A published set, or a user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// ARC, hard questions.
    ArcChallenge,
    /// ARC, easy questions.
    ArcEasy,
    /// CommonsenseQA.
    CommonsenseQa,
    /// OpenBookQA.
    OpenBookQa,
    /// WinoGrande.
    WinoGrande,
    /// PIQA.
    Piqa,
    /// Social IQa.
    Siqa,
    /// BoolQ.
    BoolQ,
    /// GSM8K.
    Gsm8k,
    /// HumanEval.
    HumanEval,
    /// Described by a user's file.
    User,
}

/// Names as in lm-evaluation-harness.
const NAMES: [(&str, TaskKind); 10] = [
    ("arc_challenge", TaskKind::ArcChallenge),
    ("arc_easy", TaskKind::ArcEasy),
    ("commonsense_qa", TaskKind::CommonsenseQa),
    ("openbookqa", TaskKind::OpenBookQa),
    ("winogrande", TaskKind::WinoGrande),
    ("piqa", TaskKind::Piqa),
    ("social_iqa", TaskKind::Siqa),
    ("boolq", TaskKind::BoolQ),
    ("gsm8k", TaskKind::Gsm8k),
    ("humaneval", TaskKind::HumanEval),
];

/// A set of questions to ask.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name, in file names too.
    pub name: String,
    /// Which it is.
    pub kind: TaskKind,
    user: Option<UserTask>,
}

/// A user's description of a set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserTask {
    /// In results and file names.
    name: String,
    /// The prompt, with `{column}` where a column's text goes.
    prompt: String,
    /// The column that holds a list of choices, or a column for each.
    #[serde(default)]
    choices: Vec<String>,
    /// The column of the answer: with choices its place from 0, its letter or its text.
    answer: String,
}

/// A question as the model gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Place in the file, from 0.
    pub doc_id: usize,
    /// What to do with it.
    pub request: Request,
    /// The right answer, for people.
    pub target: String,
}

/// What the model is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Which continuation is likeliest?
    Continuations {
        /// Context and continuation of each choice.
        pairs: Vec<(String, String)>,
        /// Bytes of each choice's text, by which acc_norm divides.
        bytes: Vec<usize>,
        /// The right choice.
        gold: usize,
    },
    /// Which letter does it write?
    Letter {
        /// The user's message.
        prompt: String,
        /// Number of choices.
        choices: usize,
        /// The right choice.
        gold: usize,
    },
    /// Which number does it come to?
    Number {
        /// The text to continue.
        prompt: String,
        /// The number, without commas.
        gold: String,
    },
    /// Is what it writes exactly this?
    Exact {
        /// The user's message.
        prompt: String,
        /// The answer.
        gold: String,
    },
    /// Does the program it writes pass?
    Code(Program),
}

impl Task {
    /// A known name (`ARC-Challenge` and `arc_challenge` are the same), or a user's YAML or JSON
    /// file.
    ///
    /// # Errors
    /// Neither a name nor a readable description.
    pub fn open(name: &str) -> Result<Self> {
        let plain = |s: &str| s.to_lowercase().replace(['-', '_'], "");
        let wanted = match plain(name).as_str() {
            "siqa" | "socialiqa" => "socialiqa".to_owned(),
            other => other.to_owned(),
        };
        if let Some((name, kind)) = NAMES.iter().find(|(n, _)| plain(n) == wanted) {
            return Ok(Self { name: (*name).into(), kind: *kind, user: None });
        }
        let path = Path::new(name);
        if !path.is_file() {
            let names: Vec<&str> = NAMES.iter().map(|(n, _)| *n).collect();
            let meant = nearest(name, names.iter().copied());
            let meant = meant.map(|m| format!("; did you mean {m}?")).unwrap_or_default();
            return Err(Error::Config {
                file: "--task".into(),
                message: format!(
                    "no task or file `{name}`{meant}; expected {} or a YAML file that describes one",
                    names.join(", ")
                ),
            });
        }
        let bad = |message: String| Error::Config { file: name.to_owned(), message };
        let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, "a task", e))?;
        let user: UserTask = serde_saphyr::from_str(&text).map_err(|e| bad(e.to_string()))?;
        let fine = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if user.name.is_empty() || !user.name.chars().all(fine) {
            return Err(
                bad("name is for file names too: letters, digits, `_`, `-` and `.`".into()),
            );
        }
        Ok(Self { name: user.name.clone(), kind: TaskKind::User, user: Some(user) })
    }

    /// Reads the set as items of one protocol, the first `limit` of them.
    ///
    /// # Errors
    /// If a record is not of this task, or the protocol does not apply to it.
    pub fn items(
        &self,
        file: &Path,
        protocol: Protocol,
        limit: Option<usize>,
    ) -> Result<Vec<Item>> {
        if protocol == Protocol::Loglikelihood && self.is_written() {
            return Err(Error::Config {
                file: "--protocol".into(),
                message: format!("{} is answered in free text; use generation", self.name),
            });
        }
        let records = read(file)?;
        let records = records.into_iter().take(limit.unwrap_or(usize::MAX));
        records.enumerate().map(|(i, record)| self.item(i, file, &record, protocol)).collect()
    }

    /// What a training set of this task teaches, as records with `instruction` and `output`: the
    /// prompt of the generation protocol, and the letter or the worked answer.
    ///
    /// # Errors
    /// If a record is not of this task, or the task has no training set (HumanEval).
    pub fn lessons(&self, file: &Path) -> Result<Vec<Value>> {
        let lesson = |(i, record): (usize, &Record)| {
            let item = self.item(i, file, record, Protocol::Generation)?;
            let (prompt, answer) = match item.request {
                Request::Letter { prompt, gold, .. } => (prompt, letter_of(gold).to_string()),
                Request::Exact { prompt, gold } => (prompt, gold),
                Request::Number { prompt, gold } => {
                    let worked = record.value["answer"].as_str().map(String::from);
                    (prompt, worked.unwrap_or(gold))
                }
                Request::Code(_) | Request::Continuations { .. } => {
                    return Err(data_error(file, record.line, "nothing to learn from"));
                }
            };
            Ok(json!({"instruction": prompt, "output": answer}))
        };
        read(file)?.iter().enumerate().map(lesson).collect()
    }

    /// Answers are written freely, not chosen.
    pub fn is_written(&self) -> bool {
        match self.kind {
            TaskKind::Gsm8k | TaskKind::HumanEval => true,
            TaskKind::User => self.user.as_ref().is_some_and(|u| u.choices.is_empty()),
            _ => false,
        }
    }

    /// Answers are programs, which are run.
    pub fn runs_programs(&self) -> bool {
        self.kind == TaskKind::HumanEval
    }

    /// The protocol that is meant where none is named.
    pub fn default_protocol(&self) -> Protocol {
        if self.is_written() { Protocol::Generation } else { Protocol::Loglikelihood }
    }

    /// At most this many tokens are written to an item.
    pub fn answer_tokens(&self) -> usize {
        match self.kind {
            TaskKind::Gsm8k => 256,
            TaskKind::HumanEval => 512,
            TaskKind::User if self.is_written() => 128,
            _ => 32,
        }
    }

    fn item(
        &self,
        doc_id: usize,
        file: &Path,
        record: &Record,
        protocol: Protocol,
    ) -> Result<Item> {
        let (request, target) = match (self.kind, &self.user) {
            (TaskKind::Gsm8k, _) => gsm8k(file, record)?,
            (TaskKind::HumanEval, _) => {
                let program = Program::read(file, record)?;
                let target = program.task_id.clone();
                (Request::Code(program), target)
            }
            (_, Some(user)) => user.request(file, record, protocol)?,
            _ => {
                let question = Question::read(self.kind, file, record)?;
                let target = question.choices[question.gold].clone();
                let request = match protocol {
                    Protocol::Generation => self.letter(&question),
                    Protocol::Loglikelihood => self.continuations(&question),
                };
                (request, target)
            }
        };
        Ok(Item { doc_id, request, target })
    }

    /// The prompts that the paper's authors train with.
    fn letter(&self, q: &Question) -> Request {
        let prompt = if self.kind == TaskKind::WinoGrande {
            format!(
                "Please choose the correct answer to fill in the blank to complete the given \
                 sentence.\nSentence: {}\n(A) {}\n(B) {}",
                q.stem, q.choices[0], q.choices[1]
            )
        } else {
            let about = [q.passage.trim(), q.stem.trim()];
            let about: Vec<&str> = about.into_iter().filter(|s| !s.is_empty()).collect();
            let (about, choices) = (about.join(" "), lettered(&q.choices));
            format!("Please choose the correct answer to the question: {about} {choices}")
        };
        Request::Letter { prompt, choices: q.choices.len(), gold: q.gold }
    }

    /// Contexts and continuations as lm-evaluation-harness lays them out.
    fn continuations(&self, q: &Question) -> Request {
        let (question, choices) = (q.stem.as_str(), &q.choices);
        let after = |context: String| -> Vec<(String, String)> {
            choices.iter().map(|c| (context.clone(), format!(" {c}"))).collect()
        };
        let mut bytes: Vec<usize> = choices.iter().map(String::len).collect();
        let pairs = match self.kind {
            // Partial scoring: the option is put into the blank, and what follows it is scored.
            TaskKind::WinoGrande => {
                let (before, rest) = question.split_once('_').unwrap_or((question, ""));
                let rest = format!(" {}", rest.trim());
                bytes = vec![rest.len() - 1; choices.len()];
                choices.iter().map(|c| (format!("{before}{c}"), rest.clone())).collect()
            }
            TaskKind::CommonsenseQa => {
                bytes = vec![1; choices.len()];
                let lines: Vec<String> = (choices.iter().enumerate())
                    .map(|(i, c)| format!("{}. {c}\n", letter_of(i)))
                    .collect();
                let context = format!("Question: {}\n{}Answer:", question.trim(), lines.concat());
                let letter = |i| (context.clone(), format!(" {}", letter_of(i)));
                (0..choices.len()).map(letter).collect()
            }
            TaskKind::OpenBookQa => after(question.to_owned()),
            TaskKind::Siqa => {
                after(format!("Q: {} {question}\nA:", q.passage).replace("Q:  ", "Q: "))
            }
            TaskKind::BoolQ if q.passage.is_empty() => {
                after(format!("Question: {question}?\nAnswer:"))
            }
            TaskKind::BoolQ => after(format!("{}\nQuestion: {question}?\nAnswer:", q.passage)),
            _ => after(format!("Question: {question}\nAnswer:")),
        };
        Request::Continuations { pairs, bytes, gold: q.gold }
    }
}

/// `(A) this  (B) that`
fn lettered(choices: &[String]) -> String {
    let one = |(i, c): (usize, &String)| format!("({}) {c}", letter_of(i));
    choices.iter().enumerate().map(one).collect::<Vec<_>>().join("  ")
}

fn gsm8k(file: &Path, record: &Record) -> Result<(Request, String)> {
    let bad = |message: &str| data_error(file, record.line, message);
    let text = |key: &str| record.value[key].as_str();
    let question = text("question").or_else(|| text("instruction"));
    let question = question.ok_or_else(|| bad("field `question` is missing"))?;
    let answer = text("answer").ok_or_else(|| bad("field `answer` is missing"))?;
    let gold = if let Some((_, gold)) = answer.rsplit_once("#### ") {
        number(gold.trim())
    } else {
        // LLM-Adapters: a number as a text, with decimals it does not have.
        let x: f64 = answer.trim().parse().map_err(|_| bad("the answer has no `#### `"))?;
        x.to_string()
    };
    let prompt = format!("Question: {question}\nAnswer:");
    Ok((Request::Number { prompt, gold: gold.clone() }, gold))
}

impl UserTask {
    fn request(
        &self,
        file: &Path,
        record: &Record,
        protocol: Protocol,
    ) -> Result<(Request, String)> {
        let bad = |message: String| data_error(file, record.line, message);
        let prompt = self.fill(&record.value).map_err(bad)?;
        let answer = text_of(&record.value, &self.answer).map_err(bad)?;
        if self.choices.is_empty() {
            return Ok((Request::Exact { prompt, gold: answer.trim().into() }, answer));
        }
        let choices = self.choices(&record.value).map_err(bad)?;
        if choices.len() < 2 || choices.len() > 26 {
            return Err(bad(format!("{} choices; expected 2 to 26", choices.len())));
        }
        let by_text = choices.iter().position(|c| *c == answer);
        let by_letter = || (0..choices.len()).find(|&i| letter_of(i).to_string() == answer);
        let by_place = || answer.parse().ok().filter(|&i: &usize| i < choices.len());
        let gold = by_text.or_else(by_letter).or_else(by_place).ok_or_else(|| {
            bad(format!("the answer `{answer}` is no choice's text, letter or place from 0"))
        })?;
        let target = choices[gold].clone();
        let request = match protocol {
            Protocol::Generation => {
                let prompt = format!("{prompt} {}", lettered(&choices));
                Request::Letter { prompt, choices: choices.len(), gold }
            }
            Protocol::Loglikelihood => Request::Continuations {
                bytes: choices.iter().map(String::len).collect(),
                pairs: choices.iter().map(|c| (prompt.clone(), format!(" {c}"))).collect(),
                gold,
            },
        };
        Ok((request, target))
    }

    fn choices(&self, value: &Value) -> std::result::Result<Vec<String>, String> {
        if let [only] = &self.choices[..]
            && let Value::Array(list) = &value[only.as_str()]
        {
            return Ok(list.iter().map(plain_text).collect());
        }
        self.choices.iter().map(|c| text_of(value, c)).collect()
    }

    /// The prompt with the record's columns in it.
    fn fill(&self, value: &Value) -> std::result::Result<String, String> {
        let mut out = String::new();
        let mut rest = self.prompt.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (column, after) =
                after.split_once('}').ok_or("the prompt has a `{` without its `}`")?;
            out.push_str(before);
            out.push_str(&text_of(value, column)?);
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }
}

fn text_of(value: &Value, column: &str) -> std::result::Result<String, String> {
    match &value[column] {
        Value::Null => Err(format!("field `{column}` is missing")),
        found => Ok(plain_text(found)),
    }
}

fn plain_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}
