//! Starting values against a restatement of their table, and against the authors' own where the
//! fixtures lie beside the repository.

use safetensors::SafeTensors;
use serde_json::Value;
use smore::adapter::Smore;
use smore::config::SmoreConfig;
use smore::init;
use smore::layout::Param;
use smore::rng::{Purpose, stream};
use smore::spec::SmoreSpec;
use std::path::PathBuf;

const D_IN: usize = 48;
const D_OUT: usize = 36;
const VIEW: usize = 20;
const NETWORK: usize = 12;
const METHODS: [&str; 5] = ["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"];

/// What a parameter should hold at the start.
#[derive(Clone, Copy, Debug)]
enum Start {
    Zero,
    /// Uniform in +-1/sqrt(fan-in).
    Uniform(usize),
    /// U(0, 1)
    Unit,
    /// N(0, 0.02)
    Normal,
    /// All elements the same.
    Constant(f32),
    /// Expert i of the given rank holds an identity in rows i r .. (i + 1) r.
    UpIdentity,
    /// The last rows, as many as there are columns, are the identity.
    LastIdentity,
}

impl Start {
    fn check(self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        match self {
            Self::Zero => assert!(values.iter().all(|&v| v == 0.0), "{name} is not zero"),
            Self::Constant(c) => assert!(values.iter().all(|&v| v == c), "{name} is not {c}"),
            Self::Uniform(fan_in) => {
                let bound = 1.0 / (fan_in as f64).sqrt();
                let scaled: Vec<f64> = values.iter().map(|&v| f64::from(v) / bound).collect();
                uniform(name, &scaled);
            }
            Self::Unit => {
                assert!(values.iter().all(|v| (0.0..1.0).contains(v)), "{name} leaves [0, 1)");
                let scaled: Vec<f64> = values.iter().map(|&v| 2.0 * f64::from(v) - 1.0).collect();
                uniform(name, &scaled);
            }
            Self::Normal => {
                let scaled: Vec<f64> = values.iter().map(|&v| f64::from(v) / 0.02).collect();
                // Mean, variance and its own variance (2) of N(0, 1), to six deviations.
                near(name, scaled.iter().copied(), 0.0, 1.0);
                near(name, scaled.iter().map(|v| v * v), 1.0, 2.0);
                assert!(scaled.iter().all(|v| v.abs() < 7.0), "{name} has an outlier");
            }
            Self::UpIdentity => {
                let [_, rows, rank] = shape else { panic!("{name} has the shape {shape:?}") };
                for (i, &v) in values.iter().enumerate() {
                    let (expert, row, column) = (i / rank / rows, i / rank % rows, i % rank);
                    let want = if row == expert * rank + column { 1.0 } else { 0.0 };
                    assert_eq!(v, want, "{name} of expert {expert} at {row}, {column}");
                }
            }
            Self::LastIdentity => {
                let [rows, columns] = shape else { panic!("{name} has the shape {shape:?}") };
                for (i, &v) in values.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let want = if row + columns == rows + column { 1.0 } else { 0.0 };
                    assert_eq!(v, want, "{name} at {row}, {column}");
                }
            }
        }
    }
}

/// The mean of `values` lies within six of its deviations.
fn near(name: &str, values: impl ExactSizeIterator<Item = f64>, mean: f64, variance: f64) {
    let n = values.len() as f64;
    let found = values.sum::<f64>() / n;
    assert!(
        (found - mean).abs() <= 6.0 * (variance / n).sqrt(),
        "{name}: {found} instead of {mean}"
    );
}

/// `values` look like U(-1, 1): within the bound, close to it, and with its first moments.
fn uniform(name: &str, values: &[f64]) {
    let largest = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    assert!(largest <= 1.0 + 1e-6, "{name} leaves its bound by a factor {largest}");
    // Missed once in e^20.
    let expected = 1.0 - 20.0 / values.len() as f64;
    assert!(largest >= expected, "{name} reaches only {largest} of its bound");
    near(name, values.iter().copied(), 0.0, 1.0 / 3.0);
    near(name, values.iter().map(|v| v * v), 1.0 / 3.0, 4.0 / 45.0);
    if values.len() > 1 {
        assert!(values.iter().any(|&v| v != values[0]), "{name} is constant");
    }
}

/// One adapter of the table, as its parts.
struct Case {
    ranks: &'static [usize],
    experts: &'static [usize],
    shared: bool,
    architecture: &'static str,
    gate: &'static str,
    activation: &'static str,
    method: &'static str,
}

