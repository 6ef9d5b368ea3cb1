//! Adapters that other programs made, with what they compute (`recorded/adapters`, made by
//! `xtask/python/ecosystem/record.py`): PEFT itself, and files laid out and saved by PyTorch as
//! MoE-PEFT and HydraLoRA do. `cargo xtask ecosystem` runs many more.

use serde_json::{Value, json};
use smore_tune::checkpoint::load_adapter;
use smore_tune::model::folder::ModelFolder;
use smore_tune::verify::check_case;
use std::path::{Path, PathBuf};

/// Of each case whether gradients were recorded: LoRAMoE and MoLA become S'MoREs, whose parameters
/// are others.
const CASES: [(&str, bool); 10] = [
    ("gemma2__hydra_lora", true),
    ("gemma2__mix_lora_attention", true),
    ("gemma2__rslora_ranks", true),
    ("llama__bin", true),
    ("llama__loramoe", false),
    ("llama__moe_peft_lora_rslora", true),
    ("llama__mola", false),
    ("mistral__mix_lora_some", true),
    ("qwen2__bin_bf16", true),
    ("qwen3__exclude_pattern", true),
];

fn recorded(case: &str) -> PathBuf {
    Path::new("tests/recorded/adapters").join(case)
}

fn settings(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A copy of a case with other settings, which finds the same base.
fn changed(case: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let (from, to) = (recorded(case), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(&from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    let mut settings = settings(&from);
    let base = from.join(settings["base_model_name_or_path"].as_str().unwrap());
    settings["base_model_name_or_path"] = json!(base.canonicalize().unwrap());
    change(&mut settings);
    std::fs::write(to.path().join("adapter_config.json"), settings.to_string()).unwrap();
    to
}

#[test]
fn adapters_compute_what_their_makers_compute() {
    for (case, with_gradients) in CASES {
        let (report, _) = check_case(&recorded(case), None).unwrap();
        assert!(report.passed(), "{case}: {:?}", report.worst());
        assert!(report.notes.is_empty(), "{case}: {:?}", report.notes);
        let compared = |name: &str| report.checks.iter().any(|c| c.tensor.starts_with(name));
        assert!(compared("logits") && compared("eval.ce"), "{case}");
        assert_eq!(compared("grad."), with_gradients, "{case}");
        assert_eq!(compared("n_trainable"), with_gradients, "{case}");
    }
}

#[test]
fn every_case_is_in_the_list() {
    let entries = std::fs::read_dir("tests/recorded/adapters").unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert_eq!(names, CASES.map(|(name, _)| name.to_owned()));
}

/// A recording tells settings apart that leave every tensor its shape.
#[test]
fn other_settings_compute_something_else() {
    for (case, key, value) in [
        ("gemma2__rslora_ranks", "use_rslora", json!(false)),
        ("gemma2__rslora_ranks", "alpha_pattern", json!({})),
        ("gemma2__rslora_ranks", "lora_alpha", json!(3)),
        ("gemma2__hydra_lora", "lora_alpha", json!(5)),
        ("llama__moe_peft_lora_rslora", "use_rslora", json!(false)),
        ("llama__loramoe", "lora_alpha", json!(4)),
        ("llama__mola", "top_k", json!(3)),
        ("gemma2__mix_lora_attention", "top_k", json!(3)),
        ("mistral__mix_lora_some", "use_rslora", json!(false)),
        // Absent, it is MoE-PEFT's 0.001.
        ("mistral__mix_lora_some", "router_aux_loss_coef", json!(0.01)),
    ] {
        let same = changed(case, |_| {});
        assert!(check_case(same.path(), None).unwrap().0.passed(), "{case}");
        let other = changed(case, |settings| settings[key] = value.clone());
        let (report, _) = check_case(other.path(), None).unwrap();
        assert!(!report.passed(), "{case} does not depend on {key}");
    }
}

/// What would be another function without a word is refused by its key.
#[test]
fn what_is_not_computed_is_refused() {
    for (case, key, value) in [
        ("llama__bin", "use_dora", json!(true)),
        ("llama__bin", "modules_to_save", json!(["lm_head"])),
        ("llama__bin", "bias", json!("all")),
        ("llama__bin", "lora_bias", json!(true)),
        ("llama__bin", "layer_replication", json!([[0, 2], [1, 3]])),
        // PEFT takes these adapters' starts out of the base's weights when it loads them.
        ("llama__bin", "init_lora_weights", json!("pissa")),
        ("llama__bin", "init_lora_weights", json!("pissa_niter_16")),
        ("llama__bin", "init_lora_weights", json!("OLoRA")),
        ("llama__bin", "init_lora_weights", json!("corda")),
        ("llama__bin", "init_lora_weights", json!("loftq")),
        ("llama__bin", "init_lora_weights", json!("lora_ga")),
        ("gemma2__hydra_lora", "init_lora_weights", json!("pissa")),
        ("mistral__mix_lora_some", "routing_strategy", json!("mixlora-dynamic")),
        ("mistral__mix_lora_some", "act_fn", json!("relu")),
    ] {
        let folder = changed(case, |settings| settings[key] = value.clone());
        let error = check_case(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains(&format!("{key} is")), "{case}: {error}");
    }
}

#[test]
fn starts_that_keep_the_base_are_read() {
    for start in [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")] {
        let folder = changed("llama__bin", |s| s["init_lora_weights"] = start.clone());
        assert!(check_case(folder.path(), None).unwrap().0.passed(), "{start}");
    }
}

/// The authors' alphas are a list with an entry per layer, or none at all.
#[test]
fn alphas_that_fit_no_layer_are_refused() {
    let base = ModelFolder::open(Path::new("tests/recorded/llama")).unwrap();
    let settings = |alpha: Value| {
        json!({"peft_type": "HIER_MOE", "target_modules": ["q_proj"], "num_experts": [2, 2],
            "num_active": [1, 1], "expert_dims": [2, 2], "gate_dims": [4, 4], "gate_arch": "mlp",
            "gate_type": "switch", "gate_act_fn": "relu", "expert_act_fn": "tanh",
            "balance_loss_weight": 0.01, "dim_downproj_x": 4, "activation_position": "all",
            "is_shared_expert_pool": false, "init_method": "w_final_zero", "lora_alpha": alpha})
    };
    for (alpha, words) in [
        (json!(16), "lora_alpha is 16"),
        (json!([16]), "lora_alpha has 1 entries, num_experts 2"),
        // These are read, so that the weights are what is missing.
        (json!([16, null]), "adapter_model.safetensors"),
        (Value::Null, "adapter_model.safetensors"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("adapter_config.json");
        std::fs::write(file, settings(alpha.clone()).to_string()).unwrap();
        let Err(error) = load_adapter(folder.path(), &base.spec) else {
            panic!("{alpha} was read")
        };
        assert!(error.to_string().contains(words), "{alpha}: {error}");
    }
}
