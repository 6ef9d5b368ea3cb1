//! Counting: parameters, multiplications per token and structural flexibility.
//!
//! [`Parameters`] and [`Multiplications`] follow the paper's formulas (Eqs. 8 and 9, App. C.1) on
//! the adapter as it is built, [`AuthorStats`] is what the authors' own program prints, and
//! [`flexibility`] counts the outputs that different trees can give one token (Thms. 3.3 and 3.4).
//! All but the last are for one linear map.

/// Lets counts be added up over linear maps (`sum`) and repeated over blocks (`* n`), field by field.
macro_rules! adds_up {
    ($type:ident: $($field:ident),+) => {
        impl std::iter::Sum for $type {
            fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
                all.fold(Self::default(), |sum, one| Self { $($field: sum.$field + one.$field),+ })
            }
        }

        impl std::ops::Mul<usize> for $type {
            type Output = Self;

            fn mul(self, n: usize) -> Self {
                Self { $($field: self.$field * n),+ }
            }
        }
    };
}
use adds_up;

mod author_stats;
mod compute;
pub mod flexibility;
mod parameters;

pub use author_stats::AuthorStats;
pub use compute::{Multiplications, propagation_overhead};
pub use parameters::{
    Parameters, active_parameters, paper_parameters, parameter_overhead, parameters_above_lora,
};

use crate::layout::{HydraLoraLayout, LoraLayout, MixLoraLayout, SmoreLayout};
use crate::spec::{HydraLoraSpec, LoraSpec, MixLoraSpec, SmoreSpec};

/// Trainable parameters of S'MoRE on one linear map, biases and router included.
pub fn smore_parameters(spec: &SmoreSpec) -> usize {
    SmoreLayout::new(spec).len
}

/// Trainable parameters of LoRA on one linear map.
pub fn lora_parameters(spec: &LoraSpec) -> usize {
    LoraLayout::new(spec).len
}

/// Trainable parameters of HydraLoRA on one linear map, route included.
pub fn hydra_lora_parameters(spec: &HydraLoraSpec) -> usize {
    HydraLoraLayout::new(spec).len
}

/// Trainable parameters of MixLoRA in one FFN, router included.
pub fn mix_lora_parameters(spec: &MixLoraSpec) -> usize {
    MixLoraLayout::new(spec).len
}

/// Trainable parameters of the LoRA of rank d_L, to which the paper compares (Sec. 3.2); also its
/// multiplications per token.
pub fn equal_rank_lora_parameters(spec: &SmoreSpec) -> usize {
    (spec.d_in + spec.d_out) * spec.root_width()
}

/// The LoRA rank whose parameters over `maps` (d_in, d_out) come closest to `budget`; at least 1.
pub fn lora_rank_for(budget: usize, maps: &[(usize, usize)]) -> usize {
    let per_rank: usize = maps.iter().map(|(d_in, d_out)| d_in + d_out).sum();
    if per_rank == 0 {
        return 1;
    }
    ((budget + per_rank / 2) / per_rank).max(1)
}

/// What of an adapter acts on one token.
struct Activity {
    /// Distinct experts of each layer, at most: min(s_l, F_l).
    experts: Vec<usize>,
    /// How often each layer's transform W_l is applied.
    transforms: Vec<usize>,
}

impl Activity {
    /// As the adapter runs.
    fn of(spec: &SmoreSpec) -> Self {
        let layers = &spec.layers;
        Self {
            experts: layers.iter().map(|l| l.nodes.min(l.experts)).collect(),
            // Once for each output of the layer below: F_l in a tree, 1 in a multi-order mixture.
            transforms: (0..layers.len())
                .map(|l| if l == 0 { 0 } else { layers[l - 1].parents })
                .collect(),
        }
    }

    /// As a tree with these fanouts would.
    fn of_tree(spec: &SmoreSpec, fanouts: &[usize]) -> Self {
        let layers = spec.layers.iter().zip(fanouts).rev();
        let mut nodes: Vec<usize> = layers
            .scan(1usize, |above, (_, &fanout)| {
                *above = above.saturating_mul(fanout);
                Some(*above)
            })
            .collect();
        nodes.reverse();
        Self {
            experts: nodes.iter().zip(&spec.layers).map(|(&n, l)| n.min(l.experts)).collect(),
            transforms: nodes,
        }
    }

    /// Active experts of the pools that are stored: a shared pool serves its widest layer, the
    /// leaves, and with it all others.
    fn pools(&self, spec: &SmoreSpec) -> &[usize] {
        if spec.shared_pool { &self.experts[..1] } else { &self.experts }
    }
}

#[cfg(test)]
mod tests;
