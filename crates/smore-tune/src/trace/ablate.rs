//! Causes instead of weights: what an answer's log-probability loses without an expert.

use crate::inject::Slot;
use crate::model::{Batch, Model};
use serde::Serialize;
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::tree::Removal;
use smore_engine::Cpu;
use std::collections::BTreeSet;

/// What a removal does to an answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effect {
    /// Module path of the place.
    pub place: String,
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// The expert, then its ancestors in a sub-tree's path; one expert stands for it anywhere.
    pub path: Vec<u16>,
    /// Nodes it stands at in this text.
    pub nodes: usize,
    /// ln p(answer) without it minus ln p(answer): below zero where the answer needs it.
    pub change: f64,
}

/// Everything that acts on this text: every expert, and every sub-tree below the top layer (at the
/// top a sub-tree is an expert's). With the nodes at which each stands.
pub fn removals(model: &Model<Cpu<f32>>, batch: &Batch) -> Vec<(usize, Removal, usize)> {
    let routing = model.routing(batch);
    let mut all = Vec::new();
    for (slot, routing) in model.adapters.slots.iter().zip(&routing) {
        let Some(routing) = routing else { continue };
        let layers = &routing.tree.layers;
        for (l, layer) in layers.iter().enumerate() {
            let depths = if is_tree(slot) && l + 1 < layers.len() {
                vec![1, layers.len() - l]
            } else {
                vec![1]
            };
            let paths = (0..layer.expert_idx.len()).flat_map(|node| {
                depths.iter().map(move |&depth| {
                    let mut at = node;
                    let up = (0..depth).map(|up| {
                        if up > 0 {
                            let below = layers[l + up - 1].expert_idx.len();
                            at /= below / layers[l + up].expert_idx.len();
                        }
                        layers[l + up].expert_idx[at]
                    });
                    up.collect::<Vec<u16>>()
                })
            });
            let paths: Vec<Vec<u16>> = paths.collect();
            for path in paths.iter().collect::<BTreeSet<_>>() {
                let nodes = paths.iter().filter(|p| *p == path).count();
                all.push((slot.place, Removal { layer: l, path: path.clone() }, nodes));
            }
        }
    }
    all
}

/// Whether every node of the place's trees has one parent.
fn is_tree(slot: &Slot) -> bool {
    match &slot.adapter {
        BlockAdapter::Map(AnyAdapter::Smore(adapter)) => adapter.spec.is_tree(),
        _ => false,
    }
}

/// ln p of the batch's targets, and what each of `removals` does to it, the most needed first.
///
/// An expert is taken out by setting its gate weights at one place to zero, for every token; the
/// weights of the others stay as they are (they are not divided by their new sum). What hangs
/// below it goes with it; in MixLoRA its share of the FFN. Adapters of later blocks see the
/// changed states and route anew: it is the whole effect that is measured. `done` is told how many
/// have been measured.
pub fn ablate(
    model: &Model<Cpu<f32>>,
    batch: &Batch,
    removals: Vec<(usize, Removal, usize)>,
    mut done: impl FnMut(usize),
) -> (f64, Vec<Effect>) {
    let whole: f64 = -model.losses(batch).iter().sum::<f64>();
    let inputs = model.block_inputs(batch);
    let mut effects = Vec::new();
    for (i, (place, what, nodes)) in removals.into_iter().enumerate() {
        let slot = &model.adapters.slots[place];
        let without: f64 = -model.losses_without(batch, &inputs, slot, &what).iter().sum::<f64>();
        let Removal { layer, path } = what;
        effects.push(Effect { place: slot.path(), layer, path, nodes, change: without - whole });
        done(i + 1);
    }
    effects.sort_by(|a, b| a.change.total_cmp(&b.change));
    (whole, effects)
}
