//! Whether routers stay healthy: thresholds, alarms, and an answer to them.

use super::counts::Counts;
use super::summary::LayerUsage;
use crate::inject::Adapters;
use serde::{Deserialize, Serialize};
use smore::adapter::{AnyAdapter, BlockAdapter};
use std::fmt;

/// The `health:` section of a run's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Steps whose routing is counted and judged together; 0 counts nothing while training.
    pub window_steps: usize,
    /// Windows in a row that must be bad before an alarm is raised.
    pub patience: usize,
    /// Windows of fewer tokens are kept but not judged.
    pub min_tokens: u64,
    /// Alarm above this coefficient of variation of an experts' layer, as a share of its largest:
    /// 0 is even use, 1 always the same experts.
    pub max_imbalance: f64,
    /// An expert with less than this part of an equal share is dead, and an alarm.
    pub min_share: f64,
    /// Answer an alarm by doubling the balance weight of its place, window by window.
    pub raise_balance_weight: bool,
    /// Where the doubling ends.
    pub max_balance_weight: f64,
    /// Write the trees of this many tokens of every window to `routing/traces.jsonl`.
    pub trace_tokens: usize,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            window_steps: 10,
            patience: 4,
            min_tokens: 256,
            max_imbalance: 0.9,
            min_share: 0.01,
            raise_balance_weight: false,
            max_balance_weight: 1.0,
            trace_tokens: 0,
        }
    }
}

impl HealthConfig {
    /// Checks the values; the message names the key.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let share = "a number from 0 to 1";
        let checks = [
            (self.patience > 0, "patience", self.patience as f64, "at least 1"),
            ((0.0..=1.0).contains(&self.max_imbalance), "max_imbalance", self.max_imbalance, share),
            ((0.0..=1.0).contains(&self.min_share), "min_share", self.min_share, share),
            (
                self.max_balance_weight.is_finite() && self.max_balance_weight > 0.0,
                "max_balance_weight",
                self.max_balance_weight,
                "a positive number",
            ),
        ];
        match checks.into_iter().find(|(holds, ..)| !holds) {
            Some((_, key, got, expected)) => {
                Err(format!("health.{key} is {got}; expected {expected}"))
            }
            None => Ok(()),
        }
    }
}

/// What is wrong with a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ailment {
    /// Nearly always the same experts are chosen.
    Collapse,
    /// Experts are hardly ever chosen.
    DeadExperts,
}

impl fmt::Display for Ailment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Collapse => "collapse",
            Self::DeadExperts => "dead experts",
        })
    }
}

/// An alarm: a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alarm {
    /// Last step of the window that was judged.
    pub step: usize,
    /// What is wrong.
    pub alarm: Ailment,
    /// True where it is over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub over: bool,
    /// Module path of the place.
    pub place: String,
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// The imbalance, or the smallest share as a part of an equal one.
    pub value: f64,
    /// The threshold it crossed.
    pub threshold: f64,
    /// The experts that are always chosen, or dead.
    pub experts: Vec<usize>,
    /// The place's balance weight before and after the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_weight: Option<(f64, f64)>,
}

impl Alarm {
    /// What a person can do.
    pub fn remedy(&self) -> &'static str {
        match self.alarm {
            Ailment::Collapse => {
                "raise the adapter's balance_weight, lower train.router_lr_multiplier, take gate \
                 noisy_topk, or let health.raise_balance_weight answer"
            }
            Ailment::DeadExperts => {
                "raise the adapter's balance_weight, take fewer experts, lower \
                 train.router_lr_multiplier, or let health.raise_balance_weight answer"
            }
        }
    }
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { alarm, place, layer, value, threshold, .. } = self;
        if self.over {
            return write!(f, "{alarm} is over in layer {layer} of {place}: {value:.3}");
        }
        let experts: Vec<String> = self.experts.iter().map(usize::to_string).collect();
        let experts = experts.join(", ");
        match alarm {
            Ailment::Collapse => write!(
                f,
                "{alarm} in layer {layer} of {place}: nearly always experts {experts}, imbalance \
                 {value:.3} above {threshold}"
            ),
            Ailment::DeadExperts => write!(
                f,
                "{alarm} in layer {layer} of {place}: experts {experts} below {threshold} of an \
                 equal share"
            ),
        }?;
        match self.balance_weight {
            Some((from, to)) => write!(f, "; balance weight {from} -> {to}"),
            None => Ok(()),
        }
    }
}

/// What must be remembered between windows; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthState {
    watched: Vec<Watched>,
    /// Number of an adapter and the balance weight it was given.
    weights: Vec<(usize, f64)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Watched {
    place: String,
    layer: usize,
    alarm: Ailment,
    /// Bad windows in a row.
    bad: usize,
    raised: bool,
}

