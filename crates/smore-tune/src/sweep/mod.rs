//! `smore sweep`: many runs that differ in some keys, side by side, under one budget.
//!
//! A trial is a run in a folder of its own, trained as `smore train` trains it and judged by the
//! held-out loss of what it exports. A finished one is a line of `trials.jsonl`, and an unfinished
//! one goes on from its newest checkpoint, so a sweep that was stopped ends with the same table.

mod space;
mod table;

pub use space::{Budget, Halving, Range, Search, SweepConfig, Values};
pub use table::{Row, Table};

use crate::checkpoint::write;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::ledger::{Ledger, side_by_side};
use crate::model::spec::DecoderSpec;
use crate::sft::{Metric, Observer, Prepared};
use serde::{Deserialize, Serialize};
use space::Candidate;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

const SETTINGS: &str = "sweep.json";
const TRIALS: &str = "trials.jsonl";

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Number of the candidate.
    pub candidate: usize,
    /// Number of the rung, 0 but for successive halving.
    pub rung: usize,
    /// Its seed.
    pub seed: u64,
    /// Held-out loss of what it exported; none where it failed.
    pub loss: Option<f64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Alarms about routers that stand at its end.
    pub alarms: usize,
    /// Seconds of training.
    pub seconds: f64,
}

/// What a person may want to see while a sweep runs.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A rung begins with so many trials done of so many; these candidates are not tried, and why.
    Begun {
        /// Trials that are done.
        done: usize,
        /// Trials of the rung.
        trials: usize,
        /// Candidates beyond the budget.
        left_out: &'a [(String, String)],
    },
    /// A trial of a candidate ended.
    Ended(&'a str, &'a Trial),
}

/// A sweep that is ready to run.
pub struct Sweep {
    config: SweepConfig,
    base: RunConfig,
    candidates: Vec<Candidate>,
    left_out: Vec<(String, String)>,
}

/// Gives up where the user asks for it.
struct Quiet<'a>(&'a (dyn Fn() -> bool + Sync));

impl Observer for Quiet<'_> {
    fn metric(&mut self, _: &Metric, _: usize, _: usize) {}
    fn saved(&mut self, _: &Path) {}
    fn note(&mut self, _: &str) {}
    fn interrupted(&mut self) -> bool {
        (self.0)()
    }
}

impl Sweep {
    /// Reads a sweep's file and the run it varies, and lists the candidates.
    ///
    /// # Errors
    /// What is wrong in either, and every candidate whose configuration is.
    pub fn load(file: &Path) -> Result<Self> {
        let config = SweepConfig::load(file)?;
        let base = RunConfig::load(&config.run)?;
        let spec = DecoderSpec::read(&base.model.join("config.json"))?;
        let name = file.display().to_string();
        let mut candidates = space::candidates(&config, &base, &name)?;
        let mut left_out = Vec::new();
        for candidate in &mut candidates {
            let adapters = Adapters::new(&candidate.config.adapter, &spec).map_err(|message| {
                Error::Config {
                    file: name.clone(),
                    message: format!("{}: {message}", candidate.name),
                }
            })?;
            candidate.parameters = adapters.len();
        }
        if let Some(budget) = &config.budget {
            candidates.retain(|candidate| match budget.refuses(candidate.parameters) {
                Some(why) => {
                    left_out.push((candidate.name.clone(), why));
                    false
                }
                None => true,
            });
        }
        if candidates.is_empty() {
            let message = "no candidate is within budget.parameters; raise budget.tolerance, or give \
                           other values";
            return Err(Error::Config { file: name, message: message.into() });
        }
        Ok(Self { config, base, candidates, left_out })
    }

    /// Names and trained parameters of the candidates.
    pub fn candidates(&self) -> impl Iterator<Item = (&str, usize)> {
        self.candidates.iter().map(|c| (c.name.as_str(), c.parameters))
    }

    /// Candidates beyond the budget, and why.
    pub fn left_out(&self) -> &[(String, String)] {
        &self.left_out
    }

    /// Where everything is written.
    pub fn output_dir(&self) -> &Path {
        &self.config.output_dir
    }

