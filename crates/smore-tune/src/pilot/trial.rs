//! One adapter, trained and asked.

use super::tasks::{self, Question};
use super::{Contender, Family, Study};
use crate::checkpoint::write;
use crate::config::{AdapterConfig, RunConfig};
use crate::error::{Error, Result};
use crate::generate::{Sampling, generate};
use crate::model::Model;
use crate::sft::{Prepared, Silent, evaluate};
use crate::template::{Message, Template};
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::json;
use smore_engine::Cpu;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Longest answer, in tokens.
const ANSWER: usize = 40;

/// What a trial came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The adapter.
    pub contender: Contender,
    /// The tasks.
    pub family: Family,
    /// The learning rate.
    pub learning_rate: f64,
    /// Seed of data, starting values and order.
    pub seed: u64,
    /// Trained parameters.
    pub parameters: usize,
    /// Held-out cross-entropy per answer token, in nats.
    pub loss: f64,
    /// Share of held-out questions answered exactly.
    pub accuracy: f64,
    /// The same for combinations that training has, and for those that it has not.
    pub by_kind: BTreeMap<String, f64>,
    /// Seconds, on one thread.
    pub seconds: f64,
}

/// What all trials share.
pub(super) struct Bench {
    folder: PathBuf,
    pub(super) base: PathBuf,
    study: Study,
    tokenizer: Tokenizer,
    template: Template,
}

impl Bench {
    pub(super) fn open(folder: &Path, base_files: &[(&str, &[u8])], study: &Study) -> Result<Self> {
        let base = folder.join("base");
        make(&base)?;
        for (name, bytes) in base_files {
            write(&base.join(name), bytes)?;
        }
        let tokenizer = Tokenizer::open(&base)?;
        let template = Template::open(&base, &tokenizer)?;
        let (folder, study) = (folder.to_owned(), study.clone());
        Ok(Self { folder, base, study, tokenizer, template })
    }

    /// Trains an adapter in a folder of its own and asks it the held-out questions.
    pub(super) fn run(
        &self,
        contender: Contender,
        adapter: &AdapterConfig,
        family: Family,
        learning_rate: f64,
        seed: u64,
    ) -> Result<Trial> {
        let start = Instant::now();
        let name = format!("{}-{contender:?}-{learning_rate:e}-{seed}", family.name());
        let folder = self.folder.join("trials").join(&name);
        if folder.exists() {
            // Of a study that was stopped here.
            std::fs::remove_dir_all(&folder)
                .map_err(|source| Error::Io { path: folder.clone(), source })?;
        }
        make(&folder)?;
        let Study { train, held_out, .. } = self.study;
        let (train, held_out) = tasks::questions(family, seed, train, held_out);
        write(&folder.join("train.jsonl"), tasks::to_jsonl(&train).as_bytes())?;
        write(&folder.join("held_out.jsonl"), tasks::to_jsonl(&held_out).as_bytes())?;
        let config = self.config(adapter, &folder, learning_rate, seed)?;
        let prepared = Prepared::new(config, &name)?;
        let samples = prepared.data.validation.clone();
        let parameters = prepared.trainable_parameters();
        let (_, model) = prepared.run(&mut Silent)?;
        let loss = evaluate(&model, &samples, None).map_or(f64::NAN, |(loss, _)| loss);
        let mut kinds: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for question in &held_out {
            let (hits, of) = kinds.entry(question.kind.to_owned()).or_default();
            *of += 1;
            *hits += usize::from(self.answers(&model, question)?);
        }
        let hits: usize = kinds.values().map(|(hits, _)| hits).sum();
        let share = |(kind, (hits, of)): (String, (usize, usize))| (kind, hits as f64 / of as f64);
        Ok(Trial {
            contender,
            family,
            learning_rate,
            seed,
            parameters,
            loss,
            accuracy: hits as f64 / held_out.len() as f64,
            by_kind: kinds.into_iter().map(share).collect(),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn config(
        &self,
        adapter: &AdapterConfig,
        folder: &Path,
        learning_rate: f64,
        seed: u64,
    ) -> Result<RunConfig> {
        let file = |name: &str| folder.join(name);
        let config = json!({
            "model": self.base,
            "adapter": adapter,
            "data": {
                "train": [{"path": file("train.jsonl")}],
                "validation": {"path": file("held_out.jsonl")},
                "cutoff_len": 250,
            },
            "train": {
                "learning_rate": learning_rate,
                "num_train_epochs": self.study.epochs,
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "warmup_ratio": 0.05,
                "eval_steps": 0,
                "save_steps": 0,
                "seed": seed,
            },
            "output_dir": file("run"),
        });
        // JSON is YAML.
        RunConfig::parse(&config.to_string(), "pilot")
    }

    /// True where the likeliest answer, up to the end token, is the right one.
    fn answers(&self, model: &Model<Cpu<f32>>, question: &Question) -> Result<bool> {
        let message = Message::new("user", &question.prompt);
        let prompt = self.template.encode_prompt(&self.tokenizer, &[message])?;
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
        let answer = generate(model, &self.tokenizer, &prompt, ANSWER, greedy, |_| {})?;
        Ok(answer.text.trim() == question.completion.trim())
    }
}

fn make(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })
}
