//! Starting values (spec section 4).

use crate::config::{Activation, Init, RouterArchitecture};
use crate::layout::{HydraLoraLayout, LoraLayout, MixLoraLayout, Param, SmoreLayout};
use crate::spec::SmoreSpec;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};

/// Starting values of a S'MoRE adapter, in the order of its layout.
///
/// A is uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5); every bias of experts, transforms and
/// projection is 0; router weights and biases follow PyTorch's `Linear`; keys are U(0, 1) with a
/// network and N(0, 0.02) without; B, W and W_proj follow the chosen [`Init`].
pub fn smore(spec: &SmoreSpec, layout: &SmoreLayout, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = vec![0.0; layout.len];
    for param in &layout.params {
        fill(spec, param, &mut values[param.range()], rng);
    }
    values
}

fn fill(spec: &SmoreSpec, param: &Param, values: &mut [f32], rng: &mut impl Rng) {
    let fan_in = param.shape[param.shape.len() - 1];
    let (kind, index) = split_name(&param.name);
    let from_zero = |zero: bool, values: &mut [f32], rng: &mut _| {
        if !zero {
            uniform(values, fan_in, rng);
        }
    };
    match kind {
        "moe_A" => uniform(values, fan_in, rng),
        "moe_B" if spec.init == Init::Eq1Layer => {
            // Expert i copies its projection into rows i*r .. (i+1)*r.
            let layer = &spec.layers[index];
            let (rows, r) = (layer.width, layer.rank);
            for i in 0..layer.experts {
                for j in 0..r {
                    values[(i * rows + i * r + j) * r + j] = 1.0;
                }
            }
        }
        "moe_B" => from_zero(matches!(spec.init, Init::BZero | Init::BwZero), values, rng),
        "moe_W" if spec.init == Init::Eq1Layer => {
            // The last d_l rows hand on what comes from below.
            let layer = &spec.layers[index];
            let skipped = layer.width - layer.width_below;
            for j in 0..layer.width_below {
                values[(skipped + j) * layer.width_below + j] = 1.0;
            }
        }
        "moe_W" => from_zero(spec.init == Init::BwZero, values, rng),
        "moe_W_final" => {
            from_zero(matches!(spec.init, Init::WFinalZero | Init::Eq1Layer), values, rng);
        }
        "moe_expert_act_param" => values.fill(start_slope(spec.activation)),
        "moe_downproj_x" => uniform(values, spec.d_in, rng),
        "moe_gate" => fill_router(spec, param, index, values, rng),
        // Biases of experts, transforms and projection.
        _ => {}
    }
}

fn fill_router(
    spec: &SmoreSpec,
    param: &Param,
    layer: usize,
    values: &mut [f32],
    rng: &mut impl Rng,
) {
    let layer = &spec.layers[layer];
    if param.name.split('.').next_back() == Some("keys") {
        match spec.gate.architecture {
            RouterArchitecture::Mlp | RouterArchitecture::BottomUp => {
                values.fill_with(|| rng.random());
            }
            RouterArchitecture::Linear => {
                small_normal(values, rng);
            }
        }
    } else if param.name.ends_with("mlp.1.weight") {
        values.fill(start_slope(spec.gate.activation));
    } else if param.name.contains("mlp.0.") {
        uniform(values, layer.router_input, rng);
    } else if param.name.contains("mlp.2.") {
        uniform(values, layer.router_width, rng);
    }
    // weight_noise starts at 0.
}

/// `moe_gate.1.mlp.0.weight` -> (`moe_gate`, 1)
fn split_name(name: &str) -> (&str, usize) {
    let mut parts = name.split('.');
    let kind = parts.next().unwrap_or_default();
    (kind, parts.next().and_then(|p| p.parse().ok()).unwrap_or(0))
}

fn start_slope(activation: Activation) -> f32 {
    if let Activation::Prelu(slope) = activation { slope as f32 } else { 0.0 }
}

/// U(-1/sqrt(fan_in), 1/sqrt(fan_in))
fn uniform(values: &mut [f32], fan_in: usize, rng: &mut impl Rng) {
    let bound = 1.0 / (fan_in as f32).sqrt();
    for v in values {
        *v = (2.0 * rng.random::<f32>() - 1.0) * bound;
    }
}

/// N(0, 0.02)
fn small_normal(values: &mut [f32], rng: &mut impl Rng) {
    for v in values {
        let normal: f32 = StandardNormal.sample(rng);
        *v = 0.02 * normal;
    }
}

/// Starting values of a LoRA: A as in S'MoRE, B zero (PEFT's default).
pub fn lora(layout: &LoraLayout, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = vec![0.0; layout.len];
    let a = &layout.params[0];
    uniform(&mut values[a.range()], a.shape[1], rng);
    values
}

/// Starting values of a HydraLoRA: A and the route as PyTorch's `Linear`, which is S'MoRE's rule for
/// A; every B zero.
pub fn hydra_lora(layout: &HydraLoraLayout, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = vec![0.0; layout.len];
    for param in layout.params.iter().filter(|p| p.range().end <= layout.up) {
        uniform(&mut values[param.range()], param.shape[1], rng);
    }
    values
}

/// Starting values of a MixLoRA: every expert as a LoRA, the router N(0, 0.02).
pub fn mix_lora(layout: &MixLoraLayout, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = vec![0.0; layout.len];
    for param in &layout.params {
        let values = &mut values[param.range()];
        if param.name.ends_with("lora_A.weight") {
            uniform(values, param.shape[1], rng);
        } else if param.name.ends_with("moe_gate.weight") {
            small_normal(values, rng);
        }
    }
    values
}
