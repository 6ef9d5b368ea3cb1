//! Growth keeps the function: sources of every kind against the S'MoRE grown from them.

mod common;

use common::{close, numbers};
use smore::adapter::{Adapter, HydraLora, Lora, MapAdapter, Mode, Smore};
use smore::config::{HydraLoraConfig, LoraConfig, SmoreConfig};
use smore::grow::{Mixture, from_lora, from_mixture, from_one_layer};
use smore::rng::{Purpose, stream};
use smore::spec::{HydraLoraSpec, LoraSpec, SmoreSpec};
use smore::targets::Targets;
use smore_engine::{Cpu, View, ViewMut};

const D_IN: usize = 11;
const D_OUT: usize = 7;
const TOKENS: usize = 23;

fn smore(json: &str) -> Smore {
    let config: SmoreConfig = serde_json::from_str(json).unwrap();
    Smore::new(SmoreSpec::new(&config, D_IN, D_OUT).unwrap())
}

fn values(adapter: &impl Adapter, seed: u64) -> Vec<f32> {
    adapter.init(&mut stream(seed, Purpose::AdapterInit, 0, 0))
}

/// Values none of which is zero.
fn trained(adapter: &impl Adapter, seed: u64) -> Vec<f32> {
    let noise = numbers(adapter.len(), seed);
    values(adapter, seed).iter().zip(noise).map(|(v, n)| v + 0.3 * n as f32).collect()
}

/// The adapter's output on fixed tokens, in f64.
fn output(adapter: &impl MapAdapter<Cpu<f64>>, params: &[f32]) -> Vec<f64> {
    let params: Vec<f64> = params.iter().map(|&x| f64::from(x)).collect();
    let (x, mut y) = (numbers(TOKENS * D_IN, 9), vec![0.0; TOKENS * D_OUT]);
    let mode = Mode::plain();
    let len = y.len();
    let (params, x) = (View::new(&params, params.len()), View::new(&x, x.len()));
    adapter.forward(&Cpu::new(), mode, params, x, ViewMut::new(&mut y, len));
    y
}

fn top(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |t: f64, x| t.max(x.abs()))
}

const LAYERS: &str = r#""layers": [{"experts": 4, "fanout": 2, "rank": 3},
    {"experts": 4, "fanout": 2, "rank": 5, "lora_alpha": 2}]"#;
const ROUTER: &str = r#""router_width": 8, "router_input_width": 5"#;

#[test]
fn a_lora_keeps_its_function() {
    let lora = Lora::new(
        LoraSpec::new(&LoraConfig { alpha: Some(5.0), ..LoraConfig::new(2) }, D_IN, D_OUT).unwrap(),
    );
    let from = trained(&lora, 1);
    let want = output(&lora, &from);
    let up = lora.layout.up;
    for rest in [
        r#""activation": "prelu|1.0""#,
        r#""activation": "identity""#,
        r#""activation": "relu""#,
        r#""activation_position": "child""#,
        r#""activation_position": "child_v2", "init": "eq_1_layer""#,
        r#""activation": "identity", "structure": "multi_order""#,
    ] {
        for gate in ["switch", "dense", "noisy_topk"] {
            if gate == "noisy_topk" && rest.contains("multi_order") {
                continue;
            }
            for architecture in ["mlp", "linear"] {
                let json = format!(
                    r#"{{{LAYERS}, {rest}, "gate": {{"kind": "{gate}", {ROUTER},
                        "architecture": "{architecture}"}}}}"#
                );
                let target = smore(&json);
                let mut grown = values(&target, 3);
                let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
                let scale = lora.spec.scale;
                from_lora(&target, &mut grown, &from[..up], &from[up..], scale, &mut rng).unwrap();
                close(&json, &want, &output(&target, &grown), 2e-7);
            }
        }
    }
}

