//! Whole models recorded from the authors' code and transformers, in the folder that
//! `SMORE_SHARED` names: bases, adapters with every gradient, training runs. Run by
//! `cargo xtask parity`.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

use smore_tune::verify::{Kind, check_case, find_cases};
use std::path::Path;

#[test]
fn every_model_that_was_recorded() {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return };
    let folder = Path::new(&shared).join("fixtures/e2e");
    let cases = find_cases(&folder).unwrap();
    let (mut failed, mut kinds) = (0, [0; 3]);
    for path in &cases {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let starts = ["base_", "train_", ""];
        kinds[starts.iter().position(|start| name.starts_with(start)).unwrap()] += 1;
        let report = match check_case(path, None) {
            Ok((report, _)) => report,
            Err(error) => {
                println!("ERROR {name:26} {error}");
                failed += 1;
                continue;
            }
        };
        let of = |kind| report.largest(kind).map_or_else(|| "-".into(), |e| format!("{e:.1e}"));
        println!(
            "{:5} {name:26} {:4} tensors  values {:7}  gradients {:7}  parameters {:7}  worst {}",
            if report.passed() { "ok" } else { "MISS" },
            report.checks.len(),
            of(Kind::Value),
            of(Kind::Gradient),
            of(Kind::Parameter),
            report.worst().map_or("", |w| &w.tensor),
        );
        for note in &report.notes {
            println!("      {note}");
        }
        for check in report.checks.iter().filter(|c| !c.passed()) {
            println!("      {check:?}");
        }
        failed += usize::from(!report.passed());
    }
    assert!(kinds.iter().all(|&n| n > 0), "a kind of case is missing: {kinds:?}");
    assert_eq!(failed, 0, "of {} cases", cases.len());
}
