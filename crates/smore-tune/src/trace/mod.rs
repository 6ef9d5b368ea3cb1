//! Which experts act on which tokens, how strongly, and what an answer loses without them.
//!
//! A [`Trace`] holds the residual trees of a text at every routed place. As JSONL it begins with a
//! line of `kind` `text` (`tokens`: id and text of each) and then has a line for every place and
//! token:
//!
//! | field | |
//! |---|---|
//! | `place` | module path of the adapted map, or of the FFN with MixLoRA |
//! | `token` | index into `tokens` |
//! | `layers` | per S'MoRE layer, leaves first; nodes in the order of [`smore::tree::ResidualTree`] |
//! | `layers[].experts` | expert at each node |
//! | `layers[].weights` | its gate weight under its parent |
//! | `layers[].contributions` | norm of the change of the adapter's output without the node and what hangs below it ([`smore::kernel::contributions`]); absent for HydraLoRA and MixLoRA |

mod ablate;
mod page;

pub use ablate::{Effect, ablate, removals};
pub use page::page;

use crate::error::{Error, Result};
use crate::model::{Batch, Model};
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use smore_engine::Cpu;
use std::io::Write;

/// The trees of a text.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Every routed place, in the order of the adapters.
    pub places: Vec<Place>,
}

/// A token.
#[derive(Clone, Debug, Serialize)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
}

/// One place.
#[derive(Clone, Debug)]
pub struct Place {
    /// Module path.
    pub path: String,
    /// Per S'MoRE layer, leaves first.
    pub layers: Vec<Layer>,
}

/// One layer of a place, for every token.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// `[tokens * nodes]`
    pub experts: Vec<u16>,
    /// `[tokens * nodes]`
    pub weights: Vec<f32>,
    /// `[tokens * nodes]`, for S'MoRE.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contributions: Option<Vec<f64>>,
}

impl Layer {
    /// The nodes of token `t` of `n`.
    fn token(&self, t: usize, n: usize) -> Self {
        let nodes = self.experts.len() / n;
        let own = t * nodes..(t + 1) * nodes;
        Self {
            experts: self.experts[own.clone()].to_vec(),
            weights: self.weights[own.clone()].to_vec(),
            contributions: self.contributions.as_ref().map(|c| c[own].to_vec()),
        }
    }
}

impl Trace {
    /// Traces a text.
    ///
    /// # Errors
    /// If the model has no routed adapter, or a token's text cannot be had.
    pub fn of(model: &Model<Cpu<f32>>, tokenizer: &Tokenizer, batch: &Batch) -> Result<Self> {
        let mut places = Vec::new();
        model.traced(batch, |slot, routing, contributions| {
            let mut contributions = contributions.into_iter().flatten();
            let layers = routing.tree.layers.iter().map(|layer| Layer {
                experts: layer.expert_idx.clone(),
                weights: layer.gate_weight.clone(),
                contributions: contributions.next(),
            });
            places.push(Place { path: slot.path(), layers: layers.collect() });
        });
        if places.is_empty() {
            return Err(Error::Run(
                "the adapter has no router, so there is no tree to trace; give an adapter of kind \
                 smore, hydra_lora or mix_lora"
                    .into(),
            ));
        }
        let token = |i| {
            let text = text_in_place(&batch.ids, i, tokenizer)?;
            Ok(Token { id: batch.ids[i], text })
        };
        Ok(Self { tokens: (0..batch.ids.len()).map(token).collect::<Result<_>>()?, places })
    }

    /// Writes it as JSONL.
    ///
    /// # Errors
    /// If writing fails.
    pub fn write_jsonl(&self, out: &mut impl Write) -> std::io::Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            place: &'a str,
            token: usize,
            layers: Vec<Layer>,
        }
        let head = serde_json::json!({"kind": "text", "tokens": self.tokens});
        writeln!(out, "{head}")?;
        let n = self.tokens.len();
        for place in &self.places {
            for token in 0..n {
                let layers = place.layers.iter().map(|l| l.token(token, n)).collect();
                let line = Line { place: &place.path, token, layers };
                writeln!(out, "{}", serde_json::to_string(&line)?)?;
            }
        }
        Ok(())
    }
}

/// What token `i` adds to the text: a token by itself loses the space in front of it.
fn text_in_place(ids: &[u32], i: usize, tokenizer: &Tokenizer) -> Result<String> {
    let alone = tokenizer.decode(&ids[i..=i], false)?;
    if i == 0 {
        return Ok(alone);
    }
    let (before, both) =
        (tokenizer.decode(&ids[i - 1..i], false)?, tokenizer.decode(&ids[i - 1..=i], false)?);
    Ok(both.strip_prefix(&before).map_or(alone, str::to_owned))
}
