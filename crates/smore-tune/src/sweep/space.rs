//! A sweep's file, and the runs it asks for.

use crate::config::{RunConfig, from_yaml, read_text};
use crate::error::{Error, Result};
use indexmap::IndexMap;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use smore::rng::{Purpose, stream};
use std::path::{Path, PathBuf};

/// A sweep, as the user wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepConfig {
    /// The configuration of a run that the trials vary.
    pub run: PathBuf,
    /// Keys of that configuration, such as `train.learning_rate`, `adapter.layers.0.rank` or the
    /// whole `adapter`, and the values to try.
    pub parameters: IndexMap<String, Values>,
    /// How values are put together.
    #[serde(default)]
    pub search: Search,
    /// Candidates of `random` and `halving`, drawn by `seed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trials: Option<usize>,
    /// Seed of the draws.
    #[serde(default)]
    pub seed: u64,
    /// Every candidate is trained with each of these as `train.seed`.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// Candidates beyond it are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// Of `search: halving`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub halving: Option<Halving>,
    /// Trials at a time; as many as there are cores where absent. Results do not depend on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<usize>,
    /// The folder to write.
    pub output_dir: PathBuf,
}

fn one_seed() -> Vec<u64> {
    vec![42]
}

/// Values to try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Values {
    /// Each of these.
    List(Vec<Value>),
    /// Drawn from a range; not for `grid`.
    Range(Range),
}

/// A range of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Lowest value.
    pub min: f64,
    /// Highest value.
    pub max: f64,
    /// Evenly in the logarithm.
    #[serde(default)]
    pub log: bool,
}

/// How values are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Search {
    /// Every value with every other.
    #[default]
    Grid,
    /// `trials` draws, no two alike.
    Random,
    /// As `random`, but first trained for a few steps; the better part goes on with more, until
    /// those that are left are trained in full (Jamieson and Talwalkar 2016). Each rung trains
    /// anew, since a schedule depends on its number of steps.
    Halving,
}

/// Of successive halving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Halving {
    /// Steps of the first rung.
    pub min_steps: usize,
    /// Each rung has so many times the steps, and a so-manieth of the candidates.
    #[serde(default = "three")]
    pub eta: usize,
}

fn three() -> usize {
    3
}

/// Trained parameters that a candidate may have.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The number.
    pub parameters: usize,
    /// How far a candidate may be from it, as a share; without it, any number up to it will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
}

impl Budget {
    pub(super) fn refuses(&self, parameters: usize) -> Option<String> {
        let off = parameters as f64 / self.parameters as f64 - 1.0;
        let fits = match self.tolerance {
            Some(share) => off.abs() <= share,
            None => off <= 0.0,
        };
        (!fits).then(|| format!("{parameters} parameters, {:+.1}%", 100.0 * off))
    }
}

/// A run to try.
pub(super) struct Candidate {
    /// What it differs in.
    pub(super) name: String,
    pub(super) config: RunConfig,
    pub(super) parameters: usize,
}

impl SweepConfig {
    /// Reads and checks a sweep's file.
    ///
    /// # Errors
    /// What is wrong, with its place.
    pub fn load(file: &Path) -> Result<Self> {
        let name = file.display().to_string();
        let text = read_text(file, "a sweep in YAML")?;
        let config: Self = from_yaml(&text, &name)?;
        config.validate().map_err(|message| Error::Config { file: name, message })?;
        Ok(config)
    }

