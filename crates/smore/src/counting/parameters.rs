//! Trainable parameters, by part.

use super::{Activity, equal_rank_lora_parameters};
use crate::layout::SmoreLayout;
use crate::spec::SmoreSpec;
use serde::Serialize;

/// Trainable parameters by part, of one linear map or, added up, of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// A, the experts' down factors: sum of s_l r_l d_in
    pub down: usize,
    /// Their biases: sum of s_l r_l
    pub down_bias: usize,
    /// B, the experts' up factors: sum of s_l r_l d_{l+1}
    pub up: usize,
    /// Their biases: sum of s_l d_{l+1}
    pub up_bias: usize,
    /// W, the transforms between layers: sum of d_l d_{l+1}
    pub transform: usize,
    /// Their biases: sum of d_{l+1}, l >= 1
    pub transform_bias: usize,
    /// Learned slopes of a prelu between layers: one per layer
    pub slopes: usize,
    /// W_proj: d_out d_L
    pub output_proj: usize,
    /// Its bias: d_out
    pub output_bias: usize,
    /// The router's view of the token, D and its bias: (d_in + 1) d_down
    pub router_view: usize,
    /// Networks, keys and noise weights of all routers
    pub routers: usize,
}

impl Parameters {
    /// Counts an adapter's parameters; a shared pool counts once.
    ///
    /// # Panics
    /// Never: every name of a layout has its part here.
    pub fn of(spec: &SmoreSpec) -> Self {
        let mut parts = Self::default();
        for param in SmoreLayout::new(spec).params {
            let stem = param.name.split('.').next().unwrap_or_default();
            *parts.part(stem) += param.len();
        }
        parts
    }

    /// The part to which a parameter with this first name belongs.
    fn part(&mut self, stem: &str) -> &mut usize {
        match stem {
            "moe_A" => &mut self.down,
            "moe_A_bias" => &mut self.down_bias,
            "moe_B" => &mut self.up,
            "moe_B_bias" => &mut self.up_bias,
            "moe_W" => &mut self.transform,
            "moe_W_bias" => &mut self.transform_bias,
            "moe_expert_act_param" => &mut self.slopes,
            "moe_W_final" => &mut self.output_proj,
            "moe_W_final_bias" => &mut self.output_bias,
            "moe_downproj_x" => &mut self.router_view,
            "moe_gate" => &mut self.routers,
            other => unreachable!("parameter {other} belongs to no part"),
        }
    }

    /// Everything but the router: the authors' `expert_param`.
    pub fn experts(&self) -> usize {
        self.total() - self.router()
    }

    /// W_proj and its bias.
    pub fn projection(&self) -> usize {
        self.output_proj + self.output_bias
    }

    /// The router with its view of the token: the authors' `gate_param`.
    pub fn router(&self) -> usize {
        self.router_view + self.routers
    }

    /// All biases outside the router.
    pub fn biases(&self) -> usize {
        self.down_bias + self.up_bias + self.transform_bias + self.output_bias
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, n)| n).sum()
    }

    /// Every part with its name for people, in the order of the fields.
    pub fn parts(&self) -> [(&'static str, usize); 11] {
        [
            ("down factors A", self.down),
            ("down biases", self.down_bias),
            ("up factors B", self.up),
            ("up biases", self.up_bias),
            ("transforms W", self.transform),
            ("transform biases", self.transform_bias),
            ("activation slopes", self.slopes),
            ("output projection", self.output_proj),
            ("output bias", self.output_bias),
            ("router's view of the token", self.router_view),
            ("routers", self.routers),
        ]
    }
}

super::adds_up!(Parameters: down, down_bias, up, up_bias, transform, transform_bias, slopes, output_proj, output_bias, router_view, routers);

/// The paper's count (Eqs. 8 and 9): matrices without biases and router. Layer l has
/// `s_l r_l d_in + d_{l+1}^2`, the projection `d_out d_L`.
pub fn paper_parameters(spec: &SmoreSpec) -> usize {
    let p = Parameters::of(spec);
    p.down + p.up + p.transform + p.output_proj
}

/// Delta (paper, Table 1): what [`paper_parameters`] has above LoRA of rank d_L. The sum of
/// `d_{l+1}^2`, that is B and W together; a shared pool has L (s r)^2.
pub fn parameters_above_lora(spec: &SmoreSpec) -> usize {
    let p = Parameters::of(spec);
    p.up + p.transform
}

/// Delta as a share of LoRA of rank d_L (paper, Table 1, last column).
pub fn parameter_overhead(spec: &SmoreSpec) -> f64 {
    parameters_above_lora(spec) as f64 / equal_rank_lora_parameters(spec) as f64
}

/// Parameters that can act on one token, router aside: those of min(s_l, F_l) experts in every
/// layer (paper, App. C.1), all transforms, slopes and the projection.
///
/// # Differs from the paper
/// The authors' own statistics do the same but take a dense gate for one that picks `fanout`;
/// see [`super::AuthorStats`].
pub fn active_parameters(spec: &SmoreSpec) -> usize {
    active(spec, &Activity::of(spec)) + Parameters::of(spec).projection()
}

/// Active parameters without router and projection.
pub(super) fn active(spec: &SmoreSpec, activity: &Activity) -> usize {
    let p = Parameters::of(spec);
    let experts = activity.pools(spec).iter().zip(&spec.layers);
    let one = |rank: usize, width: usize| rank * (spec.d_in + 1) + width * (rank + 1);
    let experts: usize = experts.map(|(&n, l)| n * one(l.rank, l.width)).sum();
    experts + p.transform + p.transform_bias + p.slopes
}
