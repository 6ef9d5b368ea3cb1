//! Plain LoRA, and training without an adapter.

use super::{Base, Subject};
use crate::table::{self, count};
use serde_json::{Map, Value, json};
use smore::config::LoraConfig;
use smore::counting::lora_parameters;
use smore::spec::LoraSpec;
use smore_tune::error::Error;
use smore_tune::model::spec::Proj;

/// LoRA on the maps of a model, or on none.
pub(super) struct Lora {
    rank: usize,
    targets: Vec<Proj>,
    maps: Vec<LoraSpec>,
    blocks: usize,
}

impl Lora {
    pub(super) fn new(
        subject: &Subject,
        config: &LoraConfig,
        base: Option<&Base>,
    ) -> Result<Self, Error> {
        let targets = subject.projs(&config.targets)?;
        let spec = |(d_in, d_out)| {
            LoraSpec::new(config, d_in, d_out).map_err(|e| subject.error(format!("adapter.{e}")))
        };
        let LoraSpec { rank, .. } = spec((1, 1))?;
        let maps = base.map_or(Ok(vec![]), |base| {
            targets.iter().map(|&proj| spec(base.widths(proj))).collect::<Result<Vec<_>, _>>()
        })?;
        Ok(Self { rank, targets, maps, blocks: base.map_or(0, |b| b.spec.blocks) })
    }

    fn parameters(&self) -> usize {
        self.maps.iter().map(lora_parameters).sum::<usize>() * self.blocks
    }

    pub(super) fn facts(&self) -> Map<String, Value> {
        let map = |(target, spec): (&Proj, &LoraSpec)| {
            json!({
                "target": target.name(), "d_in": spec.d_in, "d_out": spec.d_out,
                "blocks": self.blocks,
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
            "targets": self.targets.iter().map(|t| t.name()).collect::<Vec<_>>(),
            "maps": self.targets.iter().zip(&self.maps).map(map).collect::<Vec<_>>(),
            "total": total,
        });
        facts.as_object().cloned().unwrap_or_default()
    }

    pub(super) fn print(&self) {
        let names: Vec<_> = self.targets.iter().map(|t| t.name()).collect();
        println!("LoRA of rank {} on {} of every block", self.rank, names.join(", "));
        if self.maps.is_empty() {
            return;
        }
        let row = |(target, spec): (&Proj, &LoraSpec)| {
            let one = lora_parameters(spec);
            vec![
                target.name().into(),
                format!("{} \u{2192} {}", count(spec.d_in), count(spec.d_out)),
                count(one),
                count(one * self.blocks),
            ]
        };
        let mut rows: Vec<_> = self.targets.iter().zip(&self.maps).map(row).collect();
        rows.push(vec!["all".into(), String::new(), String::new(), count(self.parameters())]);
        println!();
        table::print(&["on", "width", "parameters", "in all blocks"], &rows);
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
