//! Recorded noise of noisy gates in training.

use super::Source;
use super::batch::Tokens;
use crate::error::Result;
use crate::inject::{Adapters, Slot};
use crate::model::spec::Proj;
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::config::GateKind;
use smore::kernel::GateNoise;
use smore::spec::SmoreSpec;

/// The order in which the authors' code runs the maps of a block.
const CALLS: [Proj; 7] = [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Up, Proj::Gate, Proj::Down];

/// The description of an adapter that draws noise.
pub(super) fn noisy(slot: &Slot) -> Option<&SmoreSpec> {
    match &slot.adapter {
        BlockAdapter::Map(AnyAdapter::Smore(smore)) => {
            Some(&smore.spec).filter(|spec| spec.gate.kind == GateKind::NoisyTopk)
        }
        _ => None,
    }
}

/// The recorded noise of every micro-batch, for every adapter in order; `None` where nothing was
/// recorded.
///
/// Tensors are `noise.<k>`, counted over all micro-batches, or `noise.<step>.<k>`, each
/// `[B * T, ..]`; or `noise.<k>` counted within a micro-batch, `[micro-batches, B * T, ..]`.
pub(super) fn read(
    source: &Source,
    adapters: &Adapters,
    micro_batches: &[Tokens],
) -> Result<Option<Vec<Vec<GateNoise<f64>>>>> {
    let calls = calls(adapters);
    let names = names(source);
    let Some(first) = names.first() else { return Ok(None) };
    if calls.is_empty() {
        let message = format!("holds `{first}`, but no gate of this case draws noise");
        return Err(source.error(message));
    }
    let (n, k) = (micro_batches.len(), calls.len());
    let stacked = names.len() == k && n > 1;
    if names.len() != n * k && !stacked {
        let found = names.len();
        return Err(source.error(format!(
            "holds {found} tensors `noise.*`; expected {k} for each of {n} forward passes: one \
             per layer of every adapted map"
        )));
    }
    let slots = || adapters.slots.iter().map(|slot| GateNoise { layers: empty(slot) });
    let mut all: Vec<Vec<GateNoise<f64>>> = (0..n).map(|_| slots().collect()).collect();
    for (m, (tokens, slots)) in micro_batches.iter().zip(&mut all).enumerate() {
        for (call, &(place, layer, width)) in calls.iter().enumerate() {
            let name = &names[if stacked { call } else { m * k + call }];
            let len = tokens.shape[0] * tokens.shape[1] * width;
            let tensor = source.tensor(name)?;
            if tensor.values.len() != if stacked { n * len } else { len } {
                let (shape, rows) = (&tensor.shape, len / width);
                return Err(source.error(format!(
                    "`{name}` has shape {shape:?}; expected {rows} rows of {width} in all for \
                     layer {layer} of {}",
                    adapters.slots[place].path()
                )));
            }
            let start = if stacked { m * len } else { 0 };
            slots[place].layers[layer] = tokens.gather(&tensor.values[start..start + len]);
        }
    }
    Ok(Some(all))
}

/// Place, layer and numbers per token of every draw, in the order of a forward pass: the root
/// draws first.
fn calls(adapters: &Adapters) -> Vec<(usize, usize, usize)> {
    let blocks = adapters.slots.last().map_or(0, |slot| slot.block + 1);
    let slots = (0..blocks).flat_map(|b| CALLS.iter().filter_map(move |&p| adapters.at(b, p)));
    let draws = slots.filter_map(|(slot, _)| Some((slot.place, noisy(slot)?)));
    draws
        .flat_map(|(place, spec)| {
            let layers = spec.layers.iter().enumerate().rev();
            layers.map(move |(l, layer)| (place, l, layer.parents * layer.experts))
        })
        .collect()
}

fn empty(slot: &Slot) -> Vec<Vec<f64>> {
    noisy(slot).map_or(vec![], |spec| vec![vec![]; spec.depth()])
}

/// The names `noise.<numbers>` in the order of their numbers.
fn names(source: &Source) -> Vec<String> {
    let numbers = |name: &str| -> Option<Vec<usize>> {
        name.strip_prefix("noise.")?.split('.').map(|k| k.parse().ok()).collect()
    };
    let mut names: Vec<_> =
        source.tensors.keys().filter_map(|name| Some((numbers(name)?, name.clone()))).collect();
    names.sort();
    names.into_iter().map(|(_, name)| name).collect()
}
