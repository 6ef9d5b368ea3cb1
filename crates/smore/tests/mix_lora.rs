//! MixLoRA against its definition in plain loops, its gradients against differences, its laws.

mod common;

use common::case::cast;
use common::slopes::check;
use common::{close, named, numbers, on_threads, softmax, times};
use smore::adapter::{
    Adapter, BlockAdapter, FfnInput, FfnSlopes, Lora, MapAdapter, MixLora, MixLoraSaved, Mode,
};
use smore::config::{LoraConfig, MixLoraConfig};
use smore::counting::{Multiplications, mix_lora_parameters};
use smore::rng::{Purpose, stream};
use smore::spec::{FfnShape, LoraSpec, MixLoraSpec};
use smore::targets::Targets;
use smore_engine::{Cpu, Device, Float, GateActivation, View, ViewMut};

/// The balance loss enters times this.
const BALANCE: f64 = 2.5;
const ALPHA: f64 = 1.7;

/// The numbers that an FFN hands its experts; also their gradients.
#[derive(Clone, PartialEq)]
struct Inputs<T> {
    x: Vec<T>,
    gate: Vec<T>,
    up: Vec<T>,
}

struct Case {
    mix: MixLora,
    params: Vec<f64>,
    input: Inputs<f64>,
    /// What the FFN's output holds before the adapter.
    base: Vec<f64>,
    /// Slopes of the loss by y and by the mixture.
    dy: Vec<f64>,
    dinner: Vec<f64>,
    valid: Option<Vec<bool>>,
}

struct Output<T: Float> {
    inner: Vec<T>,
    y: Vec<T>,
    saved: MixLoraSaved<Cpu<T>>,
}

fn view<T: Float>(values: &Vec<T>) -> View<'_, Cpu<T>> {
    View::new(values, values.len())
}

fn view_mut<T: Float>(values: &mut Vec<T>) -> ViewMut<'_, Cpu<T>> {
    let len = values.len();
    ViewMut::new(values, len)
}

impl<T: Float> Inputs<T> {
    fn of(input: &Inputs<f64>) -> Self {
        Self { x: cast(&input.x), gate: cast(&input.gate), up: cast(&input.up) }
    }

    fn filled(input: &Inputs<f64>, value: T) -> Self {
        let fill = |v: &[f64]| vec![value; v.len()];
        Self { x: fill(&input.x), gate: fill(&input.gate), up: fill(&input.up) }
    }

    fn views(&self) -> FfnInput<'_, Cpu<T>> {
        FfnInput { x: view(&self.x), gate: view(&self.gate), up: view(&self.up) }
    }

    fn views_mut(&mut self) -> FfnSlopes<'_, Cpu<T>> {
        let Self { x, gate, up } = self;
        FfnSlopes { x: view_mut(x), gate: view_mut(gate), up: view_mut(up) }
    }
}

impl Case {
    /// Experts, fanout and rank; hidden, intermediate and tokens.
    fn new(
        [experts, fanout, rank]: [usize; 3],
        targets: &[&str],
        [hidden, intermediate, n]: [usize; 3],
    ) -> Self {
        let config = MixLoraConfig {
            targets: Targets::default(),
            experts,
            fanout,
            rank,
            alpha: Some(ALPHA),
            balance_weight: 0.3,
        };
        let adapted = ["gate_proj", "up_proj", "down_proj"].map(|map| targets.contains(&map));
        let activation = GateActivation::Silu;
        let ffn = FfnShape { hidden, intermediate, activation, adapted };
        let mix = MixLora::new(MixLoraSpec::new(&config, ffn).unwrap());
        Self {
            params: numbers(mix.len(), 1),
            input: Inputs {
                x: numbers(n * hidden, 2),
                gate: numbers(n * intermediate, 3),
                up: numbers(n * intermediate, 4),
            },
            base: numbers(n * hidden, 5),
            dy: numbers(n * hidden, 6),
            dinner: numbers(n * intermediate, 7),
            valid: fanout.is_multiple_of(2).then(|| (0..n).map(|t| t % 5 != 2).collect()),
            mix,
        }
    }

