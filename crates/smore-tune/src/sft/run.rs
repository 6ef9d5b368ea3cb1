//! A run from its first step, or the one it goes on from, to what it exports.

use super::diagnosis::not_finite;
use super::exchanges;
use super::metric::{EvalMetric, Metric, ModuleParameters, Observer, Outcome, StepMetric};
use super::resume::{Checkpoints, Progress};
use super::routers::Routers;
use super::step::{accumulate, evaluate};
use super::watch::Watch;
use super::windows::Windows;
use super::{Prepared, lengths};
use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::{LoadedAdapter, Settings, fill_adapter, save_model, write_folder};
use crate::config::{AdapterConfig, RunConfig};
use crate::data::{Dataset, Sample};
use crate::doctor::Severity;
use crate::error::{Error, Result};
use crate::inject::Adapters;
use crate::learning_rates::rates as rates_of;
use crate::memory::{self, Split};
use crate::model::folder::ModelFolder;
use crate::model::spec::DecoderSpec;
use crate::model::weights::{from_scratch, read_all};
use crate::model::{Model, training_device};
use crate::optimizer::Optimizer;
use crate::routing::drift::REFERENCE;
use crate::routing::{Counts, Window, count_samples, write as write_table};
use crate::run_folder::RunFolder;
use crate::run_report;
use crate::schedule::Schedule;
use crate::selection::Selection;
use crate::tokenizer::Tokenizer;
use crate::trainer_state::write_trainer_state;
use smore_engine::Cpu;
use std::path::PathBuf;
use std::time::Instant;

/// Samples over which the use of experts is counted for the manifest, and kept to compare with.
const USAGE_SAMPLES: usize = 512;

/// A run that is under way.
pub(super) struct Run {
    config: RunConfig,
    settings: Settings,
    manifest: Manifest,
    data: Dataset,
    total_steps: usize,
    model: Model<Cpu<f32>>,
    optimizer: Optimizer,
    schedule: Schedule,
    windows: Windows,
    selection: Selection,
    watch: Watch,
    routers: Routers,
    progress: Progress,
    tokenizer: Tokenizer,
    planned: Split,
    warnings: Vec<String>,
    out: RunFolder,
    /// When this program began to train, and the seconds of training before that.
    start: (Instant, f64),
    /// Bytes resident before there was a model, and bytes of its frozen weights.
    resident: (u64, u64),
}

impl Run {
    /// Opens the run folder, builds the model and puts everything where it was.
    pub(super) fn begin(prepared: Prepared, observer: &mut dyn Observer) -> Result<Self> {
        let Prepared { config, spec, folder, data, start, manifest, cutoff_len, .. } = prepared;
        let (tokenizer, planned) = (prepared.tokenizer, prepared.planned);
        let warnings = prepared.findings.into_iter().filter(|f| f.severity == Severity::Warning);
        let warnings = warnings
            .map(|f| match f.remedy {
                Some(remedy) => format!("{}; {remedy}", f.message),
                None => f.message,
            })
            .collect();
        let (entries, total_steps, resumed) =
            (prepared.entries, prepared.total_steps, prepared.resumed);
        let LoadedAdapter { settings, adapters, values } = start;
        let resident = memory::resident();
        let (out, moved) = match &resumed {
            Some(resumed) => (RunFolder::reopen(&config, resumed.progress.step)?, None),
            None => RunFolder::create(&config)?,
        };
        if let Some(moved) = moved {
            observer.note(&format!("an earlier run was moved to {}", moved.display()));
        }
        let (mut model, weights) =
            build_model(&config, (spec, folder), adapters, &values, cutoff_len)?;
        let rates = rates_of(&model.adapters, &config.train.router_lr_multiplier, model.trained());
        let mut optimizer = Optimizer::with_rates(&model, rates.map_err(Error::Run)?);
        let mut windows = Windows::new(&config.train, &lengths(&data.train), entries);
        let mut selection = Selection::new(&config.train);
        let (mut watch, mut progress) = (Watch::default(), Progress::default());
        let mut routers = None;
        if let Some(mut resumed) = resumed {
            routers = Some(std::mem::take(&mut resumed.routers));
            resumed.notes.drain(..).for_each(|note| observer.note(&note));
            progress = resumed.progress.clone();
            resumed.restore(&mut model, &mut optimizer, &mut selection)?;
            for metric in out.metrics() {
                if let Metric::Step(m) = metric {
                    watch.see(m.loss, m.grad_norm);
                }
            }
            (0..progress.step).for_each(|_| drop(windows.next_window()));
        }
        let routers = Routers::open(&config, &mut model, routers, progress.step)?;
        Ok(Self {
            routers,
            schedule: Schedule::new(&config.train, total_steps),
            start: (Instant::now(), progress.seconds),
            resident: (resident, weights as u64),
            config,
            settings,
            manifest,
            data,
            total_steps,
            model,
            optimizer,
            windows,
            selection,
            watch,
            progress,
            tokenizer,
            planned,
            warnings,
            out,
        })
    }