    /// Runs what is not done yet, and writes `results.json`, `best.yaml` and `report.html`.
    ///
    /// # Errors
    /// If the folder holds another sweep, a file cannot be written, or `interrupted` says so. A trial
    /// that fails is a line of the table and no error.
    pub fn run(
        &self,
        watch: &(dyn Fn(Event) + Sync),
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Table> {
        let folder = &self.config.output_dir;
        let own = (&self.config, &self.base);
        let ledger = Ledger::<Trial>::open(folder, (SETTINGS, TRIALS), &own)?;
        let rungs = self.config.rungs(self.base.train.max_steps)?;
        let mut alive: Vec<usize> = (0..self.candidates.len()).collect();
        for (rung, steps) in rungs.iter().enumerate() {
            let each = self.config.seeds.iter().map(|&seed| (rung, seed));
            let all: Vec<(usize, usize, u64)> =
                each.flat_map(|(rung, seed)| alive.iter().map(move |&c| (c, rung, seed))).collect();
            let done = ledger.done();
            let is_done = |&(c, r, s): &(usize, usize, u64)| {
                done.iter().any(|t| (t.candidate, t.rung, t.seed) == (c, r, s))
            };
            let todo: VecDeque<_> = all.iter().copied().filter(|t| !is_done(t)).collect();
            let begun = Event::Begun {
                done: all.len() - todo.len(),
                trials: all.len(),
                left_out: &self.left_out,
            };
            watch(begun);
            side_by_side(todo, self.config.workers(), |(candidate, rung, seed)| {
                let trial = self.trial(candidate, (rung, *steps), seed, interrupted)?;
                ledger.add(&trial)?;
                watch(Event::Ended(&self.candidates[candidate].name, &trial));
                Ok(())
            })?;
            if rung + 1 < rungs.len() {
                let table = Table::of(&self.candidates, &ledger.done(), rung);
                let keep = alive.len().div_ceil(self.config.eta());
                alive = table.rows.iter().take(keep).map(|row| row.candidate).collect();
                // In the order of the candidates, so that a resumed sweep runs in the same order.
                alive.sort_unstable();
            }
        }
        let table = Table::all(&self.candidates, &ledger.done(), rungs.len());
        self.write(&table)?;
        Ok(table)
    }

    /// One run, from its beginning or from its newest checkpoint.
    fn trial(
        &self,
        candidate: usize,
        (rung, steps): (usize, Option<usize>),
        seed: u64,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Trial> {
        let mut config = self.candidates[candidate].config.clone();
        config.train.seed = seed;
        if steps.is_some() {
            config.train.max_steps = steps;
        }
        config.output_dir = self.folder_of(candidate, rung, seed);
        let failed = |error: Error| match error {
            Error::Interrupted { .. } => Err(error),
            error => Ok(Trial {
                candidate,
                rung,
                seed,
                loss: None,
                error: Some(error.to_string()),
                alarms: 0,
                seconds: 0.0,
            }),
        };
        // It ended, but its line was not kept.
        if config.output_dir.join("report.html").exists() {
            let gone = std::fs::remove_dir_all(&config.output_dir);
            gone.map_err(|source| Error::Io { path: config.output_dir.clone(), source })?;
        }
        let name = format!("candidate {candidate}");
        let run = Prepared::new(config, &name).and_then(Prepared::resume);
        match run.and_then(|prepared| prepared.run(&mut Quiet(interrupted))) {
            Ok((outcome, _)) => {
                let alarms = outcome.standing_alarms().len();
                let (loss, seconds) = (outcome.eval_loss_after, outcome.seconds);
                let error =
                    loss.is_none().then(|| "nothing was held out to judge it by".to_owned());
                Ok(Trial { candidate, rung, seed, loss, error, alarms, seconds })
            }
            Err(error) => failed(error),
        }
    }

    /// The adapter that a candidate's run exported in the last rung, for every seed.
    pub fn adapters(&self, row: &Row) -> Vec<PathBuf> {
        let folder = |&seed: &u64| self.folder_of(row.candidate, row.rung, seed).join("adapter");
        self.config.seeds.iter().map(folder).collect()
    }

    fn folder_of(&self, candidate: usize, rung: usize, seed: u64) -> PathBuf {
        let rung = if rung > 0 { format!("-rung-{rung}") } else { String::new() };
        self.config.output_dir.join(format!("trial-{candidate:03}{rung}-seed-{seed}"))
    }

    fn write(&self, table: &Table) -> Result<()> {
        let folder = &self.config.output_dir;
        let text = serde_json::to_string_pretty(table)
            .map_err(|e| Error::Run(format!("the table cannot be written as JSON: {e}")))?;
        write(&folder.join("results.json"), format!("{text}\n").as_bytes())?;
        if let Some(best) = table.best() {
            let mut config = self.candidates[best.candidate].config.clone();
            config.output_dir = folder.join("best");
            write(&folder.join("best.yaml"), config.to_yaml()?.as_bytes())?;
        }
        table.page(&folder.display().to_string()).write(&folder.join("report.html"))
    }
}
