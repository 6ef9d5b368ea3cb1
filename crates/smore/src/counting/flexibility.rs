//! Structural flexibility Gamma: how many distinct outputs the trees of an adapter can give one
//! token (paper, Sec. 3.4).
//!
//! The numbers grow beyond all types, so each comes as its natural logarithm and, while it can
//! still be written down, as an exact integer. Lists of layers run from the leaves to the root.
//!
//! ```
//! use smore::counting::flexibility::{Choice, smore};
//!
//! let two_of_four = Choice { experts: 4, fanout: 2 };
//! let gamma = smore(&[two_of_four; 2]);
//! assert_eq!(gamma.exact.unwrap().to_string(), "216");
//! assert!((gamma.ln - 216f64.ln()).abs() < 1e-12);
//! ```

use crate::config::{Activation, ActivationPosition, Structure};
use crate::spec::SmoreSpec;
use num_bigint::BigUint;
use std::f64::consts::LN_2;

/// Exact numbers end here: some 300,000 decimal digits.
const MAX_EXACT_BITS: f64 = (1u32 << 20) as f64;

/// A layer's choice: `fanout` of `experts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// s
    pub experts: usize,
    /// f
    pub fanout: usize,
}

impl Choice {
    /// C(s, f), the sets of children that one parent can choose.
    pub fn count(self) -> Flexibility {
        Flexibility::binomials(self.experts, self.fanout..=self.fanout)
    }
}

/// A count of outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Flexibility {
    /// Its natural logarithm; negative infinity for 0.
    pub ln: f64,
    /// The number itself, where it has at most some 300,000 digits.
    pub exact: Option<BigUint>,
}

impl Flexibility {
    fn one() -> Self {
        Self { ln: 0.0, exact: Some(BigUint::from(1u8)) }
    }

    /// Keeps an exact number only if it is not absurdly large.
    fn new(ln: f64, exact: impl FnOnce() -> Option<BigUint>) -> Self {
        Self { ln, exact: (ln <= MAX_EXACT_BITS * LN_2).then(exact).flatten() }
    }

    /// Sum of C(n, k) over a range of k.
    fn binomials(n: usize, range: std::ops::RangeInclusive<usize>) -> Self {
        let (first, last) = (*range.start(), (*range.end()).min(n));
        if first > last {
            return Self { ln: f64::NEG_INFINITY, exact: Some(BigUint::ZERO) };
        }
        let step = |k: usize| ((n - k) as f64 / (k + 1) as f64).ln();
        let start: f64 = (0..first.min(n - first)).map(step).sum();
        let mut logs = vec![start];
        for k in first..last {
            logs.push(logs[k - first] + step(k));
        }
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ln = largest + logs.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
        Self::new(ln, || {
            let next = |c: BigUint, k: usize| c * (n - k) / (k + 1);
            let mut term = (0..first.min(n - first)).fold(BigUint::from(1u8), next);
            let mut sum = term.clone();
            for k in first..last {
                term = next(term, k);
                sum += &term;
            }
            Some(sum)
        })
    }

    fn times(&self, other: &Self) -> Self {
        Self::new(self.ln + other.ln, || Some(self.exact.as_ref()? * other.exact.as_ref()?))
    }

    /// This number to the power of `n` >= 1, which may be beyond any integer type.
    fn power(&self, n: f64) -> Self {
        Self::new(if self.ln == 0.0 { 0.0 } else { self.ln * n }, || {
            let base = self.exact.as_ref()?;
            // What is above 1 and fits has an exponent that fits; 0 and 1 stay what they are.
            Some(if base.bits() < 2 { base.clone() } else { base.pow(n as u32) })
        })
    }

    /// Multisets of `f` out of this many: C(G + f - 1, f).
    fn multisets(&self, f: usize) -> Self {
        // ln(G + i) without leaving the logarithm.
        let term =
            |i: usize| self.ln + (i as f64 * (-self.ln).exp()).ln_1p() - ((i + 1) as f64).ln();
        Self::new((0..f).map(term).sum(), || {
            let all = self.exact.as_ref()?;
            Some((0..f).fold(BigUint::from(1u8), |c, i| c * (all + i) / (i + 1)))
        })
    }

    /// Its logarithm to base 10.
    pub fn log10(&self) -> f64 {
        self.ln / std::f64::consts::LN_10
    }
}

/// A flat mixture (MoLRE) that picks `fanout` of `experts`: C(s, f).
pub fn flat_mixture(choice: Choice) -> Flexibility {
    choice.count()
}

/// S'MoRE (paper, Thm. 3.4): the product over l of C(s_l, f_l)^{F_{l+1}}. Every active node
/// chooses its own children, and no two trees give the same output.
pub fn smore(layers: &[Choice]) -> Flexibility {
    let mut parents = 1.0;
    let mut gamma = Flexibility::one();
    for layer in layers.iter().rev() {
        gamma = gamma.times(&layer.count().power(parents));
        parents *= layer.fanout as f64;
    }
    gamma
}

