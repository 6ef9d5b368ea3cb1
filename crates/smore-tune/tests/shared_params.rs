//! The authors' own counts for real model shapes. The material lies outside the repository, in the
//! folder that `SMORE_SHARED` names or beside the checkout; without it there is nothing to check.

use serde_json::{Map, Value, json};
use smore::config::SmoreConfig;
use smore::counting::{AuthorStats, Parameters, lora_parameters, lora_rank_for, smore_parameters};
use smore::layout::SmoreLayout;
use smore::spec::{LoraSpec, SmoreSpec};
use std::path::{Path, PathBuf};

fn recorded() -> Option<Map<String, Value>> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let folder = std::env::var_os("SMORE_SHARED").map_or_else(beside, PathBuf::from);
    let text = std::fs::read_to_string(folder.join("fixtures/params/params.json")).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

/// Our config for a recorded one.
fn config(recorded: &Value) -> SmoreConfig {
    let list = |key: &str| recorded[key].as_array().unwrap().iter();
    let layers: Vec<Value> = list("s")
        .zip(list("f"))
        .zip(list("r"))
        .map(|((s, f), r)| json!({"experts": s, "fanout": f, "rank": r}))
        .collect();
    let text = |key: &str, default: &str| recorded[key].as_str().unwrap_or(default).to_owned();
    let config = json!({
        "layers": layers,
        "shared_pool": recorded["shared"].as_bool().unwrap_or(false),
        "activation": text("act", "tanh"),
        "gate": {
            "kind": text("g", ""),
            "architecture": text("arch", "mlp"),
            "router_width": recorded["gate_dims"],
            "router_input_width": recorded["dim_downproj_x"],
        },
    });
    serde_json::from_value(config).unwrap()
}

/// The specs of up (or gate) and down, and the number of blocks.
fn maps(case: &Value) -> (SmoreConfig, SmoreSpec, SmoreSpec, usize) {
    let size = |key: &str| case[key].as_u64().unwrap() as usize;
    let (hidden, ffn) = (size("hidden"), size("ffn"));
    let config = config(&case["config"]);
    let up = SmoreSpec::new(&config, hidden, ffn).unwrap();
    let down = SmoreSpec::new(&config, ffn, hidden).unwrap();
    (config, up, down, size("layers"))
}

fn cases() -> Vec<(String, Value)> {
    let Some(models) = recorded() else { return vec![] };
    let cases: Vec<_> = models
        .into_iter()
        .flat_map(|(model, cases)| {
            let Value::Object(cases) = cases else { panic!("{model}: expected cases") };
            cases.into_iter().map(move |(name, case)| (format!("{model}, {name}"), case))
        })
        .collect();
    assert!(!cases.is_empty());
    cases
}

#[test]
fn every_recorded_count_is_reproduced() {
    for (label, case) in cases() {
        let (config, up, down, blocks) = maps(&case);
        let fanouts: Vec<_> = config.layers.iter().map(|l| l.fanout).collect();
        let [up, down] = [up, down].map(|spec| AuthorStats::of(&spec, &fanouts));
        let total = [up * 2, down].into_iter().sum::<AuthorStats>() * blocks;
        for (key, stats) in [
            ("per_up_or_gate_proj", up),
            ("per_down_proj", down),
            ("total_model_up_gate_down", total),
        ] {
            assert_eq!(serde_json::to_value(stats).unwrap(), case[key], "{label}: {key}");
        }
    }
}

#[test]
fn every_recorded_shape_is_laid_out() {
    let cases = cases();
    let mut compared = 0;
    for (label, case) in &cases {
        let Some(recorded) = case["shapes_up"].as_object() else { continue };
        let (_, up, ..) = maps(case);
        let layout = SmoreLayout::new(&up);
        for param in &layout.params {
            assert_eq!(json!(param.shape), recorded[&param.name], "{label}: {}", param.name);
        }
        assert_eq!(recorded.len(), layout.params.len(), "{label}");
        compared += 1;
    }
    assert!(cases.is_empty() || compared > 0);
}

#[test]
fn a_lora_of_equal_size_is_as_near_as_ranks_allow() {
    for (label, case) in cases() {
        let (_, up, down, _) = maps(&case);
        let budget = 2 * smore_parameters(&up) + smore_parameters(&down);
        assert_eq!(budget, 2 * Parameters::of(&up).total() + Parameters::of(&down).total());
        let shapes = [(up.d_in, up.d_out), (up.d_in, up.d_out), (down.d_in, down.d_out)];
        let rank = lora_rank_for(budget, &shapes);
        let lora = |(d_in, d_out)| lora_parameters(&LoraSpec { d_in, d_out, rank, scale: 2.0 });
        let size: usize = shapes.into_iter().map(lora).sum();
        let per_rank = size / rank;
        assert!(size.abs_diff(budget) <= per_rank.div_ceil(2), "{label}: {size} for {budget}");
    }
}
