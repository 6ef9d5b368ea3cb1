//! `smore verify` on bases and adapters, as a user meets it who records them.

mod model_case;

use model_case::{Case, LORA, base, smore, tensor, verify, zeros};
use serde_json::json;
use smore_tune::verify::Tensors;
use std::path::Path;

const B: usize = 2;
const T: usize = 6;

/// Two sequences, the second with padding; labels are not the tokens.
fn inputs() -> Tensors {
    let ids = [5, 9, 2, 7, 7, 3, 8, 1, 4, 6, 0, 0].map(f64::from);
    let mask = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0].map(f64::from);
    let labels = [-100, -100, 2, 11, 7, 3, -100, 1, 4, 6, -100, -100].map(f64::from);
    Tensors::from([
        ("input_ids".into(), tensor(&[B, T], ids)),
        ("attention_mask".into(), tensor(&[B, T], mask)),
        ("labels".into(), tensor(&[B, T], labels)),
    ])
}

const FIXTURE: &str = "fixture.safetensors";

/// A case in which everything is recorded as we compute it.
fn recorded(adapter: &str) -> Case {
    let case = Case::new(adapter, "../base");
    let spec = &case.spec;
    let mut tensors = inputs();
    tensors.insert("logits".into(), zeros(&[B, T, spec.vocabulary]));
    for i in [0, 1, spec.blocks] {
        tensors.insert(format!("hidden.{i}"), zeros(&[B, T, spec.hidden]));
    }
    let noisy = adapter.contains("noisy");
    if noisy {
        tensors.insert("train_logits".into(), zeros(&[B, T, spec.vocabulary]));
        for k in 0..2 * 2 * spec.blocks {
            let shape: &[usize] = if k % 2 == 0 { &[B * T, 3] } else { &[B * T, 2, 3] };
            let len: usize = shape.iter().product();
            let values = (0..len).map(|i| ((i * 7 + k * 5) % 11) as f64 / 4.0 - 1.2);
            tensors.insert(format!("noise.{k}"), tensor(shape, values));
        }
    }
    for (name, param) in case.read("adapter_model.safetensors") {
        tensors.insert(format!("grad.{name}"), zeros(&param.shape));
    }
    case.write(FIXTURE, &tensors);
    case.write_json(
        "fixture.json",
        &json!({
            "seed": 7, "boundary_gap": 0.25, "n_trainable": 0,
            "train": {"loss": 0, "balance_loss": 0, "ce": 0, "grad_norm": 0},
            "eval": {"loss": 0, "balance_loss": null, "loss_num_items_in_batch_50": 0},
        }),
    );
    let computed = case.dump();
    let figure = |name: &str| computed[name].values[0];
    case.write_json(
        "fixture.json",
        &json!({
            "seed": 7, "boundary_gap": 0.25, "n_trainable": figure("n_trainable"),
            "train": {"loss": figure("train.loss"), "balance_loss": figure("train.balance_loss"),
                      "ce": figure("train.ce"), "grad_norm": figure("train.grad_norm")},
            "eval": {"loss": figure("eval.loss"), "balance_loss": null,
                     "loss_num_items_in_batch_50": figure("eval.loss_num_items_in_batch_50")},
        }),
    );
    tensors.extend(computed.into_iter().filter(|(name, _)| !name.contains("loss")));
    for figure in ["n_trainable", "train.ce", "train.grad_norm"] {
        tensors.remove(figure);
    }
    case.write(FIXTURE, &tensors);
    case
}

