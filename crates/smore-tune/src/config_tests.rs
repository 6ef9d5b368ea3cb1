use super::*;

/// The shape that every version keeps.
const FULL: &str = "
model: path/to/hf-folder
adapter:
  kind: smore                      # smore | lora | ...
  targets: [gate_proj, up_proj, down_proj]
  layers:                          # leaves first
    - {experts: 4, fanout: 2, rank: 16}
    - {experts: 4, fanout: 3, rank: 8}
  gate: {kind: switch, balance_weight: 0.02, router_width: 16, router_input_width: 24, activation: relu}
  activation: tanh
  init: w_final_zero
data:
  train: [{path: data.jsonl}, {path: more.json, format: prompt_completion}]
  validation: {fraction: 0.2}
  max_samples: null
  cutoff_len: 512
train: {learning_rate: 2.0e-4, num_train_epochs: 3, max_steps: null, per_device_train_batch_size: 2, gradient_accumulation_steps: 4, lr_scheduler_type: linear, warmup_ratio: 0.05, max_grad_norm: 0.5, save_steps: 100, eval_steps: 10, seed: 7}
output_dir: runs/my-run
";

const SMALL: &str = "model: m
adapter: {kind: lora, rank: 4}
data: {train: [{path: d.jsonl}]}
output_dir: o
";

