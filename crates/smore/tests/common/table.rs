//! The one table of cases: every gate with every position, depth and mask, then the rest.

use super::case::{Case, D_IN, D_OUT, TOKENS};
use smore::config::SmoreConfig;
use smore::spec::SmoreSpec;

const ONE: &str = r#"[{"experts": 5, "fanout": 2, "rank": 3, "lora_alpha": 2}]"#;
const TWO: &str = r#"[{"experts": 4, "fanout": 2, "rank": 2, "lora_alpha": 3},
    {"experts": 3, "fanout": 2, "rank": 1, "lora_alpha": 1.7}]"#;
const THREE: &str = r#"[{"experts": 3, "fanout": 1, "rank": 2, "lora_alpha": 1.4},
    {"experts": 4, "fanout": 3, "rank": 1, "lora_alpha": 0.8},
    {"experts": 3, "fanout": 2, "rank": 2, "lora_alpha": 3}]"#;
/// Equal layers but for the fanout, as the shared pool needs them.
const EQUAL: &str = r#"[{"experts": 3, "fanout": 1, "rank": 2, "lora_alpha": 3},
    {"experts": 3, "fanout": 2, "rank": 2, "lora_alpha": 1.2},
    {"experts": 3, "fanout": 2, "rank": 2, "lora_alpha": 0.9}]"#;
/// One child everywhere: single choices keep their raw scores.
const CHAIN: &str = r#"[{"experts": 2, "fanout": 1, "rank": 1, "lora_alpha": 1.9},
    {"experts": 3, "fanout": 1, "rank": 2, "lora_alpha": 3}]"#;
/// All of one, and all of many.
const FULL: &str = r#"[{"experts": 3, "fanout": 3, "rank": 2, "lora_alpha": 3},
    {"experts": 1, "fanout": 1, "rank": 3, "lora_alpha": 2}]"#;

const SWITCH: &str = r#""kind": "switch", "activation": "tanh""#;
const DENSE: &str = r#""kind": "dense", "activation": "relu""#;
const NOISY: &str = r#""kind": "noisy_topk", "activation": "prelu|0.3""#;
const LINEAR: &str = r#""kind": "switch", "architecture": "linear""#;
const DENSE_LINEAR: &str = r#""kind": "dense", "architecture": "linear""#;
const ORPHANS: &str = r#""kind": "switch", "activation": "identity", "ancestor_keys": false"#;

const POSITIONS: [&str; 4] = [
    r#""activation": "tanh", "activation_position": "all""#,
    r#""activation": "prelu|0.2", "activation_position": "child""#,
    r#""activation": "relu", "activation_position": "child_v2""#,
    r#""activation": "identity""#,
];

fn config(layers: &str, gate: &str, rest: &str) -> SmoreConfig {
    let json = format!(
        r#"{{"layers": {layers}, {rest}, "gate": {{"router_input_width": 3, "router_width": 4,
            "balance_weight": 0.3, {gate}}}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

/// Everything that is routed from the top.
pub(crate) fn cases() -> Vec<Case> {
    let gates = [
        (SWITCH, false),
        (DENSE, false),
        (NOISY, true),
        (NOISY, false),
        (LINEAR, false),
        (ORPHANS, false),
    ];
    let mut cases = Vec::new();
    for (i, layers) in [ONE, TWO, THREE].into_iter().enumerate() {
        for (j, (gate, train)) in gates.into_iter().enumerate() {
            for (k, rest) in POSITIONS.into_iter().enumerate() {
                let case = Case::new(&config(layers, gate, rest), 1, train);
                cases.push(if (i + j + k) % 2 == 0 { case.masked() } else { case });
            }
        }
    }
    cases.extend(others().into_iter().map(|c| Case::new(&c, 3, true).masked()));
    cases.push(unequal_routers());
    cases
}

fn others() -> Vec<SmoreConfig> {
    let shared = |rest: &str| format!("{rest}, \"shared_pool\": true");
    let multi = r#""activation": "identity", "structure": "multi_order""#;
    let flat = r#""activation": "identity", "structure": "flat""#;
    vec![
        config(EQUAL, SWITCH, &shared(POSITIONS[0])),
        config(EQUAL, NOISY, &shared(POSITIONS[1])),
        config(EQUAL, DENSE_LINEAR, &shared(POSITIONS[2])),
        config(TWO, SWITCH, multi),
        config(THREE, LINEAR, multi),
        config(ONE, SWITCH, flat),
        config(CHAIN, SWITCH, POSITIONS[0]),
        config(CHAIN, NOISY, POSITIONS[1]),
        config(CHAIN, DENSE_LINEAR, POSITIONS[2]),
        config(FULL, SWITCH, POSITIONS[0]),
        config(FULL, LINEAR, POSITIONS[1]),
        config(TWO, &SWITCH.replace("tanh", "prelu|0.1"), POSITIONS[0]),
        // The router sees the whole token.
        whole_view(config(TWO, NOISY, POSITIONS[0])),
        config(THREE, DENSE_LINEAR, POSITIONS[3]),
    ]
}

fn whole_view(mut config: SmoreConfig) -> SmoreConfig {
    config.gate.router_input_width = 0;
    config
}

/// Routers of their own width in every layer, as adapter files may have them.
fn unequal_routers() -> Case {
    let config = config(THREE, SWITCH, POSITIONS[0]);
    let spec = SmoreSpec::with_router_widths(&config, &[2, 5, 3], D_IN, D_OUT).unwrap();
    Case::of(spec, "routers of width 2, 5, 3".into(), 4, false, TOKENS)
}

/// The bottom-up router, at every position of the activation.
pub(crate) fn bottom_up_cases() -> Vec<Case> {
    let gate = r#""architecture": "bottom_up", "activation": "tanh""#;
    let all = [TWO, THREE].into_iter().flat_map(|l| POSITIONS.map(|p| config(l, gate, p)));
    all.map(|c| Case::new(&c, 1, false).masked()).collect()
}
