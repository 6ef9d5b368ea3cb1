//! What the authors' program prints about an adapter.

use super::compute::router_once;
use super::parameters::active;
use super::{Activity, Multiplications, Parameters};
use crate::spec::SmoreSpec;
use serde::Serialize;

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

super::adds_up!(AuthorStats: trainable_param, expert_param, expert_param_wo_proj, gate_param, active_param, active_param_wo_proj, expert_flops, expert_flops_wo_proj, gate_flops);
