//! A model's answers to items, several sequences at a time.

use super::extract::{flexible, letter, strict};
use super::results::Sample;
use super::sandbox::Sandbox;
use super::task::{Item, Request};
use crate::error::{Error, Result};
use crate::generate::{Sampling, generate};
use crate::model::{Batch, Model};
use crate::template::{Message, Template};
use crate::tokenizer::Tokenizer;
use serde_json::{Value, json};
use smore_engine::Cpu;
use std::collections::BTreeMap;

/// Tokens of a forward pass; more do not make it faster.
const BATCH_TOKENS: usize = 1024;

/// Who answers.
pub struct Answerer<'a> {
    /// The model, with or without an adapter.
    pub model: &'a Model<Cpu<f32>>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its template, for what is said to it as a message.
    pub template: &'a Template,
    /// At most this many tokens are written.
    pub answer_tokens: usize,
    /// Runs programs, where the task has them.
    pub sandbox: Option<&'a Sandbox>,
}

/// A continuation to score.
struct Scored {
    item: usize,
    ids: Vec<u32>,
    /// First token of the continuation.
    from: usize,
}

impl Answerer<'_> {
    /// Answers all items in order, handing over each answer as it is known.
    ///
    /// # Errors
    /// If `done` fails or an item does not fit the model.
    pub fn answer(&self, items: &[Item], mut done: impl FnMut(Sample) -> Result<()>) -> Result<()> {
        let mut waiting = 0;
        let mut scored = Vec::new();
        let mut tokens = 0;
        for (i, item) in items.iter().enumerate() {
            let Request::Continuations { pairs, .. } = &item.request else {
                done(self.write(item)?)?;
                waiting = i + 1;
                continue;
            };
            for (context, continuation) in pairs {
                let (ids, from) = self.encode(context, continuation)?;
                tokens += ids.len();
                scored.push(Scored { item: i, ids, from });
            }
            if tokens >= BATCH_TOKENS || i + 1 == items.len() {
                self.flush(&items[waiting..=i], waiting, &scored, &mut done)?;
                scored.clear();
                (waiting, tokens) = (i + 1, 0);
            }
        }
        Ok(())
    }

    /// The tokens of both texts together, and where the continuation begins. Spaces at the end of
    /// the context are the continuation's, since most tokenizers join a space to the word after it.
    fn encode(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, usize)> {
        let start = context.trim_end().len();
        let (context, spaces) = context.split_at(start);
        let mut ids =
            self.tokenizer.encode_with_special(&format!("{context}{spaces}{continuation}"))?;
        let from = self.tokenizer.encode_with_special(context)?.len();
        // Of what is too long, the end counts.
        let cut = ids.len().saturating_sub(self.model.context);
        let from = from.max(1);
        if from <= cut || from >= ids.len() {
            return Err(Error::Run(format!(
                "the choice `{}` does not fit the model's {} tokens or has none",
                continuation.trim(),
                self.model.context
            )));
        }
        ids.drain(..cut);
        Ok((ids, from - cut))
    }

    /// Scores whole items in forward passes of a bounded number of tokens.
    fn flush(
        &self,
        items: &[Item],
        first: usize,
        scored: &[Scored],
        done: &mut impl FnMut(Sample) -> Result<()>,
    ) -> Result<()> {
        let mut sums = vec![Vec::new(); items.len()];
        let mut rest = scored;
        while !rest.is_empty() {
            let mut batch = Batch::default();
            let mut count = 0;
            while count < rest.len()
                && (count == 0 || batch.ids.len() + rest[count].ids.len() <= BATCH_TOKENS)
            {
                let one = &rest[count];
                let trained: Vec<bool> = (0..one.ids.len()).map(|i| i >= one.from).collect();
                batch.push(&one.ids, &trained);
                count += 1;
            }
            let losses = self.model.losses(&batch);
            let mut losses = losses.iter();
            for one in &rest[..count] {
                let n = one.ids.len() - one.from;
                let loss: f64 = losses.by_ref().take(n).sum();
                sums[one.item - first].push(-loss);
            }
            rest = &rest[count..];
        }
        for (item, sums) in items.iter().zip(&sums) {
            done(judged(item, sums)?)?;
        }
        Ok(())
    }

    /// An answer in words, greedily.
    fn write(&self, item: &Item) -> Result<Sample> {
        let (prompt, gold) = match &item.request {
            Request::Letter { prompt, gold, .. } => (prompt, json!(gold)),
            Request::Number { prompt, gold } | Request::Exact { prompt, gold } => {
                (prompt, json!(gold))
            }
            Request::Code(program) => (&program.prompt, json!(program.task_id)),
            Request::Continuations { .. } => unreachable!("is scored, not written"),
        };
        // A bare base continues GSM8K's and HumanEval's texts as they are.
        let continues = matches!(item.request, Request::Number { .. } | Request::Code(_));
        let mut ids = if continues && self.template.is_plain() {
            self.tokenizer.encode_with_special(prompt)?
        } else {
            self.template.encode_prompt(self.tokenizer, &[Message::new("user", prompt)])?
        };
        // Of a prompt too long for an answer, the end is kept.
        let room = self.model.context.saturating_sub(self.answer_tokens).max(1);
        ids.drain(..ids.len().saturating_sub(room));
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
        let text =
            generate(self.model, self.tokenizer, &ids, self.answer_tokens, greedy, |_| {})?.text;
        let (metrics, filtered) = self.judge_text(&item.request, &text)?;
        Ok(Sample {
            doc_id: item.doc_id,
            target: item.target.clone(),
            gold,
            arguments: json!([prompt]),
            resps: json!([text]),
            filtered_resps: filtered,
            metrics,
        })
    }

    fn judge_text(&self, request: &Request, text: &str) -> Result<(BTreeMap<String, f64>, Value)> {
        let right = |name: &str, is: bool| (name.to_owned(), f64::from(u8::from(is)));
        Ok(match request {
            Request::Letter { choices, gold, .. } => {
                let found = letter(text, *choices);
                let metrics = [
                    right("acc,none", found == Some(*gold)),
                    right("unread,none", found.is_none()),
                ];
                (metrics.into(), json!([found]))
            }
            Request::Number { gold, .. } => {
                // What a base goes on to ask itself is no part of the answer.
                let text = text.split("Question:").next().unwrap_or_default();
                let found = [strict(text), flexible(text)];
                let is = |f: &Option<String>| f.as_deref() == Some(gold);
                let metrics = [
                    right("exact_match,strict-match", is(&found[0])),
                    right("exact_match,flexible-extract", is(&found[1])),
                ];
                (metrics.into(), json!(found))
            }
            Request::Exact { gold, .. } => {
                ([right("exact_match,none", text.trim() == gold)].into(), json!([text.trim()]))
            }
            Request::Code(program) => {
                let sandbox = self.sandbox.expect("is opened for tasks with programs");
                let outcome = sandbox.run(&program.source(text))?;
                ([right("pass@1,none", outcome.passed())].into(), json!([outcome]))
            }
            Request::Continuations { .. } => unreachable!("is scored, not written"),
        })
    }
}

/// The likeliest choice, by its sum and by its sum over its bytes; of equals the first.
fn judged(item: &Item, sums: &[f64]) -> Result<Sample> {
    let Request::Continuations { pairs, bytes, gold } = &item.request else {
        unreachable!("is written, not scored")
    };
    if let Some(bad) = sums.iter().find(|s| !s.is_finite()) {
        return Err(Error::Run(format!(
            "the log-likelihood of item {} is {bad}; are the model's weights whole?",
            item.doc_id
        )));
    }
    let best = |value: &dyn Fn(usize) -> f64| {
        (1..sums.len()).fold(0, |best, i| if value(i) > value(best) { i } else { best })
    };
    let right = |name: &str, chosen: usize| (name.to_owned(), f64::from(u8::from(chosen == *gold)));
    let norm = |i: usize| sums[i] / bytes[i].max(1) as f64;
    Ok(Sample {
        doc_id: item.doc_id,
        target: item.target.clone(),
        gold: json!(gold),
        arguments: json!(pairs),
        resps: json!(sums),
        filtered_resps: json!([best(&|i| sums[i]), best(&norm)]),
        metrics: [right("acc,none", best(&|i| sums[i])), right("acc_norm,none", best(&norm))]
            .into(),
    })
}
