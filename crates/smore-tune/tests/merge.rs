//! A merged model is base and LoRA in one, in the base's own files.

mod adapted;

use adapted::adapter;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use smore_tune::grow::Difference;
use smore_tune::merge::merge;
use smore_tune::model::Batch;
use smore_tune::model::family::Family;
use smore_tune::model::folder::ModelFolder;
use std::path::{Path, PathBuf};

fn base(family: Family) -> PathBuf {
    adapted::base(family.name())
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    let ids: Vec<u32> = (0..50).map(|i| (i * 31 + 5) % 96).collect();
    batch.push(&ids, &[true; 50]);
    batch
}

const LORA: &str = r#"{"kind": "lora", "rank": 3, "rslora": true, "rank_pattern": {"q_proj": 5},
    "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}"#;

fn merged(family: Family, out: &Path, dtype: Option<Dtype>) -> Difference {
    let folder = ModelFolder::open(&base(family)).unwrap();
    let adapter = adapter(&folder, LORA);
    merge(&folder, adapter, out, dtype, &batch()).unwrap()
}

/// Shards, tied heads, biases, post-norms: whatever the family has stays.
#[test]
fn every_family_merges_exactly() {
    let dir = tempfile::tempdir().unwrap();
    for family in Family::ALL {
        let out = dir.path().join(family.name());
        let difference = merged(family, &out, None);
        assert!(difference.largest < 1e-4, "{}: {difference}", family.name());
        assert!((difference.loss_before - difference.loss_after).abs() < 1e-5);
        for entry in std::fs::read_dir(base(family)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name == "config.json" || name.starts_with("model") {
                assert!(out.join(&name).is_file(), "{}: no {name}", family.name());
            }
            if name.ends_with(".safetensors") && name.starts_with("model") {
                check_tensors(&base(family).join(&name), &out.join(&name));
            }
        }
    }
}

/// What is not adapted is the same bit for bit, what is adapted is not.
fn check_tensors(before: &Path, after: &Path) {
    let (before, after) = (std::fs::read(before).unwrap(), std::fs::read(after).unwrap());
    let (before, after) =
        (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&after).unwrap());
    for (name, tensor) in before.tensors() {
        let new = after.tensor(&name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (new.dtype(), new.shape()));
        let adapted = ["q_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight"];
        let changes = adapted.iter().any(|end| name.ends_with(end));
        assert_eq!(tensor.data() != new.data(), changes, "{name}");
    }
    assert_eq!(before.len(), after.len());
}

#[test]
fn storage_types_and_totals_are_noted() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("half");
    let half = merged(Family::Qwen2, &out, Some(Dtype::BF16));
    assert!(half.largest > 1e-3, "16 bits round: {half}");
    let json = |folder: &Path, name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(folder.join(name)).unwrap()).unwrap()
    };
    assert_eq!(json(&out, "config.json")["dtype"], "bfloat16");
    let index = "model.safetensors.index.json";
    let total = |folder: &Path| json(folder, index)["metadata"]["total_size"].as_u64().unwrap();
    assert_eq!(2 * total(&out), total(&base(Family::Qwen2)));
    assert!(ModelFolder::open(&out).is_ok());
    // Back in 32 bits, what the 16 lost stays lost.
    let folder = ModelFolder::open(&out).unwrap();
    let wide = dir.path().join("wide");
    let back = merge(&folder, adapter(&folder, LORA), &wide, Some(Dtype::F32), &batch()).unwrap();
    assert!(back.largest < 1e-4, "{back}");
    assert_eq!(total(&wide), total(&base(Family::Qwen2)));
}

#[test]
fn routed_adapters_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let folder = ModelFolder::open(&base(Family::Llama)).unwrap();
    for section in [
        r#"{"kind": "smore", "layers": [{"experts": 2, "fanout": 1, "rank": 1}]}"#,
        r#"{"kind": "hydra_lora", "heads": 2, "rank": 1}"#,
    ] {
        let out = dir.path().join("out");
        let error = merge(&folder, adapter(&folder, section), &out, None, &batch()).unwrap_err();
        assert!(error.to_string().contains("depends on the token"), "{error}");
        assert_eq!((error.exit_code(), out.exists()), (2, false));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
}
