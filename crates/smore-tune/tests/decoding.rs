//! Token by token an adapter on weights of 16 bits is read in 16 bits: what it gives stays close to the
//! whole sequence's, and follows its parameters.

mod adapted;

use adapted::{adapter, base};
use smore_engine::Cpu;
use smore_tune::checkpoint::LoadedAdapter;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};

const LORA: &str = r#"{"kind": "lora", "rank": 4, "targets": "all-linear"}"#;
// All experts act, so that no rounding changes a tree.
const SMORE: &str = r#"{"kind": "smore", "targets": "all-linear",
    "layers": [{"experts": 3, "fanout": 3, "rank": 2}, {"experts": 2, "fanout": 2, "rank": 2}],
    "gate": {"kind": "dense", "router_width": 8, "router_input_width": 8}}"#;
const BOTTOM_UP: &str = r#"{"kind": "smore", "targets": ["up_proj"],
    "layers": [{"experts": 3, "fanout": 3, "rank": 2}, {"experts": 2, "fanout": 2, "rank": 2}],
    "gate": {"architecture": "bottom_up", "router_width": 8, "router_input_width": 8}}"#;
const HYDRA_LORA: &str = r#"{"kind": "hydra_lora", "heads": 3, "rank": 2}"#;
const MIX_LORA: &str = r#"{"kind": "mix_lora", "experts": 3, "fanout": 3, "rank": 2}"#;

fn model(section: &str, bf16: bool) -> Model<Cpu<f32>> {
    let folder = ModelFolder::open(&base("qwen2")).unwrap();
    let folder = if bf16 { folder.in_bf16() } else { folder };
    let LoadedAdapter { adapters, values, .. } = adapter(&folder, section);
    Model::new(Cpu::new(), &folder, adapters, &values, 64)
}

fn ids() -> Vec<u32> {
    (0..24).map(|i| (i * 29 + 3) % 40).collect()
}

/// Logits of every token but the first few, read one by one.
fn one_by_one(model: &Model<Cpu<f32>>) -> Vec<Vec<f32>> {
    let (ids, mut cache) = (ids(), model.cache());
    model.extend(&ids[..4], &mut cache);
    ids[4..].iter().map(|&id| model.extend(&[id], &mut cache)).collect()
}

/// How far they are from those of the whole sequence.
fn off(model: &Model<Cpu<f32>>) -> f32 {
    let ids = ids();
    let mut batch = Batch::default();
    batch.push(&ids, &vec![true; ids.len()]);
    let (_, whole) = model.states_and_logits(&batch, None);
    let whole = whole.chunks_exact(model.spec.vocabulary).skip(4);
    let pairs = whole.zip(one_by_one(model));
    pairs
        .flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>())
        .fold(0.0, f32::max)
}

#[test]
fn adapters_on_weights_of_16_bits_are_read_in_16_bits() {
    for section in [LORA, SMORE] {
        let (plain, halved) = (off(&model(section, false)), off(&model(section, true)));
        assert!(plain < 5e-5, "{section}: {plain}");
        assert!(halved > 4.0 * plain && halved < 3e-3, "{section}: {halved} beside {plain}");
    }
    for section in [BOTTOM_UP, HYDRA_LORA, MIX_LORA] {
        let (plain, halved) = (off(&model(section, false)), off(&model(section, true)));
        assert!(plain < 5e-5 && halved < 5e-5, "{section}: {halved} beside {plain}");
    }
}

#[test]
fn decoding_follows_the_parameters() {
    for section in [LORA, SMORE] {
        let mut changed = model(section, true);
        let before = one_by_one(&changed);
        let values: Vec<f32> = changed.params().iter().map(|v| v * 1.5).collect();
        changed.params_mut().copy_from_slice(&values);
        let after = one_by_one(&changed);
        assert!(after != before, "{section}");
        changed.params_mut();
        assert!(after == one_by_one(&changed), "{section}");
        let folder = ModelFolder::open(&base("qwen2")).unwrap().in_bf16();
        let adapters = adapter(&folder, section).adapters;
        let fresh = Model::new(Cpu::new(), &folder, adapters, &values, 64);
        assert!(after == one_by_one(&fresh), "{section}");
    }
}
