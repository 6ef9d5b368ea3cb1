//! What `smore plan` says, held against training steps.

use crate::case::{Adapter, Case, Precision, Shape, Step, ffn};
use crate::worker::Worker;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use smore_tune::model::spec::DecoderSpec;
use smore_tune::plan::{Cost, Pace, Setting, Work};
use std::time::Duration;

/// A tiny model of stories, a pilot's, a small and a large one; with and without recomputation.
fn steps() -> Vec<(&'static str, Step)> {
    let tiny = Shape {
        hidden: 64,
        blocks: 5,
        intermediate: 172,
        vocabulary: 512,
        heads: 8,
        kv_heads: 4,
        head_dim: 8,
        tied: true,
    };
    let half = Shape {
        hidden: 896,
        blocks: 24,
        intermediate: 4864,
        vocabulary: 151_936,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        tied: true,
    };
    let step = |shape, adapter, dtype, batch, length, gradient_checkpointing| Step {
        shape,
        adapter,
        dtype,
        batch,
        length,
        gradient_checkpointing,
        lora_rank: 16,
        targets: ffn(),
        threads: 0,
    };
    let (f32, bf16) = (Precision::Float32, Precision::Bfloat16);
    vec![
        ("stories260K, S'MoRE, f32", step(tiny, Adapter::Smore, f32, 8, 256, false)),
        ("width 512, S'MoRE", step(Shape::PILOT, Adapter::Smore, bf16, 4, 256, false)),
        (
            "width 512, LoRA 16, f32, recomputing",
            step(Shape::PILOT, Adapter::Lora(16), f32, 8, 256, true),
        ),
        ("width 896, LoRA 64", step(half, Adapter::Lora(64), bf16, 2, 256, false)),
        ("width 896, S'MoRE, recomputing", step(half, Adapter::Smore, bf16, 4, 256, true)),
        (
            "Llama-3.2-1B, S'MoRE, recomputing",
            step(Shape::LLAMA_1B, Adapter::Smore, bf16, 4, 256, true),
        ),
    ]
}

/// Prints and returns the ratios of what was planned to what was measured.
pub(crate) fn compare() -> Result<Value> {
    println!("\nPlanned and measured");
    let mut record = serde_json::Map::new();
    for (name, step) in steps() {
        let spec = DecoderSpec::from_json(&step.shape.config()).map_err(anyhow::Error::msg)?;
        let config = serde_json::from_value(step.adapter.config(&step.targets)?)?;
        let bf16 = step.dtype == Precision::Bfloat16;
        let (tokens, gradient_checkpointing) =
            (step.batch * step.length, step.gradient_checkpointing);
        let setting = Setting { tokens, keeps_best: false, mixed: bf16 };
        let cost =
            Cost::of(name.into(), &config, None, &spec, setting).map_err(anyhow::Error::msg)?;
        let peak = cost
            .memory
            .iter()
            .find(|p| (p.bf16, p.gradient_checkpointing) == (bf16, gradient_checkpointing))
            .context("a peak of this kind")?;
        let work = Work {
            spec: &spec,
            config: &config,
            router_widths: None,
            tokens,
            length: step.length,
            bf16,
            mixed: bf16,
            gradient_checkpointing,
        };
        let pace = Pace::measure(work, Duration::from_secs(10))
            .map_err(anyhow::Error::msg)?
            .context("an adapter")?;
        let planned = pace.seconds(tokens, 1);
        let mut worker = Worker::ours(&Case::Step(step))?;
        worker.run()?;
        let mut seconds = [worker.run()?, worker.run()?, worker.run()?];
        seconds.sort_by(f64::total_cmp);
        let end = worker.end()?;
        let measured = end["peak_memory_bytes"].as_f64().context("a peak")?;
        let (memory, time) = (peak.total as f64 / measured, planned / seconds[1]);
        println!(
            "  {name:38} memory {:7.1} of {:7.1} MB: {memory:.2}; time {:8.2} of {:8.2} ms: {time:.2}",
            peak.total as f64 / 1e6,
            measured / 1e6,
            planned * 1e3,
            seconds[1] * 1e3,
        );
        record.insert(name.into(), json!({"memory": memory, "time": time}));
    }
    Ok(record.into())
}
