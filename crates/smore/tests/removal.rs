//! What is removed, and what every node contributes, against a walk over the tree in plain loops.

mod common;

use common::numbers;
use smore::adapter::{MapAdapter, Mode, Removed, Smore};
use smore::config::SmoreConfig;
use smore::kernel::{Pass, contributions};
use smore::spec::SmoreSpec;
use smore::tree::{Removal, ResidualTree};
use smore_engine::{Cpu, View, ViewMut};

const N: usize = 40;
const D_IN: usize = 7;
const D_OUT: usize = 5;

struct Case {
    smore: Smore,
    params: Vec<f64>,
    x: Vec<f64>,
}

impl Case {
    fn new(position: &str, activation: &str) -> Self {
        let json = format!(
            r#"{{"layers": [{{"experts": 4, "fanout": 2, "rank": 2}},
                {{"experts": 3, "fanout": 2, "rank": 3}}], "activation": "{activation}",
                "activation_position": "{position}"}}"#
        );
        let config: SmoreConfig = serde_json::from_str(&json).unwrap();
        let smore = Smore::new(SmoreSpec::new(&config, D_IN, D_OUT).unwrap());
        let params = numbers(smore.layout.len, 3);
        Self { smore, params, x: numbers(N * D_IN, 5) }
    }

    fn forward(&self, what: Option<&Removal>) -> (Vec<f64>, smore::adapter::SmoreSaved<Cpu<f64>>) {
        let mode = Mode { removed: what.map(|what| Removed { place: 0, what }), ..Mode::plain() };
        let mut y = vec![0.0; N * D_OUT];
        let saved = self.smore.forward(
            &Cpu::<f64>::new(),
            mode,
            View::new(&self.params, self.params.len()),
            View::new(&self.x, self.x.len()),
            ViewMut::new(&mut y, N * D_OUT),
        );
        (y, saved)
    }

    fn param(&self, name: &str) -> &[f64] {
        let found = self.smore.layout.params.iter().find(|p| p.name == name);
        &self.params[found.unwrap_or_else(|| panic!("no {name}")).range()]
    }

    /// The output of one token, from the tree's weights alone; nodes in `gone` are left out with
    /// what hangs below them.
    fn walk(
        &self,
        z: &[f64],
        tree: &ResidualTree<f64>,
        t: usize,
        gone: &dyn Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let root = self.parent(z, tree, t, 1, 0, gone);
        affine(self.param("moe_W_final"), self.param("moe_W_final_bias"), &root)
    }

    /// x of the `parent`-th node above layer `l`, of token `t`.
    fn parent(
        &self,
        z: &[f64],
        tree: &ResidualTree<f64>,
        t: usize,
        l: usize,
        parent: usize,
        gone: &dyn Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let spec = &self.smore.spec;
        let layer = &spec.layers[l];
        let act = |v: &f64| {
            if spec.activation == smore::config::Activation::Tanh { v.tanh() } else { *v }
        };
        let at = &self.smore.layout.layers[l];
        let core = &self.params[self.smore.layout.core..];
        let mut sum = vec![0.0; layer.width];
        for child in 0..layer.fanout {
            let node = parent * layer.fanout + child;
            let (i, out) = (t * layer.nodes + node, gone(l, node));
            let expert = usize::from(tree.layers[l].expert_idx[i]);
            let alpha = if out { 0.0 } else { tree.layers[l].gate_weight[i] };
            let inputs = &z[t * spec.stack_width() + layer.stack_start + expert * layer.rank..]
                [..layer.rank];
            let up = &core[at.up + expert * layer.width * layer.rank..][..layer.width * layer.rank];
            let bias = &core[at.up_bias + expert * layer.width..][..layer.width];
            let u: Vec<f64> = affine(up, bias, inputs).iter().map(|v| v * layer.scale).collect();
            let below = at.transform.map(|(w, b)| {
                let under = |l: usize, n: usize| out || gone(l, n);
                let x = self.parent(z, tree, t, l - 1, node, &under);
                let all = spec.position == smore::config::ActivationPosition::All;
                let x: Vec<f64> = if all { x } else { x.iter().map(act).collect() };
                affine(&core[w..w + layer.width * layer.width_below], &core[b..b + layer.width], &x)
            });
            let below = below.unwrap_or_else(|| vec![0.0; layer.width]);
            for (c, sum) in sum.iter_mut().enumerate() {
                *sum += match spec.position {
                    smore::config::ActivationPosition::All => alpha * act(&(u[c] + below[c])),
                    smore::config::ActivationPosition::Child => alpha * u[c] + below[c],
                    smore::config::ActivationPosition::ChildV2 => alpha * (u[c] + below[c]),
                };
            }
        }
        sum
    }
}

