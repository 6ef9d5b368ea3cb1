//! Configurations and model folders that are wrong, by name: each gives one clear message that
//! names the file, and what to do; none panics, and none touches a file.

use smore_tune::config::RunConfig;
use smore_tune::error::Result;
use smore_tune::sft::Prepared;
use std::collections::BTreeMap;
use std::path::Path;

const CONFIG: &str = "\
model: model
adapter: {kind: smore, layers: [{experts: 4, fanout: 2, rank: 2}], targets: [up_proj]}
data: {train: [{path: data.jsonl}], cutoff_len: 64}
train: {learning_rate: 1.0e-3, max_steps: 1}
output_dir: run
";

/// A name, what becomes of the good configuration, what the message must contain.
type Fault = (&'static str, fn(&str) -> Vec<u8>, &'static [&'static str]);

fn text(config: String) -> Vec<u8> {
    config.into_bytes()
}

fn train(keys: &str) -> Vec<u8> {
    text(CONFIG.replace("learning_rate: 1.0e-3", keys))
}

/// Wrong in the configuration alone.
const IN_THE_CONFIG: &[Fault] = &[
    ("empty file", |_| Vec::new(), &["run.yaml: empty; expected keys"]),
    ("only a comment", |_| b"# to do\n".to_vec(), &["run.yaml: empty"]),
    ("invalid UTF-8", |c| [c.as_bytes(), b"\xff\xfe"].concat(), &["not UTF-8 text"]),
    ("UTF-16", |c| c.encode_utf16().flat_map(u16::to_le_bytes).collect(), &["saved as UTF-8"]),
    ("a list", |_| b"[1, 2]".to_vec(), &["run.yaml: line 1", "expected a mapping"]),
    ("JSON cut short", |_| b"{\"model\": \"m\", ".to_vec(), &["run.yaml", "line"]),
    (
        "a tab in front",
        |c| text(c.replace("train: {l", "\ttrain: {l")),
        &["line 4", "tab; expected spaces"],
    ),
    (
        "duplicate key",
        |c| text(format!("{c}model: other\n")),
        &["line 6", "key `model` is given twice"],
    ),
    (
        "duplicate key in a section",
        |_| train("seed: 1, seed: 2"),
        &["line 4", "key `seed` is given twice"],
    ),
    (
        "unknown key",
        |_| train("learning_rat: 1"),
        &["line 4", "unknown key `learning_rat`", "did you mean `learning_rate`?"],
    ),
    (
        "unknown key at the top",
        |c| text(c.replace("output_dir", "ouput_dir")),
        &["line 5", "did you mean `output_dir`?"],
    ),
    ("wrong type", |_| train("learning_rate: fast"), &["line 4", "`fast`; expected a number"]),
    ("a list for a number", |_| train("seed: [1]"), &["line 4", "expected a single value"]),
    ("a number for a flag", |_| train("packing: 3"), &["line 4", "`3`; expected true or false"]),
    (
        "a fraction for a count",
        |_| train("eval_steps: 2.5"),
        &["line 4", "expected a whole number"],
    ),
    ("negative learning rate", |_| train("learning_rate: -1"), &["learning_rate is -1"]),
    ("no number", |_| train("learning_rate: .nan"), &["not a finite number"]),
    (
        "zero batch",
        |_| train("per_device_train_batch_size: 0"),
        &["per_device_train_batch_size is 0; expected at least 1"],
    ),
    (
        "zero accumulation",
        |_| train("gradient_accumulation_steps: 0"),
        &["gradient_accumulation_steps is 0; expected at least 1"],
    ),
    ("negative count", |_| train("save_steps: -5"), &["line 4", "`-5`; expected a whole number"]),
    ("no epochs", |_| train("num_train_epochs: 0"), &["num_train_epochs is 0"]),
    (
        "both warm-ups",
        |_| train("warmup_ratio: 0.1, warmup_steps: 10"),
        &["warmup_ratio is 0.1 and train.warmup_steps is 10; expected one of them"],
    ),
    (
        "warm-up of a constant rate",
        |_| train("lr_scheduler_type: constant, warmup_steps: 10"),
        &["`constant` has no warm-up", "constant_with_warmup"],
    ),
    (
        "unknown scheduler",
        |_| train("lr_scheduler_type: cosin"),
        &["line 4", "unknown value `cosin`", "did you mean `cosine`?"],
    ),
    (
        "minimum of another schedule",
        |_| train("lr_scheduler_kwargs: {min_lr: 1.0e-5}"),
        &["lr_scheduler_kwargs is given, but only", "cosine_with_min_lr"],
    ),
    (
        "schedule without its minimum",
        |_| train("lr_scheduler_type: cosine_with_min_lr"),
        &["needs train.lr_scheduler_kwargs: {min_lr: RATE}"],
    ),
    (
        "minimum above the rate",
        |_| {
            train(
                "learning_rate: 0.1, lr_scheduler_type: cosine_with_min_lr, \
                 lr_scheduler_kwargs: {min_lr: 0.2}",
            )
        },
        &["minimum is 0.2; expected a rate from 0 to train.learning_rate"],
    ),
    (
        "two minima",
        |_| {
            train(
                "lr_scheduler_type: cosine_with_min_lr, \
                 lr_scheduler_kwargs: {min_lr: 0, min_lr_rate: 0.1}",
            )
        },
        &["needs one of min_lr and min_lr_rate"],
    ),
    ("smoothing of all", |_| train("label_smoothing_factor: 1"), &["label_smoothing_factor is 1"]),
    ("dropout of all", |_| train("lora_dropout: 1.0"), &["lora_dropout is 1; expected a number"]),
    (
        "early stopping without evaluations",
        |_| train("early_stopping_patience: 3, eval_steps: 0"),
        &["eval_steps is 0", "need evaluations"],
    ),
    (
        "patience of nothing",
        |_| train("early_stopping_patience: 0"),
        &["early_stopping_patience is 0; expected at least 1"],
    ),
    (
        "threshold without patience",
        |_| train("early_stopping_threshold: 0.1"),
        &["without train.early_stopping_patience"],
    ),
    (
        "packing and grouping",
        |_| train("packing: true, group_by_length: true"),
        &["packing and train.group_by_length are both true"],
    ),
    (
        "one multiplier too many",
        |_| train("router_lr_multiplier: [1, 1]"),
        &["router_lr_multiplier has 2 numbers, but the adapter has 1 layers"],
    ),
    (
        "negative multiplier",
        |_| train("router_lr_multiplier: -1"),
        &["router_lr_multiplier is -1; expected a number from 0 up"],
    ),
    (
        "a word for a multiplier",
        |_| train("router_lr_multiplier: low"),
        &["line 4", "a number, or a list with one number per S'MoRE layer"],
    ),
    (
        "routers of a LoRA",
        |c| {
            let lora = "adapter: {kind: lora, rank: 2}\n#";
            text(
                c.replace("adapter:", lora)
                    .replace("max_steps", "router_lr_multiplier: 2, max_steps"),
            )
        },
        &["adapter.kind lora has no routers"],
    ),
    (
        "dropout without an adapter",
        |c| {
            text(
                c.replace("adapter:", "adapter: {kind: full}\n#")
                    .replace("max_steps", "lora_dropout: 0.1, max_steps"),
            )
        },
        &["adapter.kind full has no adapter"],
    ),
    (
        "bf16 of what is trained",
        |c| {
            text(
                c.replace("adapter:", "adapter: {kind: full}\n#")
                    .replace("max_steps", "bf16: true, max_steps"),
            )
        },
        &["train.bf16 rounds frozen weights", "remove it"],
    ),
    (
        "a key of another trainer",
        |_| train("neftune_noise_alpha: 5"),
        &["line 4", "key `neftune_noise_alpha` does not exist here", "NEFTune", "remove it"],
    ),
    (
        "a key under its other name",
        |c| text(c.replace("model: model", "model_name_or_path: model")),
        &["`model_name_or_path` does not exist here", "write `model: DIR`"],
    ),
    ("unknown kind", |c| text(c.replace("smore", "smor")), &["did you mean `smore`?"]),
    (
        "fanout above experts",
        |c| text(c.replace("fanout: 2", "fanout: 5")),
        &["fanout is 5", "experts is 4"],
    ),
    ("no layers", |c| text(c.replace("{experts: 4, fanout: 2, rank: 2}", "")), &["layers"]),
    ("rank zero", |c| text(c.replace("rank: 2", "rank: 0")), &["rank is 0"]),
    (
        "unknown target",
        |c| text(c.replace("up_proj", "up_porj")),
        &["up_porj", "did you mean `up_proj`?"],
    ),
    (
        "missing model folder",
        |c| text(c.replace("model: model", "model: nowhere")),
        &["nowhere", "config.json"],
    ),
    ("empty path", |c| text(c.replace("run\n", "''\n")), &["output_dir is empty"]),
    (
        "missing data file",
        |c| text(c.replace("data.jsonl", "dta.jsonl")),
        &["dta.jsonl: not found"],
    ),
    (
        "no data",
        |c| text(c.replace("[{path: data.jsonl}]", "[]")),
        &["data.train is empty; expected at least one"],
    ),
    (
        "best of nothing held out",
        |c| {
            text(
                c.replace("cutoff_len", "validation: {fraction: 0}, cutoff_len")
                    .replace("max_steps", "load_best_model_at_end: true, max_steps"),
            )
        },
        &["nothing is held out", "data.validation"],
    ),
];

/// A name, what is done to the model's folder, what the message must contain.
type FolderFault = (&'static str, fn(&Path), &'static [&'static str]);

fn edit(file: &Path, change: impl Fn(&mut serde_json::Value)) {
    let text = std::fs::read_to_string(file).unwrap_or_else(|_| "{}".into());
    let mut json = serde_json::from_str(&text).unwrap();
    change(&mut json);
    std::fs::write(file, json.to_string()).unwrap();
}

fn without_end_token(model: &Path) {
    for (file, key) in [
        ("tokenizer_config.json", "eos_token"),
        ("special_tokens_map.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
    ] {
        edit(&model.join(file), |json| json[key] = serde_json::Value::Null);
    }
}

fn cut(file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
}

/// Wrong in the model's folder.
const IN_THE_MODEL: &[FolderFault] = &[
    (
        "tokenizer without end token",
        without_end_token,
        &["names no end token", "give it `eos_token`"],
    ),
    (
        "end token outside the vocabulary",
        |m| edit(&m.join("tokenizer_config.json"), |j| j["eos_token"] = "<none>".into()),
        &["eos_token is `<none>`", "not in the vocabulary"],
    ),
    (
        "weights cut short",
        |m| cut(&m.join("model.safetensors")),
        &["model.safetensors", "not a whole"],
    ),
    ("settings cut short", |m| cut(&m.join("config.json")), &["config.json"]),
    ("tokenizer cut short", |m| cut(&m.join("tokenizer.json")), &["tokenizer.json"]),
    (
        "unknown family",
        |m| edit(&m.join("config.json"), |j| j["model_type"] = "bert".into()),
        &["config.json", "bert"],
    ),
    (
        "weights of another shape",
        |m| edit(&m.join("config.json"), |j| j["num_hidden_layers"] = 2.into()),
        &["tensor", "has no place"],
    ),
    (
        "template that does not compile",
        |m| std::fs::write(m.join("chat_template.jinja"), "{% for %}").unwrap(),
        &["chat_template.jinja"],
    ),
    (
        "template that doubles BOS",
        |m| {
            let text = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}\
                        {{ eos_token }}{% endfor %}";
            std::fs::write(m.join("chat_template.jinja"), text).unwrap();
        },
        &["twice at the start", "remove one"],
    ),
    (
        "template that never ends an answer",
        |m| {
            let text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
            std::fs::write(m.join("chat_template.jinja"), text).unwrap();
        },
        &["never learn to stop", "eos_token"],
    ),
];

/// The demo's base in `model`, and a few samples.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-cli/assets/demo-base");
    for entry in std::fs::read_dir(base).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let line = "{\"instruction\": \"Order of the press\", \"output\": \"order\"}\n";
    std::fs::write(dir.path().join("data.jsonl"), line.repeat(20)).unwrap();
    dir
}

/// Every file with its bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.display().to_string(), std::fs::read(&path).unwrap());
        }
    }
    all
}

