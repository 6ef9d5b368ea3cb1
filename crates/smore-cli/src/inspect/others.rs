//! Plain LoRA, and training without an adapter.

use super::{Base, Subject, Target};
use crate::table::{self, count};
use serde_json::{Map, Value, json};
use smore::adapter::{AnyAdapter, BlockAdapter};
use smore::config::LoraConfig;
use smore::counting::{Multiplications, lora_parameters};
use smore::spec::{FfnShape, HydraLoraSpec, LoraSpec, MixLoraSpec};
use smore_engine::GateActivation;
use smore_tune::config::AdapterConfig;
use smore_tune::error::Error;
use smore_tune::inject::{Adapters, Site, Slot};
use smore_tune::model::spec::Proj;

/// LoRA on the maps of a model, or on none.
pub(super) struct Lora {
    rank: usize,
    targets: Vec<Target>,
    /// Maps that are alike, and in how many blocks; ranks may differ from block to block.
    maps: Vec<(Proj, LoraSpec, usize)>,
}

impl Lora {
    pub(super) fn new(
        subject: &Subject,
        config: &LoraConfig,
        base: Option<&Base>,
    ) -> Result<Self, Error> {
        let wrong = |e: smore::Error| subject.error(format!("adapter.{e}"));
        let LoraSpec { rank, .. } = LoraSpec::new(config, 1, 1).map_err(wrong)?;
        let targets = subject.targets(&config.targets, base)?;
        let mut maps: Vec<(Proj, LoraSpec, usize)> = Vec::new();
        if let Some(base) = base {
            let adapters = Adapters::stored(&AdapterConfig::Lora(config.clone()), &[], &base.spec)
                .map_err(|message| subject.error(format!("adapter.{message}")))?;
            for slot in &adapters.slots {
                let Site::Map(proj) = slot.site else { continue };
                let BlockAdapter::Map(AnyAdapter::Lora(lora)) = &slot.adapter else { continue };
                match maps.iter_mut().find(|(p, spec, _)| (*p, *spec) == (proj, lora.spec)) {
                    Some((.., blocks)) => *blocks += 1,
                    None => maps.push((proj, lora.spec, 1)),
                }
            }
            maps.sort_by_key(|(proj, ..)| *proj);
        }
        Ok(Self { rank, targets, maps })
    }

    fn parameters(&self) -> usize {
        self.maps.iter().map(|(_, spec, blocks)| lora_parameters(spec) * blocks).sum()
    }

    pub(super) fn facts(&self) -> Map<String, Value> {
        let map = |(target, spec, blocks): &(Proj, LoraSpec, usize)| {
            json!({
                "target": target.name(), "d_in": spec.d_in, "d_out": spec.d_out,
                "blocks": blocks, "rank": spec.rank, "scale": spec.scale,
                "parameters": {"total": lora_parameters(spec)},
            })
        };
        let total = (!self.maps.is_empty()).then(|| {
            // Every parameter is one multiplication.
            let n = self.parameters();
            json!({"parameters": {"total": n}, "multiplications_per_token": {"total": n}})
        });
        let facts = json!({
            "structure": {"rank": self.rank},
            "targets": self.targets.iter().map(|t| t.proj.name()).collect::<Vec<_>>(),
            "maps": self.maps.iter().map(map).collect::<Vec<_>>(),
            "total": total,
        });
        facts.as_object().cloned().unwrap_or_default()
    }

    pub(super) fn print(&self) {
        let names: Vec<_> = self.targets.iter().map(|t| t.proj.name()).collect();
        println!("LoRA of rank {} on {}", self.rank, names.join(", "));
        if self.maps.is_empty() {
            return;
        }
        let row = |(target, spec, blocks): &(Proj, LoraSpec, usize)| {
            let one = lora_parameters(spec);
            vec![
                target.name().into(),
                format!("{} \u{2192} {}", count(spec.d_in), count(spec.d_out)),
                count(spec.rank),
                count(*blocks),
                count(one),
                count(one * blocks),
            ]
        };
        let mut rows: Vec<_> = self.maps.iter().map(row).collect();
        let empty = std::iter::repeat_n(String::new(), 4);
        rows.push(
            std::iter::once("all".into()).chain(empty).chain([count(self.parameters())]).collect(),
        );
        println!();
        let header = ["on", "width", "rank", "blocks", "parameters", "in all blocks"];
        table::print(&header, &rows);
    }
}

