//! Rotary positions (Su et al. 2021) and Llama 3.1's stretching of them.

use serde_json::Value;

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

impl Rope {
    /// Reads the rotary settings of a `config.json`.
    ///
    /// # Errors
    /// A kind of scaling that is not known, or a number that is missing.
    pub(super) fn from_json(json: &Value) -> std::result::Result<Self, String> {
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
