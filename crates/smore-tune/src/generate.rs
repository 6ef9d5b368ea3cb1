//! Text generation, token by token, with the forward pass that training uses.

use crate::error::{Error, Result};
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use smore::kernel::Routing;
use smore::rng::{Purpose, stream};
use smore_engine::Cpu;

/// How the next token is picked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 always takes the likeliest token; 1 samples from the model's distribution.
    pub temperature: f64,
    /// Only the likeliest tokens that together reach this probability are sampled from.
    pub top_p: f64,
    /// Only this many of the likeliest tokens are sampled from; 0 means all.
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model wrote an end token.
    Stop,
    /// The limit of new tokens or the model's positions were reached.
    Length,
}

/// A finished generation.
#[derive(Clone, Debug, Serialize)]
pub struct Generated {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens, without the end token.
    pub ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Continues `prompt` by at most `max_new_tokens`, calling `piece` with text as it becomes whole.
///
/// # Errors
/// If the prompt is empty or longer than the model's context.
pub fn generate(
    model: &Model<Cpu<f32>>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    piece: impl FnMut(&str),
) -> Result<Generated> {
    generate_routed(model, tokenizer, prompt, max_new_tokens, sampling, piece, |_| {})
}

/// As [`generate`], showing `routed` the routing of every run of tokens that the model reads, in
/// the order of the adapters: first the prompt, then each new token but the last.
///
/// # Errors
/// As [`generate`].
pub fn generate_routed(
    model: &Model<Cpu<f32>>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    mut piece: impl FnMut(&str),
    mut routed: impl FnMut(&[Option<Routing<f32>>]),
) -> Result<Generated> {
    if prompt.is_empty() {
        return Err(Error::Run("the prompt has no token; give a text to continue".into()));
    }
    if prompt.len() > model.context {
        return Err(Error::Run(format!(
            "the prompt has {} tokens, the model takes {}; shorten it",
            prompt.len(),
            model.context
        )));
    }
    let mut cache = model.cache();
    let mut stream = tokenizer.stream();
    let mut out = Generated {
        prompt_tokens: prompt.len(),
        ids: Vec::new(),
        text: String::new(),
        finish_reason: FinishReason::Length,
    };
    let mut pending = prompt.to_vec();
    while out.ids.len() < max_new_tokens && cache.len() + pending.len() <= model.context {
        let (logits, routing) = model.extend_routed(&pending, &mut cache);
        routed(&routing);
        let id = pick(&logits, sampling, out.ids.len());
        if tokenizer.stop_ids().contains(&id) {
            out.finish_reason = FinishReason::Stop;
            break;
        }
        out.ids.push(id);
        if let Some(text) = stream.push(id)? {
            piece(&text);
            out.text.push_str(&text);
        }
        pending = vec![id];
    }
    if let Some(text) = stream.finish()? {
        piece(&text);
        out.text.push_str(&text);
    }
    Ok(out)
}

/// The next token; of equally likely ones the lowest.
fn pick(logits: &[f32], sampling: Sampling, position: usize) -> u32 {
    if sampling.temperature <= 0.0 {
        return likeliest(logits);
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |i: u32| f64::from(logits[i as usize]);
    order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let top = logit(order[0]);
    let weights: Vec<f64> =
        order.iter().map(|&i| ((logit(i) - top) / sampling.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let mut count = 0;
    for w in &weights {
        kept += w;
        count += 1;
        if kept >= sampling.top_p * total {
            break;
        }
    }
    let mut rng = stream(sampling.seed, Purpose::Sampling, position as u64, 0);
    let mut left = rng.random::<f64>() * kept;
    for (&i, w) in order.iter().zip(&weights).take(count) {
        left -= w;
        if left < 0.0 {
            return i;
        }
    }
    order[count - 1]
}

/// The likeliest token; of equally likely ones the lowest.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let better = |a: u32, b: u32| if logits[b as usize] > logits[a as usize] { b } else { a };
    (0..logits.len() as u32).reduce(better).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 3.0];

    fn drawn(temperature: f64, top_p: f64, top_k: usize) -> Vec<u32> {
        let sampling = |seed| Sampling { temperature, top_p, top_k, seed };
        let mut seen: Vec<u32> = (0..400).map(|s| pick(&LOGITS, sampling(s), 0)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        assert_eq!(drawn(0.0, 1.0, 0), [1]);
    }

    #[test]
    fn limits_keep_only_the_likeliest() {
        assert_eq!(drawn(1.0, 1.0, 0), [0, 1, 2, 3]);
        assert_eq!(drawn(1.0, 1.0, 2), [1, 3]);
        assert_eq!(drawn(1.0, 0.5, 0), [1, 3]);
        assert_eq!(drawn(1.0, 1.0, 1), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampling = |seed| Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed };
        let hits = (0..4000).filter(|&s| pick(&LOGITS, sampling(s), 7) == 2).count();
        let total: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = 4000.0 * 2f64.exp() / total;
        assert!((hits as f64 - expected).abs() < 5.0 * expected.sqrt(), "{hits} of {expected}");
    }
}
