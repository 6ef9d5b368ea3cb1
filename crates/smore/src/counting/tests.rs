//! Hand-worked tables, and trees counted one by one.

use super::flexibility::{self, Choice, Flexibility, Formula};
use super::*;
use crate::config::SmoreConfig;
use crate::rng::{Purpose, stream};
use num_bigint::BigUint;
use rand::Rng;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// `layers` are (s, f, r); `rest` are further keys of the config.
fn spec(layers: &[(usize, usize, usize)], rest: Value, d: usize) -> SmoreSpec {
    let layers: Vec<Value> =
        layers.iter().map(|&(s, f, r)| json!({"experts": s, "fanout": f, "rank": r})).collect();
    let mut config = json!({"layers": layers});
    let Value::Object(rest) = rest else { panic!("keys expected") };
    config.as_object_mut().unwrap().extend(rest);
    let config: SmoreConfig = serde_json::from_value(config).unwrap();
    SmoreSpec::new(&config, d, d).unwrap()
}

fn choose(pairs: &[(usize, usize)]) -> Vec<Choice> {
    pairs.iter().map(|&(experts, fanout)| Choice { experts, fanout }).collect()
}

/// The exact number; checks that its logarithm agrees.
fn number(gamma: &Flexibility) -> usize {
    let exact = gamma.exact.as_ref().unwrap();
    let number: usize = exact.try_into().unwrap();
    assert!((gamma.ln - (number as f64).ln()).abs() < 1e-9, "{gamma:?}");
    number
}

#[test]
fn the_papers_table_1() {
    // depth, rank, d_L, Delta, share of LoRA
    let rows = [
        (2, 8, 64, 5_120, "1.0"),
        (3, 8, 96, 14_336, "1.8"),
        (4, 8, 128, 30_720, "2.9"),
        (2, 16, 128, 20_480, "2.0"),
        (3, 16, 192, 57_344, "3.6"),
        (4, 16, 256, 122_880, "5.9"),
    ];
    for (depth, rank, width, delta, share) in rows {
        let spec = spec(&vec![(4, 2, rank); depth], json!({}), 4096);
        assert_eq!(spec.root_width(), width);
        assert_eq!(parameters_above_lora(&spec), delta);
        let squares: usize = spec.layers.iter().map(|l| l.width * l.width).sum();
        assert_eq!(delta, squares, "Delta is the sum of d_l^2");
        assert_eq!(paper_parameters(&spec), 2 * 4096 * width + delta);
        assert_eq!(format!("{:.1}", 100.0 * parameter_overhead(&spec)), share, "L = {depth}");
    }
}

#[test]
fn the_papers_table_6() {
    let rows = [(8, ["1.2", "3.3", "7.5"]), (16, ["2.3", "6.6", "15.0"])];
    for (rank, shares) in rows {
        for (depth, share) in (2..).zip(shares) {
            let spec = spec(&vec![(4, 2, rank); depth], json!({}), 4096);
            let overhead = 100.0 * propagation_overhead(&spec);
            assert_eq!(format!("{overhead:.1}"), share, "L = {depth}, r = {rank}");
        }
    }
}

#[test]
fn parameters_of_all_parts_make_the_layout() {
    let layers = [(4, 2, 3), (4, 1, 3)];
    let gates = [
        json!({}),
        json!({"gate": {"kind": "noisy_topk", "activation": "prelu|0.25"}}),
        json!({"gate": {"architecture": "linear", "router_input_width": 5}}),
        json!({"gate": {"architecture": "bottom_up"}}),
        json!({"activation": "prelu|0.25", "shared_pool": true}),
        json!({"activation": "identity", "structure": "multi_order"}),
    ];
    for rest in gates {
        let spec = spec(&layers, rest.clone(), 24);
        let parts = Parameters::of(&spec);
        assert_eq!(parts.total(), smore_parameters(&spec), "{rest}");
        let named: usize = parts.parts().iter().map(|(_, n)| n).sum();
        assert_eq!(named, parts.total());
        let matrices = paper_parameters(&spec) + parts.slopes;
        assert_eq!(parts.experts(), matrices + parts.biases(), "{rest}");
        assert!(active_parameters(&spec) <= parts.experts(), "{rest}");
    }
}

