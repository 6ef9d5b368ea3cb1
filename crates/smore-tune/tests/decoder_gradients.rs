//! The whole decoder's backward pass against central differences in f64, with each kind of
//! adapter, with full fine-tuning, and through the routers.

use smore::adapter::{AnyAdapter, BlockAdapter, Noise, NoiseKey};
use smore::kernel::GateNoise;
use smore_engine::Cpu;
use smore_tune::checkpoint::save_model;
use smore_tune::config::AdapterConfig;
use smore_tune::inject::Adapters;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::spec::DecoderSpec;
use smore_tune::model::weights::from_scratch;
use smore_tune::model::{Batch, Model, Scales};

type Dev = Cpu<f64>;

/// Experts and sources of one layer of one adapter.
type Tree = (Vec<u16>, Option<Vec<u32>>);

const SCALES: Scales = Scales { loss: 0.125, balance: 0.5 };

/// A small decoder, with weights large enough that every part matters.
fn config(family: &str, tied: bool) -> serde_json::Value {
    serde_json::json!({
        "model_type": family, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 11,
        "tie_word_embeddings": tied, "initializer_range": 0.4, "rms_norm_eps": 1e-5,
        "sliding_window": 3, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.9,
        "final_logit_softcapping": 1.5, "use_sliding_window": true, "max_window_layers": 2
    })
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    batch.push(&[1, 4, 2, 9, 3, 3], &[false, false, true, true, true, false]);
    batch.push(&[7, 0, 10], &[false, true, true]);
    batch
}

fn adapted(yaml: &str) -> Model<Dev> {
    adapted_family("llama", yaml)
}

/// Values of a decoder in which nothing is 0 or 1, or a wrong factor would go unseen.
fn base_values(spec: &DecoderSpec) -> Vec<f32> {
    let mut values = from_scratch(spec, 3);
    nudge(&mut values, 0.05);
    values
}

fn nudge(values: &mut [f32], by: f32) {
    for (i, v) in values.iter_mut().enumerate() {
        *v += by * ((((i * 37) % 23) as f32 - 11.0) / 11.0 + 0.15);
    }
}

