//! What routers chose, counted.

use crate::inject::{Adapters, Slot};
use serde::{Deserialize, Serialize};
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::kernel::Routing;
use smore::tree::ResidualTree;
use smore_engine::team;
use std::collections::BTreeSet;
use std::ops::Range;

/// Selections of a layer's experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerCounts {
    /// s_l
    pub experts: usize,
    /// Experts of the layer above, whose children these are; 0 at the top and where nodes have no
    /// one parent (the bottom-up router and MoMOR).
    pub parents: usize,
    /// f_l, children of a node
    pub fanout: usize,
    /// Nodes at which each expert stood, `[max(parents, 1) * experts]`
    pub count: Vec<u64>,
    /// Sum of their gate weights, likewise
    pub weight: Vec<f64>,
}

impl LayerCounts {
    fn new(experts: usize, parents: usize, fanout: usize) -> Self {
        let len = parents.max(1) * experts;
        Self { experts, parents, fanout, count: vec![0; len], weight: vec![0.0; len] }
    }

    /// Nodes at which each expert stood.
    pub fn load(&self) -> Vec<u64> {
        self.columns(&self.count)
    }

    /// Sum of the gate weights of each expert.
    pub fn weights(&self) -> Vec<f64> {
        self.columns(&self.weight)
    }

    fn columns<T: Copy + std::iter::Sum>(&self, table: &[T]) -> Vec<T> {
        let column = |e| table.iter().skip(e).step_by(self.experts).copied().sum();
        (0..self.experts).map(column).collect()
    }

    fn add(&mut self, other: &Self) {
        self.count.iter_mut().zip(&other.count).for_each(|(a, b)| *a += b);
        self.weight.iter_mut().zip(&other.weight).for_each(|(a, b)| *a += b);
    }
}

/// Everything counted at one place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlaceCounts {
    /// Module path.
    pub path: String,
    /// Tokens seen.
    pub tokens: u64,
    /// Leaves first.
    pub layers: Vec<LayerCounts>,
    /// The trees that were different.
    pub trees: Distinct,
}

impl PlaceCounts {
    /// Nothing yet; none for an adapter without a router.
    fn new(slot: &Slot) -> Option<Self> {
        let layers = match &slot.adapter {
            BlockAdapter::Map(AnyAdapter::Lora(_)) => return None,
            BlockAdapter::Map(AnyAdapter::HydraLora(a)) => {
                vec![LayerCounts::new(a.spec.heads, 0, a.spec.heads)]
            }
            BlockAdapter::Ffn(a) => vec![LayerCounts::new(a.spec.experts, 0, a.spec.fanout)],
            BlockAdapter::Map(AnyAdapter::Smore(a)) => {
                let above = a.spec.layers.iter().skip(1).map(|l| l.experts).chain([0]);
                let parents = |above| if a.spec.is_tree() { above } else { 0 };
                let layers = a.spec.layers.iter().zip(above);
                layers.map(|(l, up)| LayerCounts::new(l.experts, parents(up), l.fanout)).collect()
            }
        };
        Some(Self { path: slot.path(), tokens: 0, layers, trees: Distinct::default() })
    }

    /// Adds the tokens `span` of `tokens`.
    fn see(&mut self, tree: &ResidualTree<f32>, tokens: usize, span: Range<usize>) {
        self.tokens += span.len() as u64;
        for (l, counts) in self.layers.iter_mut().enumerate() {
            let layer = &tree.layers[l];
            let each = layer.expert_idx.len() / tokens;
            let own = span.start * each..span.end * each;
            let nodes = layer.expert_idx[own.clone()].iter().zip(&layer.gate_weight[own.clone()]);
            if counts.parents == 0 {
                for (&expert, &weight) in nodes {
                    counts.count[usize::from(expert)] += 1;
                    counts.weight[usize::from(expert)] += f64::from(weight);
                }
                continue;
            }
            let above = &tree.layers[l + 1].expert_idx;
            for (i, (&expert, &weight)) in own.zip(nodes) {
                let parent = usize::from(above[i / counts.fanout]);
                let at = parent * counts.experts + usize::from(expert);
                counts.count[at] += 1;
                counts.weight[at] += f64::from(weight);
            }
        }
        let is_tree = tree.layers.iter().all(|l| l.source.is_none());
        let mut below: Vec<u64> = Vec::new();
        for t in span {
            let hash = if is_tree {
                tree_hash(tree, tokens, t, &mut below)
            } else {
                flat_hash(tree, tokens, t)
            };
            self.trees.see(hash);
        }
    }

    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.layers.iter_mut().zip(&other.layers).for_each(|(a, b)| a.add(b));
        self.trees.add(&other.trees);
    }
}

