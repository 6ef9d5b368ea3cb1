//! A decoder's tensors, frozen on the device or trained in the parameter buffer.

use super::Model;
use super::folder::ModelFolder;
use super::spec::{DecoderSpec, Norm, Proj};
use rand_distr::{Distribution, StandardNormal};
use smore::kernel::AdapterKernels;
use smore::rng::{Purpose, stream};
use smore_engine::{Dtype, Float, HostMatrix, MatrixRef, View, ViewMut};
use std::ops::Range;

/// Where a matrix is.
enum Matrix<D: AdapterKernels> {
    Frozen(D::Weight),
    Trained { at: Range<usize>, rows: usize, cols: usize },
}

/// Where a norm's gains are.
enum Vector<D: AdapterKernels> {
    Frozen(D::Buf, usize),
    Trained(Range<usize>),
}

/// All tensors of a decoder.
pub struct Weights<D: AdapterKernels> {
    embed: Matrix<D>,
    blocks: Vec<BlockWeights<D>>,
    norm: Vector<D>,
    /// Absent where the token table serves as head.
    head: Option<Matrix<D>>,
}

struct BlockWeights<D: AdapterKernels> {
    /// In the order of [`Norm::ALL`]; absent where the family has none.
    norms: [Option<Vector<D>>; 6],
    /// In the order of [`Proj::ALL`].
    maps: [Matrix<D>; 7],
    /// In the order of [`Proj::ALL`].
    biases: [Option<Vector<D>>; 7],
}

/// Makes the decoder's matrices and vectors by name, wherever they live.
trait Source<D: AdapterKernels> {
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Matrix<D>;
    fn vector(&mut self, name: &str, len: usize) -> Vector<D>;
}

struct FromFolder<'a, D> {
    device: &'a D,
    folder: &'a ModelFolder,
}

impl<D: AdapterKernels> Source<D> for FromFolder<'_, D> {
    fn matrix(&mut self, name: &str, _rows: usize, _cols: usize) -> Matrix<D> {
        Matrix::Frozen(self.device.weight(self.folder.tensor(name).clone()))
    }

    fn vector(&mut self, name: &str, len: usize) -> Vector<D> {
        let values: Vec<D::Elem> =
            to_f32(self.folder.tensor(name)).iter().map(|&x| D::Elem::from_f32(x)).collect();
        Vector::Frozen(self.device.upload(&values), len)
    }
}

/// Hands out ranges of the parameter buffer in the order of [`DecoderSpec::tensors`].
struct FromBuffer {
    ranges: std::collections::BTreeMap<String, Range<usize>>,
}

impl<D: AdapterKernels> Source<D> for FromBuffer {
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Matrix<D> {
        Matrix::Trained { at: self.ranges[name].clone(), rows, cols }
    }

    fn vector(&mut self, name: &str, _len: usize) -> Vector<D> {
        Vector::Trained(self.ranges[name].clone())
    }
}

impl<D: AdapterKernels> Weights<D> {
    /// Every tensor frozen, as the folder has it.
    pub fn frozen(device: &D, folder: &ModelFolder) -> Self {
        Self::build(&folder.spec, &mut FromFolder { device, folder })
    }

    /// Every tensor trained, in the order of [`DecoderSpec::tensors`].
    pub fn trained(spec: &DecoderSpec) -> Self {
        let mut at = 0;
        let ranges = spec.tensors().into_iter().map(|(name, shape)| {
            let start = at;
            at += shape.iter().product::<usize>();
            (name, start..at)
        });
        Self::build(spec, &mut FromBuffer { ranges: ranges.collect() })
    }

    fn build(spec: &DecoderSpec, source: &mut impl Source<D>) -> Self {
        let (vocabulary, hidden) = (spec.vocabulary, spec.hidden);
        let blocks = (0..spec.blocks)
            .map(|b| {
                let norms = Norm::ALL.map(|norm| {
                    let (width, path) = spec.norm_at(b, norm)?;
                    Some(source.vector(&format!("{path}.weight"), width))
                });
                let maps = Proj::ALL.map(|proj| {
                    let (d_out, d_in) = spec.shape(proj);
                    source.matrix(&format!("{}.weight", proj.path(b)), d_out, d_in)
                });
                let biases = Proj::ALL.map(|proj| {
                    let name = format!("{}.bias", proj.path(b));
                    spec.biased[proj as usize].then(|| source.vector(&name, spec.shape(proj).0))
                });
                BlockWeights { norms, maps, biases }
            })
            .collect();
        Self {
            embed: source.matrix("model.embed_tokens.weight", vocabulary, hidden),
            blocks,
            norm: source.vector("model.norm.weight", hidden),
            head: (!spec.tied).then(|| source.matrix("lm_head.weight", vocabulary, hidden)),
        }
    }

    /// True for full fine-tuning.
    pub fn is_trained(&self) -> bool {
        matches!(self.embed, Matrix::Trained { .. })
    }

    pub(super) fn embed<'a>(&'a self, model: &'a Model<D>) -> MatrixRef<'a, D> {
        self.embed.get(model)
    }

