//! One table of cases on every path: the reference, the fused pass in f64 and in f32; and the
//! gradients of every parameter by name, on a fixed tree and through the router.

mod common;

use common::numbers;
use smore::adapter::{Adapter, Smore, SmoreSaved};
use smore::config::SmoreConfig;
use smore::kernel::{GateNoise, Pass, hidden_states};
use smore::reference::{Node, Reference};
use smore::spec::SmoreSpec;
use smore_engine::{Cpu, Float, View, ViewMut};

const D_IN: usize = 7;
const D_OUT: usize = 5;
const TOKENS: usize = 37;

/// One adapter with its inputs.
struct Case {
    name: String,
    smore: Smore,
    params: Vec<f64>,
    x: Vec<f64>,
    g: Vec<f64>,
    valid: Option<Vec<bool>>,
    noise: Option<GateNoise<f64>>,
}

impl Case {
    fn new(layers: &str, gate: &str, rest: &str, masked: bool) -> Self {
        let json = format!(
            r#"{{"layers": {layers}, "gate": {{"router_width": 4, "router_input_width": 3,
                "balance_weight": 0.3, {gate}}}, {rest}, "init": "normal"}}"#
        );
        let config: SmoreConfig = serde_json::from_str(&json).unwrap();
        let smore = Smore::new(SmoreSpec::new(&config, D_IN, D_OUT).unwrap());
        let params = numbers(Adapter::<Cpu<f64>>::len(&smore), 1);
        let noisy = gate.contains("noisy") && !gate.contains("mlp");
        let draw = |l: &smore::spec::LayerSpec| numbers(TOKENS * l.parents * l.experts, 5);
        let noise =
            noisy.then(|| GateNoise { layers: smore.spec.layers.iter().map(draw).collect() });
        Self {
            name: json,
            params,
            noise,
            x: numbers(TOKENS * D_IN, 2),
            g: numbers(TOKENS * D_OUT, 3),
            valid: masked.then(|| (0..TOKENS).map(|t| t % 5 != 2).collect()),
            smore,
        }
    }

    /// Output and what was saved, in `T`.
    fn forward<T: Float>(&self, params: &[f64], x: &[f64]) -> (Vec<T>, SmoreSaved<Cpu<T>>) {
        let cast = |v: &[f64]| v.iter().map(|&x| T::from_f64(x)).collect::<Vec<T>>();
        let (params, x) = (cast(params), cast(x));
        let noise = self
            .noise
            .as_ref()
            .map(|n| GateNoise { layers: n.layers.iter().map(|l| cast(l)).collect() });
        let mut y = vec![T::ZERO; TOKENS * D_OUT];
        let saved = self.smore.forward_with(
            &Cpu::<T>::new(),
            self.valid.as_deref(),
            noise.as_ref(),
            View::new(&params, params.len()),
            View::new(&x, x.len()),
            ViewMut::new(&mut y, TOKENS * D_OUT),
        );
        (y, saved)
    }

    fn pass(&self) -> Pass<'_, f64> {
        let (spec, layout) = (&self.smore.spec, &self.smore.layout);
        Pass { spec, layout, valid: self.valid.as_deref(), noise: self.noise.as_ref() }
    }

    /// sum(y g) + balance, through the router.
    fn loss(&self, params: &[f64], x: &[f64]) -> (f64, SmoreSaved<Cpu<f64>>) {
        let (y, saved) = self.forward::<f64>(params, x);
        let task: f64 = y.iter().zip(&self.g).map(|(y, g)| y * g).sum();
        (task + saved.routing.balance_losses.iter().sum::<f64>(), saved)
    }

    /// Gradients of [`Case::loss`] by the parameters and by x.
    fn gradients(&self, balance: f64) -> (Vec<f64>, Vec<f64>) {
        let (_, saved) = self.forward::<f64>(&self.params, &self.x);
        let mut grads = vec![0.0; self.params.len()];
        let mut dx = vec![0.0; self.x.len()];
        self.smore.backward_with(
            &Cpu::<f64>::new(),
            self.valid.as_deref(),
            self.noise.as_ref(),
            balance,
            View::new(&self.params, self.params.len()),
            &saved,
            View::new(&self.x, self.x.len()),
            View::new(&self.g, self.g.len()),
            ViewMut::new(&mut grads, self.params.len()),
            Some(ViewMut::new(&mut dx, self.x.len())),
        );
        (grads, dx)
    }
}

const TWO: &str = r#"[{"experts": 4, "fanout": 2, "rank": 2, "lora_alpha": 3},
    {"experts": 3, "fanout": 2, "rank": 1, "lora_alpha": 1.7}]"#;
