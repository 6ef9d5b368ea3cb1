//! The residual tree: which experts act on a token, and how strongly.

use crate::spec::{LayerSpec, SmoreSpec};

/// The residual trees of a run of tokens: all that passes from routing to propagation, and all
/// that a tracer or an audit needs to see.
///
/// Nodes of layer l stand in the order `[token, f_{L-1}, .., f_l]`: node `i` of layer l is child
/// `i % f_l` of node `i / f_l` of layer l+1 (of the root for l = L-1).
#[derive(Clone, Debug, PartialEq)]
pub struct ResidualTree<T> {
    /// One entry per S'MoRE layer, leaves first.
    pub layers: Vec<TreeLayer<T>>,
}

/// The nodes of one layer, for every token.
#[derive(Clone, Debug, PartialEq)]
pub struct TreeLayer<T> {
    /// Expert that stands at each node, `[n_tokens * F_l]`.
    pub expert_idx: Vec<u16>,
    /// Its gate weight alpha under its parent, `[n_tokens * F_l]`.
    pub gate_weight: Vec<T>,
    /// Row of the layer below's output that each node takes, counted within its token; absent
    /// where node i takes row i, as in every tree that was routed from the top.
    pub source: Option<Vec<u32>>,
}

/// What is taken out of trees to see what it does: all nodes of a layer at which `path[0]` stands,
/// under a parent at which `path[1]` stands, and so on upwards. A path of one expert is the expert
/// wherever it stands, a path up to the top layer is one sub-tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Removal {
    /// S'MoRE layer, 0 at the leaves.
    pub layer: usize,
    /// An expert of that layer, then of the layers above it. Longer than one only where every
    /// node has one parent ([`SmoreSpec::is_tree`]).
    pub path: Vec<u16>,
}

impl<T: Copy + Default> ResidualTree<T> {
    /// Sets the gate weights of what is removed to zero, and does not divide the others by their
    /// new sum. What hangs below goes with it where nodes do not share what is below them.
    pub fn remove(&mut self, removal: &Removal) {
        let stands = |node| self.stands(removal, node);
        let nodes = self.layers[removal.layer].expert_idx.len();
        let gone: Vec<bool> = (0..nodes).map(stands).collect();
        self.clear(removal.layer, gone);
    }

    /// Sets the weights of the marked nodes of `layer`, and of what hangs below them, to zero.
    pub(crate) fn clear(&mut self, layer: usize, mut gone: Vec<bool>) {
        let shared = self.layers.iter().any(|l| l.source.is_some());
        for l in (0..=layer).rev() {
            for (weight, _) in self.layers[l].gate_weight.iter_mut().zip(&gone).filter(|x| *x.1) {
                *weight = T::default();
            }
            if l == 0 || shared {
                break;
            }
            let fanout = self.layers[l - 1].expert_idx.len() / gone.len().max(1);
            gone = gone.iter().flat_map(|&g| std::iter::repeat_n(g, fanout)).collect();
        }
    }

    fn stands(&self, removal: &Removal, mut node: usize) -> bool {
        let len = |l: usize| self.layers[l].expert_idx.len();
        removal.path.iter().enumerate().all(|(up, &expert)| {
            let l = removal.layer + up;
            if up > 0 {
                node /= len(l - 1) / len(l);
            }
            self.layers[l].expert_idx[node] == expert
        })
    }

    /// Trees of `n_tokens` tokens, all nodes at expert 0 with weight 0.
    pub fn zeros(spec: &SmoreSpec, n_tokens: usize) -> Self {
        let layer = |(l, layer): (usize, &LayerSpec)| TreeLayer {
            expert_idx: vec![0; n_tokens * layer.nodes],
            gate_weight: vec![T::default(); n_tokens * layer.nodes],
            source: (l > 0 && !spec.is_tree()).then(|| vec![0; n_tokens * layer.nodes]),
        };
        Self { layers: spec.layers.iter().enumerate().map(layer).collect() }
    }

    /// Appends the trees of the tokens that follow.
    pub fn extend(&mut self, next: &Self) {
        for (mine, next) in self.layers.iter_mut().zip(&next.layers) {
            mine.expert_idx.extend_from_slice(&next.expert_idx);
            mine.gate_weight.extend_from_slice(&next.gate_weight);
            if let (Some(mine), Some(next)) = (&mut mine.source, &next.source) {
                mine.extend_from_slice(next);
            }
        }
    }

    /// The trees of `count` tokens from `first` on.
    #[must_use]
    pub fn tokens(&self, spec: &SmoreSpec, first: usize, count: usize) -> Self {
        let cut = |l: &TreeLayer<T>, nodes: usize| TreeLayer {
            expert_idx: l.expert_idx[first * nodes..(first + count) * nodes].to_vec(),
            gate_weight: l.gate_weight[first * nodes..(first + count) * nodes].to_vec(),
            source: l.source.as_ref().map(|s| s[first * nodes..(first + count) * nodes].to_vec()),
        };
        Self {
            layers: self.layers.iter().zip(&spec.layers).map(|(l, s)| cut(l, s.nodes)).collect(),
        }
    }
}
