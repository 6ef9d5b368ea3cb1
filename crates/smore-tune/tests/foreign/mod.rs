//! Every reader of files that others wrote as a function over such a file's bytes, with good files
//! to start from. What is read must be whole; anything else must be an error. `fuzz/` uses it too.

// It is a module of a test and the root of a crate.
#![allow(unreachable_pub)]

use safetensors::tensor::{Dtype, TensorView};
use smore_tune::checkpoint::manifest::Manifest;
use smore_tune::checkpoint::pickle::read_torch;
use smore_tune::checkpoint::{Settings, load_adapter, save_adapter};
use smore_tune::config::{AdapterConfig, RunConfig};
use smore_tune::demo::tokenizer::train_tokenizer;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::{from_scratch, to_f32};
use smore_tune::template::{Message, Template};
use smore_tune::tokenizer::Tokenizer;
use std::io::{Cursor, Write};
use std::path::Path;
use tempfile::TempDir;

/// A reader and files that it accepts.
pub struct Reader {
    pub name: &'static str,
    pub good: fn() -> Vec<Vec<u8>>,
    /// Reads a file's bytes; an error is its message.
    ///
    /// # Panics
    /// If what was read contradicts itself.
    pub read: fn(&[u8]) -> Result<(), String>,
}

pub const READERS: [Reader; 9] = [
    Reader { name: "torch_file", good: torch_files, read: read_torch_file },
    Reader { name: "torch_pickle", good: torch_pickles, read: read_torch_pickle },
    Reader { name: "adapter_weights", good: adapter_weights, read: read_adapter_weights },
    Reader { name: "adapter_config", good: adapter_configs, read: read_adapter_config },
    Reader { name: "model_weights", good: model_weights, read: read_model_weights },
    Reader { name: "model_index", good: model_indices, read: read_model_index },
    Reader { name: "model_config", good: model_configs, read: read_model_config },
    Reader { name: "run_config", good: run_configs, read: read_run_config },
    Reader { name: "chat_template", good: chat_templates, read: read_chat_template },
];

/// The reader of this name.
pub fn reader(name: &str) -> &'static Reader {
    READERS.iter().find(|r| r.name == name).unwrap_or_else(|| panic!("no reader {name}"))
}

/// Folders that hold everything but the file under test. One per thread, on the disk once.
struct Bench {
    dir: TempDir,
    spec: DecoderSpec,
}

thread_local! {
    static BENCH: Bench = Bench::new();
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config: serde_json::Value = serde_json::from_str(MODEL_CONFIG).unwrap();
        let spec = DecoderSpec::from_json(&config).unwrap();
        for folder in ["weights", "index", "config", "chat"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let weights = model_file(&spec);
        put("weights/config.json", MODEL_CONFIG.as_bytes());
        put("index/config.json", MODEL_CONFIG.as_bytes());
        put("index/a.safetensors", &weights);
        // What a path trick in the index would reach.
        put("x.safetensors", &weights);
        put("config/model.safetensors", &weights);
        let tokenizer = train_tokenizer(&["ab ab".to_owned()], 200).unwrap();
        put("chat/tokenizer.json", tokenizer.to_string(false).unwrap().as_bytes());
        let bench = Self { dir, spec };
        bench.save_adapter("adapter_weights", SMORE);
        bench.save_adapter("adapter_config", SMORE);
        bench
    }

    fn save_adapter(&self, folder: &str, yaml: &str) {
        let config = adapter(yaml);
        let adapters = Adapters::new(&config, &self.spec).unwrap();
        let values = adapters.init(1);
        let path = self.dir.path().join(folder);
        let settings = Settings::new(config, Path::new("base"));
        save_adapter(&path, &settings, &adapters, &values, &Manifest::default()).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap()
    }
}

