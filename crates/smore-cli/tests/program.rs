//! The program as a user meets it: training and generation on the demo's base, and what it says to
//! mistakes.

mod workplace;

use std::path::Path;
use workplace::{adapter, as_is, base, smore, write_run};

/// Losses in `metrics.jsonl`, without the times.
fn losses(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let json: serde_json::Value = serde_json::from_str(line).unwrap();
            ["loss", "eval_loss", "balance_loss", "grad_norm"]
                .map(|k| json[k].to_string())
                .join(" ")
        })
        .collect()
}

fn adapter_bytes(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

fn generate(folder: &Path, extra: &[&str]) -> String {
    let base = base();
    let model = base.to_str().unwrap();
    let args =
        ["generate", "--model", model, "--prompt", "Order 17 of the", "--max-new-tokens", "24"];
    let output = smore(folder, &[&args, extra].concat()).assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn one_seed_gives_one_run_and_another_seed_another() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "a", as_is);
    write_run(folder, "b", as_is);
    write_run(folder, "c", |c| c.replace("seed: 42", "seed: 43"));
    // Nor does the number of threads change a bit.
    for (name, threads) in [("a", "1"), ("b", "3"), ("c", "1")] {
        let mut run = smore(folder, &["train", &format!("{name}.yaml")]);
        run.env("RAYON_NUM_THREADS", threads).assert().success();
    }
    let [a, b, c] = ["a", "b", "c"].map(|n| folder.join(n));
    assert_eq!(losses(&a), losses(&b));
    assert!(adapter_bytes(&a) == adapter_bytes(&b));
    assert_ne!(losses(&a), losses(&c));
    assert_eq!(losses(&a).len(), 6 + 3 + 1, "six steps, evaluations at 0, 3 and 6, the routers");
    for file in ["config.yaml", "report.html", "checkpoint-3/adapter_config.json"] {
        assert!(a.join(file).is_file(), "{file}");
    }
    assert!(!folder.join("a/checkpoint-6").exists(), "the last step is in adapter/");
}

#[test]
fn a_fresh_adapter_gives_the_bases_text_and_a_trained_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    // The first step of a warm-up has rate 0: what is saved is what was drawn.
    write_run(folder, "fresh", |c| c.replace("max_steps: 6", "max_steps: 1"));
    write_run(folder, "trained", |c| c.replace("1.0e-2", "3.0e-2"));
    for name in ["fresh", "trained"] {
        smore(folder, &["train", &format!("{name}.yaml")]).assert().success();
    }
    let bare = generate(folder, &[]);
    assert_eq!(bare, generate(folder, &["--adapter", "fresh/adapter"]));
    assert_ne!(bare, generate(folder, &["--adapter", "trained/adapter"]));
    let sampled = |seed| generate(folder, &["--temperature", "1.2", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let json: serde_json::Value = serde_json::from_str(&generate(folder, &["--json"])).unwrap();
    assert_eq!(format!("{}\n", json["text"].as_str().unwrap()), bare);
}

#[test]
fn every_kind_of_adapter_trains_and_loads() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "lora", adapter("{kind: lora, rank: 4, targets: [q_proj, down_proj]}"));
    write_run(folder, "hydra", adapter("{kind: hydra_lora, heads: 3, rank: 2}"));
    write_run(
        folder,
        "mix",
        adapter("{kind: mix_lora, experts: 4, fanout: 2, rank: 2, targets: [q_proj, up_proj]}"),
    );
    write_run(
        folder,
        "pattern",
        adapter(
            "{kind: lora, rank: 2, rslora: true, targets: '.*[01].mlp.*', rank_pattern: {up_proj: 4}}",
        ),
    );
    write_run(folder, "full", adapter("{kind: full}"));
    write_run(folder, "scratch", adapter("{kind: full, from_scratch: true}"));
    write_run(
        folder,
        "sharp",
        adapter(
            "{kind: smore, shared_pool: true, activation: prelu|0.25, activation_position: child, \
             gate: {kind: noisy_topk}, init: eq_1_layer, layers: [{experts: 4, fanout: 2, rank: 2}, \
             {experts: 4, fanout: 1, rank: 2}]}",
        ),
    );
    let mut starts = Vec::new();
    for name in ["lora", "full", "scratch", "sharp", "hydra", "mix", "pattern"] {
        let run = smore(folder, &["train", "--json", &format!("{name}.yaml")]).assert().success();
        let json: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
        let (before, after) = (&json["eval_loss_before"], &json["eval_loss_after"]);
        assert!(after.as_f64() < before.as_f64(), "{name}: {json}");
        starts.push(before.as_f64().unwrap());
    }
    assert_eq!(starts[0], starts[1], "an adapter starts where the base is");
    assert!(starts[2] > 5.0, "from scratch starts near ln 512");
    for name in ["lora", "sharp", "hydra", "mix", "pattern"] {
        generate(folder, &["--adapter", &format!("{name}/adapter")]);
    }
    smore(folder, &["generate", "--model", "full/model", "--prompt", "Order"]).assert().success();
}

