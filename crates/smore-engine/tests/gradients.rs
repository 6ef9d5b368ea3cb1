//! Every backward pass against central differences in f64, and every forward pass against a plain
//! restatement.

use smore_engine::{
    AdamW, AttentionShape, Cpu, CrossEntropy, Device, GateActivation, HostMatrix, MatrixRef,
    RmsNorm, Span, View, ViewMut,
};

type Dev = Cpu<f64>;
const DEV: fn() -> Dev = Dev::new;

/// Numbers in [-1, 1] that look random and never repeat a pattern of small period.
fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

fn v(x: &Vec<f64>) -> View<'_, Dev> {
    View::new(x, x.len())
}

fn m(x: &mut Vec<f64>) -> ViewMut<'_, Dev> {
    let len = x.len();
    ViewMut::new(x, len)
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Compares `grad` with central differences of `f` at `x`.
fn check(name: &str, x: &[f64], grad: &[f64], f: impl Fn(&Vec<f64>) -> f64) {
    let top = grad.iter().fold(1e-3, |t: f64, g| t.max(g.abs()));
    let mut nonzero = false;
    for i in 0..x.len() {
        let h = 1e-5;
        let mut at = x.to_vec();
        at[i] = x[i] + h;
        let up = f(&at);
        at[i] = x[i] - h;
        let slope = (up - f(&at)) / (2.0 * h);
        nonzero |= slope.abs() > 1e-9;
        assert!((slope - grad[i]).abs() < 1e-6 * top, "{name}[{i}]: {slope} against {}", grad[i]);
    }
    assert!(nonzero, "{name}: all slopes are zero, the check proves nothing");
}

#[test]
fn rms_norm() {
    for offset in [0.0, 1.0] {
        rms_norm_with(RmsNorm { eps: 1e-5, offset });
    }
}

fn rms_norm_with(norm: RmsNorm) {
    let (n, d) = (5, 7);
    let (x, gain, g) = (numbers(n * d, 1), numbers(d, 2), numbers(n * d, 3));
    let forward = |x: &Vec<f64>, gain: &Vec<f64>| {
        let (mut y, mut inv) = (vec![0.0; n * d], vec![0.0; n]);
        DEV().rms_norm(norm, v(x), v(gain), m(&mut y), m(&mut inv));
        (y, inv)
    };
    let (y, inv) = forward(&x, &gain);
    for r in 0..n {
        let row = &x[r * d..(r + 1) * d];
        let rms = (inner(row, row) / d as f64 + 1e-5).sqrt();
        for j in 0..d {
            assert!((y[r * d + j] - row[j] / rms * (norm.offset + gain[j])).abs() < 1e-12);
        }
    }
    let (mut dx, mut dgain) = (vec![0.0; n * d], vec![0.0; d]);
    let (dx_view, dgain_view) = (m(&mut dx), Some(m(&mut dgain)));
    DEV().rms_norm_backward(norm, v(&x), v(&gain), v(&inv), v(&g), dx_view, dgain_view);
    check("x", &x, &dx, |x| inner(&forward(x, &gain).0, &g));
    check("gain", &gain, &dgain, |gain| inner(&forward(&x, gain).0, &g));
}

#[test]
fn rotary() {
    let (heads, dim, positions) = (3, 8, [0u32, 5, 2]);
    let angles: Vec<f64> = numbers(6 * dim / 2, 4).iter().map(|a| a * 3.0).collect();
    let table: Vec<f64> = angles
        .chunks(dim / 2)
        .flat_map(|a| {
            a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())).collect::<Vec<_>>()
        })
        .collect();
    let x = numbers(positions.len() * heads * dim, 5);
    let g = numbers(x.len(), 6);
    let turn = |x: &Vec<f64>, inverse| {
        let mut y = x.clone();
        DEV().rotary(m(&mut y), v(&table), &positions, dim, inverse);
        y
    };
    let y = turn(&x, false);
    for (r, &p) in positions.iter().enumerate() {
        for h in 0..heads {
            for i in 0..dim / 2 {
                let at = (r * heads + h) * dim + i;
                let a = angles[p as usize * dim / 2 + i];
                assert!((y[at] - (x[at] * a.cos() - x[at + dim / 2] * a.sin())).abs() < 1e-12);
            }
        }
    }
    let back = turn(&y, true);
    assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-12), "inverse");
    check("x", &x, &turn(&g, true), |x| inner(&turn(x, false), &g));
}

