//! The memory of a training step, by its parts.

use crate::inject::Adapters;
use crate::memory::Split;
use crate::model::spec::DecoderSpec;
use smore::adapter::{AnyAdapter, BlockAdapter};

/// The program itself, without model and data.
const PROGRAM: usize = 24 << 20;
/// Logits of some rows and the slopes by them.
const LOGITS: usize = 16 << 20;

/// What a run's memory depends on.
pub struct Demand<'a> {
    /// The decoder.
    pub spec: &'a DecoderSpec,
    /// The adapters on it.
    pub adapters: &'a Adapters,
    /// Trained numbers.
    pub trained: usize,
    /// Bytes of frozen weights.
    pub weights: usize,
    /// Tokens of the largest forward pass.
    pub batch: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Blocks are computed again in the backward sweep.
    pub gradient_checkpointing: bool,
    /// The best values are kept beside the newest.
    pub keeps_best: bool,
}

impl Demand<'_> {
    /// Bytes at the height of a training step, roughly.
    pub fn peak(&self) -> u64 {
        self.split().total()
    }

    /// The parts of [`Demand::peak`].
    pub fn split(&self) -> Split {
        // Values, gradients and two moments, and the best values where they are kept.
        let copies = 4 + usize::from(self.keeps_best);
        // A panel of widened weights.
        let panel = 1024 * self.spec.intermediate.max(self.spec.hidden) * 4;
        Split {
            program_and_data: (PROGRAM + self.tokens * 5) as u64,
            weights: self.weights as u64,
            adapter_and_optimizer: (self.trained * copies * 4) as u64,
            activations: (self.batch * self.per_token() * 4 + LOGITS + panel) as u64,
        }
    }

    /// Numbers held for each token of a forward pass.
    fn per_token(&self) -> usize {
        let spec = self.spec;
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let lowest = if self.adapters.is_empty() { 0 } else { self.adapters.lowest_block() };
        let trained_blocks = spec.blocks - lowest;
        // Kept of a block: its input, middle, queries, keys, values, attention, gate and up.
        let adapters = self.adapter_width() / trained_blocks.max(1);
        let block = 2 * hidden + 2 * q + 2 * kv + spec.heads + 2 * inner + adapters;
        let kept = if self.gradient_checkpointing {
            trained_blocks * hidden + block
        } else {
            trained_blocks * block
        };
        // While a block is differentiated: slopes of the FFN, of attention, of the norms.
        kept + 5 * hidden + 4 * inner + q + 2 * kv
    }

    /// What adapters keep of a token.
    fn adapter_width(&self) -> usize {
        let width = |adapter: &BlockAdapter| match adapter {
            BlockAdapter::Map(AnyAdapter::Smore(a)) => 2 * a.spec.stack_width(),
            BlockAdapter::Map(AnyAdapter::Lora(a)) => a.spec.rank,
            BlockAdapter::Map(AnyAdapter::HydraLora(a)) => 2 * a.spec.stack_width(),
            BlockAdapter::Ffn(a) => 2 * a.spec.stack_width(),
        };
        self.adapters.slots.iter().map(|slot| width(&slot.adapter)).sum()
    }
}