fn adapted_family(family: &str, yaml: &str) -> Model<Dev> {
    let spec = DecoderSpec::from_json(&config(family, true)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    save_model(&path, &spec, dir.path(), &base_values(&spec)).unwrap();
    std::fs::write(path.join("config.json"), config(family, true).to_string()).unwrap();
    let folder = ModelFolder::open(&path).unwrap();
    let config: AdapterConfig = serde_json::from_str(yaml).unwrap();
    let adapters = Adapters::new(&config, &spec).unwrap();
    let mut values = adapters.init(5);
    nudge(&mut values, 0.02);
    Model::new(Dev::new(), &folder, adapters, &values, 16)
}

fn total(model: &Model<Dev>, noise: Option<NoiseKey>) -> (f64, Vec<f64>, Vec<Tree>) {
    let mut grads = vec![0.0; model.trained()];
    let out = model.step(&batch(), SCALES, noise.map(Noise::Drawn), &mut grads);
    let loss = out.losses.iter().sum::<f64>() * SCALES.loss + out.balance_loss * SCALES.balance;
    let routing = out.routing.iter().flatten();
    let layers = routing.flat_map(|r| &r.tree.layers);
    let trees = layers.map(|l| (l.expert_idx.clone(), l.source.clone()));
    (loss, grads, trees.collect())
}

/// Checks every `stride`-th parameter.
fn check(model: &mut Model<Dev>, noise: Option<NoiseKey>, stride: usize) {
    let (_, grads, trees) = total(model, noise);
    let top = grads.iter().fold(0.0, |t: f64, g| t.max(g.abs()));
    let mut checked = 0;
    for i in (0..model.trained()).step_by(stride) {
        let h = 1e-5;
        let value = model.params()[i];
        model.params_mut()[i] = value + h;
        let (up, _, trees_up) = total(model, noise);
        model.params_mut()[i] = value - h;
        let (down, _, trees_down) = total(model, noise);
        model.params_mut()[i] = value;
        // Top-k is a jump: a slope across it means nothing.
        if trees_up != trees || trees_down != trees {
            continue;
        }
        checked += 1;
        let slope = (up - down) / (2.0 * h);
        let allowed = 1e-6 * top + 1e-5 * grads[i].abs();
        assert!((slope - grads[i]).abs() < allowed, "parameter {i}: {slope} against {}", grads[i]);
    }
    assert!(checked * stride > model.trained() / 2, "only {checked} slopes checked");
    assert!(grads.iter().filter(|g| g.abs() > 1e-9).count() > grads.len() / 3, "dead gradients");
}

#[test]
fn full_fine_tuning_tied_and_untied() {
    for tied in [true, false] {
        let spec = DecoderSpec::from_json(&config("llama", tied)).unwrap();
        let values = base_values(&spec);
        let mut model = Model::full(Dev::new(), spec, &values, 16);
        check(&mut model, None, 3);
    }
}

/// Norms behind attention and FFN, of queries and keys, biases, caps, windows, scaled embeddings.
#[test]
fn full_fine_tuning_of_every_family() {
    for family in ["mistral", "qwen2", "qwen3", "gemma2"] {
        let spec = DecoderSpec::from_json(&config(family, family == "gemma2")).unwrap();
        assert!(spec.windows.iter().any(Option::is_some));
        let values = base_values(&spec);
        let mut model = Model::full(Dev::new(), spec, &values, 16);
        check(&mut model, None, 3);
    }
}

#[test]
fn adapters_on_every_family() {
    for family in ["mistral", "qwen2", "qwen3", "gemma2"] {
        let mut model = adapted_family(
            family,
            r#"{"kind": "smore", "targets": ["q_proj", "k_proj", "o_proj", "gate_proj",
                "down_proj"], "init": "normal", "activation": "tanh",
                "layers": [{"experts": 3, "fanout": 2, "rank": 1},
                           {"experts": 3, "fanout": 2, "rank": 1}],
                "gate": {"router_width": 3, "router_input_width": 4, "activation": "tanh"}}"#,
        );
        check(&mut model, None, 17);
    }
}

#[test]
fn lora_on_all_projections() {
    let mut model = adapted(
        r#"{"kind": "lora", "rank": 2, "targets": ["q_proj", "k_proj", "v_proj", "o_proj",
            "gate_proj", "up_proj", "down_proj"]}"#,
    );
    check(&mut model, None, 2);
}

/// Computing blocks again changes memory, not a bit, whatever the routers drew.
#[test]
fn checkpointing_gives_the_same_bits() {
    for adapter in [
        r#"{"kind": "lora", "rank": 2}"#,
        r#"{"kind": "mix_lora", "experts": 3, "fanout": 2, "rank": 2}"#,
        r#"{"kind": "smore", "targets": {"modules": "all-linear", "blocks": [1, 2]},
            "layers": [{"experts": 3, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 1, "rank": 1}],
            "gate": {"kind": "noisy_topk", "router_width": 3}, "init": "normal"}"#,
    ] {
        let noise = Some(NoiseKey { seed: 3, step: 1, place: 0 });
        let mut model = adapted_family("gemma2", adapter);
        let (loss, grads, trees) = total(&model, noise);
        model.gradient_checkpointing = true;
        assert!((loss, grads, trees) == total(&model, noise), "{adapter}");
    }
}

