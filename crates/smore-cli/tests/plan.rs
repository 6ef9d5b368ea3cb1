//! `smore plan` as a user meets it, held against what a run really writes.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

fn smore(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("smore").unwrap();
    let output = command.current_dir(folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const ADAPTERS: [&str; 6] = [
    "{kind: smore, layers: [{experts: 4, fanout: 2, rank: 4}, {experts: 4, fanout: 2, rank: 4}]}",
    "{kind: smore, shared_pool: true, layers: [{experts: 4, fanout: 2, rank: 4}, {experts: 4, fanout: 2, rank: 4}]}",
    "{kind: smore, targets: [q_proj], gate: {kind: noisy_topk}, layers: [{experts: 3, fanout: 2, rank: 4}]}",
    "{kind: lora, rank: 5}",
    "{kind: hydra_lora, rank: 4, heads: 3}",
    "{kind: mix_lora, rank: 4, experts: 4, fanout: 2}",
];

#[test]
fn plans_equal_what_a_run_trains_and_writes() {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo-base");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let record = r#"{"instruction": "say", "output": "a word"}"#;
    std::fs::write(folder.join("data.jsonl"), [record; 4].join("\n")).unwrap();
    for (i, adapter) in ADAPTERS.iter().enumerate() {
        let config = format!(
            "model: {base}\noutput_dir: run{i}\nadapter: {adapter}\n\
             data: {{train: [{{path: data.jsonl}}], validation: {{fraction: 0.0}}}}\n\
             train: {{max_steps: 1, per_device_train_batch_size: 1}}\n"
        );
        std::fs::write(folder.join("run.yaml"), config).unwrap();
        let (code, out, err) = smore(folder, &["plan", base, "run.yaml", "--json"]);
        assert_eq!(code, 0, "{adapter}: {err}");
        let plan: Value = serde_json::from_str(&out).unwrap();
        let (code, _, err) = smore(folder, &["train", "run.yaml"]);
        assert_eq!(code, 0, "{adapter}: {err}");
        let file = folder.join(format!("run{i}/adapter/adapter_model.safetensors"));
        let written = std::fs::read(&file).unwrap();
        assert_eq!(plan["costs"][0]["file_bytes"], written.len(), "{adapter}");
        let header = u64::from_le_bytes(written[..8].try_into().unwrap()) as usize;
        let numbers = (written.len() - 8 - header) / 4;
        if !adapter.contains("shared_pool") {
            // A shared pool is trained once and written once for each layer.
            assert_eq!(plan["costs"][0]["parameters"], numbers, "{adapter}");
        }
        let adapter = format!("run{i}/adapter");
        let (code, out, err) = smore(folder, &["plan", base, &adapter, "--json"]);
        assert_eq!(code, 0, "{err}");
        let saved: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(saved["costs"][0]["parameters"], plan["costs"][0]["parameters"], "{adapter}");
    }
}

#[test]
fn tokens_and_mistakes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), ADAPTERS[0]).unwrap();
    let plan = |tokens: &str| -> Value {
        let args = ["plan", "qwen3-0.6b", "a.yaml", "--json", "--tokens", tokens];
        let (code, out, err) = smore(dir.path(), &args);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let activations =
        |plan: &Value| plan["costs"][0]["memory"][0]["split"]["activations"].as_u64().unwrap();
    let [one, two, three] = ["10000", "20000", "30000"].map(|n| activations(&plan(n)));
    assert!(two > one && three - two == two - one, "linear in tokens");
    let (code, out, _) = smore(dir.path(), &["plan", "qwen3-0.6b", "a.yaml"]);
    assert!(code == 0 && out.contains("LoRA of equal rank 32") && out.contains("flexibility"));
    for (model, adapter, words) in [
        ("llama-9", "a.yaml", "expected a model's folder"),
        ("qwen3-0.6b", "missing.yaml", "missing.yaml"),
    ] {
        let (code, _, err) = smore(dir.path(), &["plan", model, adapter]);
        assert!(code == 2 && err.contains(words), "{err}");
    }
}

/// A budget lists what fits, a page is written, and what `--time` says is near what a run takes.
#[test]
fn budgets_pages_and_time() {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo-base");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let record = r#"{"instruction": "say", "output": "a word, and another, and a third"}"#;
    std::fs::write(folder.join("data.jsonl"), [record; 64].join("\n")).unwrap();
    let config = format!(
        "model: {base}\noutput_dir: run\nadapter: {}\n\
         data: {{train: [{{path: data.jsonl}}], validation: {{fraction: 0.0}}}}\n\
         train: {{num_train_epochs: 2, per_device_train_batch_size: 16, gradient_accumulation_steps: 1}}\n",
        ADAPTERS[0]
    );
    std::fs::write(folder.join("run.yaml"), config).unwrap();
    let args = ["plan", base, "run.yaml", "--budget", "500K", "--html", "plan.html", "--json"];
    let (code, out, err) = smore(folder, &args);
    assert_eq!(code, 0, "{err}");
    let plan: Value = serde_json::from_str(&out).unwrap();
    let found = plan["within_budget"].as_array().unwrap();
    assert!(found.len() > 10 && found.iter().any(|f| f["on_front"] == true));
    assert!(found.iter().all(|f| f["parameters"].as_u64().unwrap() <= 500_000));
    let page = std::fs::read_to_string(folder.join("plan.html")).unwrap();
    assert!(page.contains("Within the budget") && page.contains("<circle"));
    assert!(!page.contains("http://") && !page.contains("https://"));
    // What was found is planned alike by itself.
    let layers = serde_json::to_string(&found.last().unwrap()["layers"]).unwrap();
    std::fs::write(folder.join("a.yaml"), format!("{{kind: smore, layers: {layers}}}")).unwrap();
    let (code, out, err) = smore(folder, &["plan", base, "a.yaml", "--json"]);
    assert_eq!(code, 0, "{err}");
    let alone: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(alone["costs"][0]["parameters"], found.last().unwrap()["parameters"]);

    let (code, out, err) = smore(folder, &["plan", base, "run.yaml", "--time", "--json"]);
    assert_eq!(code, 0, "{err}");
    let plan: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&plan["data"]["samples"], &plan["data"]["updates"]), (&64.into(), &4.into()));
    assert_eq!(plan["data"]["total_updates"], 8);
    let pace = &plan["paces"][0];
    let per_token = pace["seconds_per_token"].as_f64().unwrap();
    assert!(per_token > 0.0 && pace["seconds_per_update"].as_f64().unwrap() >= 0.0);
    assert!(plan["paces"].as_array().unwrap().iter().all(|pace| !pace.is_null()));

    let (code, out, _) = smore(folder, &["plan", base, "run.yaml", "--budget", "1h"]);
    assert!(code == 0 && out.contains("an epoch") && out.contains("width d_L"), "{out}");
    for (budget, words) in [("20X", "expected parameters such as 20M"), ("0", "no budget")] {
        let (code, _, err) = smore(folder, &["plan", base, "run.yaml", "--budget", budget]);
        assert!(code == 2 && err.contains(words), "{err}");
    }
}
