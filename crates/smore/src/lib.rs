//! S'MoRE: Structural Mixture of Residual Experts (arXiv 2504.06426).

pub mod config;
