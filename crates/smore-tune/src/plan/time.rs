//! How long training takes, told from a few seconds of work on this machine: steps of a model with
//! one block and of one with two, whose weights are drawn at random. What the second block adds is
//! what every further one will; the output head is timed by itself.

use crate::config::{AdapterConfig, TrainConfig};
use crate::inject::{Adapters, Site, Slot};
use crate::model::folder::ModelFolder;
use crate::model::spec::{DecoderSpec, Proj};
use crate::model::{Batch, Model, Scales, training_device};
use crate::optimizer::Optimizer;
use serde::Serialize;
use smore::adapter::BlockAdapter;
use smore::spec::MixLoraSpec;
use smore::targets::{Modules, Targets};
use smore_engine::cpu::logit_rows;
use smore_engine::{Cpu, CrossEntropy, Device, MatrixRef, View, ViewMut};
use std::time::{Duration, Instant};

/// Rows of the token table and the head while blocks are timed: too few to weigh.
const FEW_ROWS: usize = 64;
/// Rows of the head that are timed of a larger one.
const HEAD_ROWS: usize = 16_384;
/// Tokens that are timed at least: fewer would not fill the products.
const FEW_TOKENS: usize = 256;

/// How fast a machine trains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pace {
    /// Seconds that a token of a training step takes, all blocks and the head.
    pub seconds_per_token: f64,
    /// Seconds of one step of the optimizer.
    pub seconds_per_update: f64,
    /// Tokens of the steps that were timed.
    pub tokens: usize,
}

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The decoder.
    pub spec: &'a DecoderSpec,
    /// The adapter on it.
    pub config: &'a AdapterConfig,
    /// Router width of every layer, where an adapter's folder says so.
    pub router_widths: Option<&'a [usize]>,
    /// Tokens of one forward pass.
    pub tokens: usize,
    /// Tokens of one sequence.
    pub length: usize,
    /// Frozen weights are kept as bf16, else as f32.
    pub bf16: bool,
    /// The recipe's `bf16`, on which products depend, too.
    pub mixed: bool,
    /// Blocks are computed again in the backward sweep.
    pub gradient_checkpointing: bool,
}

impl Pace {
    /// Times `work` for about `budget`, longer where two blocks of the model take longer; none where
    /// the base itself is trained.
    ///
    /// # Errors
    /// A message naming the key that does not fit the model.
    pub fn measure(work: Work, budget: Duration) -> Result<Option<Self>, String> {
        let spec = work.spec;
        let adapters = adapters(work.config, work.router_widths, spec)?;
        let Some(top) = adapters.slots.last() else { return Ok(None) };
        let top = adapters.slots.iter().filter(|s| s.block == top.block);
        let maps: Vec<Proj> = top.flat_map(maps).collect();
        let adapted = spec.blocks - adapters.lowest_block();

        let mut one = Timed::new(work, 1, &maps)?;
        let mut two = Timed::new(work, 2, &maps)?;
        // The first steps touch memory for the first time; the second tell how many tokens fit.
        let few = FEW_TOKENS.min(work.tokens);
        one.step(few, work.length);
        two.step(few, work.length);
        let each = (one.step(few, work.length) + two.step(few, work.length)) / few as f64;
        // Both steps, three times.
        let fit = (0.7 * budget.as_secs_f64() / each / 3.0) as usize;
        let tokens = fit.clamp(few, work.tokens.max(few));
        let (start, mut rounds) = (Instant::now(), Vec::new());
        while rounds.len() < 3 || (start.elapsed() < budget.mul_f64(0.7) && rounds.len() < 64) {
            rounds.push((one.step(tokens, work.length), two.step(tokens, work.length)));
        }
        let ones = median(rounds.iter().map(|r| r.0));
        let block = median(rounds.iter().map(|r| r.1 - r.0));
        // Blocks under the lowest adapter are computed in one direction alone.
        let below = if spec.blocks == adapted {
            0.0
        } else {
            let pair = || two.forward(tokens, work.length) - one.forward(tokens, work.length);
            median((0..3).map(|_| pair())) * (spec.blocks - adapted) as f64
        };
        let blocks = ones + block * (adapted - 1) as f64 + below;
        let head = head_seconds(work, budget.mul_f64(0.2));
        let update = one.update() + (two.update() - one.update()) * (adapted - 1) as f64;
        Ok(Some(Self {
            seconds_per_token: (blocks / tokens as f64 + head).max(0.0),
            seconds_per_update: update.max(0.0),
            tokens,
        }))
    }

    /// Seconds of `tokens` tokens in `updates` steps of the optimizer.
    pub fn seconds(&self, tokens: usize, updates: usize) -> f64 {
        self.seconds_per_token * tokens as f64 + self.seconds_per_update * updates as f64
    }
}

fn adapters(
    config: &AdapterConfig,
    router_widths: Option<&[usize]>,
    spec: &DecoderSpec,
) -> Result<Adapters, String> {
    match router_widths {
        Some(widths) => Adapters::stored(config, widths, spec),
        None => Adapters::new(config, spec),
    }
}

/// A small model of the same blocks, with what trains it.
struct Timed {
    model: Model<Cpu<f32>>,
    optimizer: Optimizer,
    updates: usize,
}

