//! Adapters that the authors' code and PEFT saved, in the folder that `SMORE_SHARED` names, read and
//! written again: the same tensors to the bit and the same settings. Run by `cargo xtask parity`.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{load_adapter, save_adapter};
use smore_tune::model::folder::ModelFolder;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn recorded() -> Vec<PathBuf> {
    let Some(shared) = std::env::var_os("SMORE_SHARED") else { return vec![] };
    let entries = std::fs::read_dir(Path::new(&shared).join("fixtures/e2e")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.join("adapter_config.json").is_file());
    folders.sort();
    assert!(!folders.is_empty(), "no recorded adapters");
    folders
}

fn settings(folder: &Path) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Shape, type and bytes by name, and the metadata.
type Stored = (BTreeMap<String, (Vec<usize>, Dtype, Vec<u8>)>, BTreeMap<String, String>);

fn stored(folder: &Path) -> Stored {
    let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let of = |(name, t): (String, safetensors::tensor::TensorView)| {
        (name, (t.shape().to_vec(), t.dtype(), t.data().to_vec()))
    };
    (tensors.tensors().into_iter().map(of).collect(), metadata)
}

#[test]
fn adapters_of_others_are_written_as_they_were_read() {
    let dir = tempfile::tempdir().unwrap();
    for folder in recorded() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let before = settings(&folder);
        let base = folder.join(before["base_model_name_or_path"].as_str().unwrap());
        let adapter = load_adapter(&folder, &ModelFolder::open(&base).unwrap().spec).unwrap();
        let copy = dir.path().join(&name);
        let (held, manifest) = (&adapter.adapters, Manifest::default());
        save_adapter(&copy, &adapter.settings, held, &adapter.values, &manifest).unwrap();

        let ((old, old_metadata), (new, new_metadata)) = (stored(&folder), stored(&copy));
        assert!(old.keys().eq(new.keys()), "{name}: other tensors");
        for (tensor, old) in &old {
            assert!(*old == new[tensor], "{name}: `{tensor}` differs");
        }
        assert_eq!(old_metadata, new_metadata, "{name}");

        let after = settings(&copy);
        for (key, new) in &after {
            assert_eq!(before.get(key), Some(new), "{name}: {key}");
        }
        // PEFT has keys for much that a plain LoRA leaves unset.
        for (key, old) in before.iter().filter(|(key, _)| !after.contains_key(*key)) {
            let unset = [Value::Null, Value::Bool(false), serde_json::json!({})].contains(old);
            assert!(before["peft_type"] == "LORA" && unset, "{name}: {key} = {old} is lost");
        }
        println!("ok    {name:26} {:4} tensors, {} keys", old.len(), after.len());
    }
}
