//! Every family of decoders gives what transformers recorded (`recorded/`, made by
//! `xtask/python/record_bases.py`): whole sequences, and token by token through the cache.

use safetensors::SafeTensors;
use smore_engine::Cpu;
use smore_tune::inject::Adapters;
use smore_tune::model::family::Family;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use std::path::Path;

/// The largest difference of two runs of numbers.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_equal_those_of_transformers() {
    for family in Family::ALL {
        let path = Path::new("tests/recorded").join(family.name());
        let folder = ModelFolder::open(&path).unwrap();
        let vocabulary = folder.spec.vocabulary;
        let adapters = Adapters::none(&folder.spec);
        let model = Model::new(Cpu::<f32>::new(), &folder, adapters, &[], 64);
        let bytes = std::fs::read(path.join("fixture.safetensors")).unwrap();
        let fixture = SafeTensors::deserialize(&bytes).unwrap();
        let ids: Vec<u32> = {
            let data = fixture.tensor("input_ids").unwrap().data().to_vec();
            data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
        };
        let logits: Vec<f32> = {
            let data = fixture.tensor("logits").unwrap().data().to_vec();
            data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        // The first row has no padding.
        let (ids, want) = (&ids[..20], &logits[..20 * vocabulary]);
        let mut batch = Batch::default();
        batch.push(ids, &[true; 20]);
        let (_, whole) = model.states_and_logits(&batch, None);
        let whole = difference(&whole, want);

        // Two tokens at first, then one by one.
        let mut cache = model.cache();
        let mut cached =
            difference(&model.extend(&ids[..2], &mut cache), &want[vocabulary..2 * vocabulary]);
        for (i, &id) in ids.iter().enumerate().skip(2) {
            let row = &want[i * vocabulary..(i + 1) * vocabulary];
            cached = cached.max(difference(&model.extend(&[id], &mut cache), row));
        }
        assert!(whole < 2e-5 && cached < 2e-5, "{}: {whole}, {cached}", family.name());
    }
}
