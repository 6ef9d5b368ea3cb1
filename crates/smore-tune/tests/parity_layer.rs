//! Recorded layer cases of the authors' code. Six lie in this project; the whole set is in the
//! folder that `SMORE_SHARED` names. And what is said to cases that are broken.

// Which case is how far off, with `--nocapture`.
#![allow(clippy::print_stdout)]

use smore_tune::error::{Error, Result};
use smore_tune::verify::{
    CaseReport, Kind, LayerCase, Precision, Tensors, Tolerance, find_cases, layer_case,
    read_tensors, write_tensors,
};
use std::path::{Path, PathBuf};

fn own_cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layer")
}

/// Every case of a folder within its precision's tolerance; the number of cases per precision.
fn check(folder: &Path) -> [usize; 4] {
    let (mut failed, mut counts) = (0, [0; 4]);
    for path in find_cases(folder).unwrap() {
        let precision = LayerCase::open(&path).unwrap().precision;
        let report = layer_case::<f32>(&path, None).unwrap();
        let worst = report.worst().unwrap();
        let verdict = if report.passed() { "ok" } else { "MISS" };
        println!("{verdict:4} {:50} {:e} {}", report.name, worst.error, worst.tensor);
        failed += usize::from(!report.passed());
        let place = match precision {
            Precision::F32 => 0,
            Precision::Bf16 => 1,
            Precision::Mixed => 2,
            Precision::Autocast => 3,
        };
        counts[place] += 1;
    }
    assert_eq!(failed, 0, "cases failed");
    counts
}

#[test]
fn cases_in_the_project() {
    assert_eq!(check(&own_cases()), [4, 1, 1, 0]);
}

/// Run by `cargo xtask parity`, which sets `SMORE_SHARED`.
#[test]
fn every_case_that_was_recorded() {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return };
    let counts = check(&Path::new(&shared).join("fixtures/layer"));
    assert!(counts.iter().all(|&n| n > 0), "a precision is missing: {counts:?}");
}

/// The plain switch gate, held to half of what other cases are allowed.
#[test]
fn the_switch_gate_is_closer_still() {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return };
    let tight = Tolerance { values: 1e-5, gradients: 1e-4, handed_on: None };
    let mut checked = 0;
    for path in find_cases(&Path::new(&shared).join("fixtures/layer")).unwrap() {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("g1_switch")) {
            let report = layer_case::<f32>(&path, Some(tight)).unwrap();
            assert!(report.passed(), "{}: {:?}", report.name, report.worst());
            checked += 1;
        }
    }
    assert!(checked >= 11, "only {checked} cases");
}

#[test]
fn a_case_in_f64_agrees_better_than_rounding_allows_in_f32() {
    let path = own_cases().join("g1_switch_s4-4_f2-2_r4-8.json");
    let tight = Tolerance { values: 5e-6, gradients: 5e-5, handed_on: None };
    assert!(layer_case::<f64>(&path, Some(tight)).unwrap().passed());
}

/// The files of a case in a folder of its own.
struct Copy {
    folder: tempfile::TempDir,
    settings: serde_json::Value,
    tensors: Tensors,
}

impl Copy {
    fn of(name: &str) -> Self {
        let from = own_cases().join(name);
        let text = std::fs::read_to_string(from.with_extension("json")).unwrap();
        Self {
            folder: tempfile::tempdir().unwrap(),
            settings: serde_json::from_str(&text).unwrap(),
            tensors: read_tensors(&from.with_extension("safetensors")).unwrap(),
        }
    }

    fn json(&self) -> PathBuf {
        self.folder.path().join("case.json")
    }

    fn tensor_file(&self) -> PathBuf {
        self.folder.path().join("case.safetensors")
    }

    fn run(&self) -> Result<CaseReport> {
        std::fs::write(self.json(), self.settings.to_string()).unwrap();
        write_tensors(&self.tensors, &self.tensor_file()).unwrap();
        layer_case::<f32>(&self.json(), None)
    }