    fn mode(&self) -> Mode<'_> {
        Mode { valid: self.valid.as_deref(), ..Mode::plain() }
    }

    fn tokens(&self) -> usize {
        self.input.x.len() / self.mix.spec.hidden
    }

    fn forward<T: Float>(&self, params: &[f64], input: &Inputs<f64>) -> Output<T> {
        let (params, input) = (cast::<T>(params), Inputs::<T>::of(input));
        // The mixture is written, y is added to.
        let mut inner = vec![T::from_f64(f64::NAN); input.gate.len()];
        let mut y = cast::<T>(&self.base);
        let saved = self.mix.forward(
            &Cpu::<T>::new(),
            self.mode(),
            view(&params),
            input.views(),
            view_mut(&mut inner),
            view_mut(&mut y),
        );
        Output { inner, y, saved }
    }

    fn run<T: Float>(&self) -> Output<T> {
        self.forward(&self.params, &self.input)
    }

    /// Gradients of the loss on top of `start`, by the parameters and by the input.
    fn gradients<T: Float>(&self, balance: f64, start: T) -> (Vec<T>, Inputs<T>) {
        let saved = self.run::<T>().saved;
        let params = cast::<T>(&self.params);
        let (mut grads, mut slopes) =
            (vec![start; params.len()], Inputs::filled(&self.input, start));
        self.mix.backward(
            &Cpu::<T>::new(),
            self.mode(),
            balance,
            view(&params),
            &saved,
            Inputs::<T>::of(&self.input).views(),
            view(&cast::<T>(&self.dy)),
            view(&cast::<T>(&self.dinner)),
            view_mut(&mut grads),
            Some(slopes.views_mut()),
        );
        (grads, slopes)
    }

    fn loss(&self, inner: &[f64], y: &[f64], balance: f64) -> f64 {
        let inner: f64 = inner.iter().zip(&self.dinner).map(|(a, b)| a * b).sum();
        let y: f64 = y.iter().zip(&self.dy).map(|(a, b)| a * b).sum();
        inner + y + BALANCE * balance
    }

    /// The definition, token by token and expert by expert; on the given choice, where there is one.
    fn oracle(&self, params: &[f64], input: &Inputs<f64>, choice: Option<&[u16]>) -> Oracle {
        let MixLoraSpec { hidden, intermediate, experts, fanout, balance_weight, .. } =
            self.mix.spec;
        let mut out = Oracle { y: self.base.clone(), ..Oracle::default() };
        let (mut load, mut mean, mut rows) = (vec![0.0; experts], vec![0.0; experts], 0.0);
        for t in 0..self.tokens() {
            let x = &input.x[t * hidden..(t + 1) * hidden];
            let at = t * intermediate..(t + 1) * intermediate;
            let router = named(&self.mix.layout.params, params, "mlp.moe_gate.weight");
            let p = softmax(&times(router, x));
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            if let Some(choice) = choice {
                let chosen = &choice[t * fanout..(t + 1) * fanout];
                order = chosen.iter().map(|&e| usize::from(e)).collect();
            }
            order.truncate(fanout);
            if self.valid.as_ref().is_none_or(|v| v[t]) {
                rows += 1.0;
                for &e in &order {
                    load[e] += 1.0;
                }
                mean.iter_mut().zip(&p).for_each(|(m, p)| *m += p);
            }
            let sum: f64 = order.iter().map(|&e| p[e]).sum();
            let mut mixture = vec![0.0; intermediate];
            for &e in &order {
                let weight = p[e] / sum;
                let gate = self.adapted(params, "gate_proj", e, x, &input.gate[at.clone()]);
                let up = self.adapted(params, "up_proj", e, x, &input.up[at.clone()]);
                let silu = gate.iter().map(|g| g / (1.0 + (-g).exp()));
                let h: Vec<f64> = silu.zip(&up).map(|(s, u)| s * u).collect();
                mixture.iter_mut().zip(&h).for_each(|(m, h)| *m += weight * h);
                let own = self.adapted(params, "down_proj", e, &h, &vec![0.0; hidden]);
                let y = out.y[t * hidden..].iter_mut();
                y.zip(own).for_each(|(y, own)| *y += weight * own);
                out.choice.push(e as u16);
                out.weights.push(weight);
            }
            out.inner.extend(mixture);
        }
        let shares = load.iter().zip(&mean).map(|(l, m)| l / rows * m / rows);
        out.balance = balance_weight * experts as f64 * shares.sum::<f64>();
        out
    }

    /// base + s B_e A_e x; the base alone where the map is no target.
    fn adapted(&self, params: &[f64], map: &str, e: usize, x: &[f64], base: &[f64]) -> Vec<f64> {
        let name = |factor| format!("mlp.{map}.experts.{e}.lora_{factor}.weight");
        let all = &self.mix.layout.params;
        let mut out = base.to_vec();
        if all.iter().any(|p| p.name == name("A")) {
            let low = times(named(all, params, &name("A")), x);
            let own = times(named(all, params, &name("B")), &low);
            out.iter_mut().zip(own).for_each(|(o, own)| *o += ALPHA / self.rank() * own);
        }
        out
    }

    fn rank(&self) -> f64 {
        self.mix.spec.rank as f64
    }
}

