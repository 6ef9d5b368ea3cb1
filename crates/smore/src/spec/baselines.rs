//! The baselines, validated: LoRA, HydraLoRA and MixLoRA.

use super::{MAX_EXPERTS, MAX_PARAMETERS};
use crate::config::{HydraLoraConfig, LoraConfig, MixLoraConfig};
use crate::{Error, Result};
use smore_engine::GateActivation;

/// LoRA on one linear map `[d_out, d_in]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSpec {
    /// Inputs of the adapted linear map.
    pub d_in: usize,
    /// Outputs of the adapted linear map.
    pub d_out: usize,
    /// Rank of both factors.
    pub rank: usize,
    /// alpha / rank, or alpha / sqrt(rank)
    pub scale: f64,
}

impl LoraSpec {
    /// Validates a config for a linear map `[d_out, d_in]`; its patterns are not looked at.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn new(config: &LoraConfig, d_in: usize, d_out: usize) -> Result<Self> {
        let scale = scale(config.rank, config.alpha)?;
        // alpha / sqrt(r) = (alpha / r) sqrt(r)
        let scale = if config.rslora { scale * (config.rank as f64).sqrt() } else { scale };
        Ok(Self { d_in, d_out, rank: config.rank, scale })
    }
}

/// HydraLoRA on one linear map `[d_out, d_in]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HydraLoraSpec {
    /// Inputs of the adapted linear map.
    pub d_in: usize,
    /// Outputs of the adapted linear map.
    pub d_out: usize,
    /// Up factors.
    pub heads: usize,
    /// Rank of all factors.
    pub rank: usize,
    /// alpha / rank
    pub scale: f64,
}

impl HydraLoraSpec {
    /// Validates a config for a linear map `[d_out, d_in]`.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn new(config: &HydraLoraConfig, d_in: usize, d_out: usize) -> Result<Self> {
        let HydraLoraConfig { heads, rank, alpha, .. } = *config;
        count("heads", heads)?;
        let scale = scale(rank, alpha)?;
        check_map(d_in, d_out)?;
        let stack = (rank + heads) as u128 * d_in as u128;
        check_size(stack, (heads * rank) as u128 * d_out as u128, "heads")?;
        Ok(Self { d_in, d_out, heads, rank, scale })
    }

    /// Columns of the stacked projection: A x, then the route's logits.
    pub fn stack_width(&self) -> usize {
        self.rank + self.heads
    }
}

/// The FFN that MixLoRA is put into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FfnShape {
    /// Inputs and outputs.
    pub hidden: usize,
    /// Width inside.
    pub intermediate: usize,
    /// Activation of its gate.
    pub activation: GateActivation,
    /// Whether the gate, the up and the down map are targets.
    pub adapted: [bool; 3],
}

/// MixLoRA in one FFN, whose gate and up maps are `[intermediate, hidden]` and whose down map is
/// `[hidden, intermediate]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixLoraSpec {
    /// Inputs and outputs of the FFN.
    pub hidden: usize,
    /// Width inside the FFN.
    pub intermediate: usize,
    /// Activation of the FFN's gate.
    pub activation: GateActivation,
    /// E
    pub experts: usize,
    /// k, experts that act on a token
    pub fanout: usize,
    /// Rank of every LoRA.
    pub rank: usize,
    /// alpha / rank
    pub scale: f64,
    /// w, weight of the balance loss.
    pub balance_weight: f64,
    /// Experts have a LoRA on the gate map.
    pub gate_proj: bool,
    /// Experts have a LoRA on the up map.
    pub up_proj: bool,
    /// Experts have a LoRA on the down map.
    pub down_proj: bool,
}

impl MixLoraSpec {
    /// Validates a config for an FFN. Targets are matched by who knows the module paths.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn new(config: &MixLoraConfig, ffn: FfnShape) -> Result<Self> {
        let FfnShape { hidden, intermediate, activation, adapted } = ffn;
        let MixLoraConfig { experts, fanout, rank, alpha, balance_weight, .. } = *config;
        count("experts", experts)?;
        count("fanout", fanout)?;
        if fanout > experts {
            return Err(Error::config(format!(
                "fanout is {fanout} but experts is {experts}; fanout must be at most experts"
            )));
        }
        let scale = scale(rank, alpha)?;
        if !(balance_weight.is_finite() && balance_weight >= 0.0) {
            return Err(Error::config(format!(
                "balance_weight is {balance_weight}; expected a number that is not negative"
            )));
        }
        check_map(hidden, intermediate)?;
        let [gate_proj, up_proj, down_proj] = adapted;
        if !(gate_proj || up_proj || down_proj) {
            return Err(Error::config(
                "targets names none of gate_proj, up_proj and down_proj, so no expert would differ \
                 from another; add one, or use kind lora",
            ));
        }
        let maps = usize::from(gate_proj) + usize::from(up_proj) + usize::from(down_proj);
        let factors = (maps * experts * rank) as u128 * (hidden as u128 + intermediate as u128);
        check_size(factors, experts as u128 * hidden as u128, "experts")?;
        Ok(Self {
            hidden,
            intermediate,
            activation,
            experts,
            fanout,
            rank,
            scale,
            balance_weight,
            gate_proj,
            up_proj,
            down_proj,
        })
    }

    /// Columns of the stacked projection: A x of all experts for the gate map, then for the up
    /// map, then the router's logits.
    pub fn stack_width(&self) -> usize {
        self.logits() + self.experts
    }

    /// First column of the router's logits in the stacked projection.
    pub(crate) fn logits(&self) -> usize {
        (usize::from(self.gate_proj) + usize::from(self.up_proj)) * self.experts * self.rank
    }
}

fn count(key: &str, value: usize) -> Result<()> {
    if value == 0 || value > MAX_EXPERTS {
        return Err(Error::config(format!("{key} is {value}; expected 1 to {MAX_EXPERTS}")));
    }
    Ok(())
}

/// alpha / rank
fn scale(rank: usize, alpha: Option<f64>) -> Result<f64> {
    count("rank", rank)?;
    let alpha = alpha.unwrap_or(2.0 * rank as f64);
    if !(alpha.is_finite() && alpha > 0.0) {
        return Err(Error::config(format!("alpha is {alpha}; expected a positive number")));
    }
    Ok(alpha / rank as f64)
}

fn check_map(d_in: usize, d_out: usize) -> Result<()> {
    if d_in == 0 || d_out == 0 {
        return Err(Error::config(format!("the linear map is {d_out} x {d_in}; nothing to adapt")));
    }
    Ok(())
}

fn check_size(some: u128, others: u128, key: &str) -> Result<()> {
    if some.saturating_add(others) > MAX_PARAMETERS as u128 {
        return Err(Error::config(format!(
            "one adapter would have more than 2^36 parameters; lower rank or {key}"
        )));
    }
    Ok(())
}
