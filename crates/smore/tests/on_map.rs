//! An adapter together with the map it is on: what both give one after the other.

mod common;

use common::{close, numbers};
use serde_json::json;
use smore::adapter::{Adapter, AnyAdapter, HydraLora, Lora, Map, MapAdapter, Mode, Smore};
use smore::spec::{HydraLoraSpec, LoraSpec, SmoreSpec};
use smore_engine::{Cpu, Device, Float, HostMatrix, MatrixRef, View, ViewMut};

const D_IN: usize = 72;
const D_OUT: usize = 48;
/// As many as the matrix unit wants, and not a whole number of its blocks.
const TOKENS: usize = 75;

fn adapters() -> Vec<AnyAdapter> {
    let layer = json!({"experts": 4, "fanout": 2, "rank": 8});
    let smore = serde_json::from_value(json!({"layers": [layer, layer]})).unwrap();
    let lora = serde_json::from_value(json!({"rank": 8, "alpha": 24})).unwrap();
    let hydra = serde_json::from_value(json!({"rank": 8, "heads": 3})).unwrap();
    vec![
        AnyAdapter::Smore(Smore::new(SmoreSpec::new(&smore, D_IN, D_OUT).unwrap())),
        AnyAdapter::Lora(Lora::new(LoraSpec::new(&lora, D_IN, D_OUT).unwrap())),
        AnyAdapter::HydraLora(HydraLora::new(HydraLoraSpec::new(&hydra, D_IN, D_OUT).unwrap())),
    ]
}

/// y, dx and gradients.
fn both_ways<T: Float>(
    adapter: &AnyAdapter,
    together: bool,
    bias: bool,
    accumulate: bool,
) -> [Vec<T>; 3] {
    let device = Cpu::<T>::default();
    let cast = |n, seed| numbers(n, seed).into_iter().map(T::from_f64).collect::<Vec<_>>();
    let w: Vec<f32> = numbers(D_OUT * D_IN, 1).into_iter().map(|x| x as f32).collect();
    let w = HostMatrix::from_f32(D_OUT, D_IN, &w).to_bf16();
    let (x, dy, row) = (cast(TOKENS * D_IN, 2), cast(TOKENS * D_OUT, 3), cast(D_OUT, 4));
    let params = cast(adapter.len(), 5);
    let [mut y, mut dx] = [cast(dy.len(), 6), cast(x.len(), 7)];
    let mut grads = vec![T::ZERO; params.len()];
    {
        let (w, bias) = (MatrixRef::Frozen(&w), bias.then(|| View::new(&row, D_OUT)));
        let (x, dy) = (View::new(&x, x.len()), View::new(&dy, dy.len()));
        let (params, mode) = (View::new(&params, params.len()), Mode::plain());
        let (mut y, mut dx) = (ViewMut::new(&mut y, dy.len), ViewMut::new(&mut dx, x.len));
        let grads = ViewMut::new(&mut grads, params.len);
        let map = || Some(Map { w, bias, accumulate });
        if together {
            let mut saved = adapter.forward_on(&device, mode, params, map(), x, y);
            let dx = Some(dx);
            adapter.backward_on(&device, mode, 1.0, params, map(), &mut saved, x, dy, grads, dx);
        } else {
            device.linear(x, w, bias, y.rb(), TOKENS, accumulate);
            let mut saved = adapter.forward(&device, mode, params, x, y);
            device.linear_backward(dy, w, dx.rb(), TOKENS, accumulate);
            adapter.backward(&device, mode, 1.0, params, &mut saved, x, dy, grads, Some(dx));
        }
    }
    [y, dx, grads]
}

fn agrees<T: Float>(allowed: f64) {
    for adapter in adapters() {
        for (bias, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
            let apart = both_ways::<T>(&adapter, false, bias, accumulate);
            let together = both_ways::<T>(&adapter, true, bias, accumulate);
            for (what, (apart, together)) in
                ["y", "dx", "gradients"].iter().zip(apart.iter().zip(&together))
            {
                let want: Vec<f64> = apart.iter().map(|x| x.to_f64()).collect();
                close(what, &want, together, allowed);
            }
        }
    }
}

#[test]
fn gives_what_both_give_apart() {
    agrees::<f64>(1e-14);
    agrees::<f32>(1e-5);
}

/// Without slopes by the input the map has no part in the backward pass.
#[test]
fn gradients_do_not_need_slopes_by_the_input() {
    for adapter in adapters() {
        let device = Cpu::<f64>::default();
        let w = HostMatrix::from_f32(D_OUT, D_IN, &[0.5; D_OUT * D_IN]);
        let (x, dy) = (numbers(TOKENS * D_IN, 2), numbers(TOKENS * D_OUT, 3));
        let params = numbers(adapter.len(), 5);
        let run = |wanted: bool| {
            let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
            let mut grads = vec![0.0; params.len()];
            let map = || Some(Map { w: MatrixRef::Frozen(&w), bias: None, accumulate: false });
            let (mode, params) = (Mode::plain(), View::new(&params, params.len()));
            let (x, dy) = (View::new(&x, x.len()), View::new(&dy, dy.len()));
            let y = ViewMut::new(&mut y, dy.len);
            let mut saved = adapter.forward_on(&device, mode, params, map(), x, y);
            let dx = wanted.then(|| ViewMut::new(&mut dx, x.len));
            let target = ViewMut::new(&mut grads, params.len);
            adapter.backward_on(&device, mode, 1.0, params, map(), &mut saved, x, dy, target, dx);
            grads
        };
        assert!(run(true) == run(false));
    }
}
