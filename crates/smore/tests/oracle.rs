//! One table of cases on every path: the reference, the fused pass in f64 and in f32.

mod common;

use common::case::{Case, TOKENS};
use common::close;
use common::table::cases;
use smore_engine::Float;

/// Tokens whose trees are the reference's. Rounding may turn a near tie.
fn same_trees<T: Float>(case: &Case, want: &smore::reference::Output) -> Vec<usize> {
    let (_, saved) = case.run::<T>();
    let same = |t: &usize| {
        case.smore.spec.layers.iter().enumerate().all(|(l, layer)| {
            let nodes = t * layer.nodes..(t + 1) * layer.nodes;
            let got = &saved.routing.tree.layers[l].expert_idx[nodes.clone()];
            *got == want.layers[l].expert_idx[nodes]
        })
    };
    (0..TOKENS).filter(same).collect()
}

/// The rows of the given tokens, `per` numbers each.
fn rows<T: Copy>(all: &[T], tokens: &[usize], per: usize) -> Vec<T> {
    tokens.iter().flat_map(|t| all[t * per..(t + 1) * per].to_vec()).collect()
}

/// Output, weights and balance losses in `T`, on the tokens that took the reference's trees.
fn compare<T: Float>(case: &Case, spared: usize, allowed: f64) {
    let (spec, name) = (&case.smore.spec, &case.name);
    let want = case.reference();
    let (y, saved) = case.run::<T>();
    let same = same_trees::<T>(case, &want);
    assert!(same.len() + spared >= TOKENS, "{} of {TOKENS} trees equal: {name}", same.len());
    let pick = |y: &[f64]| rows(y, &same, spec.d_out);
    close(&format!("y of {name}"), &pick(&want.y), &rows(&y, &same, spec.d_out), allowed);
    for (l, layer) in want.layers.iter().enumerate() {
        let weights = &saved.routing.tree.layers[l].gate_weight;
        let nodes = spec.layers[l].nodes;
        let what = format!("weights of layer {l} of {name}");
        let want = rows(&layer.gate_weight, &same, nodes);
        close(&what, &want, &rows(weights, &same, nodes), allowed);
        if same.len() == TOKENS {
            let got = saved.routing.balance_losses[l];
            close(
                &format!("balance of layer {l} of {name}"),
                &[layer.balance_loss],
                &[got],
                allowed,
            );
        }
    }
}

#[test]
fn the_fused_pass_in_f64() {
    for case in cases() {
        compare::<f64>(&case, 0, 1e-12);
    }
}

#[test]
fn the_fused_pass_in_f32() {
    for case in cases() {
        compare::<f32>(&case, 1, 1e-5);
    }
}

#[test]
fn hidden_states_of_every_layer() {
    for case in cases() {
        let (_, saved) = case.run::<f64>();
        let hidden = case.hidden_on(&case.params, &case.x, &saved.routing.tree);
        for (l, layer) in case.reference().layers.iter().enumerate() {
            close(&format!("hidden {l} of {}", case.name), &layer.hidden, &hidden[l], 1e-12);
        }
    }
}

#[test]
fn the_table_leaves_no_scale_at_one() {
    for case in cases() {
        assert!(case.smore.spec.layers.iter().all(|l| l.scale != 1.0), "{}", case.name);
        assert!(case.params.iter().chain(&case.x).all(|&v| v != 0.0));
    }
}