/// HydraLoRA and MixLoRA: what they are, and what they cost on a model.
pub(super) fn mixture(
    subject: &Subject,
    base: Option<&Base>,
    quiet: bool,
) -> Result<Map<String, Value>, Error> {
    let wrong = |message: String| subject.error(format!("adapter.{message}"));
    let (title, parts) = match &subject.config {
        AdapterConfig::HydraLora(c) => {
            HydraLoraSpec::new(c, 1, 1).map_err(|e| wrong(e.to_string()))?;
            ("HydraLoRA", json!({"heads": c.heads, "rank": c.rank}))
        }
        AdapterConfig::MixLora(c) => {
            let (hidden, intermediate) = (1, 1);
            let (activation, adapted) = (GateActivation::Silu, [true; 3]);
            let ffn = FfnShape { hidden, intermediate, activation, adapted };
            MixLoraSpec::new(c, ffn).map_err(|e| wrong(e.to_string()))?;
            ("MixLoRA", json!({"experts": c.experts, "fanout": c.fanout, "rank": c.rank}))
        }
        _ => unreachable!("asked of mixtures only"),
    };
    let adapters = base.map(|base| {
        let stored = Adapters::stored(&subject.config, &[], &base.spec);
        stored.map_err(|message| subject.error(format!("adapter.{message}")))
    });
    let adapters = adapters.transpose()?;
    let total = adapters.as_ref().map(|adapters| {
        let compute: Multiplications = adapters.slots.iter().map(multiplications).sum();
        json!({"parameters": {"total": adapters.len()},
            "multiplications_per_token": {"total": compute.total()}})
    });
    if !quiet {
        let of: Vec<_> =
            parts.as_object().into_iter().flatten().map(|(k, v)| format!("{k} {v}")).collect();
        println!("{title}: {}", of.join(", "));
        if let (Some(adapters), Some(total)) = (&adapters, &total) {
            let n = |key: &str| count(total[key]["total"].as_u64().unwrap_or(0) as usize);
            let rows = [
                vec!["adapted places".into(), count(adapters.slots.len())],
                vec!["trained parameters".into(), n("parameters")],
                vec!["multiplications per token".into(), n("multiplications_per_token")],
            ];
            println!();
            table::print(&["in all blocks", "number"], &rows);
        }
    }
    let facts = json!({"structure": parts, "total": total});
    Ok(facts.as_object().cloned().unwrap_or_default())
}

fn multiplications(slot: &Slot) -> Multiplications {
    match &slot.adapter {
        BlockAdapter::Map(AnyAdapter::HydraLora(a)) => Multiplications::of_hydra_lora(&a.spec),
        BlockAdapter::Ffn(a) => Multiplications::of_mix_lora(&a.spec),
        BlockAdapter::Map(AnyAdapter::Lora(a)) => {
            Multiplications { projection: lora_parameters(&a.spec), ..Multiplications::default() }
        }
        BlockAdapter::Map(AnyAdapter::Smore(a)) => Multiplications::of(&a.spec),
    }
}

/// Training of the base itself.
pub(super) fn full(base: Option<&Base>, quiet: bool) -> Map<String, Value> {
    let parameters = base.and_then(Base::parameters);
    if !quiet {
        let number = parameters.map_or_else(String::new, |n| format!(": {} parameters", count(n)));
        println!("no adapter, the base itself is trained{number}");
    }
    let total = parameters.map(|n| json!({"parameters": {"total": n}}));
    Map::from_iter([("total".to_owned(), json!(total))])
}
