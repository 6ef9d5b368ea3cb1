//! How samples are put together does not show in losses or gradients, in f32 as training has it.

use smore::adapter::{Noise, NoiseKey};
use smore_engine::Cpu;
use smore_tune::checkpoint::save_model;
use smore_tune::config::AdapterConfig;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::from_scratch;
use smore_tune::model::{Batch, Model, Scales};

const FAMILIES: [&str; 3] = ["llama", "gemma2", "qwen3"];
const ADAPTERS: [&str; 4] = [
    r#"{"kind": "lora", "rank": 4, "targets": "all-linear"}"#,
    r#"{"kind": "hydra_lora", "heads": 3, "rank": 2}"#,
    r#"{"kind": "mix_lora", "experts": 4, "fanout": 2, "rank": 2, "balance_weight": 0}"#,
    r#"{"kind": "smore", "targets": "all-linear", "init": "normal",
        "layers": [{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 4, "fanout": 2, "rank": 2}],
        "gate": {"balance_weight": 0, "router_width": 8, "router_input_width": 8}}"#,
];

fn model(family: &str, adapter: &str) -> Model<Cpu<f32>> {
    let json = serde_json::json!({
        "model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61,
        "tie_word_embeddings": true, "initializer_range": 0.2, "sliding_window": 5,
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50, "final_logit_softcapping": 30
    });
    let spec = DecoderSpec::from_json(&json).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    save_model(&path, &spec, dir.path(), &from_scratch(&spec, 3)).unwrap();
    std::fs::write(path.join("config.json"), json.to_string()).unwrap();
    let folder = ModelFolder::open(&path).unwrap();
    let config: AdapterConfig = serde_json::from_str(adapter).unwrap();
    let adapters = Adapters::new(&config, &spec).unwrap();
    let mut values = adapters.init(5);
    for (i, v) in values.iter_mut().enumerate() {
        *v += 0.02 * (((i * 37) % 23) as f32 - 11.0) / 11.0;
    }
    Model::new(Cpu::new(), &folder, adapters, &values, 64)
}

/// Eight samples of 3 to 31 tokens, of which more or fewer are trained.
fn samples() -> Vec<(Vec<u32>, Vec<bool>)> {
    (0..8)
        .map(|s| {
            let n = 3 + s * 4;
            let ids = (0..n).map(|i| ((i * 17 + s * 5 + 1) % 61) as u32).collect();
            (ids, (0..n).map(|i| i > 0 && (i + s) % 3 != 0).collect())
        })
        .collect()
}

fn batch(samples: &[(Vec<u32>, Vec<bool>)]) -> Batch {
    let mut batch = Batch::default();
    for (ids, trained) in samples {
        batch.push(ids, trained);
    }
    batch
}

/// Losses and gradients of a window that is cut into micro-batches of `size` samples.
fn window(model: &Model<Cpu<f32>>, size: usize) -> (Vec<f64>, Vec<f32>) {
    let samples = samples();
    let batches: Vec<Batch> = samples.chunks(size).map(batch).collect();
    let trained: usize = batches.iter().map(|b| b.targets.len()).sum();
    let scales = Scales { loss: 1.0 / trained as f64, balance: 1.0 };
    let (mut losses, mut grads) = (Vec::new(), vec![0.0; model.trained()]);
    for batch in &batches {
        let noise = Noise::Drawn(NoiseKey { seed: 1, step: 0, place: 0 });
        losses.extend(model.step(batch, scales, Some(noise), &mut grads).losses);
    }
    (losses, grads)
}

/// Accumulation 1 x 8 is 8 x 1, and 3 + 3 + 2: the loss and every gradient within 1e-6.
#[test]
fn accumulation_is_one_batch() {
    for (family, adapter) in FAMILIES.into_iter().flat_map(|f| ADAPTERS.map(|a| (f, a))) {
        let model = model(family, adapter);
        let (losses, grads) = window(&model, 8);
        assert!(grads.iter().any(|g| g.abs() > 1e-3), "{family} {adapter}");
        for size in [1, 3] {
            let (cut_losses, cut_grads) = window(&model, size);
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            assert!((mean(&losses) - mean(&cut_losses)).abs() < 1e-6, "{family} {adapter}");
            for (i, (a, b)) in grads.iter().zip(&cut_grads).enumerate() {
                assert!((a - b).abs() < 1e-6, "{family} {adapter} gradient {i}: {a} {b}");
            }
        }
    }
}

/// Every token's loss in a pack is that of its sample by itself, within 1e-5.
#[test]
fn packed_is_not_packed() {
    for (family, adapter) in FAMILIES.into_iter().flat_map(|f| ADAPTERS.map(|a| (f, a))) {
        let model = model(family, adapter);
        let samples = samples();
        let packed = model.losses(&batch(&samples));
        let apart = samples.chunks(1).flat_map(|sample| model.losses(&batch(sample)));
        let apart: Vec<f64> = apart.collect();
        assert_eq!(packed.len(), apart.len());
        for (a, b) in packed.iter().zip(&apart) {
            assert!((a - b).abs() < 1e-5, "{family} {adapter}: {a} {b}");
        }
        // A sample in front of another is not seen by it: the same tokens behind other ones.
        let mut other = samples.clone();
        other[0].0.iter_mut().for_each(|id| *id = 60 - *id);
        let moved = model.losses(&batch(&other));
        let own = samples[0].1.iter().filter(|&&t| t).count();
        assert_ne!(packed[..own], moved[..own]);
        // Equal but for how products are cut where experts gather their tokens.
        let apart = packed[own..].iter().zip(&moved[own..]).map(|(a, b)| (a - b).abs());
        let most = apart.fold(0.0, f64::max);
        assert!(most < 5e-6, "{family} {adapter}: {most}");
    }
}