impl Case {
    fn adapter(&self) -> Smore {
        let layer = |(s, r): (&usize, &usize)| serde_json::json!({"experts": s, "fanout": s - 1, "rank": r, "lora_alpha": 8.0});
        let layers: Vec<Value> = self.experts.iter().zip(self.ranks).map(layer).collect();
        let config = serde_json::json!({
            "layers": layers,
            "gate": {"kind": self.gate, "architecture": self.architecture,
                "router_width": NETWORK, "router_input_width": VIEW,
                "activation": self.activation},
            "activation": self.activation,
            "shared_pool": self.shared,
            "init": self.method,
        });
        let config: SmoreConfig = serde_json::from_value(config).unwrap();
        Smore::new(SmoreSpec::new(&config, D_IN, D_OUT).unwrap())
    }

    /// d_l: what comes into layer l from below.
    fn width_below(&self, l: usize) -> usize {
        let own = |l: usize| self.experts[l] * self.ranks[l];
        if self.shared { own(0) } else { (0..l).map(own).sum() }
    }

    fn router_input(&self, l: usize) -> usize {
        VIEW + (self.ranks.len() - 1 - l) * NETWORK
    }

    /// The table of spec section 4.
    fn start(&self, name: &str) -> Start {
        let mut parts = name.splitn(3, '.');
        let kind = parts.next().unwrap();
        let l = parts.next().and_then(|l| l.parse().ok()).unwrap_or(usize::MAX);
        let rest = parts.next().unwrap_or_default();
        let slope = || self.activation.strip_prefix("prelu|").unwrap().parse().unwrap();
        let identity = self.method == "eq_1_layer";
        match (kind, rest) {
            ("moe_A" | "moe_downproj_x", _) => Start::Uniform(D_IN),
            ("moe_B", _) if identity => Start::UpIdentity,
            ("moe_W", _) if identity => Start::LastIdentity,
            ("moe_B", _) if ["b_zero", "bw_zero"].contains(&self.method) => Start::Zero,
            ("moe_W", _) if self.method == "bw_zero" => Start::Zero,
            ("moe_W_final", _) if identity || self.method == "w_final_zero" => Start::Zero,
            ("moe_B", _) => Start::Uniform(self.ranks[l]),
            ("moe_W", _) => Start::Uniform(self.width_below(l)),
            ("moe_W_final", _) => Start::Uniform(self.width_below(self.ranks.len())),
            ("moe_A_bias" | "moe_B_bias" | "moe_W_bias" | "moe_W_final_bias", _)
            | ("moe_gate", "weight_noise.weight") => Start::Zero,
            ("moe_expert_act_param", _) | ("moe_gate", "mlp.1.weight") => Start::Constant(slope()),
            ("moe_gate", "keys") if self.architecture == "linear" => Start::Normal,
            ("moe_gate", "keys") => Start::Unit,
            ("moe_gate", "mlp.0.weight" | "mlp.0.bias") => Start::Uniform(self.router_input(l)),
            ("moe_gate", "mlp.2.weight" | "mlp.2.bias") => Start::Uniform(NETWORK),
            _ => panic!("what is {name}?"),
        }
    }

    fn check(&self, seed: u64) {
        let smore = self.adapter();
        let values = start(&smore, seed);
        let mut seen = 0;
        for param in &smore.layout.params {
            let name = format!("{} ({}, seed {seed})", param.name, self.method);
            assert_eq!(param.offset, seen, "{name}");
            self.start(&param.name).check(&name, &param.shape, &values[param.range()]);
            seen += param.len();
        }
        assert_eq!(values.len(), seen);
    }
}

fn start(smore: &Smore, seed: u64) -> Vec<f32> {
    init::smore(&smore.spec, &smore.layout, &mut stream(seed, Purpose::AdapterInit, 0, 0))
}

const POOLS: [(&[usize], &[usize], bool); 5] = [
    (&[5], &[4], false),
    (&[3, 6], &[5, 4], false),
    (&[2, 3, 4], &[4, 3, 2], false),
    (&[5], &[4], true),
    (&[4, 4, 4], &[3, 3, 3], true),
];

#[test]
fn follows_its_table() {
    for (seed, method) in METHODS.into_iter().enumerate() {
        for (ranks, experts, shared) in POOLS {
            for (architecture, gate, activation) in [
                ("mlp", "switch", "tanh"),
                ("mlp", "noisy_topk", "prelu|0.125"),
                ("mlp", "switch", "prelu|-0.5"),
                ("linear", "switch", "relu"),
                ("linear", "dense", "identity"),
            ] {
                let case = Case { ranks, experts, shared, architecture, gate, activation, method };
                case.check(seed as u64 + 1);
            }
        }
    }
}

