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
use crate::model::spec::DecoderSpec;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
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
            learning_rates: vec![1e-3, 2e-3, 4e-3],
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
    let ledger = Ledger::open(folder, study)?;
    let bench = Bench::open(folder, base_files, study)?;
    let spec = DecoderSpec::read(&bench.base.join("config.json"))?;
    let adapters = study
        .contenders
        .iter()
        .map(|c| Ok((*c, c.config(&spec, study.budget)?)))
        .collect::<Result<Vec<_>>>()?;
    watch(Event::Begun(ledger.done(), study.trials()));
    let tuning = plan(study, &adapters, |_, _| study.learning_rates.clone(), &[TUNING_SEED]);
    run_all(&bench, &ledger, tuning, watch)?;
    let tuned = ledger.trials();
    let best = |contender, family| vec![verdict::best_rate(&tuned, contender, family)];
    let seeds: Vec<u64> = (1..=study.seeds).collect();
    run_all(&bench, &ledger, plan(study, &adapters, best, &seeds), watch)?;
    let sizes: Vec<(Contender, usize)> = adapters
        .iter()
        .map(|(c, a)| Ok((*c, contenders::parameters(a, &spec)?)))
        .collect::<Result<_>>()?;
    let verdict = Verdict::of(study, &sizes, &ledger.trials());
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
    ledger: &Ledger,
    mut todo: VecDeque<Todo>,
    watch: &(dyn Fn(Event) + Sync),
) -> Result<()> {
    todo.retain(|t| !ledger.has(t));
    let todo = Mutex::new(todo);
    let next = || todo.lock().ok().and_then(|mut todo| todo.pop_front());
    let work = || -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .map_err(|e| Error::Run(format!("no thread to run a trial on: {e}")))?;
        while let Some(t) = next() {
            let result = pool
                .install(|| bench.run(t.contender, t.adapter, t.family, t.learning_rate, t.seed));
            let trial = match result {
                Ok(trial) => trial,
                Err(error) => {
                    // The other workers end after the trial they are at.
                    todo.lock().iter_mut().for_each(|todo| todo.clear());
                    return Err(error);
                }
            };
            ledger.add(&trial)?;
            watch(Event::Ended(&trial));
        }
        Ok(())
    };
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        all.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// The trials that are done, on disk and in memory.
struct Ledger {
    path: PathBuf,
    state: Mutex<(File, Vec<Trial>)>,
}

impl Ledger {
    fn open(folder: &Path, study: &Study) -> Result<Self> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let name = folder.join(STUDY);
        if name.exists() {
            let text = std::fs::read_to_string(&name).map_err(failed(&name))?;
            if serde_json::from_str::<Study>(&text).ok().as_ref() != Some(study) {
                return Err(Error::Config {
                    file: name.display().to_string(),
                    message: "the folder holds a study with other settings; choose another \
                              --output, or remove the folder"
                        .into(),
                });
            }
        } else {
            write(&name, json(study)?.as_bytes())?;
        }
        let path = folder.join(TRIALS);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed(&path)(e)),
        };
        let text = String::from_utf8_lossy(&bytes);
        // A line that a kill cut off is of a trial that runs again.
        let trials: Vec<Trial> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let lines = trials.iter().map(line).collect::<Result<String>>()?;
        let fresh = folder.join(".trials.jsonl");
        write(&fresh, lines.as_bytes())?;
        std::fs::rename(&fresh, &path).map_err(failed(&path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(failed(&path))?;
        Ok(Self { path, state: Mutex::new((file, trials)) })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, (File, Vec<Trial>)> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn done(&self) -> usize {
        self.state().1.len()
    }

    fn trials(&self) -> Vec<Trial> {
        self.state().1.clone()
    }

    fn has(&self, todo: &Todo) -> bool {
        self.state().1.iter().any(|t| {
            (t.contender, t.family, t.learning_rate, t.seed)
                == (todo.contender, todo.family, todo.learning_rate, todo.seed)
        })
    }

    fn add(&self, trial: &Trial) -> Result<()> {
        let text = line(trial)?;
        let mut state = self.state();
        let written = state.0.write_all(text.as_bytes()).and_then(|()| state.0.sync_data());
        written.map_err(|source| Error::Io { path: self.path.clone(), source })?;
        state.1.push(trial.clone());
        Ok(())
    }
}

fn line(trial: &Trial) -> Result<String> {
    let text = serde_json::to_string(trial);
    text.map(|text| text + "\n")
        .map_err(|e| Error::Run(format!("a trial cannot be written as JSON: {e}")))
}

fn json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    text.map_err(|e| Error::Run(format!("the study cannot be written as JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(seed: u64) -> Trial {
        Trial {
            contender: Contender::Lora,
            family: Family::Desk,
            learning_rate: 1e-3,
            seed,
            parameters: 5,
            loss: 0.1 + seed as f64 / 3.0,
            accuracy: 0.5,
            by_kind: [("seen".to_owned(), 0.5)].into(),
            seconds: 1.0,
        }
    }

    #[test]
    fn a_stopped_study_keeps_its_trials_and_drops_half_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let study = Study::quick();
        let ledger = Ledger::open(dir.path(), &study).unwrap();
        for seed in 1..=3 {
            ledger.add(&trial(seed)).unwrap();
        }
        drop(ledger);
        let path = dir.path().join(TRIALS);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let ledger = Ledger::open(dir.path(), &study).unwrap();
        assert_eq!(ledger.trials(), [trial(1), trial(2)]);
        ledger.add(&trial(3)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn another_study_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Ledger::open(dir.path(), &Study::quick()).unwrap());
        let error = Ledger::open(dir.path(), &Study::full()).err().unwrap();
        assert!(error.to_string().contains("other settings"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