fn message(text: &str) -> String {
    let error = RunConfig::parse(text, "run.yaml").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn every_key_of_the_documented_shape_is_read() {
    let config = RunConfig::parse(FULL, "run.yaml").unwrap();
    let AdapterConfig::Smore(smore) = &config.adapter else { panic!("{:?}", config.adapter) };
    assert_eq!(smore.layers[1].fanout, 3);
    assert_eq!(smore.gate.router_input_width, 24);
    assert_eq!(config.data.train[0].format, None);
    assert_eq!(config.data.train[1].format, Some(Format::PromptCompletion));
    assert_eq!(config.data.validation.fraction, 0.2);
    assert_eq!(config.data.max_samples, None);
    assert_eq!(config.data.cutoff_len, 512);
    let train = &config.train;
    assert_eq!((train.learning_rate, train.num_train_epochs, train.seed), (2e-4, 3.0, 7));
    assert_eq!(train.lr_scheduler_type, LrScheduler::Linear);
    assert_eq!((train.save_steps, train.eval_steps), (100, 10));
    assert_eq!(config.output_dir, PathBuf::from("runs/my-run"));
}

#[test]
fn absent_keys_take_their_defaults() {
    let config = RunConfig::parse(SMALL, "run.yaml").unwrap();
    assert_eq!(config.train, TrainConfig::default());
    assert_eq!(config.data.validation, ValidationConfig::default());
    assert_eq!(config.data.cutoff_len, 2048);
    let text = SMALL.replace("lora, rank: 4", "full");
    let AdapterConfig::Full(full) = RunConfig::parse(&text, "run.yaml").unwrap().adapter else {
        panic!("not full")
    };
    assert!(!full.from_scratch);
}

#[test]
fn yaml_round_trips() {
    let full = RunConfig::parse(FULL, "run.yaml").unwrap();
    let mut odd = RunConfig::parse(SMALL, "run.yaml").unwrap();
    odd.model = PathBuf::from("a: #b, 'c'");
    odd.data.max_samples = Some(3);
    odd.data.validation.path = Some("1.0".into());
    odd.train.learning_rate = 1e-300;
    odd.train.adam_epsilon = 0.1 + 0.2;
    odd.train.seed = u64::MAX;
    let mut scratch = odd.clone();
    scratch.adapter = AdapterConfig::Full(FullConfig { from_scratch: true });
    for config in [full, odd, scratch] {
        let yaml = config.to_yaml().unwrap();
        assert_eq!(RunConfig::parse(&yaml, "again").unwrap(), config, "{yaml}");
    }
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_key() {
    let cases = [
        ("output_dir: o", "output_dri: o", 4, "output_dir"),
        ("rank: 4", "rnk: 4", 2, "rank"),
        ("{path: d.jsonl}", "{path: d.jsonl, formt: text}", 3, "format"),
        ("]}", "], cutoff_length: 9}", 3, "cutoff_len"),
        ("]}", "], validation: {fractoin: 0.1}}", 3, "fraction"),
        ("output_dir: o", "output_dir: o\ntrain:\n  learning_rat: 1", 6, "learning_rate"),
    ];
    for (from, to, line, hint) in cases {
        let text = message(&SMALL.replace(from, to));
        assert!(text.starts_with(&format!("run.yaml: line {line}, column ")), "{text}");
        assert!(text.contains(&format!("did you mean `{hint}`?")), "{text}");
    }
    let text = message(&FULL.replace("balance_weight", "balance_wieght"));
    assert!(text.contains("line 9") && text.contains("did you mean `balance_weight`?"), "{text}");
    let text = message(&FULL.replace("{experts: 4, fanout: 2", "{expert: 4, fanout: 2"));
    assert!(text.contains("line 7") && text.contains("did you mean `experts`?"), "{text}");
}

#[test]
fn a_key_of_another_kind_is_unknown() {
    let text = message(&SMALL.replace("kind: lora, rank: 4", "kind: full, rank: 4"));
    assert!(text.contains("unknown key `rank`; expected one of from_scratch"), "{text}");
    let text = message(&SMALL.replace("kind: lora", "kind: lroa"));
    assert_eq!(
        text,
        "run.yaml: adapter.kind is `lroa`; expected one of smore, lora, hydra_lora, mix_lora, saved, \
         full; did you mean `lora`?"
    );
}

#[test]
fn values_out_of_range_name_key_and_expectation() {
    let cases = [
        ("learning_rate: -1", "train.learning_rate is -1; expected a positive number"),
        ("learning_rate: .nan", "line 5, column 24: `.nan` is not a finite number"),
        ("learning_rate: -.inf", "line 5, column 24: `-.inf` is not a finite number"),
        ("num_train_epochs: 0", "train.num_train_epochs is 0; expected a positive number"),
        ("max_steps: 0", "train.max_steps is 0; expected at least 1"),
        (
            "per_device_train_batch_size: 0",
            "train.per_device_train_batch_size is 0; expected at least 1",
        ),
        (
            "gradient_accumulation_steps: 0",
            "train.gradient_accumulation_steps is 0; expected at least 1",
        ),
        ("warmup_ratio: 1.5", "train.warmup_ratio is 1.5; expected a number from 0 to 1"),
        ("max_grad_norm: -2", "train.max_grad_norm is -2; expected a number from 0 up"),
        ("adam_beta2: 1", "train.adam_beta2 is 1; expected a number from 0 to below 1"),
    ];
    for (train, expected) in cases {
        assert_eq!(message(&format!("{SMALL}train: {{{train}}}")), format!("run.yaml: {expected}"));
    }
    let cases = [
        ("train: []", "data.train is empty; expected at least one {path: FILE}"),
        ("train: [{path: d}], cutoff_len: 1", "data.cutoff_len is 1; expected at least 2 tokens"),
        (
            "train: [{path: d}], validation: {fraction: 1}",
            "data.validation.fraction is 1; expected a number from 0 to below 1",
        ),
        (
            "train: [{path: d}], max_samples: 0",
            "data.max_samples is 0; expected at least 1, or null for no limit",
        ),
        (
            "train: [{path: d}], validation: {format: text}",
            "data.validation.format is given without data.validation.path; expected both or neither",
        ),
    ];
    for (data, expected) in cases {
        let text = message(&SMALL.replace("train: [{path: d.jsonl}]", data));
        assert_eq!(text, format!("run.yaml: {expected}"));
    }
}

#[test]
fn wrong_types_and_missing_keys_name_the_line() {
    let text = message(&SMALL.replace("rank: 4", "rank: four"));
    assert_eq!(text, "run.yaml: line 2, column 29: value is `four`; expected a whole number");
    let text = message(&format!("{SMALL}train: {{learning_rate: fast}}"));
    assert_eq!(text, "run.yaml: line 5, column 24: value is `fast`; expected a number");
    let text = message(&SMALL.replace("output_dir: o\n", ""));
    assert!(text.contains("`output_dir` is missing"), "{text}");
    let text = message(&SMALL.replace("kind: lora, ", ""));
    assert!(text.contains("line 2") && text.contains("`kind` is missing"), "{text}");
    let text = message(&format!("{SMALL}output_dir: p\n"));
    assert!(text.contains("line 5") && text.contains("`output_dir` is given twice"), "{text}");
    let text = message(&format!("{SMALL}train: {{lr_scheduler_type: cosin}}"));
    assert!(text.contains("line 5") && text.contains("did you mean `cosine`?"), "{text}");
}

#[test]
fn no_text_makes_it_panic() {
    for text in
        ["", "null", "[]", "3", "adapter: 3", "adapter: {kind: {}}", "a: b: c", "\t", "{", "\u{0}"]
    {
        message(text);
    }
    for end in 0..FULL.len() {
        let _ = RunConfig::parse(&FULL[..end], "run.yaml");
    }
}

#[test]
fn a_missing_file_says_what_was_expected() {
    let error = RunConfig::load(Path::new("no/such.yaml")).unwrap_err();
    assert_eq!(error.to_string(), "no/such.yaml: not found; expected a run configuration in YAML");
    assert_eq!(error.exit_code(), 2);
}
