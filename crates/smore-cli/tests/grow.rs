//! `smore grow`: an adapter becomes a deeper S'MoRE with the same function and trains on.

mod workplace;

use serde_json::Value;
use std::path::Path;
use workplace::{adapter, base, refused, smore, write_run};

const DEEP: &str = "layers: [{experts: 4, fanout: 2, rank: 4}, {experts: 4, fanout: 2, rank: 4}]";

fn train(folder: &Path, name: &str, section: &str) -> Value {
    write_run(folder, name, |c| adapter(section)(c).replace("max_steps: 6", "max_steps: 12"));
    let run = smore(folder, &["train", "--json", &format!("{name}.yaml")]).assert().success();
    serde_json::from_slice(&run.get_output().stdout).unwrap()
}

fn config(folder: &Path, name: &str, section: &str) {
    std::fs::write(folder.join(name), section).unwrap();
}

fn grow(folder: &Path, from: &str, into: &str, out: &str, extra: &[&str]) -> Value {
    let base = base();
    let args = [
        "grow",
        "--json",
        "--from",
        from,
        "--into",
        into,
        "--out",
        out,
        "--model",
        base.to_str().unwrap(),
    ];
    let run = smore(folder, &[&args, extra].concat()).assert().success();
    serde_json::from_slice(&run.get_output().stdout).unwrap()
}

#[test]
fn a_lora_grows_exactly_and_trains_on() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let lora = train(folder, "lora", "{kind: lora, rank: 4}");
    for gate in ["switch", "dense"] {
        let section =
            format!("kind: smore\n{DEEP}\nactivation: prelu|1.0\ngate: {{kind: {gate}}}\n");
        let into = format!("{gate}.yaml");
        config(folder, &into, &section);
        let out = format!("grown-{gate}");
        let grown = grow(folder, "lora/adapter", &into, &out, &[]);
        let difference = grown["difference"]["largest"].as_f64().unwrap();
        assert!(difference < 1e-4, "{gate}: {difference}");
        let on = train(folder, &format!("on-{gate}"), &format!("{{kind: saved, path: {out}}}"));
        let (start, end) =
            (on["eval_loss_before"].as_f64().unwrap(), on["eval_loss_after"].as_f64().unwrap());
        let before = lora["eval_loss_after"].as_f64().unwrap();
        assert!((start - before).abs() < 1e-4, "{gate}: {start} after {before}");
        assert!(end < start, "{gate}: {start} -> {end}");
    }
    let manifest = std::fs::read_to_string(folder.join("on-dense/adapter/smore_manifest.json"));
    let manifest: Value = serde_json::from_str(&manifest.unwrap()).unwrap();
    assert_eq!(manifest["from"], "grown-dense");
    // Noise is an option that changes the values, by what is asked.
    let noise = |x: &str, out: &str| {
        let grown = grow(folder, "lora/adapter", "switch.yaml", out, &["--noise", x]);
        grown["difference"]["largest"].as_f64().unwrap()
    };
    let (little, more) = (noise("0.001", "n1"), noise("0.1", "n2"));
    assert!(1e-5 < little && 10.0 * little < more, "{little} {more}");
}

#[test]
fn other_adapters_grow_too() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "hydra", "{kind: hydra_lora, heads: 4, rank: 2}");
    train(
        folder,
        "flat",
        "{kind: smore, layers: [{experts: 4, fanout: 2, rank: 2}], \
         gate: {router_width: 8, router_input_width: 8}}",
    );
    let dense = format!("kind: smore\n{DEEP}\nactivation_position: child\ngate: {{kind: dense}}\n");
    config(folder, "dense.yaml", &dense);
    let same = format!("kind: smore\n{DEEP}\ngate: {{router_width: 8, router_input_width: 8}}\n");
    config(folder, "same.yaml", &same);
    for (from, into) in [("hydra", "dense.yaml"), ("flat", "same.yaml")] {
        let out = format!("grown-{from}");
        let grown = grow(folder, &format!("{from}/adapter"), into, &out, &[]);
        assert!(grown["difference"]["largest"].as_f64().unwrap() < 1e-4, "{from}: {grown}");
    }
}

#[test]
fn what_cannot_be_exact_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    train(folder, "lora", "{kind: lora, rank: 4}");
    train(folder, "mix", "{kind: mix_lora, experts: 2, fanout: 1, rank: 2}");
    let base = base();
    let model = base.to_str().unwrap();
    for (from, section, words) in [
        ("lora", format!("kind: smore\n{DEEP}\n"), vec!["tanh", "prelu|1.0", "child"]),
        (
            "lora",
            "kind: smore\nactivation: identity\nlayers: [{experts: 4, fanout: 1, rank: 4}]\n"
                .into(),
            vec!["fanout is 1", "dense"],
        ),
        (
            "lora",
            format!("kind: smore\n{DEEP}\nactivation: identity\ntargets: [up_proj]\n"),
            vec!["gate_proj", "targets"],
        ),
        ("mix", format!("kind: smore\n{DEEP}\nactivation: identity\n"), vec!["MixLoRA"]),
        ("lora", "kind: lora\nrank: 4\n".into(), vec!["kind is lora", "smore"]),
        ("lora", "kind: smore\nlayres: []\n".into(), vec!["into.yaml: line 2", "layers"]),
    ] {
        config(folder, "into.yaml", &section);
        let from = format!("{from}/adapter");
        let args =
            ["grow", "--from", &from, "--into", "into.yaml", "--out", "out", "--model", model];
        let said = refused(folder, &args);
        assert!(words.iter().all(|w| said.contains(w)), "{section}: {said}");
        assert!(!folder.join("out").exists());
    }
}