impl Timed {
    fn new(work: Work, blocks: usize, maps: &[Proj]) -> Result<Self, String> {
        let mut spec = DecoderSpec { blocks, vocabulary: FEW_ROWS, ..work.spec.clone() };
        spec.windows.truncate(blocks);
        let modules = (0..blocks).flat_map(|block| maps.iter().map(move |map| map.path(block)));
        let targets = Targets::from(Modules::Names(modules.collect()));
        let mut config = work.config.clone();
        match &mut config {
            AdapterConfig::Smore(c) => c.targets = targets,
            AdapterConfig::Lora(c) => c.targets = targets,
            AdapterConfig::HydraLora(c) => c.targets = targets,
            AdapterConfig::MixLora(c) => c.targets = targets,
            AdapterConfig::Saved(_) | AdapterConfig::Full(_) => {}
        }
        let adapters = adapters(&config, work.router_widths, &spec)?;
        let values = adapters.init(1);
        let folder = ModelFolder::drawn(spec, work.bf16);
        let mut model =
            Model::new(training_device(work.mixed), &folder, adapters, &values, work.length);
        model.gradient_checkpointing = work.gradient_checkpointing;
        let optimizer = Optimizer::new(&model);
        Ok(Self { model, optimizer, updates: 0 })
    }

    /// Seconds of the losses and gradients of `tokens` tokens in sequences of `length`.
    fn step(&mut self, tokens: usize, length: usize) -> f64 {
        let batch = batch(tokens, length);
        let scales = Scales { loss: 1.0 / tokens as f64, balance: 1.0 };
        let start = Instant::now();
        std::hint::black_box(self.model.step(&batch, scales, None, &mut self.optimizer.grads));
        start.elapsed().as_secs_f64()
    }

    /// Seconds of the losses alone.
    fn forward(&self, tokens: usize, length: usize) -> f64 {
        let batch = batch(tokens, length);
        let start = Instant::now();
        std::hint::black_box(self.model.losses(&batch));
        start.elapsed().as_secs_f64()
    }

    /// Seconds of a step of the optimizer.
    fn update(&mut self) -> f64 {
        let train = TrainConfig::default();
        let mut once = || {
            self.updates += 1;
            let start = Instant::now();
            // Gradients that are no number change nothing, which takes less time than it should, and
            // nobody's result.
            drop(self.optimizer.step(&mut self.model, &train, 1e-9, self.updates));
            start.elapsed().as_secs_f64()
        };
        once();
        median((0..3).map(|_| once()))
    }
}

/// The linear maps that an adapter changes in its block.
fn maps(slot: &Slot) -> Vec<Proj> {
    match (slot.site, &slot.adapter) {
        (Site::Map(proj), _) => vec![proj],
        (Site::Ffn, BlockAdapter::Ffn(mix)) => {
            let MixLoraSpec { gate_proj, up_proj, down_proj, .. } = mix.spec;
            let chosen = [(Proj::Gate, gate_proj), (Proj::Up, up_proj), (Proj::Down, down_proj)];
            chosen.into_iter().filter_map(|(proj, chosen)| chosen.then_some(proj)).collect()
        }
        (Site::Ffn, BlockAdapter::Map(_)) => vec![],
    }
}

fn batch(tokens: usize, length: usize) -> Batch {
    let mut batch = Batch::default();
    let mut left = tokens;
    while left > 0 {
        let n = left.min(length.max(1));
        let ids: Vec<u32> = (0..n).map(|i| (i * 7 % FEW_ROWS) as u32).collect();
        batch.push(&ids, &vec![true; n]);
        left -= n;
    }
    batch
}

/// Seconds of the head and its loss for one token, both ways, where the head has as many rows as
/// the decoder has tokens.
fn head_seconds(work: Work, budget: Duration) -> f64 {
    let (vocabulary, hidden) = (work.spec.vocabulary, work.spec.hidden);
    let rows = vocabulary.min(HEAD_ROWS);
    // As many tokens at a time as the whole head would take.
    let tokens = logit_rows(vocabulary).min(work.tokens);
    let spec =
        DecoderSpec { blocks: 0, vocabulary: rows, windows: Vec::new(), ..work.spec.clone() };
    let device = training_device(work.mixed);
    let folder = ModelFolder::drawn(spec, work.bf16);
    let head = device.weight(folder.tensor("model.embed_tokens.weight").clone());
    let h = vec![0.5f32; tokens * hidden];
    let mut dh = vec![0f32; tokens * hidden];
    let targets: Vec<(u32, u32)> = (0..tokens).map(|i| (i as u32, (i % rows) as u32)).collect();
    let mut once = || {
        let start = Instant::now();
        let loss = CrossEntropy { soft_cap: work.spec.logit_soft_cap, ..CrossEntropy::default() };
        let (h, dh) = (View::new(&h, tokens * hidden), ViewMut::new(&mut dh, tokens * hidden));
        let head = MatrixRef::Frozen(&head);
        std::hint::black_box(device.cross_entropy(h, &targets, head, loss, Some(dh), None));
        start.elapsed().as_secs_f64()
    };
    once();
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || (start.elapsed() < budget && times.len() < 64) {
        times.push(once());
    }
    median(times.into_iter()) / tokens as f64 * vocabulary as f64 / rows as f64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