/// `gradient_checkpointing` takes memory away and leaves every bit.
#[test]
fn checkpointing_takes_less_memory_for_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let mut peaks = Vec::new();
    for (name, on) in [("kept", "false"), ("again", "true")] {
        write_run(folder, name, |c| {
            c.replace("cutoff_len: 64", "cutoff_len: 256")
                .replace("max_steps: 6", &format!("max_steps: 2, gradient_checkpointing: {on}"))
                .replace("train_batch_size: 2", "train_batch_size: 36")
        });
        let long = "the order of the press is late and the press is hot ".repeat(20);
        let line = format!("{{\"instruction\": \"Report\", \"output\": \"{long}\"}}\n");
        std::fs::write(folder.join("data.jsonl"), line.repeat(40)).unwrap();
        let run = smore(folder, &["train", "--json", &format!("{name}.yaml")]).assert().success();
        let json: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
        peaks.push(json["peak_memory_bytes"].as_f64().unwrap());
    }
    assert_eq!(losses(&folder.join("kept")), losses(&folder.join("again")));
    assert!(adapter_bytes(&folder.join("kept")) == adapter_bytes(&folder.join("again")));
    assert!(peaks[1] < 0.7 * peaks[0], "{peaks:?}");
}

#[test]
fn an_earlier_run_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", |c| c.replace("max_steps: 6", "max_steps: 1"));
    for _ in 0..2 {
        smore(folder, &["train", "run.yaml"]).assert().success();
    }
    assert!(folder.join("run/adapter").is_dir() && folder.join("run.1/adapter").is_dir());
}

/// Runs `train` on a spoilt set-up and returns what it says; it must end with exit code 2 and
/// write no run folder.
fn complaint(spoil: impl Fn(&Path), change: impl Fn(String) -> String) -> String {
    let dir = tempfile::tempdir().unwrap();
    write_run(dir.path(), "run", change);
    spoil(dir.path());
    let output = smore(dir.path(), &["train", "run.yaml"]).assert().code(2).get_output().clone();
    assert!(!dir.path().join("run").exists());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("error: ") && !said.contains("panicked"), "{said}");
    said
}

#[test]
fn mistakes_get_one_clear_message() {
    let nothing = |_: &Path| {};
    let said = complaint(nothing, |c| c.replace("learning_rate:", "learning_rat:"));
    assert!(said.contains("learning_rat") && said.contains("learning_rate"), "{said}");
    let said = complaint(nothing, |c| c.replace("fanout: 2", "fanout: 5"));
    assert!(said.contains("fanout is 5") && said.contains("experts is 4"), "{said}");
    let said = complaint(nothing, |c| c.replace("gate_proj,", "gate_porj,"));
    assert!(said.contains("gate_porj") && said.contains("did you mean `gate_proj`"), "{said}");
    let said = complaint(nothing, |c| c.replace("data.jsonl", "dta.jsonl"));
    assert!(said.contains("dta.jsonl") && said.contains("not found"), "{said}");
    let half = "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"c\"}\n";
    let spoil = |f: &Path| std::fs::write(f.join("data.jsonl"), half).unwrap();
    let said = complaint(spoil, as_is);
    assert!(said.contains("data.jsonl:2") && said.contains("output"), "{said}");
}

#[test]
fn incomplete_model_folders_are_named() {
    let without = |missing: &'static str| {
        complaint(
            move |folder| {
                std::fs::create_dir(folder.join("model")).unwrap();
                for entry in std::fs::read_dir(base()).unwrap() {
                    let entry = entry.unwrap();
                    if entry.file_name() != missing {
                        std::fs::copy(entry.path(), folder.join("model").join(entry.file_name()))
                            .unwrap();
                    }
                }
            },
            |c| c.replace(base().to_str().unwrap(), "model"),
        )
    };
    for missing in ["tokenizer.json", "model.safetensors", "config.json"] {
        let said = without(missing);
        assert!(said.contains(missing) && said.contains("expected"), "{said}");
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", |c| c.replace("max_steps: 6", "max_steps: 1"));
    smore(folder, &["train", "run.yaml"]).assert().success();
    let file = folder.join("run/adapter/adapter_config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("\"down_proj\"", "\"o_proj\"")).unwrap();
    let base = base();
    let args = ["generate", "--model", base.to_str().unwrap(), "--prompt", "x", "--adapter"];
    let output = smore(folder, &[&args[..], &["run/adapter"]].concat()).assert().code(2);
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(said.contains("o_proj"), "{said}");
}