#[test]
fn gated() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    gated_with(GateActivation::Silu, |x| x * sigmoid(x));
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    gated_with(GateActivation::GeluTanh, |x| {
        x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3)))
    });
}

fn gated_with(act: GateActivation, by_definition: impl Fn(f64) -> f64) {
    let (gate, up, g) = (numbers(40, 7), numbers(40, 8), numbers(40, 9));
    let gate: Vec<f64> = gate.iter().map(|x| 4.0 * x).collect();
    let forward = |gate: &Vec<f64>, up: &Vec<f64>| {
        let mut y = vec![0.0; 40];
        DEV().gated(act, v(gate), v(up), m(&mut y));
        y
    };
    for ((y, &gate), up) in forward(&gate, &up).iter().zip(&gate).zip(&up) {
        assert!((y - by_definition(gate) * up).abs() < 1e-12);
    }
    let (mut dgate, mut dup) = (gate.clone(), up.clone());
    DEV().gated_backward(act, v(&g), m(&mut dgate), m(&mut dup));
    let kept = || [&gate, &up].map(|x| DEV().keep_copy(v(x)));
    let ([gate_kept, up_kept], mut y) = (kept(), vec![0.0; 40]);
    DEV().gated_kept(act, &gate_kept, &up_kept, m(&mut y));
    assert_eq!(y, forward(&gate, &up));
    let of_kept = DEV().gated_kept_backward(act, v(&g), gate_kept, up_kept);
    assert_eq!(of_kept, [dgate.clone(), dup.clone()]);
    check("gate", &gate, &dgate, |gate| inner(&forward(gate, &up), &g));
    check("up", &up, &dup, |up| inner(&forward(&gate, up), &g));
}

/// Two sequences, one longer than a block and one with cached keys, heads in groups.
fn attention_case() -> (AttentionShape, [usize; 2]) {
    let spans = vec![
        Span { q_start: 0, q_len: 70, k_start: 0, k_len: 70 },
        Span { q_start: 70, q_len: 3, k_start: 70, k_len: 9 },
    ];
    let (heads, kv_heads, head_dim, scale) = (4, 2, 3, 0.6);
    let (soft_cap, window) = (None, None);
    (AttentionShape { heads, kv_heads, head_dim, scale, soft_cap, window, spans }, [73, 79])
}

fn attention_by_definition(shape: &AttentionShape, q: &[f64], k: &[f64], val: &[f64]) -> Vec<f64> {
    let (dim, heads, kv) = (shape.head_dim, shape.heads, shape.kv_heads);
    let mut out = vec![0.0; q.len()];
    for s in &shape.spans {
        for i in 0..s.q_len {
            for h in 0..heads {
                let query = &q[((s.q_start + i) * heads + h) * dim..][..dim];
                let at = |j: usize| ((s.k_start + j) * kv + h / (heads / kv)) * dim;
                let seen = s.k_len - s.q_len + i + 1;
                let first = shape.window.map_or(0, |w| seen.saturating_sub(w));
                let score = |j: usize| {
                    let s = inner(query, &k[at(j)..at(j) + dim]) * shape.scale;
                    shape.soft_cap.map_or(s, |c| c * (s / c).tanh())
                };
                let e: Vec<f64> =
                    (0..seen).map(|j| if j < first { 0.0 } else { score(j).exp() }).collect();
                let sum: f64 = e.iter().sum();
                for c in 0..dim {
                    out[((s.q_start + i) * heads + h) * dim + c] =
                        (0..seen).map(|j| e[j] / sum * val[at(j) + c]).sum();
                }
            }
        }
    }
    out
}

#[test]
fn attention() {
    let (shape, sizes) = attention_case();
    attention_with(&shape, sizes);
}

#[test]
fn attention_with_soft_cap_and_window() {
    // Windows of one key, below a block, a whole block, above a block.
    for window in [1, 5, 64, 66] {
        let (shape, sizes) = attention_case();
        attention_with(&AttentionShape { window: Some(window), ..shape }, sizes);
    }
    let (shape, sizes) = attention_case();
    attention_with(&AttentionShape { soft_cap: Some(0.4), window: Some(7), ..shape }, sizes);
}