    /// What a case that cannot be read says, after the name of the file.
    fn complaint(&self, file: &str) -> String {
        let error = self.run().expect_err("the case is broken");
        assert_eq!(error.exit_code(), 2, "{error}");
        let text = error.to_string();
        assert!(text.contains(file), "no file named: {text}");
        text
    }
}

#[test]
fn what_the_computation_needs_is_asked_for_by_name() {
    for name in ["g7_mixed_noisytrain_L2.json", "g7_bf16_switch_L2.json"] {
        let names: Vec<String> = Copy::of(name).tensors.keys().cloned().collect();
        for tensor in names {
            let mut copy = Copy::of(name);
            copy.tensors.remove(&tensor);
            let input = ["x", "g", "base.weight", "attention_mask"].contains(&tensor.as_str());
            if input || tensor.starts_with("param.") || tensor.starts_with("noise.") {
                assert!(copy.complaint("case.safetensors").contains(&format!("`{tensor}`")));
            } else {
                // Not recorded, not compared.
                let report = copy.run().unwrap();
                assert!(report.passed() && report.checks.iter().all(|c| c.tensor != tensor));
            }
        }
    }
}

#[test]
fn every_recorded_number_is_compared() {
    let name = "g7_mixed_noisytrain_L2.json";
    for (tensor, recorded) in Copy::of(name).tensors {
        let kept = ["x", "g", "base.weight"].contains(&tensor.as_str());
        if kept || tensor.starts_with("param.") || tensor.starts_with("noise.") {
            continue;
        }
        let mut copy = Copy::of(name);
        let top = recorded.values.iter().fold(1e-4, |top: f64, x| top.max(x.abs()));
        // Losses are measured against the size of their terms.
        let change = if tensor.starts_with("loss") { 10.0 } else { 0.5 };
        let spoilt = copy.tensors.get_mut(&tensor).unwrap().values.last_mut().unwrap();
        *spoilt =
            if tensor.starts_with("topk_idx") { 3.0 - *spoilt } else { *spoilt + top * change };
        let report = copy.run().unwrap();
        let missed: Vec<_> = report.checks.iter().filter(|c| !c.passed()).collect();
        assert!(!report.passed() && report.worst().unwrap().tensor == tensor, "{tensor}");
        assert_eq!(missed.len(), 1, "{tensor}: {missed:?}");
    }
}

#[test]
fn shapes_are_checked() {
    let name = "g7_mixed_noisytrain_L2.json";
    for tensor in Copy::of(name).tensors.into_keys() {
        let mut copy = Copy::of(name);
        let spoilt = copy.tensors.get_mut(&tensor).unwrap();
        spoilt.values.extend(spoilt.values.clone());
        spoilt.shape = [&[2], &spoilt.shape[..]].concat();
        // Any number of tokens is good, but then there must be as many of everything.
        let named = if tensor == "x" { "`g`".into() } else { format!("`{tensor}`") };
        let complaint = copy.complaint("case.safetensors");
        assert!(complaint.contains(&named) && complaint.contains("expected ["), "{complaint}");
    }
}

