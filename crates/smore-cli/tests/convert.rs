//! `smore merge` and `smore distill-lora`: what servers that know only models or LoRAs get.

mod workplace;

use serde_json::Value;
use std::path::Path;
use workplace::{adapter, base, refused, smore, write_run};

fn json(folder: &Path, args: &[&str]) -> Value {
    let run = smore(folder, args).assert().success();
    serde_json::from_slice(&run.get_output().stdout).unwrap()
}

fn train(folder: &Path, name: &str, section: &str) {
    write_run(folder, name, adapter(section));
    smore(folder, &["train", &format!("{name}.yaml")]).assert().success();
}

#[test]
fn a_lora_merges_and_the_merged_model_speaks_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, base) = (dir.path(), base());
    let model = base.to_str().unwrap();
    train(folder, "lora", "{kind: lora, rank: 4}");
    let merge = ["merge", "--json", "--model", model, "--adapter", "lora/adapter"];
    let wide = json(folder, &[&merge[..], &["--out", "wide", "--dtype", "f32"]].concat());
    assert!(wide["difference"]["largest"].as_f64().unwrap() < 1e-4, "{wide}");
    let half = json(folder, &[&merge[..], &["--out", "half"]].concat());
    let rounding = half["difference"]["largest"].as_f64().unwrap();
    assert!(1e-4 < rounding && rounding < 1.0, "the base is stored in 16 bits: {half}");
    let say = |args: &[&str]| {
        let prompt = ["generate", "--prompt", "Order 17 of the", "--max-new-tokens", "12"];
        smore(folder, &[&prompt, args].concat()).assert().success().get_output().stdout.clone()
    };
    assert_eq!(say(&["--model", "wide"]), say(&["--model", model, "--adapter", "lora/adapter"]));
    let said = refused(folder, &[&merge[..], &["--out", "wide"]].concat());
    assert!(said.contains("wide exists"), "{said}");
}

#[test]
fn a_smore_is_not_merged_but_distilled() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, base) = (dir.path(), base());
    let model = base.to_str().unwrap();
    train(
        folder,
        "tree",
        "{kind: smore, layers: [{experts: 4, fanout: 2, rank: 4}, {experts: 4, fanout: 2, rank: 4}]}",
    );
    let ends = ["--model", model, "--adapter", "tree/adapter", "--out", "out"];
    let said = refused(folder, &[&["merge"], &ends[..]].concat());
    assert!(said.contains("depends on the token") && said.contains("distill-lora"), "{said}");
    assert!(!folder.join("out").exists());

    let line = |i: usize| format!("Order {i} of the press\norder {i}\n");
    std::fs::write(folder.join("text.txt"), (0..200).map(line).collect::<String>()).unwrap();
    let distill = ["distill-lora", "--text", "text.txt", "--rank", "8"];
    let out = json(folder, &[&distill[..], &ends[..], &["--json"]].concat());
    let [of_base, of_tree, of_lora] =
        ["loss_base", "loss_adapter", "loss_lora"].map(|k| out[k].as_f64().unwrap());
    assert!(of_tree < of_base && of_lora < of_base, "{of_base} {of_tree} {of_lora}");
    assert!((of_lora - of_tree).abs() < 0.1 * (of_base - of_tree), "{of_base} {of_tree} {of_lora}");
    assert!(out["fits"][0]["residual"].as_f64().unwrap() < 0.5, "{out}");
    // What was written is a plain LoRA.
    let config = std::fs::read_to_string(folder.join("out/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!((config["peft_type"].as_str(), config["r"].as_u64()), (Some("LORA"), Some(8)));
    json(folder, &["inspect", "--json", "out"]);

    std::fs::write(folder.join("text.txt"), "short").unwrap();
    let again = ["--model", model, "--adapter", "tree/adapter", "--out", "other"];
    let said = refused(folder, &[&distill[..], &again[..]].concat());
    assert!(said.contains("text.txt") && said.contains("tokens"), "{said}");
}
