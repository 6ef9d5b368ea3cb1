//! Small cases of whole models on the demo's base, recorded with `smore verify --dump`.

use assert_cmd::Command;
use serde_json::Value;
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::{Settings, save_adapter};
use smore_tune::config::AdapterConfig;
use smore_tune::inject::Adapters;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::verify::{Tensor, Tensors, read_tensors, write_tensors};
use std::path::{Path, PathBuf};

pub(crate) const LORA: &str = r#"{"kind": "lora", "rank": 2, "targets": ["up_proj", "q_proj"]}"#;

pub(crate) fn smore(gate: &str) -> String {
    format!(
        r#"{{"kind": "smore", "targets": ["up_proj", "gate_proj"], "init": "normal",
            "activation": "tanh",
            "layers": [{{"experts": 3, "fanout": 2, "rank": 2}},
                       {{"experts": 3, "fanout": 2, "rank": 2}}],
            "gate": {{"kind": "{gate}", "router_width": 4, "router_input_width": 4}}}}"#
    )
}

pub(crate) fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-base")
}

/// Runs `smore verify`; exit code, standard output, standard error.
pub(crate) fn verify(args: &[&dyn AsRef<std::ffi::OsStr>]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("smore").unwrap();
    command.arg("verify");
    for arg in args {
        command.arg(arg);
    }
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

pub(crate) fn tensor(shape: &[usize], values: impl IntoIterator<Item = f64>) -> Tensor {
    let values: Vec<f64> = values.into_iter().collect();
    assert_eq!(values.len(), shape.iter().product::<usize>());
    Tensor { shape: shape.to_vec(), values }
}

pub(crate) fn zeros(shape: &[usize]) -> Tensor {
    tensor(shape, vec![0.0; shape.iter().product()])
}

/// A case's folder beside a copy of the base.
pub(crate) struct Case {
    _dir: tempfile::TempDir,
    pub(crate) folder: PathBuf,
    pub(crate) spec: DecoderSpec,
}

impl Case {
    /// An adapter whose base is named `base`, from the case's folder.
    pub(crate) fn new(adapter: &str, base_name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("base");
        std::fs::create_dir(&copy).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(base().join(name), copy.join(name)).unwrap();
        }
        let spec = DecoderSpec::read(&copy.join("config.json")).unwrap();
        let config: AdapterConfig = serde_json::from_str(adapter).unwrap();
        let adapters = Adapters::new(&config, &spec).unwrap();
        let mut values = adapters.init(3);
        for (i, v) in values.iter_mut().enumerate() {
            *v += 0.02 * (((i * 37) % 23) as f32 - 11.0) / 11.0;
        }
        let folder = dir.path().join("case");
        let settings = Settings::new(config, Path::new(base_name));
        save_adapter(&folder, &settings, &adapters, &values, &Manifest::default()).unwrap();
        Self { _dir: dir, folder, spec }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Tensors {
        read_tensors(&self.file(name)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, tensors: &Tensors) {
        write_tensors(tensors, &self.file(name)).unwrap();
    }

    /// Changes the tensors of a file.
    pub(crate) fn edit(&self, name: &str, change: impl FnOnce(&mut Tensors)) {
        let mut tensors = self.read(name);
        change(&mut tensors);
        self.write(name, &tensors);
    }

    pub(crate) fn write_json(&self, name: &str, json: &Value) {
        std::fs::write(self.file(name), json.to_string()).unwrap();
    }

    pub(crate) fn read_json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.file(name)).unwrap()).unwrap()
    }

    pub(crate) fn verify(&self) -> (i32, String, String) {
        verify(&[&self.folder])
    }

    /// What is computed.
    pub(crate) fn dump(&self) -> Tensors {
        let out = self.folder.join("dump.safetensors");
        let (code, text, error) = verify(&[&self.folder, &"--dump", &out]);
        assert!(code < 2, "{text}{error}");
        let tensors = read_tensors(&out).unwrap();
        std::fs::remove_file(out).unwrap();
        tensors
    }

    /// Asserts that the case differs, in a tensor whose name starts so.
    pub(crate) fn misses(&self, tensor: &str) {
        let (code, out, err) = self.verify();
        assert_eq!(code, 1, "{tensor}: {out}{err}");
        assert!(out.starts_with("MISS ") && out.contains(&format!("worst {tensor}")), "{out}");
    }

    /// Asserts that the case cannot be read, for a reason that names all of this.
    pub(crate) fn refused(&self, reasons: &[&str]) {
        let (code, out, err) = self.verify();
        assert_eq!(code, 2, "{out}{err}");
        for reason in reasons {
            assert!(err.contains(reason), "`{reason}` is not in: {err}");
        }
    }
}
