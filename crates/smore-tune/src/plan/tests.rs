use super::*;
use crate::config::AdapterSection;

fn adapter(yaml: &str) -> AdapterConfig {
    AdapterSection::parse(yaml, "test").unwrap().adapter
}

fn smore(layers: usize, rank: usize, targets: &str) -> AdapterConfig {
    let layer = format!("{{experts: 4, fanout: 2, rank: {rank}}}");
    let layers = vec![layer; layers].join(", ");
    adapter(&format!("kind: smore\ntargets: [{targets}]\nlayers: [{layers}]\n"))
}

const SETTING: Setting = Setting { tokens: 1024, keeps_best: false, mixed: false };

fn cost(config: &AdapterConfig, model: &str) -> Cost {
    let spec = models::by_name(model).unwrap();
    Cost::of(String::new(), config, None, &spec, SETTING).unwrap()
}

#[test]
fn overheads_are_the_papers_to_the_digit() {
    // Table 1: depth, rank, Delta, share of LoRA; Table 6: share of its multiplications.
    let rows = [
        (2, 8, 5_120, "1.0", "1.2"),
        (3, 8, 14_336, "1.8", "3.3"),
        (4, 8, 30_720, "2.9", "7.5"),
        (2, 16, 20_480, "2.0", "2.3"),
        (3, 16, 57_344, "3.6", "6.6"),
        (4, 16, 122_880, "5.9", "15.0"),
    ];
    for (depth, rank, delta, share, propagation) in rows {
        // A map of 4096 x 4096 in each of 32 blocks.
        let structure = cost(&smore(depth, rank, "q_proj"), "Llama-3-8B").structure.unwrap();
        assert_eq!(structure.parameters_above_lora, 32 * delta);
        assert_eq!(format!("{:.1}", 100.0 * structure.parameter_overhead), share);
        assert_eq!(format!("{:.1}", 100.0 * structure.propagation_overhead), propagation);
    }
}

#[test]
fn known_models_have_their_published_sizes() {
    // Numbers in the safetensors of these models, as published.
    for (name, parameters) in [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-32b", 32_762_123_264),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
    ] {
        assert_eq!(models::by_name(name).unwrap().parameters(), parameters, "{name}");
    }
    let error = models::by_name("llama-3.2-1c").unwrap_err();
    assert!(error.contains("did you mean llama-3.2-1b?"), "{error}");
}

#[test]
fn loras_stand_beside_at_equal_rank_and_equal_parameters() {
    let config = smore(2, 16, "q_proj, down_proj");
    let spec = models::by_name("llama-3.2-1b").unwrap();
    let own = cost(&config, "llama-3.2-1b");
    let loras = loras(&config, own.parameters, &spec).unwrap();
    let [(equal_rank, first), (_, second)] = &loras[..] else { panic!("{loras:?}") };
    assert_eq!(equal_rank, "LoRA of equal rank 128");
    let first = cost(first, "llama-3.2-1b");
    assert_eq!(first.parameters, 16 * 128 * (2048 + 2048 + 8192 + 2048));
    assert_eq!(first.flops.active, 2 * first.parameters);
    let second = cost(second, "llama-3.2-1b").parameters;
    let gap = second.abs_diff(own.parameters);
    assert!(gap <= first.parameters / 128, "closer than one rank: {gap}");
}

#[test]
fn active_experts_are_fewer_than_those_multiplied() {
    let flops = cost(&smore(2, 16, "q_proj"), "llama-3.2-1b").flops;
    // Leaves: min(4, 4) of 4; above: 2 of 4 experts of rank 16 over 2048 inputs in 16 blocks.
    assert_eq!(flops.executed - flops.active, 2 * 16 * 2 * 16 * 2048);
}

#[test]
fn memory_falls_with_bf16_and_recomputation() {
    let own = cost(&smore(2, 16, "q_proj"), "llama-3.2-1b");
    let at = |bf16, again| {
        let mut all = own.memory.iter();
        *all.find(|p| (p.bf16, p.gradient_checkpointing) == (bf16, again)).unwrap()
    };
    let (wide, narrow, again) = (at(false, false), at(true, false), at(true, true));
    assert_eq!(wide.split.weights, 2 * narrow.split.weights);
    assert_eq!(wide.split.adapter_and_optimizer, 16 * own.parameters as u64);
    assert!(again.split.activations < narrow.split.activations / 2);
    let sum = again.split.weights + again.split.activations;
    assert_eq!(again.total, sum + again.split.adapter_and_optimizer + again.split.program_and_data);
}
