//! The memory of a training step, by its parts.

use crate::inject::Adapters;
use crate::memory::Split;
use crate::model::spec::{DecoderSpec, Norm};
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::spec::SmoreSpec;
use smore_engine::cpu::logit_rows;

/// The program itself, without model and data.
const PROGRAM: usize = 10 << 20;
/// Numbers of a token that a product lays out anew.
const PACKED: usize = 512;

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
    /// The recipe's `bf16`: what waits for the backward sweep is kept in that.
    pub mixed: bool,
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
        let numbers = self.at_the_head().max(self.at_a_block());
        Split {
            program_and_data: (PROGRAM + self.tokens * 5) as u64,
            weights: self.weights as u64,
            adapter_and_optimizer: (self.trained * copies * 4) as u64,
            activations: (numbers * 4) as u64,
        }
    }

    /// Numbers held when the backward sweep begins: what blocks keep, the head's input, its slopes
    /// and copies, and the logits of some rows.
    fn at_the_head(&self) -> usize {
        let (hidden, vocabulary) = (self.spec.hidden, self.spec.vocabulary);
        let rows = logit_rows(vocabulary).min(self.batch);
        self.batch * (self.kept() + 3 * hidden)
            + rows * (vocabulary + 2 * hidden + PACKED)
            + self.panel(hidden)
    }

    /// Numbers held while the uppermost block is differentiated.
    fn at_a_block(&self) -> usize {
        let spec = self.spec;
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        // The block computed again beside the inputs of all; its own is held twice.
        let again = if self.gradient_checkpointing { self.of_block() } else { 0 };
        // What was kept in bf16, widened: gate and up, or queries, keys and values.
        let wide = |n: usize| if self.mixed { n - n / 2 } else { 0 };
        // Slopes inside the FFN or inside attention, and the norm's output and slopes.
        let ffn = 2 * inner + wide(2 * inner);
        let slopes = ffn.max(2 * q + 2 * kv + wide(2 * q + 2 * kv)) + 2 * hidden + wide(hidden);
        // Of one adapter at a time: slopes by its stacked projection.
        self.batch * (self.kept() + again + hidden + slopes + self.widest_adapter() + PACKED)
            + self.panel(inner.max(hidden))
    }

    /// A panel of weights widened for products with slopes.
    fn panel(&self, width: usize) -> usize {
        if self.weights >= self.spec.parameters() * 4 { 0 } else { 1024 * width }
    }

    /// Numbers that all blocks keep of a token for the backward sweep.
    fn kept(&self) -> usize {
        let trained_blocks = self.spec.blocks - self.lowest_block();
        if self.gradient_checkpointing {
            trained_blocks * self.spec.hidden
        } else {
            trained_blocks * self.of_block()
        }
    }

    fn lowest_block(&self) -> usize {
        if self.adapters.is_empty() { 0 } else { self.adapters.lowest_block() }
    }

    /// Numbers that one block keeps of a token: its input, the skip connection between attention
    /// and FFN, queries, keys, values, attention and its sums, gate and up, what stands before
    /// further norms, what adapters keep.
    fn of_block(&self) -> usize {
        let spec = self.spec;
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let has = |norm| spec.norm_at(0, norm).is_some();
        let behind = [Norm::PostAttention, Norm::PostFfn].into_iter().filter(|&n| has(n)).count();
        let before_norms = behind * hidden + if has(Norm::Query) { q + kv } else { 0 };
        let adapters: usize = self.adapters.slots.iter().map(|s| kept_by(&s.adapter)).sum();
        let adapters = adapters / (spec.blocks - self.lowest_block()).max(1);
        let waiting = 2 * hidden + 2 * q + 2 * kv + 2 * inner + before_norms;
        let waiting = if self.mixed { waiting.div_ceil(2) } else { waiting };
        waiting + spec.heads + adapters
    }

    fn widest_adapter(&self) -> usize {
        self.adapters.slots.iter().map(|s| kept_by(&s.adapter)).max().unwrap_or(0)
    }
}

/// Numbers that an adapter keeps of a token: its stacked projection and the tree.
fn kept_by(adapter: &BlockAdapter) -> usize {
    let nodes = |spec: &SmoreSpec| spec.layers.iter().map(|l| l.nodes).sum::<usize>();
    match adapter {
        // A node has an expert in two bytes and a weight.
        BlockAdapter::Map(AnyAdapter::Smore(a)) => a.spec.stack_width() + 2 * nodes(&a.spec),
        BlockAdapter::Map(AnyAdapter::Lora(a)) => a.spec.rank,
        BlockAdapter::Map(AnyAdapter::HydraLora(a)) => a.spec.stack_width() + 3 * a.spec.heads,
        BlockAdapter::Ffn(a) => a.spec.stack_width() + 2 * a.spec.fanout,
    }
}