#[test]
fn depends_on_its_seed_alone() {
    let case = Case {
        ranks: &[3, 6],
        experts: &[5, 4],
        shared: false,
        architecture: "mlp",
        gate: "noisy_topk",
        activation: "prelu|0.125",
        method: "normal",
    };
    let smore = case.adapter();
    assert_eq!(start(&smore, 1), start(&smore, 1));
    assert_ne!(start(&smore, 1), start(&smore, 2));
}

/// The authors' starting values, if their fixtures are here.
fn fixtures() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let root = std::env::var_os("SMORE_SHARED").map_or_else(beside, PathBuf::from);
    Some(root.join("fixtures/init")).filter(|path| path.join("facts.json").exists())
}

/// Our adapter for one of the authors' configs.
fn authors_adapter(config: &Value, method: &str) -> Smore {
    let (s, f, r) = (&config["s"], &config["f"], &config["r"]);
    let layers: Vec<Value> = (0..s.as_array().unwrap().len())
        .map(|l| serde_json::json!({"experts": s[l], "fanout": f[l], "rank": r[l]}))
        .collect();
    let config = serde_json::json!({
        "layers": layers,
        "gate": {"kind": config["gate_type"], "architecture": config["gate_arch"],
            "router_width": config["d_g"][0], "router_input_width": config["dim_downproj_x"],
            "activation": config["gate_act_fn"]},
        "activation": config["expert_act_fn"],
        "activation_position": config["activation_position"],
        "shared_pool": config["is_shared_expert_pool"],
        "init": method,
    });
    let config: SmoreConfig = serde_json::from_value(config).unwrap();
    Smore::new(SmoreSpec::new(&config, 256, 384).unwrap())
}

/// Our values of one parameter against what is known of the authors'.
fn check_fact(name: &str, fact: &Value, pattern: Option<Vec<f32>>, param: &Param, ours: &[f32]) {
    let shape: Vec<usize> = serde_json::from_value(fact["shape"].clone()).unwrap();
    assert_eq!(shape, param.shape, "{name}");
    assert_eq!(fact["all_zero"] == true, ours.iter().all(|&v| v == 0.0), "{name}");
    let dist = fact["dist"].as_str().unwrap();
    let start = match dist {
        "zeros" => Start::Zero,
        "uniform(0,1)" => Start::Unit,
        "normal(0,0.02)" => Start::Normal,
        "constant pattern (deterministic)" => {
            if let Some(pattern) = pattern {
                assert!(pattern == ours, "{name} is not the authors' pattern");
                return;
            }
            assert_eq!(fact["min"], fact["max"], "{name} has no pattern");
            Start::Constant(fact["min"].as_f64().unwrap() as f32)
        }
        _ if dist.starts_with("uniform(-b,b)") => {
            let fan_in = fact["fan_in"].as_u64().unwrap();
            let bound = fact["bound"].as_f64().unwrap();
            assert!((bound * (fan_in as f64).sqrt() - 1.0).abs() < 1e-12, "{name}");
            Start::Uniform(usize::try_from(fan_in).unwrap())
        }
        _ => panic!("{name} is distributed as {dist}"),
    };
    start.check(name, &shape, ours);
}

#[test]
fn agrees_with_the_authors() {
    let Some(path) = fixtures() else { return };
    let facts = std::fs::read_to_string(path.join("facts.json")).unwrap();
    let facts: Value = serde_json::from_str(&facts).unwrap();
    let bytes = std::fs::read(path.join("patterns.safetensors")).unwrap();
    let patterns = SafeTensors::deserialize(&bytes).unwrap();
    let mut matched = 0;
    for (case, facts) in facts.as_object().unwrap() {
        let Some(methods) = facts["methods"].as_object() else { continue };
        for (method, facts_of) in methods {
            let smore = authors_adapter(&facts["config"], method);
            let values = start(&smore, 1);
            let facts_of = facts_of["params"].as_object().unwrap();
            assert_eq!(facts_of.len(), smore.layout.params.len(), "{case} {method}");
            for param in &smore.layout.params {
                let fact = &facts_of[&param.name];
                let pattern = patterns
                    .tensor(&format!("{case}.{}", param.name))
                    .ok()
                    .filter(|_| method == "eq_1_layer")
                    .map(|t| {
                        t.data()
                            .chunks_exact(4)
                            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                            .collect::<Vec<f32>>()
                    });
                matched += usize::from(pattern.is_some());
                let name = format!("{case} {method} {}", param.name);
                check_fact(&name, fact, pattern, param, &values[param.range()]);
            }
        }
    }
    assert_eq!(matched, patterns.len());
}