/// S'MoRE# (paper, Cor. 3.6), whose layers share `experts`: the product over l of
/// C(s, f_l)^{F_{l+1}}.
pub fn smore_sharp(experts: usize, fanouts: &[usize]) -> Flexibility {
    let layers: Vec<_> = fanouts.iter().map(|&fanout| Choice { experts, fanout }).collect();
    smore(&layers)
}

/// S'MoRE* (paper, Cor. 3.5), whose activation acts on the child alone: G_0 = 1, G_{l+1} =
/// C(s_l, f_l) C(G_l + f_l - 1, f_l). A node's sum tells which experts were chosen and which
/// embeddings came from below, but not which belong together.
pub fn smore_star(layers: &[Choice]) -> Flexibility {
    layers.iter().fold(Flexibility::one(), |below, layer| {
        layer.count().times(&below.multisets(layer.fanout))
    })
}

/// Upper bound for MoMOR (paper, Thm. 3.3), the mixture without structure: C(s_{L-1}, f_{L-1})
/// times the product over l <= L-2 of the sum of C(s_l, i) for i from f_l to min(F_l, s_l). It
/// counts which experts of each layer act, not how often a tree holds them.
pub fn momor_bound(layers: &[Choice]) -> Flexibility {
    let Some((top, lower)) = layers.split_last() else { return Flexibility::one() };
    let mut nodes = top.fanout;
    let mut gamma = top.count();
    for layer in lower.iter().rev() {
        nodes = nodes.saturating_mul(layer.fanout);
        gamma = gamma.times(&Flexibility::binomials(layer.experts, layer.fanout..=nodes));
    }
    gamma
}

/// Where the layers choose once per token, all parents sharing the outcome: the product over l of
/// C(s_l, f_l). The ablations without a tree and without ancestors' keys; not in the paper.
pub fn one_choice_per_layer(layers: &[Choice]) -> Flexibility {
    layers.iter().fold(Flexibility::one(), |gamma, layer| gamma.times(&layer.count()))
}

/// Which count holds for an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formula {
    /// [`flat_mixture`]: one layer.
    FlatMixture,
    /// [`one_choice_per_layer`]: `structure: multi_order` or `ancestor_keys: false`.
    OneChoicePerLayer,
    /// [`momor_bound`]: a tree whose activation is the identity collapses to a MoMOR.
    MomorBound,
    /// [`smore`]
    Smore,
    /// [`smore_star`]: `activation_position` child or child_v2.
    SmoreStar,
    /// [`smore_sharp`]
    SmoreSharp,
}

impl Formula {
    /// What holds for `spec`. `None` for a bottom-up router over several layers, which pairs
    /// experts with positions and has no formula in the paper.
    pub fn of(spec: &SmoreSpec) -> Option<Self> {
        Some(if spec.depth() == 1 {
            Self::FlatMixture
        } else if spec.bottom_up() {
            return None;
        } else if spec.structure == Structure::MultiOrder || !spec.gate.ancestor_keys {
            Self::OneChoicePerLayer
        } else if spec.activation == Activation::Identity {
            Self::MomorBound
        } else if spec.position != ActivationPosition::All {
            Self::SmoreStar
        } else if spec.shared_pool {
            Self::SmoreSharp
        } else {
            Self::Smore
        })
    }

    /// The count for these layers.
    pub fn count(self, layers: &[Choice]) -> Flexibility {
        match self {
            Self::FlatMixture | Self::OneChoicePerLayer => one_choice_per_layer(layers),
            Self::MomorBound => momor_bound(layers),
            // A shared pool changes what the experts are, not how many trees there are.
            Self::Smore | Self::SmoreSharp => smore(layers),
            Self::SmoreStar => smore_star(layers),
        }
    }

    /// Its name, with its place in the paper.
    pub fn name(self) -> &'static str {
        match self {
            Self::FlatMixture => "flat mixture",
            Self::OneChoicePerLayer => "one choice per layer",
            Self::MomorBound => "MoMOR, at most (Thm. 3.3)",
            Self::Smore => "S'MoRE (Thm. 3.4)",
            Self::SmoreStar => "S'MoRE* (Cor. 3.5)",
            Self::SmoreSharp => "S'MoRE# (Cor. 3.6)",
        }
    }
}

/// The choices of an adapter's layers: s_l and f_l, leaves first.
pub fn choices(spec: &SmoreSpec) -> Vec<Choice> {
    spec.layers.iter().map(|l| Choice { experts: l.experts, fanout: l.fanout }).collect()
}

/// The structural flexibility of an adapter, and the formula that gives it; `None` as in
/// [`Formula::of`].
pub fn of(spec: &SmoreSpec) -> Option<(Formula, Flexibility)> {
    let formula = Formula::of(spec)?;
    Some((formula, formula.count(&choices(spec))))
}
