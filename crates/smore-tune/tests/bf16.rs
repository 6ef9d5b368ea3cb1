//! `bf16: true`: weights stored as f32 are rounded, half as large, and the result shows it.

use smore_engine::Cpu;
use smore_tune::checkpoint::save_model;
use smore_tune::inject::Adapters;
use smore_tune::memory;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::{from_scratch, to_f32};
use smore_tune::model::{Batch, Model};

/// What the weights and one evaluation take, and what it gives.
fn evaluate(folder: ModelFolder) -> (usize, u64, Vec<f64>) {
    let (adapters, bytes) = (Adapters::none(&folder.spec), folder.bytes());
    let model = Model::new(Cpu::<f32>::new(), &folder, adapters, &[], 16);
    drop(folder);
    let mut batch = Batch::default();
    batch.push(&[1, 4, 2, 9, 3, 3, 5, 6], &[true; 8]);
    let losses = model.losses(&batch);
    (bytes, memory::resident(), losses)
}

/// The only test of its binary: it looks at the memory of the process.
#[test]
fn weights_take_half_the_memory_and_are_rounded() {
    let spec = DecoderSpec::from_json(&serde_json::json!({
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 64,
        "tie_word_embeddings": true
    }))
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    save_model(&path, &spec, dir.path(), &from_scratch(&spec, 3)).unwrap();
    let json = r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 64,
        "tie_word_embeddings": true}"#;
    std::fs::write(path.join("config.json"), json).unwrap();

    let open = || ModelFolder::open(&path).unwrap();
    for (name, _) in spec.tensors() {
        let rounded = open().in_bf16();
        let (was, is) = (to_f32(open().tensor(&name)), to_f32(rounded.tensor(&name)));
        let want: Vec<f32> = was.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert!(is == want, "{name}");
        if name.ends_with("0.self_attn.q_proj.weight") {
            assert_ne!(is, was);
            break;
        }
    }

    let start = memory::resident();
    let (bytes_bf16, resident_bf16, rounded) = evaluate(open().in_bf16());
    memory::reset_peak();
    let (bytes, resident, plain) = evaluate(open());
    assert_eq!(bytes, 2 * bytes_bf16);
    assert_ne!(plain, rounded);
    for (a, b) in plain.iter().zip(&rounded) {
        assert!((a - b).abs() < 0.02, "{a} {b}");
    }
    let (extra, extra_bf16) = (resident.saturating_sub(start), resident_bf16.saturating_sub(start));
    if cfg!(target_os = "linux") {
        assert!(extra as f64 > 0.9 * bytes as f64, "{extra} of {bytes}");
        assert!((extra_bf16 as f64) < 0.75 * extra as f64, "{extra_bf16} {extra}");
    }
}