/// Where a balance weight of zero begins to be doubled.
const FIRST_WEIGHT: f64 = 0.01;

impl HealthState {
    /// Judges a window; answers by the places' balance weights where the configuration says so.
    pub fn judge(
        &mut self,
        config: &HealthConfig,
        step: usize,
        window: &Counts,
        adapters: &mut Adapters,
    ) -> Vec<Alarm> {
        if window.tokens() < config.min_tokens {
            return Vec::new();
        }
        let mut alarms = Vec::new();
        let mut answered = Vec::new();
        let numbers = window.routed().flat_map(|(i, place)| place.layers.iter().map(move |_| i));
        for (number, usage) in numbers.zip(window.usage()) {
            for (alarm, bad, value, threshold, experts) in findings(config, &usage) {
                let Some(turned) = self.turned(config, &usage, alarm, bad) else { continue };
                let weight = (config.raise_balance_weight && bad)
                    .then(|| self.raise(config, number, adapters, &mut answered))
                    .flatten();
                if turned || weight.is_some() {
                    let (place, layer) = (usage.path.clone(), usage.layer);
                    let (over, balance_weight) = (!bad, weight);
                    alarms.push(Alarm {
                        step,
                        alarm,
                        over,
                        place,
                        layer,
                        value,
                        threshold,
                        experts,
                        balance_weight,
                    });
                }
            }
        }
        alarms
    }

    /// Whether an alarm begins or ends (true) or goes on (false); none where there is none.
    fn turned(
        &mut self,
        config: &HealthConfig,
        usage: &LayerUsage,
        alarm: Ailment,
        bad: bool,
    ) -> Option<bool> {
        let same = |w: &Watched| (&w.place, w.layer, w.alarm) == (&usage.path, usage.layer, alarm);
        let at = self.watched.iter().position(same);
        if !bad {
            return at.and_then(|at| self.watched.swap_remove(at).raised.then_some(true));
        }
        let at = at.unwrap_or_else(|| {
            let (place, layer) = (usage.path.clone(), usage.layer);
            self.watched.push(Watched { place, layer, alarm, bad: 0, raised: false });
            self.watched.len() - 1
        });
        let watched = &mut self.watched[at];
        watched.bad += 1;
        if watched.bad < config.patience {
            return None;
        }
        Some(!std::mem::replace(&mut watched.raised, true))
    }

    /// Doubles the balance weight of an adapter, once a window.
    fn raise(
        &mut self,
        config: &HealthConfig,
        number: usize,
        adapters: &mut Adapters,
        answered: &mut Vec<usize>,
    ) -> Option<(f64, f64)> {
        let weight = balance_weight(adapters, number)?;
        let before = *weight;
        if answered.contains(&number) || before >= config.max_balance_weight {
            return None;
        }
        answered.push(number);
        *weight = (before * 2.0).max(FIRST_WEIGHT).min(config.max_balance_weight);
        let after = *weight;
        self.weights.retain(|(other, _)| *other != number);
        self.weights.push((number, after));
        Some((before, after))
    }

    /// Gives adapters the balance weights that alarms have given them.
    pub fn restore(&self, adapters: &mut Adapters) {
        for &(number, weight) in &self.weights {
            if let Some(own) = balance_weight(adapters, number) {
                *own = weight;
            }
        }
    }
}

/// Every ailment of a layer: whether it has it, its value and threshold, and the experts.
fn findings(
    config: &HealthConfig,
    usage: &LayerUsage,
) -> [(Ailment, bool, f64, f64, Vec<usize>); 2] {
    let experts = usage.share.len();
    let equal = 1.0 / experts as f64;
    let often = (0..experts).filter(|&e| usage.share[e] > equal).collect();
    let least = usage.share.iter().copied().fold(1.0, f64::min) / equal;
    let (imbalance, dead) = (usage.imbalance(), usage.below(config.min_share));
    [
        (
            Ailment::Collapse,
            imbalance > config.max_imbalance,
            imbalance,
            config.max_imbalance,
            often,
        ),
        (Ailment::DeadExperts, !dead.is_empty(), least, config.min_share, dead),
    ]
}

/// The balance weight of an adapter; none of one whose router has no balance loss.
fn balance_weight(adapters: &mut Adapters, number: usize) -> Option<&mut f64> {
    match &mut adapters.slots.get_mut(number)?.adapter {
        BlockAdapter::Map(AnyAdapter::Smore(a)) => Some(&mut a.spec.gate.balance_weight),
        BlockAdapter::Ffn(a) => Some(&mut a.spec.balance_weight),
        BlockAdapter::Map(_) => None,
    }
}
