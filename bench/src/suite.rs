//! What is compared with what, and how it is told.

use crate::Args;
use crate::case::{Adapter, Case, Precision, Shape, Step, ffn};
use crate::worker::Worker;
use anyhow::Result;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Runs of one worker end once they took this long, the first not counted.
const SECONDS_EACH: f64 = 90.0;

/// Between the runs of two workers.
const PAUSE: Duration = Duration::from_millis(100);

/// What a worker came to.
struct Measured {
    /// Median of its runs.
    seconds: f64,
    peak: f64,
    /// Peak beyond what was resident before the first run.
    beyond: f64,
}

/// Of the product 512 x 2048 x 8192.
const PRODUCT_FLOPS: f64 = 2.0 * 512.0 * 2048.0 * 8192.0;

/// Runs the workers by turns, A B A B, `rounds` times after a first round that is not counted. A
/// worker so slow that one run exceeds its time has that run counted.
fn by_turns(mut workers: Vec<Worker>, rounds: usize) -> Result<Vec<Measured>> {
    let mut times = vec![Vec::new(); workers.len()];
    for round in 0..=rounds {
        for (worker, times) in workers.iter_mut().zip(&mut times) {
            let spent: f64 = times.iter().sum();
            if spent > SECONDS_EACH {
                continue;
            }
            // Threads of the one before may wait for work with their cores held.
            std::thread::sleep(PAUSE);
            let seconds = worker.run()?;
            if round > 0 || seconds > SECONDS_EACH / 3.0 {
                times.push(seconds);
            }
        }
    }
    workers.into_iter().zip(times).map(|(worker, times)| measured(worker, times)).collect()
}

/// The median of what a worker took, and its memory.
fn measured(worker: Worker, mut times: Vec<f64>) -> Result<Measured> {
    times.sort_by(f64::total_cmp);
    let end = worker.end()?;
    let peak = end["peak_memory_bytes"].as_f64().unwrap_or(f64::NAN);
    let prepared = end["prepared_memory_bytes"].as_f64().unwrap_or(f64::NAN);
    Ok(Measured { seconds: times[times.len() / 2], peak, beyond: peak - prepared })
}

fn three_times<T>(measure: impl Fn() -> Result<T>) -> Result<[T; 3]> {
    Ok([measure()?, measure()?, measure()?])
}

/// The median in the middle.
fn ordered(mut figures: [f64; 3]) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    figures
}

/// The suite while it runs.
struct Suite<'a> {
    args: &'a Args,
    rounds: usize,
    threads: usize,
    /// GFLOP/s of the frozen product with weights in f32 and in bf16.
    ceiling: [f64; 2],
    ratios: serde_json::Map<String, Value>,
    figures: serde_json::Map<String, Value>,
}

/// Runs everything and prints it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let threads = std::thread::available_parallelism()?.get();
    let rounds = if args.quick { 5 } else { 9 };
    let mut suite = Suite {
        args,
        rounds,
        threads,
        ceiling: [f64::NAN; 2],
        ratios: serde_json::Map::new(),
        figures: serde_json::Map::new(),
    };
    println!("{threads} threads, medians of {rounds} runs by turns");
    suite.gemm()?;
    suite.layer()?;
    suite.blocks()?;
    suite.training_steps()?;
    suite.watching()?;
    suite.length()?;
    if !args.quick {
        suite.billion()?;
        suite.decode()?;
    }
    println!("\n{:.0} s in all", start.elapsed().as_secs_f64());
    if args.json {
        let Suite { ratios, figures, .. } = suite;
        let record = json!({
            "version": env!("CARGO_PKG_VERSION"), "quick": args.quick, "threads": threads,
            "ratios": ratios, "figures": figures,
        });
        println!("{record}");
    }
    Ok(())
}

