//! `smore inspect ADAPTER_OR_CONFIG [--model DIR]`

mod facts;
mod others;
mod tables;

use self::others::{Lora, full, mixture};
use crate::table::count;
use anyhow::Result;
use serde_json::{Value, json};
use smore::config::{GateKind, LayerConfig, SmoreConfig};
use smore::counting::flexibility::Choice;
use smore::counting::{AuthorStats, Parameters, lora_rank_for};
use smore::spec::SmoreSpec;
use smore::targets::Targets;
use smore_tune::checkpoint::manifest::{self, BaseFiles, Manifest};
use smore_tune::checkpoint::read_settings;
use smore_tune::config::{AdapterConfig, AdapterSection};
use smore_tune::error::Error;
use smore_tune::model::spec::{DecoderSpec, Proj};
use smore_tune::targets::{Unknown, resolve};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// An adapter's folder, a run folder, a run's configuration, or a YAML or JSON file that holds
    /// only the adapter section of one
    #[arg(value_name = "ADAPTER_OR_CONFIG")]
    subject: PathBuf,
    /// Folder of the base model, of which only config.json is read
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print one JSON object on standard output instead of tables
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut subject = Subject::read(&args.subject)?;
    // A model that is only named may lie on another machine; the structure can still be told.
    let mut model_error = None;
    let base = match (&args.model, subject.model.take()) {
        (Some(folder), _) => Some(Base::read(folder)?),
        (None, Some(folder)) => Base::read(&folder).map_err(|e| model_error = Some(e)).ok(),
        (None, None) => None,
    };
    let model_error = model_error.map(|e| e.to_string());
    let (kind, mut facts) = match &subject.config {
        AdapterConfig::Smore(config) => {
            let smore = Smore::new(&subject, config, base.as_ref())?;
            if !args.json {
                smore.print(base.as_ref());
            }
            ("smore", smore.facts())
        }
        AdapterConfig::Lora(config) => {
            let lora = Lora::new(&subject, config, base.as_ref())?;
            if !args.json {
                lora.print();
            }
            ("lora", lora.facts())
        }
        AdapterConfig::HydraLora(_) | AdapterConfig::MixLora(_) => {
            let kind = subject.config.kind();
            (kind, mixture(&subject, base.as_ref(), args.json)?)
        }
        AdapterConfig::Saved(_) => unreachable!("is looked up when read"),
        AdapterConfig::Full(_) => ("full", full(base.as_ref(), args.json)),
    };
    let origin = Origin::read(&subject, base.as_ref())?;
    if args.json {
        facts.insert("manifest".into(), json!(origin.manifest));
        facts.insert("other_base_file".into(), json!(origin.other_file));
        facts.insert("kind".into(), json!(kind));
        facts.insert("source".into(), json!(subject.file));
        facts.insert("adapter".into(), json!(subject.config));
        facts.insert("model".into(), base.as_ref().map_or(Value::Null, Base::facts));
        facts.insert("model_error".into(), json!(model_error));
        println!("{}", Value::Object(facts));
        return Ok(());
    }
    origin.print();
    if base.is_none() {
        if let Some(error) = model_error {
            println!("\n{error}");
        }
        println!("\nGive --model DIR for parameters and cost: they depend on the model's widths.");
    }
    Ok(())
}

/// Where an adapter comes from, as its manifest says.
struct Origin {
    manifest: Option<Manifest>,
    /// A file of the base that is not the one the adapter was trained with.
    other_file: Option<String>,
}

impl Origin {
    fn read(subject: &Subject, base: Option<&Base>) -> Result<Self, Error> {
        let folder = subject.folder.as_deref();
        let manifest = folder.map_or(Ok(None), Manifest::read)?;
        let compare = |manifest: &Manifest, base: &Base| -> Result<Option<String>, Error> {
            let found = BaseFiles::of(&base.folder)?;
            Ok(manifest.base.difference(&found).map(String::from))
        };
        let other_file = match (&manifest, base) {
            (Some(manifest), Some(base)) => compare(manifest, base)?,
            _ => None,
        };
        Ok(Self { manifest, other_file })
    }

