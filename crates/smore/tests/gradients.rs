//! Every group of parameters by name, and x, against central differences in f64: with the choice
//! of experts free to move (it must not), and on trees held still by force.
//!
//! A group is checked along directions that move all of its elements, and at its steepest element
//! alone: see `common::slopes`.

mod common;

use common::case::{Case, D_IN, D_OUT};
use common::slopes::check;
use common::table::{bottom_up_cases, cases};
use common::{close, numbers};
use smore::adapter::{Lora, MapAdapter, Mode, SmoreSaved};
use smore::config::LoraConfig;
use smore::kernel::GateNoise;
use smore::spec::LoraSpec;
use smore_engine::{Cpu, View, ViewMut};

/// The balance losses enter times this.
const BALANCE: f64 = 2.5;

/// Parameters that this adapter holds and no loss can feel.
fn unfelt(case: &Case, name: &str) -> bool {
    use smore::config::ActivationPosition;
    let spec = &case.smore.spec;
    let leaf_slope = name == "moe_expert_act_param.0";
    // No sigma at the leaves; no noise in evaluation.
    leaf_slope && spec.position != ActivationPosition::All
        || name.contains("weight_noise") && case.noise.is_none()
        // One expert has nothing to be told apart from; its key still reaches its children.
        || name.contains("moe_gate.1.mlp") && spec.layers.get(1).is_some_and(|l| l.experts == 1)
}

fn same_choice(a: &SmoreSaved<Cpu<f64>>, b: &SmoreSaved<Cpu<f64>>) -> bool {
    let mut layers = a.routing.tree.layers.iter().zip(&b.routing.tree.layers);
    layers.all(|(a, b)| a.expert_idx == b.expert_idx && a.source == b.source)
}

/// sum(y g) and the balance losses; the choice must be the one in `saved`.
fn loss(case: &Case, saved: &SmoreSaved<Cpu<f64>>, params: &[f64], x: &[f64]) -> f64 {
    let (y, moved) = case.forward::<f64>(params, x);
    assert!(same_choice(saved, &moved), "another choice: {}", case.name);
    let task: f64 = y.iter().zip(&case.g).map(|(y, g)| y * g).sum();
    task + BALANCE * moved.routing.balance_losses.iter().sum::<f64>()
}

/// Both passes work on some tokens at a time. A text of repeated tokens has the outputs of one, and
/// its gradients as often as it is repeated; the balance losses are means and do not change.
#[test]
fn repeated_tokens_repeat_their_gradients() {
    const TIMES: usize = 23;
    let repeat = |v: &[f64]| v.repeat(TIMES);
    for case in cases().into_iter().chain(bottom_up_cases()) {
        let name = case.name.clone();
        let (one, dx) = case.gradients(0.0);
        let y = repeat(&case.run::<f64>().0);
        let silent = |case: Case| Case { g: vec![0.0; case.g.len()], ..case };
        let many = Case {
            x: repeat(&case.x),
            g: repeat(&case.g),
            valid: case.valid.as_ref().map(|v| v.repeat(TIMES)),
            noise: case
                .noise
                .as_ref()
                .map(|n| GateNoise { layers: n.layers.iter().map(|l| repeat(l)).collect() }),
            ..case
        };
        close(&format!("outputs of {name}"), &y, &many.run::<f64>().0, 1e-12);
        let (sum, dx_many) = many.gradients(0.0);
        let times: Vec<f64> = one.iter().map(|g| TIMES as f64 * g).collect();
        close(&format!("gradients of {name}"), &times, &sum, 1e-11);
        close(&format!("x of {name}"), &repeat(&dx), &dx_many, 1e-11);
        let few = Case::of(many.smore.spec.clone(), name.clone(), 0, false, 1);
        let few = Case {
            params: many.params.clone(),
            x: many.x[..many.x.len() / TIMES].to_vec(),
            g: vec![0.0; many.g.len() / TIMES],
            valid: many.valid.as_ref().map(|v| v[..v.len() / TIMES].to_vec()),
            noise: many.noise.as_ref().map(|n| GateNoise {
                layers: n.layers.iter().map(|l| l[..l.len() / TIMES].to_vec()).collect(),
            }),
            ..few
        };
        let (balance, _) = few.gradients(BALANCE);
        let (balance_many, _) = silent(many).gradients(BALANCE);
        // Where all experts are chosen the slopes cancel to nothing but rounding.
        if balance.iter().any(|g| g.abs() > 1e-12) {
            close(&format!("balance of {name}"), &balance, &balance_many, 1e-9);
        }
    }
}