impl Suite<'_> {
    fn peer(&self, case: &Case) -> Result<Option<Worker>> {
        self.args
            .peer
            .as_deref()
            .map(|name| {
                let python = if name == "python" { "python3" } else { name };
                Worker::peer(python, case)
            })
            .transpose()
    }

    /// Ours and, where asked for, the peer's.
    fn with_peer(&self, case: &Case) -> Result<(Measured, Option<Measured>)> {
        let mut workers = vec![Worker::ours(case)?];
        workers.extend(self.peer(case)?);
        let mut all = by_turns(workers, self.rounds)?.into_iter();
        let ours = all.next().unwrap_or(Measured { seconds: f64::NAN, peak: 0.0, beyond: 0.0 });
        Ok((ours, all.next()))
    }

    fn ratio(&mut self, name: &str, value: Option<f64>) {
        self.ratios.insert(name.into(), json!(value));
    }

    fn figure(&mut self, name: &str, value: f64) {
        self.figures.insert(name.into(), json!(value));
    }

    /// The product whose speed is the ceiling.
    fn frozen_product(&self, dtype: Precision) -> Case {
        Case::Gemm { dtype, m: 512, n: 8192, k: 2048, threads: self.threads }
    }

    fn gemm(&mut self) -> Result<()> {
        println!("\nFrozen product, 512 x 2048 x 8192");
        let both = [(Precision::Float32, "f32"), (Precision::Bfloat16, "bf16")];
        for (i, (dtype, name)) in both.into_iter().enumerate() {
            let (ours, peer) = self.with_peer(&self.frozen_product(dtype))?;
            let rate = |m: &Measured| PRODUCT_FLOPS / m.seconds / 1e9;
            self.ceiling[i] = rate(&ours);
            println!("  {name:5} {:7.1} GFLOP/s", rate(&ours));
            self.figure(&format!("gemm_{name}_gflops"), rate(&ours));
            if let Some(peer) = &peer {
                let ratio = rate(&ours) / rate(peer);
                println!(
                    "  {:5} {:7.1} GFLOP/s in PyTorch: {ratio:.2} of its speed",
                    "",
                    rate(peer)
                );
            }
            let ratio = peer.map(|peer| peer.seconds / ours.seconds);
            self.ratio(&format!("gemm_{name}_to_peer"), ratio);
        }
        Ok(())
    }

    fn layer(&mut self) -> Result<()> {
        let (tokens, d_in, d_out) = (1024, 2048, 8192);
        println!("\nLayer, forward and backward, {tokens} tokens, {d_in} -> {d_out}, f32");
        let workers = |adapters: &[Adapter], small_pages| {
            let dtype = Precision::Float32;
            let cases = adapters.iter().map(move |&adapter| Case::Layer {
                adapter,
                dtype,
                tokens,
                d_in,
                d_out,
                small_pages,
            });
            cases.map(|case| Worker::ours(&case)).collect::<Result<Vec<_>>>()
        };
        let with = [Adapter::None, Adapter::Lora(128), Adapter::Smore];
        // Where its memory lies makes a process some hundredths faster than another, and what a thread comes
        // to hold depends on which tasks it happens to take.
        let all = three_times(|| by_turns(workers(&with, false)?, self.rounds))?;
        let flops = 4.0 * (tokens * d_in * d_out) as f64;
        let ratio = |of: usize, to: usize| {
            ordered(all.each_ref().map(|all| all[of].seconds / all[to].seconds))
        };
        for (i, name) in
            ["frozen linear", "with LoRA of rank 128", "with S'MoRE"].iter().enumerate()
        {
            let seconds = ordered(all.each_ref().map(|all| all[i].seconds))[1];
            let [least, median, most] = ratio(i, 0);
            println!(
                "  {name:22} {:7.1} ms, {:5.1} us a token, {median:4.2} x the linear ({least:4.2} to {most:4.2} in three \
                 processes), linear at {:5.1}% of the ceiling",
                seconds * 1e3,
                seconds * 1e6 / tokens as f64,
                flops / seconds / 1e7 / self.ceiling[0]
            );
        }
        let [least, bytes, most] = ordered(three_times(|| {
            let small = by_turns(workers(&[Adapter::None, Adapter::Smore], true)?, self.rounds)?;
            Ok((small[1].beyond - small[0].beyond) / tokens as f64)
        })?);
        println!(
            "  S'MoRE's memory beyond the linear's, on small pages: {bytes:.0} bytes a token \
             ({least:.0} to {most:.0} in three processes)"
        );
        self.figure("smore_layer_bytes_per_token", bytes);
        self.ratio("smore_to_lora_same_rank", Some(ratio(2, 1)[1]));
        self.ratio("smore_plus_linear_to_linear", Some(ratio(2, 0)[1]));
        Ok(())
    }

    /// One block, forward and backward: what a second block adds to a step, since the lowest passes
    /// no slopes on.
    fn blocks(&mut self) -> Result<()> {
        println!("\nOne block with S'MoRE on its FFN, forward and backward, weights in bf16");
        let sizes =
            [("512", Shape::PILOT, 4), ("512", Shape::PILOT, 1), ("2048", Shape::LLAMA_1B, 1)];
        for (width, shape, batch) in sizes {
            let step = self.step_case(Adapter::Smore, Precision::Bfloat16, 128);
            let tokens = (batch * step.length) as f64;
            let workers = [1, 2].map(|blocks| {
                let shape = Shape { blocks, vocabulary: 256, ..shape };
                Worker::ours(&Case::Step(Step { shape, batch, ..step.clone() }))
            });
            let workers = workers.into_iter().collect::<Result<Vec<_>>>()?;
            let all = by_turns(workers, self.rounds)?;
            let (seconds, beyond) =
                (all[1].seconds - all[0].seconds, all[1].beyond - all[0].beyond);
            let rate = 4.0 * tokens * shape.block_weights() as f64 / seconds / 1e9;
            println!(
                "  width {width:>4}, {tokens:4} tokens {:7.1} ms, {:.1} KB a token, frozen products \
                 at {:.0}% of the ceiling",
                seconds * 1e3,
                beyond / tokens / 1e3,
                rate / self.ceiling[1] * 100.0
            );
            self.figure(&format!("block_{width}_{tokens}_us_per_token"), seconds / tokens * 1e6);
        }
        Ok(())
    }

    fn step_case(&self, adapter: Adapter, dtype: Precision, lora_rank: usize) -> Step {
        Step {
            shape: Shape::PILOT,
            adapter,
            dtype,
            batch: 4,
            length: 256,
            gradient_checkpointing: false,
            lora_rank,
            targets: ffn(),
            threads: self.threads,
        }
    }

    /// Ours with weights in bf16 against PyTorch in f32 and in bf16.
    fn training_steps(&mut self) -> Result<()> {
        println!("\nTraining step, Llama of width 512, 4 x 256 tokens");
        for (adapter, rank, name) in
            [(Adapter::Lora(16), 16, "LoRA of rank 16"), (Adapter::Smore, 128, "S'MoRE 4-4 r 16")]
        {
            let bf16 = Precision::Bfloat16;
            let mut workers = vec![Worker::ours(&Case::Step(self.step_case(adapter, bf16, rank)))?];
            for dtype in [Precision::Float32, bf16] {
                workers.extend(self.peer(&Case::Step(self.step_case(adapter, dtype, rank)))?);
            }
            let all = by_turns(workers, self.rounds)?;
            let tokens = 1024.0;
            let ours = &all[0];
            // Forward, and backward to the input alone.
            let ideal = 4.0 * Shape::PILOT.linear_weights() as f64 / self.ceiling[1] / 1e9;
            println!(
                "  {name:16} {:6.0} tokens/s, {:.0} MB; {:.0} us a token, of which the frozen \
                 products at the ceiling {:.0}",
                tokens / ours.seconds,
                ours.peak / 1e6,
                ours.seconds / tokens * 1e6,
                ideal * 1e6
            );
            for (m, dtype) in all[1..].iter().zip(["f32", "bf16"]) {
                println!(
                    "  {:16} {:6.0} tokens/s, {:.0} MB in PyTorch {dtype}, LoRA of rank {rank}: \
                     ours {:.2} of its speed, {:.2} of its memory",
                    "",
                    tokens / m.seconds,
                    m.peak / 1e6,
                    m.seconds / ours.seconds,
                    ours.peak / m.peak
                );
            }
            let suffix = if adapter == Adapter::Smore { "_smore" } else { "" };
            self.figure(&format!("train_step_tokens_per_s{suffix}"), tokens / ours.seconds);
            self.figure(&format!("train_step_peak_bytes{suffix}"), ours.peak);
            let speed = |i: usize| all.get(i).map(|m| m.seconds / ours.seconds);
            let least = all[1..].iter().map(|m| m.peak).reduce(f64::min);
            let (f32_speed, bf16_speed) = (speed(1), speed(2));
            self.ratio(&format!("train_step_f32_to_peer{suffix}"), f32_speed);
            self.ratio(&format!("train_step_bf16_to_peer{suffix}"), bf16_speed);
            self.ratio(&format!("peak_memory_to_peer{suffix}"), least.map(|m| ours.peak / m));
        }
        Ok(())
    }

    /// What watching the routers costs beside a step.
    fn watching(&mut self) -> Result<()> {
        println!(
            "\nWatching the routers beside a step, Llama of width 512, 4 x 256 tokens, S'MoRE"
        );
        let step = || self.step_case(Adapter::Smore, Precision::Bfloat16, 128);
        let watch = |trace_tokens| Case::Watch { step: step(), trace_tokens };
        let cases = [Case::Step(step()), watch(0), watch(16)];
        let workers = cases.iter().map(Worker::ours).collect::<Result<Vec<_>>>()?;
        let all = by_turns(workers, self.rounds)?;
        let share = |i: usize| all[i].seconds / all[0].seconds;
        println!(
            "  counting {:.2}% of the step, the trees of 16 tokens {:.2}%",
            100.0 * share(1),
            100.0 * share(2)
        );
        self.ratio("statistics_to_step", Some(share(1)));
        self.ratio("sampled_trace_to_step", Some(share(2)));
        Ok(())
    }

    /// Memory against the length of a sequence.
    fn length(&mut self) -> Result<()> {
        println!("\nOne sequence, Llama of width 512 with S'MoRE");
        let mut beyond = Vec::new();
        for length in [1024, 2048, 4096] {
            let mut step = self.step_case(Adapter::Smore, Precision::Bfloat16, 128);
            (step.batch, step.length) = (1, length);
            let m = by_turns(vec![Worker::ours(&Case::Step(step))?], 1)?.remove(0);
            println!(
                "  {length:5} tokens {:6.0} MB beyond the weights, {:.2} s",
                m.beyond / 1e6,
                m.seconds
            );
            beyond.push(m.beyond);
        }
        // 1 if the second doubling costs twice the first, as a line does.
        let linear = (beyond[2] - beyond[1]) / (2.0 * (beyond[1] - beyond[0]));
        println!("  growth from 2048 to 4096 over twice that from 1024 to 2048: {linear:.2}");
        self.ratio("memory_growth_4096_to_linear", Some(linear));
        Ok(())
    }

    fn billion(&mut self) -> Result<()> {
        println!("\nTraining step, shapes of Llama-3.2-1B, 8 x 256 tokens, S'MoRE, recomputing");
        let step = Step {
            shape: Shape::LLAMA_1B,
            batch: 8,
            gradient_checkpointing: true,
            ..self.step_case(Adapter::Smore, Precision::Bfloat16, 128)
        };
        let mut product = Worker::ours(&self.frozen_product(Precision::Bfloat16))?;
        let mut worker = Worker::ours(&Case::Step(step))?;
        let (mut products, mut steps) = (Vec::new(), Vec::new());
        // The machine changes within the time of a step, so the ceiling is measured before each.
        for _ in 0..3 {
            for _ in 0..self.rounds {
                std::thread::sleep(PAUSE);
                products.push(product.run()?);
            }
            steps.push(worker.run()?);
        }
        let (ceiling, m) = (measured(product, products)?, measured(worker, steps)?);
        let tokens = 2048.0;
        let (all, head) = (Shape::LLAMA_1B.linear_weights(), 128_256 * 2048);
        // Forward twice below the head, whose loss is not computed again, and backward.
        let flops = tokens * (6.0 * (all - head) as f64 + 4.0 * head as f64);
        let share = flops / m.seconds / (PRODUCT_FLOPS / ceiling.seconds);
        println!(
            "  {:.1} tokens/s, {:.2} GiB, frozen products at {:.0}% of the ceiling, here {:.1} GFLOP/s",
            tokens / m.seconds,
            m.peak / (1u64 << 30) as f64,
            share * 100.0,
            PRODUCT_FLOPS / ceiling.seconds / 1e9
        );
        self.figure("llama_1b_peak_bytes", m.peak);
        self.ratio("llama_1b_step_to_gemm_ceiling", Some(share));
        Ok(())
    }

    fn decode(&mut self) -> Result<()> {
        println!("\nGreedy decoding, shapes of Llama-3.2-1B, weights in bf16");
        let (shape, tokens) = (Shape::LLAMA_1B, 8);
        let cases = [
            Case::Bandwidth { bytes: 1 << 30 },
            Case::Decode { shape, adapter: Adapter::None, tokens },
            Case::Decode { shape, adapter: Adapter::Smore, tokens },
        ];
        let workers = cases.iter().map(Worker::ours).collect::<Result<Vec<_>>>()?;
        let all = by_turns(workers, self.rounds)?;
        let bandwidth = (1u64 << 30) as f64 / all[0].seconds;
        let bound = 2.0 * shape.linear_weights() as f64 / bandwidth;
        let each = |i: usize| all[i].seconds / tokens as f64;
        println!(
            "  {:.1} GB/s; bound {:.1} ms a token; base {:.1} ms, {:.0}% of the bound; S'MoRE \
             {:.1} ms, {:.2} x the base",
            bandwidth / 1e9,
            bound * 1e3,
            each(1) * 1e3,
            bound / each(1) * 100.0,
            each(2) * 1e3,
            each(2) / each(1)
        );
        self.ratio("decode_to_bandwidth_bound", Some(bound / each(1)));
        self.ratio("smore_decode_to_base", Some(each(2) / each(1)));
        Ok(())
    }
}
