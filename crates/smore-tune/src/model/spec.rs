//! A decoder described by numbers: what `config.json` says, validated.

use crate::error::{Error, Result, nearest};
use serde_json::Value;
use std::path::Path;

/// The shape of a Llama-style decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
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
    /// Added to the mean square in RMS norms.
    pub rms_eps: f64,
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
}

/// Rotary position settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Llama 3.1's stretching of long wavelengths.
    pub llama3: Option<Llama3Scaling>,
}

/// Llama 3.1's rotary scaling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Wavelengths above original / this are long.
    pub low_freq_factor: f64,
    /// Wavelengths below original / this are short and stay.
    pub high_freq_factor: f64,
    /// Context the model was first trained with.
    pub original_positions: f64,
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

    /// The map of this name.
    ///
    /// # Errors
    /// A message naming the nearest known one.
    pub fn parse(name: &str) -> std::result::Result<Self, String> {
        Self::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name);
            let hint =
                nearest(name, known).map_or_else(String::new, |n| format!("; did you mean `{n}`?"));
            format!("adapter.targets names `{name}`; expected some of {}{hint}", known.join(", "))
        })
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

    /// Reads sizes from the `config.json` of any decoder that names its sizes and linear maps as
    /// Llama does (Mistral, Gemma, Qwen), whether or not we can compute it.
    ///
    /// # Errors
    /// A missing file or size.
    pub fn read_sizes(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::reading(path, "the base model's config.json", e))?;
        let bad = |message: String| Error::Model { file: path.to_owned(), message };
        let mut json: Value =
            serde_json::from_str(&text).map_err(|e| bad(format!("not valid JSON: {e}")))?;
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
        let model_type = json["model_type"].as_str().unwrap_or("(none)");
        if model_type != "llama" {
            return Err(format!("model_type is `{model_type}`; only `llama` is supported"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if json[key].as_bool() == Some(true) {
                return Err(format!("{key} is true; Llama with biases is not supported"));
            }
        }
        if let Some(act) = json["hidden_act"].as_str().filter(|&a| a != "silu") {
            return Err(format!("hidden_act is `{act}`; expected `silu`"));
        }
        let (hidden, heads) = (size(json, "hidden_size")?, size(json, "num_attention_heads")?);
        let kv_heads = optional_size(json, "num_key_value_heads")?.unwrap_or(heads);
        let head_dim = optional_size(json, "head_dim")?.unwrap_or(hidden / heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}"
            ));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {head_dim}; rotary positions need an even width"));
        }
        let dtype = json["dtype"].as_str().or(json["torch_dtype"].as_str());
        Ok(Self {
            hidden,
            intermediate: size(json, "intermediate_size")?,
            blocks: size(json, "num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocabulary: size(json, "vocab_size")?,
            rms_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope: Rope::from_json(json)?,
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            max_positions: optional_size(json, "max_position_embeddings")?.unwrap_or(2048),
            initializer_range: json["initializer_range"].as_f64().unwrap_or(0.02),
            bf16: dtype == Some("bfloat16"),
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

    /// Name and shape of every tensor of the model, matrices as `[rows, cols]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all =
            vec![("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, self.hidden])];
        for b in 0..self.blocks {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                all.push((format!("model.layers.{b}.{norm}.weight"), vec![self.hidden]));
            }
            for proj in Proj::ALL {
                let (d_out, d_in) = self.shape(proj);
                all.push((format!("{}.weight", proj.path(b)), vec![d_out, d_in]));
            }
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocabulary, self.hidden]));
        }
        all
    }
}

impl Rope {
    fn from_json(json: &Value) -> std::result::Result<Self, String> {
        // Newer configs keep everything in `rope_parameters`, older ones in two keys.
        let new = &json["rope_parameters"];
        let theta = new["rope_theta"].as_f64().or(json["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let scaling = if new.is_object() { new } else { &json["rope_scaling"] };
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let number = |key: &str| {
            scaling[key].as_f64().ok_or_else(|| format!("rope_scaling has no number `{key}`"))
        };
        let llama3 = match kind {
            "default" => None,
            "llama3" => Some(Llama3Scaling {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_positions: number("original_max_position_embeddings")?,
            }),
            other => {
                return Err(format!("rope_type is `{other}`; expected `default` or `llama3`"));
            }
        };
        Ok(Self { theta, llama3 })
    }

    /// Angle per position of each pair of coordinates: `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64))
            .map(|f| self.llama3.map_or(f, |s| s.stretch(f)))
            // The model was trained with angles computed in f32.
            .map(|f| f64::from(f as f32))
            .collect()
    }

    /// Cosines and sines for positions 0..n: `[n, 2, head_dim / 2]`.
    pub fn table(&self, n: usize, head_dim: usize) -> Vec<f64> {
        let frequencies = self.frequencies(head_dim);
        let mut table = Vec::with_capacity(n * head_dim);
        for position in 0..n {
            let angles = frequencies.iter().map(|&f| f64::from(position as f32 * f as f32));
            table.extend(angles.clone().map(f64::cos));
            table.extend(angles.map(f64::sin));
        }
        table
    }
}

impl Llama3Scaling {
    /// Long wavelengths are stretched, short ones stay, those between are blended.
    fn stretch(&self, frequency: f64) -> f64 {
        let wavelength = std::f64::consts::TAU / frequency;
        let ratio = self.original_positions / wavelength;
        if ratio < self.low_freq_factor {
            frequency / self.factor
        } else if ratio > self.high_freq_factor {
            frequency
        } else {
            let blend =
                (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - blend) * frequency / self.factor + blend * frequency
        }
    }
}

fn optional_size(json: &Value, key: &str) -> std::result::Result<Option<usize>, String> {
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
            ("attention_bias", json!(true), "attention_bias"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "yarn"),
            ("num_key_value_heads", json!(3), "multiple"),
            ("hidden_size", json!(-1), "hidden_size"),
            ("vocab_size", json!(null), "vocab_size"),
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
        let mut gemma = minimal();
        gemma["model_type"] = json!("gemma2");
        gemma["hidden_act"] = json!("gelu_pytorch_tanh");
        std::fs::write(&path, gemma.to_string()).unwrap();
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