#[test]
fn through_the_router() {
    for case in cases().into_iter().chain(bottom_up_cases()) {
        let (grads, dx) = case.gradients(BALANCE);
        let (_, saved) = case.run::<f64>();
        for param in &case.smore.layout.params {
            let name = format!("{} of {}", param.name, case.name);
            let felt = grads[param.range()].iter().any(|&g| g != 0.0);
            assert_eq!(felt, !unfelt(&case, &param.name), "{name}: gradient is zero");
            let f = |params: &[f64]| loss(&case, &saved, params, &case.x);
            check(&name, &case.params, param.range(), &grads, f);
        }
        let f = |x: &[f64]| loss(&case, &saved, &case.params, x);
        check(&format!("x of {}", case.name), &case.x, 0..case.x.len(), &dx, f);
    }
}

/// sum(y g) with y from the given trees' outputs: weights move, experts cannot.
fn loss_on(case: &Case, saved: &SmoreSaved<Cpu<f64>>, params: &[f64], x: &[f64]) -> f64 {
    let layout = &case.smore.layout;
    let hidden = case.hidden_on(params, x, &saved.routing.tree);
    let (weight, bias) =
        (&params[layout.output_proj..layout.output_bias], &params[layout.output_bias..layout.core]);
    let width = case.smore.spec.root_width();
    let mut sum = 0.0;
    for (root, g) in hidden[hidden.len() - 1].chunks(width).zip(case.g.chunks(D_OUT)) {
        for (i, g) in g.iter().enumerate() {
            let row = weight[i * width..(i + 1) * width].iter().zip(root);
            sum += g * (row.map(|(w, h)| w * h).sum::<f64>() + bias[i]);
        }
    }
    sum
}

#[test]
fn on_a_fixed_tree() {
    for case in cases().into_iter().step_by(3).chain(bottom_up_cases()) {
        let (grads, dx) = case.gradients(0.0);
        let (_, saved) = case.run::<f64>();
        for param in &case.smore.layout.params {
            let name = format!("{} of {}", param.name, case.name);
            let f = |params: &[f64]| loss_on(&case, &saved, params, &case.x);
            check(&name, &case.params, param.range(), &grads, f);
        }
        let f = |x: &[f64]| loss_on(&case, &saved, &case.params, x);
        check(&format!("x of {}", case.name), &case.x, 0..case.x.len(), &dx, f);
    }
}

/// What backward adds to is kept: gradients of several batches add up.
#[test]
fn gradients_accumulate() {
    let case = &cases()[0];
    let (grads, dx) = case.gradients(1.0);
    let (mut twice, mut twice_dx) = (vec![0.0; grads.len()], vec![0.0; dx.len()]);
    for _ in 0..2 {
        let (_, mut saved) = case.run::<f64>();
        case.smore.backward_with(
            &Cpu::<f64>::new(),
            case.valid.as_deref(),
            None,
            None,
            1.0,
            View::new(&case.params, grads.len()),
            &mut saved,
            View::new(&case.x, dx.len()),
            View::new(&case.g, case.g.len()),
            ViewMut::new(&mut twice, grads.len()),
            Some(ViewMut::new(&mut twice_dx, dx.len())),
        );
    }
    for (one, two) in grads.iter().chain(&dx).zip(twice.iter().chain(&twice_dx)) {
        assert!((2.0 * one - two).abs() <= 1e-12 * one.abs().max(1.0), "{one} {two}");
    }
}

#[test]
fn lora() {
    let config = LoraConfig { alpha: Some(4.5), ..LoraConfig::new(3) };
    let lora = Lora::new(LoraSpec::new(&config, D_IN, D_OUT).unwrap());
    let (device, n) = (Cpu::<f64>::new(), 6);
    let mode = Mode::plain();
    let (params, x, g) = (numbers(lora.layout.len, 1), numbers(n * D_IN, 2), numbers(n * D_OUT, 3));
    let run = |params: &[f64], x: &[f64]| {
        let mut y = vec![0.0; n * D_OUT];
        let target = ViewMut::new(&mut y, n * D_OUT);
        let (p, x) = (params.to_vec(), x.to_vec());
        let saved =
            lora.forward(&device, mode, View::new(&p, p.len()), View::new(&x, x.len()), target);
        (y.iter().zip(&g).map(|(y, g)| y * g).sum::<f64>(), saved)
    };
    let (_, mut saved) = run(&params, &x);
    let (mut grads, mut dx) = (vec![0.0; params.len()], vec![0.0; x.len()]);
    lora.backward(
        &device,
        mode,
        1.0,
        View::new(&params, params.len()),
        &mut saved,
        View::new(&x, x.len()),
        View::new(&g, g.len()),
        ViewMut::new(&mut grads, params.len()),
        Some(ViewMut::new(&mut dx, x.len())),
    );
    for param in &lora.layout.params {
        check(&param.name, &params, param.range(), &grads, |p| run(p, &x).0);
    }
    check("x", &x, 0..x.len(), &dx, |x| run(&params, x).0);
}
