//! `smore_manifest.json`: what an adapter was made from and with, beside PEFT's files, which have
//! no place for it.

use super::folder::write;
use crate::config::DataConfig;
use crate::data::DataReport;
use crate::error::{Error, Result};
use crate::routing::LayerUsage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The file's name.
pub const NAME: &str = "smore_manifest.json";

/// Where an adapter comes from. Fields that do not apply are absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this program.
    pub version: String,
    /// The base model.
    pub base: BaseFiles,
    /// Seed of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// The step whose values these are, where it is that of the lowest held-out loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_step: Option<usize>,
    /// The adapter it was grown from, or continues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What it was trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<TrainedOn>,
    /// How the experts were used on the held-out samples, or the training samples where none are
    /// held out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routing: Vec<LayerUsage>,
}

/// SHA-256 of the base's files, in hexadecimal, by file name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFiles {
    /// `config.json` and the files of weights.
    pub weights: BTreeMap<String, String>,
    /// What turns text into tokens and back.
    pub tokenizer: BTreeMap<String, String>,
    /// The chat template, where it is a file of its own; else it is in `tokenizer_config.json`.
    pub template: BTreeMap<String, String>,
}

/// What an adapter was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedOn {
    /// SHA-256 of every data file, by path.
    pub files: BTreeMap<String, String>,
    /// What was read and kept of them.
    #[serde(flatten)]
    pub report: DataReport,
}

impl Manifest {
    /// The manifest of something made here on the model in `folder`.
    ///
    /// # Errors
    /// If a file of the model cannot be read.
    pub fn new(folder: &Path) -> Result<Self> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Self { version, base: BaseFiles::of(folder)?, ..Self::default() })
    }

    /// Reads the file in an adapter's folder; none where the adapter was made elsewhere.
    ///
    /// # Errors
    /// If there is one that cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let file = folder.join(NAME);
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { path: file, source }),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| Error::Adapter { file, message: format!("not a manifest: {e}") })
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Run(format!("the manifest cannot be written as JSON: {e}")))?;
        write(&folder.join(NAME), format!("{text}\n").as_bytes())
    }
}

impl BaseFiles {
    /// Hashes the files of a model folder, several at a time.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn of(folder: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: folder.to_owned(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let hash = |wanted: fn(&str) -> bool| -> Result<BTreeMap<String, String>> {
            let names: Vec<&String> = names.iter().filter(|n| wanted(n)).collect();
            names.par_iter().map(|&n| Ok((n.clone(), sha256(&folder.join(n))?))).collect()
        };
        Ok(Self {
            weights: hash(|n| n == "config.json" || n.ends_with(".safetensors"))?,
            tokenizer: hash(|n| {
                ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"].contains(&n)
            })?,
            template: hash(|n| n == "chat_template.jinja")?,
        })
    }

    /// The first file in which the model in `folder` differs from these; weights are left out,
    /// which takes no time.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn quick_difference(&self, folder: &Path) -> Result<Option<&str>> {
        let files = self.weights.iter().chain(&self.tokenizer).chain(&self.template);
        for (name, hash) in files.filter(|(name, _)| !name.ends_with(".safetensors")) {
            let file = folder.join(name);
            if !file.is_file() || sha256(&file)? != *hash {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The first file in which two models differ.
    pub fn difference<'a>(&'a self, other: &'a Self) -> Option<&'a str> {
        let pairs = [
            (&self.weights, &other.weights),
            (&self.tokenizer, &other.tokenizer),
            (&self.template, &other.template),
        ];
        pairs.into_iter().find_map(|(a, b)| {
            let missing = b.keys().find(|name| !a.contains_key(*name));
            let changed = a.iter().find(|(name, hash)| b.get(*name) != Some(hash));
            changed.map(|(name, _)| name).or(missing).map(String::as_str)
        })
    }
}

impl TrainedOn {
    /// The data of a run.
    ///
    /// # Errors
    /// If a file cannot be read any more.
    pub fn of(config: &DataConfig, report: &DataReport) -> Result<Self> {
        let hash = |path: &PathBuf| Ok((path.display().to_string(), sha256(path)?));
        let files = crate::data::files(config)?.iter().map(hash).collect::<Result<_>>()?;
        Ok(Self { files, report: report.clone() })
    }
}

/// The SHA-256 of a file, as `sha256sum` prints it.
///
/// # Errors
/// If it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut hasher = Sha256::new();
    let (mut file, mut piece) = (File::open(path).map_err(io)?, vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).map_err(io)? {
            0 => break,
            n => hasher.update(&piece[..n]),
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |x: u8| char::from_digit(u32::from(x), 16).expect("four bits");
    bytes.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&file).unwrap(), abc);
        let files = BaseFiles::of(dir.path()).unwrap();
        assert_eq!(files.weights["model.safetensors"], abc);
    }

    #[test]
    fn another_base_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "notes.txt"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let before = BaseFiles::of(dir.path()).unwrap();
        assert_eq!(before.difference(&before), None);
        assert_eq!(before.quick_difference(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join("notes.txt"), "other").unwrap();
        assert_eq!(before.difference(&BaseFiles::of(dir.path()).unwrap()), None);
        std::fs::write(dir.path().join("tokenizer.json"), "other").unwrap();
        assert_eq!(before.quick_difference(dir.path()).unwrap(), Some("tokenizer.json"));
        let after = BaseFiles::of(dir.path()).unwrap();
        assert_eq!(before.difference(&after), Some("tokenizer.json"));
        std::fs::write(dir.path().join("model.safetensors"), "new").unwrap();
        let after = BaseFiles::of(dir.path()).unwrap();
        assert_eq!(before.difference(&after), Some("model.safetensors"));
    }
}
