//! Every option of the recipe changes what it says it changes, and nothing else.

mod workplace;

use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;
use workplace::{as_is, refused, smore, write_run};

/// Adds keys to the run's `train` section; they win over what is there.
fn with(keys: &str) -> impl Fn(String) -> String {
    let name = |pair: &str| pair.split_once(':').map(|(key, _)| key.to_owned());
    let own: Vec<_> = keys.split(", ").filter_map(name).collect();
    let keys = keys.to_owned();
    move |config| {
        let (head, tail) = config.split_once("train: {learning_rate").unwrap();
        let (line, rest) = tail.split_once("}\n").unwrap();
        let line = format!("learning_rate{line}");
        let kept: Vec<_> =
            line.split(", ").filter(|pair| !own.contains(&name(pair).unwrap())).collect();
        format!("{head}train: {{{keys}, {}}}\n{rest}", kept.join(", "))
    }
}

/// Samples of unequal length.
fn write_data(folder: &Path) {
    let line = |i: usize| {
        let words = "press ".repeat(1 + (i * 7) % 13);
        format!("{{\"instruction\": \"Order {i}\", \"output\": \"{words}{i}\"}}\n")
    };
    std::fs::write(folder.join("data.jsonl"), (0..40).map(line).collect::<String>()).unwrap();
}

fn train(folder: &Path, name: &str, change: impl Fn(String) -> String) -> Value {
    write_run(folder, name, change);
    write_data(folder);
    let run = smore(folder, &["train", "--json", &format!("{name}.yaml")]).assert().success();
    serde_json::from_slice(&run.get_output().stdout).unwrap()
}

fn adapter(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name).join("adapter_model.safetensors")).unwrap()
}

/// Lines of `metrics.jsonl`: steps, or evaluations.
fn metrics(folder: &Path, name: &str, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join(name).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line[key].as_f64()).collect()
}

#[test]
fn every_option_changes_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let base = "lr_scheduler_type: cosine, warmup_ratio: 0.1, eval_steps: 0, save_steps: 0";
    train(folder, "reference", with(base));
    let options = [
        "lr_scheduler_type: linear, warmup_ratio: 0.1",
        "lr_scheduler_type: constant, warmup_ratio: 0",
        "lr_scheduler_type: constant_with_warmup, warmup_ratio: 0.1",
        "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 5.0e-3}",
        "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        "warmup_steps: 3, warmup_ratio: 0",
        "warmup_ratio: 0.8",
        "learning_rate: 2.0e-2",
        "weight_decay: 0.5",
        "adam_beta1: 0.5",
        "adam_beta2: 0.9",
        "adam_epsilon: 1.0e-3",
        "max_grad_norm: 0.01",
        "max_steps: 5",
        "per_device_train_batch_size: 3",
        "gradient_accumulation_steps: 3",
        "seed: 5",
        "label_smoothing_factor: 0.1",
        "lora_dropout: 0.2",
        "router_lr_multiplier: 0.1",
        "router_lr_multiplier: [1, 0]",
        "balance_reduction: sum_over_microbatches",
        "group_by_length: true",
        "packing: true",
    ];
    let mut seen = vec![adapter(folder, "reference/adapter")];
    for (i, option) in options.iter().enumerate() {
        let name = format!("option{i}");
        let rest = base.split(", ").filter(|pair| {
            let key = pair.split_once(':').unwrap().0;
            !option.split(", ").any(|own| own.split_once(':').is_some_and(|own| own.0 == key))
        });
        let keys = [*option].into_iter().chain(rest).collect::<Vec<_>>().join(", ");
        train(folder, &name, with(&keys));
        let bytes = adapter(folder, &format!("{name}/adapter"));
        assert!(!seen.contains(&bytes), "{option} is as something before it");
        seen.push(bytes);
        let resolved = std::fs::read_to_string(folder.join(&name).join("config.yaml")).unwrap();
        let key = option.split_once(':').unwrap().0;
        assert!(resolved.contains(key), "{key} is not in\n{resolved}");
    }
}

