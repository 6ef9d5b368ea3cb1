//! `smore inspect` as a user meets it: numbers, what it accepts, and what it says to mistakes.

use assert_cmd::Command;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Runs the program; exit code, standard output, standard error.
fn inspect(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("smore").unwrap();
    let output = command.current_dir(folder).arg("inspect").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn facts(folder: &Path, args: &[&str]) -> Value {
    let (code, out, err) = inspect(folder, &[args, &["--json"]].concat());
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

fn section() -> Value {
    json!({
        "kind": "smore",
        "targets": ["gate_proj", "up_proj", "down_proj"],
        "layers": [
            {"experts": 4, "fanout": 2, "rank": 16},
            {"experts": 4, "fanout": 2, "rank": 16},
        ],
        "gate": {"router_width": 32, "router_input_width": 32},
    })
}

fn with(key: &str, value: Value) -> Value {
    let mut section = section();
    section[key] = value;
    section
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    std::fs::write(folder.join(name), text).unwrap();
    name.to_owned()
}

/// The shapes of Llama 3.2 1B, without weights.
fn write_model(folder: &Path) {
    std::fs::create_dir_all(folder.join("llama")).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256, "tie_word_embeddings": true,
    });
    write(folder, "llama/config.json", &config.to_string());
}

fn workplace() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_owned();
    write_model(&folder);
    (dir, folder)
}

#[test]
fn counts_are_those_of_the_authors() {
    let (_dir, folder) = workplace();
    let file = write(&folder, "a.json", &section().to_string());
    let all = facts(&folder, &[&file, "--model", "llama"]);
    let maps = all["maps"].as_array().unwrap();
    assert_eq!(maps.len(), 3);
    assert_eq!(maps[0]["target"], "gate_proj");
    let expected = json!({
        "trainable_param": 1_411_488, "expert_param": 1_340_416, "expert_param_wo_proj": 283_648,
        "gate_param": 71_072, "active_param": 1_270_496, "active_param_wo_proj": 213_728,
        "expert_flops": 1_269_760, "expert_flops_wo_proj": 221_184, "gate_flops": 70_912,
    });
    assert_eq!(maps[0]["authors_statistics"], expected);
    assert_eq!(maps[0]["parameters"]["total"], expected["trainable_param"]);
    assert_eq!(maps[0]["multiplications_per_token"]["paper"], expected["expert_flops"]);
    assert_eq!(maps[0]["delta"], 64 * 64 + 128 * 128);
    let total = &all["total"];
    let stats = &total["authors_statistics"];
    assert_eq!(stats["trainable_param"], 16 * (2 * 1_411_488 + 1_601_952));
    assert_eq!(total["parameters"]["total"], stats["trainable_param"]);
    let lora = json!({"rank": 128, "parameters": 16 * 3 * 128 * (2048 + 8192)});
    assert_eq!(total["lora_of_equal_rank"], lora);
    assert_eq!(total["lora_of_equal_parameters"]["rank"], 144);
}

#[test]
fn a_dense_gate_runs_all_experts_whatever_the_authors_count() {
    let (_dir, folder) = workplace();
    let gate = json!({"kind": "dense", "router_width": 32, "router_input_width": 32});
    let mut dense = with("gate", gate);
    dense["layers"] =
        json!([{"experts": 4, "fanout": 2, "rank": 8}, {"experts": 4, "fanout": 2, "rank": 8}]);
    let file = write(&folder, "dense.json", &dense.to_string());
    let all = facts(&folder, &[&file, "--model", "llama"]);
    let map = &all["maps"][0];
    assert_eq!(map["authors_statistics"]["active_param"], 635_248);
    assert_eq!(map["active_parameters"], 669_184, "all of expert_param");
    assert_eq!(all["structure"]["layers"][0]["active_nodes"], 16);
    assert_eq!(all["flexibility"]["exact"], "1", "nothing is chosen");
}

