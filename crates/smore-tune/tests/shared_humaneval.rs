//! HumanEval's own solutions pass its tests in the sandbox. Needs SMORE_SHARED.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "says what was checked")]

use smore_tune::eval::programs;
use smore_tune::eval::sandbox::{Limits, Sandbox};
use std::path::PathBuf;

#[test]
fn canonical_solutions_pass_and_empty_ones_fail() {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return };
    let sandbox = match Sandbox::open(Limits::default()) {
        Ok(sandbox) => sandbox,
        Err(e) => {
            eprintln!("NOT TESTED: HumanEval's programs cannot be run here: {e}");
            return;
        }
    };
    let file = PathBuf::from(shared).join("data/datasets/humaneval/HumanEval.jsonl");
    let programs = programs(&file).unwrap();
    assert_eq!(programs.len(), 164);
    for program in &programs {
        let solution = program.canonical_solution.as_ref().unwrap();
        let source = format!(
            "{}{solution}\n{}\ncheck({})\n",
            program.prompt, program.test, program.entry_point
        );
        let outcome = sandbox.run(&source).unwrap();
        assert!(outcome.passed(), "{}: {outcome:?}", program.task_id);
    }
    for program in programs.iter().step_by(40) {
        let outcome = sandbox.run(&program.source("    return None\n")).unwrap();
        assert!(!outcome.passed(), "{}", program.task_id);
    }
    println!("{} canonical solutions pass in the sandbox", programs.len());
}
