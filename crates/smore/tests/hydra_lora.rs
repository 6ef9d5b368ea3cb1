//! HydraLoRA against its definition in plain loops, its gradients against differences, its laws.

mod common;

use common::case::cast;
use common::slopes::check;
use common::{close, named, numbers, on_threads, softmax, times};
use smore::adapter::{
    Adapter, AnyAdapter, BlockAdapter, HydraLora, HydraLoraSaved, Lora, MapAdapter, Mode,
};
use smore::config::{HydraLoraConfig, LoraConfig};
use smore::counting::{Multiplications, hydra_lora_parameters};
use smore::rng::{Purpose, stream};
use smore::spec::{HydraLoraSpec, LoraSpec};
use smore::targets::Targets;
use smore_engine::{Cpu, Float, View, ViewMut};

struct Case {
    hydra: HydraLora,
    params: Vec<f64>,
    x: Vec<f64>,
    /// What the map's output holds before the adapter.
    base: Vec<f64>,
    /// Slopes of the loss by the output.
    g: Vec<f64>,
    valid: Option<Vec<bool>>,
}

impl Case {
    fn new(heads: usize, rank: usize, [d_in, d_out, n]: [usize; 3]) -> Self {
        let config = HydraLoraConfig { targets: Targets::default(), heads, rank, alpha: Some(1.7) };
        let hydra = HydraLora::new(HydraLoraSpec::new(&config, d_in, d_out).unwrap());
        Self {
            params: numbers(hydra.len(), 1),
            x: numbers(n * d_in, 2),
            base: numbers(n * d_out, 3),
            g: numbers(n * d_out, 4),
            valid: heads.is_multiple_of(2).then(|| (0..n).map(|t| t % 5 != 2).collect()),
            hydra,
        }
    }

    fn mode(&self) -> Mode<'_> {
        Mode { valid: self.valid.as_deref(), ..Mode::plain() }
    }

    fn forward<T: Float>(&self, params: &[f64], x: &[f64]) -> (Vec<T>, HydraLoraSaved<Cpu<T>>) {
        let (params, x, mut y) = (cast::<T>(params), cast::<T>(x), cast::<T>(&self.base));
        let len = y.len();
        let (params, x) = (View::new(&params, params.len()), View::new(&x, x.len()));
        let target = ViewMut::new(&mut y, len);
        let saved = self.hydra.forward(&Cpu::<T>::new(), self.mode(), params, x, target);
        (y, saved)
    }

    /// Gradients of sum(y g) on top of `start`, by the parameters and by x.
    fn gradients<T: Float>(&self, start: T) -> (Vec<T>, Vec<T>) {
        let (_, mut saved) = self.forward::<T>(&self.params, &self.x);
        let (params, x, g) = (cast::<T>(&self.params), cast::<T>(&self.x), cast::<T>(&self.g));
        let (mut grads, mut dx) = (vec![start; params.len()], vec![start; x.len()]);
        self.hydra.backward(
            &Cpu::<T>::new(),
            self.mode(),
            1.0,
            View::new(&params, params.len()),
            &mut saved,
            View::new(&x, x.len()),
            View::new(&g, g.len()),
            ViewMut::new(&mut grads, params.len()),
            Some(ViewMut::new(&mut dx, x.len())),
        );
        (grads, dx)
    }

    /// Output and gate weights `[n, N]`, token by token.
    fn oracle(&self) -> (Vec<f64>, Vec<f64>) {
        let HydraLoraSpec { d_in, d_out, heads, scale, .. } = self.hydra.spec;
        let get = |name: &str| named(&self.hydra.layout.params, &self.params, name);
        let (mut y, mut weights) = (self.base.clone(), Vec::new());
        for (x, y) in self.x.chunks(d_in).zip(y.chunks_mut(d_out)) {
            let w = softmax(&times(get("lora_route.weight"), x));
            let low = times(get("lora_A.weight"), x);
            for i in 0..heads {
                let out = times(get(&format!("lora_B{i}.weight")), &low);
                for (y, out) in y.iter_mut().zip(out) {
                    *y += scale * w[i] * out;
                }
            }
            weights.extend(w);
        }
        (y, weights)
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [(1, 2, [5, 4, 9]), (2, 1, [3, 7, 11]), (3, 4, [6, 2, 1]), (4, 3, [7, 5, 37])];
    shapes.into_iter().map(|(heads, rank, shape)| Case::new(heads, rank, shape))
}

