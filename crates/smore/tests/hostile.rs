//! Configs that make no sense are refused with the key's name: no panic, no overflow, no large
//! allocation.

use proptest::prelude::*;
use proptest::sample::select;
use smore::config::{
    Activation, ActivationPosition, GateConfig, GateKind, HydraLoraConfig, Init, LayerConfig,
    MixLoraConfig, RouterArchitecture, SmoreConfig, Structure,
};
use smore::layout::{HydraLoraLayout, MixLoraLayout, SmoreLayout};
use smore::spec::{FfnShape, HydraLoraSpec, MixLoraSpec, SmoreSpec};
use smore::targets::Targets;
use smore_engine::GateActivation;

/// The config's error, from its types or from its meaning.
fn refused(json: &str) -> String {
    let config: Result<SmoreConfig, _> = serde_json::from_str(json);
    match config {
        Err(error) => error.to_string(),
        Ok(config) => match SmoreSpec::new(&config, 16, 16) {
            Err(error) => error.to_string(),
            Ok(spec) => panic!("accepted {json} as {spec:?}"),
        },
    }
}

/// `{"layers": [{<sizes>}], <rest>}`
fn one_layer(experts: &str, fanout: &str, rank: &str, rest: &str) -> String {
    format!(r#"{{"layers": [{{"experts": {experts}, "fanout": {fanout}, "rank": {rank}}}]{rest}}}"#)
}

fn layers(count: usize, fanout: usize, rest: &str) -> String {
    let layer = format!(r#"{{"experts": 4, "fanout": {fanout}, "rank": 2}}"#);
    format!(r#"{{"layers": [{}]{rest}}}"#, vec![layer; count].join(", "))
}

fn check(json: &str, words: &[&str]) {
    let error = refused(json);
    for word in words {
        assert!(error.contains(word), "{json}\nsays `{error}`\nwithout `{word}`");
    }
}

#[test]
fn sane_configs_pass() {
    for rest in ["", r#", "structure": "multi_order", "activation": "identity""#] {
        for count in [1, 2, 5] {
            let config: SmoreConfig = serde_json::from_str(&layers(count, 2, rest)).unwrap();
            SmoreSpec::new(&config, 16, 16).unwrap();
        }
    }
}

#[test]
fn sizes() {
    check(&one_layer("4", "5", "2", ""), &["layers[0].fanout", "5", "experts"]);
    check(&one_layer("4", "0", "2", ""), &["layers[0].fanout is 0"]);
    check(&one_layer("4", "2", "0", ""), &["layers[0].rank is 0"]);
    check(&one_layer("0", "2", "2", ""), &["layers[0].experts is 0"]);
    check(&one_layer("0", "0", "0", ""), &["layers[0].experts is 0"]);
    for huge in ["65536", "1099511627776", "9223372036854775808", "18446744073709551615"] {
        check(&one_layer(huge, "2", "2", ""), &["layers[0].experts", huge]);
        check(&one_layer("4", huge, "2", ""), &["layers[0].fanout", huge]);
        check(&one_layer("4", "2", huge, ""), &["layers[0].rank", huge]);
        check(&one_layer(huge, huge, huge, ""), &["layers[0].experts", huge]);
        let width = format!(r#", "gate": {{"router_width": {huge}}}"#);
        check(&one_layer("4", "2", "2", &width), &["gate.router_width", huge]);
    }
    for huge in ["1048577", "1099511627776", "9223372036854775808", "18446744073709551615"] {
        for kind in ["mlp", "linear", "bottom_up"] {
            let width =
                format!(r#", "gate": {{"router_input_width": {huge}, "architecture": "{kind}"}}"#);
            check(&one_layer("4", "2", "2", &width), &["gate.router_input_width", huge]);
        }
    }
    check(&one_layer("4", "2", "2", r#", "gate": {"router_width": 0}"#), &["gate.router_width"]);
    // Each size alone is allowed, all of them together are not.
    check(&one_layer("65535", "2", "65535", ""), &["rank", "experts"]);
    check(&layers(9, 4, ""), &["layers[0]", "fanout"]);
    check(&layers(16, 4, ""), &["fanout"]);
    let linear = r#", "gate": {"architecture": "linear", "router_input_width": 1048576}"#;
    check(&layers(16, 1, linear), &["gate.architecture", "layers"]);
    let wide = r#", "gate": {"architecture": "bottom_up"}"#;
    check(&one_layer("300", "300", "2", wide), &["layers[0]", "bottom_up", "experts"]);
}

#[test]
fn depth() {
    check(r#"{"layers": []}"#, &["layers", "0"]);
    check(r#"{"layers": [], "gate": {"kind": "noisy_topk"}}"#, &["layers", "0"]);
    check(&layers(17, 1, ""), &["layers", "17"]);
    check(&layers(10_000, 4, ""), &["layers", "10000"]);
    check("{}", &["layers"]);
    check(r#"{"layers": null}"#, &["line 1"]);
}

#[test]
fn contradictions() {
    let pool = |other: &str| {
        format!(
            r#"{{"shared_pool": true, "layers": [{{"experts": 4, "fanout": 2, "rank": 2}}, {other}]}}"#
        )
    };
    check(&pool(r#"{"experts": 4, "fanout": 2, "rank": 3}"#), &["shared_pool", "layers[1]"]);
    check(&pool(r#"{"experts": 3, "fanout": 2, "rank": 2}"#), &["shared_pool", "layers[1]"]);
    for size in ["1", "4"] {
        let noisy = r#", "gate": {"kind": "noisy_topk"}"#;
        check(&one_layer(size, size, "2", noisy), &["layers[0].fanout", "noisy_topk"]);
    }
    // Fanouts 2, 2, 2 of a tree become 4, 4, 2 of 4 without one.
    let noisy = r#", "structure": "multi_order", "activation": "identity",
        "gate": {"kind": "noisy_topk"}"#;
    check(&layers(3, 2, noisy), &["multi_order", "layers[0].fanout 2", "4", "noisy_topk"]);
    check(&layers(2, 2, noisy), &["multi_order", "layers[0].fanout 2", "noisy_topk"]);
    let config: SmoreConfig = serde_json::from_str(&layers(3, 1, noisy)).unwrap();
    SmoreSpec::new(&config, 16, 16).unwrap();
    let flat = r#", "structure": "flat", "activation": "identity""#;
    check(&layers(2, 2, flat), &["structure", "flat", "layers"]);
    for structure in ["flat", "multi_order"] {
        for activation in ["tanh", "relu", "prelu|0.5"] {
            let rest = format!(r#", "structure": "{structure}", "activation": "{activation}""#);
            check(&layers(1, 2, &rest), &["structure", structure, "activation"]);
        }
        // tanh is the default.
        let rest = format!(r#", "structure": "{structure}""#);
        check(&layers(1, 2, &rest), &["structure", structure, "activation"]);
    }
    for kind in ["dense", "noisy_topk"] {
        let rest = format!(r#", "gate": {{"architecture": "bottom_up", "kind": "{kind}"}}"#);
        check(&layers(2, 2, &rest), &["gate.architecture", "bottom_up", "gate.kind"]);
    }
    let rest = r#", "gate": {"architecture": "bottom_up"}, "structure": "multi_order",
        "activation": "identity""#;
    check(&layers(2, 2, rest), &["gate.architecture", "structure"]);
}

#[test]
fn activations() {
    for text in
        ["prelu", "prelu|", "prelu|nan", "prelu|inf", "prelu|-inf", "prelu|1e999", "prelu|x"]
    {
        let rest = format!(r#", "activation": "{text}""#);
        check(&layers(1, 2, &rest), &["activation", text, "slope"]);
        let rest = format!(r#", "gate": {{"activation": "{text}"}}"#);
        check(&layers(1, 2, &rest), &["activation", text, "slope"]);
    }
    for text in ["", "gelu", "Tanh", "tanh "] {
        let rest = format!(r#", "activation": "{text}""#);
        check(&layers(1, 2, &rest), &["activation", text]);
    }
    // Only a program can write these.
    for slope in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut config: SmoreConfig = serde_json::from_str(&layers(1, 2, "")).unwrap();
        config.activation = Activation::Prelu(slope);
        let error = SmoreSpec::new(&config, 16, 16).unwrap_err().to_string();
        assert!(error.starts_with("activation "), "{error}");
        config.activation = Activation::Tanh;
        config.gate.activation = Activation::Prelu(slope);
        let error = SmoreSpec::new(&config, 16, 16).unwrap_err().to_string();
        assert!(error.starts_with("gate.activation "), "{error}");
    }
}

#[test]
fn numbers_of_the_wrong_kind() {
    // A parser of types knows the place; of the key it says nothing.
    for bad in ["-1", "1.5", "18446744073709551616", "1e3", "\"4\"", "null", "[4]", "true", "NaN"] {
        check(&one_layer(bad, "2", "2", ""), &["line 1"]);
        check(&one_layer("4", bad, "2", ""), &["line 1"]);
        check(&one_layer("4", "2", bad, ""), &["line 1"]);
        check(&layers(1, 2, &format!(r#", "gate": {{"router_width": {bad}}}"#)), &["line 1"]);
    }
    for bad in ["NaN", "Infinity", "1e999", "\"nan\"", "{}"] {
        check(&layers(1, 2, &format!(r#", "gate": {{"balance_weight": {bad}}}"#)), &["line 1"]);
    }
    let weight = r#", "gate": {"balance_weight": -0.5}"#;
    check(&layers(1, 2, weight), &["gate.balance_weight", "-0.5"]);
    for alpha in ["0", "-8", "-1e300"] {
        let json = format!(
            r#"{{"layers": [{{"experts": 4, "fanout": 2, "rank": 2, "lora_alpha": {alpha}}}]}}"#
        );
        check(&json, &["layers[0].lora_alpha"]);
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut config: SmoreConfig = serde_json::from_str(&layers(2, 2, "")).unwrap();
        config.gate.balance_weight = bad;
        let error = SmoreSpec::new(&config, 16, 16).unwrap_err().to_string();
        assert!(error.contains("gate.balance_weight"), "{error}");
        config.gate.balance_weight = 0.0;
        config.layers[1].lora_alpha = Some(bad);
        let error = SmoreSpec::new(&config, 16, 16).unwrap_err().to_string();
        assert!(error.contains("layers[1].lora_alpha"), "{error}");
    }
}

#[test]
fn unknown_words() {
    check(&layers(1, 2, r#", "fan_out": 2"#), &["fan_out"]);
    check(&layers(1, 2, r#", "gate": {"widht": 2}"#), &["widht"]);
    check(&one_layer("4", "2", r#"2, "alpha": 4"#, ""), &["alpha"]);
    check(&one_layer("4", "2", r#"2, "rank": 4"#, ""), &["rank"]);
    check(r#"{"layers": [{"experts": 4, "rank": 2}]}"#, &["fanout"]);
    for (key, value) in [
        ("activation_position", "children"),
        ("structure", "graph"),
        ("init", "zeros"),
        ("init", "eq1_layer"),
    ] {
        check(&layers(1, 2, &format!(r#", "{key}": "{value}""#)), &[value]);
    }
    for (key, value) in [("kind", "top_k"), ("architecture", "conv")] {
        check(&layers(1, 2, &format!(r#", "gate": {{"{key}": "{value}"}}"#)), &[value]);
    }
}

#[test]
fn empty_maps() {
    let config: SmoreConfig = serde_json::from_str(&layers(2, 2, "")).unwrap();
    for (d_in, d_out) in [(0, 16), (16, 0), (0, 0)] {
        let error = SmoreSpec::new(&config, d_in, d_out).unwrap_err().to_string();
        assert!(error.contains(&format!("{d_out} x {d_in}")), "{error}");
    }
}

/// A sane HydraLoRA's config, changed; what is said of it on a map `[d_out, d_in]`.
fn hydra(change: impl Fn(&mut HydraLoraConfig), d_in: usize, d_out: usize) -> String {
    let mut config: HydraLoraConfig = serde_json::from_str(r#"{"heads": 4, "rank": 2}"#).unwrap();
    assert_eq!(HydraLoraSpec::new(&config, 16, 16).unwrap().scale, 2.0);
    change(&mut config);
    HydraLoraSpec::new(&config, d_in, d_out).unwrap_err().to_string()
}

fn mix_config() -> MixLoraConfig {
    serde_json::from_str(r#"{"experts": 4, "fanout": 2, "rank": 2}"#).unwrap()
}

fn ffn(hidden: usize, intermediate: usize, adapted: [bool; 3]) -> FfnShape {
    FfnShape { hidden, intermediate, activation: GateActivation::Silu, adapted }
}

/// As [`hydra`], for MixLoRA in an FFN.
fn mix(change: impl Fn(&mut MixLoraConfig), hidden: usize, intermediate: usize) -> String {
    let mut config = mix_config();
    let spec = MixLoraSpec::new(&config, ffn(16, 24, [true; 3])).unwrap();
    assert_eq!((spec.scale, spec.balance_weight), (2.0, 0.01));
    change(&mut config);
    MixLoraSpec::new(&config, ffn(hidden, intermediate, [true; 3])).unwrap_err().to_string()
}

#[track_caller]
fn says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "`{error}` without `{word}`");
    }
}

#[test]
fn baselines() {
    for wrong in [0, 65_536, usize::MAX] {
        let number = wrong.to_string();
        says(&hydra(|c| c.heads = wrong, 16, 16), &["heads", &number]);
        says(&hydra(|c| c.rank = wrong, 16, 16), &["rank", &number]);
        says(&mix(|c| c.experts = wrong, 16, 16), &["experts", &number]);
        says(&mix(|c| c.fanout = wrong, 16, 16), &["fanout", &number]);
        says(&mix(|c| c.rank = wrong, 16, 16), &["rank", &number]);
    }
    says(&mix(|c| c.fanout = 5, 16, 16), &["fanout is 5", "experts is 4"]);
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let number = wrong.to_string();
        says(&hydra(|c| c.alpha = Some(wrong), 16, 16), &["alpha", &number]);
        says(&mix(|c| c.alpha = Some(wrong), 16, 16), &["alpha", &number]);
    }
    for wrong in [-1.0, f64::NAN, f64::INFINITY] {
        says(&mix(|c| c.balance_weight = wrong, 16, 16), &["balance_weight", &wrong.to_string()]);
    }
    let nothing = MixLoraSpec::new(&mix_config(), ffn(16, 16, [false; 3])).unwrap_err().to_string();
    says(&nothing, &["targets", "gate_proj", "lora"]);
    for [d_in, d_out] in [[0, 16], [16, 0], [1 << 40, 16], [16, 1 << 63], [usize::MAX; 2]] {
        let huge = if d_in == 0 || d_out == 0 { "nothing to adapt" } else { "2^36" };
        says(&hydra(|_| (), d_in, d_out), &[huge]);
        says(&mix(|_| (), d_in, d_out), &[huge]);
    }
    // Each size alone is allowed, all of them together are not.
    says(&hydra(|c| (c.heads, c.rank) = (65_535, 65_535), 32, 32), &["rank", "heads"]);
    says(&mix(|c| (c.experts, c.rank) = (65_535, 65_535), 16, 16), &["rank", "experts"]);
    let unknown = r#"{"heads": 4, "rank": 2, "lora_alpha": 2}"#;
    says(
        &serde_json::from_str::<HydraLoraConfig>(unknown).unwrap_err().to_string(),
        &["lora_alpha"],
    );
    let unknown = r#"{"experts": 4, "top_k": 2, "rank": 2}"#;
    says(&serde_json::from_str::<MixLoraConfig>(unknown).unwrap_err().to_string(), &["top_k"]);
}

/// Small numbers, the edges of every limit, and anything.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 1usize..6,
        2 => select(vec![0, 255, 256, 65_535, 65_536, 1 << 20, 1 << 24, 1 << 32, 1 << 36]),
        1 => select(vec![1 << 40, 1 << 63, usize::MAX - 1, usize::MAX]),
        1 => any::<usize>(),
    ]
}

fn weight() -> impl Strategy<Value = f64> {
    prop_oneof![any::<f64>(), 0.0..4.0, select(vec![f64::NAN, f64::INFINITY, -0.0, 5e-324])]
}

fn activation() -> impl Strategy<Value = Activation> {
    prop_oneof![
        Just(Activation::Identity),
        Just(Activation::Tanh),
        weight().prop_map(Activation::Prelu)
    ]
}

fn any_config() -> impl Strategy<Value = SmoreConfig> {
    let layer = || {
        let numbers = (size(), size(), size(), proptest::option::of(weight()), any::<bool>());
        numbers.prop_map(|(experts, fanout, rank, lora_alpha, clamp)| {
            let fanout = if clamp { fanout.min(experts) } else { fanout };
            LayerConfig { experts, fanout, rank, lora_alpha }
        })
    };
    // Layers all alike reach the checks that unequal ones hide.
    let alike = (layer(), 1usize..20).prop_map(|(layer, count)| vec![layer; count]);
    let layers = prop_oneof![alike, proptest::collection::vec(layer(), 0..18)];
    let gate = (
        select(vec![GateKind::Switch, GateKind::NoisyTopk, GateKind::Dense]),
        select(vec![
            RouterArchitecture::Mlp,
            RouterArchitecture::Linear,
            RouterArchitecture::BottomUp,
        ]),
        (weight(), size(), size(), activation(), any::<bool>()),
    )
        .prop_map(|(kind, architecture, rest)| {
            let (balance_weight, router_width, router_input_width, activation, ancestor_keys) =
                rest;
            GateConfig {
                kind,
                architecture,
                balance_weight,
                router_width,
                router_input_width,
                activation,
                ancestor_keys,
            }
        });
    let structure = select(vec![Structure::Tree, Structure::MultiOrder, Structure::Flat]);
    (layers, gate, activation(), structure, any::<bool>()).prop_map(
        |(layers, gate, activation, structure, shared_pool)| SmoreConfig {
            targets: Targets::default(),
            layers,
            gate,
            activation,
            activation_position: ActivationPosition::All,
            shared_pool,
            structure,
            init: Init::Normal,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4096,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// In a build that checks for overflow. What is accepted has a layout whose size is in bounds.
    #[test]
    fn anything_gets_an_answer(config in any_config(), d_in in size(), d_out in size()) {
        match SmoreSpec::new(&config, d_in, d_out) {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(spec) => {
                let layout = SmoreLayout::new(&spec);
                prop_assert!(layout.len <= 1 << 37, "{} parameters", layout.len);
                for layer in &spec.layers {
                    prop_assert!(layer.scale.is_finite());
                    prop_assert!(layer.nodes <= 1 << 16);
                }
            }
        }
    }

    /// As above, of the baselines. Layouts are built where they have few names.
    #[test]
    fn any_baseline_gets_an_answer(sizes in [size(), size(), size()], alpha in weight(),
                                   balance_weight in weight(), d_in in size(), d_out in size()) {
        let ([experts, fanout, rank], alpha) = (sizes, Some(alpha));
        let config = HydraLoraConfig { targets: Targets::default(), heads: experts, rank, alpha };
        if let Ok(spec) = HydraLoraSpec::new(&config, d_in, d_out) {
            prop_assert!(spec.scale.is_finite());
            if experts < 300 {
                prop_assert!(HydraLoraLayout::new(&spec).len <= 1 << 36);
            }
        }
        let config = MixLoraConfig { targets: Targets::default(), experts, fanout, rank, alpha, balance_weight };
        if let Ok(spec) = MixLoraSpec::new(&config, ffn(d_in, d_out, [false, true, true])) {
            prop_assert!(spec.scale.is_finite() && fanout <= experts);
            if experts < 300 {
                prop_assert!(MixLoraLayout::new(&spec).len <= 1 << 36);
            }
        }
    }
}

#[test]
fn huge_maps() {
    for architecture in ["mlp", "linear", "bottom_up"] {
        let gate =
            format!(r#", "gate": {{"architecture": "{architecture}", "router_input_width": 0}}"#);
        let config: SmoreConfig = serde_json::from_str(&layers(3, 2, &gate)).unwrap();
        for huge in [1 << 40, 1 << 63, usize::MAX] {
            SmoreSpec::new(&config, huge, 16).unwrap_err();
            SmoreSpec::new(&config, 16, huge).unwrap_err();
        }
    }
}
