//! The worker's side: builds a case, does it as often as asked.

use crate::case::{Adapter, Case, Precision, Shape, Step};
use crate::random::{drawn, floats, write_model};
use crate::worker::Worker;
use anyhow::{Context, Result};
use half::bf16;
use rayon::prelude::*;
use serde_json::{Value, json};
use smore::adapter::{AnyAdapter, AnySaved, Lora, Map, MapAdapter, Mode, Smore};
use smore::spec::{LoraSpec, SmoreSpec};
use smore_engine::{Cpu, Device, Dtype, HostMatrix, MatrixRef, View, ViewMut};
use smore_tune::config::{AdapterConfig, TrainConfig};
use smore_tune::inject::{Adapters, Slot};
use smore_tune::memory;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model, Scales, training_device};
use smore_tune::optimizer::Optimizer;
use smore_tune::routing::{Counts, trace_lines};
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

/// The work of a prepared case, to be done once per call.
type Work = Box<dyn FnMut() -> Result<()>>;

/// Answers requests until the input ends.
pub(crate) fn serve() -> Result<()> {
    let mut work: Option<Work> = None;
    let mut prepared = 0;
    let mut out = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = if let Some(case) = request.get("prepare") {
            work = Some(prepare(&serde_json::from_value(case.clone())?)?);
            prepared = memory::resident();
            memory::reset_peak();
            json!({ "ready": true })
        } else {
            let start = Instant::now();
            work.as_mut().context("nothing prepared")?()?;
            json!({ "seconds": start.elapsed().as_secs_f64() })
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    let peak = memory::peak();
    writeln!(out, "{}", json!({ "peak_memory_bytes": peak, "prepared_memory_bytes": prepared }))?;
    Ok(())
}

fn prepare(case: &Case) -> Result<Work> {
    match case {
        Case::Gemm { dtype, m, n, k, .. } => Ok(gemm(*dtype, *m, *n, *k)),
        Case::Layer { adapter, dtype, tokens, d_in, d_out, small_pages } => {
            #[cfg(target_os = "linux")]
            rustix::thread::disable_transparent_huge_pages(*small_pages)?;
            #[cfg(not(target_os = "linux"))]
            anyhow::ensure!(!small_pages, "pages are those of the system here");
            layer(*adapter, *dtype, *tokens, *d_in, *d_out)
        }
        Case::Step(step) => training_step(step),
        Case::Watch { step, trace_tokens } => watch(step, *trace_tokens),
        Case::Decode { shape, adapter, tokens } => decode(shape, *adapter, *tokens),
        Case::Bandwidth { bytes } => Ok(bandwidth(*bytes)),
        Case::Model { shape, dtype, folder } => {
            write_model(folder, shape, *dtype)?;
            Ok(Box::new(|| Ok(())))
        }
    }
}

/// Numbers as bytes.
struct Bytes<T>(Vec<T>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Bytes<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Drawn where it stays: room that is freed would be used by what runs and hide its memory.
fn weight(dtype: Precision, rows: usize, cols: usize) -> HostMatrix {
    let values = drawn(1).take(rows * cols);
    let (dtype, owner): (_, Arc<dyn AsRef<[u8]> + Send + Sync>) = match dtype {
        Precision::Float32 => (Dtype::F32, Arc::new(Bytes(values.collect::<Vec<_>>()))),
        Precision::Bfloat16 => (
            Dtype::Bf16,
            Arc::new(Bytes(values.map(|x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>())),
        ),
    };
    HostMatrix::new(rows, cols, dtype, owner, 0)
}

fn device(dtype: Precision) -> Cpu<f32> {
    training_device(dtype == Precision::Bfloat16)
}

fn gemm(dtype: Precision, m: usize, n: usize, k: usize) -> Work {
    let device = device(dtype);
    let (w, x) = (device.weight(weight(dtype, n, k)), floats(2, m * k));
    let mut y = vec![0.0; m * n];
    Box::new(move || {
        let w = MatrixRef::Frozen(&w);
        device.linear(View::new(&x, m * k), w, None, ViewMut::new(&mut y, m * n), m, false);
        Ok(())
    })
}

fn layer(adapter: Adapter, dtype: Precision, n: usize, d_in: usize, d_out: usize) -> Result<Work> {
    let device = device(dtype);
    let adapter: Option<AnyAdapter> = match adapter {
        Adapter::None => None,
        _ => match serde_json::from_value(adapter.config(&crate::case::ffn())?)? {
            AdapterConfig::Smore(c) => {
                Some(AnyAdapter::Smore(Smore::new(SmoreSpec::new(&c, d_in, d_out)?)))
            }
            AdapterConfig::Lora(c) => {
                Some(AnyAdapter::Lora(Lora::new(LoraSpec::new(&c, d_in, d_out)?)))
            }
            other => anyhow::bail!("no layer for {}", other.kind()),
        },
    };
    let w = device.weight(weight(dtype, d_out, d_in));
    let len = adapter.as_ref().map_or(0, smore::adapter::Adapter::len);
    let params: Vec<f32> = drawn(3).take(len).map(|v| v * 0.05).collect();
    let (x, dy) = (floats(4, n * d_in), floats(5, n * d_out));
    let (mut y, mut dx, mut grads) = (vec![1.0; n * d_out], vec![1.0; n * d_in], vec![1.0; len]);
    Ok(Box::new(move || {
        let frozen = MatrixRef::Frozen(&w);
        let (x, dy) = (View::new(&x, n * d_in), View::new(&dy, n * d_out));
        let params = View::new(&params, len);
        let (y, dx) = (ViewMut::new(&mut y, n * d_out), ViewMut::new(&mut dx, n * d_in));
        let Some(a) = &adapter else {
            device.linear(x, frozen, None, y, n, false);
            device.linear_backward(dy, frozen, dx, n, false);
            return Ok(());
        };
        let map = || Some(Map { w: frozen, bias: None, accumulate: false });
        let (mode, mut grads) = (Mode::plain(), ViewMut::new(&mut grads, len));
        device.clear(grads.rb());
        let mut saved: AnySaved<Cpu<f32>> = a.forward_on(&device, mode, params, map(), x, y);
        a.backward_on(&device, mode, 1.0, params, map(), &mut saved, x, dy, grads, Some(dx));
        Ok(())
    }))
}

/// A model of random weights in bf16 or f32, mapped from a folder that is removed at once.
fn model(
    shape: &Shape,
    adapter: Adapter,
    dtype: Precision,
    context: usize,
) -> Result<Model<Cpu<f32>>> {
    let folder = tempfile::tempdir()?;
    // By another process, for the same reason as in `weight`.
    let (shape, path) = (*shape, folder.path().to_owned());
    Worker::ours(&Case::Model { shape, dtype, folder: path })?.end()?;
    let opened = ModelFolder::open(folder.path())?;
    let adapters = if adapter == Adapter::None {
        Adapters::none(&opened.spec)
    } else {
        let config = serde_json::from_value(adapter.config(&crate::case::ffn())?)?;
        Adapters::new(&config, &opened.spec).map_err(anyhow::Error::msg)?
    };
    let values: Vec<f32> = drawn(6).take(adapters.init(1).len()).map(|v| v * 0.02).collect();
    Ok(Model::new(device(dtype), &opened, adapters, &values, context))
}

fn training_step(step: &Step) -> Result<Work> {
    let mut model = model(&step.shape, step.adapter, step.dtype, step.length)?;
    model.gradient_checkpointing = step.gradient_checkpointing;
    let train = TrainConfig::default();
    let mut optimizer = Optimizer::new(&model);
    let mut batch = Batch::default();
    for i in 0..step.batch {
        let ids = tokens(step.length, i, step.shape.vocabulary);
        batch.push(&ids, &vec![true; step.length]);
    }
    let scales = Scales { loss: 1.0 / batch.targets.len() as f64, balance: 1.0 };
    let mut done = 0;
    Ok(Box::new(move || {
        done += 1;
        model.step(&batch, scales, None, &mut optimizer.grads);
        optimizer.step(&mut model, &train, 1e-4, done)?;
        Ok(())
    }))
}

/// Counts the routing of a step, or writes the trees of some of its tokens as lines.
fn watch(step: &Step, trace_tokens: usize) -> Result<Work> {
    let model = model(&step.shape, step.adapter, step.dtype, step.length)?;
    let mut batch = Batch::default();
    for i in 0..step.batch {
        let ids = tokens(step.length, i, step.shape.vocabulary);
        batch.push(&ids, &vec![true; step.length]);
    }
    let routing = model.routing(&batch);
    let places: Vec<String> = model.adapters.slots.iter().map(Slot::path).collect();
    let mut counts = Counts::new(&model.adapters);
    Ok(Box::new(move || {
        if trace_tokens == 0 {
            counts.see(&routing);
        } else {
            std::hint::black_box(trace_lines(&places, 1, &batch.ids[..trace_tokens], &routing));
        }
        Ok(())
    }))
}

fn tokens(n: usize, seed: usize, vocabulary: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % vocabulary) as u32).collect()
}

fn decode(shape: &Shape, adapter: Adapter, n: usize) -> Result<Work> {
    let prompt = tokens(16, 3, shape.vocabulary);
    let model = model(shape, adapter, Precision::Bfloat16, 4096)?;
    let mut cache = model.cache();
    let mut logits = model.extend(&prompt, &mut cache);
    Ok(Box::new(move || {
        for _ in 0..n {
            let next = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            logits = model.extend(&[next.unwrap_or(0) as u32], &mut cache);
        }
        Ok(())
    }))
}

/// Reads `bytes` once, each thread its part in four streams at a time, which is faster than one.
fn bandwidth(bytes: usize) -> Work {
    let data: Vec<u64> = (0..bytes as u64 / 8).into_par_iter().collect();
    Box::new(move || {
        let chunk = data.len().div_ceil(4 * rayon::current_num_threads());
        let streams: Vec<&[u64]> = data.chunks(chunk).collect();
        let sum: u64 = streams
            .par_chunks(4)
            .map(|streams| {
                let lines = |s: usize| streams.get(s).unwrap_or(&&[][..]).as_chunks::<8>().0;
                let mut sums = [0u64; 8];
                for (((a, b), c), d) in lines(0).iter().zip(lines(1)).zip(lines(2)).zip(lines(3)) {
                    for i in 0..8 {
                        sums[i] = sums[i].wrapping_add(a[i] ^ b[i] ^ c[i] ^ d[i]);
                    }
                }
                sums.into_iter().fold(0, u64::wrapping_add)
            })
            .reduce(|| 0, u64::wrapping_add);
        std::hint::black_box(sum);
        Ok(())
    })
}
