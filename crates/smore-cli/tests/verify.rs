//! `smore verify` as a user meets it: verdicts, exit codes and dumps.

use assert_cmd::Command;
use smore_tune::verify::{read_tensors, write_tensors};
use std::path::{Path, PathBuf};

const CASE: &str = "g1_switch_s4-4_f2-2_r4-8";

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-tune/tests/fixtures/layer")
}

/// Runs the program; exit code, standard output, standard error.
fn verify(args: &[&dyn AsRef<std::ffi::OsStr>]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("smore").unwrap();
    command.arg("verify");
    for arg in args {
        command.arg(arg);
    }
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A copy of a case, whose `change`d tensor file no longer fits.
fn spoilt(folder: &Path, change: impl Fn(&Path)) -> PathBuf {
    for ending in ["json", "safetensors"] {
        let name = format!("{CASE}.{ending}");
        std::fs::copy(cases().join(&name), folder.join(&name)).unwrap();
    }
    change(&folder.join(format!("{CASE}.safetensors")));
    folder.join(format!("{CASE}.json"))
}

fn change_one_gradient(file: &Path) {
    let mut tensors = read_tensors(file).unwrap();
    let gradient = tensors.get_mut("grad.moe_W.1").unwrap();
    gradient.values[7] += 1.0;
    write_tensors(&tensors, file).unwrap();
}

#[test]
fn recorded_cases_pass() {
    let (code, out, _) = verify(&[&cases()]);
    assert_eq!(code, 0, "{out}");
    assert_eq!(out.lines().count(), 7);
    assert!(out.ends_with("6 passed, 0 failed\n"), "{out}");
    assert!(out.lines().take(6).all(|line| line.starts_with("ok ")), "{out}");
    let (code, out, _) = verify(&[&cases().join(format!("{CASE}.json")), &"--device", &"cpu"]);
    assert!(code == 0 && out.contains(CASE) && out.ends_with("1 passed, 0 failed\n"), "{out}");
}

#[test]
fn a_miss_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let case = spoilt(dir.path(), change_one_gradient);
    let (code, out, _) = verify(&[&case]);
    assert_eq!(code, 1);
    assert!(out.starts_with("MISS ") && out.contains("worst grad.moe_W.1"), "{out}");
    assert!(out.ends_with("0 passed, 1 failed\n"), "{out}");
    let (code, out, _) = verify(&[&cases(), &case]);
    assert!(code == 1 && out.ends_with("6 passed, 1 failed\n"), "{out}");
    // The tolerance is what decides.
    assert_eq!(verify(&[&case, &"--tolerance", &"1e3"]).0, 0);
    assert_eq!(verify(&[&cases(), &"--tolerance", &"1e-12"]).0, 1);
}

#[test]
fn what_cannot_be_read_is_named_and_the_others_still_run() {
    let dir = tempfile::tempdir().unwrap();
    let case = spoilt(dir.path(), |file| {
        let bytes = std::fs::read(file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    });
    let (code, out, err) = verify(&[&case, &cases()]);
    assert_eq!(code, 2);
    assert!(out.ends_with("6 passed, 0 failed, 1 unreadable\n"), "{out}");
    assert!(err.contains(&format!("{CASE}.safetensors")), "{err}");
    std::fs::remove_file(case.with_extension("safetensors")).unwrap();
    assert_eq!(verify(&[&case]).0, 2);
    let (code, _, err) = verify(&[&dir.path()]);
    assert!(code == 2 && err.contains("no case here"), "{err}");
    assert_eq!(verify(&[&dir.path().join("nowhere.json")]).0, 2);
}

#[test]
fn arguments_are_checked() {
    let folder = cases();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let (code, _, err) = verify(&[&folder, &"--dump", &out]);
    assert!(code == 2 && err.contains("exactly one case") && !out.exists(), "{err}");
    for (option, value) in [("--tolerance", "0"), ("--tolerance", "nan"), ("--device", "abacus")] {
        assert_eq!(verify(&[&folder, &option, &value]).0, 2, "{option} {value}");
    }
    assert_eq!(verify(&[]).0, 2);
    let case = folder.join(format!("{CASE}.json"));
    assert_eq!(verify(&[&case, &"--dump", &dir.path().join("no/folder")]).0, 2);
}

#[test]
fn a_dump_holds_what_was_recorded_in_its_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let miss = spoilt(dir.path(), change_one_gradient);
    let paths = std::fs::read_dir(cases()).unwrap().map(|entry| entry.unwrap().path());
    for case in paths.filter(|p| p.extension().is_some_and(|e| e == "json")).chain([miss]) {
        verify(&[&case, &"--dump", &out]);
        let recorded = read_tensors(&case.with_extension("safetensors")).unwrap();
        let computed = read_tensors(&out).unwrap();
        let inputs = ["x", "g", "attention_mask"];
        for (name, tensor) in &recorded {
            let input = ["param.", "base.", "noise."].iter().any(|p| name.starts_with(p));
            let dumped = computed.get(name);
            if input || inputs.contains(&name.as_str()) {
                assert!(dumped.is_none(), "{name} was not computed");
            } else {
                assert_eq!(dumped.expect(name).shape, tensor.shape, "{name}");
            }
            if name.starts_with("topk_idx.") {
                assert_eq!(dumped, Some(tensor));
            }
        }
        let error = (recorded["y"].values[0] - computed["y"].values[0]).abs();
        assert!(error < 0.05, "{error}");
    }
    let header = String::from_utf8_lossy(&std::fs::read(&out).unwrap()).into_owned();
    assert!(header.contains("\"topk_idx.0\":{\"dtype\":\"I64\""));
    assert!(header.contains("\"y\":{\"dtype\":\"F32\""));
    // What was written can be checked like a recording.
    let again = dir.path().join("again");
    std::fs::create_dir(&again).unwrap();
    let case = spoilt(&again, |file| {
        let mut tensors = read_tensors(file).unwrap();
        tensors.extend(read_tensors(&out).unwrap());
        write_tensors(&tensors, file).unwrap();
    });
    assert_eq!(verify(&[&case, &"--tolerance", &"1e-7"]).0, 0);
}

#[test]
fn json_tells_every_tensors_error() {
    let dir = tempfile::tempdir().unwrap();
    let case = spoilt(dir.path(), change_one_gradient);
    let (code, out, _) = verify(&[&case, &"--json"]);
    assert_eq!(code, 1);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((json["passed"].as_u64(), json["failed"].as_u64()), (Some(0), Some(1)));
    let case = &json["cases"][0];
    assert_eq!(case["worst"]["tensor"], "grad.moe_W.1");
    let checks = case["checks"].as_array().unwrap();
    let missed = |c: &&serde_json::Value| c["error"].as_f64() > c["allowed"].as_f64();
    assert_eq!(checks.iter().filter(missed).count(), 1);
    assert!(checks.len() > 30);
}