const THREE: &str = r#"[{"experts": 3, "fanout": 1, "rank": 2}, {"experts": 4, "fanout": 3, "rank": 1},
    {"experts": 3, "fanout": 2, "rank": 2, "lora_alpha": 3}]"#;
const ONE: &str = r#"[{"experts": 5, "fanout": 2, "rank": 3, "lora_alpha": 2}]"#;
const EQUAL: &str =
    r#"[{"experts": 3, "fanout": 1, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2}]"#;

fn cases() -> Vec<Case> {
    let gates = [
        r#""kind": "switch", "activation": "tanh""#,
        r#""kind": "dense", "activation": "relu""#,
        r#""kind": "noisy_topk", "activation": "prelu|0.3""#,
        r#""kind": "noisy_topk", "architecture": "mlp", "activation": "tanh""#,
        r#""kind": "switch", "architecture": "linear""#,
        r#""kind": "switch", "ancestor_keys": false"#,
    ];
    let rests = [
        r#""activation": "tanh", "activation_position": "all""#,
        r#""activation": "prelu|0.2", "activation_position": "child""#,
        r#""activation": "relu", "activation_position": "child_v2""#,
        r#""activation": "identity""#,
    ];
    let mut cases = Vec::new();
    for (i, layers) in [ONE, TWO, THREE].into_iter().enumerate() {
        for (j, gate) in gates.into_iter().enumerate() {
            for (k, rest) in rests.into_iter().enumerate() {
                cases.push(Case::new(layers, gate, rest, (i + j + k) % 2 == 0));
            }
        }
    }
    let shared = r#""activation": "tanh", "shared_pool": true"#;
    let multi = r#""activation": "identity", "structure": "multi_order""#;
    cases.push(Case::new(EQUAL, gates[0], shared, true));
    cases.push(Case::new(EQUAL, gates[2], shared, false));
    cases.push(Case::new(TWO, gates[0], multi, true));
    cases.push(Case::new(THREE, gates[4], multi, false));
    cases
}

/// Nodes of layer `l`, in the order of [`smore::tree::ResidualTree`].
fn nodes_of(root: &Node, depth: usize, l: usize, out: &mut Vec<(usize, f64)>) {
    for (expert, weight, child) in &root.children {
        if depth - 1 == l {
            out.push((*expert, *weight));
        } else {
            nodes_of(child, depth - 1, l, out);
        }
    }
}

fn close(name: &str, what: &str, want: f64, got: f64, allowed: f64) {
    assert!((want - got).abs() <= allowed * want.abs().max(1.0), "{what}: {want}, {got}: {name}");
}

#[test]
fn every_path_equals_the_reference() {
    for case in cases() {
        let spec = &case.smore.spec;
        let reference = Reference { spec, layout: &case.smore.layout, params: &case.params };
        let tokens: Vec<Vec<f64>> = case.x.chunks(D_IN).map(<[f64]>::to_vec).collect();
        let noise: Option<Vec<Vec<Vec<f64>>>> = case.noise.as_ref().map(|noise| {
            let of = |t: usize, l: usize| {
                let width = spec.layers[l].parents * spec.layers[l].experts;
                noise.layers[l][t * width..(t + 1) * width].to_vec()
            };
            (0..TOKENS).map(|t| (0..spec.depth()).map(|l| of(t, l)).collect()).collect()
        });
        let want = reference.forward(&tokens, case.valid.as_deref(), noise.as_deref());
        let (y, saved) = case.forward::<f64>(&case.params, &case.x);
        let (y32, _) = case.forward::<f32>(&case.params, &case.x);
        let hidden = hidden_states(&case.pass(), &saved.routing, &case.params, &saved.z);
        let top = &hidden[spec.depth() - 1];
        for t in 0..TOKENS {
            for i in 0..D_OUT {
                close(&case.name, "y", want.y[t][i], y[t * D_OUT + i], 1e-12);
                close(&case.name, "y in f32", want.y[t][i], f64::from(y32[t * D_OUT + i]), 2e-4);
            }
            for (want, got) in want.roots[t].hidden.iter().zip(&top[t * spec.root_width()..]) {
                close(&case.name, "root", *want, *got, 1e-12);
            }
            if spec.structure == smore::config::Structure::MultiOrder {
                continue;
            }
            for (l, layer) in spec.layers.iter().enumerate() {
                let mut nodes = Vec::new();
                nodes_of(&want.roots[t], spec.depth(), l, &mut nodes);
                let tree = &saved.routing.tree.layers[l];
                assert_eq!(nodes.len(), layer.nodes);
                for (i, (expert, weight)) in nodes.into_iter().enumerate() {
                    let at = t * layer.nodes + i;
                    assert_eq!(expert, usize::from(tree.expert_idx[at]), "{}", case.name);
                    close(&case.name, "weight", weight, tree.gate_weight[at], 1e-12);
                }
            }
        }
        for (want, got) in want.balance_losses.iter().zip(&saved.routing.balance_losses) {
            close(&case.name, "balance", *want, *got, 1e-12);
        }
    }
}