#[derive(Default)]
struct Oracle {
    inner: Vec<f64>,
    y: Vec<f64>,
    balance: f64,
    choice: Vec<u16>,
    weights: Vec<f64>,
}

const ALL: &[&str] = &["gate_proj", "up_proj", "down_proj"];

fn cases() -> Vec<Case> {
    vec![
        Case::new([4, 1, 2], ALL, [6, 7, 37]),
        Case::new([4, 2, 3], ALL, [5, 9, 37]),
        Case::new([3, 3, 1], ALL, [7, 4, 11]),
        Case::new([2, 2, 2], ALL, [4, 3, 8]),
        Case::new([1, 1, 2], ALL, [6, 7, 9]),
        // Experts with more tokens than are at work at once.
        Case::new([2, 1, 2], ALL, [3, 4, 300]),
        Case::new([3, 2, 1], ALL, [3, 4, 300]),
        // Attention's targets are plain LoRAs of the caller's.
        Case::new([4, 2, 2], &["gate_proj", "q_proj"], [6, 5, 23]),
        Case::new([3, 1, 2], &["up_proj", "down_proj"], [6, 7, 23]),
        Case::new([4, 2, 1], &["down_proj"], [3, 8, 23]),
        Case::new([4, 3, 2], &["gate_proj", "up_proj"], [5, 6, 23]),
    ]
}

#[test]
fn agrees_with_its_definition() {
    for case in cases() {
        let spec = format!("{:?}", case.mix.spec);
        let want = case.oracle(&case.params, &case.input, None);
        let got = case.run::<f64>();
        close(&format!("inner of {spec}"), &want.inner, &got.inner, 1e-13);
        close(&format!("y of {spec}"), &want.y, &got.y, 1e-13);
        let routing = &got.saved.routing;
        assert_eq!(routing.tree.layers[0].expert_idx, want.choice, "{spec}");
        close("weights", &want.weights, &routing.tree.layers[0].gate_weight, 1e-13);
        close("balance", &[want.balance], &routing.balance_losses, 1e-13);
        let counted =
            case.valid.as_ref().map_or(case.tokens(), |v| v.iter().filter(|&&v| v).count());
        assert_eq!(routing.stats[0].rows, counted as f64);
        let got = case.run::<f32>();
        assert_eq!(got.saved.routing.tree.layers[0].expert_idx, want.choice, "{spec} in f32");
        close(&format!("inner of {spec} in f32"), &want.inner, &got.inner, 1e-5);
        close(&format!("y of {spec} in f32"), &want.y, &got.y, 1e-5);
    }
}