    fn validate(&self) -> std::result::Result<(), String> {
        let halving = self.search == Search::Halving;
        if self.parameters.is_empty() {
            return Err("parameters is empty; expected at least one {key: [values]}".into());
        }
        if self.seeds.is_empty() {
            return Err("seeds is empty; expected at least one".into());
        }
        if self.workers == Some(0) {
            return Err("workers is 0; expected at least 1".into());
        }
        if (self.search == Search::Grid) == self.trials.is_some() || self.trials == Some(0) {
            return Err(
                "trials counts the draws of search random and halving; expected at least 1 \
                        there, and none for grid"
                    .into(),
            );
        }
        if halving != self.halving.is_some() {
            return Err("halving: {min_steps: N} belongs to search: halving; expected both or \
                        neither"
                .into());
        }
        if let Some(Halving { min_steps, eta }) = self.halving
            && (min_steps == 0 || eta < 2)
        {
            return Err(format!(
                "halving is {{min_steps: {min_steps}, eta: {eta}}}; expected at least 1 and 2"
            ));
        }
        if let Some(Budget { parameters, tolerance }) = self.budget
            && (parameters == 0 || tolerance.is_some_and(|t| !(0.0..1.0).contains(&t)))
        {
            return Err(
                "budget needs parameters of at least 1 and a tolerance from 0 to below 1".into()
            );
        }
        for (key, values) in &self.parameters {
            match values {
                Values::List(list) if list.is_empty() => {
                    return Err(format!("parameters.{key} is empty; expected a list of values"));
                }
                Values::Range(_) if self.search == Search::Grid => {
                    return Err(format!(
                        "parameters.{key} is a range, of which a grid takes no values; give a list, \
                         or search: random"
                    ));
                }
                Values::Range(Range { min, max, log }) if min > max || (*log && *min <= 0.0) => {
                    return Err(format!(
                        "parameters.{key} runs from {min} to {max}; expected min up to max, and \
                         above 0 with log"
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Steps of every rung; the run's own in the last one.
    pub(super) fn rungs(&self, max_steps: Option<usize>) -> Result<Vec<Option<usize>>> {
        let Some(Halving { min_steps, eta }) = self.halving else { return Ok(vec![None]) };
        let full = max_steps.filter(|&full| full >= min_steps).ok_or_else(|| Error::Config {
            file: self.run.display().to_string(),
            message: format!(
                "successive halving goes from {min_steps} steps up to train.max_steps, which is \
                 {max_steps:?}; give it"
            ),
        })?;
        let grown = std::iter::successors(Some(min_steps), |steps| steps.checked_mul(eta));
        let mut rungs: Vec<Option<usize>> = grown.take_while(|&s| s < full).map(Some).collect();
        rungs.push(Some(full));
        Ok(rungs)
    }

    pub(super) fn eta(&self) -> usize {
        self.halving.map_or(2, |halving| halving.eta)
    }

    /// Trials at a time and threads of each.
    pub(super) fn workers(&self) -> (usize, usize) {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = self.workers.unwrap_or(cores);
        (workers, (cores / workers).max(1))
    }

    /// Values of every candidate, in the order of the keys.
    fn choices(&self) -> Vec<Vec<Value>> {
        if self.search == Search::Grid {
            let mut all = vec![Vec::new()];
            for values in self.parameters.values() {
                let Values::List(list) = values else { continue };
                let with = |before: &Vec<Value>| {
                    let each =
                        list.iter().map(|v| before.iter().cloned().chain([v.clone()]).collect());
                    each.collect::<Vec<Vec<Value>>>()
                };
                all = all.iter().flat_map(with).collect();
            }
            return all;
        }
        let mut drawn: Vec<Vec<Value>> = Vec::new();
        let wanted = self.trials.unwrap_or(1);
        // A small space is soon exhausted; more draws than this find nothing new.
        for draw in 0..100 * wanted as u64 {
            let mut rng = stream(self.seed, Purpose::Sweep, draw, 0);
            let mut one = |values: &Values| match values {
                Values::List(list) => list[rng.random_range(0..list.len())].clone(),
                Values::Range(Range { min, max, log }) => {
                    let at: f64 = rng.random();
                    let x = if *log { min * (max / min).powf(at) } else { min + (max - min) * at };
                    // Three digits are enough to tell and to repeat.
                    Value::from(format!("{x:.2e}").parse::<f64>().unwrap_or(x))
                }
            };
            let values: Vec<Value> = self.parameters.values().map(&mut one).collect();
            if !drawn.contains(&values) {
                drawn.push(values);
            }
            if drawn.len() == wanted {
                break;
            }
        }
        drawn
    }
}

/// All candidates, with their configurations checked.
pub(super) fn candidates(
    config: &SweepConfig,
    base: &RunConfig,
    name: &str,
) -> Result<Vec<Candidate>> {
    let wrong = |message: String| Error::Config { file: name.to_owned(), message };
    let base = serde_json::to_value(base)
        .map_err(|e| wrong(format!("the run's configuration cannot be varied: {e}")))?;
    let keys: Vec<&str> = config.parameters.keys().map(String::as_str).collect();
    let candidate = |values: Vec<Value>| {
        let mut json = base.clone();
        for (key, value) in keys.iter().zip(&values) {
            put(&mut json, key, value.clone())
                .map_err(|e| wrong(format!("parameters.{key}: {e}")))?;
        }
        let pairs = keys.iter().zip(&values);
        let text: Vec<String> = pairs.map(|(k, v)| format!("{}={v}", short(k))).collect();
        let text = text.join(" ");
        let yaml = serde_saphyr::to_string(&json)
            .map_err(|e| wrong(format!("{text} cannot be written as YAML: {e}")))?;
        let config = RunConfig::parse(&yaml, &format!("{name}: {text}"))?;
        Ok(Candidate { name: text, config, parameters: 0 })
    };
    config.choices().into_iter().map(candidate).collect()
}

/// The part of a key that tells it apart for a reader.
fn short(key: &str) -> &str {
    key.strip_prefix("train.").or_else(|| key.strip_prefix("adapter.")).unwrap_or(key)
}

/// Sets `key`, a path of names and numbers, in `json`.
fn put(json: &mut Value, key: &str, value: Value) -> std::result::Result<(), String> {
    let mut at = json;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        let missing = || format!("there is no `{part}` in the run's configuration");
        let next = match at {
            // The last name may be one that the run leaves to its default.
            Value::Object(map) if parts.peek().is_none() => {
                map.insert(part.to_owned(), value);
                return Ok(());
            }
            Value::Object(map) => map.get_mut(part),
            Value::Array(list) => part.parse::<usize>().ok().and_then(|i| list.get_mut(i)),
            _ => None,
        };
        at = next.ok_or_else(missing)?;
    }
    *at = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sweep(text: &str) -> std::result::Result<SweepConfig, String> {
        let config: SweepConfig = from_yaml(text, "sweep").map_err(|e| e.to_string())?;
        config.validate().map(|()| config)
    }

    #[test]
    fn a_grid_is_every_value_with_every_other() {
        let config =
            sweep("run: r\noutput_dir: o\nparameters: {a: [1, 2], b: [x, y, z]}\n").unwrap();
        let all = config.choices();
        assert_eq!(all.len(), 6);
        assert_eq!((&all[0], &all[5]), (&vec![json!(1), json!("x")], &vec![json!(2), json!("z")]));
    }

    #[test]
    fn draws_are_the_same_again_and_no_two_alike() {
        let text = "run: r\noutput_dir: o\nsearch: random\ntrials: 12\nparameters: {a: [1, 2, 3, 4], \
                    b: {min: 1.0e-5, max: 1.0e-2, log: true}, c: {min: 2, max: 3}}\n";
        let config = sweep(text).unwrap();
        let all = config.choices();
        assert_eq!((all.len(), &all), (12, &config.choices()));
        let spread = all.iter().filter(|v| v[1].as_f64().unwrap() < 3e-4).count();
        assert!((3..=9).contains(&spread), "evenly in the logarithm: {spread}");
        assert!(all.iter().all(|v| (2.0..=3.0).contains(&v[2].as_f64().unwrap())));
        let few =
            sweep("run: r\noutput_dir: o\nsearch: random\ntrials: 9\nparameters: {a: [1, 2]}\n");
        assert_eq!(few.unwrap().choices().len(), 2);
    }

    #[test]
    fn rungs_grow_to_the_runs_own_steps() {
        let text = "run: r\noutput_dir: o\nsearch: halving\ntrials: 9\nhalving: {min_steps: 10}\n\
                    parameters: {a: [1, 2]}\n";
        let config = sweep(text).unwrap();
        assert_eq!(config.rungs(Some(100)).unwrap(), [Some(10), Some(30), Some(90), Some(100)]);
        assert!(config.rungs(None).unwrap_err().to_string().contains("train.max_steps"));
    }

    #[test]
    fn faults_are_named() {
        let rest = "run: r\noutput_dir: o\n";
        for (text, wanted) in [
            ("parameters: {}", "parameters is empty"),
            ("parameters: {a: []}", "parameters.a is empty"),
            ("parameters: {a: {min: 1, max: 2}}", "is a range"),
            ("parameters: {a: [1]}\ntrials: 3", "trials counts the draws"),
            ("parameters: {a: [1]}\nsearch: random", "trials counts the draws"),
            ("parameters: {a: [1]}\nsearch: halving\ntrials: 2", "halving: {min_steps: N}"),
            ("parameters: {a: [1]}\nseeds: []", "seeds is empty"),
            ("parameters: {a: [1]}\nworkers: 0", "workers is 0"),
            ("parameters: {a: [1]}\nbudget: {parameters: 0}", "budget needs"),
            ("parameters: {a: [1]}\nserch: grid", "did you mean `search`"),
        ] {
            let error = sweep(&format!("{rest}{text}\n")).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn keys_are_found_in_maps_and_lists() {
        let mut json = json!({"adapter": {"layers": [{"rank": 1}, {"rank": 2}]}, "train": {}});
        put(&mut json, "adapter.layers.1.rank", json!(7)).unwrap();
        put(&mut json, "train.seed", json!(3)).unwrap();
        assert_eq!(json["adapter"]["layers"], json!([{"rank": 1}, {"rank": 7}]));
        assert_eq!(json["train"]["seed"], 3);
        assert!(put(&mut json, "adapter.layers.5.rank", json!(7)).unwrap_err().contains("no `5`"));
        assert!(put(&mut json, "trian.seed", json!(7)).unwrap_err().contains("no `trian`"));
    }

    #[test]
    fn a_budget_is_a_cap_or_a_band() {
        let cap = Budget { parameters: 1000, tolerance: None };
        let band = Budget { tolerance: Some(0.02), ..cap };
        assert!(cap.refuses(1000).is_none() && cap.refuses(5).is_none());
        assert_eq!(cap.refuses(1100).unwrap(), "1100 parameters, +10.0%");
        assert!(band.refuses(985).is_none() && band.refuses(5).is_some());
    }
}