#[test]
fn structure_and_flexibility_need_no_model() {
    let (_dir, folder) = workplace();
    let file = write(&folder, "a.json", &section().to_string());
    let all = facts(&folder, &[&file]);
    let (lower, upper) = (&all["structure"]["layers"][0], &all["structure"]["layers"][1]);
    assert_eq!((lower["width_below"].as_u64(), lower["width"].as_u64()), (Some(0), Some(64)));
    assert_eq!((upper["width_below"].as_u64(), upper["width"].as_u64()), (Some(64), Some(128)));
    assert_eq!((&lower["active_nodes"], &upper["active_nodes"]), (&json!(4), &json!(2)));
    assert_eq!((&lower["router_input"], &upper["router_input"]), (&json!(64), &json!(32)));
    let gamma = &all["flexibility"];
    assert_eq!((&gamma["exact"], &gamma["formula"]), (&json!("216"), &json!("S'MoRE (Thm. 3.4)")));
    assert!((gamma["ln"].as_f64().unwrap() - 216f64.ln()).abs() < 1e-12);
    assert_eq!(gamma["smore_star"]["exact"], "126");
    assert_eq!(gamma["momor_bound"]["exact"], "66");
    assert_eq!(gamma["flat_mixture"]["exact"], "70");
    assert_eq!(
        (&all["model"], &all["total"], &all["maps"]),
        (&Value::Null, &Value::Null, &json!([]))
    );
    let (code, out, _) = inspect(&folder, &[&file]);
    assert!(code == 0 && out.contains("216") && out.contains("--model DIR"), "{out}");
    // A router as wide as the input has no width of its own.
    let file =
        write(&folder, "wide.json", &with("gate", json!({"router_input_width": 0})).to_string());
    assert_eq!(facts(&folder, &[&file])["structure"]["layers"][0]["router_input"], Value::Null);
    let wide = facts(&folder, &[&file, "--model", "llama"]);
    assert_eq!(wide["maps"][2]["router_inputs"], json!([8192 + 32, 8192]));
}

#[test]
fn sections_runs_and_adapters_say_the_same() {
    let (_dir, folder) = workplace();
    let expected =
        facts(&folder, &[&write(&folder, "a.json", &section().to_string()), "--model", "llama"]);
    let yaml = "kind: smore\nlayers:\n- {experts: 4, fanout: 2, rank: 16}\n\
                - {experts: 4, fanout: 2, rank: 16}\n";
    let indented = format!("  {}\n", yaml.trim_end().replace('\n', "\n  "));
    let run = format!(
        "model: llama\nadapter:\n{indented}data: {{train: [{{path: x.jsonl}}]}}\noutput_dir: out\n"
    );
    std::fs::create_dir(folder.join("run")).unwrap();
    std::fs::create_dir(folder.join("adapter")).unwrap();
    let settings = json!({
        "peft_type": "HIER_MOE", "moe_arch": "smore", "base_model_name_or_path": "../llama",
        "num_experts": [4, 4], "num_active": [2, 2], "expert_dims": [16, 16],
        "gate_dims": [32, 32], "dim_downproj_x": 32, "gate_type": "switch", "gate_arch": "mlp",
        "gate_act_fn": "relu", "expert_act_fn": "tanh", "activation_position": "all",
        "balance_loss_weight": 0.01, "init_method": "w_final_zero",
        "is_shared_expert_pool": false, "lora_alpha": null,
        "target_modules": ["up_proj", "gate_proj", "down_proj"], "exclude_modules": null,
    });
    write(&folder, "adapter/adapter_config.json", &settings.to_string());
    write(&folder, "run/config.yaml", &run);
    let subjects: [&[&str]; 6] = [
        &[&write(&folder, "bare.yaml", yaml), "--model", "llama"],
        &[&write(&folder, "keyed.yaml", &format!("adapter:\n{indented}")), "--model", "llama"],
        &[
            &write(&folder, "keyed.json", &json!({"adapter": section()}).to_string()),
            "--model",
            "llama",
        ],
        &[&write(&folder, "run.yaml", &run)],
        &["run"],
        &["adapter"],
    ];
    for args in subjects {
        let found = facts(&folder, args);
        for key in ["structure", "flexibility", "maps", "total"] {
            assert_eq!(found[key], expected[key], "{args:?}: {key}");
        }
        assert_eq!(found["model"]["blocks"], 16, "{args:?}");
    }
    let (code, out, _) = inspect(&folder, &["run"]);
    let total = "70,798,848"; // 16 blocks of 2 * 1,411,488 + 1,601,952
    assert!(code == 0 && out.contains(total) && out.contains("LoRA of equal size"), "{out}");
}

