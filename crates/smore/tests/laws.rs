//! What must hold for every adapter, whatever its sizes and parameters.

mod common;

use common::numbers;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};
use smore::adapter::{Adapter, Smore, SmoreSaved};
use smore::config::SmoreConfig;
use smore::init;
use smore::kernel::{GateNoise, Pass, hidden_states};
use smore::rng::{Purpose, stream};
use smore::spec::SmoreSpec;
use smore_engine::{Cpu, View, ViewMut};

const D_IN: usize = 5;
const D_OUT: usize = 4;
const TOKENS: usize = 5;

/// A random adapter, as what its config says.
#[derive(Clone, Debug)]
struct Drawn {
    /// experts, fanout, rank, lora_alpha
    layers: Vec<(usize, usize, usize, Option<f64>)>,
    shared: bool,
    gate: &'static str,
    architecture: &'static str,
    activation: &'static str,
    position: &'static str,
    structure: &'static str,
    ancestor_keys: bool,
    seed: u64,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let layer = (1usize..=4)
        .prop_flat_map(|s| (Just(s), 1..=s, 1usize..=3, proptest::option::of(0.3f64..4.0)));
    (
        proptest::collection::vec(layer, 1..=3),
        (any::<bool>(), any::<bool>(), 1u64..1 << 40),
        select(vec!["switch", "noisy_topk", "dense"]),
        select(vec!["mlp", "linear"]),
        select(vec!["identity", "relu", "tanh", "prelu|0.3"]),
        select(vec!["all", "child", "child_v2"]),
    )
        .prop_map(|(layers, flags, gate, architecture, activation, position)| {
            let (shared, ancestor_keys, seed) = flags;
            let structure = "tree";
            let mut drawn = Drawn {
                layers,
                shared,
                gate,
                architecture,
                activation,
                position,
                structure,
                ancestor_keys,
                seed,
            };
            drawn.make_valid();
            drawn
        })
}

impl Drawn {
    fn make_valid(&mut self) {
        let (bottom, noisy) = (self.layers[0], self.gate == "noisy_topk");
        for (s, f, r, _) in &mut self.layers {
            if self.shared {
                (*s, *r) = (bottom.0, bottom.2);
            }
            if noisy {
                *s = (*s).max(2);
            }
            *f = (*f).min(*s - usize::from(noisy));
        }
    }

    fn adapter(&self, init: &str) -> Smore {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|(s, f, r, alpha)| match alpha {
                Some(a) => json!({"experts": s, "fanout": f, "rank": r, "lora_alpha": a}),
                None => json!({"experts": s, "fanout": f, "rank": r}),
            })
            .collect();
        let config = json!({
            "layers": layers,
            "gate": {"kind": self.gate, "architecture": self.architecture, "router_width": 4,
                "router_input_width": 3, "ancestor_keys": self.ancestor_keys,
                "balance_weight": 0.3},
            "activation": self.activation,
            "activation_position": self.position,
            "structure": self.structure,
            "shared_pool": self.shared,
            "init": init,
        });
        let config: SmoreConfig = serde_json::from_value(config).unwrap();
        // Fanouts that a multi-order mixture raises may leave the noisy gate no expert over; it
        // still runs.
        let widths = vec![4; self.layers.len()];
        Smore::new(SmoreSpec::with_router_widths(&config, &widths, D_IN, D_OUT).unwrap())
    }

    /// The adapter with parameters of which none is 0.
    fn filled(&self) -> (Smore, Vec<f64>) {
        let smore = self.adapter("normal");
        let params = numbers(smore.len(), self.seed);
        (smore, params)
    }

    fn tokens(&self, n: usize) -> Vec<f64> {
        numbers(n * D_IN, self.seed ^ 0x55)
    }
}

type Saved = SmoreSaved<Cpu<f64>>;