/// A base stored as f32 is rounded; one stored as bf16, as the demo's is, stays what it is, and what
/// waits for the backward pass is rounded alone.
#[test]
fn bf16_rounds_what_is_stored_as_f32_and_what_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "lora", workplace::adapter("{kind: lora, rank: 4}"));
    let base = workplace::base();
    let merge =
        ["merge", "--adapter", "lora/adapter", "--dtype", "f32", "--out", "wide", "--model"];
    smore(folder, &merge).arg(&base).assert().success();
    let adapters = |model: &str| {
        ["false", "true"].map(|on| {
            let keys = format!("bf16: {on}");
            train(folder, on, |c| with(&keys)(c).replace(base.to_str().unwrap(), model));
            let bytes = adapter(folder, &format!("{on}/adapter"));
            std::fs::remove_dir_all(folder.join(on)).unwrap();
            bytes
        })
    };
    for model in ["wide", base.to_str().unwrap()] {
        let [kept, rounded] = adapters(model);
        assert!(kept != rounded, "{model}");
    }
}

/// Options that only cost or save memory leave every bit, with dropout drawn in every step.
#[test]
fn dropout_is_the_same_with_checkpointing_and_any_threads() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let mut all = Vec::new();
    for (name, keys, threads) in [
        ("a", "lora_dropout: 0.3, gradient_checkpointing: false", "1"),
        ("b", "lora_dropout: 0.3, gradient_checkpointing: true", "3"),
    ] {
        write_run(folder, name, with(keys));
        write_data(folder);
        let mut run = smore(folder, &["train", &format!("{name}.yaml")]);
        run.env("RAYON_NUM_THREADS", threads).assert().success();
        let settings = folder.join(name).join("adapter/adapter_config.json");
        let settings: Value = serde_json::from_slice(&std::fs::read(settings).unwrap()).unwrap();
        assert_eq!(settings["moe_dropout"], 0.3);
        all.push((adapter(folder, &format!("{name}/adapter")), metrics(folder, name, "loss")));
    }
    assert!(all[0] == all[1]);
}

#[test]
fn eight_micro_batches_of_one_are_one_of_eight() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    // The balance loss is a product of means over a forward pass: it does depend on the cut.
    let unbalanced = |keys: &'static str| {
        move |c: String| with(keys)(c.replace("balance_weight: 0.01", "balance_weight: 0"))
    };
    train(
        folder,
        "one",
        unbalanced("per_device_train_batch_size: 1, gradient_accumulation_steps: 8"),
    );
    train(
        folder,
        "all",
        unbalanced("per_device_train_batch_size: 8, gradient_accumulation_steps: 1"),
    );
    for key in ["loss", "grad_norm", "eval_loss"] {
        let [one, all] = ["one", "all"].map(|name| metrics(folder, name, key));
        assert!(one.len() == all.len() && one.len() >= 3, "{key}: {one:?} {all:?}");
        // A step's rounding moves the weights of the next, which norms show the most.
        let steps = if key == "grad_norm" { 1 } else { one.len() };
        for (a, b) in one.iter().zip(&all).take(steps) {
            assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{key}: {one:?} {all:?}");
        }
    }
}

/// Balance losses summed over micro-batches are those of the mean times their number.
#[test]
fn balance_losses_are_averaged_or_summed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "mean", with("balance_reduction: mean"));
    train(folder, "sum", with("balance_reduction: sum_over_microbatches"));
    let [mean, sum] = ["mean", "sum"].map(|name| metrics(folder, name, "balance_loss")[0]);
    assert!(mean > 0.0 && (sum - 2.0 * mean).abs() < 1e-9, "{mean} {sum}");
}