/// Compares all gradients with differences of `loss`; every expert acts, so all but a router with
/// nothing to choose from are felt.
fn check_all(case: &Case, balance: f64, loss: impl Fn(&[f64], &Inputs<f64>) -> f64) {
    let (grads, slopes) = case.gradients(balance, 0.0);
    for param in &case.mix.layout.params {
        let name = format!("{} of {:?}", param.name, case.mix.spec);
        let MixLoraSpec { experts, fanout, .. } = case.mix.spec;
        let unfelt = experts == 1 || fanout == 1 && balance == 0.0;
        let felt = grads[param.range()].iter().any(|&g| g != 0.0);
        assert_eq!(felt, !(unfelt && param.name == "mlp.moe_gate.weight"), "{name}");
        check(&name, &case.params, param.range(), &grads, |p| loss(p, &case.input));
    }
    let input = &case.input;
    let with = |change: &dyn Fn(&mut Inputs<f64>)| {
        let mut input = input.clone();
        change(&mut input);
        loss(&case.params, &input)
    };
    let all = |v: &[f64]| 0..v.len();
    check("x", &input.x, all(&input.x), &slopes.x, |v| with(&|i| i.x = v.to_vec()));
    check("gate", &input.gate, all(&input.gate), &slopes.gate, |v| with(&|i| i.gate = v.to_vec()));
    check("up", &input.up, all(&input.up), &slopes.up, |v| with(&|i| i.up = v.to_vec()));
}

#[test]
fn gradients_are_slopes_through_the_router() {
    for case in cases() {
        let choice = case.run::<f64>().saved.routing.tree.layers[0].expert_idx.clone();
        check_all(&case, BALANCE, |params, input| {
            let out = case.forward::<f64>(params, input);
            let routing = &out.saved.routing;
            assert_eq!(routing.tree.layers[0].expert_idx, choice, "another choice");
            case.loss(&out.inner, &out.y, routing.balance_losses[0])
        });
    }
}

/// The slopes of the definition itself, where experts cannot move; with and without balance loss.
#[test]
fn gradients_are_slopes_on_a_fixed_choice() {
    for case in cases() {
        let choice = case.run::<f64>().saved.routing.tree.layers[0].expert_idx.clone();
        for balance in [BALANCE, 0.0] {
            check_all(&case, balance, |params, input| {
                let out = case.oracle(params, input, Some(&choice));
                case.loss(&out.inner, &out.y, if balance == 0.0 { 0.0 } else { out.balance })
            });
        }
    }
}

#[test]
fn gradients_in_f32_and_added() {
    for case in cases() {
        let (grads, slopes) = case.gradients(BALANCE, 0.0);
        let (in_f32, slopes_in_f32) = case.gradients(BALANCE, 0.0f32);
        close("gradients in f32", &grads, &in_f32, 1e-5);
        close("x in f32", &slopes.x, &slopes_in_f32.x, 1e-5);
        close("gate in f32", &slopes.gate, &slopes_in_f32.gate, 1e-5);
        close("up in f32", &slopes.up, &slopes_in_f32.up, 1e-5);
        let (more, more_slopes) = case.gradients(BALANCE, 0.5);
        let half = |v: &[f64]| v.iter().map(|v| v + 0.5).collect::<Vec<_>>();
        close("added gradients", &half(&grads), &more, 1e-13);
        close("added x", &half(&slopes.x), &more_slopes.x, 1e-13);
        close("added gate", &half(&slopes.gate), &more_slopes.gate, 1e-13);
        close("added up", &half(&slopes.up), &more_slopes.up, 1e-13);
        // Nothing below is trained: the parameters' gradients stay as they are.
        let saved = case.run::<f64>().saved;
        let mut alone = vec![0.0; case.params.len()];
        case.mix.backward(
            &Cpu::new(),
            case.mode(),
            BALANCE,
            view(&case.params),
            &saved,
            case.input.views(),
            view(&case.dy),
            view(&case.dinner),
            view_mut(&mut alone),
            None,
        );
        assert_eq!(alone, grads);
    }
}

