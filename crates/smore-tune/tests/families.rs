//! Every family of decoders gives what transformers recorded (`recorded/`, made by
//! `xtask/python/record_bases.py`): whole sequences, and token by token through the cache.

use smore_engine::Cpu;
use smore_tune::inject::Adapters;
use smore_tune::model::family::Family;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use smore_tune::verify::check_case;
use std::path::{Path, PathBuf};

fn recorded(family: Family) -> PathBuf {
    Path::new("tests/recorded").join(family.name())
}

#[test]
fn every_family_is_what_transformers_computes() {
    for family in Family::ALL {
        let (report, _) = check_case(&recorded(family), None).unwrap();
        let names: Vec<_> = report.checks.iter().map(|c| c.tensor.as_str()).collect();
        for name in ["logits", "hidden.3", "loss"] {
            assert!(names.contains(&name), "{}: no {name} in {names:?}", family.name());
        }
        assert!(report.passed(), "{}: {:?}", family.name(), report.worst());
    }
}

/// A window or a soft-cap must not depend on whether keys come from the cache.
#[test]
fn token_by_token_is_the_whole_sequence() {
    for family in Family::ALL {
        let folder = ModelFolder::open(&recorded(family)).unwrap();
        let vocabulary = folder.spec.vocabulary;
        let adapters = Adapters::none(&folder.spec);
        let model = Model::new(Cpu::<f32>::new(), &folder, adapters, &[], 64);
        let ids: Vec<u32> = (0..40).map(|i| (i * 29 + 3) % 96).collect();
        let mut batch = Batch::default();
        batch.push(&ids, &[true; 40]);
        let (_, whole) = model.states_and_logits(&batch, None);
        // Several tokens at first, then one by one.
        let mut cache = model.cache();
        model.extend(&ids[..5], &mut cache);
        for (i, &id) in ids.iter().enumerate().skip(5) {
            let row = &whole[i * vocabulary..(i + 1) * vocabulary];
            let cached = model.extend(&[id], &mut cache);
            let off = cached.iter().zip(row).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Sums of another order in f32 are up to 2.6e-5 apart here.
            assert!(off < 5e-5, "{} at {i}: {off}", family.name());
        }
    }
}
