//! A decoder described by numbers: what `config.json` says, validated.

use super::family::Family;
use super::rope::Rope;
use crate::error::{Error, Result};
use serde_json::Value;
use smore_engine::{GateActivation, RmsNorm};
use std::path::Path;

/// Most transformer blocks; a few digits in a file must not make us list more tensors than fit into
/// memory.
const MAX_BLOCKS: usize = 4096;

/// A decoder of the Llama kind: what the families of [`super::family`] have in common, and by
/// which numbers they differ.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The family it belongs to.
    pub family: Family,
    /// Width of the skip connection.
    pub hidden: usize,
    /// Width inside the FFN.
    pub intermediate: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Rotary positions.
    pub rope: Rope,
    /// The output head is the token table.
    pub tied: bool,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Standard deviation of weights drawn anew.
    pub initializer_range: f64,
    /// Weights are written as bf16, else as f32.
    pub bf16: bool,
    /// The numbers of every RMS norm.
    pub norm: RmsNorm,
    /// Which linear maps have a bias, in the order of [`Proj::ALL`].
    pub biased: [bool; 7],
    /// Activation of the FFN's gate.
    pub activation: GateActivation,
    /// Factor on token embeddings.
    pub embedding_scale: f64,
    /// Factor on attention scores.
    pub attention_scale: f64,
    /// Attention scores s become c tanh(s / c).
    pub attention_soft_cap: Option<f64>,
    /// Logits z become c tanh(z / c).
    pub logit_soft_cap: Option<f64>,
    /// For every block how many keys a query sees, where not all.
    pub windows: Vec<Option<usize>>,
}

/// One of a block's norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Before attention.
    Attention,
    /// Behind attention.
    PostAttention,
    /// Before the FFN.
    Ffn,
    /// Behind the FFN.
    PostFfn,
    /// Of a head's queries.
    Query,
    /// Of a head's keys.
    Key,
}

impl Norm {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Attention, Self::PostAttention, Self::Ffn, Self::PostFfn, Self::Query, Self::Key];
}

/// One of a block's seven linear maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proj {
    /// Attention queries.
    Q,
    /// Attention keys.
    K,
    /// Attention values.
    V,
    /// Attention output.
    O,
    /// FFN gate (not the router's).
    Gate,
    /// FFN up.
    Up,
    /// FFN down.
    Down,
}

impl Proj {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its name in targets, such as `gate_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Its module path in block `block`, such as `model.layers.0.mlp.gate_proj`.
    pub fn path(self, block: usize) -> String {
        let part = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("model.layers.{block}.{part}.{}", self.name())
    }
}

impl DecoderSpec {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Names the key, what was found and what is supported.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::reading(path, "the base model's config.json", e))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| Error::Model {
            file: path.to_owned(),
            message: format!("not valid JSON: {e}"),
        })?;
        Self::from_json(&json).map_err(|message| Error::Model { file: path.to_owned(), message })
    }

    /// Reads a `config.json`, and where its family is not one we compute, at least its sizes, if
    /// it names them and its linear maps as Llama does.
    ///
    /// # Errors
    /// A missing file or size.
    pub fn read_sizes(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::reading(path, "the base model's config.json", e))?;
        let bad = |message: String| Error::Model { file: path.to_owned(), message };
        let mut json: Value =
            serde_json::from_str(&text).map_err(|e| bad(format!("not valid JSON: {e}")))?;
        if let Ok(spec) = Self::from_json(&json) {
            return Ok(spec);
        }
        let Some(keys) = json.as_object_mut() else { return Err(bad("not a JSON object".into())) };
        let kind = keys.get("model_type").cloned().unwrap_or_default();
        // Everything that says how to compute; sizes stay.
        for key in ["attention_bias", "mlp_bias", "hidden_act", "rope_scaling", "rope_parameters"] {
            keys.remove(key);
        }
        keys.insert("model_type".into(), "llama".into());
        Self::from_json(&json).map_err(|m| bad(format!("model_type {kind}: {m}")))
    }

    /// Reads the object in `config.json`.
    ///
    /// # Errors
    /// Names the key, what was found and what is supported.
    pub fn from_json(json: &Value) -> std::result::Result<Self, String> {
        let family = Family::from_json(json)?;
        let (hidden, heads) = (size(json, "hidden_size")?, size(json, "num_attention_heads")?);
        let blocks = size(json, "num_hidden_layers")?;
        if blocks > MAX_BLOCKS {
            return Err(format!("num_hidden_layers is {blocks}; expected up to {MAX_BLOCKS}"));
        }
        let kv_heads = optional_size(json, "num_key_value_heads")?.unwrap_or(heads);
        let head_dim = optional_size(json, "head_dim")?
            .unwrap_or_else(|| family.default_head_dim().unwrap_or(hidden / heads));
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}"
            ));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {head_dim}; rotary positions need an even width"));
        }
        let dtype = json["dtype"].as_str().or(json["torch_dtype"].as_str());
        let eps = json["rms_norm_eps"].as_f64().unwrap_or(1e-6);
        Ok(Self {
            family,
            hidden,
            intermediate: size(json, "intermediate_size")?,
            blocks,
            heads,
            kv_heads,
            head_dim,
            vocabulary: size(json, "vocab_size")?,
            rope: Rope::from_json(json)?,
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(family.tied_by_default()),
            max_positions: optional_size(json, "max_position_embeddings")?.unwrap_or(2048),
            initializer_range: json["initializer_range"].as_f64().unwrap_or(0.02),
            bf16: dtype == Some("bfloat16"),
            norm: RmsNorm { eps, offset: family.norm_offset() },
            biased: family.biased(json),
            activation: family.activation(json)?,
            embedding_scale: family.embedding_scale(hidden),
            attention_scale: family.attention_scale(json, head_dim)?,
            attention_soft_cap: family.soft_cap(json, "attn_logit_softcapping", 50.0)?,
            logit_soft_cap: family.soft_cap(json, "final_logit_softcapping", 30.0)?,
            windows: family.windows(json, blocks)?,
        })
    }

    /// `[d_out, d_in]` of a linear map.
    pub fn shape(&self, proj: Proj) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match proj {
            Proj::Q => (q, self.hidden),
            Proj::K | Proj::V => (kv, self.hidden),
            Proj::O => (self.hidden, q),
            Proj::Gate | Proj::Up => (self.intermediate, self.hidden),
            Proj::Down => (self.hidden, self.intermediate),
        }
    }

    /// A norm's width and its module path in block `block`; none where the family has no such norm.
    pub fn norm_at(&self, block: usize, norm: Norm) -> Option<(usize, String)> {
        let (post_norms, head_norms) =
            (self.family.has_post_norms(), self.family.has_query_key_norms());
        let name = match norm {
            Norm::Attention => "input_layernorm",
            // Llama calls the norm before its FFN by the place behind attention.
            Norm::Ffn if post_norms => "pre_feedforward_layernorm",
            Norm::Ffn => "post_attention_layernorm",
            Norm::PostAttention if post_norms => "post_attention_layernorm",
            Norm::PostFfn if post_norms => "post_feedforward_layernorm",
            Norm::Query if head_norms => "self_attn.q_norm",
            Norm::Key if head_norms => "self_attn.k_norm",
            _ => return None,
        };
        let width = match norm {
            Norm::Query | Norm::Key => self.head_dim,
            _ => self.hidden,
        };
        Some((width, format!("model.layers.{block}.{name}")))
    }

    /// Numbers in all tensors of the model; a tied head counts once.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Numbers that a token is multiplied with: all but a token table that is no head.
    pub fn multiplied(&self) -> usize {
        self.parameters() - if self.tied { 0 } else { self.vocabulary * self.hidden }
    }

    /// Name and shape of every tensor of the model, matrices as `[rows, cols]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all =
            vec![("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, self.hidden])];
        for b in 0..self.blocks {
            let norms = Norm::ALL.into_iter().filter_map(|norm| self.norm_at(b, norm));
            all.extend(norms.map(|(width, path)| (format!("{path}.weight"), vec![width])));
            for proj in Proj::ALL {
                let (d_out, d_in) = self.shape(proj);
                all.push((format!("{}.weight", proj.path(b)), vec![d_out, d_in]));
                if self.biased[proj as usize] {
                    all.push((format!("{}.bias", proj.path(b)), vec![d_out]));
                }
            }
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocabulary, self.hidden]));
        }
        all
    }
}