fn affine(w: &[f64], b: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |(row, b): (&[f64], &f64)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b;
    w.chunks_exact(x.len()).zip(b).map(row).collect()
}

fn cases() -> Vec<Case> {
    let positions = ["all", "child", "child_v2"];
    let cases = positions.iter().flat_map(|p| ["tanh", "identity"].map(|a| Case::new(p, a)));
    cases.collect()
}

#[test]
fn a_node_contributes_what_the_output_loses_without_it() {
    for case in cases() {
        let (y, saved) = case.forward(None);
        let (spec, layout) = (&case.smore.spec, &case.smore.layout);
        let pass = Pass { spec, layout, valid: None, noise: None, removed: None };
        let found = contributions(&pass, &saved.routing, &case.params, &saved.z);
        let (mut tested, mut acting) = (0, 0);
        for t in 0..N {
            let whole = case.walk(&saved.z, &saved.routing.tree, t, &|_, _| false);
            assert!(whole.iter().zip(&y[t * D_OUT..]).all(|(a, b)| (a - b).abs() < 1e-12));
            for (l, layer) in spec.layers.iter().enumerate() {
                for node in 0..layer.nodes {
                    let gone = |a: usize, b: usize| (a, b) == (l, node);
                    let rest = case.walk(&saved.z, &saved.routing.tree, t, &gone);
                    let norm = whole.iter().zip(&rest).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                    let got = found[l][t * layer.nodes + node];
                    assert!((norm.sqrt() - got).abs() < 1e-7, "{l} {node}: {} {got}", norm.sqrt());
                    // A gate that is sure of one child leaves next to nothing to the other, and a
                    // saturated sigma or a faint parent to any; but most nodes must act.
                    let weight = saved.routing.tree.layers[l].gate_weight[t * layer.nodes + node];
                    if weight < 0.1 {
                        continue;
                    }
                    tested += 1;
                    acting += usize::from(got > 1e-4);
                }
            }
        }
        assert!(2 * acting > tested, "{acting} of {tested}");
    }
}

#[test]
fn removals_take_experts_and_sub_trees_out_and_leave_routing_alone() {
    for case in cases() {
        let (_, saved) = case.forward(None);
        let tree = &saved.routing.tree;
        for what in [
            Removal { layer: 1, path: vec![1] },
            Removal { layer: 0, path: vec![2] },
            Removal { layer: 0, path: vec![2, 0] },
        ] {
            let (y, without) = case.forward(Some(&what));
            let mut acted = 0;
            for t in 0..N {
                let gone = |l: usize, node: usize| {
                    let expert = |l: usize, node: usize| {
                        tree.layers[l].expert_idx[t * case.smore.spec.layers[l].nodes + node]
                    };
                    l == what.layer
                        && expert(l, node) == what.path[0]
                        && what.path.get(1).is_none_or(|&p| expert(l + 1, node / 2) == p)
                };
                let expected = case.walk(&saved.z, tree, t, &gone);
                let whole = case.walk(&saved.z, tree, t, &|_, _| false);
                acted += usize::from(expected != whole);
                let same = expected.iter().zip(&y[t * D_OUT..]).all(|(a, b)| (a - b).abs() < 1e-12);
                assert!(same, "{what:?}, token {t}");
            }
            assert!((1..N).contains(&acted), "{what:?} acted on {acted}");
            for (a, b) in tree.layers.iter().zip(&without.routing.tree.layers) {
                assert_eq!(a.expert_idx, b.expert_idx);
            }
        }
    }
}