/// Puts the bytes in their place among good files and reads the folder.
fn read_in<T>(
    file: &str,
    bytes: &[u8],
    read: impl FnOnce(&Path, &DecoderSpec) -> smore_tune::error::Result<T>,
) -> Result<T, String> {
    BENCH.with(|bench| {
        let file = bench.dir.path().join(file);
        // Some file systems wait for the disk when a file is written over.
        drop(std::fs::remove_file(&file));
        std::fs::write(&file, bytes).unwrap();
        let folder = file.parent().expect("a file lies in a folder");
        read(folder, &bench.spec).map_err(|e| e.to_string())
    })
}

const MODEL_CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "torch_dtype": "bfloat16",
    "rope_theta": 10000.0, "tie_word_embeddings": false, "max_position_embeddings": 64}"#;

const LORA: &str = "{kind: lora, targets: [q_proj], rank: 2}";

/// A shared pool is stored once per layer.
const SMORE: &str = "{kind: smore, targets: [q_proj], shared_pool: true, layers: \
                     [{experts: 2, fanout: 1, rank: 2}, {experts: 2, fanout: 1, rank: 2}]}";

fn run_config(adapter: &str) -> String {
    format!(
        "model: base\nadapter: {adapter}\ndata:\n  train: [{{path: a.jsonl, format: alpaca}}]\n  \
         validation: {{fraction: 0.1}}\ntrain: {{learning_rate: 1.0e-4, seed: 42}}\noutput_dir: run\n"
    )
}

fn adapter(yaml: &str) -> AdapterConfig {
    RunConfig::parse(&run_config(yaml), "run.yaml").unwrap().adapter
}

fn model_file(spec: &DecoderSpec) -> Vec<u8> {
    let values = from_scratch(spec, 1);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut rest = &bytes[..];
    let views: Vec<(String, TensorView)> = spec
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let (own, others) = rest.split_at(4 * shape.iter().product::<usize>());
            rest = others;
            (name, TensorView::new(Dtype::F32, shape, own).unwrap())
        })
        .collect();
    safetensors::serialize(views, None).unwrap()
}

const TORCH_FILES: [&[u8]; 3] = [
    include_bytes!("../fixtures/torch/protocol2.bin"),
    include_bytes!("../fixtures/torch/protocol4.bin"),
    include_bytes!("../fixtures/torch/protocol5.bin"),
];

fn torch_files() -> Vec<Vec<u8>> {
    TORCH_FILES.map(<[u8]>::to_vec).to_vec()
}

fn read_torch_file(bytes: &[u8]) -> Result<(), String> {
    for (name, tensor) in read_torch(Cursor::new(bytes))? {
        assert_eq!(tensor.shape.iter().product::<usize>(), tensor.values.len(), "{name}");
    }
    Ok(())
}

fn torch_pickles() -> Vec<Vec<u8>> {
    let pickle = |bytes: &[u8]| {
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
        let name = zip.file_names().flatten().find(|n| n.ends_with(".pkl")).unwrap().into_owned();
        let mut pickle = vec![];
        std::io::copy(&mut zip.by_name(&name).unwrap(), &mut pickle).unwrap();
        pickle
    };
    TORCH_FILES.map(pickle).to_vec()
}

/// A pickle in an archive that is otherwise good; no checksum is in a fuzzer's way.
fn read_torch_pickle(bytes: &[u8]) -> Result<(), String> {
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut file = zip::ZipWriter::new(Cursor::new(vec![]));
    let entries: [(&str, &[u8]); 7] = [
        ("a/data.pkl", bytes),
        ("a/data/0", &[1; 24]),
        ("a/data/1", &[2; 4]),
        ("a/data/2", &[3; 6]),
        ("a/data/3", &[4; 8]),
        ("a/data/4", &[]),
        ("a/version", b"3\n"),
    ];
    for (name, data) in entries {
        file.start_file(name, stored).unwrap();
        file.write_all(data).unwrap();
    }
    read_torch_file(file.finish().unwrap().get_ref())
}

fn adapter_weights() -> Vec<Vec<u8>> {
    BENCH.with(|bench| {
        bench.save_adapter("good", SMORE);
        vec![bench.read("good/adapter_model.safetensors")]
    })
}