fn attention_with(shape: &AttentionShape, [n, n_keys]: [usize; 2]) {
    let (width, kv_width) = (12, 6);
    let q = numbers(n * width, 10);
    let (k, val) = (numbers(n_keys * kv_width, 11), numbers(n_keys * kv_width, 12));
    let g = numbers(n * width, 13);
    let (mut out, mut lse) = (vec![7.0; n * width], vec![0.0; n * 4]);
    DEV().attention(shape, v(&q), v(&k), v(&val), m(&mut out), m(&mut lse));
    let want = attention_by_definition(shape, &q, &k, &val);
    assert!(out.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12));
    let mut dq = vec![0.0; q.len()];
    let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; k.len()]);
    DEV().attention_backward(
        shape,
        v(&q),
        v(&k),
        v(&val),
        v(&out),
        v(&lse),
        v(&g),
        m(&mut dq),
        m(&mut dk),
        m(&mut dv),
    );
    let loss =
        |q: &[f64], k: &[f64], val: &[f64]| inner(&attention_by_definition(shape, q, k, val), &g);
    // With one key the scores do not matter.
    if shape.window == Some(1) {
        assert!(dq.iter().chain(&dk).all(|x| x.abs() < 1e-12));
        return check("v", &val, &dv, |val| loss(&q, &k, val));
    }
    check("q", &q, &dq, |q| loss(q, &k, &val));
    check("k", &k, &dk, |k| loss(&q, k, &val));
    check("v", &val, &dv, |val| loss(&q, &k, val));
}

#[test]
fn cross_entropy_with_frozen_and_trained_head() {
    for smoothing in [0.0, 0.1, 1.0] {
        cross_entropy_with(None, smoothing);
        cross_entropy_with(Some(0.7), smoothing);
    }
}

fn cross_entropy_with(cap: Option<f64>, label_smoothing: f64) {
    let loss = CrossEntropy { soft_cap: cap, label_smoothing, scale: 0.5 };
    let (n, d, vocabulary) = (6, 5, 11);
    let (h, head) = (numbers(n * d, 14), numbers(vocabulary * d, 15));
    let targets = [(0u32, 3u32), (2, 10), (5, 0)];
    let by_definition = |h: &[f64], head: &[f64]| -> Vec<f64> {
        targets
            .iter()
            .map(|&(r, t)| {
                let e = label_smoothing;
                let row = &h[r as usize * d..][..d];
                let capped = |z: f64| cap.map_or(z, |c| c * (z / c).tanh());
                let z: Vec<f64> = head.chunks(d).map(|w| capped(inner(w, row))).collect();
                let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
                let of_all = z.iter().map(|z| log_sum - z).sum::<f64>() / vocabulary as f64;
                (1.0 - e) * (log_sum - z[t as usize]) + e * of_all
            })
            .collect()
    };
    let (mut dh, mut dhead) = (vec![0.0; n * d], vec![0.0; vocabulary * d]);
    let trained = MatrixRef::Trained(v(&head), vocabulary, d);
    let (dh_view, dhead_view) = (Some(m(&mut dh)), Some(m(&mut dhead)));
    let losses = DEV().cross_entropy(v(&h), &targets, trained, loss, dh_view, dhead_view);
    let want = by_definition(&h, &head);
    assert!(losses.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12));
    check("h", &h, &dh, |h| 0.5 * by_definition(h, &head).iter().sum::<f64>());
    check("head", &head, &dhead, |head| 0.5 * by_definition(&h, head).iter().sum::<f64>());

    let narrow: Vec<f32> = head.iter().map(|&x| x as f32).collect();
    let wide: Vec<f64> = narrow.iter().map(|&x| f64::from(x)).collect();
    let frozen = HostMatrix::from_f32(vocabulary, d, &narrow);
    let frozen = MatrixRef::Frozen(&frozen);
    let got = DEV().cross_entropy(v(&h), &targets, frozen, loss, None, None);
    let want = by_definition(&h, &wide);
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn soft_cap_bends_logits() {
    let mut x = vec![-100.0, -0.001, 0.0, 3.0];
    DEV().soft_cap(2.0, m(&mut x));
    let want = [-2.0, 2.0 * (-0.0005f64).tanh(), 0.0, 2.0 * 1.5f64.tanh()];
    assert!(x.iter().zip(want).all(|(x, want)| (x - want).abs() < 1e-15));
}

