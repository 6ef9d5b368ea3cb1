//! `smore verify` on recorded training runs.

mod model_case;

use model_case::{Case, LORA, smore, tensor, verify, zeros};
use serde_json::{Value, json};
use smore_tune::verify::Tensors;

const BATCHES: &str = "batches.safetensors";
const FINAL: &str = "final_adapter.safetensors";

/// `n` micro-batches of two sequences each.
fn batches(n: usize) -> Tensors {
    let (mut ids, mut mask, mut labels) = (vec![], vec![], vec![]);
    for row in 0..2 * n {
        for i in 0..5 {
            let valid = i < 3 + row % 3;
            ids.push(if valid { ((row * 13 + i * 5) % 40) as f64 } else { 0.0 });
            mask.push(f64::from(valid));
            labels.push(if valid && i > 0 { ids[ids.len() - 1] } else { -100.0 });
        }
    }
    let all = [("input_ids", ids), ("attention_mask", mask), ("labels", labels)];
    all.into_iter().map(|(name, values)| (name.to_owned(), tensor(&[n, 2, 5], values))).collect()
}

/// A run of 4 steps with these settings, as we compute it.
fn recorded(adapter: &str, settings: &Value) -> Case {
    let case = Case::new(adapter, "../base");
    let accumulated = settings["grad_accum"].as_u64().unwrap_or(1) as usize;
    let mut tensors = batches(4 * accumulated);
    if adapter.contains("noisy") {
        for k in 0..4 * accumulated * 4 * case.spec.blocks {
            let shape: &[usize] = if k % 2 == 0 { &[10, 3] } else { &[10, 2, 3] };
            let len: usize = shape.iter().product();
            let values = (0..len).map(|i| ((i * 7 + k * 5) % 11) as f64 / 4.0 - 1.2);
            tensors.insert(format!("noise.{k}"), tensor(shape, values));
        }
    }
    case.write(BATCHES, &tensors);
    let start = case.read("adapter_model.safetensors");
    case.write(FINAL, &start.iter().map(|(k, t)| (k.clone(), zeros(&t.shape))).collect());
    let mut traj = settings.clone();
    traj["steps"] = json!(4);
    // Of sum, mean and last the sum is nearest to this.
    let step =
        json!({"loss": 1e3, "balance_loss": 1e3, "grad_norm": 0, "lr": 0, "boundary_gap": 0.5});
    traj["float32"] = json!([step, step, step, step]);
    case.write_json("traj.json", &traj);
    record(&case);
    case
}

/// Takes over what is computed.
fn record(case: &Case) {
    let computed = case.dump();
    let last =
        computed.iter().filter_map(|(k, t)| Some((k.strip_prefix("final.")?.into(), t.clone())));
    case.write(FINAL, &last.collect());
    let mut traj = case.read_json("traj.json");
    for step in 1..=4 {
        for figure in ["loss", "balance_loss", "grad_norm", "lr"] {
            traj["float32"][step - 1][figure] =
                json!(computed[&format!("{figure}.{step}")].values[0]);
        }
    }
    case.write_json("traj.json", &traj);
}

fn with(case: &Case, key: &str, value: Value) -> Value {
    let mut traj = case.read_json("traj.json");
    traj[key] = value;
    traj
}

#[test]
fn what_we_record_passes_and_learns() {
    for adapter in [LORA.to_owned(), smore("switch"), smore("noisy_topk")] {
        let case = recorded(&adapter, &json!({"lr": 0.01}));
        let (code, out, err) = verify(&[&case.folder, &"--tolerance", &"1e-6"]);
        assert!(code == 0 && out.starts_with("ok    case  values"), "{out}{err}");
        assert!(out.contains("parameters "), "{out}");
        let start = case.read("adapter_model.safetensors");
        assert!(case.read(FINAL).iter().all(|(name, last)| *last != start[name]));
    }
}

