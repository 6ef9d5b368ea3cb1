//! What `Cpu::mixed` computes: products of factors rounded to 16 bits where this processor does those
//! faster, and exactly what `Cpu::new` computes elsewhere.

use smore_engine::{
    AttentionShape, Cpu, Device, Dtype, GateActivation, HostMatrix, MatrixRef, Span, View, ViewMut,
};

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32
        })
        .collect()
}

fn v(x: &Vec<f32>) -> View<'_, Cpu<f32>> {
    View::new(x, x.len())
}

fn m(x: &mut Vec<f32>) -> ViewMut<'_, Cpu<f32>> {
    let len = x.len();
    ViewMut::new(x, len)
}

/// The distance of two results over the length of the second.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let far: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    (far / b.iter().map(|&b| square(f64::from(b))).sum::<f64>()).sqrt()
}

/// As far apart as two roundings to 8 bits are, about 2^-9 each and never the same, or as one of a sum
/// to 11 bits now and then; or not at all, as what is small is in f16's place.
fn rounded(name: &str, small: bool, a: &[f32], b: &[f32]) {
    let far = apart(a, b);
    match Cpu::mixed().factors() {
        Dtype::Bf16 => assert!(far > 1e-4 && far < 6e-3, "{name}: {far}"),
        Dtype::F16 if !small => assert!(far > 1e-4 && far < 1.5e-3, "{name}: {far}"),
        Dtype::F16 | Dtype::F32 => assert!(a == b, "{name}: {far}"),
    }
}

/// Forward and backward of one operation, on one device.
fn everything(device: Cpu<f32>) -> Vec<(&'static str, Vec<f32>)> {
    let (n, d_in, d_out) = (140, 160, 130);
    let w = HostMatrix::from_f32(d_out, d_in, &numbers(d_out * d_in, 1)).to_bf16();
    let (x, dy) = (numbers(n * d_in, 2), numbers(n * d_out, 3));
    let (mut y, mut dx) = (vec![0.0; n * d_out], vec![0.0; n * d_in]);
    device.linear(v(&x), MatrixRef::Frozen(&w), None, m(&mut y), n, false);
    device.linear_backward(v(&dy), MatrixRef::Frozen(&w), m(&mut dx), n, false);
    let mut dw = vec![0.0; d_out * d_in];
    let (a, b) = (v(&dy).mat(n, d_out).t(), v(&x).mat(n, d_in));
    device.gemm(0.5, a, b, 1.0, m(&mut dw).mat(d_out, d_in));

    let (heads, head_dim, tokens) = (2, 32, 90);
    let spans = vec![Span { q_start: 0, q_len: tokens, k_start: 0, k_len: tokens }];
    let (soft_cap, window) = (None, None);
    let shape =
        AttentionShape { heads, kv_heads: 1, head_dim, scale: 0.2, soft_cap, window, spans };
    let (wide, slim) = (tokens * heads * head_dim, tokens * head_dim);
    let (q, k, val, dout) =
        (numbers(wide, 4), numbers(slim, 5), numbers(slim, 6), numbers(wide, 7));
    let (mut out, mut lse) = (vec![0.0; wide], vec![0.0; tokens * heads]);
    device.attention(&shape, v(&q), v(&k), v(&val), m(&mut out), m(&mut lse));
    let (mut dq, mut dk, mut dv) = (vec![0.0; wide], vec![0.0; slim], vec![0.0; slim]);
    device.attention_backward(
        &shape,
        v(&q),
        v(&k),
        v(&val),
        v(&out),
        v(&lse),
        v(&dout),
        m(&mut dq),
        m(&mut dk),
        m(&mut dv),
    );
    vec![("y", y), ("dx", dx), ("dw", dw), ("attention", out), ("dq", dq), ("dk", dk), ("dv", dv)]
}

#[test]
fn factors_are_rounded_and_sums_are_not() {
    for ((name, mixed), (_, exact)) in everything(Cpu::mixed()).iter().zip(everything(Cpu::new())) {
        rounded(name, !["y", "dx", "dw"].contains(name), mixed, &exact);
    }
}

/// A sum of 4,001 ones is exact; in bf16 it would stop at 256, in f16 at 2,048.
#[test]
fn sums_are_kept_in_f32() {
    let (n, d) = (128, 4001);
    let w = HostMatrix::from_f32(n, d, &vec![1.0; n * d]).to_bf16();
    let (x, mut y) = (vec![1.0; n * d], vec![0.0; n * n]);
    Cpu::mixed().linear(v(&x), MatrixRef::Frozen(&w), None, m(&mut y), n, false);
    assert!(y.iter().all(|&y| y == 4001.0));
}

/// What was kept in bf16 is what comes back from there, element by element, over pieces and a rest.
#[test]
fn a_gate_that_was_kept_gives_what_it_gives_recalled() {
    let (device, n) = (Cpu::<f32>::mixed(), 40_000);
    let (gate, up, dy) = (numbers(n, 8), numbers(n, 9), numbers(n, 10));
    let kept = || [&gate, &up].map(|x| device.keep_copy(v(x)));
    let [mut gate_back, mut up_back] = kept().map(|x| device.recall(x));
    assert!(gate_back != gate && up_back != up, "rounded");
    for act in [GateActivation::Silu, GateActivation::GeluTanh] {
        let [gate, up] = kept();
        let (mut y, mut want) = (vec![0.0; n], vec![0.0; n]);
        device.gated_kept(act, &gate, &up, m(&mut y));
        device.gated(act, v(&gate_back), v(&up_back), m(&mut want));
        assert!(y == want, "{act:?}");
        let slopes = device.gated_kept_backward(act, v(&dy), gate, up);
        let before = [gate_back.clone(), up_back.clone()];
        device.gated_backward(act, v(&dy), m(&mut gate_back), m(&mut up_back));
        assert!(slopes == [gate_back, up_back], "{act:?}");
        [gate_back, up_back] = before;
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| everything(Cpu::mixed()))
    };
    assert!(on(1) == on(2) && on(1) == on(5));
}
