//! Counting parameters.

use crate::layout::{LoraLayout, SmoreLayout};
use crate::spec::{LoraSpec, SmoreSpec};

/// Trainable parameters of S'MoRE on one linear map, biases and router included.
pub fn smore_parameters(spec: &SmoreSpec) -> usize {
    SmoreLayout::new(spec).len
}

/// Trainable parameters of LoRA on one linear map.
pub fn lora_parameters(spec: &LoraSpec) -> usize {
    LoraLayout::new(spec).len
}

/// The LoRA rank whose parameters over `maps` (d_in, d_out) come closest to `budget`; at least 1.
pub fn lora_rank_for(budget: usize, maps: &[(usize, usize)]) -> usize {
    let per_rank: usize = maps.iter().map(|(d_in, d_out)| d_in + d_out).sum();
    if per_rank == 0 {
        return 1;
    }
    ((budget + per_rank / 2) / per_rank).max(1)
}
