//! The best LoRA for an adapter on given text, for servers that know only LoRA: on every adapted
//! map the rank-k matrix that is closest to the adapter on the inputs the text gives it.
//!
//! With X `[n, d_in]` a map's inputs and Y `[n, d_out]` what the adapter adds, the fit minimises
//! ||Y - X Z||^2 over Z of rank k (reduced-rank regression). With C = X^T X + ridge = L L^T it is
//! Z = L^-T U_k S_k V_k^T, from the singular value decomposition of L^-1 X^T Y. Y lies in the span
//! of the adapter's output factors, a few columns Q, so that X^T Y Q is all that is held of it.

use crate::checkpoint::LoadedAdapter;
use crate::config::AdapterConfig;
use crate::inject::{Adapters, Site, Slot};
use crate::model::folder::ModelFolder;
use crate::model::spec::Proj;
use crate::model::{Batch, Model};
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::{Mat, MatRef, Par, Side};
use serde::Serialize;
use smore::adapter::{AnyAdapter, BlockAdapter, Mode};
use smore::config::LoraConfig;
use smore_engine::{Cpu, View};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Tokens of the text that run together.
const CHUNK: usize = 2048;

/// A LoRA and how close it is.
pub struct Distilled {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its places.
    pub adapters: Adapters,
    /// Its values.
    pub values: Vec<f32>,
    /// One entry per adapted map.
    pub fits: Vec<Fit>,
}

/// How close the LoRA on one map is to the adapter, on the text.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// Module path of the map.
    pub path: String,
    /// ||Y - fit|| / ||Y||; 0 is equal.
    pub residual: f64,
}

/// Fits a LoRA of rank `rank` to `adapter` on `text`. `ridge` times the mean square of the inputs is
/// added to every direction, for those that the text never takes. `watch(done, all)` is told after
/// each block.
///
/// # Errors
/// A MixLoRA, or inputs that are not finite.
pub fn distill(
    folder: &ModelFolder,
    adapter: LoadedAdapter,
    text: &[Batch],
    rank: usize,
    ridge: f64,
    mut watch: impl FnMut(usize, usize),
) -> std::result::Result<Distilled, String> {
    if adapter.adapters.slots.iter().any(|slot| slot.site == Site::Ffn) {
        return Err(
            "a MixLoRA has no linear map to fit: its experts are whole FFNs, mixed after the \
                    activation"
                .into(),
        );
    }
    let spans: BTreeMap<usize, Span> = adapter
        .adapters
        .slots
        .iter()
        .map(|slot| (slot.place, Span::of(slot, &adapter.values[slot.range.clone()])))
        .collect();
    let targets = adapter.settings.config.targets().cloned().unwrap_or_default();
    let lora = LoraConfig { targets, alpha: Some(rank as f64), ..LoraConfig::new(rank) };
    let config = AdapterConfig::Lora(lora);
    let lora = Adapters::stored(&config, &[], &folder.spec)?;
    let mut values = vec![0.0; lora.len()];

    let context = text.iter().map(|b| b.ids.len()).max().unwrap_or(1);
    let LoadedAdapter { adapters, values: from, .. } = adapter;
    let mut model = Model::new(Cpu::<f32>::new(), folder, adapters, &from, context);
    let mut states: Vec<Vec<f32>> = text.iter().map(|batch| model.embedded(batch)).collect();
    let mut fits = Vec::new();
    for b in 0..folder.spec.blocks {
        let sums: Arc<Mutex<Sums>> = Arc::default();
        let places: Vec<(Proj, usize)> = Proj::ALL
            .into_iter()
            .filter_map(|p| Some((p, model.adapters.at(b, p)?.0.place)))
            .collect();
        let bases: BTreeMap<Proj, Mat<f64>> =
            places.iter().map(|(p, place)| (*p, spans[place].q.clone())).collect();
        model.tap = (!places.is_empty()).then(|| {
            let sums = Arc::clone(&sums);
            let see = move |_: usize, proj: Proj, x: View<Cpu<f32>>, y: View<Cpu<f32>>| {
                let mut sums = sums.lock().expect("no reader panics");
                sums.add(proj, &bases[&proj], Cpu::slice(x), Cpu::slice(y));
            };
            Box::new(see) as crate::model::Tap<Cpu<f32>>
        });
        for (batch, x) in text.iter().zip(&mut states) {
            model.run_block(b, x, batch, Mode::plain());
        }
        model.tap = None;
        let mut sums = sums.lock().expect("no reader panics");
        for (proj, place) in places {
            let slot = lora.at(b, proj).expect("the LoRA has the adapter's targets").0;
            let run = &mut values[slot.range.clone()];
            let residual = sums.fit(proj, &spans[&place].q, rank, ridge, run)?;
            fits.push(Fit { path: slot.path(), residual });
        }
        watch(b + 1, folder.spec.blocks);
    }
    Ok(Distilled { config, adapters: lora, values, fits })
}

