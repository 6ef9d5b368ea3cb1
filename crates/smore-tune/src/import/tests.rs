use super::*;
use crate::config::{AdapterConfig, BalanceReduction, Format, LrScheduler, RouterLr};
use smore::config::{GateKind, Init};

/// The authors' run on ARC-C, as their fork's examples write such files.
const AUTHORS: &str = "
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: peft_moe
moe_arch: smore
moe_num_experts: 4,4
moe_num_active: [2, 2]
moe_expert_dims: [16, 8]
moe_gate_dims: 32
moe_dim_downproj_x: 24
moe_gate_act_fn: relu
moe_gate_type: dense
moe_gate_arch: mlp
moe_expert_act_fn: tanh
moe_target_modules: gate_proj,up_proj,down_proj
moe_init_method: eq_1_layer
moe_activation_position: child
moe_lora_scaling: 2.0
moe_balance_loss_weight: 1e-2
moe_dropout: 0.05
### dataset
dataset: arc_c
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/smore
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
max_grad_norm: 1.0
ddp_timeout: 180000000
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 50
neftune_noise_alpha: 5
";

const LORA: &str = r#"{"model_name_or_path": "m", "finetuning_type": "lora", "lora_rank": 16,
    "lora_target": "q_proj,v_proj", "dataset": "a,b", "output_dir": "o", "max_samples": 10,
    "learning_rate": "1e-4", "max_steps": -1, "lr_scheduler_type": "polynomial",
    "warmup_steps": 20, "warmup_ratio": 0.1, "packing": true, "quantization_bit": 4,
    "use_dora": false, "val_size": 50, "lora_dropout": 0.1}"#;

fn here(text: &str) -> Imported {
    parse(text, "lf.yaml", Path::new("no/such/folder")).unwrap()
}

fn reason<'a>(imported: &'a Imported, key: &str) -> &'a str {
    let note = imported.notes.iter().find(|note| note.key == key);
    &note.unwrap_or_else(|| panic!("no note on {key}: {:?}", imported.notes)).reason
}

#[test]
fn the_authors_configuration() {
    let imported = here(AUTHORS);
    let AdapterConfig::Smore(smore) = &imported.config.adapter else { panic!() };
    let layers: Vec<_> = smore.layers.iter().map(|l| (l.experts, l.fanout, l.rank)).collect();
    assert_eq!(layers, [(4, 2, 16), (4, 2, 8)]);
    let alphas: Vec<_> = smore.layers.iter().map(|l| l.lora_alpha).collect();
    assert_eq!(alphas, [Some(32.0), Some(16.0)], "scaling 2 of each rank");
    assert_eq!((smore.gate.kind, smore.gate.router_input_width), (GateKind::Dense, 24));
    assert_eq!((smore.gate.router_width, smore.gate.balance_weight), (32, 0.01));
    assert_eq!(smore.init, Init::Eq1Layer);
    let train = &imported.config.train;
    assert_eq!(train.balance_reduction, BalanceReduction::SumOverMicrobatches);
    assert_eq!((train.lora_dropout, train.bf16, train.eval_steps), (0.05, true, 50));
    assert_eq!((train.learning_rate, train.num_train_epochs), (1e-4, 2.0));
    assert_eq!(train.warmup_ratio, Some(0.1));
    assert_eq!(train.router_lr_multiplier, RouterLr::All(1.0));
    assert_eq!(imported.config.data.validation.fraction, 0.1);
    assert_eq!(imported.config.data.train[0].max_samples, Some(1000));
    let keys: Vec<&str> = imported.notes.iter().map(|note| note.key.as_str()).collect();
    assert_eq!(
        keys,
        ["trust_remote_code", "dataset", "template", "ddp_timeout", "neftune_noise_alpha"]
    );
    assert!(reason(&imported, "neftune_noise_alpha").contains("NEFTune"));
    assert!(reason(&imported, "dataset").contains("dataset_info.json was not found"));
}

#[test]
fn llama_factorys_defaults_are_written_out() {
    let imported = here(LORA);
    let AdapterConfig::Lora(lora) = &imported.config.adapter else { panic!() };
    assert_eq!((lora.rank, lora.alpha), (16, None), "alpha is twice the rank there and here");
    assert_eq!(lora.targets, ["q_proj", "v_proj"].into());
    let train = &imported.config.train;
    assert_eq!((train.learning_rate, train.lora_dropout, train.packing), (1e-4, 0.1, true));
    assert_eq!((train.num_train_epochs, train.max_steps), (3.0, None));
    assert_eq!((train.per_device_train_batch_size, train.gradient_accumulation_steps), (8, 1));
    assert_eq!((train.warmup_steps, train.warmup_ratio), (Some(20), None));
    assert_eq!((train.lr_scheduler_type, train.eval_steps), (LrScheduler::Linear, 0));
    let limits: Vec<_> = imported.config.data.train.iter().map(|file| file.max_samples).collect();
    assert_eq!(limits, [Some(10); 2]);
    let keys: Vec<&str> = imported.notes.iter().map(|note| note.key.as_str()).collect();
    let want =
        ["dataset", "dataset", "lr_scheduler_type", "warmup_ratio", "quantization_bit", "val_size"];
    assert_eq!(keys, want);
    assert!(reason(&imported, "lr_scheduler_type").contains("linear was taken"));
}

