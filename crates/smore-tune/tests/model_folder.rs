//! Model folders: shards and storage types give the same model, and damaged folders are refused
//! with the file and the tensor named.

use safetensors::tensor::{Dtype, TensorView};
use smore_engine::Cpu;
use smore_tune::error::Error;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::from_scratch;
use smore_tune::model::{Batch, Model};
use std::path::Path;

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn config() -> serde_json::Value {
    serde_json::json!({"model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11,
        "initializer_range": 0.5})
}

/// Values that f16 and bf16 hold exactly.
fn tensors() -> Tensors {
    let spec = DecoderSpec::from_json(&config()).unwrap();
    let values = from_scratch(&spec, 1);
    let mut rest = &values[..];
    let mut cut = |(name, shape): (String, Vec<usize>)| {
        let (head, tail) = rest.split_at(shape.iter().product());
        rest = tail;
        (name, shape, head.iter().map(|x| (x * 16.0).round() / 16.0).collect())
    };
    spec.tensors().into_iter().map(&mut cut).collect()
}

fn write(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let bytes = |values: &Vec<f32>| -> Vec<u8> {
        let each = |&x: &f32| match dtype {
            Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::F64 => f64::from(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        values.iter().flat_map(each).collect()
    };
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| bytes(&t.2)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, b)| (t.0.clone(), TensorView::new(dtype, t.1.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn folder(tensors: &Tensors, dtype: Dtype) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    write(&dir.path().join("model.safetensors"), tensors, dtype);
    dir
}

fn logits(dir: &Path) -> Vec<f32> {
    let folder = ModelFolder::open(dir).unwrap();
    let adapters = Adapters::none(&folder.spec);
    let model = Model::new(Cpu::<f32>::new(), &folder, adapters, &[], 16);
    let mut batch = Batch::default();
    batch.push(&[1, 5, 3, 10, 2, 7], &[true; 6]);
    model.states_and_logits(&batch, None).1
}

fn refusal(dir: &Path) -> String {
    let Err(error) = ModelFolder::open(dir) else { panic!("the folder was accepted") };
    assert!(matches!(error, Error::Model { .. } | Error::Missing { .. }) && error.exit_code() == 2);
    error.to_string()
}

#[test]
fn storage_types_and_shards_give_the_same_model() {
    let all = tensors();
    let want = logits(folder(&all, Dtype::F32).path());
    assert!(want.iter().any(|x| x.abs() > 0.1));
    for dtype in [Dtype::F16, Dtype::BF16] {
        // The weights are the same; the kernel that multiplies them may round otherwise.
        let got = logits(folder(&all, dtype).path());
        assert!(want.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-5), "{dtype:?}");
    }
    let dir = folder(&all, Dtype::F32);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in all.chunks(all.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        write(&dir.path().join(&name), &part.to_vec(), Dtype::F32);
        map.extend(part.iter().map(|t| (t.0.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    let index_path = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index_path, index.to_string()).unwrap();
    assert!(want == logits(dir.path()), "shards");

    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("model-00002-of-00002.safetensors"));
    let trick = index.to_string().replace("model-00002", "../model-00002");
    std::fs::write(&index_path, trick).unwrap();
    assert!(refusal(dir.path()).contains("not a plain file name"));
}

#[test]
fn wrong_tensors_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let at = |all: &Tensors| all.iter().position(|t| t.0 == name).unwrap();

    let mut missing = tensors();
    let i = at(&missing);
    missing.remove(i);
    assert!(refusal(folder(&missing, Dtype::F32).path()).contains(name));

    let mut renamed = tensors();
    renamed[i].0 = "model.layers.1.mlp.upproj.weight".into();
    let said = refusal(folder(&renamed, Dtype::F32).path());
    assert!(said.contains(name) && said.contains("model.layers.1.mlp.upproj.weight"), "{said}");

    let mut extra = tensors();
    extra.push(("model.layers.2.mlp.up_proj.weight".into(), vec![1], vec![0.0]));
    let said = refusal(folder(&extra, Dtype::F32).path());
    assert!(said.contains("model.layers.2.mlp.up_proj.weight") && said.contains("no place"));

    let mut turned = tensors();
    turned[i].1 = vec![8, 12];
    let said = refusal(folder(&turned, Dtype::F32).path());
    assert!(said.contains(name) && said.contains("[8, 12]") && said.contains("[12, 8]"), "{said}");

    let said = refusal(folder(&tensors(), Dtype::F64).path());
    assert!(said.contains("F64") && said.contains("model.safetensors"), "{said}");
}

#[test]
fn broken_files_are_named() {
    let dir = folder(&tensors(), Dtype::F32);
    let file = dir.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for bytes in [&whole[..whole.len() - 4], &whole[..40], &whole[..3], &[0xff; 64][..]] {
        std::fs::write(&file, bytes).unwrap();
        assert!(refusal(dir.path()).contains("model.safetensors"));
    }
    std::fs::remove_file(&file).unwrap();
    assert!(refusal(dir.path()).contains("model.safetensors"));
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(refusal(dir.path()).contains("config.json"));
}

/// The tied head may be stored once more, as some writers do.
#[test]
fn a_second_copy_of_the_tied_head_is_no_error() {
    let mut all = tensors();
    let head = all.iter().position(|t| t.0 == "lm_head.weight").unwrap();
    let dir = folder(&all, Dtype::F32);
    let mut tied = config();
    tied["tie_word_embeddings"] = true.into();
    std::fs::write(dir.path().join("config.json"), tied.to_string()).unwrap();
    let with_copy = logits(dir.path());
    all.remove(head);
    write(&dir.path().join("model.safetensors"), &all, Dtype::F32);
    assert!(with_copy == logits(dir.path()));
}