/// Adds a LoRA with expert 0's factors on `map` to `y`.
fn lora(case: &Case, map: &str, x: &[f64], y: &mut Vec<f64>) {
    let rank = case.mix.spec.rank;
    let config = LoraConfig { alpha: Some(ALPHA), ..LoraConfig::new(rank) };
    let (d_in, d_out) = (x.len() / case.tokens(), y.len() / case.tokens());
    let lora = Lora::new(LoraSpec::new(&config, d_in, d_out).unwrap());
    let factor = |f: &str| {
        let name = format!("mlp.{map}.experts.0.lora_{f}.weight");
        named(&case.mix.layout.params, &case.params, &name)
    };
    let params = [factor("A"), factor("B")].concat();
    let x = x.to_vec();
    lora.forward(&Cpu::new(), case.mode(), view(&params), view(&x), view_mut(y));
}

#[test]
fn one_expert_is_three_loras() {
    let case = Case::new([1, 1, 2], ALL, [6, 7, 9]);
    let Inputs { x, mut gate, mut up } = case.input.clone();
    lora(&case, "gate_proj", &x, &mut gate);
    lora(&case, "up_proj", &x, &mut up);
    let mut h = vec![0.0; gate.len()];
    Cpu::<f64>::new().gated(GateActivation::Silu, view(&gate), view(&up), view_mut(&mut h));
    let mut y = case.base.clone();
    lora(&case, "down_proj", &h, &mut y);
    let got = case.run::<f64>();
    close("inner", &h, &got.inner, 1e-13);
    close("y", &y, &got.y, 1e-13);
}

/// The name of a parameter with its expert's number replaced.
fn renamed(name: &str, order: &[usize]) -> Option<String> {
    let (map, rest) = name.split_once(".experts.")?;
    let (e, factor) = rest.split_once('.')?;
    let e: usize = e.parse().ok()?;
    Some(format!("{map}.experts.{}.{factor}", order[e]))
}

#[test]
fn order_of_experts_does_not_matter() {
    for fanout in [1, 2, 4] {
        let case = Case::new([4, fanout, 2], ALL, [6, 7, 23]);
        let order = [2, 0, 3, 1];
        let (params, hidden) = (&case.mix.layout.params, case.mix.spec.hidden);
        let mut moved = case.params.clone();
        for param in params {
            if let Some(old) = renamed(&param.name, &order) {
                moved[param.range()].copy_from_slice(named(params, &case.params, &old));
            } else {
                for (row, old) in moved[param.range()].chunks_mut(hidden).zip(order) {
                    let at = param.offset + old * hidden;
                    row.copy_from_slice(&case.params[at..at + hidden]);
                }
            }
        }
        let (old, new) = (case.run::<f64>(), case.forward::<f64>(&moved, &case.input));
        close("inner", &old.inner, &new.inner, 1e-13);
        close("y", &old.y, &new.y, 1e-13);
        let (old, new) = (old.saved.routing, new.saved.routing);
        close("balance", &old.balance_losses, &new.balance_losses, 1e-13);
        let places = new.tree.layers[0].expert_idx.iter().zip(&old.tree.layers[0].expert_idx);
        for (&new, &old) in places {
            assert_eq!(order[usize::from(new)], usize::from(old));
        }
    }
}

#[test]
fn tokens_do_not_meet() {
    let case = Case::new([4, 2, 2], ALL, [6, 7, 23]);
    let all = case.run::<f64>();
    let MixLoraSpec { hidden, intermediate, .. } = case.mix.spec;
    for t in 0..case.tokens() {
        let of = |v: &[f64], width: usize| v[t * width..(t + 1) * width].to_vec();
        let input = Inputs {
            x: of(&case.input.x, hidden),
            gate: of(&case.input.gate, intermediate),
            up: of(&case.input.up, intermediate),
        };
        let mut alone = Case::new([4, 2, 2], ALL, [6, 7, 1]);
        alone.base = of(&case.base, hidden);
        let one = alone.forward::<f64>(&case.params, &input);
        close("inner", &of(&all.inner, intermediate), &one.inner, 1e-13);
        close("y", &of(&all.y, hidden), &one.y, 1e-13);
    }
}