#[test]
fn agrees_with_its_definition() {
    for case in cases() {
        let (want, weights) = case.oracle();
        let (y, saved) = case.forward::<f64>(&case.params, &case.x);
        close("y", &want, &y, 1e-13);
        close("y in f32", &want, &case.forward::<f32>(&case.params, &case.x).0, 1e-5);
        // What tracing and monitoring read.
        let heads = case.hydra.spec.heads;
        let tree = &saved.routing.tree.layers[0];
        close("weights", &weights, &tree.gate_weight, 1e-13);
        for (place, &head) in tree.expert_idx.iter().enumerate() {
            assert_eq!(usize::from(head), place % heads);
        }
        let counted = |t: &usize| case.valid.as_ref().is_none_or(|v| v[*t]);
        let counted: Vec<usize> = (0..weights.len() / heads).filter(counted).collect();
        let stats = &saved.routing.stats[0];
        assert_eq!(stats.rows, counted.len() as f64);
        for i in 0..heads {
            assert_eq!(stats.load[i], stats.rows);
            let sum: f64 = counted.iter().map(|t| weights[t * heads + i]).sum();
            assert!((stats.importance[i] - sum).abs() < 1e-12);
        }
        assert_eq!(saved.routing.balance_losses, [0.0]);
    }
}

#[test]
fn gradients_are_slopes() {
    for case in cases() {
        let (grads, dx) = case.gradients(0.0);
        let loss = |params: &[f64], x: &[f64]| {
            let (y, _) = case.forward::<f64>(params, x);
            y.iter().zip(&case.g).map(|(y, g)| y * g).sum::<f64>()
        };
        for param in &case.hydra.layout.params {
            let name = format!("{} of {:?}", param.name, case.hydra.spec);
            let felt = grads[param.range()].iter().any(|&g| g != 0.0);
            // A single head is told apart from nothing.
            let route = param.name == "lora_route.weight";
            assert_eq!(felt, !(route && case.hydra.spec.heads == 1), "{name}");
            check(&name, &case.params, param.range(), &grads, |p| loss(p, &case.x));
        }
        check("x", &case.x, 0..dx.len(), &dx, |x| loss(&case.params, x));
        let (in_f32, dx_in_f32) = case.gradients(0.0f32);
        close("gradients in f32", &grads, &in_f32, 1e-5);
        close("dx in f32", &dx, &dx_in_f32, 1e-5);
        // What backward adds to is kept.
        let (more, more_dx) = case.gradients(0.5);
        let half = |v: &[f64]| v.iter().map(|v| v + 0.5).collect::<Vec<_>>();
        close("added gradients", &half(&grads), &more, 1e-13);
        close("added dx", &half(&dx), &more_dx, 1e-13);
    }
}

/// LoRA with the case's A and the given B.
fn lora(case: &Case, b: &[f64]) -> Vec<f64> {
    let HydraLoraSpec { d_in, d_out, rank, .. } = case.hydra.spec;
    let config = LoraConfig { alpha: Some(1.7), ..LoraConfig::new(rank) };
    let lora = Lora::new(LoraSpec::new(&config, d_in, d_out).unwrap());
    let params = [named(&case.hydra.layout.params, &case.params, "lora_A.weight"), b].concat();
    let mut y = case.base.clone();
    let len = y.len();
    let (p, x) = (View::new(&params, params.len()), View::new(&case.x, case.x.len()));
    lora.forward(&Cpu::<f64>::new(), case.mode(), p, x, ViewMut::new(&mut y, len));
    y
}

#[test]
fn equal_heads_are_a_lora() {
    for mut case in cases() {
        let names: Vec<_> = case.hydra.layout.params.clone();
        let b = named(&names, &case.params, "lora_B0.weight").to_vec();
        for param in names.iter().filter(|p| p.name.starts_with("lora_B")) {
            case.params[param.range()].copy_from_slice(&b);
        }
        let (y, _) = case.forward::<f64>(&case.params, &case.x);
        close("y", &lora(&case, &b), &y, 1e-13);
    }
}

