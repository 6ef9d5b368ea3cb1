//! Supervised fine-tuning: one straight-line recipe.
//!
//! [`Prepared::new`] finds everything that can be wrong with a run before a weight is read;
//! [`Prepared::run`] trains, evaluates and writes the run folder. What a person sees meanwhile is
//! an [`Observer`]'s business.

mod diagnosis;
mod exchanges;
mod metric;
mod resume;
pub(crate) mod routers;
mod run;
mod step;
mod watch;
mod windows;

pub use exchanges::Exchange;
pub use metric::{
    EvalMetric, Metric, ModuleParameters, Observer, Outcome, RoutersMetric, Silent, StepMetric,
};
pub use step::evaluate;
pub use watch::Flag;
pub(crate) use windows::total_steps;

use crate::batching::entries;
use crate::checkpoint::LoadedAdapter;
use crate::checkpoint::manifest::{Manifest, TrainedOn};
use crate::config::{AdapterConfig, RunConfig};
use crate::data::{Dataset, Sample};
use crate::doctor::{Examined, Finding, Subject, examine};
use crate::error::Result;
use crate::memory::Split;
use crate::model::Model;
use crate::model::folder::ModelFolder;
use crate::model::spec::DecoderSpec;
use crate::tokenizer::Tokenizer;
use resume::Resumed;
use run::Run;
use smore_engine::Cpu;

/// A run whose every input has been read and checked, but for the weights.
pub struct Prepared {
    /// The configuration.
    pub config: RunConfig,
    /// The decoder's shape.
    pub spec: DecoderSpec,
    /// Absent where the weights are drawn anew.
    folder: Option<ModelFolder>,
    /// What is trained and held out.
    pub data: Dataset,
    /// The adapters and their starting values; none for `kind: full`.
    start: LoadedAdapter,
    /// What the adapter's folder will say about this run.
    manifest: Manifest,
    /// Longest sample in tokens: the config's cutoff or the model's positions.
    pub cutoff_len: usize,
    /// Samples, or packs of them, in which batches are counted.
    entries: Vec<Vec<usize>>,
    tokenizer: Tokenizer,
    /// The memory that training is expected to take.
    planned: Split,
    /// Optimizer steps.
    pub total_steps: usize,
    /// Where the run goes on.
    resumed: Option<Resumed>,
    /// What was looked at before, and what is not as it could be.
    pub findings: Vec<Finding>,
}

impl Prepared {
    /// Reads and checks all inputs of a run; `name` stands for the config in messages.
    ///
    /// # Errors
    /// Anything that would make the run fail later and can be known now.
    pub fn new(config: RunConfig, name: &str) -> Result<Self> {
        let mut examined = examine(&Subject { name: name.to_owned(), ..Subject::from(&config) });
        examined.accept()?;
        let Examined {
            spec: Some(spec),
            start: Some(start),
            data: Some(data),
            tokenizer: Some(tokenizer),
            planned: Some(planned),
            folder,
            findings,
            ..
        } = examined
        else {
            unreachable!("nothing is missing where nothing is wrong");
        };
        let cutoff_len = config.data.cutoff_len.min(spec.max_positions);
        let entries = entries(&config.train, &lengths(&data.train), cutoff_len);
        let total_steps = total_steps(&config.train, entries.len());
        let manifest = manifest(&config, &data)?;
        Ok(Self {
            config,
            spec,
            folder,
            data,
            start,
            manifest,
            cutoff_len,
            entries,
            tokenizer,
            planned,
            total_steps,
            resumed: None,
            findings,
        })
    }

    /// Goes on from the newest whole checkpoint of the run folder, to the bit as if the run had
    /// never stopped; from the beginning where there is none yet.
    ///
    /// # Errors
    /// If all checkpoints are damaged, the run has ended, or configuration, base or data are not
    /// those the run began with: names every difference.
    pub fn resume(mut self) -> Result<Self> {
        self.resumed = Resumed::find(&self.config, &self.manifest)?;
        Ok(self)
    }

    /// Steps that are already done.
    pub fn steps_done(&self) -> usize {
        self.resumed.as_ref().map_or(0, |resumed| resumed.progress.step)
    }

    /// Number of trained parameters.
    pub fn trainable_parameters(&self) -> usize {
        match self.config.adapter {
            AdapterConfig::Full(_) => {
                self.spec.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum()
            }
            _ => self.start.adapters.len(),
        }
    }

    /// Trains and writes the run folder.
    ///
    /// # Errors
    /// A loss or gradient that is not a number, a failed write, or [`crate::error::Error::Interrupted`].
    pub fn run(self, observer: &mut dyn Observer) -> Result<(Outcome, Model<Cpu<f32>>)> {
        let mut run = Run::begin(self, observer)?;
        run.train(observer)?;
        run.finish(observer)
    }
}

fn lengths(samples: &[Sample]) -> Vec<usize> {
    samples.iter().map(Sample::len).collect()
}

/// What is known about a run before it begins.
fn manifest(config: &RunConfig, data: &Dataset) -> Result<Manifest> {
    let mut manifest = Manifest::new(&config.model)?;
    manifest.seed = Some(config.train.seed);
    manifest.data = Some(TrainedOn::of(&config.data, &data.report)?);
    if let AdapterConfig::Saved(saved) = &config.adapter {
        manifest.from = Some(saved.path.display().to_string());
    }
    Ok(manifest)
}
