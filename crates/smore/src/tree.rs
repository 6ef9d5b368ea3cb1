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

impl<T: Copy + Default> ResidualTree<T> {
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
