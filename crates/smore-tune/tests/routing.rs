//! Counts of routing against a brute-force count over the traces of the same tokens, and back from
//! Parquet.

mod adapted;

use adapted::{adapter, base};
use smore_engine::Cpu;
use smore_tune::checkpoint::LoadedAdapter;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use smore_tune::routing::{Counts, Split, Window, read, write};
use std::collections::{BTreeMap, BTreeSet};

/// A place's tree of one token: experts and weights by layer, leaves first.
type Tree = Vec<Vec<(u16, f32)>>;

const ADAPTERS: [&str; 7] = [
    r#"{"kind": "smore", "targets": "all-linear",
        "layers": [{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2}],
        "gate": {"router_width": 8, "router_input_width": 8}}"#,
    r#"{"kind": "smore", "targets": ["up_proj"], "gate": {"kind": "noisy_topk", "router_width": 8, "router_input_width": 8},
        "layers": [{"experts": 5, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2},
                   {"experts": 4, "fanout": 1, "rank": 2}]}"#,
    r#"{"kind": "smore", "targets": ["q_proj"], "gate": {"kind": "dense", "router_width": 8, "router_input_width": 8},
        "layers": [{"experts": 2, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 3, "rank": 2}]}"#,
    r#"{"kind": "smore", "targets": ["down_proj"],
        "layers": [{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2}],
        "gate": {"architecture": "bottom_up", "router_width": 8, "router_input_width": 8}}"#,
    r#"{"kind": "smore", "targets": ["down_proj"], "structure": "multi_order", "activation": "identity",
        "layers": [{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2}],
        "gate": {"router_width": 8, "router_input_width": 8}}"#,
    r#"{"kind": "hydra_lora", "heads": 3, "rank": 2}"#,
    r#"{"kind": "mix_lora", "experts": 4, "fanout": 2, "rank": 2}"#,
];

fn model(section: &str) -> Model<Cpu<f32>> {
    let folder = ModelFolder::open(&base("qwen2")).unwrap();
    let LoadedAdapter { adapters, values, .. } = adapter(&folder, section);
    Model::new(Cpu::new(), &folder, adapters, &values, 64)
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    for (first, len) in [(3, 17), (90, 9), (40, 30)] {
        let ids: Vec<u32> = (0..len).map(|i| (first + i * 7) % 40).collect();
        batch.push(&ids, &vec![true; len as usize]);
    }
    batch
}

/// The trees of every token at every routed place.
fn traces(model: &Model<Cpu<f32>>, batch: &Batch) -> Vec<(String, bool, Vec<Tree>)> {
    let n = batch.ids.len();
    let mut all = Vec::new();
    model.traced(batch, |slot, routing, _| {
        let token = |t: usize| -> Tree {
            let layers = routing.tree.layers.iter().map(|layer| {
                let nodes = layer.expert_idx.len() / n;
                let own = t * nodes..(t + 1) * nodes;
                let pairs = layer.expert_idx[own.clone()].iter().zip(&layer.gate_weight[own]);
                pairs.map(|(&e, &w)| (e, w)).collect()
            });
            layers.collect()
        };
        let is_tree = routing.tree.layers.iter().all(|l| l.source.is_none());
        all.push((slot.path(), is_tree, (0..n).map(token).collect()));
    });
    all
}

/// A tree as a text in which siblings are sorted, from the node `node` of layer `l` down.
fn sorted(tree: &Tree, l: usize, node: usize) -> String {
    let own = tree[l][node].0;
    if l == 0 {
        return own.to_string();
    }
    let fanout = tree[l - 1].len() / tree[l].len();
    let mut below: Vec<String> =
        (node * fanout..(node + 1) * fanout).map(|child| sorted(tree, l - 1, child)).collect();
    below.sort();
    format!("{own}[{}]", below.join(","))
}

