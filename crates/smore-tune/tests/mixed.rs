//! A training step with `bf16: true`: what waits for the backward pass is rounded, and factors of
//! products where those are faster so. Losses and gradients stay close to those of a step in f32, and
//! threads and recomputation leave every bit.

use smore_engine::{Cpu, Dtype};
use smore_tune::checkpoint::save_model;
use smore_tune::config::AdapterConfig;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::from_scratch;
use smore_tune::model::{Batch, Model, Scales, training_device};

const ADAPTERS: [&str; 3] = [
    r#"{"kind": "lora", "rank": 32, "targets": "all-linear"}"#,
    r#"{"kind": "hydra_lora", "heads": 3, "rank": 32}"#,
    // All experts act, so that no rounding changes a tree.
    r#"{"kind": "smore", "init": "normal", "gate": {"kind": "dense"},
        "layers": [{"experts": 3, "fanout": 3, "rank": 16}, {"experts": 3, "fanout": 3, "rank": 16}]}"#,
];

/// Losses and gradients of one step.
fn step(adapter: &str, bf16: bool, again: bool, threads: usize) -> (Vec<f64>, Vec<f32>) {
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 71,
        "tie_word_embeddings": true, "initializer_range": 0.1
    });
    let spec = DecoderSpec::from_json(&json).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    save_model(&path, &spec, dir.path(), &from_scratch(&spec, 3)).unwrap();
    std::fs::write(path.join("config.json"), json.to_string()).unwrap();
    let folder = ModelFolder::open(&path).unwrap().in_bf16();
    let config: AdapterConfig = serde_json::from_str(adapter).unwrap();
    let adapters = Adapters::new(&config, &spec).unwrap();
    let mut values = adapters.init(5);
    for (i, v) in values.iter_mut().enumerate() {
        *v += 0.02 * (((i * 37) % 23) as f32 - 11.0) / 11.0;
    }
    let mut model: Model<Cpu<f32>> =
        Model::new(training_device(bf16), &folder, adapters, &values, 64);
    model.gradient_checkpointing = again;
    let mut batch = Batch::default();
    for s in 0..3 {
        let ids: Vec<u32> = (0..60).map(|i| ((i * 17 + s * 5 + i * i) % 71) as u32).collect();
        batch.push(&ids, &[true; 60]);
    }
    let mut grads = vec![0.0; model.trained()];
    let scales = Scales { loss: 1.0 / batch.targets.len() as f64, balance: 1.0 };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let losses = pool.install(|| model.step(&batch, scales, None, &mut grads).losses);
    (losses, grads)
}

#[test]
fn gradients_stay_close_to_those_in_f32() {
    for adapter in ADAPTERS {
        let (losses, grads) = step(adapter, true, false, 2);
        let (exact_losses, exact) = step(adapter, false, false, 2);
        if Cpu::mixed().factors() == Dtype::F32 {
            // Nothing is rounded on the way down.
            assert!(losses == exact_losses, "{adapter}");
        }
        let square = |x: f32| f64::from(x) * f64::from(x);
        let length: f64 = exact.iter().map(|&g| square(g)).sum();
        let apart: f64 = grads.iter().zip(&exact).map(|(&a, &b)| square(a - b)).sum();
        let far = (apart / length).sqrt();
        // A few roundings of 2^-9 on the way down and back.
        assert!(far > 1e-4 && far < 3e-2, "{adapter}: {far}");
        for (a, b) in losses.iter().zip(&exact_losses) {
            assert!((a - b).abs() < 0.03 * b.abs().max(1.0), "{adapter}: {a} {b}");
        }
    }
}

#[test]
fn threads_and_recomputation_leave_every_bit() {
    for adapter in ADAPTERS {
        let one = step(adapter, true, false, 1);
        assert!(one == step(adapter, true, false, 2), "{adapter}: threads");
        assert!(one == step(adapter, true, true, 3), "{adapter}: recomputation");
    }
}
