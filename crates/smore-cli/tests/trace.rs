//! `smore trace` as a user runs it, on the demo's base.

mod workplace;

use serde_json::Value;
use workplace::{adapter, as_is, base, refused, smore, write_run};

#[test]
fn trees_are_told_for_every_place_and_token_and_removals_are_ranked() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    write_run(folder, "run", as_is);
    smore(folder, &["train", "run.yaml"]).assert().success();
    let base = base();
    let args = [
        "trace",
        "--model",
        base.to_str().unwrap(),
        "--adapter",
        "run/adapter",
        "--prompt",
        "Order 3 of the press",
        "--answer",
        " order 3",
    ];
    let files = ["--jsonl", "t.jsonl", "--html", "t.html", "--ablate"];
    smore(folder, &[&args[..], &files[..]].concat()).assert().success();
    let lines = std::fs::read_to_string(folder.join("t.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let tokens = lines[0]["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert!(text.contains("Order 3 of the press") && text.ends_with(" order 3"), "{text}");
    let trees: Vec<&Value> = lines.iter().filter(|l| l["place"].is_string()).collect();
    // Four blocks with three maps each.
    assert_eq!(trees.len(), 12 * tokens.len());
    for tree in &trees {
        let layers = tree["layers"].as_array().unwrap();
        let nodes = |l: usize, key: &str| layers[l][key].as_array().unwrap().len();
        assert_eq!([nodes(0, "experts"), nodes(1, "experts")], [4, 2]);
        assert_eq!([nodes(0, "contributions"), nodes(1, "contributions")], [4, 2]);
        let weights = layers[1]["weights"].as_array().unwrap();
        let sum: f64 = weights.iter().map(|w| w.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{tree}");
    }
    let page = std::fs::read_to_string(folder.join("t.html")).unwrap();
    assert!(page.contains("mlp.gate_proj") && !page.contains("http"));

    write_run(folder, "lora", adapter("{kind: lora, rank: 2}"));
    smore(folder, &["train", "lora.yaml"]).assert().success();
    let mut plain = args;
    plain[4] = "lora/adapter";
    let said = smore(folder, &plain).assert().failure().get_output().stderr.clone();
    assert!(String::from_utf8(said).unwrap().contains("has no router"));
    let said = refused(
        folder,
        &["trace", "--model", base.to_str().unwrap(), "--adapter", "no", "--prompt", "x"],
    );
    assert!(said.contains("no"), "{said}");
}