/// Tokens of a routing: the rows of its top layer, whose one parent is the token.
pub(crate) fn tokens_of(routing: &Routing<f32>) -> usize {
    routing.stats.last().map_or(0, |top| top.rows as usize)
}

/// A hash of the tree of token `t` that does not depend on the order of siblings.
fn tree_hash(tree: &ResidualTree<f32>, tokens: usize, t: usize, below: &mut Vec<u64>) -> u64 {
    below.clear();
    for (l, layer) in tree.layers.iter().enumerate() {
        let nodes = layer.expert_idx.len() / tokens;
        let own = &layer.expert_idx[t * nodes..(t + 1) * nodes];
        let of = |&expert: &u16| mixed(u64::from(expert) + 1);
        if l == 0 {
            below.extend(own.iter().map(|expert| mixed(of(expert))));
            continue;
        }
        let fanout = below.len() / nodes;
        for (node, expert) in own.iter().enumerate() {
            // A sum, since the order in which children were chosen makes no other tree.
            let children = below[node * fanout..(node + 1) * fanout].iter();
            let children = children.fold(0u64, |sum, &child| sum.wrapping_add(child));
            below[node] = mixed(of(expert).wrapping_add(children));
        }
        below.truncate(nodes);
    }
    mixed(below.iter().fold(0u64, |sum, &top| sum.wrapping_add(top)))
}

/// Where nodes share what is below them: a hash of which experts act in each layer.
fn flat_hash(tree: &ResidualTree<f32>, tokens: usize, t: usize) -> u64 {
    tree.layers.iter().fold(0, |hash, layer| {
        let nodes = layer.expert_idx.len() / tokens;
        let own = &layer.expert_idx[t * nodes..(t + 1) * nodes];
        let sum = own.iter().fold(0u64, |sum, &e| sum.wrapping_add(mixed(u64::from(e) + 1)));
        mixed(hash ^ sum)
    })
}

/// The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection that spreads every bit.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// How many different values were seen, in 2 KiB: the smallest hashes are kept, and where they end
/// tells how many there are (Bar-Yossef et al. 2002). Exact below 256; above, the standard error is
/// 6%.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distinct(BTreeSet<u64>);

/// Hashes kept.
const KEPT: usize = 256;

impl Distinct {
    fn see(&mut self, hash: u64) {
        if self.0.len() == KEPT && self.0.last().is_some_and(|&last| hash >= last) {
            return;
        }
        if self.0.insert(hash) && self.0.len() > KEPT {
            self.0.pop_last();
        }
    }

    fn add(&mut self, other: &Self) {
        other.0.iter().for_each(|&hash| self.see(hash));
    }

    /// How many; a whole number below 256.
    pub fn estimate(&self) -> f64 {
        match self.0.last() {
            Some(&last) if self.0.len() == KEPT => {
                (KEPT - 1) as f64 / (last as f64 / u64::MAX as f64)
            }
            _ => self.0.len() as f64,
        }
    }
}

/// Counts at every place of a model, in the order of its adapters; none for a place without a
/// router.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    places: Vec<Option<PlaceCounts>>,
}

impl Counts {
    /// Nothing yet.
    pub fn new(adapters: &Adapters) -> Self {
        Self { places: adapters.slots.iter().map(PlaceCounts::new).collect() }
    }

