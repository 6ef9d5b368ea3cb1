//! Samples that are held out and trained on as well.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use serde::Serialize;

use super::{Dataset, Sample};

/// A held-out sample whose tokens are those of a training sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Duplicate {
    /// Where the training sample stands, as `FILE:LINE`; the first if there are several.
    pub train: String,
    /// Where the held-out sample stands.
    pub held_out: String,
}

/// Every held-out sample that is also trained on, token by token, in the order of the held-out ones.
pub fn duplicates(data: &Dataset) -> Vec<Duplicate> {
    let state = RandomState::new();
    // Hashes alone, so that no tokens are held twice.
    let mut seen: HashMap<u64, Vec<u32>> = HashMap::new();
    for (i, sample) in data.train.iter().enumerate() {
        seen.entry(state.hash_one(sample.ids())).or_default().push(i as u32);
    }
    let place =
        |sample: &Sample| format!("{}:{}", sample.origin.file.display(), sample.origin.line);
    let twin = |sample: &Sample| {
        let same = seen.get(&state.hash_one(sample.ids()))?;
        same.iter().map(|&i| &data.train[i as usize]).find(|other| other.ids() == sample.ids())
    };
    let held_out = data.validation.iter();
    held_out
        .filter_map(|sample| {
            twin(sample).map(|other| Duplicate { train: place(other), held_out: place(sample) })
        })
        .collect()
}
