//! How routers use their experts: counted in training, evaluation and generation, kept in Parquet,
//! judged while a run goes on, and compared with what comes later.
//!
//! `routing/steps-FIRST-LAST.parquet` in a run folder, `smore_routing.parquet` in an adapter's and
//! what `smore generate --routing` writes have the same columns, and a row for every expert under
//! every parent:
//!
//! | column | |
//! |---|---|
//! | `split` | `train`; `held_out` (an evaluation); `reference` (one sample, for [`drift`]); `generation` |
//! | `first_step`, `last_step` | the steps counted; for `reference` and `generation` the sample's number |
//! | `place` | module path of the adapted map, or of the FFN with MixLoRA |
//! | `tokens` | tokens counted there; there is no padding |
//! | `trees` | different trees at the place, exact below 256, then estimated to 6% |
//! | `layer` | S'MoRE layer, 0 at the leaves |
//! | `fanout` | f_l, children of a node |
//! | `parent` | expert of the layer above under which it stood; null at the top, where nodes have no one parent, and in `reference` |
//! | `expert` | the expert |
//! | `count` | nodes at which it stood |
//! | `weight` | sum of its gate weights there |

mod counts;
pub mod drift;
pub mod health;
mod page;
mod summary;
mod table;

pub(crate) use counts::tokens_of;
pub use counts::{Counts, Distinct, LayerCounts, PlaceCounts};
pub use page::page;
pub use summary::{LayerUsage, ParentInformation};
pub use table::{Split, Window, read, write};

use crate::data::Sample;
use crate::error::Result;
use crate::model::{Batch, Model};
use crate::sft::routers::{FOLDER, parts};
use serde_json::{Value, json};
use smore::kernel::Routing;
use smore_engine::Cpu;
use std::path::Path;

/// Everything counted in a run, in the order of its steps.
///
/// # Errors
/// If a part cannot be read; nothing where the run counted nothing.
pub fn read_run(run: &Path) -> Result<Vec<Window>> {
    let mut windows = Vec::new();
    for (part, _) in parts(&run.join(FOLDER))? {
        windows.extend(read(&part)?);
    }
    windows.sort_by_key(|w| (w.steps.1, w.split == Split::HeldOut));
    Ok(windows)
}

/// The trees of a batch's first tokens `ids` as lines of `traces.jsonl`, one for each place and
/// token, in the order of `places`, the paths of the adapters.
pub fn trace_lines(
    places: &[String],
    step: usize,
    ids: &[u32],
    routing: &[Option<Routing<f32>>],
) -> String {
    let mut lines = String::new();
    for (place, routing) in places.iter().zip(routing) {
        let Some(routing) = routing else { continue };
        let tokens = tokens_of(routing);
        for (token, id) in ids.iter().enumerate() {
            let layers = routing.tree.layers.iter().map(|layer| {
                let nodes = layer.expert_idx.len() / tokens;
                let own = token * nodes..(token + 1) * nodes;
                let (experts, weights) = (&layer.expert_idx[own.clone()], &layer.gate_weight[own]);
                json!({"experts": experts, "weights": weights})
            });
            let layers: Vec<Value> = layers.collect();
            let line =
                json!({"step": step, "token": token, "id": id, "place": place, "layers": layers});
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
    }
    lines
}

/// Samples that go through the model together.
const TOGETHER: usize = 32;

/// Counts over the tokens of `samples`, shown one sample at a time.
pub fn count_samples(model: &Model<Cpu<f32>>, samples: &[&Sample], mut each: impl FnMut(Counts)) {
    for chunk in samples.chunks(TOGETHER) {
        let mut batch = Batch::default();
        for sample in chunk {
            batch.push(sample.ids(), sample.trained());
        }
        let routing = model.routing(&batch);
        for &(start, len) in &batch.sequences {
            let mut counts = Counts::new(&model.adapters);
            counts.see_tokens(&routing, &(start..start + len));
            each(counts);
        }
    }
}

/// Usage of every layer of every routed adapter over the tokens of `samples`.
pub fn usage(model: &Model<Cpu<f32>>, samples: &[&Sample]) -> Vec<LayerUsage> {
    let mut all = Counts::new(&model.adapters);
    count_samples(model, samples, |one| all.add(&one));
    all.usage()
}
