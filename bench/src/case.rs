//! What is measured: the cases, as they go to a worker.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

/// One piece of work. The peer knows `Gemm` and `Step` by the same fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Case {
    /// y = x W^T, x `[m, k]` in f32, W `[n, k]` stored as `dtype`.
    Gemm { dtype: Precision, m: usize, n: usize, k: usize, threads: usize },
    /// Forward and backward of a frozen linear with an adapter on it.
    Layer {
        adapter: Adapter,
        dtype: Precision,
        tokens: usize,
        d_in: usize,
        d_out: usize,
        /// Without large pages, of which one is 2 KiB for each of 1024 tokens.
        #[serde(default)]
        small_pages: bool,
    },
    /// A training step of a decoder with adapters on its FFN.
    Step(Step),
    /// What is done beside a step of S'MoRE to watch its routers: counting, or tracing some tokens.
    Watch { step: Step, trace_tokens: usize },
    /// Tokens decoded greedily one by one behind a short prompt.
    Decode { shape: Shape, adapter: Adapter, tokens: usize },
    /// Reading memory from all cores.
    Bandwidth { bytes: usize },
    /// Writing a model of random weights, which is done when it is prepared.
    Model { shape: Shape, dtype: Precision, folder: PathBuf },
}

/// A training step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) shape: Shape,
    pub(crate) adapter: Adapter,
    pub(crate) dtype: Precision,
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) gradient_checkpointing: bool,
    /// Rank of the LoRA that the peer trains.
    pub(crate) lora_rank: usize,
    pub(crate) targets: Vec<String>,
    pub(crate) threads: usize,
}

/// How frozen weights are stored; the peer computes in it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    Float32,
    Bfloat16,
}

/// What is on the frozen maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Adapter {
    None,
    /// Two layers of 4 experts, fanout 2, rank 16: width d_L = 128.
    Smore,
    Lora(usize),
}

impl Adapter {
    /// The `adapter:` section of a run's config.
    pub(crate) fn config(self, targets: &[String]) -> Result<Value> {
        let layer = json!({"experts": 4, "fanout": 2, "rank": 16});
        Ok(match self {
            Self::None => bail!("no adapter to configure"),
            Self::Smore => {
                json!({"kind": "smore", "targets": targets, "layers": [layer.clone(), layer]})
            }
            Self::Lora(rank) => json!({"kind": "lora", "targets": targets, "rank": rank}),
        })
    }
}

/// The sizes of a Llama.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) blocks: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocabulary: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) tied: bool,
}

impl Shape {
    /// The Llama of width 512 that a pilot on a CPU trains.
    pub(crate) const PILOT: Self = Self {
        hidden: 512,
        blocks: 8,
        intermediate: 1536,
        vocabulary: 8192,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        tied: false,
    };
    /// The shapes of Llama-3.2-1B.
    pub(crate) const LLAMA_1B: Self = Self {
        hidden: 2048,
        blocks: 16,
        intermediate: 8192,
        vocabulary: 128_256,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        tied: true,
    };

    /// `config.json` of such a model.
    pub(crate) fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        })
    }

    /// Weights of a block's frozen linear maps.
    pub(crate) fn block_weights(&self) -> usize {
        let attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads);
        attention + 3 * self.hidden * self.intermediate
    }

    /// Weights of all frozen linear maps, the output head included.
    pub(crate) fn linear_weights(&self) -> usize {
        self.blocks * self.block_weights() + self.vocabulary * self.hidden
    }
}

/// Targets of every adapter here: the maps of the FFN.
pub(crate) fn ffn() -> Vec<String> {
    ["gate_proj", "up_proj", "down_proj"].map(str::to_owned).to_vec()
}
