//! What S'MoRE's structure costs above LoRA of rank d_L, and what it gives.

use crate::inject::Adapters;
use serde::Serialize;
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::counting::{
    equal_rank_lora_parameters, flexibility, parameters_above_lora, propagation_overhead,
};
use smore::spec::SmoreSpec;

/// The paper's measures of structure, over all adapted maps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Structure {
    /// Delta of the paper's Table 1: parameters above LoRA of rank d_L, without biases and router.
    pub parameters_above_lora: usize,
    /// Delta as a share of that LoRA (Table 1).
    pub parameter_overhead: f64,
    /// What propagation adds to its multiplications, as a share (Table 6).
    pub propagation_overhead: f64,
    /// Decimal logarithm of the outputs that trees can give one token on one map; none where no
    /// formula is known.
    pub flexibility_log10: Option<f64>,
}

impl Structure {
    /// Of all S'MoRE adapters; none where there is none.
    pub fn of(adapters: &Adapters) -> Option<Self> {
        let specs: Vec<&SmoreSpec> = adapters
            .slots
            .iter()
            .filter_map(|slot| match &slot.adapter {
                BlockAdapter::Map(AnyAdapter::Smore(a)) => Some(&a.spec),
                _ => None,
            })
            .collect();
        let first = specs.first()?;
        let above: usize = specs.iter().map(|s| parameters_above_lora(s)).sum();
        let loras: usize = specs.iter().map(|s| equal_rank_lora_parameters(s)).sum();
        let propagation =
            |s: &SmoreSpec| propagation_overhead(s) * equal_rank_lora_parameters(s) as f64;
        let propagation: f64 = specs.iter().map(|s| propagation(s)).sum();
        Some(Self {
            parameters_above_lora: above,
            parameter_overhead: above as f64 / loras as f64,
            propagation_overhead: propagation / loras as f64,
            flexibility_log10: flexibility::of(first).map(|(_, gamma)| gamma.log10()),
        })
    }
}