    fn print(&self) {
        let Some(manifest) = &self.manifest else { return };
        let mut said = vec![format!("made by smore {}", manifest.version)];
        said.extend(manifest.seed.map(|seed| format!("seed {seed}")));
        said.extend(manifest.steps.map(|steps| format!("{steps} steps")));
        said.extend(manifest.data.as_ref().map(|data| {
            let (samples, tokens) = (data.report.kept, data.report.trained_tokens);
            format!("{} samples with {} trained tokens", count(samples), count(tokens))
        }));
        said.extend(manifest.from.as_ref().map(|from| format!("from {from}")));
        println!("\n{}", said.join(", "));
        if let Some(file) = &self.other_file {
            println!("the base is another than the one it was made on: {file} differs");
        } else {
            println!("base files by SHA-256 in {}", manifest::NAME);
        }
    }
}

/// What is to be described.
struct Subject {
    config: AdapterConfig,
    /// Router width of every layer, where an adapter's folder says so.
    router_widths: Option<Vec<usize>>,
    /// The model it names.
    model: Option<PathBuf>,
    /// Its file, for messages.
    file: String,
    /// The adapter's folder, where it is one.
    folder: Option<PathBuf>,
}

impl Subject {
    fn read(path: &Path) -> Result<Self, Error> {
        let run = path.join("config.yaml");
        if path.is_dir() && (path.join("adapter_config.json").exists() || !run.exists()) {
            let settings = read_settings(path)?;
            let model = settings.find_base(path);
            let file = path.join("adapter_config.json").display().to_string();
            let (config, widths) = (settings.config, settings.router_widths);
            let folder = Some(path.to_owned());
            return Ok(Self { config, router_widths: Some(widths), model, file, folder });
        }
        let path = if path.is_dir() { run } else { path.to_owned() };
        let section = AdapterSection::load(&path)?;
        if let AdapterConfig::Saved(saved) = &section.adapter {
            let mut subject = Self::read(&saved.path)?;
            subject.model = section.model.or(subject.model);
            return Ok(subject);
        }
        let file = path.display().to_string();
        let AdapterSection { adapter: config, model } = section;
        Ok(Self { config, router_widths: None, model, file, folder: None })
    }

    fn error(&self, message: String) -> Error {
        Error::Config { file: self.file.clone(), message }
    }

    /// The linear maps that `targets` choose, in the model's order, and in how many blocks.
    fn targets(&self, targets: &Targets, base: Option<&Base>) -> Result<Vec<Target>, Error> {
        // Without a model, one of more blocks than any name or pattern is likely to single out.
        let blocks = base.map_or(512, |b| b.spec.blocks);
        let stored = self.router_widths.is_some();
        let unknown = if stored { Unknown::Pass } else { Unknown::Refuse };
        let maps = resolve(targets, blocks, unknown)
            .map_err(|message| self.error(format!("adapter.{message}")))?;
        let blocks = |proj| maps.iter().filter(|(_, p)| *p == proj).count();
        let all = Proj::ALL.map(|proj| Target { proj, blocks: blocks(proj) });
        Ok(all.into_iter().filter(|t| t.blocks > 0).collect())
    }
}

/// The base model.
struct Base {
    folder: PathBuf,
    spec: DecoderSpec,
    /// We know every tensor, not only the sizes of the linear maps.
    known: bool,
}

impl Base {
    fn read(folder: &Path) -> Result<Self, Error> {
        let file = folder.join("config.json");
        let spec = DecoderSpec::read_sizes(&file)?;
        let known = DecoderSpec::read(&file).is_ok();
        Ok(Self { folder: folder.to_owned(), spec, known })
    }

    fn facts(&self) -> Value {
        let DecoderSpec { hidden, intermediate, blocks, .. } = self.spec;
        json!({
            "path": self.folder, "hidden": hidden, "intermediate": intermediate,
            "blocks": blocks, "parameters": self.parameters(),
        })
    }