#[test]
fn a_lora_keeps_its_function_in_a_shared_pool_and_in_one_layer() {
    let lora = Lora::new(LoraSpec::new(&LoraConfig::new(3), D_IN, D_OUT).unwrap());
    let from = trained(&lora, 1);
    let (want, up) = (output(&lora, &from), lora.layout.up);
    let layer = r#"{"experts": 3, "fanout": 2, "rank": 3}"#;
    for json in [
        format!(
            r#"{{"layers": [{layer}, {layer}], "shared_pool": true, "activation": "prelu|1"}}"#
        ),
        format!(r#"{{"layers": [{layer}], "activation": "prelu|1.0"}}"#),
        format!(r#"{{"layers": [{layer}], "activation_position": "child"}}"#),
        r#"{"layers": [{"experts": 1, "fanout": 1, "rank": 4}], "activation": "identity"}"#.into(),
    ] {
        let target = smore(&json);
        let mut grown = values(&target, 3);
        let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
        let scale = lora.spec.scale;
        from_lora(&target, &mut grown, &from[..up], &from[up..], scale, &mut rng).unwrap();
        close(&json, &want, &output(&target, &grown), 2e-7);
    }
}

/// What was grown learns: every layer is reached by gradients after one step.
#[test]
fn growth_leaves_no_layer_dead() {
    let lora = Lora::new(LoraSpec::new(&LoraConfig::new(2), D_IN, D_OUT).unwrap());
    let (from, up) = (trained(&lora, 1), lora.layout.up);
    let target =
        smore(&format!(r#"{{{LAYERS}, "activation": "prelu|1.0", "gate": {{{ROUTER}}}}}"#));
    let mut grown = values(&target, 3);
    let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
    from_lora(&target, &mut grown, &from[..up], &from[up..], 1.0, &mut rng).unwrap();
    let mut params: Vec<f64> = grown.iter().map(|&x| f64::from(x)).collect();
    for _ in 0..2 {
        let grads = gradients(&target, &params);
        for (p, g) in params.iter_mut().zip(&grads) {
            *p -= 0.01 * g;
        }
    }
    let grads = gradients(&target, &params);
    for param in &target.layout.params {
        let largest = top(&grads[param.range()]);
        assert!(largest > 1e-9, "{} has no gradient", param.name);
    }
}

fn gradients(adapter: &Smore, params: &[f64]) -> Vec<f64> {
    let device = Cpu::<f64>::new();
    let (params, x) = (params.to_vec(), numbers(TOKENS * D_IN, 9));
    let (mut y, dy) = (vec![0.0; TOKENS * D_OUT], numbers(TOKENS * D_OUT, 10));
    let mode = Mode::plain();
    let (len, n) = (y.len(), params.len());
    let (params, x) = (View::new(&params, n), View::new(&x, x.len()));
    let mut saved =
        MapAdapter::forward(adapter, &device, mode, params, x, ViewMut::new(&mut y, len));
    let mut grads = vec![0.0; n];
    let target = ViewMut::new(&mut grads, n);
    let dy = View::new(&dy, len);
    MapAdapter::backward(adapter, &device, mode, 1.0, params, &mut saved, x, dy, target, None);
    grads
}

#[test]
fn a_hydra_lora_keeps_its_function() {
    let config =
        HydraLoraConfig { targets: Targets::default(), heads: 3, rank: 2, alpha: Some(3.0) };
    let hydra = HydraLora::new(HydraLoraSpec::new(&config, D_IN, D_OUT).unwrap());
    let from = trained(&hydra, 5);
    let want = output(&hydra, &from);
    let part = |name: &str| {
        let param = hydra.layout.params.iter().find(|p| p.name == name).unwrap();
        &from[param.range()]
    };
    let mixture = Mixture {
        route: part("lora_route.weight"),
        down: vec![part("lora_A.weight"); 3],
        up: (0..3).map(|i| part(&format!("lora_B{i}.weight"))).collect(),
        fanout: 3,
        scale: hydra.spec.scale,
    };
    let layers =
        r#"[{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 1, "rank": 2}]"#;
    for router in [
        r#""architecture": "linear", "router_input_width": 3"#,
        r#""architecture": "linear", "router_input_width": 5"#,
        r#""router_width": 6, "router_input_width": 4"#,
        r#""router_width": 3, "router_input_width": 3, "activation": "identity""#,
    ] {
        let json = format!(
            r#"{{"layers": {layers}, "activation": "prelu|1.0",
                "gate": {{"kind": "dense", {router}}}}}"#
        );
        let target = smore(&json);
        let mut grown = values(&target, 3);
        let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
        from_mixture(&target, &mut grown, &mixture, &mut rng).unwrap();
        close(&json, &want, &output(&target, &grown), 5e-7);
    }
}

/// Top-k of a mixture is the switch gate's, as long as more than one is chosen.
#[test]
fn a_sparse_mixture_keeps_its_function() {
    let (route, a, b) = (numbers(4 * D_IN, 1), numbers(4 * 2 * D_IN, 2), numbers(4 * D_OUT * 2, 3));
    let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
    let (route, a, b) = (narrow(&route), narrow(&a), narrow(&b));
    let mixture = Mixture {
        route: &route,
        down: a.chunks(2 * D_IN).collect(),
        up: b.chunks(D_OUT * 2).collect(),
        fanout: 2,
        scale: 1.5,
    };
    let x = numbers(TOKENS * D_IN, 9);
    let mut want = vec![0.0; TOKENS * D_OUT];
    for (x, y) in x.chunks(D_IN).zip(want.chunks_mut(D_OUT)) {
        let times = |m: &[f32], x: &[f64]| -> Vec<f64> {
            let row = |row: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * b).sum();
            m.chunks(x.len()).map(row).collect()
        };
        let e: Vec<f64> = times(&route, x).iter().map(|z| z.exp()).collect();
        let mut order: Vec<usize> = (0..4).collect();
        order.sort_by(|&i, &j| e[j].total_cmp(&e[i]));
        let sum = e[order[0]] + e[order[1]];
        for &i in &order[..2] {
            let out = times(mixture.up[i], &times(mixture.down[i], x));
            for (y, out) in y.iter_mut().zip(out) {
                *y += e[i] / sum * 1.5 * out;
            }
        }
    }
    let target = smore(
        r#"{"layers": [{"experts": 2, "fanout": 1, "rank": 1},
            {"experts": 4, "fanout": 2, "rank": 2}], "activation_position": "child",
            "gate": {"architecture": "linear", "router_input_width": 4}}"#,
    );
    let mut grown = values(&target, 3);
    let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
    from_mixture(&target, &mut grown, &mixture, &mut rng).unwrap();
    close("sparse", &want, &output(&target, &grown), 5e-7);
}