#[test]
fn order_of_heads_does_not_matter() {
    let case = Case::new(4, 3, [7, 5, 13]);
    let order = [2, 0, 3, 1];
    let mut moved = case.params.clone();
    let (params, d_in) = (&case.hydra.layout.params, case.hydra.spec.d_in);
    let route = params.iter().find(|p| p.name == "lora_route.weight").unwrap().offset;
    for (to, from) in order.into_iter().enumerate() {
        let b = params.iter().find(|p| p.name == format!("lora_B{to}.weight")).unwrap();
        let old = named(params, &case.params, &format!("lora_B{from}.weight"));
        moved[b.range()].copy_from_slice(old);
        let old = &case.params[route + from * d_in..route + (from + 1) * d_in];
        moved[route + to * d_in..route + (to + 1) * d_in].copy_from_slice(old);
    }
    let (y, _) = case.forward::<f64>(&case.params, &case.x);
    close("y", &y, &case.forward::<f64>(&moved, &case.x).0, 1e-13);
}

#[test]
fn starts_as_the_zero_map() {
    let mut case = Case::new(3, 16, [64, 40, 9]);
    let values = case.hydra.init(&mut stream(5, Purpose::AdapterInit, 0, 0));
    case.params = values.iter().map(|&v| f64::from(v)).collect();
    assert_eq!(case.forward::<f64>(&case.params, &case.x).0, case.base);
    for param in &case.hydra.layout.params {
        let values = &case.params[param.range()];
        if param.name.starts_with("lora_B") {
            assert!(values.iter().all(|&v| v == 0.0), "{}", param.name);
        } else {
            // U(-b, b) with b = 1 / sqrt(64)
            let square = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            assert!(values.iter().all(|v| v.abs() <= 0.125), "{}", param.name);
            assert!((square * 3.0 * 64.0 - 1.0).abs() < 0.3, "{}: {square}", param.name);
        }
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let case = Case::new(4, 8, [160, 288, 230]);
    let run = || {
        let (y, _) = case.forward::<f32>(&case.params, &case.x);
        (y, case.gradients(0.0f32))
    };
    assert!(on_threads(1, run) == on_threads(2, run));
}

/// What holds any adapter of a map or a block hands everything on.
#[test]
fn behind_the_enums() {
    let case = Case::new(2, 3, [7, 5, 9]);
    let (want, want_grads) = (case.forward::<f64>(&case.params, &case.x), case.gradients(0.0));
    let rng = || stream(5, Purpose::AdapterInit, 0, 0);
    let (values, names) = (case.hydra.init(&mut rng()), case.hydra.params().to_vec());
    let any = AnyAdapter::HydraLora(HydraLora::new(case.hydra.spec));
    let (mut y, device) = (case.base.clone(), Cpu::<f64>::new());
    let (params, x) =
        (View::new(&case.params, case.params.len()), View::new(&case.x, case.x.len()));
    let len = y.len();
    let mut saved = any.forward(&device, case.mode(), params, x, ViewMut::new(&mut y, len));
    assert_eq!(y, want.0);
    assert_eq!(saved.routing().unwrap().tree, want.1.routing.tree);
    let (mut grads, mut dx) = (vec![0.0; case.params.len()], vec![0.0; case.x.len()]);
    let (target, dx_target) =
        (ViewMut::new(&mut grads, case.params.len()), ViewMut::new(&mut dx, case.x.len()));
    let g = View::new(&case.g, case.g.len());
    any.backward(&device, case.mode(), 1.0, params, &mut saved, x, g, target, Some(dx_target));
    assert_eq!((grads, dx), want_grads);
    assert_eq!((any.init(&mut rng()), any.params()), (values.clone(), names.as_slice()));
    let held = BlockAdapter::Map(any);
    assert_eq!((held.init(&mut rng()), held.params()), (values, names.as_slice()));
}

#[test]
fn counts() {
    let case = Case::new(4, 3, [7, 5, 1]);
    let total = 3 * 7 + 4 * 7 + 4 * 5 * 3;
    assert_eq!(hydra_lora_parameters(&case.hydra.spec), total);
    let compute = Multiplications::of_hydra_lora(&case.hydra.spec);
    assert_eq!((compute.down, compute.up, compute.router), (21, 60, 28));
    assert_eq!(compute.total(), total);
}