/// What the adapter adds to 0.
fn forward(
    smore: &Smore,
    noise: Option<&GateNoise<f64>>,
    params: &[f64],
    x: &[f64],
) -> (Vec<f64>, Saved) {
    let (params, x) = (params.to_vec(), x.to_vec());
    let mut y = vec![0.0; x.len() / D_IN * D_OUT];
    let n = y.len();
    let saved = smore.forward_with(
        &Cpu::<f64>::new(),
        None,
        noise,
        None,
        View::new(&params, params.len()),
        View::new(&x, x.len()),
        ViewMut::new(&mut y, n),
    );
    (y, saved)
}

/// `a` and `b` agree but for rounding.
fn same(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    let scale = b.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * scale)
}

/// The parameters by name.
struct Named<'a> {
    smore: &'a Smore,
    values: &'a [f64],
}

impl Named<'_> {
    fn get(&self, name: &str) -> &[f64] {
        let param = self.smore.layout.params.iter().find(|p| p.name == name);
        &self.values[param.unwrap_or_else(|| panic!("no {name}")).range()]
    }

    /// The part of expert `e` in layer `l`.
    fn of_expert(&self, kind: &str, l: usize, e: usize) -> &[f64] {
        let pool = if self.smore.spec.shared_pool { 0 } else { l };
        let all = self.get(&format!("{kind}.{pool}"));
        let len = all.len() / self.smore.spec.layers[l].experts;
        &all[e * len..(e + 1) * len]
    }

    /// u of expert `e` in layer `l`.
    fn residual(&self, l: usize, e: usize, x: &[f64]) -> Vec<f64> {
        let down = affine(self.of_expert("moe_A", l, e), self.of_expert("moe_A_bias", l, e), x);
        let (up, bias) = (self.of_expert("moe_B", l, e), self.of_expert("moe_B_bias", l, e));
        let scale = self.smore.spec.layers[l].scale;
        affine(up, bias, &down).into_iter().map(|u| scale * u).collect()
    }
}

/// weight x + bias
fn affine(weight: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |(w, b): (&[f64], &f64)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b;
    weight.chunks(x.len()).zip(bias).map(row).collect()
}

/// a b of row-major matrices; `inner` columns of a, rows of b.
fn product(a: &[f64], b: &[f64], inner: usize) -> Vec<f64> {
    let columns = b.len() / inner;
    let cell = |row: &[f64], j: usize| (0..inner).map(|i| row[i] * b[i * columns + j]).sum();
    a.chunks(inner).flat_map(|row| (0..columns).map(move |j| cell(row, j))).collect()
}

/// The output for token `t` as a mixture of residuals of all orders: what every expert of the
/// returned tree weighs in the end, and one matrix per layer from its residuals to the output.
fn collapsed(named: &Named, saved: &Saved, t: usize, x: &[f64], position: &str) -> Vec<f64> {
    let spec = &named.smore.spec;
    let mut y = named.get("moe_W_final_bias").to_vec();
    let mut map = named.get("moe_W_final").to_vec();
    // What each output of the layer weighs at the root.
    let mut weights = vec![1.0];
    for (l, layer) in spec.layers.iter().enumerate().rev() {
        let nodes = &saved.routing.tree.layers[l];
        let at = t * layer.nodes;
        let mut mixture = vec![0.0; layer.width];
        let mut below = vec![0.0; l.checked_sub(1).map_or(0, |b| spec.layers[b].parents)];
        for i in 0..layer.nodes {
            let gate = nodes.gate_weight[at + i];
            let parent = weights[i / layer.fanout];
            let residual = parent * gate;
            // Under `child` the gate weighs only the residual.
            let passed_on = if position == "child" { parent } else { residual };
            let u = named.residual(l, usize::from(nodes.expert_idx[at + i]), x);
            for (m, u) in mixture.iter_mut().zip(u) {
                *m += residual * u;
            }
            if l > 0 {
                for (m, b) in mixture.iter_mut().zip(named.get(&format!("moe_W_bias.{l}"))) {
                    *m += passed_on * b;
                }
                let row = nodes.source.as_ref().map_or(i, |s| s[at + i] as usize);
                below[row] += passed_on;
            }
        }
        y = affine(&map, &y, &mixture);
        if l > 0 {
            map = product(&map, named.get(&format!("moe_W.{l}")), layer.width);
        }
        weights = below;
    }
    y
}

