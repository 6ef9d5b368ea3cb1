//! Where a number that is none comes from.

use super::windows::Window;
use crate::checkpoint::{Settings, write};
use crate::data::Sample;
use crate::error::{Error, Result};
use crate::model::{Batch, Model};
use serde_json::json;
use smore::adapter::Mode;
use smore_engine::Cpu;
use std::path::Path;

/// The error of a step whose loss or gradient is not finite. Names the step, the first place that
/// is not finite and the samples, and keeps the batch in the run folder.
///
/// # Errors
/// If the batch cannot be written.
pub(super) fn not_finite(
    what: &str,
    (step, run): (usize, &Path),
    settings: &Settings,
    model: &Model<Cpu<f32>>,
    grads: &[f32],
    (samples, window): (&[Sample], &Window),
) -> Result<Error> {
    let indices: Vec<usize> = window.micro_batches.concat();
    let parameter = first_tensor(settings, model, model.params());
    let block = window.micro_batches.iter().find_map(|b| first_block(model, samples, b));
    let gradient = first_tensor(settings, model, grads);
    let place = if let Some(name) = &parameter {
        format!("the parameter `{name}` itself is not finite")
    } else if let Some(block) = &block {
        format!("the first place that is not finite is {block}, with finite parameters")
    } else if let Some(name) = &gradient {
        format!("the forward pass is finite; the gradient of `{name}` is not")
    } else {
        "every tensor is finite, but their sum of squares is not".to_owned()
    };
    let origin = |i: &usize| {
        let origin = &samples[*i].origin;
        format!("{}:{}", origin.file.display(), origin.line)
    };
    let origins: Vec<String> = indices.iter().map(origin).collect();
    let file = run.join(format!("not-finite-step-{step}.json"));
    let kept: Vec<_> = indices
        .iter()
        .map(|&i| {
            let (ids, trained) = (samples[i].ids(), samples[i].trained());
            json!({ "origin": origin(&i), "input_ids": ids, "trained": trained })
        })
        .collect();
    let record = json!({
        "step": step, "what": what, "parameter": parameter, "block": block, "gradient": gradient,
        "micro_batches": window.micro_batches.iter().map(Vec::len).collect::<Vec<_>>(),
        "samples": kept,
    });
    write(&file, format!("{record:#}\n").as_bytes())?;
    Ok(Error::Run(format!(
        "{what} at step {step}; {place}; the batch is kept in {}: {}; lower train.learning_rate, \
         or look at these samples",
        file.display(),
        origins.join(", ")
    )))
}

/// Name of the first tensor, in the order of blocks, with a value that is not finite.
fn first_tensor(settings: &Settings, model: &Model<Cpu<f32>>, values: &[f32]) -> Option<String> {
    let bad = |values: &[f32]| values.iter().any(|x| !x.is_finite());
    if model.weights.is_trained() {
        let mut rest = values;
        return model.spec.tensors().into_iter().find_map(|(name, shape)| {
            let (own, behind) = rest.split_at(shape.iter().product());
            rest = behind;
            bad(own).then_some(name)
        });
    }
    model.adapters.slots.iter().find_map(|slot| {
        let values = &values[slot.range.clone()];
        let param = slot.params().iter().find(|param| bad(&values[param.range()]))?;
        Some(settings.stored_name(slot, param))
    })
}

/// The first block whose output is not finite, in a forward pass without noise.
fn first_block(model: &Model<Cpu<f32>>, samples: &[Sample], indices: &[usize]) -> Option<String> {
    let mut batch = Batch::default();
    for &i in indices {
        batch.push(samples[i].ids(), samples[i].trained());
    }
    let bad = |x: &[f32]| x.iter().any(|x| !x.is_finite());
    let mut x = model.embedded(&batch);
    if bad(&x) {
        return Some("the token embeddings".into());
    }
    for b in 0..model.spec.blocks {
        model.run_block(b, &mut x, &batch, Mode::plain());
        if bad(&x) {
            return Some(format!("the output of block {b}"));
        }
    }
    model.losses(&batch).iter().any(|x| !x.is_finite()).then(|| "the output head".into())
}