#[test]
fn a_single_layer_keeps_its_function() {
    for (kind, fanout) in [("switch", 2), ("switch", 1), ("dense", 4), ("noisy_topk", 1)] {
        for (old, new) in [
            (r#""activation": "tanh""#, r#""activation": "tanh""#),
            (r#""activation": "prelu|0.3""#, r#""activation": "prelu|0.7""#),
            (r#""activation_position": "child""#, r#""activation": "prelu|1.0""#),
            (r#""activation": "identity""#, r#""activation_position": "child_v2""#),
        ] {
            let top = format!(r#""experts": 4, "fanout": {fanout}"#);
            let gate = format!(r#""gate": {{"kind": "{kind}", {ROUTER}}}"#);
            let source = smore(&format!(
                r#"{{"layers": [{{{top}, "rank": 2, "lora_alpha": 3}}], {old}, {gate}}}"#
            ));
            let json = format!(
                r#"{{"layers": [{{"experts": 3, "fanout": 2, "rank": 2}}, {{{top}, "rank": 3}}],
                    {new}, {gate}}}"#
            );
            let target = smore(&json);
            let from = trained(&source, 7);
            let mut grown = values(&target, 3);
            let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
            from_one_layer(&target, &mut grown, &source, &from, &mut rng).unwrap();
            let want = output(&source, &from);
            close(&json, &want, &output(&target, &grown), 2e-6);
        }
    }
}

#[test]
fn what_cannot_be_exact_is_refused_with_what_can() {
    let lora = Lora::new(LoraSpec::new(&LoraConfig::new(4), D_IN, D_OUT).unwrap());
    let (from, up) = (trained(&lora, 1), lora.layout.up);
    let refused = |json: &str| {
        let target = smore(json);
        let mut grown = values(&target, 3);
        let mut rng = stream(4, Purpose::AdapterInit, 0, 0);
        let result = from_lora(&target, &mut grown, &from[..up], &from[up..], 1.0, &mut rng);
        result.unwrap_err().to_string()
    };
    for (json, words) in [
        (format!(r#"{{{LAYERS}, "activation": "tanh"}}"#), vec!["tanh", "prelu|1.0", "child"]),
        (format!(r#"{{{LAYERS}, "activation": "prelu|0.5"}}"#), vec!["prelu|0.5", "prelu|1.0"]),
        (format!(r#"{{{LAYERS}, "activation": "relu"}}"#), vec!["layers[1].rank is 5", "8"]),
        (
            r#"{"layers": [{"experts": 4, "fanout": 1, "rank": 4}], "activation": "identity"}"#
                .into(),
            vec!["layers[0].fanout is 1", "dense"],
        ),
        (
            r#"{"layers": [{"experts": 4, "fanout": 2, "rank": 3}], "activation": "identity"}"#
                .into(),
            vec!["layers[0].rank is 3", "needs 4"],
        ),
        (
            format!(
                r#"{{{LAYERS}, "activation": "prelu|1", "gate": {{"architecture": "bottom_up"}}}}"#
            ),
            vec!["bottom_up"],
        ),
    ] {
        let error = refused(&json);
        assert!(words.iter().all(|w| error.contains(w)), "{json}: {error}");
    }
}
