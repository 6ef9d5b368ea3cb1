//! The samples: they are read and tokenized as in training.

use super::{Area, Examined, Subject};
use crate::data::{self, Dataset, Sample};
use crate::error::{Error, Result};

pub(super) fn check(subject: &Subject, examined: &mut Examined) {
    let (Some(config), Some(spec)) = (&subject.data, &examined.spec) else { return };
    let (Some(tokenizer), Some(template)) = (&examined.tokenizer, &examined.template) else {
        return;
    };
    let (asked, positions) = (config.cutoff_len, spec.max_positions);
    let mut config = config.clone();
    config.cutoff_len = asked.min(positions);
    let read = data::load(&config, subject.seed(), tokenizer, template).and_then(|data| {
        not_empty(&data, subject)?;
        fits_vocabulary(&data, subject, tokenizer.vocab_size(), spec.vocabulary)?;
        has_evaluations(&data, subject)?;
        Ok(data)
    });
    if asked > positions {
        examined.warn(
            Area::Data,
            format!(
                "data.cutoff_len is {asked}, but the model has {positions} positions; samples are \
                 cut there"
            ),
            format!("set data.cutoff_len to {positions} or less"),
        );
    }
    examined.data = examined.keep(Area::Data, read);
    let Some(Dataset { train, validation, report }) = &examined.data else { return };
    let message = format!(
        "{} samples to train on, {} held out; {} trained tokens of {}",
        train.len(),
        validation.len(),
        report.trained_tokens,
        report.total_tokens
    );
    let (cut, all) = (report.truncated, train.len());
    examined.good(Area::Data, message);
    if cut > 0 {
        examined.warn(
            Area::Data,
            format!("{cut} of {all} samples are cut at {} tokens", config.cutoff_len),
            "raise data.cutoff_len, or shorten the samples",
        );
    }
}

fn not_empty(data: &Dataset, subject: &Subject) -> Result<()> {
    if data.train.is_empty() {
        let message = "data.train holds no sample to train on".into();
        return Err(Error::Config { file: subject.name.clone(), message });
    }
    Ok(())
}

/// Every token must have its row in the token table.
fn fits_vocabulary(
    data: &Dataset,
    subject: &Subject,
    tokens: usize,
    vocabulary: usize,
) -> Result<()> {
    let largest = |samples: &[Sample]| samples.iter().flat_map(Sample::ids).max().copied();
    match largest(&data.train).max(largest(&data.validation)) {
        Some(id) if id as usize >= vocabulary => Err(Error::Model {
            file: subject.model.join("tokenizer.json"),
            message: format!(
                "gives token {id} ({tokens} in all), but config.json says vocab_size {vocabulary}; \
                 the tokenizer belongs to another model"
            ),
        }),
        _ => Ok(()),
    }
}

/// What chooses among evaluations needs some.
fn has_evaluations(data: &Dataset, subject: &Subject) -> Result<()> {
    let Some(train) = &subject.train else { return Ok(()) };
    let selects = train.early_stopping_patience.is_some() || train.load_best_model_at_end;
    if selects && data.validation.is_empty() {
        let message = "train.early_stopping_patience and train.load_best_model_at_end go by the \
                       held-out loss, but nothing is held out; give data.validation a fraction or \
                       a path";
        return Err(Error::Config { file: subject.name.clone(), message: message.into() });
    }
    Ok(())
}
