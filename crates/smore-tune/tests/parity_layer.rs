//! Recorded layer cases of the authors' code. Three lie in this project; the whole set is in the
//! folder that `SMORE_SHARED` names.

use smore_tune::verify::{Tolerance, layer_case};
use std::path::{Path, PathBuf};

fn cases(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut cases: Vec<PathBuf> = entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
        .filter(|p| p.file_name().unwrap().to_string_lossy().starts_with(prefix))
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no case {prefix}* in {}", folder.display());
    cases
}

fn check(folder: &Path, prefix: &str, tolerance: Tolerance) {
    let mut failed = 0;
    for path in cases(folder, prefix) {
        let report = layer_case::<f32>(&path, tolerance).unwrap();
        let worst = report.worst().unwrap();
        let verdict = if report.passed() { "ok" } else { "MISS" };
        println!("{verdict:4} {:50} {:e} {}", report.name, worst.error, worst.tensor);
        failed += usize::from(!report.passed());
    }
    assert_eq!(failed, 0, "cases failed");
}

#[test]
fn cases_in_the_project() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layer");
    check(&folder, "", Tolerance { values: 1e-5, gradients: 1e-4 });
}

/// Run by `cargo xtask parity`, which sets `SMORE_SHARED`.
#[test]
fn every_f32_case_that_was_recorded() {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return };
    let folder = Path::new(&shared).join("fixtures/layer");
    check(&folder, "g1_switch", Tolerance { values: 1e-5, gradients: 1e-4 });
    for prefix in ["g1", "g2", "g3", "g4", "g5", "g6"] {
        check(&folder, prefix, Tolerance::default());
    }
}