/// A positive whole number that may be absent or null.
pub(super) fn optional_size(json: &Value, key: &str) -> std::result::Result<Option<usize>, String> {
    match &json[key] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(n) if n > 0 && n < 1 << 32 => Ok(Some(n as usize)),
            _ => Err(format!("{key} is {value}; expected a positive whole number")),
        },
    }
}

fn size(json: &Value, key: &str) -> std::result::Result<usize, String> {
    optional_size(json, key)?.ok_or_else(|| format!("`{key}` is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10})
    }

    #[test]
    fn fills_in_what_old_configs_leave_out() {
        let spec = DecoderSpec::from_json(&minimal()).unwrap();
        assert_eq!((spec.kv_heads, spec.head_dim, spec.rope.theta), (4, 2, 10_000.0));
        assert_eq!(spec.tensors().len(), 1 + 2 * 9 + 2);
    }

    #[test]
    fn refuses_what_it_would_compute_wrongly() {
        for (key, value, word) in [
            ("model_type", json!("mamba"), "mamba"),
            ("hidden_act", json!("relu"), "relu"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "yarn"),
            ("num_key_value_heads", json!(3), "multiple"),
            ("hidden_size", json!(-1), "hidden_size"),
            ("vocab_size", json!(null), "vocab_size"),
            ("num_hidden_layers", json!(4_000_000_000_u32), "num_hidden_layers"),
        ] {
            let mut config = minimal();
            config[key] = value;
            let error = DecoderSpec::from_json(&config).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
    }

    #[test]
    fn sizes_are_read_from_what_we_cannot_compute() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let mut other = minimal();
        other["model_type"] = json!("phi3");
        other["hidden_act"] = json!("gelu");
        std::fs::write(&path, other.to_string()).unwrap();
        assert!(DecoderSpec::read(&path).is_err());
        let spec = DecoderSpec::read_sizes(&path).unwrap();
        assert_eq!(spec.shape(Proj::Down), (8, 16));
    }

    #[test]
    fn reads_both_places_of_rotary_settings() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        let (mut old, mut new) = (minimal(), minimal());
        old["rope_scaling"] = llama3.clone();
        old["rope_theta"] = json!(5e5);
        new["rope_parameters"] = llama3;
        new["rope_parameters"]["rope_theta"] = json!(5e5);
        let (old, new) =
            (DecoderSpec::from_json(&old).unwrap(), DecoderSpec::from_json(&new).unwrap());
        assert!(old.rope.llama3.is_some());
        assert_eq!(old.rope, new.rope);
    }
}
