//! The families of decoders that we compute, and how each differs from Llama.
//!
//! | family | differs from Llama in |
//! |---|---|
//! | `llama` (2, 3, 3.1, 3.2) | |
//! | `mistral` | a window on attention in every block, where `sliding_window` is a number |
//! | `qwen2` (2, 2.5) | a bias on q, k and v |
//! | `qwen3` | a norm on every head's queries and keys |
//! | `gemma2` | norms behind attention and FFN, gains stored as distance from 1, scaled embeddings, GeGLU, soft-capped scores and logits, a window in every other block |
//!
//! Defaults of absent keys are those of transformers' config classes.

use super::spec::optional_size;
use serde_json::Value;
use smore_engine::GateActivation;

type Reading<T> = std::result::Result<T, String>;

/// A family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2, 3, 3.1, 3.2
    Llama,
    /// Mistral 7B and its kin
    Mistral,
    /// Qwen 2 and 2.5
    Qwen2,
    /// Qwen 3
    Qwen3,
    /// Gemma 2
    Gemma2,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma2];

    /// Its `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma2 => "gemma2",
        }
    }

    /// The family that a `config.json` names.
    ///
    /// # Errors
    /// An unknown one, with the list of the known.
    pub(super) fn from_json(json: &Value) -> Reading<Self> {
        let name = json["model_type"].as_str().unwrap_or("(none)");
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("model_type is `{name}`; supported are {known}")
        })
    }

    /// The width of a head where the config does not say; none for hidden / heads.
    pub(super) fn default_head_dim(self) -> Option<usize> {
        match self {
            Self::Llama | Self::Mistral | Self::Qwen2 => None,
            Self::Qwen3 => Some(128),
            Self::Gemma2 => Some(256),
        }
    }

    pub(super) fn tied_by_default(self) -> bool {
        self == Self::Gemma2
    }

    pub(super) fn norm_offset(self) -> f64 {
        if self == Self::Gemma2 { 1.0 } else { 0.0 }
    }

    /// True where attention and FFN have a norm behind them too, before they join the skip
    /// connection.
    pub(super) fn has_post_norms(self) -> bool {
        self == Self::Gemma2
    }

    /// True where queries and keys have a norm, head by head.
    pub(super) fn has_query_key_norms(self) -> bool {
        self == Self::Qwen3
    }

    /// Which of q, k, v, o, gate, up, down have a bias.
    pub(super) fn biased(self, json: &Value) -> [bool; 7] {
        let on = |key: &str| json[key].as_bool().unwrap_or(false);
        let attention = on("attention_bias");
        match self {
            Self::Qwen2 => [true, true, true, false, false, false, false],
            Self::Llama => {
                let ffn = on("mlp_bias");
                [attention, attention, attention, attention, ffn, ffn, ffn]
            }
            Self::Qwen3 | Self::Gemma2 => {
                [attention, attention, attention, attention, false, false, false]
            }
            Self::Mistral => [false; 7],
        }
    }

    pub(super) fn activation(self, json: &Value) -> Reading<GateActivation> {
        let (key, default) = match self {
            Self::Gemma2 => ("hidden_activation", "gelu_pytorch_tanh"),
            _ => ("hidden_act", "silu"),
        };
        match json[key].as_str().unwrap_or(default) {
            "silu" => Ok(GateActivation::Silu),
            "gelu_pytorch_tanh" => Ok(GateActivation::GeluTanh),
            other => Err(format!("{key} is `{other}`; expected `silu` or `gelu_pytorch_tanh`")),
        }
    }

    pub(super) fn embedding_scale(self, hidden: usize) -> f64 {
        if self == Self::Gemma2 { (hidden as f64).sqrt() } else { 1.0 }
    }

    pub(super) fn attention_scale(self, json: &Value, head_dim: usize) -> Reading<f64> {
        let width = match (self, &json["query_pre_attn_scalar"]) {
            (Self::Gemma2, Value::Null) => 256.0,
            (Self::Gemma2, value) => positive("query_pre_attn_scalar", value)?,
            _ => head_dim as f64,
        };
        Ok(1.0 / width.sqrt())
    }

    /// A cap that may be switched off by null.
    pub(super) fn soft_cap(self, json: &Value, key: &str, default: f64) -> Reading<Option<f64>> {
        match (self, json.get(key)) {
            (Self::Gemma2, None) => Ok(Some(default)),
            (Self::Gemma2, Some(value)) if !value.is_null() => positive(key, value).map(Some),
            _ => Ok(None),
        }
    }

    /// For every block how many keys a query sees, where not all.
    pub(super) fn windows(self, json: &Value, blocks: usize) -> Reading<Vec<Option<usize>>> {
        let key = "sliding_window";
        let window = match (self, json.get(key)) {
            (Self::Llama, _) => None,
            (_, Some(_)) => optional_size(json, key)?,
            (_, None) => Some(4096),
        };
        // Newer configs say it block by block.
        if let Some(types) = json["layer_types"].as_array().filter(|_| window.is_some()) {
            if types.len() != blocks {
                let n = types.len();
                return Err(format!("layer_types has {n} entries for {blocks} blocks"));
            }
            let one = |t: &Value| match t.as_str() {
                Some("sliding_attention") => Ok(window),
                Some("full_attention") => Ok(None),
                _ => Err(format!(
                    "layer_types has {t}; expected `full_attention` or `sliding_attention`"
                )),
            };
            return types.iter().map(one).collect();
        }
        let within: Box<dyn Fn(usize) -> bool> = match self {
            Self::Llama => Box::new(|_| false),
            Self::Mistral => Box::new(|_| true),
            Self::Gemma2 => Box::new(|b| b % 2 == 0),
            Self::Qwen2 | Self::Qwen3 => {
                let used = json["use_sliding_window"].as_bool().unwrap_or(false);
                let first = json["max_window_layers"].as_u64().unwrap_or(28) as usize;
                Box::new(move |b| used && b >= first)
            }
        };
        Ok((0..blocks).map(|b| window.filter(|_| within(b))).collect())
    }
}