#[test]
fn what_is_shared_counts_once() {
    let own = Parameters::of(&spec(&[(4, 2, 3); 3], json!({}), 24));
    let shared = spec(&[(4, 2, 3); 3], json!({"shared_pool": true}), 24);
    let pool = Parameters::of(&shared);
    assert_eq!((pool.down, 3 * pool.down), (4 * 3 * 24, own.down));
    assert_eq!(parameters_above_lora(&shared), 3 * 12 * 12, "B once, W twice");
    let compute = Multiplications::of(&shared);
    assert_eq!(compute.down, 4 * 3 * 24, "min(s, F_0) experts");
    assert_eq!(compute.transform, (4 + 2) * 12 * 12, "F_1 = 4, F_2 = 2");
}

#[test]
fn a_token_meets_no_more_than_its_tree() {
    let compute = |rest| Multiplications::of(&spec(&[(8, 2, 3), (8, 2, 3)], rest, 40));
    let tree = compute(json!({}));
    assert_eq!((tree.down, tree.up), (6 * 3 * 40, 4 * 3 * 24 + 2 * 3 * 48));
    assert_eq!((tree.transform, tree.projection), (2 * 24 * 48, 40 * 48));
    let mlp = |input: usize| 32 * input + 32 * 32 + 8 * 32;
    assert_eq!(tree.router, 32 * 40 + mlp(32) + 2 * mlp(64));
    assert_eq!(tree.total(), tree.paper() + tree.router);
    // Without ancestors' keys all parents ask the same; without a tree the layers hand on one sum.
    let flat_routing = compute(json!({"gate": {"ancestor_keys": false}}));
    assert_eq!(flat_routing.router, 32 * 40 + 2 * mlp(32));
    let sums = compute(json!({"structure": "multi_order", "activation": "identity"}));
    assert_eq!((sums.down, sums.transform), (tree.down, 24 * 48));
    let dense = compute(json!({"gate": {"kind": "dense"}}));
    assert_eq!((dense.down, dense.transform), (16 * 3 * 40, 8 * 24 * 48));
}

#[test]
fn the_authors_take_a_dense_gate_for_a_sparse_one() {
    let layers = [(4, 2, 3), (4, 2, 3)];
    let (sparse, dense) =
        (spec(&layers, json!({}), 24), spec(&layers, json!({"gate": {"kind": "dense"}}), 24));
    assert_eq!(AuthorStats::of(&sparse, &[2, 2]), AuthorStats::of(&dense, &[2, 2]));
    let all = AuthorStats::of(&dense, &[4, 4]);
    assert_eq!(all.active_param, active_parameters(&dense));
    assert_eq!(all.expert_flops, Multiplications::of(&dense).paper());
    let few = AuthorStats::of(&sparse, &[2, 2]);
    assert_eq!(few.active_param, active_parameters(&sparse));
    assert_eq!(few.expert_flops, Multiplications::of(&sparse).paper());
}

#[test]
fn counts_add_up() {
    let one = Multiplications { down: 1, up: 2, transform: 3, projection: 4, router: 5 };
    let sum: Multiplications = [one * 2, one].into_iter().sum();
    assert_eq!(sum, Multiplications { down: 3, up: 6, transform: 9, projection: 12, router: 15 });
}

#[test]
fn lora_of_equal_size() {
    let spec = spec(&[(4, 2, 8); 2], json!({}), 4096);
    assert_eq!(equal_rank_lora_parameters(&spec), 2 * 4096 * 64);
    let rank = lora_rank_for(smore_parameters(&spec), &[(4096, 4096)]);
    assert!(rank > 64 && rank < 90, "{rank}: biases, transforms and router come on top");
    assert_eq!(lora_rank_for(0, &[(4, 4)]), 1);
    assert_eq!(lora_rank_for(10, &[]), 1);
}