    /// Of the whole model, where all its tensors are known.
    fn parameters(&self) -> Option<usize> {
        let sizes =
            self.spec.tensors().into_iter().map(|(_, shape)| shape.iter().product::<usize>());
        self.known.then(|| sizes.sum())
    }

    /// `[d_out, d_in]` as (d_in, d_out).
    fn widths(&self, proj: Proj) -> (usize, usize) {
        let (d_out, d_in) = self.spec.shape(proj);
        (d_in, d_out)
    }
}

/// A linear map and the number of blocks in which it is adapted.
#[derive(Clone, Copy)]
struct Target {
    proj: Proj,
    blocks: usize,
}

/// S'MoRE on the maps of a model, or on none.
struct Smore<'a> {
    config: &'a SmoreConfig,
    targets: Vec<Target>,
    /// One spec for what does not depend on the map.
    shape: SmoreSpec,
    /// One for each target, where there is a model.
    maps: Vec<SmoreSpec>,
}

impl<'a> Smore<'a> {
    fn new(subject: &Subject, config: &'a SmoreConfig, base: Option<&Base>) -> Result<Self, Error> {
        let spec = |(d_in, d_out)| {
            let spec = match &subject.router_widths {
                Some(w) => SmoreSpec::with_router_widths(config, w, d_in, d_out),
                None => SmoreSpec::new(config, d_in, d_out),
            };
            spec.map_err(|e| subject.error(format!("adapter.{e}")))
        };
        let targets = subject.targets(&config.targets, base)?;
        let maps = base.map_or(Ok(vec![]), |base| {
            targets.iter().map(|t| spec(base.widths(t.proj))).collect::<Result<Vec<_>, _>>()
        })?;
        let shape = maps.first().map_or_else(|| spec((1, 1)), |first| Ok(first.clone()))?;
        Ok(Self { config, targets, shape, maps })
    }

    /// Adds up over all maps and blocks.
    fn total<T>(&self, of: impl Fn(&SmoreSpec) -> T) -> T
    where
        T: std::iter::Sum + std::ops::Mul<usize, Output = T>,
    {
        self.maps.iter().zip(&self.targets).map(|(m, t)| of(m) * t.blocks).sum()
    }

    fn author_stats(&self, spec: &SmoreSpec) -> AuthorStats {
        let fanouts: Vec<_> = self.config.layers.iter().map(|l| l.fanout).collect();
        AuthorStats::of(spec, &fanouts)
    }

    /// Width of a layer's router input, where it is the same on all maps.
    fn router_input(&self, l: usize) -> Option<usize> {
        let own = self.shape.layers[l].router_input;
        let known = self.config.gate.router_input_width > 0 || !self.maps.is_empty();
        (known && self.maps.iter().all(|m| m.layers[l].router_input == own)).then_some(own)
    }

    /// LoRA of rank d_L and LoRA of as many parameters: rank and parameters on all maps.
    fn loras(&self) -> [(usize, usize); 2] {
        let maps = self.maps.iter().zip(&self.targets);
        let shapes: Vec<_> =
            maps.flat_map(|(m, t)| std::iter::repeat_n((m.d_in, m.d_out), t.blocks)).collect();
        let budget = self.total(|m| Parameters::of(m).total());
        let per_rank: usize = shapes.iter().map(|(d_in, d_out)| d_in + d_out).sum();
        let ranks = [self.shape.root_width(), lora_rank_for(budget, &shapes)];
        ranks.map(|rank| (rank, rank * per_rank))
    }

    /// s and f of the layers as a tree has them.
    fn choices(&self) -> Vec<Choice> {
        let dense = self.config.gate.kind == GateKind::Dense;
        let choice = |&l: &LayerConfig| Choice {
            experts: l.experts,
            fanout: if dense { l.experts } else { l.fanout },
        };
        self.config.layers.iter().map(choice).collect()
    }

    /// A flat mixture of all layers' experts with as many chosen as each layer's parents choose.
    fn flat(&self) -> Choice {
        let choices = self.choices();
        let sum = |of: fn(&Choice) -> usize| choices.iter().map(of).sum();
        Choice { experts: sum(|c| c.experts), fanout: sum(|c| c.fanout) }
    }
}