#[test]
fn embedding_adds_to_repeated_rows() {
    let (table, ids) = (numbers(12, 16), [2u32, 0, 2]);
    let mut y = vec![0.0; 9];
    DEV().embedding(&ids, MatrixRef::Trained(v(&table), 4, 3), m(&mut y));
    assert_eq!(y[0..3], table[6..9]);
    assert_eq!(y[3..6], table[0..3]);
    let (g, mut dtable) = (numbers(9, 17), vec![0.0; 12]);
    DEV().embedding_backward(&ids, v(&g), m(&mut dtable));
    for j in 0..3 {
        assert_eq!(dtable[6 + j], g[j] + g[6 + j]);
        assert_eq!(dtable[j], g[3 + j]);
    }
    assert!(dtable[3..6].iter().chain(&dtable[9..]).all(|&x| x == 0.0));
}

#[test]
fn rows_are_added_and_summed() {
    let (row, mut y) = (vec![1.0, 2.0], vec![10.0, 20.0, 30.0, 40.0]);
    DEV().add_row(v(&row), m(&mut y));
    assert_eq!(y, [11.0, 22.0, 31.0, 42.0]);
    let mut sum = vec![0.5, 0.5];
    DEV().sum_rows(v(&y), m(&mut sum));
    assert_eq!(sum, [42.5, 64.5]);
    let x = numbers(40_000, 18);
    assert!((DEV().sum_squares(v(&x)) - inner(&x, &x)).abs() < 1e-8);
}

/// Three steps worked out by hand from the definition of AdamW.
#[test]
fn adamw_follows_its_definition() {
    let (mut p, mut mean, mut var) = (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]);
    let mut want = [(1.0f64, 0.0f64, 0.0f64), (-2.0, 0.0, 0.0)];
    for step in 1..=3u64 {
        let g = vec![0.1 * step as f64, -3.0];
        let settings = AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
        };
        DEV().adamw(&settings, m(&mut p), v(&g), m(&mut mean), m(&mut var));
        for ((value, m1, m2), g) in want.iter_mut().zip(&g) {
            *m1 = 0.9 * *m1 + 0.1 * g;
            *m2 = 0.999 * *m2 + 0.001 * g * g;
            let (m_hat, v_hat) =
                (*m1 / (1.0 - 0.9f64.powi(step as i32)), *m2 / (1.0 - 0.999f64.powi(step as i32)));
            *value = *value * (1.0 - 0.01 * 0.1) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
        }
    }
    for (got, (value, ..)) in p.iter().zip(&want) {
        assert!((got - value).abs() < 1e-12);
    }
}

fn full(x: &Vec<f32>) -> View<'_, Cpu<f32>> {
    View::new(x, x.len())
}

/// The same operations in f32 under different thread pools: equal bits.
#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let (shape, [n, n_keys]) = attention_case();
    let narrow = |n, seed| -> Vec<f32> { numbers(n, seed).iter().map(|&x| x as f32).collect() };
    let (q, k, val) = (narrow(n * 12, 20), narrow(n_keys * 6, 21), narrow(n_keys * 6, 22));
    let (h, head) = (narrow(n * 12, 23), narrow(900 * 12, 24));
    let targets: Vec<(u32, u32)> = (0..n as u32).map(|r| (r, (r * 11) % 900)).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let dev = Cpu::<f32>::new();
            let (mut out, mut lse) = (vec![0f32; n * 12], vec![0f32; n * 4]);
            dev.attention(
                &shape,
                full(&q),
                full(&k),
                full(&val),
                ViewMut::new(&mut out, n * 12),
                ViewMut::new(&mut lse, n * 4),
            );
            let frozen = HostMatrix::from_f32(900, 12, &head);
            let mut dh = vec![0f32; n * 12];
            let losses = dev.cross_entropy(
                full(&h),
                &targets,
                MatrixRef::Frozen(&frozen),
                CrossEntropy::default(),
                Some(ViewMut::new(&mut dh, n * 12)),
                None,
            );
            (out, lse, dh, losses, dev.sum_squares(full(&head)))
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(4));
}
