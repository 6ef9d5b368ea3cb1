//! The noisy top-k gate (Shazeer et al. 2017): cosine scores, learned noise in training, softmax
//! over the chosen.

use super::network::{self, Query};
use super::{BalanceSlopes, Gate, LayerStats, add_to, top};
use crate::kernel::Core;
use crate::tree::TreeLayer;
use smore_engine::cpu::{Strided, StridedMut, gemm};
use smore_engine::{Float, Scratch};

/// Smallest standard deviation of the noise.
const NOISE_FLOOR: f64 = 1e-2;

/// A block's scores, with what the backward pass needs.
pub(crate) struct Scores<T> {
    /// `[rows, key_width]`, the query over its length
    unit_query: Vec<T>,
    /// `[rows]`, its length
    length: Vec<T>,
    /// `[rows, s]`, cosines
    clean: Vec<T>,
    /// Present in training.
    noise: Option<Noise<T>>,
}

/// Everything about the noise of a block, each `[rows, s]`.
struct Noise<T> {
    /// Drawn from N(0, 1).
    drawn: Vec<T>,
    /// input . W_noise
    raw: Vec<T>,
    /// softplus(raw) + floor
    deviation: Vec<T>,
    /// clean + drawn * deviation
    noisy: Vec<T>,
}

impl<T> Scores<T> {
    fn logits(&self) -> &[T] {
        self.noise.as_ref().map_or(&self.clean, |n| &n.noisy)
    }
}

/// x / |x| row by row, and the lengths.
pub(crate) fn unit_rows<T: Float>(x: &[T], width: usize) -> (Vec<T>, Vec<T>) {
    let mut unit = x.to_vec();
    let length = unit
        .chunks_exact_mut(width)
        .map(|row| {
            let square: T = row.iter().map(|&x| x * x).sum();
            let length = square.sqrt().max_of(T::from_f64(1e-12));
            for x in row {
                *x /= length;
            }
            length
        })
        .collect();
    (unit, length)
}

/// Turns slopes by x / |x| into slopes by x, in place.
pub(crate) fn unit_rows_backward<T: Float>(unit: &[T], length: &[T], d: &mut [T], width: usize) {
    let rows = d.chunks_exact_mut(width).zip(unit.chunks_exact(width)).zip(length);
    for ((d, unit), &length) in rows {
        let along: T = d.iter().zip(unit).map(|(&d, &u)| d * u).sum();
        for (d, &u) in d.iter_mut().zip(unit) {
            *d = (*d - u * along) / length;
        }
    }
}

pub(super) fn forward<T: Float>(
    core: &Core<T>,
    l: usize,
    gate: Gate,
    query: &Query<T>,
    noise: Option<&[T]>,
    out: &mut TreeLayer<T>,
    fixed: bool,
) -> Scores<T> {
    let layer = &core.spec.layers[l];
    let (s, f, width) = (gate.experts, gate.fanout, layer.key_width);
    let (unit_query, length) = unit_rows(query.query(), width);
    let rows = length.len();
    let mut clean = vec![T::ZERO; rows * s];
    let keys = Strided::new(core.used_keys(l), s, width);
    let target = StridedMut::new(&mut clean, rows, s);
    gemm(false, T::ONE, Strided::new(&unit_query, rows, width), keys.t(), T::ZERO, target);
    let noise = noise.map(|drawn| make_noise(core, l, query, drawn, &clean));
    let scores = Scores { unit_query, length, clean, noise };
    let chosen = out.expert_idx.chunks_exact_mut(f).zip(out.gate_weight.chunks_exact_mut(f));
    for (logits, (idx, weight)) in scores.logits().chunks_exact(s).zip(chosen) {
        if !fixed {
            top(logits, f, idx);
        }
        for (w, &i) in weight.iter_mut().zip(idx.iter()) {
            *w = logits[usize::from(i)];
        }
        // A single choice keeps its raw score, so that the router gets a gradient from the task.
        if f > 1 {
            let raw = weight.to_vec();
            super::switch::softmax(&raw, weight);
        }
    }
    scores
}