/// Every key of the source is in our file or on the list: nothing falls away unseen.
#[test]
fn a_key_that_nobody_knows_is_listed() {
    let imported = here(&format!("{AUTHORS}moe_new_thing: 3\nanother: [1]\n"));
    assert_eq!(reason(&imported, "moe_new_thing"), "unknown here");
    assert_eq!(reason(&imported, "another"), "unknown here");
}

#[test]
fn a_file_is_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yaml");
    let imported = here(AUTHORS);
    imported.write(&file).unwrap();
    assert_eq!(RunConfig::load(&file).unwrap(), imported.config);
    let error = here(LORA).write(&file).unwrap_err();
    assert!(error.to_string().ends_with("run.yaml: exists; name a new file"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), imported.yaml);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn data_sets_are_looked_up() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sets")).unwrap();
    let info = r#"{"mine": {"file_name": "mine.json"},
        "chat": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "c"}},
        "far": {"hf_hub_url": "x/y"}}"#;
    std::fs::write(dir.path().join("sets/dataset_info.json"), info).unwrap();
    let text = "{model_name_or_path: m, output_dir: o, dataset_dir: sets, dataset: 'mine, chat, far, \
                none', eval_dataset: mine}";
    let imported = parse(text, "lf.yaml", dir.path()).unwrap();
    let data = &imported.config.data;
    let path = |file: &str| dir.path().join("sets").join(file);
    let paths: Vec<_> = data.train.iter().map(|source| source.path.clone()).collect();
    assert_eq!(paths, ["mine.json", "chat.json", "far.json", "none.json"].map(path));
    assert_eq!(data.validation.path, Some(path("mine.json")));
    let said: Vec<&str> = imported.notes.iter().map(|note| note.reason.as_str()).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("not a file on this machine"), "{said:?}");
    assert!(said[1].contains("does not list it"), "{said:?}");
    assert_eq!(data.train[1].format, Some(Format::Sharegpt));
    assert_eq!(data.train[1].columns["conversations"].as_deref(), Some("c"));
}

#[test]
fn what_cannot_be_taken_over_is_refused() {
    let cases = [
        ("", "empty; expected"),
        ("[1, 2]", "expected"),
        ("stage: dpo", "stage is `dpo`; only sft is offered"),
        ("finetuning_type: freeze", "finetuning_type is `freeze`"),
        ("{finetuning_type: peft_moe, moe_arch: other}", "moe_arch is `other`"),
        ("finetuning_type: peft_moe", "moe_num_experts is missing"),
        (
            "{finetuning_type: peft_moe, moe_num_experts: [4, 4, 4], moe_num_active: [2, 2], \
             moe_expert_dims: 8}",
            "moe_num_active has 2 numbers, but there are 3 layers",
        ),
        ("learning_rate: fast", "learning_rate is \"fast\"; expected a number"),
        ("packing: 3", "packing is 3; expected true or false"),
        ("{adapter: {kind: full}, output_dir: o}", "a configuration of smore already"),
        ("learning_rate: -1", "train.learning_rate is -1; expected a positive number"),
    ];
    for (text, expected) in cases {
        let error = parse(text, "lf.yaml", Path::new("")).unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("lf.yaml: ") && said.contains(expected), "{text}: {said}");
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn an_adapter_that_exists_and_the_base_itself() {
    let text = "{model_name_or_path: m, output_dir: o, adapter_name_or_path: a, lora_rank: 4}";
    let imported = here(text);
    assert!(
        matches!(&imported.config.adapter, AdapterConfig::Saved(c) if c.path == Path::new("a"))
    );
    assert!(reason(&imported, "lora_rank").contains("says so itself"));
    assert!(reason(&imported, "dataset").contains("fill in data.train"));
    let imported = here("{finetuning_type: full, bf16: true, output_dir: o}");
    assert_eq!(imported.config.adapter.kind(), "full");
    assert!(reason(&imported, "bf16").contains("in f32"));
    assert!(reason(&imported, "model_name_or_path").contains("fill in `model`"));
}