#[test]
fn hand_worked_flexibility() {
    let two_of_four = choose(&[(4, 2); 3]);
    assert_eq!(number(&flexibility::smore(&two_of_four[..2])), 216);
    assert_eq!(number(&flexibility::smore(&two_of_four)), 279_936);
    assert_eq!(number(&flexibility::smore_sharp(4, &[2, 2, 2])), 279_936);
    assert_eq!(number(&flexibility::flat_mixture(two_of_four[0])), 6);
    // 6 (C(4, 2) + C(4, 3) + C(4, 4)); G_1 = 6, G_2 = 6 C(7, 2), G_3 = 6 C(127, 2)
    assert_eq!(number(&flexibility::momor_bound(&two_of_four[..2])), 66);
    assert_eq!(number(&flexibility::smore_star(&two_of_four[..2])), 126);
    assert_eq!(number(&flexibility::smore_star(&two_of_four)), 48_006);
    let impossible = flexibility::flat_mixture(Choice { experts: 2, fanout: 3 });
    assert_eq!(impossible.exact, Some(BigUint::ZERO));
}

#[test]
fn absurd_numbers_keep_their_logarithm_only() {
    let huge = flexibility::smore(&choose(&[(6_000, 3_000); 16]));
    assert!(huge.exact.is_none() && huge.ln > 1e50 && huge.ln.is_finite());
    let star = flexibility::smore_star(&choose(&[(64, 32); 8]));
    assert!(star.exact.is_none() && star.ln.is_finite());
    // C(4, 2) one time for each of 2^13 - 1 parents
    let long = flexibility::smore(&choose(&[(4, 2); 13]));
    assert_eq!(long.exact.unwrap(), BigUint::from(6u8).pow(8191));
    assert!((long.ln - 8191.0 * 6f64.ln()).abs() < 1e-6);
    let dense = flexibility::smore(&choose(&[(2, 2); 40]));
    assert_eq!(number(&dense), 1);
    assert!(
        (flexibility::momor_bound(&choose(&[(2000, 1), (2000, 2000)])).log10()
            - 2000.0 * 2f64.log10())
        .abs()
            < 1e-6
    );
}

#[test]
fn each_kind_of_adapter_has_its_formula() {
    let formula = |rest| Formula::of(&spec(&[(4, 2, 3); 2], rest, 24));
    assert_eq!(formula(json!({})), Some(Formula::Smore));
    assert_eq!(formula(json!({"shared_pool": true})), Some(Formula::SmoreSharp));
    assert_eq!(formula(json!({"activation_position": "child"})), Some(Formula::SmoreStar));
    assert_eq!(formula(json!({"activation": "identity"})), Some(Formula::MomorBound));
    assert_eq!(
        formula(json!({"gate": {"ancestor_keys": false}})),
        Some(Formula::OneChoicePerLayer)
    );
    assert_eq!(formula(json!({"gate": {"architecture": "bottom_up"}})), None);
    let multi_order =
        spec(&[(4, 2, 3); 2], json!({"structure": "multi_order", "activation": "identity"}), 24);
    let (used, gamma) = flexibility::of(&multi_order).unwrap();
    assert_eq!((used, number(&gamma)), (Formula::OneChoicePerLayer, 6), "all four leaves act");
    let one = spec(&[(4, 2, 3)], json!({"gate": {"architecture": "bottom_up"}}), 24);
    let (used, gamma) = flexibility::of(&one).unwrap();
    assert_eq!((used, number(&gamma)), (Formula::FlatMixture, 6));
}

/// Width of all vectors in the trees below.
const WIDTH: usize = 3;
type Vector = [f64; WIDTH];

/// Where the toy adapter's activation stands.
#[derive(Clone, Copy, PartialEq)]
enum Sigma {
    All,
    Child,
    ChildV2,
    /// No activation; every expert that a layer's nodes hold acts once.
    MultiOrder,
}