#[test]
fn hydra_lora_and_mix_lora() {
    for family in ["llama", "gemma2"] {
        let all = r#""targets": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]"#;
        let mut model = adapted_family(
            family,
            &format!(r#"{{"kind": "hydra_lora", "heads": 3, "rank": 2, {all}}}"#),
        );
        check(&mut model, None, 11);
        let mix = r#""kind": "mix_lora", "experts": 4, "fanout": 2, "rank": 2"#;
        let mut model = adapted_family(family, &format!("{{{mix}, {all}}}"));
        assert_eq!(model.adapters.slots.len(), 9);
        check(&mut model, None, 11);
        // Only some maps of the FFN, only in one block.
        let some = r#""targets": {"modules": ["up_proj"], "blocks": [1]}"#;
        let mut model = adapted_family(family, &format!("{{{mix}, {some}}}"));
        check(&mut model, None, 3);
    }
}

#[test]
fn smore_with_each_gate_and_position() {
    let gates = [
        r#"{"kind": "switch", "router_width": 3, "router_input_width": 4, "activation": "tanh"}"#,
        r#"{"kind": "dense", "router_width": 3, "router_input_width": 4, "activation": "tanh"}"#,
        r#"{"kind": "noisy_topk", "router_width": 3, "router_input_width": 4,
            "activation": "prelu|0.3"}"#,
        r#"{"kind": "switch", "architecture": "linear", "router_input_width": 0}"#,
    ];
    for (gate, position) in gates.iter().zip(["all", "child", "child_v2", "all"]) {
        let mut model = adapted(&format!(
            r#"{{"kind": "smore", "targets": ["up_proj", "down_proj"],
                "layers": [{{"experts": 3, "fanout": 2, "rank": 2, "lora_alpha": 3}},
                           {{"experts": 3, "fanout": 2, "rank": 1}}],
                "gate": {gate}, "activation": "prelu|0.2", "activation_position": "{position}",
                "init": "normal"}}"#
        ));
        let noise = NoiseKey { seed: 1, step: 2, place: 0 };
        check(&mut model, Some(noise), 7);
    }
}

/// A step with noise from outside is the step that draws it.
#[test]
fn noise_can_be_given() {
    let model = adapted(
        r#"{"kind": "smore", "targets": ["q_proj", "up_proj"], "init": "normal",
            "layers": [{"experts": 3, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 1}],
            "gate": {"kind": "noisy_topk", "router_width": 3, "router_input_width": 4}}"#,
    );
    let key = NoiseKey { seed: 1, step: 2, place: 0 };
    let mut given: Vec<GateNoise<f64>> = Vec::new();
    for slot in &model.adapters.slots {
        let BlockAdapter::Map(AnyAdapter::Smore(smore)) = &slot.adapter else { unreachable!() };
        let key = NoiseKey { place: slot.place as u64, ..key };
        given.push(GateNoise::draw(&smore.spec, key, batch().ids.len()));
    }
    let step = |noise: Noise| {
        let mut grads = vec![0.0; model.trained()];
        (model.step(&batch(), SCALES, Some(noise), &mut grads).losses, grads)
    };
    let logits = |noise: Option<Noise>| model.states_and_logits(&batch(), noise).1;
    let drawn = (step(Noise::Drawn(key)), logits(Some(Noise::Drawn(key))));
    assert_eq!(drawn, (step(Noise::Given(&given)), logits(Some(Noise::Given(&given)))));
    assert_ne!(drawn.1, logits(None));
    given.reverse();
    assert_ne!(drawn.0, step(Noise::Given(&given)));
    assert_ne!(drawn.1, logits(Some(Noise::Given(&given))));
}