fn positive(key: &str, value: &Value) -> Reading<f64> {
    let number = value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
    number.ok_or_else(|| format!("{key} is {value}; expected a positive number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::DecoderSpec;
    use serde_json::json;

    fn spec(extra: Value) -> Reading<DecoderSpec> {
        let mut config = json!({"hidden_size": 16, "intermediate_size": 16, "vocab_size": 10,
            "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 4});
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        DecoderSpec::from_json(&config)
    }

    #[test]
    fn every_family_has_its_own_tensors() {
        let names = |kind: &str| -> Vec<String> {
            let tensors = spec(json!({"model_type": kind})).unwrap().tensors();
            let block = "model.layers.0.";
            tensors
                .into_iter()
                .filter_map(|(n, _)| n.strip_prefix(block).map(String::from))
                .collect()
        };
        let llama = names("llama");
        assert_eq!(names("mistral"), llama);
        let beyond = |kind: &str| -> Vec<String> {
            names(kind).into_iter().filter(|n| !llama.contains(n)).collect()
        };
        let biases = ["q", "k", "v"].map(|p| format!("self_attn.{p}_proj.bias"));
        assert_eq!(beyond("qwen2"), biases);
        assert_eq!(beyond("qwen3"), ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]);
        let norms = ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"];
        assert_eq!(beyond("gemma2"), norms);
    }

    #[test]
    fn windows_follow_the_family_and_the_config() {
        let windows = |extra: Value| spec(extra).unwrap().windows;
        let w = Some(7);
        let mistral = json!({"model_type": "mistral", "sliding_window": 7});
        assert_eq!(windows(mistral), [w, w, w, w]);
        let without = json!({"model_type": "mistral", "sliding_window": null});
        assert_eq!(windows(without), [None; 4]);
        let gemma = json!({"model_type": "gemma2", "sliding_window": 7});
        assert_eq!(windows(gemma), [w, None, w, None]);
        let qwen = json!({"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 3,
            "use_sliding_window": true});
        assert_eq!(windows(qwen.clone()), [None, None, None, w]);
        let mut unused = qwen;
        unused["use_sliding_window"] = json!(false);
        assert_eq!(windows(unused), [None; 4]);
        let (s, f) = ("sliding_attention", "full_attention");
        let listed =
            json!({"model_type": "qwen3", "sliding_window": 7, "layer_types": [f, s, s, f]});
        assert_eq!(windows(listed), [None, w, w, None]);
    }

    #[test]
    fn gemma_has_its_numbers_and_defaults() {
        let gemma = spec(json!({"model_type": "gemma2"})).unwrap();
        assert_eq!((gemma.attention_soft_cap, gemma.logit_soft_cap), (Some(50.0), Some(30.0)));
        assert_eq!((gemma.embedding_scale, gemma.attention_scale), (4.0, 1.0 / 16.0));
        assert_eq!((gemma.norm.offset, gemma.activation), (1.0, GateActivation::GeluTanh));
        assert!(gemma.tied && gemma.family.has_post_norms());
        let set = spec(json!({"model_type": "gemma2", "attn_logit_softcapping": null,
            "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 64}))
        .unwrap();
        assert_eq!((set.attention_soft_cap, set.logit_soft_cap), (None, Some(8.0)));
        assert_eq!(set.attention_scale, 0.125);
    }

    #[test]
    fn refuses_what_no_family_means() {
        for (extra, word) in [
            (json!({"model_type": "gemma2", "hidden_activation": "relu"}), "hidden_activation"),
            (json!({"model_type": "gemma2", "query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
            (json!({"model_type": "gemma2", "final_logit_softcapping": -1}), "final_logit"),
            (json!({"model_type": "mistral", "sliding_window": 0}), "sliding_window"),
            (json!({"model_type": "qwen3", "layer_types": ["full_attention"]}), "layer_types"),
            (json!({"model_type": "qwen3", "layer_types": ["a", "b", "c", "d"]}), "layer_types"),
        ] {
            let error = spec(extra).unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