#[test]
fn packing_takes_fewer_batches_for_the_same_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let one = "num_train_epochs: 1, per_device_train_batch_size: 1, gradient_accumulation_steps: 1";
    let epoch = |keys: &str| {
        let keys = format!("{keys}, eval_steps: 0, save_steps: 0");
        move |c: String| with(&keys)(c).replace("max_steps: 6, ", "")
    };
    let plain = train(folder, "plain", epoch(one));
    let packed = train(folder, "packed", epoch(&format!("packing: true, {one}")));
    assert_eq!(plain["tokens"], packed["tokens"], "every sample once");
    let steps = |outcome: &Value| outcome["steps"].as_u64().unwrap();
    assert!(steps(&plain) == 36 && steps(&packed) * 2 < 36, "{} packs", steps(&packed));
    let longest = metrics(folder, "packed", "tokens").into_iter().fold(0.0, f64::max);
    assert!(longest <= 64.0, "a pack of {longest} tokens");
}

/// Routers with a multiplier of 0 stay as they were drawn; the rest learns.
#[test]
fn routers_can_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "fresh", with("max_steps: 1, warmup_ratio: 0.5"));
    train(folder, "still", with("router_lr_multiplier: 0"));
    train(folder, "half", with("router_lr_multiplier: [0, 1]"));
    let [fresh, still, half] =
        ["fresh", "still", "half"].map(|name| adapter(folder, &format!("{name}/adapter")));
    let [fresh, still, half] =
        [&fresh, &still, &half].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let mut routers = 0;
    for (name, tensor) in fresh.tensors() {
        let same = |other: &SafeTensors| other.tensor(&name).unwrap().data() == tensor.data();
        let router = name.contains("moe_gate") || name.contains("moe_downproj_x");
        routers += usize::from(router);
        if router {
            assert!(same(&still), "{name} moved");
            assert_eq!(same(&half), name.contains("moe_gate.0."), "{name}");
        }
    }
    assert!(routers > 10);
    assert_ne!(still.tensors(), fresh.tensors());
}

/// A learning rate that spoils the model: the best evaluation is an early one.
#[test]
fn early_stopping_and_the_best_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let best_of = |run: &Value| run["best_step"].as_u64().unwrap();
    // Which step is the best is chance, and another processor's chance is another.
    let spoiled = (1..20).find_map(|seed| {
        let spoiling = format!(
            "learning_rate: 0.4, max_grad_norm: 0, lr_scheduler_type: constant, warmup_ratio: 0, \
             max_steps: 12, eval_steps: 1, save_steps: 1, seed: {seed}"
        );
        let last = train(folder, "last", with(&spoiling));
        (best_of(&last) <= 8).then_some((spoiling, last))
    });
    let (spoiling, last) = spoiled.unwrap();
    assert_eq!((&last["steps"], &last["stopped_early"]), (&12.into(), &false.into()));
    let best_step = best_of(&last);
    assert_eq!(last["exported_step"], 12);

    let keys = format!("{spoiling}, load_best_model_at_end: true");
    let best = train(folder, "best", with(&keys));
    assert_eq!(best["exported_step"], best_step);
    assert_eq!(best["eval_loss_after"], best["best_eval_loss"]);
    let checkpoint = adapter(folder, &format!("best/checkpoint-{best_step}"));
    assert!(adapter(folder, "best/adapter") == checkpoint);
    assert!(adapter(folder, "last/adapter") != checkpoint);
    let manifest = folder.join("best/adapter/smore_manifest.json");
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    assert_eq!((&manifest["best_step"], &manifest["steps"]), (&best_step.into(), &12.into()));
    let report = std::fs::read_to_string(folder.join("best/report.html")).unwrap();
    assert!(report.contains(&format!("exported: step {best_step}, the best")));

    let keys = format!("{spoiling}, early_stopping_patience: 2");
    let early = train(folder, "early", with(&keys));
    let steps = early["steps"].as_u64().unwrap();
    assert!(early["stopped_early"] == true && steps < 12, "{early}");
    let losses = &metrics(folder, "early", "eval_loss")[1..];
    let (seen, waited) = losses.split_at(losses.len() - 2);
    let lowest = seen.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(waited.iter().all(|&loss| loss >= lowest), "{losses:?}");
    let keys = format!("{keys}, early_stopping_threshold: 100");
    let sooner = train(folder, "sooner", with(&keys));
    assert_eq!(sooner["steps"], 3, "the first evaluation counts, two more do not");
}