/// One token's residuals and transforms, drawn at random.
struct Toy {
    layers: Vec<Choice>,
    /// `[layer][expert]`
    residuals: Vec<Vec<Vector>>,
    /// `[layer]`, and its bias
    transforms: Vec<([Vector; WIDTH], Vector)>,
    sigma: Sigma,
}

impl Toy {
    fn new(layers: &[(usize, usize)], sigma: Sigma, shared: bool) -> Self {
        let mut rng = stream(7, Purpose::AdapterInit, 0, 0);
        let mut vector = || -> Vector {
            std::array::from_fn(|_| f64::from(rng.next_u32()) / f64::from(u32::MAX) * 2.0 - 1.0)
        };
        let layers = choose(layers);
        let mut residuals: Vec<Vec<Vector>> =
            layers.iter().map(|l| (0..l.experts).map(|_| vector()).collect()).collect();
        if shared {
            let pool = residuals[0].clone();
            residuals.fill(pool);
        }
        let transforms =
            layers.iter().map(|_| (std::array::from_fn(|_| vector()), vector())).collect();
        Self { layers, residuals, transforms, sigma }
    }

    /// Output of every tree below one node of layer l + 1, one entry per tree.
    fn outputs(&self, l: usize) -> Vec<Vector> {
        let below = if l == 0 { vec![] } else { self.outputs(l - 1) };
        let mut all = Vec::new();
        for children in subsets(self.layers[l]) {
            let mut sums = vec![[0.0; WIDTH]];
            for &child in &children {
                let gate_weight = 1.0 / children.len() as f64;
                let terms: Vec<Vector> = if l == 0 {
                    vec![self.leaf(self.residuals[0][child], gate_weight)]
                } else {
                    below.iter().map(|x| self.node(l, child, x, gate_weight)).collect()
                };
                sums = sums.iter().flat_map(|s| terms.iter().map(|t| add(*s, *t))).collect();
            }
            all.extend(sums);
        }
        all
    }

    fn leaf(&self, residual: Vector, gate_weight: f64) -> Vector {
        residual.map(|u| gate_weight * if self.sigma == Sigma::All { u.tanh() } else { u })
    }

    fn node(&self, l: usize, expert: usize, below: &Vector, gate_weight: f64) -> Vector {
        let residual = self.residuals[l][expert];
        match self.sigma {
            Sigma::All => add(residual, self.transform(l, *below)).map(|v| gate_weight * v.tanh()),
            Sigma::Child => {
                add(residual.map(|v| gate_weight * v), self.transform(l, below.map(f64::tanh)))
            }
            Sigma::ChildV2 => {
                add(residual, self.transform(l, below.map(f64::tanh))).map(|v| gate_weight * v)
            }
            Sigma::MultiOrder => unreachable!("its layers are summed as a whole"),
        }
    }

    fn transform(&self, l: usize, x: Vector) -> Vector {
        let (weight, bias) = &self.transforms[l];
        std::array::from_fn(|i| bias[i] + (0..WIDTH).map(|j| weight[i][j] * x[j]).sum::<f64>())
    }

    /// The sets of experts that a layer's nodes hold together, for every tree: one set per layer,
    /// and the nodes from which the next layer goes on.
    fn multi_order_outputs(&self) -> Vec<Vector> {
        let mut trees: Vec<(usize, Vector)> = vec![(1, [0.0; WIDTH])];
        for l in (0..self.layers.len()).rev() {
            let sets = subsets(self.layers[l]);
            let mut next = Vec::new();
            for (parents, sum) in trees {
                for union in unions(&sets, parents) {
                    let acts = union.iter().map(|&e| self.residuals[l][e]).fold(sum, add);
                    next.push((parents * self.layers[l].fanout, acts));
                }
            }
            trees = next;
        }
        trees.into_iter().map(|(_, sum)| sum).collect()
    }

