//! Alarms about routers, as a user meets them.

mod workplace;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::path::Path;
use workplace::{smore, write_run};

/// The place whose router is spoiled.
const PLACE: &str = "model.layers.2.mlp.up_proj";
const LAYER: usize = 1;

/// A longer run, which `health` watches.
fn steps(steps: usize, seed: u64, health: &str) -> impl Fn(String) -> String {
    let health = health.to_owned();
    move |config| {
        let config = config
            .replace("max_steps: 6", &format!("max_steps: {steps}"))
            .replace("num_train_epochs: 1, ", "")
            .replace(
                "save_steps: 3, eval_steps: 3, seed: 42",
                &format!("save_steps: 0, eval_steps: 0, seed: {seed}"),
            )
            .replace("per_device_train_batch_size: 2", "per_device_train_batch_size: 4")
            .replace("learning_rate: 1.0e-2", "learning_rate: 3.0e-3");
        assert!(config.contains(&format!("seed: {seed}")) && config.contains("3.0e-3"));
        config + &health
    }
}

fn train(folder: &Path, name: &str, change: impl Fn(String) -> String) -> (Value, String) {
    write_run(folder, name, change);
    let run = smore(folder, &["train", "--json", &format!("{name}.yaml")]).assert().success();
    let told = smore(folder, &["train", &format!("{name}.yaml")]).assert().success();
    let told = String::from_utf8(told.get_output().stderr.clone()).unwrap();
    (serde_json::from_slice(&run.get_output().stdout).unwrap(), told)
}

/// A healthy adapter, but that its router at [`PLACE`] prefers experts 0 and 1 for every token, by
/// a factor of e^8, and that its balance weight is 0 now.
fn skewed(folder: &Path) {
    write_run(folder, "fresh", steps(60, 7, ""));
    smore(folder, &["train", "fresh.yaml"]).assert().success();
    let settings = folder.join("fresh/adapter/adapter_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&settings).unwrap()).unwrap();
    assert_eq!(json["balance_loss_weight"], 0.01);
    json["balance_loss_weight"] = 0.0.into();
    std::fs::write(&settings, json.to_string()).unwrap();
    let file = folder.join("fresh/adapter/adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let prefix = format!("base_model.model.{PLACE}.moe_gate.{LAYER}");
    let spoiled: Vec<(String, Vec<u8>)> = all
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let spoil = |value: &dyn Fn(usize) -> f32| -> Vec<u8> {
                (0..tensor.data().len() / 4).flat_map(|i| value(i).to_le_bytes()).collect()
            };
            let data = match name.strip_prefix(&prefix) {
                Some(".mlp.2.weight") => spoil(&|_| 0.0),
                Some(".mlp.2.bias") => spoil(&|_| 1.0),
                Some(".keys") => spoil(&|i| if i / 8 < 2 { 0.5 } else { -0.5 }),
                _ => tensor.data().to_vec(),
            };
            (name, data)
        })
        .collect();
    let views = spoiled.iter().map(|(name, data)| {
        let like = all.tensor(name).unwrap();
        (name, TensorView::new(like.dtype(), like.shape().to_vec(), data).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(&file, bytes).unwrap();
}

fn on_skewed(change: impl Fn(String) -> String) -> impl Fn(String) -> String {
    let section = workplace::adapter("{kind: saved, path: fresh/adapter}");
    move |config| section(change(config))
}

fn alarms(outcome: &Value) -> Vec<&Value> {
    outcome["alarms"].as_array().unwrap().iter().collect()
}

#[test]
fn a_collapsed_router_is_named_within_50_steps_and_the_answer_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    skewed(folder);
    let (outcome, told) = train(folder, "left", on_skewed(steps(50, 42, "")));
    let alarms_left = alarms(&outcome);
    let collapse: Vec<_> = alarms_left.iter().filter(|a| a["alarm"] == "collapse").collect();
    assert_eq!(collapse.len(), 1, "{alarms_left:?}");
    assert_eq!((&collapse[0]["place"], &collapse[0]["layer"]), (&PLACE.into(), &LAYER.into()));
    assert_eq!(collapse[0]["experts"], serde_json::json!([0, 1]));
    assert!(collapse[0]["step"].as_u64().unwrap() <= 50);
    assert!(alarms_left.iter().all(|a| a["place"] == PLACE), "{alarms_left:?}");
    let line = told.lines().find(|l| l.contains("alarm: collapse")).unwrap();
    assert!(line.contains(PLACE) && line.contains("layer 1"), "{line}");
    assert!(line.contains("raise the adapter's balance_weight"), "{line}");

    let answer = "health: {raise_balance_weight: true, max_balance_weight: 0.5}\n";
    let (outcome, _) = train(folder, "answered", on_skewed(steps(200, 42, answer)));
    let all = alarms(&outcome);
    let of = |kind: &str| all.iter().filter(|a| a["alarm"] == kind).copied().collect::<Vec<_>>();
    let last = *of("collapse").last().unwrap();
    assert_eq!(last["over"], true, "{all:?}");
    let raised: Vec<f64> = all.iter().filter_map(|a| a["balance_weight"][1].as_f64()).collect();
    assert!(!raised.is_empty() && raised.iter().all(|&w| w <= 0.5), "{raised:?}");
    assert_eq!(raised[0], 0.01);
    let text = std::fs::read_to_string(folder.join("answered/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let end = lines.iter().rev().find_map(|l| l["imbalance"].as_f64()).unwrap();
    assert!(end < 0.9, "imbalance {end} at the end");
}

#[test]
fn five_healthy_runs_raise_no_alarm_and_thresholds_decide() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    for seed in 1..=5 {
        let (outcome, told) = train(folder, "healthy", steps(100, seed, ""));
        assert!(alarms(&outcome).is_empty(), "seed {seed}: {:?}", alarms(&outcome));
        assert!(!told.contains("alarm"), "{told}");
    }
    let count = |health: &str| {
        let (outcome, _) = train(folder, "watched", steps(40, 1, health));
        alarms(&outcome).len()
    };
    assert!(count("health: {max_imbalance: 0.01}\n") > 0);
    assert!(count("health: {min_share: 1.0}\n") > 0);
    assert!(count("health: {max_imbalance: 0.01, patience: 5}\n") == 0);
    assert!(count("health: {max_imbalance: 0.01, window_steps: 5, patience: 8}\n") > 0);
    assert!(count("health: {max_imbalance: 0.01, min_tokens: 1000000}\n") == 0);
    assert!(count("health: {max_imbalance: 0.01, window_steps: 0}\n") == 0);
    let said = |health: &str| {
        write_run(folder, "wrong", |c| c + health);
        workplace::refused(folder, &["train", "wrong.yaml"])
    };
    assert!(said("health: {patience: 0}\n").contains("health.patience is 0"));
    assert!(said("health: {max_imbalance: 2}\n").contains("health.max_imbalance is 2"));
    assert!(said("health: {max_balance_weight: 0}\n").contains("health.max_balance_weight is 0"));
    assert!(said("health: {patiense: 1}\n").contains("did you mean `patience`"));
}

#[test]
fn traces_of_some_tokens_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "run", steps(20, 1, "health: {trace_tokens: 3}\n"));
    let text = std::fs::read_to_string(folder.join("run/routing/traces.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    // Two windows, twelve places, three tokens.
    assert_eq!(lines.len(), 2 * 12 * 3);
    let nodes: Vec<usize> = lines[0]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["experts"].as_array().unwrap().len())
        .collect();
    assert_eq!(nodes, [4, 2]);
}
