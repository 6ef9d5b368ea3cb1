//! `smore reproduce pilot`: does structure help, at equal parameters, on two cores.
//!
//! A study from nothing but this program: the demo's small base, three families of tasks that are
//! put together from the demo's skills, LoRA, HydraLoRA, MixLoRA, S'MoRE and S'MoRE without parts of
//! it, all at the same number of trained parameters. Each contender's learning rate is tuned on the
//! same grid, on data of a seed that is not in the study; then every contender meets the same seeds.
//!
//! A finished trial is a line of `trials.jsonl`, so a study that was stopped goes on.

mod contenders;
mod statistics;
mod tasks;
mod trial;
mod verdict;

pub use contenders::{Contender, TOLERANCE};
pub use statistics::Estimate;
pub use tasks::Family;
pub use trial::Trial;
pub use verdict::{Row, Verdict};

use crate::checkpoint::write;
use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::ledger::{Ledger, side_by_side};
use crate::model::spec::DecoderSpec;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::Path;
use trial::Bench;

const STUDY: &str = "study.json";
const TRIALS: &str = "trials.jsonl";
/// Seed of the data and of training while learning rates are tuned; no study has it.
const TUNING_SEED: u64 = 1000;

/// What is compared, on what, how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Study {
    /// Who is compared.
    pub contenders: Vec<Contender>,
    /// On which tasks.
    pub families: Vec<Family>,
    /// Seeds 1, 2, .. of data and training.
    pub seeds: u64,
    /// Learning rates, from which each contender takes its best in each family.
    pub learning_rates: Vec<f64>,
    /// Training samples of a trial.
    pub train: usize,
    /// Held-out questions of a trial.
    pub held_out: usize,
    /// Passes over the training samples.
    pub epochs: f64,
    /// Trained parameters that every contender has, within [`TOLERANCE`].
    pub budget: usize,
}

impl Study {
    /// The whole study.
    pub fn full() -> Self {
        Self {
            contenders: Contender::ALL.to_vec(),
            families: Family::ALL.to_vec(),
            seeds: 5,
            learning_rates: vec![1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
            train: 2000,
            held_out: 180,
            epochs: 2.0,
            budget: 264_960,
        }
    }

    /// The same question, asked with less.
    pub fn quick() -> Self {
        Self {
            contenders: Contender::ALL[..5].to_vec(),
            seeds: 3,
            learning_rates: vec![2e-3, 4e-3],
            train: 800,
            held_out: 90,
            ..Self::full()
        }
    }

    /// Trials of the whole study.
    pub fn trials(&self) -> usize {
        let each = self.learning_rates.len() + self.seeds as usize;
        self.contenders.len() * self.families.len() * each
    }
}

/// What a person may want to see while a study runs.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The study begins with so many trials done of so many.
    Begun(usize, usize),
    /// A trial ended.
    Ended(&'a Trial),
}

/// Runs what is not done yet of `study` in `folder` and writes `report.html` and `verdict.json`.
///
/// # Errors
/// If the folder holds another study, a file cannot be written or a trial fails.
pub fn reproduce(
    folder: &Path,
    base_files: &[(&str, &[u8])],
    study: &Study,
    watch: &(dyn Fn(Event) + Sync),
) -> Result<Verdict> {
    let ledger = Ledger::open(folder, (STUDY, TRIALS), study)?;
    let bench = Bench::open(folder, base_files, study)?;
    let spec = DecoderSpec::read(&bench.base.join("config.json"))?;
    let adapters = study
        .contenders
        .iter()
        .map(|c| Ok((*c, c.config(&spec, study.budget)?)))
        .collect::<Result<Vec<_>>>()?;
    watch(Event::Begun(ledger.done().len(), study.trials()));
    let tuning = plan(study, &adapters, |_, _| study.learning_rates.clone(), &[TUNING_SEED]);
    run_all(&bench, &ledger, tuning, watch)?;
    let tuned = ledger.done();
    let best = |contender, family| vec![verdict::best_rate(&tuned, contender, family)];
    let seeds: Vec<u64> = (1..=study.seeds).collect();
    run_all(&bench, &ledger, plan(study, &adapters, best, &seeds), watch)?;
    let sizes: Vec<(Contender, usize)> = adapters
        .iter()
        .map(|(c, a)| Ok((*c, contenders::parameters(a, &spec)?)))
        .collect::<Result<_>>()?;
    let verdict = Verdict::of(study, &sizes, &ledger.done());
    verdict.page().write(&folder.join("report.html"))?;
    write(&folder.join("verdict.json"), json(&verdict)?.as_bytes())?;
    write(&folder.join("verdict.md"), verdict.markdown().as_bytes())?;
    Ok(verdict)
}

/// A trial to run.
struct Todo<'a> {
    contender: Contender,
    adapter: &'a AdapterConfig,
    family: Family,
    learning_rate: f64,
    seed: u64,
}

fn plan<'a>(
    study: &Study,
    adapters: &'a [(Contender, AdapterConfig)],
    rates: impl Fn(Contender, Family) -> Vec<f64>,
    seeds: &[u64],
) -> VecDeque<Todo<'a>> {
    let mut todo = VecDeque::new();
    for &seed in seeds {
        for &family in &study.families {
            for (contender, adapter) in adapters {
                for learning_rate in rates(*contender, family) {
                    let contender = *contender;
                    todo.push_back(Todo { contender, adapter, family, learning_rate, seed });
                }
            }
        }
    }
    todo
}

/// Runs the trials side by side, one thread each. Results do not depend on it.
fn run_all(
    bench: &Bench,
    ledger: &Ledger<Trial>,
    mut todo: VecDeque<Todo>,
    watch: &(dyn Fn(Event) + Sync),
) -> Result<()> {
    let done = ledger.done();
    let same = |t: &Todo, d: &Trial| {
        (t.contender, t.family, t.learning_rate, t.seed)
            == (d.contender, d.family, d.learning_rate, d.seed)
    };
    todo.retain(|t| !done.iter().any(|d| same(t, d)));
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    side_by_side(todo, (workers, 1), |t| {
        let trial = bench.run(t.contender, t.adapter, t.family, t.learning_rate, t.seed)?;
        ledger.add(&trial)?;
        watch(Event::Ended(&trial));
        Ok(())
    })
}

fn json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    text.map_err(|e| Error::Run(format!("the study cannot be written as JSON: {e}")))
}