/// The parameters with expert `order[j]` of the given layers at place j.
fn permuted(smore: &Smore, params: &[f64], layers: &[usize], order: &[usize]) -> Vec<f64> {
    let mut values = params.to_vec();
    for param in &smore.layout.params {
        let own = |l: &usize| {
            let names = ["moe_A", "moe_A_bias", "moe_B", "moe_B_bias"];
            let mut names: Vec<String> = names.iter().map(|n| format!("{n}.{l}")).collect();
            names.push(format!("moe_gate.{l}.keys"));
            names.push(format!("moe_gate.{l}.weight_noise.weight"));
            names.contains(&param.name)
        };
        if layers.iter().any(own) {
            values[param.range()].copy_from_slice(&rows(&params[param.range()], order));
        }
    }
    values
}

/// The equal parts of `values` in another order.
fn rows(values: &[f64], order: &[usize]) -> Vec<f64> {
    let len = values.len() / order.len();
    order.iter().flat_map(|&i| values[i * len..(i + 1) * len].iter().copied()).collect()
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// A token alone has in z what the batch computed for its router and its experts. Routed from the
/// top, it leaves the other experts' weights unread: 0.
fn check_own_part(
    smore: &Smore,
    own: &Saved,
    together: &[f64],
    bottom_up: bool,
) -> Result<(), TestCaseError> {
    let spec = &smore.spec;
    let mut read = vec![bottom_up; spec.stack_width()];
    read[spec.stacked_ranks()..].fill(true);
    for (layer, tree) in spec.layers.iter().zip(&own.routing.tree.layers) {
        for &expert in &tree.expert_idx {
            let first = layer.stack_start + usize::from(expert) * layer.rank;
            read[first..first + layer.rank].fill(true);
        }
    }
    let pairs = together.iter().zip(read);
    let want: Vec<f64> = pairs.map(|(&z, read)| if read { z } else { 0.0 }).collect();
    prop_assert!(same(&own.z, &want, 1e-12), "{:?} against {want:?}", own.z);
    Ok(())
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn starts_as_the_zero_map(drawn in drawn()) {
        for method in ["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"] {
            let smore = drawn.adapter(method);
            let mut rng = stream(drawn.seed, Purpose::AdapterInit, 0, 0);
            let values = init::smore(&smore.spec, &smore.layout, &mut rng);
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let (y, _) = forward(&smore, None, &values, &drawn.tokens(TOKENS));
            let zero = y.iter().all(|&y| y == 0.0);
            // One expert behind a relu may be silent for every token.
            prop_assert!(zero == (method != "normal") || drawn.activation == "relu", "{method}");
            prop_assert!(zero || method == "normal", "{method}");
        }
    }

    #[test]
    fn one_linear_expert_is_a_lora(mut drawn in drawn()) {
        drawn.layers.truncate(1);
        (drawn.layers[0].0, drawn.layers[0].1) = (1, 1);
        drawn.activation = "identity";
        if drawn.gate == "noisy_topk" {
            drawn.gate = "switch";
        }
        let (smore, params) = drawn.filled();
        let x = drawn.tokens(TOKENS);
        let (y, _) = forward(&smore, None, &params, &x);
        let named = Named { smore: &smore, values: &params };
        let (layer, w) = (&smore.spec.layers[0], named.get("moe_W_final"));
        // y = up (A x + a) + shift, up = scale W_proj B.
        let mut up = product(w, named.get("moe_B.0"), layer.width);
        let bias: Vec<f64> = named.get("moe_B_bias.0").iter().map(|b| layer.scale * b).collect();
        let shift = affine(w, named.get("moe_W_final_bias"), &bias);
        for u in &mut up {
            *u *= layer.scale;
        }
        for (x, y) in x.chunks(D_IN).zip(y.chunks(D_OUT)) {
            let down = affine(named.get("moe_A.0"), named.get("moe_A_bias.0"), x);
            let want = affine(&up, &shift, &down);
            prop_assert!(same(y, &want, 1e-12), "{y:?} against {want:?}");
        }
    }

    #[test]
    fn without_sigma_collapses(mut drawn in drawn(), structure in 0..3) {
        drawn.activation = "identity";
        if structure == 1 {
            drawn.structure = "multi_order";
        } else if structure == 2 {
            (drawn.gate, drawn.architecture) = ("switch", "bottom_up");
        }
        let (smore, params) = drawn.filled();
        let x = drawn.tokens(TOKENS);
        let (y, saved) = forward(&smore, None, &params, &x);
        let named = Named { smore: &smore, values: &params };
        for (t, (x, y)) in x.chunks(D_IN).zip(y.chunks(D_OUT)).enumerate() {
            let want = collapsed(&named, &saved, t, x, drawn.position);
            prop_assert!(same(y, &want, 1e-11), "{y:?} against {want:?}");
        }
    }

    #[test]
    fn names_of_experts_do_not_matter(drawn in drawn(), pick in any::<prop::sample::Index>(),
                                      shift in 0usize..4, turn in any::<bool>()) {
        let (smore, params) = drawn.filled();
        let layers: Vec<usize> = if drawn.shared {
            (0..smore.spec.depth()).collect()
        } else {
            vec![pick.index(smore.spec.depth())]
        };
        let s = smore.spec.layers[layers[0]].experts;
        let mut order: Vec<usize> = (0..s).collect();
        order.rotate_left(shift % s);
        if turn {
            order.reverse();
        }
        let noise = GateNoise {
            layers: smore.spec.layers.iter()
                .map(|l| numbers(TOKENS * l.parents * l.experts, drawn.seed ^ 0xaa))
                .collect(),
        };
        let mut moved = noise.clone();
        for &l in &layers {
            moved.layers[l] = noise.layers[l].chunks(s).flat_map(|n| rows(n, &order)).collect();
        }
        let noisy = drawn.gate == "noisy_topk";
        let x = drawn.tokens(TOKENS);
        let (y, old) = forward(&smore, Some(&noise).filter(|_| noisy), &params, &x);
        let params = permuted(&smore, &params, &layers, &order);
        let (z, new) = forward(&smore, Some(&moved).filter(|_| noisy), &params, &x);
        prop_assert!(same(&z, &y, 1e-12), "{y:?} became {z:?}");
        let (old, new) = (old.routing, new.routing);
        prop_assert!(same(&new.balance_losses, &old.balance_losses, 1e-12));
        for l in 0..smore.spec.depth() {
            let moved = layers.contains(&l);
            let was = |e: usize| if moved { order[e] } else { e };
            for e in 0..smore.spec.layers[l].experts {
                let (new, old) = (&new.stats[l], &old.stats[l]);
                prop_assert!(same(&[new.load[e]], &[old.load[was(e)]], 1e-12));
                prop_assert!(same(&[new.importance[e]], &[old.importance[was(e)]], 1e-12));
            }
            // The dense gate lists its experts by their numbers, the others by their scores.
            if drawn.gate != "dense" {
                let (new, old) = (&new.tree.layers[l], &old.tree.layers[l]);
                prop_assert!(same(&new.gate_weight, &old.gate_weight, 1e-12));
                for (&new, &old) in new.expert_idx.iter().zip(&old.expert_idx) {
                    prop_assert_eq!(was(usize::from(new)), usize::from(old));
                }
            }
        }
    }

    #[test]
    fn tokens_do_not_meet(drawn in drawn(), bottom_up in any::<bool>()) {
        // More tokens than one block of the pass holds.
        const MANY: usize = 37;
        let mut drawn = drawn;
        if bottom_up {
            (drawn.gate, drawn.architecture) = ("switch", "bottom_up");
        }
        let (smore, params) = drawn.filled();
        let x = drawn.tokens(MANY);
        let (y, saved) = forward(&smore, None, &params, &x);
        for (t, (x, y)) in x.chunks(D_IN).zip(y.chunks(D_OUT)).enumerate() {
            let (alone, own) = forward(&smore, None, &params, x);
            prop_assert!(same(&alone, y, 1e-12), "token {t}: {alone:?} against {y:?}");
            let together = saved.routing.tree.tokens(&smore.spec, t, 1);
            for (own, together) in own.routing.tree.layers.iter().zip(&together.layers) {
                prop_assert_eq!(&own.expert_idx, &together.expert_idx);
                prop_assert_eq!(&own.source, &together.source);
                prop_assert!(same(&own.gate_weight, &together.gate_weight, 1e-12));
            }
            let z = &saved.z[t * smore.spec.stack_width()..][..smore.spec.stack_width()];
            check_own_part(&smore, &own, z, bottom_up)?;
        }
    }

    #[test]
    fn children_share_one(drawn in drawn()) {
        let (smore, params) = drawn.filled();
        let (_, saved) = forward(&smore, None, &params, &drawn.tokens(TOKENS));
        for (layer, nodes) in smore.spec.layers.iter().zip(&saved.routing.tree.layers) {
            prop_assert_eq!(nodes.expert_idx.len(), TOKENS * layer.nodes);
            let family = nodes.gate_weight.chunks(layer.fanout);
            for (weights, experts) in family.zip(nodes.expert_idx.chunks(layer.fanout)) {
                let sum: f64 = weights.iter().sum();
                if layer.fanout > 1 || drawn.gate == "dense" || layer.experts == 1 {
                    prop_assert!((sum - 1.0).abs() < 1e-12, "{weights:?}");
                    prop_assert!(weights.iter().all(|&w| w > 0.0));
                } else if drawn.gate == "switch" {
                    // A single choice keeps its probability, the largest of all.
                    prop_assert!(sum < 1.0 && sum >= 1.0 / layer.experts as f64);
                } else {
                    prop_assert!(sum.abs() <= 1.0 + 1e-12, "no cosine: {sum}");
                }
                let mut experts = experts.to_vec();
                experts.sort_unstable();
                experts.dedup();
                prop_assert_eq!(experts.len(), layer.fanout);
            }
        }
    }
}

/// The roots of three trees over the same six experts, all weights equal: in (b) and (c) the same
/// pairs of leaves hang under exchanged parents, in (a) the leaves are paired differently.
fn three_roots(activation: &'static str, position: &'static str) -> [Vec<f64>; 3] {
    let drawn = Drawn {
        layers: vec![(4, 2, 2, Some(3.0)), (2, 2, 1, Some(2.0))],
        shared: false,
        gate: "switch",
        architecture: "mlp",
        activation,
        position,
        structure: "tree",
        ancestor_keys: true,
        seed: 7,
    };
    let (smore, mut params) = drawn.filled();
    for param in smore.layout.params.iter().filter(|p| p.name.ends_with(".keys")) {
        params[param.range()].fill(0.25);
    }
    let (_, saved) = forward(&smore, None, &params, &drawn.tokens(TOKENS));
    let (spec, layout) = (&smore.spec, &smore.layout);
    let pass = Pass { spec, layout, valid: None, noise: None, removed: None };
    let mut routing = saved.routing;
    [[0, 2, 1, 3], [0, 1, 2, 3], [2, 3, 0, 1]].map(|leaves| {
        routing.tree.layers[1].expert_idx = [0, 1].repeat(TOKENS);
        routing.tree.layers[0].expert_idx = leaves.repeat(TOKENS);
        let mut hidden = hidden_states(&pass, &routing, &params, &saved.z);
        hidden.pop().unwrap()
    })
}

#[test]
fn exchanged_subtrees_differ_under_all_alone() {
    for position in ["child", "child_v2"] {
        let [a, b, c] = three_roots("tanh", position);
        assert!(same(&b, &c, 1e-13), "{position}: {b:?} against {c:?}");
        assert!(!same(&a, &b, 1e-3) && !same(&a, &c, 1e-3), "{position}");
    }
    let [a, b, c] = three_roots("tanh", "all");
    assert!(!same(&a, &b, 1e-3) && !same(&a, &c, 1e-3) && !same(&b, &c, 1e-3));
    // Without sigma only the experts count, not where they hang.
    for position in ["all", "child", "child_v2"] {
        let [a, b, c] = three_roots("identity", position);
        assert!(same(&a, &b, 1e-13) && same(&b, &c, 1e-13), "{position}");
    }
}