    pub(super) fn head<'a>(&'a self, model: &'a Model<D>) -> MatrixRef<'a, D> {
        self.head.as_ref().unwrap_or(&self.embed).get(model)
    }

    pub(super) fn norm<'a>(&'a self, model: &'a Model<D>) -> View<'a, D> {
        self.norm.get(model)
    }

    pub(super) fn block_norm<'a>(
        &'a self,
        model: &'a Model<D>,
        block: usize,
        norm: Norm,
    ) -> Option<View<'a, D>> {
        self.blocks[block].norms[norm as usize].as_ref().map(|v| v.get(model))
    }

    pub(super) fn map<'a>(
        &'a self,
        model: &'a Model<D>,
        block: usize,
        proj: Proj,
    ) -> MatrixRef<'a, D> {
        self.blocks[block].maps[proj as usize].get(model)
    }

    pub(super) fn bias<'a>(
        &'a self,
        model: &'a Model<D>,
        block: usize,
        proj: Proj,
    ) -> Option<View<'a, D>> {
        self.blocks[block].biases[proj as usize].as_ref().map(|v| v.get(model))
    }

    pub(super) fn embed_grad<'a>(&self, grads: ViewMut<'a, D>) -> Option<ViewMut<'a, D>> {
        self.embed.grad(grads)
    }

    pub(super) fn head_grad<'a>(&self, grads: ViewMut<'a, D>) -> Option<ViewMut<'a, D>> {
        self.head.as_ref().unwrap_or(&self.embed).grad(grads)
    }

    pub(super) fn norm_grad<'a>(&self, grads: ViewMut<'a, D>) -> Option<ViewMut<'a, D>> {
        self.norm.grad(grads)
    }

    pub(super) fn block_norm_grad<'a>(
        &self,
        grads: ViewMut<'a, D>,
        block: usize,
        norm: Norm,
    ) -> Option<ViewMut<'a, D>> {
        self.blocks[block].norms[norm as usize].as_ref()?.grad(grads)
    }

    pub(super) fn bias_grad<'a>(
        &self,
        grads: ViewMut<'a, D>,
        block: usize,
        proj: Proj,
    ) -> Option<ViewMut<'a, D>> {
        self.blocks[block].biases[proj as usize].as_ref()?.grad(grads)
    }

    pub(super) fn map_grad<'a>(
        &self,
        grads: ViewMut<'a, D>,
        block: usize,
        proj: Proj,
    ) -> Option<ViewMut<'a, D>> {
        self.blocks[block].maps[proj as usize].grad(grads)
    }
}

impl<D: AdapterKernels> Matrix<D> {
    fn get<'a>(&'a self, model: &'a Model<D>) -> MatrixRef<'a, D> {
        match self {
            Self::Frozen(weight) => MatrixRef::Frozen(weight),
            Self::Trained { at, rows, cols } => {
                MatrixRef::Trained(model.params_view().at(at.clone()), *rows, *cols)
            }
        }
    }

    fn grad<'a>(&self, grads: ViewMut<'a, D>) -> Option<ViewMut<'a, D>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained { at, .. } => Some(grads.at(at.clone())),
        }
    }
}

impl<D: AdapterKernels> Vector<D> {
    fn get<'a>(&'a self, model: &'a Model<D>) -> View<'a, D> {
        match self {
            Self::Frozen(buf, len) => View::new(buf, *len),
            Self::Trained(at) => model.params_view().at(at.clone()),
        }
    }

    fn grad<'a>(&self, grads: ViewMut<'a, D>) -> Option<ViewMut<'a, D>> {
        match self {
            Self::Frozen(..) => None,
            Self::Trained(at) => Some(grads.at(at.clone())),
        }
    }
}

/// A stored tensor, widened.
pub fn to_f32(matrix: &HostMatrix) -> Vec<f32> {
    let bytes = matrix.row_bytes(0, matrix.rows);
    match matrix.dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => {
            let pairs = bytes.as_chunks::<2>().0.iter();
            pairs.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::Bf16 => {
            let pairs = bytes.as_chunks::<2>().0.iter();
            pairs.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
    }
}

/// All tensors of a folder in the order of [`DecoderSpec::tensors`], to be trained on.
pub fn read_all(folder: &ModelFolder) -> Vec<f32> {
    folder.spec.tensors().iter().flat_map(|(name, _)| to_f32(folder.tensor(name))).collect()
}

/// Weights drawn anew: matrices N(0, initializer_range), gains 1, biases 0 (Hugging Face's rule).
pub fn from_scratch(spec: &DecoderSpec, seed: u64) -> Vec<f32> {
    let mut values = Vec::new();
    for (i, (name, shape)) in spec.tensors().iter().enumerate() {
        let len: usize = shape.iter().product();
        let mut rng = stream(seed, Purpose::BaseInit, 0, i as u64);
        if shape.len() == 1 {
            let gain = 1.0 - spec.norm.offset as f32;
            let value = if name.ends_with(".bias") { 0.0 } else { gain };
            values.extend(std::iter::repeat_n(value, len));
        } else {
            values.extend((0..len).map(|_| {
                let normal: f64 = StandardNormal.sample(&mut rng);
                (spec.initializer_range * normal) as f32
            }));
        }
    }
    values
}