fn make_noise<T: Float>(
    core: &Core<T>,
    l: usize,
    query: &Query<T>,
    drawn: &[T],
    clean: &[T],
) -> Noise<T> {
    let layer = &core.spec.layers[l];
    let (s, input) = (layer.experts, layer.router_input);
    let rows = clean.len() / s;
    let mut raw = vec![T::ZERO; rows * s];
    if let Some(at) = core.layout.layers[l].noise {
        let w = Strided::new(&core.params[at..], s, input);
        let target = StridedMut::new(&mut raw, rows, s);
        gemm(false, T::ONE, Strided::new(&query.input, rows, input), w.t(), T::ZERO, target);
    }
    let deviation: Vec<T> = raw
        .iter()
        .map(|&x| {
            let tail = (T::ONE + (-x.abs()).exp()).ln();
            x.max_of(T::ZERO) + tail + T::from_f64(NOISE_FLOOR)
        })
        .collect();
    let noisy = clean.iter().zip(drawn).zip(&deviation).map(|((&c, &n), &d)| c + n * d).collect();
    Noise { drawn: drawn.to_vec(), raw, deviation, noisy }
}

/// The threshold an expert's clean score must pass to be chosen if its noise were redrawn, and
/// whose noisy score that is: the best of the rest for the chosen, the last chosen for the rest.
struct Thresholds {
    last_chosen: usize,
    best_left: usize,
}

impl Thresholds {
    fn new<T: Float>(noisy: &[T], fanout: usize) -> Self {
        let mut order = vec![0u16; (fanout + 1).min(noisy.len())];
        let count = order.len();
        top(noisy, count, &mut order);
        Self {
            last_chosen: usize::from(order[fanout - 1]),
            best_left: usize::from(order[count - 1]),
        }
    }

    fn of<T: Float>(&self, noisy: &[T], expert: usize) -> usize {
        let chosen = noisy[expert] > noisy[self.best_left];
        if chosen { self.best_left } else { self.last_chosen }
    }
}

/// How far the expert's clean score lies above its threshold, in deviations.
fn margin<T: Float>(
    noise: &Noise<T>,
    clean: &[T],
    at: usize,
    limits: &Thresholds,
    i: usize,
) -> f64 {
    let s = clean.len();
    let noisy = &noise.noisy[at..at + s];
    let threshold = noisy[limits.of(noisy, i)];
    ((clean[i] - threshold) / noise.deviation[at + i]).to_f64()
}

pub(super) fn collect<T: Float>(
    scores: &Scores<T>,
    row: usize,
    experts: usize,
    idx: &[u16],
    weight: &[T],
    stats: &mut LayerStats,
) {
    for (&i, &w) in idx.iter().zip(weight) {
        stats.importance[usize::from(i)] += w.to_f64();
        if scores.noise.is_none() && w > T::ZERO {
            stats.load[usize::from(i)] += 1.0;
        }
    }
    if let Some(noise) = &scores.noise {
        let at = row * experts;
        let limits = Thresholds::new(&noise.noisy[at..at + experts], idx.len());
        let clean = &scores.clean[at..at + experts];
        for (i, load) in stats.load.iter_mut().enumerate() {
            let z = margin(noise, clean, at, &limits, i);
            *load += 0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2);
        }
    }
}

/// w (cv^2(importance) + cv^2(load)), cv^2 = unbiased variance / (mean^2 + 1e-10).
pub(super) fn balance(weight: f64, stats: &LayerStats) -> (f64, BalanceSlopes) {
    let (importance, dimportance) = squared_variation(&stats.importance, weight);
    let (load, dload) = squared_variation(&stats.load, weight);
    (importance + load, BalanceSlopes { load: dload, importance: dimportance })
}

fn squared_variation(x: &[f64], weight: f64) -> (f64, Vec<f64>) {
    let n = x.len() as f64;
    if x.len() < 2 {
        return (0.0, vec![0.0; x.len()]);
    }
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let square = mean * mean + 1e-10;
    let slope = |x: &f64| {
        weight
            * (2.0 * (x - mean) / ((n - 1.0) * square)
                - variance * 2.0 * mean / (n * square * square))
    };
    (weight * variance / square, x.iter().map(slope).collect())
}