#[test]
fn what_we_record_passes_and_is_not_empty() {
    for adapter in [LORA.to_owned(), smore("switch"), smore("noisy_topk"), smore("dense")] {
        let case = recorded(&adapter);
        let (code, out, err) = verify(&[&case.folder, &"--tolerance", &"1e-6"]);
        assert!(code == 0 && out.starts_with("ok    case"), "{out}{err}");
        let tensors = case.read(FIXTURE);
        let inputs = ["attention_mask", "input_ids", "labels"];
        for (name, tensor) in tensors.iter().filter(|(name, _)| !inputs.contains(&&***name)) {
            // Padding is left empty, and what LoRA's A is multiplied with is not zero here.
            assert!(tensor.values.iter().any(|&x| x != 0.0), "{name}");
        }
        let width = case.spec.vocabulary;
        assert!(tensors["logits"].values[10 * width..].iter().all(|&x| x == 0.0));
        let figures = case.read_json("fixture.json");
        let number = |part: &str, key: &str| figures[part][key].as_f64().unwrap();
        let sum = number("train", "ce") + number("train", "balance_loss");
        assert!((number("train", "loss") - sum).abs() < 1e-6);
        let balanced = number("train", "balance_loss") > 0.0;
        assert_eq!(balanced, !adapter.contains("lora") && !adapter.contains("dense"));
        // Seven tokens have a label.
        let balance = number("eval", "loss") - number("eval", "loss_num_items_in_batch_50");
        let cross_entropy = balance / (1.0 - 7.0 / 50.0);
        if adapter.contains("noisy") {
            assert!((cross_entropy - number("train", "ce")).abs() > 1e-5);
            assert_ne!(tensors["train_logits"], tensors["logits"]);
        } else {
            assert!((cross_entropy - number("train", "ce")).abs() < 1e-5);
        }
    }
}

#[test]
fn one_changed_number_is_a_miss() {
    let case = recorded(&smore("switch"));
    let change = |name: &str, at: usize, by: f64| {
        case.edit(FIXTURE, |tensors| tensors.get_mut(name).unwrap().values[at] += by);
    };
    let (width, gradient) =
        (case.spec.vocabulary, "grad.base_model.model.model.layers.1.mlp.up_proj.moe_W.1");
    for (name, at, by) in [("logits", 9 * width, 1e-3), ("hidden.1", 3, 1e-3), (gradient, 2, 0.1)] {
        change(name, at, by);
        case.misses(name);
        change(name, at, -by);
    }
    let (code, out, _) = case.verify();
    assert_eq!(code, 0, "{out}");
    // What stands at padding is nobody's.
    change("logits", 10 * width, 1e3);
    assert_eq!(case.verify().0, 0);
    for (part, key) in [("train", "loss"), ("train", "grad_norm"), ("eval", "loss")] {
        let figures = case.read_json("fixture.json");
        let mut changed = figures.clone();
        changed[part][key] = json!(figures[part][key].as_f64().unwrap() * 1.001);
        case.write_json("fixture.json", &changed);
        case.misses(&format!("{part}.{key}"));
        let out = case.verify().1;
        assert!(out.contains("boundary_gap is 2.5e-1"), "{out}");
        assert_eq!(verify(&[&case.folder, &"--tolerance", &"1"]).0, 0);
        case.write_json("fixture.json", &figures);
    }
    let mut figures = case.read_json("fixture.json");
    figures["n_trainable"] = json!(figures["n_trainable"].as_f64().unwrap() + 1.0);
    case.write_json("fixture.json", &figures);
    case.misses("n_trainable (100.0% differ)");
}

#[test]
fn noise_is_taken_in_call_order() {
    let case = recorded(&smore("noisy_topk"));
    assert_eq!(case.verify().0, 0);
    // up_proj is called before gate_proj.
    case.edit(FIXTURE, |tensors| {
        let first = tensors["noise.0"].clone();
        let third = tensors.insert("noise.2".into(), first).unwrap();
        tensors.insert("noise.0".into(), third);
    });
    assert_eq!(case.verify().0, 1);
    case.edit(FIXTURE, |tensors| {
        tensors.remove("noise.3");
    });
    case.refused(&[FIXTURE, "expected 16 for each of 1 forward passes"]);
    case.edit(FIXTURE, |tensors| tensors.retain(|name, _| !name.starts_with("noise.")));
    case.refused(&[FIXTURE, "`noise.0` is missing"]);
    let lora = recorded(LORA);
    lora.edit(FIXTURE, |tensors| {
        tensors.insert("noise.0".into(), zeros(&[B * T, 3]));
    });
    lora.refused(&["no gate of this case draws noise"]);
}