#[test]
fn counts_equal_a_brute_force_count_over_traces() {
    for section in ADAPTERS {
        let (model, batch) = (model(section), batch());
        let mut counts = Counts::new(&model.adapters);
        counts.see(&model.routing(&batch));
        let traces = traces(&model, &batch);
        let places: Vec<_> = counts.routed().map(|(_, place)| place).collect();
        assert_eq!(places.len(), traces.len(), "{section}");
        for (place, (path, is_tree, trees)) in places.iter().zip(&traces) {
            assert_eq!((&place.path, place.tokens), (path, batch.ids.len() as u64));
            for (l, layer) in place.layers.iter().enumerate() {
                let mut wanted: BTreeMap<(usize, usize), (u64, f64)> = BTreeMap::new();
                for tree in trees {
                    for (node, &(expert, weight)) in tree[l].iter().enumerate() {
                        let up = *is_tree && l + 1 < tree.len();
                        let parent = if up {
                            usize::from(tree[l + 1][node * tree[l + 1].len() / tree[l].len()].0)
                        } else {
                            0
                        };
                        let entry = wanted.entry((parent, usize::from(expert))).or_default();
                        entry.0 += 1;
                        entry.1 += f64::from(weight);
                    }
                }
                for (i, (&count, &weight)) in layer.count.iter().zip(&layer.weight).enumerate() {
                    let key = (i / layer.experts, i % layer.experts);
                    let (n, w) = wanted.remove(&key).unwrap_or_default();
                    assert_eq!(count, n, "{section} {path} layer {l} {key:?}");
                    assert!((weight - w).abs() < 1e-9, "{section} {path} layer {l} {key:?}");
                }
                assert!(wanted.is_empty(), "{section} {path} layer {l}: {wanted:?}");
            }
            if *is_tree {
                let whole = |tree: &Tree| {
                    let top = tree.len() - 1;
                    let mut roots: Vec<String> =
                        (0..tree[top].len()).map(|node| sorted(tree, top, node)).collect();
                    roots.sort();
                    roots.join(";")
                };
                let distinct: BTreeSet<String> = trees.iter().map(whole).collect();
                assert_eq!(place.trees.estimate(), distinct.len() as f64, "{section} {path}");
            }
        }
    }
}

#[test]
fn samples_of_a_batch_add_up_to_the_batch() {
    let (model, batch) = (model(ADAPTERS[0]), batch());
    let routing = model.routing(&batch);
    let (mut whole, mut parts) = (Counts::new(&model.adapters), Counts::new(&model.adapters));
    whole.see(&routing);
    for &(start, len) in &batch.sequences {
        let mut one = Counts::new(&model.adapters);
        one.see_tokens(&routing, &(start..start + len));
        assert_eq!(one.tokens(), len as u64);
        parts.add(&one);
    }
    for (a, b) in whole.usage().iter().zip(parts.usage()) {
        assert_eq!((&a.share, a.trees, a.tokens), (&b.share, b.trees, b.tokens));
    }
}

#[test]
fn the_losses_of_a_routed_pass_are_those_of_any_pass() {
    let (model, batch) = (model(ADAPTERS[0]), batch());
    let (losses, routing) = model.losses_routed(&batch);
    assert_eq!(losses, model.losses(&batch));
    let alone = model.routing(&batch);
    let same = |(a, b): (&Option<_>, &Option<_>)| {
        let tree = |r: &Option<smore::kernel::Routing<f32>>| r.as_ref().map(|r| r.tree.clone());
        assert_eq!(tree(a), tree(b));
    };
    routing.iter().zip(&alone).for_each(same);
}

#[test]
fn parquet_gives_back_what_was_written_and_refuses_other_tables() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("steps.parquet");
    for section in ADAPTERS {
        let (model, batch) = (model(section), batch());
        let mut counts = Counts::new(&model.adapters);
        counts.see(&model.routing(&batch));
        let windows = [
            Window::of(Split::HeldOut, (0, 0), &counts),
            Window::of(Split::Train, (1, 10), &counts),
            Window::of(Split::Train, (11, 20), &counts),
        ];
        write(&file, &windows).unwrap();
        assert_eq!(format!("{:?}", read(&file).unwrap()), format!("{windows:?}"), "{section}");
    }
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 7]).unwrap();
    assert!(read(&file).unwrap_err().to_string().contains("steps.parquet"));
    std::fs::write(&file, "plain").unwrap();
    assert!(read(&file).unwrap_err().to_string().contains("not statistics of routing"));
}