#[test]
fn one_changed_number_is_a_miss() {
    let case = recorded(&smore("switch"), &json!({"lr": 0.01}));
    let traj = case.read_json("traj.json");
    for figure in ["loss", "balance_loss", "grad_norm", "lr"] {
        let mut changed = traj.clone();
        let value = traj["float32"][2][figure].as_f64().unwrap();
        changed["float32"][2][figure] = json!(value * 1.002);
        case.write_json("traj.json", &changed);
        case.misses(&format!("{figure}.3"));
        assert!(case.verify().1.contains("boundary_gap is 5.0e-1"));
        assert_eq!(verify(&[&case.folder, &"--tolerance", &"1"]).0, 0);
    }
    case.write_json("traj.json", &traj);
    let name = "base_model.model.model.layers.1.mlp.up_proj.moe_W.1";
    case.edit(FINAL, |tensors| tensors.get_mut(name).unwrap().values[0] += 0.02);
    case.misses(&format!("final.{name}"));
    // A little everywhere is too much.
    case.edit(FINAL, |tensors| {
        tensors.get_mut(name).unwrap().values[0] -= 0.02;
        tensors.values_mut().flat_map(|t| &mut t.values).for_each(|x| *x += 5e-4);
    });
    case.misses("final (root mean square)");
    // What is absent is not compared.
    std::fs::remove_file(case.file(FINAL)).unwrap();
    case.write_json(
        "traj.json",
        &json!({"lr": 0.01, "steps": 4, "float32": [
        {"loss": traj["float32"][0]["loss"]}, {}, {}, {}]}),
    );
    let (code, out, _) = case.verify();
    assert!(code == 0 && !out.contains("parameters"), "{out}");
}

/// Every setting of the optimizer changes the run.
#[test]
fn settings_are_followed() {
    let case = recorded(LORA, &json!({"lr": 0.01}));
    let traj = case.read_json("traj.json");
    for (key, value) in [
        ("lr", json!(0.02)),
        ("betas", json!([0.5, 0.999])),
        ("betas", json!([0.9, 0.9])),
        ("eps", json!(0.01)),
        ("weight_decay", json!(0.5)),
        ("cosine_warmup_steps", json!(0)),
    ] {
        case.write_json("traj.json", &with(&case, key, value));
        assert_eq!(case.verify().0, 1, "{key}");
        case.write_json("traj.json", &traj);
    }
    // AdamW does not see the gradient's length unless it changes from step to step.
    let norm = traj["float32"][0]["grad_norm"].as_f64().unwrap();
    case.write_json("traj.json", &with(&case, "clip_grad_norm", json!(norm * 0.01)));
    assert_eq!(case.verify().0, 1);
    case.write_json("traj.json", &with(&case, "clip_grad_norm", json!(norm * 100.0)));
    assert_eq!(case.verify().0, 0);
    let defaults =
        [("betas", json!([0.9, 0.999])), ("eps", json!(1e-8)), ("weight_decay", json!(0))];
    for (key, value) in defaults.into_iter().chain([("clip_grad_norm", Value::Null)]) {
        case.write_json("traj.json", &with(&case, key, value));
    }
    assert_eq!(case.verify().0, 0);
    // A warm-up of two of four steps, then half a cosine.
    let case = recorded(LORA, &json!({"lr": 0.01, "cosine_warmup_steps": 2}));
    let rates: Vec<f64> = (0..4)
        .map(|step| case.read_json("traj.json")["float32"][step]["lr"].as_f64().unwrap())
        .collect();
    for (rate, expected) in rates.iter().zip([0.0, 0.005, 0.01, 0.005]) {
        assert!((rate - expected).abs() < 1e-8, "{rates:?}");
    }
}

