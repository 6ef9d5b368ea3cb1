//! S'MoRE: Structural Mixture of Residual Experts for parameter-efficient fine-tuning
//! (arXiv 2504.06426).
//!
//! An adapter sits on one frozen linear map W and adds to its output:
//! `y = W x + adapter(x)`. A router picks a small tree of low-rank residual experts for every
//! token; the tree's residuals are propagated from the leaves to the root and projected to the
//! output.
//!
//! Read in this order: [`config`] (what the user wrote), [`spec`] (the same, validated, with every
//! derived number), [`layout`] (where each parameter lies), [`router`] and [`tree`] (which experts
//! act on a token), [`propagate`] (what they do), [`kernel`] (the fused pass over tokens),
//! [`adapter`] (S'MoRE and the baselines behind one trait). [`mod@reference`] is the same method in
//! plain loops, the oracle of the tests.

#![deny(missing_docs)]

pub mod adapter;
pub mod config;
pub mod counting;
pub mod error;
pub mod grow;
pub mod init;
pub mod kernel;
pub mod layout;
pub mod propagate;
pub mod reference;
pub mod rng;
pub mod router;
pub mod spec;
pub mod targets;
pub mod tree;

mod activation;

pub use error::{Error, Result};
