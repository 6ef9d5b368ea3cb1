//! The base models of the shared folder that `SMORE_SHARED` names: logits, continuations and
//! losses equal those recorded from transformers. Run by `cargo xtask parity`.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

use safetensors::SafeTensors;
use smore_engine::Cpu;
use smore_tune::checkpoint::load_adapter;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use std::path::{Path, PathBuf};

fn shared() -> Option<PathBuf> {
    std::env::var_os("SMORE_SHARED").map(PathBuf::from)
}

fn base(path: &Path, context: usize) -> Model<Cpu<f32>> {
    let folder = ModelFolder::open(path).unwrap();
    let adapters = Adapters::none(&folder.spec);
    Model::new(Cpu::new(), &folder, adapters, &[], context)
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map(|(i, _)| i as u32).unwrap()
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn largest_difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

#[test]
fn stories260k_equals_transformers() {
    let Some(shared) = shared() else { return };
    let models = shared.join("data/models");
    let reference = std::fs::read_to_string(models.join("stories260K.reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
    let model = base(&models.join("stories260K"), 512);

    let prompt: Vec<u32> = numbers(&reference["prompt"]["ids"]).iter().map(|&x| x as u32).collect();
    let mut batch = Batch::default();
    batch.push(&prompt, &vec![true; prompt.len()]);
    let (_, logits) = model.states_and_logits(&batch, None);
    let first =
        largest_difference(&logits[..512], &numbers(&reference["prompt"]["first_position_logits"]));
    let last = largest_difference(
        &logits[logits.len() - 512..],
        &numbers(&reference["prompt"]["last_logits"]),
    );
    println!("logits: largest difference {first:e} (first position), {last:e} (last)");
    assert!(first < 1e-3 && last < 1e-3);
    let nll = model.losses(&batch);
    for (ours, theirs) in nll.iter().zip(numbers(&reference["prompt"]["nll_of_next"])) {
        assert!((ours - theirs).abs() < 1e-4);
    }

    let ids = numbers(&reference["greedy_from_bos"]["ids"]);
    let mut cache = model.cache();
    let mut token = ids[0] as u32;
    for &want in &ids[1..] {
        token = argmax(&model.extend(&[token], &mut cache));
        assert_eq!(token, want as u32);
    }
    println!("greedy continuation: {} tokens equal", ids.len() - 1);
}

#[test]
fn stories260k_has_the_recorded_loss_on_stories() {
    let Some(shared) = shared() else { return };
    let folder = shared.join("data/models/stories260K");
    let tokenizer = smore_tune::tokenizer::Tokenizer::open(&folder).unwrap();
    let model = base(&folder, 512);
    let stories =
        std::fs::read_to_string(shared.join("data/corpus/tinystories_sample.jsonl")).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for line in stories.lines().take(300) {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let mut ids = tokenizer.encode_with_special(record["text"].as_str().unwrap()).unwrap();
        ids.truncate(512);
        let mut batch = Batch::default();
        batch.push(&ids, &vec![true; ids.len()]);
        let losses = model.losses(&batch);
        sum += losses.iter().sum::<f64>();
        count += losses.len();
    }
    println!("mean loss {} over {count} tokens", sum / f64::from(count as u32));
    assert_eq!(count, 120_756);
    assert!((sum / 120_756.0 - 1.500_047_138_291_661_8).abs() < 1e-4);
}

/// Bases with rotary scaling, tied and untied, and with adapters recorded from the authors' code.
#[test]
fn recorded_logits_with_and_without_adapters() {
    let Some(shared) = shared() else { return };
    let e2e = shared.join("fixtures/e2e");
    for (case, adapter) in [
        ("base_llama_tied", None),
        ("base_llama_untied", None),
        ("llama_tied__switch_L1", Some("base_llama_tied")),
        ("llama_tied__switch_L2", Some("base_llama_tied")),
        ("llama_tied__dense_L2", Some("base_llama_tied")),
        ("llama_tied__noisy_L2", Some("base_llama_tied")),
        ("llama_tied__lora", Some("base_llama_tied")),
        ("base_gemma2", None),
        ("gemma2__switch_L2", Some("base_gemma2")),
        ("gemma2__lora", Some("base_gemma2")),
    ] {
        let folder = ModelFolder::open(&e2e.join(adapter.unwrap_or(case))).unwrap();
        let (adapters, values) = if adapter.is_none() {
            (Adapters::none(&folder.spec), vec![])
        } else {
            let loaded = load_adapter(&e2e.join(case), &folder.spec).unwrap();
            (loaded.adapters, loaded.values)
        };
        let vocabulary = folder.spec.vocabulary;
        let model = Model::new(Cpu::<f32>::new(), &folder, adapters, &values, 256);
        let bytes = std::fs::read(e2e.join(case).join("fixture.safetensors")).unwrap();
        let fixture = SafeTensors::deserialize(&bytes).unwrap();
        let ints = |name: &str| -> Vec<u32> {
            let data = fixture.tensor(name).unwrap().data().to_vec();
            data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
        };
        let (ids, mask) = (ints("input_ids"), ints("attention_mask"));
        let logits = fixture.tensor("logits").unwrap();
        let (rows, length) = (logits.shape()[0], logits.shape()[1]);
        let want: Vec<f64> = logits
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect();
        let mut worst: f64 = 0.0;
        for row in 0..rows {
            let valid = mask[row * length..(row + 1) * length].iter().sum::<u32>() as usize;
            let ids = &ids[row * length..row * length + valid];
            let mut batch = Batch::default();
            batch.push(ids, &vec![true; valid]);
            let (_, got) = model.states_and_logits(&batch, None);
            let start = row * length * vocabulary;
            worst = worst.max(largest_difference(&got, &want[start..start + valid * vocabulary]));
        }
        println!("{case}: logits differ by at most {worst:e}");
        assert!(worst < 2e-4, "{case}");
    }
}