/// Two micro-batches are one of both, but for their balance losses.
#[test]
fn accumulation_divides_by_the_windows_labels() {
    let case = recorded(LORA, &json!({"lr": 0.01, "grad_accum": 2}));
    case.edit(BATCHES, |tensors| {
        for tensor in tensors.values_mut() {
            tensor.shape = vec![4, 4, 5];
        }
    });
    case.write_json("traj.json", &with(&case, "grad_accum", json!(1)));
    let (code, out, err) = case.verify();
    assert_eq!(code, 0, "{out}{err}");
    let case = recorded(&smore("switch"), &json!({"lr": 0.01, "grad_accum": 2}));
    let traj = case.read_json("traj.json");
    assert_eq!(case.verify().0, 0);
    // The mean of two is half their sum, in the loss as well; but not in one step only.
    let halved = |steps: std::ops::Range<usize>| {
        let mut traj = traj.clone();
        for step in steps {
            let of = &mut traj["float32"][step];
            let half = of["balance_loss"].as_f64().unwrap() / 2.0;
            of["balance_loss"] = json!(half);
            of["loss"] = json!(of["loss"].as_f64().unwrap() - half);
        }
        case.write_json("traj.json", &traj);
    };
    halved(0..4);
    let (code, out, _) = case.verify();
    assert!(code == 0 && out.contains("loss was recorded with the balance losses' mean"), "{out}");
    halved(0..3);
    case.misses("");
    halved(3..4);
    case.misses("");
}

#[test]
fn noise_may_be_named_in_three_ways() {
    let case = recorded(&smore("noisy_topk"), &json!({"lr": 0.01}));
    let calls = 4 * case.spec.blocks;
    let tensors = case.read(BATCHES);
    let number = |name: &str| name.strip_prefix("noise.").map(|k| k.parse::<usize>().unwrap());
    let mut by_step = tensors.clone();
    by_step.retain(|name, _| number(name).is_none());
    let mut stacked = by_step.clone();
    for k in 0..4 * calls {
        let noise = &tensors[&format!("noise.{k}")];
        by_step.insert(format!("noise.{}.{}", k / calls + 1, k % calls), noise.clone());
        let stack = stacked.entry(format!("noise.{}", k % calls)).or_insert_with(|| {
            let shape = [&[0], &noise.shape[..]].concat();
            tensor(&shape, [])
        });
        stack.shape[0] += 1;
        stack.values.extend(&noise.values);
    }
    for tensors in [by_step, stacked] {
        case.write(BATCHES, &tensors);
        let (code, out, err) = case.verify();
        assert_eq!(code, 0, "{out}{err}");
    }
    case.edit(BATCHES, |tensors| tensors.get_mut("noise.0").unwrap().values.reverse());
    assert_eq!(case.verify().0, 1);
    let mut apart = case.read(BATCHES);
    let noise = apart.split_off("noise");
    case.write(BATCHES, &apart);
    case.refused(&["`noise.0` is missing"]);
    case.write("noise.safetensors", &noise);
    assert_eq!(case.verify().0, 1);
}

#[test]
fn broken_runs_are_refused_with_their_reason() {
    let case = recorded(LORA, &json!({"lr": 0.01}));
    let traj = case.read_json("traj.json");
    for (key, value, reason) in [
        ("lr", Value::Null, "traj.json"),
        ("steps", json!(5), "`steps` is 5"),
        ("grad_accum", json!(0), "`grad_accum` is 0"),
        ("grad_accum", json!(2), "expected [8, B, T]"),
        ("grad_accum", json!(u64::MAX / 2), "expected ["),
    ] {
        case.write_json("traj.json", &with(&case, key, value));
        case.refused(&[reason]);
        case.write_json("traj.json", &traj);
    }
    let good = case.read(BATCHES);
    case.edit(BATCHES, |tensors| {
        tensors.get_mut("labels").unwrap().values[10..20].fill(-100.0);
    });
    case.refused(&["no token has a label to predict in step 2"]);
    case.write(BATCHES, &good);
    case.edit(FINAL, |tensors| {
        tensors.pop_first();
    });
    case.refused(&[FINAL, "no tensor"]);
    std::fs::remove_file(case.file(BATCHES)).unwrap();
    case.refused(&[BATCHES, "not found"]);
}