    /// All steps that are left.
    pub(super) fn train(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (eval_steps, save_steps) = (self.config.train.eval_steps, self.config.train.save_steps);
        if self.progress.step == 0 {
            self.evaluate(observer)?;
            self.progress.before = self.progress.after.clone();
            self.progress.answers = self.answers()?;
        }
        for step in self.progress.step + 1..=self.total_steps {
            let metric = self.step(step)?;
            self.log(Metric::Step(metric), observer)?;
            let last = step == self.total_steps;
            for metric in self.routers.stepped(step, last, &mut self.model)? {
                self.log(metric, observer)?;
            }
            if (last || due(step, eval_steps))
                && let Some(loss) = self.evaluate(observer)?
                && self.selection.see(step, loss, self.model.params())
            {
                break;
            }
            let interrupted = observer.interrupted();
            if !last && (interrupted || due(step, save_steps)) {
                let checkpoint = self.checkpoint()?;
                if interrupted {
                    let total_steps = self.total_steps;
                    return Err(Error::Interrupted { step, total_steps, checkpoint });
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, step: usize) -> Result<StepMetric> {
        let Self { config, settings, model, optimizer, data, .. } = self;
        let window = self.windows.next_window();
        let routers = &mut self.routers;
        let result =
            accumulate(model, &data.train, &window, &config.train, optimizer, |batch, routing| {
                routers.see(step, batch, routing);
            });
        let norm = optimizer.norm(model);
        if !(result.loss + result.balance_loss + norm).is_finite() {
            let what = format!(
                "the loss is {}, the balance loss {}, the gradient's norm {norm}",
                result.loss, result.balance_loss
            );
            let at = (step, config.output_dir.as_path());
            let batch = (&data.train[..], &window);
            return Err(not_finite(&what, at, settings, model, &optimizer.grads, batch)?);
        }
        let learning_rate = self.schedule.rate(step - 1);
        let grad_norm = optimizer.step(model, &config.train, learning_rate, step)?;
        self.progress.step = step;
        self.progress.tokens += result.tokens;
        Ok(StepMetric {
            step,
            epoch: self.windows.epochs_done(),
            loss: result.loss,
            balance_loss: result.balance_loss,
            grad_norm,
            learning_rate,
            trained_tokens: result.trained_tokens,
            tokens: result.tokens,
            seconds: self.seconds(),
            resident_memory_bytes: memory::resident(),
            flags: self.watch.see(result.loss, grad_norm),
        })
    }

    /// The held-out loss, noted; none without held-out samples.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let mut counts = self.routers.for_evaluation(&self.model);
        let held_out = &self.data.validation;
        let Some((eval_loss, eval_tokens)) = evaluate(&self.model, held_out, counts.as_mut())
        else {
            return Ok(None);
        };
        let step = self.progress.step;
        if let Some(counts) = counts {
            self.routers.evaluated(step, &counts)?;
        }
        if !eval_loss.is_finite() {
            return Err(Error::Run(format!(
                "the held-out loss is {eval_loss} after step {step}; lower train.learning_rate"
            )));
        }
        let eval = EvalMetric { step, eval_loss, eval_tokens, seconds: self.seconds() };
        self.progress.after = Some(eval.clone());
        self.log(Metric::Eval(eval), observer)?;
        Ok(Some(eval_loss))
    }

    fn log(&mut self, metric: Metric, observer: &mut dyn Observer) -> Result<()> {
        self.out.metric(&metric)?;
        observer.metric(&metric, self.total_steps, self.progress.tokens);
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<PathBuf> {
        self.progress.seconds = self.seconds();
        self.out.sync()?;
        self.routers.flush()?;
        let Self { config, settings, manifest, model, optimizer, selection, .. } = &*self;
        let metrics = self.out.metrics();
        let checkpoints = Checkpoints { config, settings, manifest };
        let routers = self.routers.state();
        checkpoints.write(&self.progress, model, optimizer, selection, routers, |dir| {
            write_trainer_state(dir, &config.train, self.total_steps, metrics, selection)
        })
    }

    /// The samples that the report shows.
    fn shown(&self) -> Vec<&Sample> {
        let data = &self.data;
        let samples = if data.validation.is_empty() { &data.train } else { &data.validation };
        exchanges::shown(samples, self.config.train.report_samples, self.model.context)
    }

    fn answers(&self) -> Result<Vec<String>> {
        exchanges::answers(&self.model, &self.tokenizer, &self.shown())
    }

    fn seconds(&self) -> f64 {
        self.start.1 + self.start.0.elapsed().as_secs_f64()
    }

    /// Exports what was trained and writes the report.
    pub(super) fn finish(
        mut self,
        observer: &mut dyn Observer,
    ) -> Result<(Outcome, Model<Cpu<f32>>)> {
        self.routers.flush()?;
        let seconds = self.seconds();
        let peak = memory::peak();
        let trained = self.export()?;
        let answers = self.answers()?;
        let before = self.progress.answers.clone();
        let exchanges = exchanges::exchanges(&self.tokenizer, &self.shown(), before, answers)?;
        let (config, selection) = (&self.config, &self.selection);
        let metrics = self.out.metrics();
        write_trainer_state(
            &config.output_dir,
            &config.train,
            self.total_steps,
            metrics,
            selection,
        )?;
        observer.saved(&trained);
        let Progress { step: steps, tokens, before, after, .. } = self.progress.clone();
        let kept = 4 + usize::from(selection.exported().is_some());
        let (without_model, weights) = self.resident;
        let trained_bytes = (self.model.trained() * 4 * kept) as u64;
        let (best, exported) = (selection.best.as_ref(), selection.exported());
        let alarm = |metric: &Metric| match metric {
            Metric::Alarm(alarm) => Some(alarm.clone()),
            _ => None,
        };
        let alarms = self.out.metrics().iter().filter_map(alarm).collect();
        let outcome = Outcome {
            output_dir: config.output_dir.clone(),
            trained,
            trainable_parameters: self.model.trained(),
            eval_loss_before: before.map(|e| e.eval_loss),
            eval_loss_after: exported.map(|best| best.loss).or(after.map(|e| e.eval_loss)),
            steps,
            stopped_early: steps < self.total_steps,
            best_step: best.map(|best| best.step),
            best_eval_loss: best.map(|best| best.loss),
            exported_step: exported.map_or(steps, |best| best.step),
            tokens,
            seconds,
            peak_memory_bytes: peak,
            memory: Split::of(peak, without_model, weights, trained_bytes),
            planned_memory: self.planned,
            modules: ModuleParameters::of(&self.model.adapters),
            base_parameters: self.model.spec.parameters(),
            warnings: self.warnings,
            exchanges,
            routing: self.manifest.routing,
            alarms,
            metrics: self.out.into_metrics(),
        };
        run_report::report(&outcome).write(&outcome.output_dir.join("report.html"))?;
        Ok((outcome, self.model))
    }

    /// Writes the adapter, or the model, and returns its folder.
    fn export(&mut self) -> Result<PathBuf> {
        let Self { config, settings, manifest, data, model, selection, .. } = self;
        if let Some(best) = selection.exported() {
            model.params_mut().clone_from(&best.values);
        }
        let name = if model.weights.is_trained() { "model" } else { "adapter" };
        let path = config.output_dir.join(name);
        let unseen = if data.validation.is_empty() { &data.train } else { &data.validation };
        let unseen: Vec<&Sample> = unseen.iter().take(USAGE_SAMPLES).collect();
        let (mut all, mut reference) = (Counts::new(&model.adapters), Vec::new());
        if all.is_routed() {
            count_samples(model, &unseen, |one| {
                reference.push(Window::reference(reference.len() + 1, &one));
                all.add(&one);
            });
        }
        manifest.routing = all.usage();
        manifest.steps = Some(self.progress.step);
        manifest.best_step = selection.exported().map(|best| best.step);
        if model.weights.is_trained() {
            save_model(&path, &model.spec, &config.model, model.params())?;
        } else {
            write_folder(&path, |dir| {
                fill_adapter(dir, settings, &model.adapters, model.params(), manifest)?;
                if reference.is_empty() {
                    return Ok(());
                }
                write_table(&dir.join(REFERENCE), &reference)
            })?;
        }
        Ok(path)
    }
}

/// The model to train: the base's weights, the adapters on them, what the recipe says of a step; and
/// the bytes of its frozen weights.
fn build_model(
    config: &RunConfig,
    (spec, folder): (DecoderSpec, Option<ModelFolder>),
    adapters: Adapters,
    values: &[f32],
    cutoff_len: usize,
) -> Result<(Model<Cpu<f32>>, usize)> {
    let train = &config.train;
    let device = training_device(train.bf16);
    let folder = if train.bf16 { folder.map(ModelFolder::in_bf16) } else { folder };
    let full = matches!(config.adapter, AdapterConfig::Full(_));
    let weights = folder.as_ref().filter(|_| !full).map_or(0, ModelFolder::bytes);
    let mut model = if full {
        let values = match &folder {
            Some(folder) => read_all(folder),
            None => from_scratch(&spec, train.seed),
        };
        Model::full(device, spec, &values, cutoff_len)
    } else {
        let Some(folder) = &folder else {
            return Err(Error::Run("an adapter needs a base with weights".into()));
        };
        Model::new(device, folder, adapters, values, cutoff_len)
    };
    model.gradient_checkpointing = train.gradient_checkpointing;
    model.dropout = train.lora_dropout;
    model.label_smoothing = train.label_smoothing_factor;
    Ok((model, weights))
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}