#[test]
fn starts_as_the_base() {
    for fanout in [1, 3] {
        let mut case = Case::new([4, fanout, 8], ALL, [64, 100, 9]);
        let values = case.mix.init(&mut stream(5, Purpose::AdapterInit, 0, 0));
        case.params = values.iter().map(|&v| f64::from(v)).collect();
        let got = case.run::<f64>();
        assert_eq!(got.y, case.base);
        let mut inner = vec![0.0; got.inner.len()];
        let Inputs { gate, up, .. } = &case.input;
        Cpu::<f64>::new().gated(GateActivation::Silu, view(gate), view(up), view_mut(&mut inner));
        close("inner", &inner, &got.inner, 1e-15);
        for param in &case.mix.layout.params {
            let values = &case.params[param.range()];
            let square = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            let name = &param.name;
            if name.ends_with("lora_B.weight") {
                assert!(values.iter().all(|&v| v == 0.0), "{name}");
            } else if name == "mlp.moe_gate.weight" {
                assert!((square / 0.0004 - 1.0).abs() < 0.4, "{name}: {square}");
                assert!(values.iter().any(|v| v.abs() > 0.03), "{name} is not normal");
            } else {
                let bound = 1.0 / (param.shape[1] as f64).sqrt();
                assert!(values.iter().all(|v| v.abs() <= bound), "{name}");
                assert!((3.0 * square / (bound * bound) - 1.0).abs() < 0.3, "{name}: {square}");
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let case = Case::new([4, 2, 8], ALL, [160, 288, 230]);
    let run = || {
        let out = case.run::<f32>();
        (out.inner, out.y, case.gradients(BALANCE, 0.0f32))
    };
    assert!(on_threads(1, run) == on_threads(2, run));
}

#[test]
fn counts() {
    let count = |targets: &[&str]| {
        let case = Case::new([4, 2, 3], targets, [5, 9, 1]);
        let compute = Multiplications::of_mix_lora(&case.mix.spec);
        assert_eq!(compute.total(), compute.down + compute.up + compute.router);
        (mix_lora_parameters(&case.mix.spec), compute.down, compute.up, compute.router)
    };
    // Four experts with three ranks each of 5 + 9, a router of 4 x 5; two experts act.
    assert_eq!(count(ALL), (3 * 4 * 3 * 14 + 20, 6 * (5 + 5 + 9), 6 * (9 + 9 + 5), 20));
    assert_eq!(count(&["up_proj"]), (4 * 3 * 14 + 20, 6 * 5, 6 * 9, 20));
    assert_eq!(count(&["down_proj"]), (4 * 3 * 14 + 20, 6 * 9, 6 * 5, 20));
}

/// As MoE-PEFT names them, below the block's path.
#[test]
fn names() {
    let case = Case::new([2, 1, 3], &["gate_proj", "down_proj"], [5, 9, 1]);
    let names: Vec<_> =
        case.mix.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice())).collect();
    let want: [(&str, &[usize]); 9] = [
        ("mlp.gate_proj.experts.0.lora_A.weight", &[3, 5]),
        ("mlp.gate_proj.experts.1.lora_A.weight", &[3, 5]),
        ("mlp.moe_gate.weight", &[2, 5]),
        ("mlp.gate_proj.experts.0.lora_B.weight", &[9, 3]),
        ("mlp.gate_proj.experts.1.lora_B.weight", &[9, 3]),
        ("mlp.down_proj.experts.0.lora_A.weight", &[3, 9]),
        ("mlp.down_proj.experts.1.lora_A.weight", &[3, 9]),
        ("mlp.down_proj.experts.0.lora_B.weight", &[5, 3]),
        ("mlp.down_proj.experts.1.lora_B.weight", &[5, 3]),
    ];
    assert_eq!(names, want);
    let rng = || stream(5, Purpose::AdapterInit, 0, 0);
    let (values, params) = (case.mix.init(&mut rng()), case.mix.params().to_vec());
    let held = BlockAdapter::Ffn(case.mix);
    assert_eq!((held.init(&mut rng()), held.params()), (values, params.as_slice()));
}