/// Cuts tokens into sequences that a distillation takes.
pub fn sequences(ids: &[u32], context: usize) -> Vec<Batch> {
    let pieces = ids.chunks(context.min(CHUNK)).filter(|piece| piece.len() > 1);
    pieces
        .map(|piece| {
            let mut batch = Batch::default();
            batch.push(piece, &vec![true; piece.len()]);
            batch
        })
        .collect()
}

/// Where an adapter's outputs lie.
struct Span {
    /// Orthonormal columns `[d_out, w]`.
    q: Mat<f64>,
}

impl Span {
    fn of(slot: &Slot, values: &[f32]) -> Self {
        let BlockAdapter::Map(adapter) = &slot.adapter else {
            unreachable!("refused before");
        };
        // Output factors, each `[d_out, width]`.
        let (d_out, parts): (usize, Vec<(&[f32], usize)>) = match adapter {
            AnyAdapter::Smore(a) => {
                let (d_out, width, at) = (a.spec.d_out, a.spec.root_width(), &a.layout);
                let proj = &values[at.output_proj..at.output_bias];
                let bias = &values[at.output_bias..at.output_bias + d_out];
                (d_out, vec![(proj, width), (bias, 1)])
            }
            AnyAdapter::Lora(a) => (a.spec.d_out, vec![(&values[a.layout.up..], a.spec.rank)]),
            AnyAdapter::HydraLora(a) => {
                let heads = (0..a.spec.heads).map(|i| &values[a.layout.head(&a.spec, i)]);
                (a.spec.d_out, heads.map(|b| (b, a.spec.rank)).collect())
            }
        };
        let width: usize = parts.iter().map(|(_, w)| w).sum();
        let mut all = Mat::<f64>::zeros(d_out, width);
        let mut first = 0;
        for (part, w) in parts {
            for (i, row) in part.chunks_exact(w).enumerate() {
                for (j, &x) in row.iter().enumerate() {
                    all[(i, first + j)] = f64::from(x);
                }
            }
            first += w;
        }
        Self { q: all.qr().compute_thin_Q() }
    }
}

/// Sums over the tokens of one block.
#[derive(Default)]
struct Sums {
    /// X^T X by the first map that is given these inputs: q stands for k and v, gate for up.
    inputs: BTreeMap<Proj, Mat<f64>>,
    /// X^T Y Q and ||Y||^2 of every map.
    outputs: BTreeMap<Proj, (Mat<f64>, f64)>,
}

/// The map whose inputs these are too.
fn twin(proj: Proj) -> Proj {
    match proj {
        Proj::K | Proj::V => Proj::Q,
        Proj::Up => Proj::Gate,
        own => own,
    }
}

impl Sums {
    fn add(&mut self, proj: Proj, q: &Mat<f64>, x: &[f32], y: &[f32]) {
        let d_out = q.nrows();
        let n = y.len() / d_out;
        let wide = |v: &[f32]| {
            let cols = v.len() / n;
            Mat::from_fn(n, cols, |i, j| f64::from(v[i * cols + j]))
        };
        let (x, y) = (wide(x), wide(y));
        // Twins see the same inputs one after the other; whoever comes first adds them.
        let key = twin(proj);
        if !self.seen_by_twin(proj) {
            let d_in = x.ncols();
            let sum = self.inputs.entry(key).or_insert_with(|| Mat::zeros(d_in, d_in));
            *sum += x.transpose() * &x;
        }
        let (d_in, width) = (x.ncols(), q.ncols());
        let (sum, square) =
            self.outputs.entry(proj).or_insert_with(|| (Mat::zeros(d_in, width), 0.0));
        *sum += x.transpose() * (&y * q);
        *square += y.squared_norm_l2();
    }

    /// True where another map with the same inputs adds them: the first one adapted does.
    fn seen_by_twin(&self, proj: Proj) -> bool {
        let mut first = self.outputs.keys().filter(|p| twin(**p) == twin(proj));
        first.next().is_some_and(|&p| p != proj)
    }

    /// Writes A `[rank, d_in]` and B `[d_out, rank]`; returns the relative residual.
    fn fit(
        &mut self,
        proj: Proj,
        q: &Mat<f64>,
        rank: usize,
        ridge: f64,
        values: &mut [f32],
    ) -> std::result::Result<f64, String> {
        let Some((m, square)) = self.outputs.remove(&proj) else { return Ok(0.0) };
        let c = &self.inputs[&twin(proj)];
        if square == 0.0 {
            return Ok(0.0);
        }
        let (a, b) = reduced_rank(c.as_ref(), m.as_ref(), rank, ridge)?;
        // ||Y - X A^T B^T Q^T||^2
        let cross = (&a * &m).transpose() * b.transpose();
        let trace: f64 = (0..cross.nrows().min(cross.ncols())).map(|i| cross[(i, i)]).sum();
        let (aca, bb) = (&a * c * a.transpose(), b.transpose() * &b);
        let mut fitted = 0.0;
        for i in 0..rank {
            for j in 0..rank {
                fitted += aca[(i, j)] * bb[(j, i)];
            }
        }
        let up = q * &b;
        let d_in = c.nrows();
        for (i, row) in values[..rank * d_in].chunks_exact_mut(d_in).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = a[(i, j)] as f32;
            }
        }
        for (o, row) in values[rank * d_in..].chunks_exact_mut(rank).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = up[(o, j)] as f32;
            }
        }
        Ok(((square - 2.0 * trace + fitted).max(0.0) / square).sqrt())
    }
}