/// As a script with PEFT would write it, and with the base somewhere else.
#[test]
fn a_minimal_case_is_enough() {
    let case = Case::new(LORA, base().to_str().unwrap());
    let mut tensors = inputs();
    tensors.insert("logits".into(), zeros(&[B, T, case.spec.vocabulary]));
    case.write(FIXTURE, &tensors);
    case.write_json("fixture.json", &json!({"loss": 0.0}));
    let computed = case.dump();
    assert_eq!(computed.keys().collect::<Vec<_>>(), ["logits", "loss"]);
    tensors.insert("logits".into(), computed["logits"].clone());
    tensors.insert("attentions".into(), zeros(&[1]));
    case.write(FIXTURE, &tensors);
    case.write_json("fixture.json", &json!({"loss": computed["loss"].values[0]}));
    let (code, out, _) = case.verify();
    assert_eq!(code, 0, "{out}");
    assert!(
        out.contains("\n      not compared, since nothing has this name: attentions\n"),
        "{out}"
    );
    // The whole without padding is the same as its sequences.
    case.edit(FIXTURE, |tensors| {
        for name in ["attention_mask", "labels"] {
            tensors.remove(name);
        }
        for (name, width) in [("input_ids", 1), ("logits", case.spec.vocabulary)] {
            let all = tensors[name].clone();
            let shape = [&[1, T][..], &all.shape[2..]].concat();
            tensors.insert(name.into(), tensor(&shape, all.values[..T * width].to_vec()));
        }
    });
    case.refused(&["`loss`", "no token has a label"]);
    std::fs::remove_file(case.file("fixture.json")).unwrap();
    assert_eq!(case.verify().0, 0);
}

