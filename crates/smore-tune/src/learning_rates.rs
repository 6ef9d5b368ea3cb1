//! Which parameters learn at which share of the learning rate.

use crate::config::RouterLr;
use crate::inject::Adapters;
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::layout::RouterPart;
use std::ops::Range;

/// Runs of the parameter buffer and the factor on their learning rate; together they are all of it.
pub(crate) type Rates = Vec<(Range<usize>, f64)>;

/// The factors of everything trained, `len` numbers in all.
///
/// # Errors
/// A list that is not as long as the adapters have layers.
pub(crate) fn rates(adapters: &Adapters, routers: &RouterLr, len: usize) -> Result<Rates, String> {
    let mut rates: Rates = Vec::new();
    let mut put = |range: Range<usize>, factor: f64| match rates.last_mut() {
        Some((last, same)) if *same == factor => last.end = range.end,
        _ => rates.push((range, factor)),
    };
    for slot in &adapters.slots {
        if let (RouterLr::PerLayer(list), Some(layers)) = (routers, layers(&slot.adapter))
            && list.len() != layers
        {
            return Err(format!(
                "train.router_lr_multiplier has {} numbers, but the adapter on {} has {layers} \
                 layers; give one per layer, or one number for all",
                list.len(),
                slot.path()
            ));
        }
        for param in slot.params() {
            let start = slot.range.start + param.offset;
            put(start..start + param.len(), param.router().map_or(1.0, |part| of(routers, part)));
        }
    }
    if rates.is_empty() && len > 0 {
        rates.push((0..len, 1.0));
    }
    Ok(rates)
}

/// The layers whose routers learn apart; none where nothing is routed.
fn layers(adapter: &BlockAdapter) -> Option<usize> {
    match adapter {
        BlockAdapter::Map(AnyAdapter::Smore(a)) => Some(a.spec.depth()),
        BlockAdapter::Map(AnyAdapter::HydraLora(_)) | BlockAdapter::Ffn(_) => Some(1),
        BlockAdapter::Map(AnyAdapter::Lora(_)) => None,
    }
}

fn of(routers: &RouterLr, part: RouterPart) -> f64 {
    match (routers, part) {
        (RouterLr::All(factor), _) => *factor,
        (RouterLr::PerLayer(list), RouterPart::Layer(l)) => list[l],
        // It must learn as long as any layer's router does.
        (RouterLr::PerLayer(list), RouterPart::Shared) => list.iter().copied().fold(0.0, f64::max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdapterConfig;
    use crate::model::spec::DecoderSpec;

    fn adapters(config: serde_json::Value) -> Adapters {
        let spec = DecoderSpec::from_json(&serde_json::json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11
        }));
        let config: AdapterConfig = serde_json::from_value(config).unwrap();
        Adapters::new(&config, &spec.unwrap()).unwrap()
    }

    /// Names of the parameters that have each factor.
    fn named(adapters: &Adapters, routers: &RouterLr) -> Vec<(String, f64)> {
        let rates = rates(adapters, routers, adapters.len()).unwrap();
        assert_eq!(rates.first().unwrap().0.start, 0);
        assert_eq!(rates.last().unwrap().0.end, adapters.len());
        assert!(rates.windows(2).all(|w| w[0].0.end == w[1].0.start && w[0].1 != w[1].1));
        let slot = &adapters.slots[0];
        let of = |at: usize| rates.iter().find(|(range, _)| range.contains(&at)).unwrap().1;
        slot.params().iter().map(|p| (p.name.clone(), of(slot.range.start + p.offset))).collect()
    }

    #[test]
    fn routers_of_every_kind_are_found() {
        let layer = serde_json::json!({"experts": 3, "fanout": 2, "rank": 2});
        let smore = adapters(serde_json::json!({
            "kind": "smore", "layers": [layer, layer], "gate": {"kind": "noisy_topk",
            "activation": "prelu|0.2"}, "activation": "prelu|0.2"
        }));
        for (name, factor) in named(&smore, &RouterLr::PerLayer(vec![0.1, 0.2])) {
            let expected = match &name {
                n if n.starts_with("moe_gate.0.") => 0.1,
                n if n.starts_with("moe_gate.1.") || n.starts_with("moe_downproj_x.") => 0.2,
                _ => 1.0,
            };
            assert_eq!(factor, expected, "{name}");
        }
        let only = |config, router: &str| {
            for (name, factor) in named(&adapters(config), &RouterLr::All(0.5)) {
                assert_eq!(factor, if name == router { 0.5 } else { 1.0 }, "{name}");
            }
        };
        only(serde_json::json!({"kind": "hydra_lora", "heads": 2, "rank": 2}), "lora_route.weight");
        only(
            serde_json::json!({"kind": "mix_lora", "experts": 2, "fanout": 1, "rank": 2}),
            "mlp.moe_gate.weight",
        );
    }

    #[test]
    fn a_list_of_another_length_is_refused() {
        let layer = serde_json::json!({"experts": 3, "fanout": 2, "rank": 2});
        let smore = adapters(serde_json::json!({"kind": "smore", "layers": [layer, layer]}));
        let error = rates(&smore, &RouterLr::PerLayer(vec![1.0]), smore.len()).unwrap_err();
        assert!(error.contains("has 1 numbers") && error.contains("has 2 layers"), "{error}");
    }
}
