//! Which S'MoRE a budget allows: layers, experts, fanouts and ranks tried on the model's shapes,
//! and those of them that nothing beats.

use super::{Cost, Pace, Setting};
use crate::config::AdapterConfig;
use crate::model::spec::DecoderSpec;
use serde::Serialize;
use smore::config::{LayerConfig, SmoreConfig};
use smore::spec::SmoreSpec;
use std::str::FromStr;

const DEPTHS: std::ops::RangeInclusive<usize> = 1..=4;
const EXPERTS: [usize; 4] = [2, 4, 8, 16];
const FANOUTS: [usize; 3] = [1, 2, 4];
const RANKS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The most that may be spent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Trained parameters.
    Parameters(f64),
    /// Bytes at the peak of a training step.
    Memory(f64),
    /// Seconds of training on the tokens that are planned for.
    Time(f64),
}

impl FromStr for Budget {
    type Err = String;

    /// A number with K, M or B for parameters, with kB, MB, GB, KiB, MiB or GiB for memory, with s,
    /// min or h for time.
    fn from_str(text: &str) -> Result<Self, String> {
        let at = text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len());
        let (number, unit) = text.split_at(at);
        let wrong = || {
            format!(
                "`{text}` is no budget; expected parameters such as 20M, memory such as 8GiB, or \
                 time such as 30min"
            )
        };
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        if !(number.is_finite() && number > 0.0) {
            return Err(wrong());
        }
        let two = |power| f64::from(2u32.pow(power));
        Ok(match unit {
            "" => Self::Parameters(number),
            "K" | "k" => Self::Parameters(number * 1e3),
            "M" => Self::Parameters(number * 1e6),
            "B" => Self::Parameters(number * 1e9),
            "kB" | "KB" => Self::Memory(number * 1e3),
            "MB" => Self::Memory(number * 1e6),
            "GB" => Self::Memory(number * 1e9),
            "KiB" => Self::Memory(number * two(10)),
            "MiB" => Self::Memory(number * two(20)),
            "GiB" => Self::Memory(number * two(30)),
            "s" => Self::Time(number),
            "min" => Self::Time(number * 60.0),
            "h" => Self::Time(number * 3600.0),
            _ => return Err(wrong()),
        })
    }
}

/// What times are told from: one adapter was measured, and others take longer or shorter by their
/// operations.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Of the adapter that was measured.
    pub pace: Pace,
    /// Floating-point operations of the frozen maps for one token, forward.
    pub frozen_flops: f64,
    /// Those of the adapter that was measured.
    pub adapter_flops: f64,
    /// Tokens that are trained on.
    pub tokens: usize,
    /// Steps of the optimizer over them.
    pub updates: usize,
}

impl Timing {
    /// Seconds where the adapter executes `flops` for one token, forward. A frozen map is
    /// multiplied once each way and an adapter, whose weights have gradients too, half as often
    /// again; both at one speed.
    fn seconds(&self, flops: usize) -> f64 {
        let work = |adapter: f64| 2.0 * self.frozen_flops + 3.0 * adapter;
        let share = work(flops as f64) / work(self.adapter_flops);
        share * self.pace.seconds(self.tokens, self.updates)
    }
}

/// A S'MoRE within the budget.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Its layers, leaves first.
    pub layers: Vec<LayerConfig>,
    /// Trained parameters.
    pub parameters: usize,
    /// Floating-point operations for one token, forward, as executed in training.
    pub flops: usize,
    /// Bytes at the peak of a training step.
    pub memory: u64,
    /// Seconds of training, where that was asked for.
    pub seconds: Option<f64>,
    /// d_L, the dimensions in which its outputs can differ.
    pub width: usize,
    /// Decimal logarithm of the outputs that trees can give one token on one map; none where no
    /// formula is known.
    pub flexibility_log10: Option<f64>,
    /// No other costs at most as much of the budget, has at least its width and flexibility, and
    /// is better in one of them.
    pub on_front: bool,
}

impl Found {
    /// Such as `2 layers: s 4-4, f 2-2, r 16-16`: experts, fanout and rank, leaves first.
    pub fn name(&self) -> String {
        let list = |value: fn(&LayerConfig) -> usize| {
            let values: Vec<String> = self.layers.iter().map(|l| value(l).to_string()).collect();
            values.join("-")
        };
        let depth = self.layers.len();
        format!(
            "{depth} {}: s {}, f {}, r {}",
            if depth == 1 { "layer" } else { "layers" },
            list(|l| l.experts),
            list(|l| l.fanout),
            list(|l| l.rank)
        )
    }

    /// What it takes of a budget.
    pub fn spent(&self, budget: Budget) -> f64 {
        match budget {
            Budget::Parameters(_) => self.parameters as f64,
            Budget::Memory(_) => self.memory as f64,
            Budget::Time(_) => self.seconds.unwrap_or(f64::INFINITY),
        }
    }
}