    /// Whether there is anything to count.
    pub fn is_routed(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }

    /// Adds the routing of a batch, in the order of the adapters. There is no padding in a batch, so
    /// every token counts.
    pub fn see(&mut self, routing: &[Option<Routing<f32>>]) {
        team::each(self.places.iter_mut().zip(routing), |(place, routing)| {
            if let (Some(place), Some(routing)) = (place, routing) {
                let tokens = tokens_of(routing);
                place.see(&routing.tree, tokens, 0..tokens);
            }
        });
    }

    /// As [`Counts::see`] for some of the batch's tokens.
    pub fn see_tokens(&mut self, routing: &[Option<Routing<f32>>], span: &Range<usize>) {
        for (place, routing) in self.places.iter_mut().zip(routing) {
            if let (Some(place), Some(routing)) = (place, routing) {
                place.see(&routing.tree, tokens_of(routing), span.clone());
            }
        }
    }

    /// Adds what was counted elsewhere on the same adapters.
    pub fn add(&mut self, other: &Self) {
        for (mine, other) in self.places.iter_mut().zip(&other.places) {
            if let (Some(mine), Some(other)) = (mine, other) {
                mine.add(other);
            }
        }
    }

    /// Tokens counted.
    pub fn tokens(&self) -> u64 {
        self.routed().next().map_or(0, |(_, place)| place.tokens)
    }

    /// The places that have a router, with their number among the adapters.
    pub fn routed(&self) -> impl Iterator<Item = (usize, &PlaceCounts)> {
        self.places.iter().enumerate().filter_map(|(i, place)| Some((i, place.as_ref()?)))
    }

    /// Takes the counts out and leaves zeros.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let taken = self.clone();
        for place in self.places.iter_mut().flatten() {
            (place.tokens, place.trees) = (0, Distinct::default());
            for layer in &mut place.layers {
                layer.count.fill(0);
                layer.weight.fill(0.0);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smore::tree::TreeLayer;

    /// Two layers, two children each, of four experts.
    fn tree(top: [u16; 2], leaves: [u16; 4]) -> ResidualTree<f32> {
        let layer = |experts: &[u16]| TreeLayer {
            expert_idx: experts.to_vec(),
            gate_weight: vec![0.5; experts.len()],
            source: None,
        };
        ResidualTree { layers: vec![layer(&leaves), layer(&top)] }
    }

    #[test]
    fn trees_are_equal_whatever_the_order_of_siblings() {
        let hash = |tree: &ResidualTree<f32>| tree_hash(tree, 1, 0, &mut Vec::new());
        let one = hash(&tree([0, 1], [2, 3, 0, 1]));
        assert_eq!(one, hash(&tree([0, 1], [3, 2, 0, 1])));
        assert_eq!(one, hash(&tree([1, 0], [1, 0, 2, 3])));
        for other in
            [tree([0, 1], [0, 1, 2, 3]), tree([0, 2], [2, 3, 0, 1]), tree([0, 1], [2, 3, 0, 2])]
        {
            assert_ne!(one, hash(&other), "{other:?}");
        }
    }

    #[test]
    fn distinct_values_are_counted_exactly_and_then_estimated() {
        for n in [0u64, 1, 7, 255, 1000, 50_000] {
            let mut seen = Distinct::default();
            (0..n).chain(0..n / 2).for_each(|i| seen.see(mixed(i)));
            let off = (seen.estimate() / n.max(1) as f64 - 1.0).abs();
            assert!(if n < 256 { seen.estimate() == n as f64 } else { off < 0.2 }, "{n}: {off}");
        }
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let (mut a, mut b, mut both) =
            (Distinct::default(), Distinct::default(), Distinct::default());
        for i in 0..3000 {
            if i % 3 == 0 {
                a.see(mixed(i));
            } else {
                b.see(mixed(i));
            }
            both.see(mixed(i));
        }
        a.add(&b);
        assert_eq!(a, both);
    }
}
