//! From files to samples, a bounded chunk of records at a time.

use rayon::prelude::*;

use super::read::{Layout, documents, layout};
use super::store::{IN_MEMORY, Spill};
use super::{
    Content, DataReport, Dataset, Document, Draw, Fault, FileReport, Sample, Survey, check_files,
    draw, pick, sources, split, tokenize,
};
use crate::config::{DataConfig, SourceConfig};
use crate::error::{Error, Result};
use crate::template::{Message, Template};
use crate::tokenizer::Tokenizer;

/// Records that are held as text at a time, and their bytes.
const CHUNK_RECORDS: usize = 1024;
const CHUNK_BYTES: usize = 8 << 20;

/// Reads, tokenizes and splits the data of a run. The same configuration, seed and files give the
/// same samples in the same order.
///
/// Text is held for a chunk of records only. What stays are the samples: 5 bytes for every token
/// (its id and whether it is a target), of which at most 4 MiB in memory and the rest in a file
/// without a name in `data.cache_dir`, and a record of its place for every sample. A JSON array,
/// like every file, is read record by record; a `.txt` file in pieces of 4 MiB.
///
/// # Errors
/// The first record that is wrong.
pub fn load(
    config: &DataConfig,
    seed: u64,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<Dataset> {
    Ok(gather(config, seed, tokenizer, template, true, IN_MEMORY)?.data)
}

/// As [`load`], but records that are wrong are dropped and listed.
///
/// # Errors
/// A file that is missing or whose kind is unknown.
pub fn survey(
    config: &DataConfig,
    seed: u64,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<Survey> {
    gather(config, seed, tokenizer, template, false, IN_MEMORY)
}

/// The samples of one record or, of a text file, of the whole file.
struct Group {
    source: usize,
    samples: Vec<Sample>,
}

/// `in_memory`: bytes of tokens that are held there.
pub(super) fn gather(
    config: &DataConfig,
    seed: u64,
    tokenizer: &Tokenizer,
    template: &Template,
    strict: bool,
    in_memory: usize,
) -> Result<Survey> {
    check_files(config)?;
    let (train, held_out) = sources(config)?;
    let max_samples = config.max_samples.unwrap_or(usize::MAX);
    let folder = config.cache_dir.clone().unwrap_or_else(std::env::temp_dir);
    let spill = Spill::new(&folder, in_memory);
    let cutoff_len = config.cutoff_len;
    let mut reader = Reader { tokenizer, template, cutoff_len, strict, spill };
    let drawn = draw_records(&train, max_samples, seed)?;
    let (mut files, mut groups) = (Vec::new(), Vec::new());
    for (i, (source, drawn)) in train.iter().zip(&drawn).enumerate() {
        let (mut report, mut found) = reader.read(source, drawn.as_deref())?;
        if layout(&source.path)? == Layout::Text {
            let most = source.max_samples.unwrap_or(usize::MAX);
            for samples in &mut found {
                *samples = pick(std::mem::take(samples), most, seed, Draw::SourceSamples, i);
            }
            report.count(&found);
        }
        files.push(report);
        groups.extend(found.into_iter().map(|samples| Group { source: i, samples }));
    }
    if let [Group { samples, .. }] = &mut groups[..] {
        // One long text: its pieces are the samples to pick from and to split.
        let pieces = std::mem::take(samples);
        let source = groups[0].source;
        let pieces = pick(pieces, max_samples, seed, Draw::MaxSamples, 0);
        groups = pieces.into_iter().map(|s| Group { source, samples: vec![s] }).collect();
        let counted: Vec<_> = groups.iter().map(|group| group.samples.clone()).collect();
        files[source].count(&counted);
    }
    let kept = groups.iter().map(|group| group.samples.len()).sum();
    let (train_groups, validation, validation_from) = if let Some(source) = &held_out {
        let (mut report, found) = reader.read(source, None)?;
        report.held_out = true;
        files.push(report);
        (groups, found.into_iter().flatten().collect(), source.path.display().to_string())
    } else {
        let fraction = config.validation.fraction;
        let (train, validation) = split(groups, fraction, seed);
        let from = if validation.is_empty() {
            "none".to_owned()
        } else {
            format!("{}% of the training data", fraction * 100.0)
        };
        (train, validation.into_iter().flat_map(|group| group.samples).collect(), from)
    };
    reader.spill.finish()?;
    let train = mix(train_groups, &train, seed);
    let read = files.iter().filter(|file| !file.held_out).map(|file| file.read).sum();
    let report = DataReport {
        read,
        kept,
        truncated: train.iter().filter(|sample| sample.truncated).count(),
        trained_tokens: train.iter().map(Sample::n_trained).sum(),
        total_tokens: train.iter().map(Sample::len).sum(),
        validation_from,
    };
    Ok(Survey { files, data: Dataset { train, validation, report } })
}

/// Which records of each source are taken; nothing where all are, and no file need be read twice.
fn draw_records(
    train: &[SourceConfig],
    max_samples: usize,
    seed: u64,
) -> Result<Vec<Option<Vec<bool>>>> {
    let limited = |source: &SourceConfig| source.max_samples.is_some();
    if max_samples == usize::MAX && !train.iter().any(limited) {
        return Ok(vec![None; train.len()]);
    }
    let mut drawn = Vec::new();
    for (i, source) in train.iter().enumerate() {
        // The pieces of a text are drawn when they are known.
        let text = layout(&source.path)? == Layout::Text;
        let n = if text { 1 } else { documents(source)?.flatten().count() };
        let most = source.max_samples.filter(|_| !text).unwrap_or(n);
        drawn.push(if most < n {
            draw(n, most, seed, Draw::SourceSamples, i)
        } else {
            vec![true; n]
        });
    }
    let taken: usize = drawn.iter().flatten().filter(|&&taken| taken).count();
    if taken > max_samples {
        let all = draw(taken, max_samples, seed, Draw::MaxSamples, 0);
        let mut all = all.into_iter();
        for taken in drawn.iter_mut().flatten().filter(|taken| **taken) {
            *taken = all.next().unwrap_or(false);
        }
    }
    Ok(drawn.into_iter().map(Some).collect())
}

/// Repeats and thins out the samples of each source by its weight.
fn mix(groups: Vec<Group>, sources: &[SourceConfig], seed: u64) -> Vec<Sample> {
    let mut extra: Vec<_> = sources
        .iter()
        .enumerate()
        .map(|(i, source)| {
            let n = groups.iter().filter(|group| group.source == i).count();
            let share = (source.weight.fract() * n as f64).round() as usize;
            draw(n, share, seed, Draw::Weight, i).into_iter()
        })
        .collect();
    let mut samples = Vec::new();
    for group in groups {
        let times = sources[group.source].weight.trunc() as usize;
        let one_more = usize::from(extra[group.source].next().unwrap_or(false));
        for _ in 1..times + one_more {
            samples.extend_from_slice(&group.samples);
        }
        if times + one_more > 0 {
            samples.extend(group.samples);
        }
    }
    samples
}

struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a Template,
    cutoff_len: usize,
    strict: bool,
    spill: Spill,
}

impl Reader<'_> {
    /// The samples of every record that was drawn.
    fn read(
        &mut self,
        source: &SourceConfig,
        drawn: Option<&[bool]>,
    ) -> Result<(FileReport, Vec<Vec<Sample>>)> {
        let mut report = FileReport::new(source);
        let mut documents = documents(source)?;
        let text_file = layout(&source.path)? == Layout::Text;
        let (mut groups, mut chunk, mut bytes, mut good) = (Vec::new(), Vec::new(), 0, 0);
        loop {
            let next = documents.next();
            let ended = next.is_none();
            let failed = match next {
                Some(Ok(document)) => {
                    report.read += 1;
                    good += 1;
                    if drawn.is_none_or(|drawn| text_file || drawn[good - 1]) {
                        bytes += size(&document);
                        chunk.push(document);
                    } else {
                        report.not_drawn += 1;
                    }
                    None
                }
                Some(Err(error)) => Some(error),
                None => None,
            };
            if ended || failed.is_some() || chunk.len() >= CHUNK_RECORDS || bytes >= CHUNK_BYTES {
                groups.extend(self.tokenize(&std::mem::take(&mut chunk), &mut report)?);
                bytes = 0;
            }
            if let Some(error) = failed {
                report.read += usize::from(has_line(&error));
                report.fault(error, self.strict)?;
            }
            if ended {
                break;
            }
        }
        if text_file {
            // However many pieces it was read in, it is one record.
            (report.read, report.dropped) = (1, usize::from(groups.is_empty()));
            groups = vec![groups.into_iter().flatten().collect()];
            groups.retain(|samples: &Vec<Sample>| !samples.is_empty());
        }
        report.format = documents.format();
        report.count(&groups);
        Ok((report, groups))
    }

    /// Tokenizes a chunk. Of several errors the one to report must be the first.
    fn tokenize(
        &mut self,
        documents: &[Document],
        report: &mut FileReport,
    ) -> Result<Vec<Vec<Sample>>> {
        let (tokenizer, template, cutoff_len) = (self.tokenizer, self.template, self.cutoff_len);
        let one = |document| tokenize(document, tokenizer, template, cutoff_len);
        let samples: Vec<Result<_>> = documents.par_iter().map(one).collect();
        let mut groups = Vec::with_capacity(samples.len());
        for samples in samples {
            match samples {
                Ok(mut samples) => {
                    self.spill.hold(&mut samples)?;
                    groups.push(samples);
                }
                Err(error) => report.fault(error, self.strict)?,
            }
        }
        Ok(groups)
    }
}

