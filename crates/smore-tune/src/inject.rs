//! Which adapter sits where in a decoder, and where its parameters lie.

use crate::config::AdapterConfig;
use crate::error::Error;
use crate::model::spec::{DecoderSpec, Proj};
use crate::targets::{self, Unknown};
use smore::adapter::{
    Adapter, AnyAdapter, BlockAdapter, HydraLora, InputDropout, Lora, MixLora, Mode, Noise,
    NoiseKey, Smore,
};
use smore::config::{LoraConfig, MixLoraConfig, SmoreConfig};
use smore::layout::Param;
use smore::rng::{Purpose, stream};
use smore::spec::{FfnShape, HydraLoraSpec, LoraSpec, MixLoraSpec, SmoreSpec};
use std::ops::Range;

type Built<T> = std::result::Result<T, String>;

/// One adapter in one block.
pub struct Slot {
    /// The block.
    pub block: usize,
    /// Where in the block.
    pub site: Site,
    /// What computes.
    pub adapter: BlockAdapter,
    /// Its run of the parameter buffer.
    pub range: Range<usize>,
    /// Its number, in order.
    pub place: usize,
}

/// Where in a block an adapter sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// On a linear map.
    Map(Proj),
    /// In the FFN as a whole.
    Ffn,
}

impl Slot {
    /// Module path of what is adapted, such as `model.layers.0.mlp.gate_proj`.
    pub fn path(&self) -> String {
        match self.site {
            Site::Map(proj) => proj.path(self.block),
            Site::Ffn => format!("model.layers.{}.mlp", self.block),
        }
    }

    /// Path of one of its parameters.
    pub fn param_path(&self, param: &str) -> String {
        match self.site {
            Site::Map(proj) => format!("{}.{param}", proj.path(self.block)),
            // Its names begin with the module in the block.
            Site::Ffn => format!("model.layers.{}.{param}", self.block),
        }
    }

    /// This slot's share of the noise of a step.
    pub(crate) fn noise<'a>(&self, noise: Noise<'a>) -> Noise<'a> {
        match noise {
            Noise::Drawn(key) => Noise::Drawn(NoiseKey { place: self.place as u64, ..key }),
            Noise::Given(slots) => Noise::Given(&slots[self.place..]),
        }
    }

    /// A pass as this slot sees it.
    pub(crate) fn mode<'a>(&self, mode: Mode<'a>) -> Mode<'a> {
        let place = self.place as u64;
        let own = |d: InputDropout| InputDropout { key: NoiseKey { place, ..d.key }, ..d };
        let noise = mode.noise.map(|noise| self.noise(noise));
        let removed = mode.removed.filter(|removed| removed.place == place);
        Mode { noise, dropout: mode.dropout.map(own), removed, ..mode }
    }

    /// Its parameters' names and shapes.
    pub fn params(&self) -> &[Param] {
        self.adapter.params()
    }
}

/// All adapters of a model; their parameters lie one after the other in one buffer.
pub struct Adapters {
    /// In order of block; in a block maps in the order of [`Proj`], then the FFN as a whole.
    pub slots: Vec<Slot>,
    /// `[block][proj]`: index into `slots`; the last is the FFN's.
    index: Vec<[Option<usize>; 8]>,
}

const FFN: usize = 7;

impl Adapters {
    /// A model without adapters.
    pub fn none(spec: &DecoderSpec) -> Self {
        Self { slots: Vec::new(), index: vec![[None; 8]; spec.blocks] }
    }

