//! Which adapter sits on which linear map, and where its parameters lie.

use crate::config::AdapterConfig;
use crate::error::Error;
use crate::model::spec::{DecoderSpec, Proj};
use smore::adapter::{Adapter, AnyAdapter, Lora, Noise, NoiseKey, Smore};
use smore::rng::{Purpose, stream};
use smore::spec::{LoraSpec, SmoreSpec};
use smore_engine::Cpu;
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

    /// This slot's share of the noise of a step.
    pub(crate) fn noise<'a>(&self, noise: Noise<'a>) -> Noise<'a> {
        match noise {
            Noise::Drawn(key) => Noise::Drawn(NoiseKey { place: self.place as u64, ..key }),
            Noise::Given(slots) => Noise::Given(&slots[self.place..]),
        }
    }

    /// Its parameters' names and shapes.
    pub fn params(&self) -> &[smore::layout::Param] {
        Adapter::<Cpu<f32>>::params(&self.adapter)
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

    /// Puts the configured adapter on every target of every block.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn new(config: &AdapterConfig, spec: &DecoderSpec) -> std::result::Result<Self, String> {
        let widths = match config {
            AdapterConfig::Smore(c) => vec![c.gate.router_width; c.layers.len()],
            AdapterConfig::Lora(_) | AdapterConfig::Full(_) => vec![],
        };
        Self::with_router_widths(config, &widths, spec)
    }

    /// As [`Adapters::new`], with a router width for every layer of S'MoRE.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn with_router_widths(
        config: &AdapterConfig,
        router_widths: &[usize],
        spec: &DecoderSpec,
    ) -> std::result::Result<Self, String> {
        let targets = match config {
            AdapterConfig::Smore(c) => &c.targets,
            AdapterConfig::Lora(c) => &c.targets,
            AdapterConfig::Full(_) => return Ok(Self::none(spec)),
        };
        let mut projs =
            targets.iter().map(|t| Proj::parse(t)).collect::<std::result::Result<Vec<_>, _>>()?;
        projs.sort();
        projs.dedup();
        if projs.is_empty() {
            return Err("adapter.targets is empty; name at least one, such as gate_proj".into());
        }
        let mut adapters = Self::none(spec);
        let mut next = 0;
        for block in 0..spec.blocks {
            for &proj in &projs {
                let (d_out, d_in) = spec.shape(proj);
                let adapter = build(config, router_widths, d_in, d_out)
                    .map_err(|e| format!("adapter.{e}"))?;
                let len = Adapter::<Cpu<f32>>::len(&adapter);
                let place = adapters.slots.len();
                adapters.index[block][proj as usize] = Some(place);
                adapters.slots.push(Slot { block, proj, adapter, range: next..next + len, place });
                next += len;
            }
        }
        Ok(adapters)
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
            values.extend(Adapter::<Cpu<f32>>::init(&slot.adapter, &mut rng));
        }
        values
    }
}

fn build(
    config: &AdapterConfig,
    router_widths: &[usize],
    d_in: usize,
    d_out: usize,
) -> smore::Result<AnyAdapter> {
    match config {
        AdapterConfig::Smore(c) => {
            // The checks of `new` are for configs, where every layer has one router width.
            let uniform = router_widths.iter().all(|&w| w == c.gate.router_width);
            let spec = if uniform {
                SmoreSpec::new(c, d_in, d_out)?
            } else {
                SmoreSpec::with_router_widths(c, router_widths, d_in, d_out)?
            };
            Ok(AnyAdapter::Smore(Smore::new(spec)))
        }
        AdapterConfig::Lora(c) => Ok(AnyAdapter::Lora(Lora::new(LoraSpec::new(c, d_in, d_out)?))),
        AdapterConfig::Full(_) => Err(smore::Error::Config("kind full has no adapters".into())),
    }
}

/// The message of [`Adapters::new`] as an error of the config `file`.
pub fn config_error(file: &str, message: String) -> Error {
    Error::Config { file: file.to_owned(), message }
}