/// Slopes by the router's input `[rows, router_input]`; slopes by keys, network and W_noise are
/// added to `grads`, those by keys in terms of the normalised keys.
pub(super) fn backward<T: Float>(
    core: &Core<T>,
    l: usize,
    gate: Gate,
    query: &Query<T>,
    scores: &Scores<T>,
    out: &TreeLayer<T>,
    dweight: &mut [T],
    balance: Option<&BalanceSlopes>,
    counts: impl Fn(usize) -> bool,
    grads: &mut [T],
) -> Scratch<T> {
    let layer = &core.spec.layers[l];
    let (s, f, width) = (gate.experts, gate.fanout, layer.key_width);
    let rows = scores.length.len();
    let mut dclean = vec![T::ZERO; rows * s];
    let mut draw = vec![T::ZERO; rows * s];
    for row in 0..rows {
        let chosen = row * f..(row + 1) * f;
        let (idx, weight) = (&out.expert_idx[chosen.clone()], &out.gate_weight[chosen.clone()]);
        let dweight = &mut dweight[chosen];
        let slopes = balance.filter(|_| counts(row));
        if let Some(slopes) = slopes {
            for (dw, &i) in dweight.iter_mut().zip(idx) {
                *dw += T::from_f64(slopes.importance[usize::from(i)]);
            }
        }
        let at = row * s;
        let dclean = &mut dclean[at..at + s];
        let mean: T = if f > 1 {
            weight.iter().zip(dweight.iter()).map(|(&w, &d)| w * d).sum()
        } else {
            T::ZERO
        };
        for ((&i, &w), &dw) in idx.iter().zip(weight).zip(dweight.iter()) {
            dclean[usize::from(i)] = if f > 1 { w * (dw - mean) } else { dw };
        }
        if let Some(noise) = &scores.noise {
            let clean = &scores.clean[at..at + s];
            noise_backward(noise, clean, at, f, slopes, dclean, &mut draw[at..at + s]);
        }
    }
    let dlogits = Strided::new(&dclean, rows, s);
    let unit = Strided::new(&scores.unit_query, rows, width);
    let at = core.layout.layers[l].keys;
    gemm(false, T::ONE, dlogits.t(), unit, T::ONE, StridedMut::new(&mut grads[at..], s, width));
    let mut dquery = Scratch::zeros(rows * width);
    let keys = Strided::new(core.used_keys(l), s, width);
    gemm(false, T::ONE, dlogits, keys, T::ZERO, StridedMut::new(&mut dquery, rows, width));
    unit_rows_backward(&scores.unit_query, &scores.length, &mut dquery, width);
    let mut dinput = network::backward_query(core, l, query, dquery, grads);
    if let Some(at) = core.layout.layers[l].noise.filter(|_| scores.noise.is_some()) {
        let input = layer.router_input;
        let draw = Strided::new(&draw, rows, s);
        let dw = StridedMut::new(&mut grads[at..], s, input);
        gemm(false, T::ONE, draw.t(), Strided::new(&query.input, rows, input), T::ONE, dw);
        let w = Strided::new(&core.params[at..], s, input);
        gemm(false, T::ONE, draw, w, T::ONE, StridedMut::new(&mut dinput, rows, input));
    }
    dinput
}

/// From slopes by the noisy scores (in `dclean` on entry) and by the load to slopes by the clean
/// scores and by the raw noise scale, for one row.
fn noise_backward<T: Float>(
    noise: &Noise<T>,
    clean: &[T],
    at: usize,
    fanout: usize,
    slopes: Option<&BalanceSlopes>,
    dclean: &mut [T],
    draw: &mut [T],
) {
    let s = clean.len();
    let noisy = &noise.noisy[at..at + s];
    let mut dnoisy = dclean.to_vec();
    let mut ddeviation = vec![T::ZERO; s];
    let mut dmargin = vec![T::ZERO; s];
    if let Some(slopes) = slopes {
        let limits = Thresholds::new(noisy, fanout);
        for i in 0..s {
            let z = margin(noise, clean, at, &limits, i);
            let density = (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt();
            let slope = T::from_f64(slopes.load[i] * density) / noise.deviation[at + i];
            dmargin[i] = slope;
            dnoisy[limits.of(noisy, i)] -= slope;
            ddeviation[i] = -slope * T::from_f64(z);
        }
    }
    for i in 0..s {
        let by_deviation = ddeviation[i] + dnoisy[i] * noise.drawn[at + i];
        draw[i] = by_deviation * noise.raw[at + i].sigmoid();
    }
    add_to(&mut dmargin, &dnoisy);
    dclean.copy_from_slice(&dmargin);
}