    /// Puts the configured adapter wherever its targets say.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn new(config: &AdapterConfig, spec: &DecoderSpec) -> Built<Self> {
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
    ) -> Built<Self> {
        Self::build(config, Some(router_widths), spec)
    }

    fn build(
        config: &AdapterConfig,
        stored_widths: Option<&[usize]>,
        spec: &DecoderSpec,
    ) -> Built<Self> {
        let mut adapters = Self::none(spec);
        let Some(targets) = config.targets() else { return Ok(adapters) };
        let unknown = if stored_widths.is_some() { Unknown::Pass } else { Unknown::Refuse };
        let maps = targets::resolve(targets, spec.blocks, unknown)?;
        for in_block in maps.chunk_by(|a, b| a.0 == b.0) {
            let (block, mut ffn) = (in_block[0].0, [false; 3]);
            for &(_, proj) in in_block {
                let (d_out, d_in) = spec.shape(proj);
                let adapter = match config {
                    AdapterConfig::Smore(c) => {
                        AnyAdapter::Smore(smore(c, stored_widths, d_in, d_out)?)
                    }
                    AdapterConfig::Lora(c) => {
                        AnyAdapter::Lora(lora(c, &proj.path(block), d_in, d_out)?)
                    }
                    AdapterConfig::HydraLora(c) => {
                        let spec = HydraLoraSpec::new(c, d_in, d_out).map_err(|e| e.to_string())?;
                        AnyAdapter::HydraLora(HydraLora::new(spec))
                    }
                    AdapterConfig::MixLora(_) if proj >= Proj::Gate => {
                        ffn[proj as usize - Proj::Gate as usize] = true;
                        continue;
                    }
                    AdapterConfig::MixLora(c) => {
                        let c = LoraConfig { alpha: c.alpha, ..LoraConfig::new(c.rank) };
                        AnyAdapter::Lora(lora(&c, &proj.path(block), d_in, d_out)?)
                    }
                    AdapterConfig::Saved(_) | AdapterConfig::Full(_) => {
                        unreachable!("has no targets")
                    }
                };
                adapters.put(block, Site::Map(proj), BlockAdapter::Map(adapter));
            }
            if let AdapterConfig::MixLora(c) = config {
                adapters.put(block, Site::Ffn, BlockAdapter::Ffn(mix_lora(c, ffn, spec)?));
            }
        }
        Ok(adapters)
    }

    fn put(&mut self, block: usize, site: Site, adapter: BlockAdapter) {
        let (place, start) = (self.slots.len(), self.len());
        let range = start..start + adapter.len();
        let column = match site {
            Site::Map(proj) => proj as usize,
            Site::Ffn => FFN,
        };
        self.index[block][column] = Some(place);
        self.slots.push(Slot { block, site, adapter, range, place });
    }

    /// The adapter on a map, if there is one.
    pub fn at(&self, block: usize, proj: Proj) -> Option<(&Slot, &AnyAdapter)> {
        let slot = &self.slots[self.index[block][proj as usize]?];
        match &slot.adapter {
            BlockAdapter::Map(adapter) => Some((slot, adapter)),
            BlockAdapter::Ffn(_) => None,
        }
    }

    /// The adapter in a block's FFN as a whole, if there is one.
    pub fn in_ffn(&self, block: usize) -> Option<(&Slot, &MixLora)> {
        let slot = &self.slots[self.index[block][FFN]?];
        match &slot.adapter {
            BlockAdapter::Map(_) => None,
            BlockAdapter::Ffn(adapter) => Some((slot, adapter)),
        }
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
) -> Built<Smore> {
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
fn lora(config: &LoraConfig, path: &str, d_in: usize, d_out: usize) -> Built<Lora> {
    let mut own = config.clone();
    if let Some(rank) = targets::pattern_value(&config.rank_pattern, path)? {
        own.rank = rank;
    }
    if let Some(alpha) = targets::pattern_value(&config.alpha_pattern, path)? {
        own.alpha = Some(alpha);
    }
    LoraSpec::new(&own, d_in, d_out).map(Lora::new).map_err(|e| e.to_string())
}

fn mix_lora(config: &MixLoraConfig, adapted: [bool; 3], spec: &DecoderSpec) -> Built<MixLora> {
    if let Some(proj) = Proj::ALL.into_iter().find(|p| *p >= Proj::Gate && spec.biased[*p as usize])
    {
        return Err(format!(
            "kind mix_lora cannot sit in an FFN whose {} has a bias; use smore, hydra_lora or lora",
            proj.name()
        ));
    }
    let DecoderSpec { hidden, intermediate, activation, .. } = *spec;
    let ffn = FfnShape { hidden, intermediate, activation, adapted };
    MixLoraSpec::new(config, ffn).map(MixLora::new).map_err(|e| e.to_string())
}

/// The message of [`Adapters::new`] as an error of the config `file`.
pub fn config_error(file: &str, message: String) -> Error {
    Error::Config { file: file.to_owned(), message }
}
