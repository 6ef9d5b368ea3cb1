//! Which adapter sits on which linear map, and where its parameters lie.

use crate::config::AdapterConfig;
use crate::error::Error;
use crate::model::spec::{DecoderSpec, Proj};
use crate::targets::{self, Unknown};
use smore::adapter::{Adapter, AnyAdapter, Lora, NoiseKey, Smore};
use smore::config::{LoraConfig, SmoreConfig};
use smore::rng::{Purpose, stream};
use smore::spec::{LoraSpec, SmoreSpec};
use std::ops::Range;

/// One adapter on one linear map.
pub struct Slot {
    /// Block of the map.
    pub block: usize,
    /// The map.
    pub proj: Proj,
    /// What computes.
    pub adapter: AnyAdapter,
    /// Its run of the parameter buffer.
    pub range: Range<usize>,
    /// Its number, in order.
    pub place: usize,
}

impl Slot {
    /// Module path of the map, such as `model.layers.0.mlp.gate_proj`.
    pub fn path(&self) -> String {
        self.proj.path(self.block)
    }

    /// The key of this slot's random numbers in a step.
    pub(crate) fn noise(&self, key: NoiseKey) -> NoiseKey {
        NoiseKey { place: self.place as u64, ..key }
    }

    /// Its parameters' names and shapes.
    pub fn params(&self) -> &[smore::layout::Param] {
        self.adapter.params()
    }
}

/// All adapters of a model; their parameters lie one after the other in one buffer.
pub struct Adapters {
    /// In order of block and [`Proj`].
    pub slots: Vec<Slot>,
    /// `[block][proj]`: index into `slots`.
    index: Vec<[Option<usize>; 7]>,
}

impl Adapters {
    /// A model without adapters.
    pub fn none(spec: &DecoderSpec) -> Self {
        Self { slots: Vec::new(), index: vec![[None; 7]; spec.blocks] }
    }

    /// Puts the configured adapter on every map that its targets choose.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn new(config: &AdapterConfig, spec: &DecoderSpec) -> std::result::Result<Self, String> {
        Self::build(config, None, spec).map_err(|e| format!("adapter.{e}"))
    }

    /// As [`Adapters::new`] for the settings of an adapter's file: with a router width for every
    /// layer of S'MoRE, and with targets that may name modules of other models too.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn stored(
        config: &AdapterConfig,
        router_widths: &[usize],
        spec: &DecoderSpec,
    ) -> std::result::Result<Self, String> {
        Self::build(config, Some(router_widths), spec)
    }

    fn build(
        config: &AdapterConfig,
        stored_widths: Option<&[usize]>,
        spec: &DecoderSpec,
    ) -> std::result::Result<Self, String> {
        let mut adapters = Self::none(spec);
        let targets = match config {
            AdapterConfig::Smore(c) => &c.targets,
            AdapterConfig::Lora(c) => &c.targets,
            AdapterConfig::Full(_) => return Ok(adapters),
        };
        let unknown = if stored_widths.is_some() { Unknown::Pass } else { Unknown::Refuse };
        for (block, proj) in targets::resolve(targets, spec.blocks, unknown)? {
            let (d_out, d_in) = spec.shape(proj);
            let adapter = match config {
                AdapterConfig::Smore(c) => AnyAdapter::Smore(smore(c, stored_widths, d_in, d_out)?),
                AdapterConfig::Lora(c) => {
                    AnyAdapter::Lora(lora(c, &proj.path(block), d_in, d_out)?)
                }
                AdapterConfig::Full(_) => unreachable!("has no targets"),
            };
            adapters.put(block, proj, adapter);
        }
        Ok(adapters)
    }

    fn put(&mut self, block: usize, proj: Proj, adapter: AnyAdapter) {
        let (place, start) = (self.slots.len(), self.len());
        let range = start..start + adapter.len();
        self.index[block][proj as usize] = Some(place);
        self.slots.push(Slot { block, proj, adapter, range, place });
    }

    /// The adapter on a map, if there is one.
    pub fn at(&self, block: usize, proj: Proj) -> Option<&Slot> {
        self.index[block][proj as usize].map(|i| &self.slots[i])
    }

    /// Number of trained parameters.
    pub fn len(&self) -> usize {
        self.slots.last().map_or(0, |s| s.range.end)
    }

    /// True for a bare model.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The first block with an adapter; the number of blocks where there is none.
    pub fn lowest_block(&self) -> usize {
        self.slots.first().map_or(self.index.len(), |s| s.block)
    }

    /// Starting values of all parameters.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.len());
        for slot in &self.slots {
            let mut rng = stream(seed, Purpose::AdapterInit, 0, slot.place as u64);
            values.extend(slot.adapter.init(&mut rng));
        }
        values
    }
}

fn smore(
    config: &SmoreConfig,
    stored_widths: Option<&[usize]>,
    d_in: usize,
    d_out: usize,
) -> std::result::Result<Smore, String> {
    let spec = match stored_widths {
        // What a file holds can be run though it might not be trained.
        Some(widths) if widths.iter().any(|&w| w != config.gate.router_width) => {
            SmoreSpec::with_router_widths(config, widths, d_in, d_out)
        }
        _ => SmoreSpec::new(config, d_in, d_out),
    };
    spec.map(Smore::new).map_err(|e| e.to_string())
}

/// A LoRA with the rank and alpha of the module at `path`.
fn lora(
    config: &LoraConfig,
    path: &str,
    d_in: usize,
    d_out: usize,
) -> std::result::Result<Lora, String> {
    let mut own = config.clone();
    if let Some(rank) = targets::pattern_value(&config.rank_pattern, path)? {
        own.rank = rank;
    }
    if let Some(alpha) = targets::pattern_value(&config.alpha_pattern, path)? {
        own.alpha = Some(alpha);
    }
    LoraSpec::new(&own, d_in, d_out).map(Lora::new).map_err(|e| e.to_string())
}

/// The message of [`Adapters::new`] as an error of the config `file`.
pub fn config_error(file: &str, message: String) -> Error {
    Error::Config { file: file.to_owned(), message }
}
