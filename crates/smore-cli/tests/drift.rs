//! `smore drift` and `smore routes` as a user runs them.

mod workplace;

use serde_json::Value;
use std::fmt::Write;
use std::path::Path;
use workplace::{adapter, base, refused, smore, write_run};

/// Questions of one domain: three kinds, numbers drawn by `seed`.
fn questions(count: usize, mut seed: u64) -> String {
    // splitmix64: windows of a poorer generator are more alike, or less, than chance has them.
    let mut draw = |n: u64| {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    };
    let mut text = String::new();
    for _ in 0..count {
        let (kind, n, machine) = (draw(3), draw(1000), ["press", "saw", "lathe"][draw(3) as usize]);
        let (question, answer) = match kind {
            0 => (format!("Order {n} of the {machine}"), format!("order {n}")),
            1 => (format!("Where is part {n} of the {machine}?"), format!("bin {n}")),
            _ => (format!("The {machine} is at {n}, is it too hot?"), "no".to_owned()),
        };
        writeln!(text, "{{\"instruction\": \"{question}\", \"output\": \"{answer}\"}}").unwrap();
    }
    text
}

/// Texts of another domain.
fn letters(count: usize) -> String {
    let line = |i: usize| {
        format!(
            "{{\"instruction\": \"Dear friend, thank you so much for your letter number {i} about the \
             garden\", \"output\": \"with love from all of us\"}}\n"
        )
    };
    (0..count).map(line).collect()
}

fn trained(folder: &Path) {
    write_run(folder, "run", |config| {
        config
            .replace("num_train_epochs: 1, max_steps: 6", "max_steps: 80")
            .replace("per_device_train_batch_size: 2", "per_device_train_batch_size: 8")
            .replace("fraction: 0.1", "fraction: 0.25")
            .replace("path: data.jsonl", "path: questions.jsonl")
            .replace("learning_rate: 1.0e-2", "learning_rate: 3.0e-3")
    });
    std::fs::write(folder.join("questions.jsonl"), questions(1600, 1)).unwrap();
    smore(folder, &["train", "run.yaml"]).assert().success();
}

/// Exit code, p of all, and the windows' alarms and tokens.
fn drift(folder: &Path, data: &str, rate: &str) -> (i32, f64, Vec<bool>, Vec<u64>) {
    let base = base();
    let args = ["drift", "--model", base.to_str().unwrap(), "--adapter", "run/adapter", "--data"];
    let more = [data, "--window", "512", "--false-alarms", rate, "--json"];
    let output = smore(folder, &[&args[..], &more[..]].concat()).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let windows = json["windows"].as_array().unwrap();
    (
        output.status.code().unwrap(),
        json["drift"]["p"].as_f64().unwrap(),
        windows.iter().map(|w| w["alarm"].as_bool().unwrap()).collect(),
        windows.iter().map(|w| w["tokens"].as_u64().unwrap()).collect(),
    )
}

#[test]
fn false_alarms_come_at_the_stated_rate_and_another_domain_is_always_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    trained(folder);
    std::fs::write(folder.join("same.jsonl"), questions(5600, 99)).unwrap();
    let (code, p, alarms, tokens) = drift(folder, "same.jsonl", "0.05");
    assert!(alarms.len() >= 200 && tokens.iter().all(|&t| t >= 512), "{} windows", alarms.len());
    let (windows, false_alarms) = (alarms.len() as f64, alarms.iter().filter(|&&a| a).count());
    let deviation = (windows * 0.05 * 0.95).sqrt();
    let most = windows * 0.05 + 3.0 * deviation;
    assert!((false_alarms as f64) < most, "{false_alarms} of {windows}");
    assert_eq!(code, i32::from(p <= 0.05));

    std::fs::write(folder.join("other.jsonl"), letters(300)).unwrap();
    let (code, p, alarms, tokens) = drift(folder, "other.jsonl", "0.01");
    assert!(tokens.len() > 10 && tokens.iter().all(|&t| t >= 512));
    assert!(alarms.iter().all(|&a| a), "{alarms:?}");
    assert!(code == 1 && p <= 0.001, "{p}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    trained(folder);
    let base = base();
    let base = base.to_str().unwrap();
    let args = |adapter: &'static str| ["drift", "--model", base, "--adapter", adapter, "--data"];
    std::fs::write(folder.join("one.jsonl"), letters(1)).unwrap();
    let mut command = smore(
        folder,
        &[&args("run/adapter")[..], &["one.jsonl", "--false-alarms", "0.0001"]].concat(),
    );
    let said = String::from_utf8(command.assert().failure().get_output().stderr.clone()).unwrap();
    assert!(said.contains("cannot tell an alarm from chance"), "{said}");
    let said = refused(folder, &[&args("run/adapter")[..], &["no.jsonl"]].concat());
    assert!(said.contains("no.jsonl"), "{said}");
    let said = refused(
        folder,
        &[&args("run/adapter")[..], &["one.jsonl", "--false-alarms", "2"]].concat(),
    );
    assert!(said.contains("--false-alarms is 2"), "{said}");
    write_run(folder, "lora", adapter("{kind: lora, rank: 2}"));
    smore(folder, &["train", "lora.yaml"]).assert().success();
    let said = refused(folder, &[&args("lora/adapter")[..], &["one.jsonl"]].concat());
    assert!(said.contains("no routing to compare with"), "{said}");
    let said = refused(folder, &["routes", "lora"]);
    assert!(said.contains("nothing was counted there"), "{said}");

    let routes = |args: &[&str]| -> Value {
        let run = smore(folder, &[&["routes", "run", "--json"], args].concat()).assert().success();
        serde_json::from_slice(&run.get_output().stdout).unwrap()
    };
    let json = routes(&[]);
    assert_eq!((&json["split"], &json["last_step"]), (&"train".into(), &80.into()));
    assert_eq!(json["layers"].as_array().unwrap().len(), 24);
    assert_eq!(routes(&["--step", "35"])["last_step"], 30);
    assert_eq!(routes(&["--held-out", "--step", "2"])["last_step"], 0);
    let table = smore(folder, &["routes", "run/adapter"]).assert().success();
    let table = String::from_utf8(table.get_output().stdout.clone()).unwrap();
    assert!(table.contains("by S'MoRE (Thm. 3.4): 216"), "{table}");
    let prompt = ["--prompt", "Order 3", "--max-new-tokens", "4", "--routing", "g.parquet"];
    let generate = ["generate", "--model", base, "--adapter", "run/adapter"];
    smore(folder, &[&generate[..], &prompt[..]].concat()).assert().success();
    smore(folder, &["routes", "g.parquet", "--html", "g.html"]).assert().success();
    let page = std::fs::read_to_string(folder.join("g.html")).unwrap();
    assert!(page.contains("\"generation\"") && !page.contains("http://"));
}