#[test]
fn what_chooses_by_held_out_loss_needs_held_out_samples() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", |c| {
        with("load_best_model_at_end: true")(c).replace("fraction: 0.1", "fraction: 0")
    });
    let said = refused(folder, &["train", "run.yaml"]);
    assert!(said.contains("nothing is held out") && said.contains("data.validation"), "{said}");
    assert!(!folder.join("run").exists());
}

/// The authors' kind of file, imported and trained.
#[test]
fn an_imported_configuration_trains() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "unused", as_is);
    std::fs::create_dir(folder.join("sets")).unwrap();
    std::fs::rename(folder.join("data.jsonl"), folder.join("sets/mine.jsonl")).unwrap();
    let info = r#"{"mine": {"file_name": "mine.jsonl"}}"#;
    std::fs::write(folder.join("sets/dataset_info.json"), info).unwrap();
    let theirs = format!(
        "model_name_or_path: {}\nstage: sft\nfinetuning_type: peft_moe\nmoe_arch: smore\n\
         moe_num_experts: [4, 4]\nmoe_num_active: [2, 2]\nmoe_expert_dims: [2, 2]\n\
         moe_gate_dims: [8]\ndataset_dir: sets\ndataset: mine\noutput_dir: run\nmax_steps: 2\n\
         cutoff_len: 64\nval_size: 0.1\nneftune_noise_alpha: 5\nper_device_train_batch_size: 2\n",
        workplace::base().display()
    );
    std::fs::write(folder.join("theirs.yaml"), theirs).unwrap();
    let args = ["import-config", "theirs.yaml", "--output", "ours.yaml"];
    let run = smore(folder, &args).assert().success();
    let said = String::from_utf8(run.get_output().stderr.clone()).unwrap();
    assert!(said.contains("neftune_noise_alpha: 5") && said.lines().count() == 1, "{said}");
    smore(folder, &["train", "ours.yaml"]).assert().success();
    assert!(folder.join("run/adapter/adapter_model.safetensors").is_file());
    assert!(refused(folder, &args).contains("ours.yaml: exists"));
    // To standard output the configuration alone.
    let run = smore(folder, &args[..2]).assert().success();
    let ours = std::fs::read(folder.join("ours.yaml")).unwrap();
    assert_eq!(run.get_output().stdout, ours);
}

/// The step, the place and the samples are named, and the batch is kept.
#[test]
fn a_loss_that_is_no_number_is_traced() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "burst", with("learning_rate: 1.0e+38, max_grad_norm: 0, eval_steps: 0"));
    write_data(folder);
    let run = smore(folder, &["train", "burst.yaml"]).assert().code(1);
    let said = String::from_utf8(run.get_output().stderr.clone()).unwrap();
    let file = std::fs::read_dir(folder.join("burst"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("not-finite-step-"))
        .unwrap();
    let kept: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let step = format!(" at step {};", kept["step"]);
    for part in [step.as_str(), "data.jsonl:", file.file_name().unwrap().to_str().unwrap()] {
        assert!(said.contains(part), "{said}");
    }
    let place = ["parameter", "block", "gradient"].map(|key| kept[key].as_str());
    let named = place.iter().flatten().next().expect("a place");
    assert!(said.contains(named), "{said}");
    let samples = kept["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 4);
    assert!(samples.iter().all(|s| s["input_ids"].as_array().unwrap().len() > 2));
}
