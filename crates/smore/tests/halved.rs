//! A single token with an adapter's matrices in 16 bits: the same tree, and an output as near as they are.

mod common;

use common::case::{Case, D_IN, D_OUT, cast};
use common::numbers;
use smore::adapter::{Adapter, Lora, MapAdapter, Mode};
use smore::config::{LoraConfig, SmoreConfig};
use smore::spec::LoraSpec;
use smore_engine::{Cpu, Float, HostMatrix, MatrixRef, View, ViewMut};

/// A S'MoRE of two layers with so many experts in the upper one, and more settings of it and of its gate.
fn smore(experts: usize, more: &str, gate: &str) -> Case {
    let json = format!(
        r#"{{"layers": [{{"experts": 4, "fanout": 2, "rank": 3}},
            {{"experts": {experts}, "fanout": 2, "rank": 3}}],
            "gate": {{"router_width": 4, "router_input_width": 3{gate}}}{more}}}"#
    );
    Case::new(&serde_json::from_str::<SmoreConfig>(&json).unwrap(), 3, false)
}

fn base(bf16: bool) -> HostMatrix {
    let w = HostMatrix::from_f32(D_OUT, D_IN, &[0.5; D_OUT * D_IN]);
    if bf16 { w.to_bf16() } else { w }
}

/// Output and what was saved of token `t`, with the matrices in 16 bits or as they are; `None` where the
/// adapter has no such way.
fn token<T: Float, A: MapAdapter<Cpu<T>>>(
    adapter: &A,
    params: &[f64],
    t: usize,
    halved: Option<&HostMatrix>,
) -> Option<(Vec<T>, A::Saved)> {
    let (device, params) = (Cpu::<T>::default(), cast::<T>(params));
    let x = cast::<T>(&numbers(D_IN, 50 + t as u64));
    let mut y = cast::<T>(&numbers(D_OUT, 9));
    let (params, x) = (View::new(&params, params.len()), View::new(&x, D_IN));
    let target = ViewMut::new(&mut y, D_OUT);
    let saved = match halved {
        None => adapter.forward(&device, Mode::plain(), params, x, target),
        Some(w) => {
            let halved = adapter.halved(&device, MatrixRef::Frozen(w), params)?;
            adapter.forward_token(&device, params, &halved, x, target)
        }
    };
    Some((y, saved))
}

/// Greatest difference over the greatest value.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    let most = |x: &mut dyn Iterator<Item = f32>| x.fold(0.0, |most: f32, x| most.max(x.abs()));
    most(&mut a.iter().zip(b).map(|(a, b)| a - b)) / most(&mut b.iter().copied())
}

#[test]
fn the_tree_is_the_same_and_the_output_near() {
    for case in [
        smore(3, "", ""),
        smore(4, r#", "shared_pool": true"#, ""),
        smore(3, "", r#", "kind": "noisy_topk""#),
        smore(4, r#", "structure": "multi_order", "activation": "identity""#, ""),
    ] {
        let (mut most, w) = (0f32, base(true));
        for t in 0..30 {
            let (near, saved) = token::<f32, _>(&case.smore, &case.params, t, Some(&w)).unwrap();
            let (exact, whole) = token::<f32, _>(&case.smore, &case.params, t, None).unwrap();
            assert!(saved.routing.tree == whole.routing.tree, "{}: token {t}", case.name);
            most = most.max(apart(&near, &exact));
        }
        assert!(most > 1e-6 && most < 2e-3, "{}: {most}", case.name);
    }
}

#[test]
fn lora_is_near() {
    let spec = LoraSpec::new(&LoraConfig::new(3), D_IN, D_OUT).unwrap();
    let lora = Lora::new(spec);
    let (params, w) = (numbers(Adapter::len(&lora), 4), base(true));
    for t in 0..30 {
        let (near, _) = token::<f32, _>(&lora, &params, t, Some(&w)).unwrap();
        let (exact, _) = token::<f32, _>(&lora, &params, t, None).unwrap();
        let off = apart(&near, &exact);
        assert!(off > 0.0 && off < 2e-3, "token {t}: {off}");
    }
}

/// Weights in f32, numbers in f64, and a router that reads all experts leave the parameters as they are.
#[test]
fn nothing_is_rounded_where_the_map_is_not() {
    let case = smore(3, "", "");
    assert!(token::<f32, _>(&case.smore, &case.params, 0, Some(&base(false))).is_none());
    assert!(token::<f64, _>(&case.smore, &case.params, 0, Some(&base(true))).is_none());
    let case = smore(3, "", r#", "architecture": "bottom_up""#);
    assert!(token::<f32, _>(&case.smore, &case.params, 0, Some(&base(true))).is_none());
}
