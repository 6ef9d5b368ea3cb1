//! Floating-point operations of adapters for one token.

use crate::inject::Adapters;
use serde::Serialize;
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::counting::{Multiplications, lora_parameters};

/// Floating-point operations for one token, forward, of all adapters: a multiplication and an
/// addition for each weight that acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flops {
    /// What the method asks for: the chosen experts alone.
    pub active: usize,
    /// With the down factors of all experts, which training multiplies in one product.
    pub executed: usize,
}

/// Counts `adapters`.
pub fn flops(adapters: &Adapters) -> Flops {
    let mut sum = Flops::default();
    for slot in &adapters.slots {
        let (active, all) = match &slot.adapter {
            BlockAdapter::Map(AnyAdapter::Smore(a)) => {
                let counts = Multiplications::of(&a.spec);
                // The router's view is a part of the stack.
                let view = a.spec.d_in * a.spec.gate.input_width;
                let stack = a.spec.d_in * a.spec.stack_width();
                (counts.total(), counts.total() - counts.down - view + stack)
            }
            BlockAdapter::Map(AnyAdapter::Lora(a)) => {
                (lora_parameters(&a.spec), lora_parameters(&a.spec))
            }
            BlockAdapter::Map(AnyAdapter::HydraLora(a)) => {
                let all = Multiplications::of_hydra_lora(&a.spec).total();
                (all, all)
            }
            BlockAdapter::Ffn(a) => {
                let counts = Multiplications::of_mix_lora(&a.spec);
                let s = &a.spec;
                let maps = usize::from(s.gate_proj) + usize::from(s.up_proj);
                let idle = maps * (s.experts - s.fanout) * s.rank * s.hidden;
                (counts.total(), counts.total() + idle)
            }
        };
        sum.active += 2 * active;
        sum.executed += 2 * all;
    }
    sum
}