#[test]
fn settings_are_checked() {
    let spoil = |key: &str, value: serde_json::Value| {
        let mut copy = Copy::of("g1_switch_s4-4_f2-2_r4-8.json");
        let target = match key.strip_prefix("config.") {
            Some(key) => &mut copy.settings["config"][key],
            None => &mut copy.settings[key],
        };
        *target = value;
        copy
    };
    for (key, value, says) in [
        ("config.gate_type", "loud".into(), "unknown variant `loud`"),
        ("config.gate_type", "noisy_topk".into(), "weight_noise"),
        ("config.expert_act_fn", "prelu".into(), "no slope"),
        ("config.f", vec![5, 2].into(), "fanout is 5"),
        ("config.f", vec![2].into(), "config.f has 1 entries"),
        ("config.r", vec![4, 0].into(), "rank is 0"),
        ("config.s", vec![1u64 << 40, 4].into(), "experts is 1099511627776"),
        ("config.d_g", vec![16, 16, 16].into(), "3 router widths"),
        ("config.lora_alpha", vec![1.0].into(), "lora_alpha has 1 entries"),
        ("config.is_shared_expert_pool", true.into(), "shared_pool needs equal layers"),
        ("d_in", 0.into(), "d_in"),
        ("d_in", (1u64 << 60).into(), "parameters"),
        ("d_out", (-1).into(), "invalid value"),
        ("dtype", "f8".into(), "unknown variant `f8`"),
        ("base_bias", true.into(), "`base.bias` is missing"),
    ] {
        let complaint = spoil(key, value).complaint("case.");
        assert!(complaint.contains(says), "{key}: {complaint}");
    }
    let complaint = spoil("config.activation_position", "above".into()).complaint("case.json");
    assert!(complaint.contains("activation_position"), "{complaint}");
    // Another activation has other parameters than those in the file.
    let mut copy = Copy::of("g3_switch_L2_prelu_child.json");
    copy.settings["config"]["expert_act_fn"] = "tanh".into();
    assert!(copy.complaint("case.safetensors").contains("no parameter `moe_expert_act_param.0`"));
    // A shared pool is stored once per layer, each time the same.
    let mut copy = Copy::of("g3_switch_L2_prelu_child.json");
    copy.tensors.get_mut("param.moe_B.1").unwrap().values[0] += 1.0;
    assert!(copy.complaint("case.safetensors").contains("no copy of `param.moe_B.0`"));
}

#[test]
fn files_cut_anywhere_are_refused() {
    let copy = Copy::of("g7_bf16_switch_L2.json");
    assert!(copy.run().unwrap().passed());
    for file in [copy.json(), copy.tensor_file()] {
        let whole = std::fs::read(&file).unwrap();
        for part in 0..40 {
            std::fs::write(&file, &whole[..part * whole.len() / 40]).unwrap();
            let error = layer_case::<f32>(&copy.json(), None).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            let named = error.to_string().contains(&*file.file_name().unwrap().to_string_lossy());
            assert!(named, "{error}");
        }
        std::fs::write(&file, &whole).unwrap();
    }
    std::fs::remove_file(copy.tensor_file()).unwrap();
    let error = layer_case::<f32>(&copy.json(), None).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
}

#[test]
fn a_number_that_is_none_is_a_miss() {
    for (tensor, value) in [("y", f64::NAN), ("param.moe_A.0", f64::NAN), ("y", f64::INFINITY)] {
        let mut copy = Copy::of("g1_switch_s4_f2_r8.json");
        copy.tensors.get_mut(tensor).unwrap().values[0] = value;
        let report = copy.run().unwrap();
        assert!(!report.passed(), "{tensor} {value}");
        assert!(report.largest(Kind::Value).unwrap().is_nan(), "{tensor} {value}");
    }
}

#[test]
fn a_case_without_results_fails() {
    let mut copy = Copy::of("g1_switch_s4_f2_r8.json");
    let inputs = ["x", "base.weight", "attention_mask"];
    copy.tensors.retain(|name, _| name.starts_with("param.") || inputs.contains(&name.as_str()));
    let report = copy.run().unwrap();
    assert!(report.checks.is_empty() && !report.passed());
}

#[test]
fn a_folder_names_its_cases() {
    assert_eq!(find_cases(&own_cases()).unwrap().len(), 6);
    let empty = tempfile::tempdir().unwrap();
    std::fs::write(empty.path().join("alone.json"), "{}").unwrap();
    assert!(find_cases(empty.path()).unwrap_err().to_string().contains("no case here"));
    assert!(find_cases(&empty.path().join("nowhere.json")).is_err());
    assert!(find_cases(&own_cases().join("g1_switch_s4_f2_r8.safetensors")).is_err());
}