/// Bytes of a record's text, about.
fn size(document: &Document) -> usize {
    let all = |messages: &[Message]| messages.iter().map(|m| m.content.len()).sum::<usize>();
    match &document.content {
        Content::Chat(messages) => all(messages),
        Content::Completion(prompt, completion) => all(prompt) + all(completion),
        Content::Text(text) => text.len(),
    }
}

fn has_line(error: &Error) -> bool {
    matches!(error, Error::Data { line: Some(_), .. })
}

impl FileReport {
    fn new(source: &SourceConfig) -> Self {
        Self {
            path: source.path.clone(),
            held_out: false,
            format: source.format,
            read: 0,
            kept: 0,
            not_drawn: 0,
            dropped: 0,
            faults: Vec::new(),
            samples: 0,
            truncated: 0,
            tokens: 0,
            trained_tokens: 0,
        }
    }

    fn fault(&mut self, error: Error, strict: bool) -> Result<()> {
        match error {
            Error::Data { line, message, .. } if !strict => {
                self.dropped += usize::from(line.is_some());
                self.faults.push(Fault { line, message });
                Ok(())
            }
            other => Err(other),
        }
    }

    /// Counts what the records became.
    fn count(&mut self, groups: &[Vec<Sample>]) {
        let samples = || groups.iter().flatten();
        self.kept = self.read - self.not_drawn - self.dropped;
        self.samples = samples().count();
        self.truncated = samples().filter(|sample| sample.truncated).count();
        self.tokens = samples().map(Sample::len).sum();
        self.trained_tokens = samples().map(Sample::n_trained).sum();
    }
}