/// A `[rank, d_in]` and B `[w, rank]` that minimise ||Y - X A^T B^T||^2 + ridge, from C = X^T X and
/// M = X^T Y `[d_in, w]`; both factors carry half of the singular values.
fn reduced_rank(
    c: MatRef<f64>,
    m: MatRef<f64>,
    rank: usize,
    ridge: f64,
) -> std::result::Result<(Mat<f64>, Mat<f64>), String> {
    let d_in = c.nrows();
    let mean = (0..d_in).map(|i| c[(i, i)]).sum::<f64>() / d_in as f64;
    let mut c = c.to_owned();
    for i in 0..d_in {
        c[(i, i)] += ridge * mean;
    }
    let broken = "the text gives inputs that are not finite or too few; give more text";
    let llt = c.llt(Side::Lower).map_err(|_| broken)?;
    let mut s = m.to_owned();
    solve_lower_triangular_in_place(llt.L(), s.as_mut(), Par::Seq);
    let svd = s.thin_svd().map_err(|_| broken)?;
    let kept = rank.min(svd.S().column_vector().nrows());
    let (mut a, mut b) = (Mat::<f64>::zeros(d_in, rank), Mat::<f64>::zeros(m.ncols(), rank));
    for k in 0..kept {
        let root = svd.S().column_vector()[k].max(0.0).sqrt();
        for i in 0..d_in {
            a[(i, k)] = svd.U()[(i, k)] * root;
        }
        for i in 0..m.ncols() {
            b[(i, k)] = svd.V()[(i, k)] * root;
        }
    }
    solve_upper_triangular_in_place(llt.L().transpose(), a.as_mut(), Par::Seq);
    Ok((a.transpose().to_owned(), b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Mat::from_fn(rows, cols, |_, _| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    fn error(x: &Mat<f64>, y: &Mat<f64>, a: &Mat<f64>, b: &Mat<f64>) -> f64 {
        (y - x * a.transpose() * b.transpose()).squared_norm_l2()
    }

    /// By Eckart and Young, what is left is what least squares leave and the singular values of the
    /// fitted values that were cut off; and nothing of the same rank is better.
    #[test]
    fn no_matrix_of_the_same_rank_is_closer() {
        let (n, d_in, w) = (60, 7, 5);
        let x = numbers(n, d_in, 1);
        let y = &x * numbers(d_in, w, 2) + numbers(n, w, 3);
        let (c, m) = (x.transpose() * &x, x.transpose() * &y);
        let (full_a, full_b) = reduced_rank(c.as_ref(), m.as_ref(), w, 0.0).unwrap();
        let least_squares = error(&x, &y, &full_a, &full_b);
        let fitted = &x * full_a.transpose() * full_b.transpose();
        let svd = fitted.thin_svd().unwrap();
        for rank in 1..=w {
            let (a, b) = reduced_rank(c.as_ref(), m.as_ref(), rank, 0.0).unwrap();
            let best = error(&x, &y, &a, &b);
            let cut: f64 = (rank..w).map(|k| svd.S().column_vector()[k].powi(2)).sum();
            assert!((best - least_squares - cut).abs() < 1e-9 * best, "{rank}: {best}");
            for seed in 0..40 {
                let step = [1e-3, 1e-2, 0.3][seed as usize % 3];
                let (da, db) = (numbers(rank, d_in, 10 + seed), numbers(w, rank, 90 + seed));
                let near =
                    error(&x, &y, &(&a + faer::Scale(step) * da), &(&b + faer::Scale(step) * db));
                assert!(near >= best - 1e-9 * best, "rank {rank}: {near} below {best}");
            }
        }
    }

    #[test]
    fn directions_without_text_are_no_reason_to_fail() {
        // Three tokens in seven dimensions.
        let x = numbers(3, 7, 1);
        let y = numbers(3, 4, 2);
        let (c, m) = (x.transpose() * &x, x.transpose() * &y);
        let (a, b) = reduced_rank(c.as_ref(), m.as_ref(), 3, 1e-6).unwrap();
        assert!(error(&x, &y, &a, &b) < 1e-6 * y.squared_norm_l2());
    }
}
