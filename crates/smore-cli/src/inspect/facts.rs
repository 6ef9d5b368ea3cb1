//! What is known about an adapter, as JSON.

use super::Smore;
use super::Target;
use serde_json::{Map, Value, json};
use smore::counting::flexibility::{self, Choice, Flexibility};
use smore::counting::{
    Multiplications, Parameters, active_parameters, equal_rank_lora_parameters, parameter_overhead,
    parameters_above_lora, propagation_overhead,
};
use smore::spec::SmoreSpec;

impl Smore<'_> {
    pub(super) fn facts(&self) -> Map<String, Value> {
        let facts = json!({
            "structure": {
                "depth": self.shape.depth(),
                "root_width": self.shape.root_width(),
                "layers": (0..self.shape.depth()).map(|l| self.layer_facts(l)).collect::<Vec<_>>(),
            },
            "flexibility": self.flexibility_facts(),
            "targets": self.targets.iter().map(|t| t.proj.name()).collect::<Vec<_>>(),
            "maps": self.targets.iter().zip(&self.maps)
                .map(|(t, m)| self.map_facts(*t, m)).collect::<Vec<_>>(),
            "total": (!self.maps.is_empty()).then(|| self.total_facts()),
        });
        facts.as_object().cloned().unwrap_or_default()
    }

    fn layer_facts(&self, l: usize) -> Value {
        let layer = &self.shape.layers[l];
        let choice = Choice { experts: layer.experts, fanout: layer.fanout };
        json!({
            "layer": l,
            "experts": layer.experts,
            "fanout": layer.fanout,
            "rank": layer.rank,
            "scale": layer.scale,
            "width_below": layer.width_below,
            "width": layer.width,
            "active_nodes": layer.nodes,
            "active_experts": layer.nodes.min(layer.experts),
            "router_width": layer.router_width,
            "router_input": self.router_input(l),
            "sets_of_children": number(&choice.count()),
        })
    }

    fn flexibility_facts(&self) -> Value {
        let choices = self.choices();
        let mut facts = match flexibility::of(&self.shape) {
            Some((formula, gamma)) => {
                let mut facts = number(&gamma);
                facts["formula"] = json!(formula.name());
                facts
            }
            None => json!({"formula": null}),
        };
        let flat = self.flat();
        facts["smore"] = number(&flexibility::smore(&choices));
        facts["smore_star"] = number(&flexibility::smore_star(&choices));
        facts["momor_bound"] = number(&flexibility::momor_bound(&choices));
        facts["flat_mixture"] = number(&flexibility::flat_mixture(flat));
        facts["flat_mixture"]["experts"] = json!(flat.experts);
        facts["flat_mixture"]["fanout"] = json!(flat.fanout);
        facts
    }

    fn map_facts(&self, target: Target, spec: &SmoreSpec) -> Value {
        json!({
            "target": target.proj.name(),
            "d_in": spec.d_in,
            "d_out": spec.d_out,
            "blocks": target.blocks,
            "router_inputs": spec.layers.iter().map(|l| l.router_input).collect::<Vec<_>>(),
            "parameters": parameter_facts(Parameters::of(spec)),
            "active_parameters": active_parameters(spec),
            "equal_rank_lora_parameters": equal_rank_lora_parameters(spec),
            "delta": parameters_above_lora(spec),
            "delta_share": parameter_overhead(spec),
            "multiplications_per_token": multiplication_facts(Multiplications::of(spec)),
            "propagation_overhead": propagation_overhead(spec),
            "authors_statistics": self.author_stats(spec),
        })
    }

    fn total_facts(&self) -> Value {
        let [equal_rank, equal_parameters] =
            self.loras().map(|(rank, parameters)| json!({"rank": rank, "parameters": parameters}));
        json!({
            "parameters": parameter_facts(self.total(Parameters::of)),
            "active_parameters": self.total(active_parameters),
            "multiplications_per_token": multiplication_facts(self.total(Multiplications::of)),
            "authors_statistics": self.total(|m| self.author_stats(m)),
            "lora_of_equal_rank": equal_rank,
            "lora_of_equal_parameters": equal_parameters,
        })
    }
}

fn parameter_facts(parameters: Parameters) -> Value {
    let mut facts = json!(parameters);
    facts["experts"] = json!(parameters.experts());
    facts["router"] = json!(parameters.router());
    facts["total"] = json!(parameters.total());
    facts
}

fn multiplication_facts(counts: Multiplications) -> Value {
    let mut facts = json!(counts);
    facts["paper"] = json!(counts.paper());
    facts["total"] = json!(counts.total());
    facts
}

fn number(gamma: &Flexibility) -> Value {
    let exact = gamma.exact.as_ref().map(ToString::to_string);
    json!({"exact": exact, "ln": gamma.ln, "log10": gamma.log10()})
}