/// The bottom-up router, whose choices depend on what comes from below, and the ablations.
#[test]
fn bottom_up_router_and_ablations() {
    let three = r#"[{"experts": 3, "fanout": 2, "rank": 2}, {"experts": 2, "fanout": 2, "rank": 1},
        {"experts": 3, "fanout": 2, "rank": 2}]"#;
    let two = r#"[{"experts": 4, "fanout": 1, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 1}]"#;
    let flat = r#"[{"experts": 4, "fanout": 2, "rank": 2}]"#;
    for (layers, gate, rest) in [
        (three, r#""architecture": "bottom_up""#, r#""activation": "tanh""#),
        (
            two,
            r#""architecture": "bottom_up""#,
            r#""activation": "tanh", "activation_position": "child""#,
        ),
        (three, r#""ancestor_keys": false"#, r#""activation": "tanh""#),
        (three, r#""kind": "switch""#, r#""activation": "identity", "structure": "multi_order""#),
        (flat, r#""kind": "switch""#, r#""activation": "identity", "structure": "flat""#),
    ] {
        let mut model = adapted(&format!(
            r#"{{"kind": "smore", "targets": ["up_proj", "down_proj"], "layers": {layers},
                "gate": {{{gate}, "router_width": 3, "router_input_width": 4,
                "activation": "tanh"}}, {rest}, "init": "normal"}}"#
        ));
        check(&mut model, None, 7);
    }
}

#[test]
fn smore_sharp_shares_its_pool() {
    let mut model = adapted(
        r#"{"kind": "smore", "targets": ["gate_proj"], "shared_pool": true, "init": "normal",
            "layers": [{"experts": 3, "fanout": 1, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 2}],
            "gate": {"router_width": 3, "router_input_width": 4, "activation": "tanh"}}"#,
    );
    check(&mut model, None, 3);
}

const DROPPED: [&str; 5] = [
    r#"{"kind": "lora", "rank": 2, "targets": "all-linear"}"#,
    r#"{"kind": "hydra_lora", "heads": 3, "rank": 2, "targets": ["q_proj", "down_proj"]}"#,
    r#"{"kind": "mix_lora", "experts": 4, "fanout": 2, "rank": 2,
        "targets": ["o_proj", "gate_proj", "up_proj", "down_proj"]}"#,
    r#"{"kind": "smore", "targets": ["up_proj", "down_proj"], "init": "normal",
        "layers": [{"experts": 3, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 1}],
        "gate": {"router_width": 3, "router_input_width": 4, "activation": "tanh"}}"#,
    r#"{"kind": "smore", "targets": ["up_proj"], "init": "normal",
        "layers": [{"experts": 3, "fanout": 2, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 1}],
        "gate": {"kind": "noisy_topk", "router_width": 3, "router_input_width": 0}}"#,
];

/// Dropout and label smoothing against central differences with the mask held fixed, and with
/// blocks computed again, to the bit.
#[test]
fn dropout_and_label_smoothing() {
    let key = Some(NoiseKey { seed: 3, step: 1, place: 0 });
    for adapter in DROPPED {
        let mut model = adapted(adapter);
        (model.dropout, model.label_smoothing) = (0.3, 0.2);
        check(&mut model, key, 7);
        let (loss, grads, trees) = total(&model, key);
        model.gradient_checkpointing = true;
        assert!((loss, grads, trees) == total(&model, key), "{adapter}");
    }
}

/// Which elements drop depends on seed and step alone; evaluation drops nothing, and neither does
/// a step without a key.
#[test]
fn dropout_is_keyed_and_off_in_evaluation() {
    let key = |seed, step| Some(NoiseKey { seed, step, place: 0 });
    for adapter in &DROPPED[..4] {
        let mut model = adapted(adapter);
        let (bare, evaluated) = (total(&model, key(3, 1)), model.losses(&batch()));
        model.dropout = 0.3;
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| total(&model, key(3, 1)))
        };
        let dropped = run(1);
        assert!(dropped == run(3) && dropped == run(2), "{adapter}");
        assert_ne!(dropped.0, bare.0);
        // What chooses experts sees the whole input; only attention's adapters lie in front of it.
        let first = bare.2.first().zip(dropped.2.first());
        if !adapter.contains("o_proj") && !adapter.contains("q_proj") {
            assert!(first.is_none_or(|(bare, dropped)| bare == dropped), "{adapter}");
        }
        assert_ne!(dropped.0, total(&model, key(4, 1)).0);
        assert_ne!(dropped.0, total(&model, key(3, 2)).0);
        assert_eq!(total(&model, None), bare);
        assert_eq!(model.losses(&batch()), evaluated);
        model.dropout = 0.0;
        model.label_smoothing = 0.2;
        assert_ne!(total(&model, key(3, 1)).0, bare.0);
        assert_eq!(model.losses(&batch()), evaluated);
    }
}
