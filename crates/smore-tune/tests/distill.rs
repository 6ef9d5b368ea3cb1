//! A distilled LoRA is as close to its adapter as its rank allows.

mod adapted;

use adapted::{adapter, base};
use smore_tune::distill::{Distilled, distill, sequences};
use smore_tune::grow::Difference;
use smore_tune::inject::Adapters;
use smore_tune::model::Model;
use smore_tune::model::folder::ModelFolder;

const FAMILIES: [&str; 3] = ["llama", "gemma2", "qwen3"];

fn open(family: &str) -> ModelFolder {
    ModelFolder::open(&base(family)).unwrap()
}

fn text() -> Vec<u32> {
    (0..900u32).map(|i| (i * i * 7 + i * 31 + 5) % 96).collect()
}

fn fit(folder: &ModelFolder, section: &str, rank: usize) -> (Distilled, Difference) {
    let batches = sequences(&text(), 60);
    let mut told = 0;
    let watch = |done, all| {
        told += 1;
        assert!(done <= all);
    };
    let out = distill(folder, adapter(folder, section), &batches, rank, 1e-6, watch).unwrap();
    assert_eq!(told, folder.spec.blocks);
    let before = adapter(folder, section);
    let before = Model::new(smore_engine::Cpu::new(), folder, before.adapters, &before.values, 60);
    let copy = Adapters::new(&out.config, &folder.spec).unwrap();
    let after = Model::new(smore_engine::Cpu::new(), folder, copy, &out.values, 60);
    let difference = Difference::of(&before, &after, &batches[0]);
    (out, difference)
}

#[test]
fn a_lora_is_its_own_best_fit() {
    for family in FAMILIES {
        let folder = open(family);
        let lora = r#"{"kind": "lora", "rank": 3, "targets": "all-linear"}"#;
        let (out, difference) = fit(&folder, lora, 4);
        assert!(out.fits.iter().all(|f| f.residual < 1e-3), "{family}: {:?}", out.fits);
        assert!(difference.largest < 2e-3, "{family}: {difference}");
        assert_eq!(out.fits.len(), 21);
    }
}

/// More rank is closer, and a routed adapter is never met quite.
#[test]
fn residuals_fall_with_the_rank() {
    for (family, section) in FAMILIES.into_iter().zip([
        r#"{"kind": "smore", "layers": [{"experts": 3, "fanout": 2, "rank": 2},
            {"experts": 3, "fanout": 2, "rank": 2}], "init": "normal"}"#,
        r#"{"kind": "hydra_lora", "heads": 3, "rank": 2, "targets": ["k_proj", "v_proj", "up_proj"]}"#,
        r#"{"kind": "smore", "layers": [{"experts": 4, "fanout": 2, "rank": 3}], "init": "normal",
            "targets": ["o_proj", "down_proj"]}"#,
    ]) {
        let folder = open(family);
        let mean = |rank| {
            let (out, _) = fit(&folder, section, rank);
            out.fits.iter().map(|f| f.residual).sum::<f64>() / out.fits.len() as f64
        };
        let [one, two, four] = [1, 2, 4].map(mean);
        assert!(one > two && two > four, "{family}: {one} {two} {four}");
        assert!(one < 1.0 && four > 1e-4, "{family}: {one} {four}");
    }
}

#[test]
fn experts_that_are_ffns_have_no_map_to_fit() {
    let folder = open("gemma2");
    let mix = adapter(&folder, r#"{"kind": "mix_lora", "experts": 2, "fanout": 1, "rank": 1}"#);
    let error = distill(&folder, mix, &sequences(&text(), 60), 2, 1e-6, |_, _| ()).err().unwrap();
    assert!(error.contains("MixLoRA"), "{error}");
}
