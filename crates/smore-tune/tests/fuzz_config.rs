//! The config parser under fire: mutated configs give a config or an error, never a panic, and an
//! error always says something.

use proptest::prelude::*;
use smore::spec::SmoreSpec;
use smore_tune::config::{AdapterConfig, RunConfig};

const SEED: &str = "model: path/to/hf-folder
adapter:
  kind: smore
  targets: [gate_proj, up_proj, down_proj]
  layers:
    - {experts: 4, fanout: 2, rank: 16, lora_alpha: 8}
    - {experts: 4, fanout: 2, rank: 16}
  gate: {kind: switch, architecture: mlp, balance_weight: 0.01, router_width: 32, router_input_width: 32, activation: relu}
  activation: prelu|0.25
  activation_position: child
  shared_pool: false
  init: w_final_zero
data:
  train: [{path: data.jsonl, format: alpaca}]
  validation: {fraction: 0.1}
  max_samples: null
  cutoff_len: 2048
train: {learning_rate: 1.0e-4, num_train_epochs: 2, max_steps: null, save_steps: 500, seed: 42}
output_dir: runs/my-run
";

/// What is put in somewhere: YAML's own marks, odd numbers, and words of the schema.
const PIECES: [&str; 24] = [
    ":",
    "-",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "  ",
    "&a",
    "*a",
    "!!str",
    "|",
    ">",
    "#",
    "null",
    "~",
    "1e999",
    ".nan",
    "-1",
    "99999999999999999999",
    "0x10",
    "kind",
    "\u{0}",
    "\u{fdd0}",
];

fn check(text: &str) -> Result<(), TestCaseError> {
    match RunConfig::parse(text, "fuzz.yaml") {
        Ok(config) => {
            if let AdapterConfig::Smore(smore) = &config.adapter {
                drop(SmoreSpec::new(smore, 64, 64));
            }
            let again = RunConfig::parse(&config.to_yaml().unwrap(), "again.yaml");
            prop_assert_eq!(again.unwrap(), config);
        }
        Err(error) => prop_assert!(error.to_string().starts_with("fuzz.yaml")),
    }
    Ok(())
}

#[test]
fn the_seed_is_a_config() {
    assert!(RunConfig::parse(SEED, "fuzz.yaml").is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn mutated_configs(edits in prop::collection::vec((0..SEED.len(), 0..12usize, 0..24usize), 1..6)) {
        let mut text = SEED.to_owned();
        for (at, cut, piece) in edits {
            let at = at.min(text.len());
            let end = (at + cut).min(text.len());
            if text.is_char_boundary(at) && text.is_char_boundary(end) {
                text.replace_range(at..end, PIECES[piece]);
            }
        }
        check(&text)?;
    }

    #[test]
    fn arbitrary_text(text in "\\PC{0,200}") {
        check(&text)?;
    }
}
