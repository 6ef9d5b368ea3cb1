//! `smore sweep` as a user runs it, on the demo's base.

mod workplace;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use workplace::{refused, smore, write_run};

fn sweep(folder: &Path, name: &str, text: &str) -> String {
    write_run(folder, "run", |c| c.replace("save_steps: 3", "save_steps: 2"));
    let file = format!("{name}.yaml");
    std::fs::write(folder.join(&file), format!("run: run.yaml\noutput_dir: {name}\n{text}"))
        .unwrap();
    file
}

/// The table without what is measured in seconds.
fn table(folder: &Path, name: &str) -> Value {
    let text = std::fs::read_to_string(folder.join(name).join("results.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

const GRID: &str = "parameters: {train.learning_rate: [1.0e-3, 1.0e-2], adapter.layers.0.rank: [1, 2]}\n\
                    seeds: [1, 2]\nworkers: 2\n";

#[test]
fn a_sweep_that_was_killed_twice_ends_with_the_same_table() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let whole = sweep(folder, "whole", GRID);
    smore(folder, &["sweep", &whole]).assert().success();
    let killed = sweep(folder, "killed", GRID);
    let lines = || {
        let text = std::fs::read_to_string(folder.join("killed/trials.jsonl")).unwrap_or_default();
        text.lines().count()
    };
    for wanted in [1, 4] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_smore"))
            .current_dir(folder)
            .args(["sweep", &killed])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while lines() < wanted {
            assert!(start.elapsed() < Duration::from_mins(2), "no trial ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(lines() < 8, "the sweep was faster than the kill");
    }
    smore(folder, &["sweep", &killed]).assert().success();
    assert_eq!(table(folder, "killed"), table(folder, "whole"));
    assert_eq!(lines(), 8);
    let rows = table(folder, "whole")["rows"].as_array().unwrap().clone();
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|r| r["loss"].is_f64() && r["seeds"] == 2), "{rows:?}");
    assert!(rows.iter().any(|r| r["on_front"] == true));
    let page = std::fs::read_to_string(folder.join("whole/report.html")).unwrap();
    assert!(page.contains("best.yaml is ready to run"));
    smore(folder, &["train", "whole/best.yaml"]).assert().success();

    let other = GRID.replace("[1, 2]\nworkers", "[1]\nworkers");
    sweep(folder, "killed", &other);
    assert!(refused(folder, &["sweep", &killed]).contains("other settings"));
}

#[test]
fn budgets_halving_and_failures() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let kinds = "parameters: {adapter: [{kind: lora, rank: 2}, {kind: lora, rank: 64}]}\n";
    let file = sweep(folder, "budget", &format!("{kinds}budget: {{parameters: 50000}}\n"));
    let listed = smore(folder, &["sweep", &file, "--list"]).assert().success();
    let listed = String::from_utf8(listed.get_output().stdout.clone()).unwrap();
    assert!(listed.contains("left out: adapter="), "{listed}");
    smore(folder, &["sweep", &file]).assert().success();
    assert_eq!(table(folder, "budget")["rows"].as_array().unwrap().len(), 1);

    let halving = "parameters: {train.learning_rate: {min: 1.0e-4, max: 1.0e-1, log: true}}\nsearch: \
                   halving\ntrials: 4\nhalving: {min_steps: 2, eta: 2}\n";
    let file = sweep(folder, "halving", halving);
    smore(folder, &["sweep", &file]).assert().success();
    let rows = table(folder, "halving")["rows"].as_array().unwrap().clone();
    // Rungs of 2, 4 and 6 steps with 4, 2 and 1 candidates.
    let rungs: Vec<u64> = rows.iter().map(|r| r["rung"].as_u64().unwrap()).collect();
    assert_eq!(rungs, [2, 1, 0, 0]);

    let file = sweep(folder, "fails", "parameters: {train.learning_rate: [1.0e-3, 1.0e+30]}\n");
    smore(folder, &["sweep", &file]).assert().success();
    let rows = table(folder, "fails")["rows"].as_array().unwrap().clone();
    assert!(rows[0]["loss"].is_f64(), "{rows:?}");
    let file = sweep(folder, "wrong", "parameters: {train.lerning_rate: [1]}\n");
    assert!(refused(folder, &["sweep", &file]).contains("did you mean `learning_rate`"));
}

/// The paper's grids are sweeps that can be read.
#[test]
fn the_papers_grids_are_sweeps() {
    let dir = tempfile::tempdir().unwrap();
    let grids = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sweeps");
    let mut seen = 0;
    for grid in std::fs::read_dir(grids).unwrap() {
        let text = std::fs::read_to_string(grid.unwrap().path()).unwrap();
        write_run(dir.path(), "my-run", |c| c);
        std::fs::write(dir.path().join("grid.yaml"), &text).unwrap();
        let listed =
            smore(dir.path(), &["sweep", "grid.yaml", "--list", "--json"]).assert().success();
        let json: Value = serde_json::from_slice(&listed.get_output().stdout).unwrap();
        let count = |key: &str| json[key].as_array().unwrap().len();
        assert_eq!(count("candidates") + count("left_out"), text.matches("- {kind").count());
        seen += 1;
    }
    assert_eq!(seen, 5);
}
