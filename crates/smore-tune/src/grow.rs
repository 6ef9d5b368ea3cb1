//! An adapter that exists becomes a S'MoRE with the same function, place by place, by the
//! constructions of [`smore::grow`].

use crate::checkpoint::LoadedAdapter;
use crate::config::AdapterConfig;
use crate::inject::{Adapters, Site, Slot};
use crate::model::spec::DecoderSpec;
use crate::model::{Batch, Model};
use rand_distr::{Distribution, StandardNormal};
use smore::adapter::{AnyAdapter, BlockAdapter, Smore};
use smore::config::SmoreConfig;
use smore::grow::{Mixture, from_lora, from_mixture, from_one_layer};
use smore::rng::{Purpose, stream};
use smore_engine::Cpu;

type Growing<T> = std::result::Result<T, String>;

/// The S'MoRE that `into` describes, on the model of shape `spec`, computing what `from` does.
///
/// Copies of one factor differ by nothing but what the router sends them. `noise` makes them
/// differ: it adds N(0, 1) times `noise` times the factor's root mean square to every copy, at the
/// price of exactness.
///
/// # Errors
/// A source or a place that cannot be grown into this S'MoRE: names the key and what would do.
pub fn grow(
    from: &LoadedAdapter,
    into: &SmoreConfig,
    spec: &DecoderSpec,
    seed: u64,
    noise: f64,
) -> Growing<(Adapters, Vec<f32>)> {
    let adapters = Adapters::new(&AdapterConfig::Smore(into.clone()), spec)?;
    let mut values = adapters.init(seed);
    for slot in &from.adapters.slots {
        let Site::Map(proj) = slot.site else {
            return Err("a MixLoRA cannot be grown: its experts are whole FFNs that are mixed after \
                        the activation, behind one gate; S'MoRE mixes inside every linear map, with \
                        a gate of its own. Keep it as it is, or train a S'MoRE anew"
                .into());
        };
        if adapters.at(slot.block, proj).is_none() {
            return Err(format!(
                "the adapter acts on {}, which adapter.targets leave out: the function would \
                 change; add {} there",
                slot.path(),
                proj.name()
            ));
        }
    }
    for slot in &adapters.slots {
        let (Site::Map(proj), BlockAdapter::Map(AnyAdapter::Smore(target))) =
            (slot.site, &slot.adapter)
        else {
            unreachable!("kind smore sits on maps")
        };
        let run = &mut values[slot.range.clone()];
        let Some((source, adapter)) = from.adapters.at(slot.block, proj) else {
            silence(target, run);
            continue;
        };
        let mut rng = stream(seed, Purpose::Growth, 0, slot.place as u64);
        fill(target, run, adapter, &from.values[source.range.clone()], &mut rng)
            .map_err(|e| format!("{e} (on {})", slot.path()))?;
        shake(target, run, noise, slot, seed);
    }
    Ok((adapters, values))
}

fn fill(
    target: &Smore,
    values: &mut [f32],
    source: &AnyAdapter,
    from: &[f32],
    rng: &mut impl rand::Rng,
) -> smore::Result<()> {
    match source {
        AnyAdapter::Lora(lora) => {
            let (down, up) = from.split_at(lora.layout.up);
            from_lora(target, values, down, up, lora.spec.scale, rng)
        }
        AnyAdapter::HydraLora(hydra) => {
            let part = |name: &str| {
                let param = hydra.layout.params.iter().find(|p| p.name == name);
                &from[param.expect("a HydraLoRA has this parameter").range()]
            };
            let n = hydra.spec.heads;
            let mixture = Mixture {
                route: part("lora_route.weight"),
                down: vec![part("lora_A.weight"); n],
                up: (0..n).map(|i| part(&format!("lora_B{i}.weight"))).collect(),
                fanout: n,
                scale: hydra.spec.scale,
            };
            from_mixture(target, values, &mixture, rng)
        }
        AnyAdapter::Smore(source) => from_one_layer(target, values, source, from, rng),
    }
}

/// A place where the source has no adapter starts as the zero map.
fn silence(target: &Smore, values: &mut [f32]) {
    values[target.layout.output_proj..target.layout.core].fill(0.0);
}

/// Makes the copies in the top layer differ.
fn shake(target: &Smore, values: &mut [f32], noise: f64, slot: &Slot, seed: u64) {
    if noise == 0.0 {
        return;
    }
    let top = if target.spec.shared_pool { 0 } else { target.spec.depth() - 1 };
    let name = format!("moe_A.{top}");
    let param = target.layout.params.iter().find(|p| p.name == name);
    let values = &mut values[param.expect("every layer has down factors").range()];
    let squares: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    let size = noise * (squares / values.len() as f64).sqrt();
    let mut rng = stream(seed, Purpose::Growth, 1, slot.place as u64);
    for value in values {
        let normal: f64 = StandardNormal.sample(&mut rng);
        *value += (size * normal) as f32;
    }
}

/// How far two models are apart on a text.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Difference {
    /// Largest absolute difference of a logit.
    pub largest: f64,
    /// Largest absolute logit of the first.
    pub largest_logit: f64,
    /// Mean loss of the first, in nats per token.
    pub loss_before: f64,
    /// Mean loss of the second.
    pub loss_after: f64,
    /// Tokens looked at.
    pub tokens: usize,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { largest, largest_logit, loss_before, loss_after, tokens } = self;
        writeln!(
            f,
            "largest logit difference {largest:.1e} (logits up to {largest_logit:.1}) over {tokens} \
             tokens"
        )?;
        write!(f, "loss {loss_before:.6} before, {loss_after:.6} after, in nats per token")
    }
}

impl Difference {
    /// Compares two models on every token of a batch.
    pub fn of(before: &Model<Cpu<f32>>, after: &Model<Cpu<f32>>, batch: &Batch) -> Self {
        let (_, a) = before.states_and_logits(batch, None);
        let (_, b) = after.states_and_logits(batch, None);
        let mean = |model: &Model<Cpu<f32>>| {
            let losses = model.losses(batch);
            losses.iter().sum::<f64>() / losses.len().max(1) as f64
        };
        let apart = a.iter().zip(&b).map(|(a, b)| f64::from((a - b).abs()));
        Self {
            largest: apart.fold(0.0, f64::max),
            largest_logit: a.iter().fold(0.0, |t, x| f64::from(x.abs()).max(t)),
            loss_before: mean(before),
            loss_after: mean(after),
            tokens: batch.ids.len(),
        }
    }
}