#[test]
fn other_kinds_are_described_too() {
    let (_dir, folder) = workplace();
    let lora = json!({"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]});
    let file = write(&folder, "lora.json", &lora.to_string());
    let all = facts(&folder, &[&file, "--model", "llama"]);
    assert_eq!(all["total"]["parameters"]["total"], 16 * 8 * (4096 + 2560));
    assert_eq!(facts(&folder, &[&file])["total"], Value::Null);
    let file = write(&folder, "full.yaml", "kind: full\n");
    let all = facts(&folder, &[&file, "--model", "llama"]);
    assert_eq!(all["total"]["parameters"]["total"], 1_235_814_400u64);
    // Not yet computed by a formula of the paper, and said so.
    let gate = json!({"architecture": "bottom_up"});
    let file = write(&folder, "up.json", &with("gate", gate).to_string());
    assert_eq!(facts(&folder, &[&file])["flexibility"]["formula"], Value::Null);
    assert!(inspect(&folder, &[&file]).1.contains("no formula is known"));
}

#[test]
fn numbers_beyond_all_types_are_written_as_text_or_as_powers() {
    let (_dir, folder) = workplace();
    let layer = json!({"experts": 64, "fanout": 8, "rank": 1});
    let file =
        write(&folder, "big.json", &with("layers", json!([layer, layer, layer])).to_string());
    let gamma = &facts(&folder, &[&file])["flexibility"];
    let exact = gamma["exact"].as_str().unwrap();
    assert_eq!(exact.len() as f64, gamma["log10"].as_f64().unwrap().floor() + 1.0);
    assert!(exact.len() > 100 && exact.bytes().all(|b| b.is_ascii_digit()));
    assert!(inspect(&folder, &[&file]).1.contains("10^"));
}

#[test]
fn a_model_that_is_only_named_may_be_missing_or_unknown() {
    let (_dir, folder) = workplace();
    let run = "model: elsewhere\nadapter: {kind: lora, rank: 2}\n";
    let file = write(&folder, "run.yaml", run);
    let all = facts(&folder, &[&file]);
    assert_eq!((&all["model"], &all["structure"]["rank"]), (&Value::Null, &json!(2)));
    assert!(all["model_error"].as_str().unwrap().contains("elsewhere"));
    std::fs::create_dir(folder.join("elsewhere")).unwrap();
    write(&folder, "elsewhere/config.json", r#"{"model_type": "mamba"}"#);
    let (code, out, _) = inspect(&folder, &[&file]);
    assert!(code == 0 && out.contains("mamba") && out.contains("--model DIR"), "{out}");
    assert_eq!(
        inspect(&folder, &[&file, "--model", "elsewhere"]).0,
        2,
        "what is asked for must be"
    );
    assert_eq!(facts(&folder, &[&file, "--model", "llama"])["model_error"], Value::Null);
}

#[test]
fn mistakes_are_the_users_and_are_named() {
    let (_dir, folder) = workplace();
    let file = write(&folder, "a.json", &section().to_string());
    let wrong = |key: &str, value: Value| {
        write(&folder, &format!("{key}.json"), &with(key, value).to_string())
    };
    let layers = wrong("layers", json!([{"experts": 2, "fanout": 3, "rank": 1}]));
    let targets = wrong("targets", json!(["gate_prj"]));
    let unknown = wrong("activatoin", json!("tanh"));
    std::fs::create_dir(folder.join("empty")).unwrap();
    std::fs::write(folder.join("binary"), [0xff, 0xfe, 0x00]).unwrap();
    let cases: [(&[&str], &str); 9] = [
        (&["nowhere"], "nowhere"),
        (&["empty"], "adapter_config.json"),
        (&["binary"], "UTF-8"),
        (&[&file, "--model", "empty"], "config.json"),
        (&[&layers], "layers[0].fanout is 3"),
        (&[&targets], "gate_proj"),
        (&[&unknown], "activation"),
        (&["llama/config.json"], "kind"),
        (&[], "ADAPTER_OR_CONFIG"),
    ];
    for (args, word) in cases {
        let (code, out, err) = inspect(&folder, args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(word), "{args:?}: {err}");
    }
}