/// All within `budget`, the cheapest first: `config` with other layers, trained with weights in
/// bf16 where `bf16` and recomputation where `gradient_checkpointing`.
///
/// # Errors
/// A message naming the key that does not fit the model.
pub fn search(
    config: &SmoreConfig,
    spec: &DecoderSpec,
    setting: Setting,
    (bf16, gradient_checkpointing): (bool, bool),
    timing: Option<Timing>,
    budget: Budget,
) -> Result<Vec<Found>, String> {
    let limit = match budget {
        Budget::Parameters(n) | Budget::Memory(n) | Budget::Time(n) => n,
    };
    let mut all = Vec::new();
    let lora_alpha = config.layers.first().and_then(|layer| layer.lora_alpha);
    for layers in candidates(lora_alpha) {
        let own = SmoreConfig { layers: layers.clone(), ..config.clone() };
        let Ok(shape) = SmoreSpec::new(&own, spec.hidden, spec.hidden) else { continue };
        let cost = Cost::of(String::new(), &AdapterConfig::Smore(own), None, spec, setting)?;
        let kind = (bf16, gradient_checkpointing);
        let peak = cost.memory.iter().find(|p| (p.bf16, p.gradient_checkpointing) == kind);
        let found = Found {
            layers,
            parameters: cost.parameters,
            flops: cost.flops.executed,
            memory: peak.map_or(0, |p| p.total),
            seconds: timing.map(|t| t.seconds(cost.flops.executed)),
            width: shape.root_width(),
            flexibility_log10: cost.structure.and_then(|s| s.flexibility_log10),
            on_front: false,
        };
        if found.spent(budget) <= limit {
            all.push(found);
        }
    }
    all.sort_by(|a, b| a.spent(budget).total_cmp(&b.spent(budget)).then(a.flops.cmp(&b.flops)));
    let better = |a: &Found, b: &Found| {
        let (cost, flexibility) =
            ((a.spent(budget), b.spent(budget)), (a.flexibility_log10, b.flexibility_log10));
        let no_worse = cost.0 <= cost.1 && a.width >= b.width && flexibility.0 >= flexibility.1;
        no_worse && (cost.0 < cost.1 || a.width > b.width || flexibility.0 > flexibility.1)
    };
    let front: Vec<bool> = all.iter().map(|b| !all.iter().any(|a| better(a, b))).collect();
    all.iter_mut().zip(front).for_each(|(found, front)| found.on_front = front);
    Ok(all)
}

/// Layers that are alike, in all combinations.
fn candidates(lora_alpha: Option<f64>) -> impl Iterator<Item = Vec<LayerConfig>> {
    let layer = move |experts, fanout, rank| LayerConfig { experts, fanout, rank, lora_alpha };
    let layers = EXPERTS.into_iter().flat_map(move |experts| {
        let fanouts = FANOUTS.into_iter().filter(move |&f| f <= experts);
        fanouts.flat_map(move |f| RANKS.into_iter().map(move |rank| layer(experts, f, rank)))
    });
    layers.flat_map(|layer| DEPTHS.map(move |depth| vec![layer; depth]))
}

#[cfg(test)]
mod tests {
    use super::super::models;
    use super::*;

    const SETTING: Setting = Setting { tokens: 512, keeps_best: false, mixed: false };

    #[test]
    fn budgets_are_read_and_mistakes_told() {
        for (text, want) in [
            ("20M", Budget::Parameters(20e6)),
            ("1500", Budget::Parameters(1500.0)),
            ("8GiB", Budget::Memory(8.0 * 1024.0 * 1024.0 * 1024.0)),
            ("1.5 GB", Budget::Memory(1.5e9)),
            ("90min", Budget::Time(5400.0)),
        ] {
            assert_eq!(text.parse(), Ok(want));
        }
        for text in ["", "M", "20X", "-3M", "0", "1e400M"] {
            assert!(text.parse::<Budget>().unwrap_err().contains("20M"), "{text}");
        }
    }

    /// Everything found stays within the budget, the front is what nothing beats, and all else is
    /// beaten by something on it.
    #[test]
    fn the_front_is_of_those_that_nothing_beats() {
        let spec = models::by_name("qwen2.5-0.5b").unwrap();
        let config = SmoreConfig::new(vec![]);
        let budget = Budget::Parameters(60e6);
        let found = search(&config, &spec, SETTING, (true, false), None, budget).unwrap();
        assert!(found.iter().all(|f| f.parameters <= 60_000_000) && found.len() > 50);
        let key = |f: &Found| (f.parameters, f.width, f.flexibility_log10.unwrap());
        let beats = |a: &Found, b: &Found| {
            let (a, b) = (key(a), key(b));
            a != b && a.0 <= b.0 && a.1 >= b.1 && a.2 >= b.2
        };
        let front: Vec<&Found> = found.iter().filter(|f| f.on_front).collect();
        assert!(front.len() > 3 && front.len() < found.len());
        for f in &found {
            assert_eq!(f.on_front, !front.iter().any(|a| beats(a, f)), "{}", f.name());
        }
        // A smaller budget finds some of the same.
        let less = Budget::Parameters(30e6);
        let fewer = search(&config, &spec, SETTING, (true, false), None, less).unwrap();
        assert!(fewer.len() < found.len());
        assert!(fewer.iter().all(|f| found.iter().any(|g| g.layers == f.layers)));
        let memory = Budget::Memory(fewer[0].memory as f64);
        let cheapest = search(&config, &spec, SETTING, (true, false), None, memory).unwrap();
        assert!(cheapest.iter().all(|f| f.memory <= fewer[0].memory) && !cheapest.is_empty());
    }

    #[test]
    fn time_follows_the_work() {
        let spec = models::by_name("qwen2.5-0.5b").unwrap();
        let config = SmoreConfig::new(vec![]);
        let pace = Pace { seconds_per_token: 0.01, seconds_per_update: 0.1, tokens: 512 };
        let (frozen_flops, adapter_flops) = (1e9, 1e8);
        let timing = Timing { pace, frozen_flops, adapter_flops, tokens: 10_000, updates: 20 };
        let own = timing.seconds(100_000_000);
        assert!((own - 102.0).abs() < 1e-9);
        let budget = Budget::Time(own);
        let found = search(&config, &spec, SETTING, (true, false), Some(timing), budget).unwrap();
        assert!(!found.is_empty() && found.iter().all(|f| f.flops <= 100_000_000));
    }
}