/// Central differences of `f` at element `i` of `values`.
fn slope(values: &[f64], i: usize, f: impl Fn(&[f64]) -> f64) -> f64 {
    let (mut up, mut down) = (values.to_vec(), values.to_vec());
    up[i] += 1e-6;
    down[i] -= 1e-6;
    (f(&up) - f(&down)) / 2e-6
}

fn bottom_up() -> Case {
    let gate = r#""architecture": "bottom_up", "activation": "tanh""#;
    Case::new(TWO, gate, r#""activation": "tanh""#, true)
}

/// Every group of parameters, and x, through the router; the choice must not move on the way.
#[test]
fn gradients_through_the_router() {
    for case in cases().into_iter().step_by(3).chain([bottom_up()]) {
        let (grads, dx) = case.gradients(1.0);
        let top = grads.iter().fold(0.0, |t: f64, g| t.max(g.abs()));
        let (_, saved) = case.loss(&case.params, &case.x);
        let still = |other: &SmoreSaved<Cpu<f64>>| {
            let layers = saved.routing.tree.layers.iter().zip(&other.routing.tree.layers);
            layers.into_iter().all(|(a, b)| a.expert_idx == b.expert_idx && a.source == b.source)
        };
        for param in &case.smore.layout.params {
            let mut compared = 0;
            for i in param.range().step_by((param.len() / 4).max(1)) {
                let at = |params: &[f64]| {
                    let (loss, other) = case.loss(params, &case.x);
                    if still(&other) { loss } else { f64::NAN }
                };
                let slope = slope(&case.params, i, at);
                if slope.is_nan() {
                    continue;
                }
                compared += 1;
                let allowed = 1e-6 * top.max(1.0);
                let got = grads[i];
                assert!(
                    (slope - got).abs() < allowed,
                    "{} {slope} {got}: {}",
                    param.name,
                    case.name
                );
            }
            assert!(compared > 0, "{} was never compared: {}", param.name, case.name);
        }
        for i in (0..case.x.len()).step_by(17) {
            let slope = slope(&case.x, i, |x| {
                let (loss, other) = case.loss(&case.params, x);
                if still(&other) { loss } else { f64::NAN }
            });
            assert!(slope.is_nan() || (slope - dx[i]).abs() < 1e-6 * top.max(1.0), "x[{i}]");
        }
    }
}

/// The same with the tree held still by force: weights move, experts cannot.
#[test]
fn gradients_on_a_fixed_tree() {
    for case in cases().into_iter().step_by(5).chain([bottom_up()]) {
        let (grads, _) = case.gradients(0.0);
        let top = grads.iter().fold(1.0, |t: f64, g| t.max(g.abs()));
        let (_, saved) = case.loss(&case.params, &case.x);
        let spec = &case.smore.spec;
        let fixed = |params: &[f64]| -> f64 {
            let (_, moved) = case.forward::<f64>(params, &case.x);
            let hidden = hidden_states(&case.pass(), &saved.routing, params, &moved.z);
            let proj = &params[case.smore.layout.output_proj..case.smore.layout.output_bias];
            let bias = &params[case.smore.layout.output_bias..case.smore.layout.core];
            let rows = hidden[spec.depth() - 1].chunks(spec.root_width()).zip(case.g.chunks(D_OUT));
            rows.map(|(h, g)| {
                let out = |i: usize| -> f64 {
                    let w = &proj[i * h.len()..(i + 1) * h.len()];
                    w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>() + bias[i]
                };
                (0..D_OUT).map(|i| out(i) * g[i]).sum::<f64>()
            })
            .sum()
        };
        for param in &case.smore.layout.params {
            for i in param.range().step_by((param.len() / 3).max(1)) {
                let (slope, got) = (slope(&case.params, i, fixed), grads[i]);
                assert!((slope - got).abs() < 1e-6 * top, "{} {slope} {got}", param.name);
            }
        }
    }
}
