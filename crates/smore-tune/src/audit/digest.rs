//! Which experts acted, in a few bytes per token.

use crate::checkpoint::manifest::hex;
use crate::routing::tokens_of;
use sha2::{Digest, Sha256};
use smore::kernel::Routing;

/// Bytes kept of a token's hash.
const KEPT: usize = 16;

/// Gathers the routing of a generation.
///
/// A token's digest is the first 16 bytes of the SHA-256 over its trees at all routed places: per
/// place its number (4 bytes, little-endian), then layer by layer from the leaves the experts of
/// the token's nodes (2 bytes each) and, where nodes share what is below them, those rows (4 bytes
/// each). Gate weights have a hash of their own, over the bits of all of them: another processor
/// rounds otherwise and still lets the same experts act.
#[derive(Clone, Debug, Default)]
pub struct RoutingDigest {
    tokens: Vec<String>,
    weights: Sha256,
}

impl RoutingDigest {
    /// Adds the tokens of a run, given every place's routing.
    pub fn see(&mut self, places: &[Option<Routing<f32>>]) {
        let routed = || places.iter().enumerate().filter_map(|(i, r)| Some((i, r.as_ref()?)));
        let Some(tokens) = routed().map(|(_, r)| tokens_of(r)).next() else { return };
        for token in 0..tokens {
            let mut hasher = Sha256::new();
            for (place, routing) in routed() {
                hasher.update((place as u32).to_le_bytes());
                for layer in &routing.tree.layers {
                    let nodes = layer.expert_idx.len() / tokens;
                    let own = token * nodes..(token + 1) * nodes;
                    for expert in &layer.expert_idx[own.clone()] {
                        hasher.update(expert.to_le_bytes());
                    }
                    for row in layer.source.iter().flat_map(|s| &s[own.clone()]) {
                        hasher.update(row.to_le_bytes());
                    }
                    for weight in &layer.gate_weight[own] {
                        self.weights.update(weight.to_bits().to_le_bytes());
                    }
                }
            }
            self.tokens.push(hex(&hasher.finalize()[..KEPT]));
        }
    }

    /// The tokens' digests and the hash of the gate weights.
    pub fn finish(self) -> (Vec<String>, String) {
        (self.tokens, hex(&self.weights.finalize()))
    }
}