/// As `smore train` begins. Paths in the configuration are made those of `dir`.
fn prepare(dir: &Path) -> Result<Prepared> {
    let file = dir.join("run.yaml");
    let mut config = RunConfig::load(&file)?;
    config.model = dir.join(&config.model);
    config.output_dir = dir.join(&config.output_dir);
    for source in &mut config.data.train {
        source.path = dir.join(&source.path);
    }
    Prepared::new(config, &file.display().to_string())
}

fn refuses(name: &str, dir: &Path, expected: &[&str]) {
    let before = files(dir);
    let error = prepare(dir).err().unwrap_or_else(|| panic!("{name}: nothing was said"));
    let said = error.to_string();
    for part in expected {
        assert!(said.contains(part), "{name}: {part:?} is not in {said:?}");
    }
    assert_eq!(error.exit_code(), 2, "{name}: {said}");
    assert!(!said.contains('\n') && said.len() < 1500, "{name}: {said:?}");
    assert!(files(dir) == before, "{name}: a file was touched");
}

#[test]
fn the_good_configuration_is_accepted() {
    let dir = workplace();
    std::fs::write(dir.path().join("run.yaml"), CONFIG).unwrap();
    assert_eq!(prepare(dir.path()).unwrap().total_steps, 1);
    // A byte order mark and Windows' line ends do no harm.
    let marked = format!("\u{feff}{CONFIG}").replace('\n', "\r\n");
    std::fs::write(dir.path().join("run.yaml"), marked).unwrap();
    assert_eq!(prepare(dir.path()).unwrap().total_steps, 1);
}

#[test]
fn bad_configurations() {
    let dir = workplace();
    for (name, spoil, expected) in IN_THE_CONFIG {
        std::fs::write(dir.path().join("run.yaml"), spoil(CONFIG)).unwrap();
        refuses(name, dir.path(), expected);
    }
}

#[test]
fn bad_model_folders() {
    for (name, spoil, expected) in IN_THE_MODEL {
        let dir = workplace();
        std::fs::write(dir.path().join("run.yaml"), CONFIG).unwrap();
        spoil(&dir.path().join("model"));
        refuses(name, dir.path(), expected);
    }
}