    fn distinct(&self) -> usize {
        let outputs = if self.sigma == Sigma::MultiOrder {
            self.multi_order_outputs()
        } else {
            self.outputs(self.layers.len() - 1)
        };
        let grid = |v: Vector| v.map(|x| (x * 1e10).round() as i64);
        outputs.into_iter().map(grid).collect::<BTreeSet<_>>().len()
    }
}

fn add(a: Vector, b: Vector) -> Vector {
    std::array::from_fn(|i| a[i] + b[i])
}

/// All sets of `fanout` out of `experts`.
fn subsets(Choice { experts, fanout }: Choice) -> Vec<BTreeSet<usize>> {
    let members = |mask: u32| (0..experts).filter(move |e| mask >> e & 1 == 1).collect();
    let masks = (0..1u32 << experts).filter(|m| m.count_ones() as usize == fanout);
    masks.map(members).collect()
}

/// What `parents` sets hold together, for every way to choose them.
fn unions(sets: &[BTreeSet<usize>], parents: usize) -> Vec<BTreeSet<usize>> {
    (0..parents).fold(vec![BTreeSet::new()], |unions, _| {
        unions.iter().flat_map(|u| sets.iter().map(move |s| u | s)).collect()
    })
}

/// Unequal layers, a single child, a choice without alternative, three layers.
const SMALL: [&[(usize, usize)]; 8] = [
    &[(3, 2), (3, 2)],
    &[(4, 2), (4, 2)],
    &[(4, 1), (3, 2)],
    &[(3, 2), (4, 1)],
    &[(4, 3), (3, 3)],
    &[(2, 2), (4, 3)],
    &[(3, 2), (3, 2), (3, 2)],
    &[(3, 1), (4, 3), (3, 2)],
];

#[test]
fn trees_counted_one_by_one_give_theorem_3_4() {
    for layers in SMALL.into_iter().chain([&[(4, 2); 3][..]]) {
        let toy = Toy::new(layers, Sigma::All, false);
        assert_eq!(toy.distinct(), number(&flexibility::smore(&toy.layers)), "{layers:?}");
        assert_eq!(toy.distinct(), toy.outputs(layers.len() - 1).len(), "no two trees alike");
    }
}

#[test]
fn trees_counted_one_by_one_give_corollary_3_5() {
    for layers in SMALL {
        for sigma in [Sigma::Child, Sigma::ChildV2] {
            let toy = Toy::new(layers, sigma, false);
            assert_eq!(toy.distinct(), number(&flexibility::smore_star(&toy.layers)), "{layers:?}");
        }
    }
}

#[test]
fn trees_counted_one_by_one_give_corollary_3_6() {
    for fanouts in [&[2, 2][..], &[1, 3], &[2, 1, 2]] {
        let layers: Vec<_> = fanouts.iter().map(|&f| (4, f)).collect();
        let toy = Toy::new(&layers, Sigma::All, true);
        assert_eq!(toy.distinct(), number(&flexibility::smore_sharp(4, fanouts)), "{fanouts:?}");
    }
}

#[test]
fn sets_counted_one_by_one_reach_theorem_3_3() {
    let mut reached = 0;
    for layers in SMALL {
        let toy = Toy::new(layers, Sigma::MultiOrder, false);
        let (distinct, bound) = (toy.distinct(), number(&flexibility::momor_bound(&toy.layers)));
        assert!(distinct <= bound, "{layers:?}: {distinct} above {bound}");
        reached += usize::from(distinct == bound);
    }
    assert!(reached >= 5, "the bound is tight, reached {reached} times");
}

#[test]
fn sets_counted_one_by_one_give_the_flat_mixture() {
    for layer in [(4, 2), (6, 3), (5, 1), (3, 3)] {
        let toy = Toy::new(&[layer], Sigma::All, false);
        assert_eq!(toy.distinct(), number(&flexibility::flat_mixture(toy.layers[0])));
    }
}