fn read_adapter_weights(bytes: &[u8]) -> Result<(), String> {
    let read = read_in("adapter_weights/adapter_model.safetensors", bytes, load_adapter)?;
    assert_eq!(read.values.len(), read.adapters.len());
    Ok(())
}

fn adapter_configs() -> Vec<Vec<u8>> {
    BENCH.with(|bench| {
        [LORA, SMORE]
            .map(|yaml| {
                bench.save_adapter("good", yaml);
                bench.read("good/adapter_config.json")
            })
            .to_vec()
    })
}

fn read_adapter_config(bytes: &[u8]) -> Result<(), String> {
    let read = read_in("adapter_config/adapter_config.json", bytes, load_adapter)?;
    assert_eq!(read.values.len(), read.adapters.len());
    Ok(())
}

fn model_weights() -> Vec<Vec<u8>> {
    vec![BENCH.with(|bench| model_file(&bench.spec))]
}

/// Opens a model folder and touches every byte of its tensors.
fn open_model(folder: &Path, _: &DecoderSpec) -> smore_tune::error::Result<()> {
    let folder = ModelFolder::open(folder)?;
    for (name, shape) in folder.spec.tensors() {
        let tensor = folder.tensor(&name);
        assert_eq!(to_f32(tensor).len(), shape.iter().product::<usize>(), "{name}");
    }
    Ok(())
}

fn read_model_weights(bytes: &[u8]) -> Result<(), String> {
    read_in("weights/model.safetensors", bytes, open_model)
}

fn model_indices() -> Vec<Vec<u8>> {
    BENCH.with(|bench| {
        let names =
            bench.spec.tensors().into_iter().map(|(name, _)| (name, "a.safetensors".into()));
        let map: serde_json::Map<String, serde_json::Value> = names.collect();
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        vec![index.to_string().into_bytes()]
    })
}

fn read_model_index(bytes: &[u8]) -> Result<(), String> {
    read_in("index/model.safetensors.index.json", bytes, open_model)
}

fn model_configs() -> Vec<Vec<u8>> {
    vec![MODEL_CONFIG.as_bytes().to_vec()]
}

fn read_model_config(bytes: &[u8]) -> Result<(), String> {
    let read = read_in("config/config.json", bytes, open_model);
    let sizes = read_in("config/config.json", bytes, |f, _| {
        DecoderSpec::read_sizes(&f.join("config.json"))
    });
    assert!(read.is_err() || sizes.is_ok());
    read
}

fn run_configs() -> Vec<Vec<u8>> {
    [LORA, SMORE, "{kind: full}"].map(|yaml| run_config(yaml).into_bytes()).to_vec()
}

fn read_run_config(bytes: &[u8]) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(bytes) else { return Err("not UTF-8".into()) };
    let config = RunConfig::parse(text, "run.yaml").map_err(|e| e.to_string())?;
    let again = config.to_yaml().and_then(|text| RunConfig::parse(&text, "again.yaml"));
    assert_eq!(again.ok(), Some(config));
    Ok(())
}

fn chat_templates() -> Vec<Vec<u8>> {
    let source = "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role == 'system' %}\
                  {{ m['content'] | trim }}{% else %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n\
                  {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let with = |template: serde_json::Value| {
        serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"},
            "add_bos_token": true, "chat_template": template})
    };
    let named = serde_json::json!([{"name": "default", "template": source}]);
    [with(source.into()), with(named)].map(|json| json.to_string().into_bytes()).to_vec()
}

fn read_chat_template(bytes: &[u8]) -> Result<(), String> {
    read_in("chat/tokenizer_config.json", bytes, |folder, _| {
        let tokenizer = Tokenizer::open(folder)?;
        let template = Template::open(folder, &tokenizer)?;
        let messages = [("system", "be brief"), ("user", "ab"), ("assistant", "ba"), ("user", "")];
        let messages = messages.map(|(role, text)| Message::new(role, text));
        template.encode_prompt(&tokenizer, &messages)?;
        let (text, ranges) = template.render_training(&messages)?;
        for range in ranges {
            assert!(text.get(range.clone()).is_some(), "{range:?} of {text:?}");
        }
        Ok(())
    })
}
