//! What the authors' program prints about an adapter.

use super::compute::router_once;
use super::parameters::active;
use super::{Activity, Multiplications, Parameters};
use crate::spec::SmoreSpec;
use serde::Serialize;
use std::iter::Sum;
use std::ops::{AddAssign, Mul};

/// The authors' `ParamStats`, under their names: of one linear map or, added up, of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AuthorStats {
    /// All trained parameters
    pub trainable_param: usize,
    /// All but the router
    pub expert_param: usize,
    /// All but the router and the output projection
    pub expert_param_wo_proj: usize,
    /// The router, its view of the token included
    pub gate_param: usize,
    /// Parameters that can act on a token, router aside
    pub active_param: usize,
    /// The same without the output projection
    pub active_param_wo_proj: usize,
    /// Multiplications per token, router aside (paper, App. C.1)
    pub expert_flops: usize,
    /// The same without the output projection
    pub expert_flops_wo_proj: usize,
    /// The router's view and one query in every layer, however many parents ask
    pub gate_flops: usize,
}

impl AuthorStats {
    /// Counts as the authors do. `num_active` is the configured fanout of every layer: their
    /// counts rest on it under a dense gate too, although all experts then run.
    pub fn of(spec: &SmoreSpec, num_active: &[usize]) -> Self {
        let activity = Activity::of_tree(spec, num_active);
        let parameters = Parameters::of(spec);
        let active_param_wo_proj = active(spec, &activity);
        let flops = Multiplications::of_experts(spec, &activity);
        Self {
            trainable_param: parameters.total(),
            expert_param: parameters.experts(),
            expert_param_wo_proj: parameters.experts() - parameters.projection(),
            gate_param: parameters.router(),
            active_param: active_param_wo_proj + parameters.projection(),
            active_param_wo_proj,
            expert_flops: flops.paper(),
            expert_flops_wo_proj: flops.paper() - flops.projection,
            gate_flops: router_once(spec),
        }
    }
}

impl AddAssign for AuthorStats {
    fn add_assign(&mut self, other: Self) {
        self.trainable_param += other.trainable_param;
        self.expert_param += other.expert_param;
        self.expert_param_wo_proj += other.expert_param_wo_proj;
        self.gate_param += other.gate_param;
        self.active_param += other.active_param;
        self.active_param_wo_proj += other.active_param_wo_proj;
        self.expert_flops += other.expert_flops;
        self.expert_flops_wo_proj += other.expert_flops_wo_proj;
        self.gate_flops += other.gate_flops;
    }
}

/// The same adapter on many blocks.
impl Mul<usize> for AuthorStats {
    type Output = Self;

    fn mul(self, n: usize) -> Self {
        Self {
            trainable_param: self.trainable_param * n,
            expert_param: self.expert_param * n,
            expert_param_wo_proj: self.expert_param_wo_proj * n,
            gate_param: self.gate_param * n,
            active_param: self.active_param * n,
            active_param_wo_proj: self.active_param_wo_proj * n,
            expert_flops: self.expert_flops * n,
            expert_flops_wo_proj: self.expert_flops_wo_proj * n,
            gate_flops: self.gate_flops * n,
        }
    }
}

impl Sum for AuthorStats {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}