#[test]
fn a_base_and_its_continuations() {
    let case = Case::new(LORA, "../base");
    let folder = case.folder.parent().unwrap().join("base");
    let at = |name: &str| folder.join(name);
    let long: Vec<f64> = (0..20).map(|i| f64::from(i * 7 % 50)).collect();
    let mut tensors = inputs();
    tensors.insert("long_input_ids".into(), tensor(&[2, 10], long.clone()));
    tensors.insert("long_logits_last3".into(), zeros(&[2, 3, case.spec.vocabulary]));
    tensors.insert("inv_freq".into(), zeros(&[case.spec.head_dim / 2]));
    let save =
        |tensors: &Tensors| smore_tune::verify::write_tensors(tensors, &at(FIXTURE)).unwrap();
    save(&tensors);
    std::fs::write(at("fixture.json"), r#"{"loss": 1}"#).unwrap();
    let greedy = json!({"prompt": [5, 9], "greedy": {
        "use_cache": [5, 9, 0, 0, 0], "no_cache": [5, 9, 0, 0, 0]}});
    std::fs::write(at("generate.json"), greedy.to_string()).unwrap();
    let out = case.file("dump");
    assert_eq!(verify(&[&folder, &"--dump", &out]).0, 1);
    let computed = smore_tune::verify::read_tensors(&out).unwrap();
    let frequencies = &computed["inv_freq"].values;
    assert!(frequencies[0] == 1.0 && frequencies.windows(2).all(|w| w[0] > w[1]));
    assert_eq!(computed["generate.use_cache"], computed["generate.no_cache"]);
    assert_eq!(computed["generate.use_cache"].values[..2], [5.0, 9.0]);
    tensors.extend(computed.clone().into_iter().filter(|(name, _)| !name.starts_with("generate")));
    // The last of the long logits, asked for as logits.
    tensors.insert("input_ids".into(), tensor(&[2, 10], long));
    let mut logits = zeros(&[2, 10, case.spec.vocabulary]);
    let last = &computed["long_logits_last3"].values;
    for (sequence, from) in
        logits.values.chunks_mut(10 * case.spec.vocabulary).zip(last.chunks(last.len() / 2))
    {
        let start = sequence.len() - from.len();
        sequence[start..].copy_from_slice(from);
    }
    let computed_ids = &computed["generate.use_cache"].values;
    let greedy = json!({"prompt": [5, 9], "greedy": {"use_cache": computed_ids.iter().map(|&x| x as u32).collect::<Vec<_>>()}});
    std::fs::write(at("generate.json"), greedy.to_string()).unwrap();
    tensors.remove("loss");
    for name in ["attention_mask", "labels"] {
        tensors.remove(name);
    }
    tensors.insert("attention_mask".into(), tensor(&[2, 10], vec![1.0; 20]));
    std::fs::remove_file(at("fixture.json")).unwrap();
    save(&tensors);
    let (code, text, err) = verify(&[&folder]);
    assert!(code == 0 && text.starts_with("ok    base "), "{text}{err}");
    tensors.insert("logits".into(), logits);
    save(&tensors);
    verify(&[&folder, &"--dump", &out]);
    let whole = smore_tune::verify::read_tensors(&out).unwrap().remove("logits").unwrap();
    let sequence = 10 * case.spec.vocabulary;
    let tail = &whole.values[sequence - 3 * case.spec.vocabulary..sequence];
    assert_eq!(tail, &last[..last.len() / 2]);
    let other = json!({"prompt": [9, 5], "greedy": {"use_cache": computed_ids}});
    std::fs::write(at("generate.json"), other.to_string()).unwrap();
    let (code, _, err) = verify(&[&folder]);
    assert!(code == 2 && err.contains("generate.json"), "{err}");
}

#[test]
fn broken_cases_are_refused_with_their_reason() {
    let good = recorded(&smore("switch"));
    let tensors = good.read(FIXTURE);
    let with = |name: &str, change: &dyn Fn(&mut Vec<f64>)| {
        let mut changed = tensors.clone();
        change(&mut changed.get_mut(name).unwrap().values);
        good.write(FIXTURE, &changed);
    };
    with("attention_mask", &|m| m[0] = 0.0);
    good.refused(&[FIXTURE, "`attention_mask` has 0 at row 0, position 0", "padded on the right"]);
    with("attention_mask", &|m| m[8] = 0.0);
    good.refused(&["`attention_mask` has 1 at row 1, position 3"]);
    with("labels", &|l| l[11] = 4.0);
    good.refused(&["`labels` has 4 at row 1, position 5", "-100"]);
    with("labels", &|l| l[2] = -1.0);
    good.refused(&["`labels` has -1 at row 0, position 2"]);
    with("input_ids", &|ids| ids[1] = 1e6);
    good.refused(&["`input_ids` has 1000000 at row 0, position 1", "expected a token below"]);
    let without = |name: &str| {
        let mut changed = tensors.clone();
        let removed = changed.remove(name).unwrap();
        good.write(FIXTURE, &changed);
        removed
    };
    without("input_ids");
    good.refused(&[FIXTURE, "tensor `input_ids` is missing"]);
    let mut misshaped = tensors.clone();
    misshaped.get_mut("logits").unwrap().shape.swap(0, 1);
    good.write(FIXTURE, &misshaped);
    good.refused(&["`logits` has shape [6, 2,", "expected [2, 6,"]);
    let mut strange = tensors.clone();
    strange.insert("grad.moe_X".into(), zeros(&[2]));
    good.write(FIXTURE, &strange);
    good.refused(&["`grad.moe_X`", "no parameter"]);
    let mut deep = tensors.clone();
    deep.insert("hidden.99".into(), zeros(&[2]));
    good.write(FIXTURE, &deep);
    good.refused(&["`hidden.99`", "blocks"]);
    good.write(FIXTURE, &tensors);
    good.write_json("fixture.json", &json!({"train": {"loss": "low"}}));
    good.refused(&["fixture.json", "`train.loss`"]);
    good.write_json("fixture.json", &json!({}));
    assert_eq!(good.verify().0, 0);
    let bytes = std::fs::read(good.file(FIXTURE)).unwrap();
    std::fs::write(good.file(FIXTURE), &bytes[..bytes.len() / 2]).unwrap();
    good.refused(&[FIXTURE, "no whole safetensors file"]);
    std::fs::remove_file(good.file(FIXTURE)).unwrap();
    good.refused(&[FIXTURE, "not found"]);
    let astray = Case::new(LORA, "../elsewhere");
    astray.write(FIXTURE, &inputs());
    astray.refused(&["../elsewhere", "`base_model_name_or_path` in", "relative to the case"]);
    std::fs::remove_file(astray.file("adapter_model.safetensors")).unwrap();
    std::fs::rename(
        astray.folder.with_file_name("base"),
        astray.folder.with_file_name("elsewhere"),
    )
    .unwrap();
    astray.refused(&["adapter_model.safetensors"]);
}

/// A recorded balance loss of evaluation that counts padding cannot be had without padding.
#[test]
fn a_balance_loss_over_padding_is_set_apart_and_said() {
    let case = recorded(&smore("switch"));
    let figures = case.read_json("fixture.json");
    let mut other = figures.clone();
    let number = |part: &str, key: &str| figures[part][key].as_f64().unwrap();
    let balance = number("train", "balance_loss") + 0.01;
    other["eval"]["balance_loss"] = json!(balance);
    case.write_json("fixture.json", &other);
    // The loss is the cross-entropy and this balance loss, so it cannot be what it was.
    case.misses("eval.loss");
    other["eval"]["loss"] = json!(number("eval", "loss") + 0.01);
    let items = number("eval", "loss_num_items_in_batch_50") + 0.01;
    other["eval"]["loss_num_items_in_batch_50"] = json!(items);
    case.write_json("fixture.json", &other);
    let (code, out, _) = case.verify();
    assert!(code == 0 && out.contains("not compared: eval.balance_loss"), "{out}");
    // Without padding there is no excuse.
    case.edit(FIXTURE, |tensors| {
        tensors.retain(|name, _| ["input_ids", "labels"].contains(&name.as_str()));
    });
    let out = case.verify().1;
    assert!(out.starts_with("MISS ") && !out.contains("not compared: eval"), "{out}");
}

#[test]
fn all_kinds_are_found_below_a_folder() {
    let case = recorded(LORA);
    let root = case.folder.parent().unwrap();
    let layer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-tune/tests/fixtures/layer");
    let name = "g1_switch_s4-4_f2-2_r4-8";
    for folder in ["layer", ".hidden"] {
        std::fs::create_dir(root.join(folder)).unwrap();
        for ending in ["json", "safetensors"] {
            let file = format!("{name}.{ending}");
            std::fs::copy(layer.join(&file), root.join(folder).join(&file)).unwrap();
        }
    }
    let (code, out, err) = verify(&[&root]);
    assert_eq!(code, 0, "{out}{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines.len() == 3 && lines[0].starts_with("ok    case "), "{out}");
    assert!(lines[1].contains(name) && lines[2] == "2 passed, 0 failed", "{out}");
    // A file of a case stands for it.
    let (code, out, _) = verify(&[&case.file("fixture.json"), &"--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(code == 0 && json["cases"][0]["name"] == "case", "{out}");
    let checks = json["cases"][0]["checks"].as_array().unwrap();
    let gradients = checks.iter().filter(|c| c["kind"] == "gradient").count();
    assert_eq!(gradients, case.read("adapter_model.safetensors").len() + 1);
}
