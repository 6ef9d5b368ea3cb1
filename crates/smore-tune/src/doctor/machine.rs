//! Memory, disk and processor, against what a run takes.

use super::{Area, Examined, Subject};
use crate::batching::entries;
use crate::config::AdapterConfig;
use crate::memory;
use crate::model::training_device;
use crate::plan::Demand;
use smore_engine::Dtype;
use std::path::Path;

const MIB: f64 = (1 << 20) as f64;

pub(super) fn check(subject: &Subject, examined: &mut Examined) {
    processor(examined, subject.train.as_ref().is_some_and(|train| train.bf16));
    let (Some(train), Some(data)) = (&subject.train, &examined.data) else { return };
    let (Some(spec), Some(start)) = (&examined.spec, &examined.start) else { return };
    let full = matches!(subject.adapter, Some(AdapterConfig::Full(_)));
    let trained = if full { spec.parameters() } else { start.adapters.len() };
    let lengths: Vec<usize> = data.train.iter().map(crate::data::Sample::len).collect();
    let cutoff_len = subject.data.as_ref().map_or(usize::MAX, |d| d.cutoff_len);
    let capacity = cutoff_len.min(spec.max_positions);
    let entries = entries(train, &lengths, capacity);
    let batch = largest_batch(&entries, &lengths, train.per_device_train_batch_size);
    let tokens = lengths.iter().sum();
    let weights = examined.folder.as_ref().map_or(0, |folder| {
        let narrow = |t: &smore_engine::HostMatrix| t.rows * t.cols * 2;
        if full {
            0
        } else if train.bf16 {
            folder.tensors().map(narrow).sum()
        } else {
            folder.bytes()
        }
    });
    let demand = Demand {
        spec,
        adapters: &start.adapters,
        trained,
        weights,
        batch,
        tokens,
        mixed: train.bf16,
        gradient_checkpointing: train.gradient_checkpointing,
        keeps_best: train.load_best_model_at_end,
    };
    examined.planned = Some(demand.split());
    let (needed, steps) = (demand.peak(), crate::sft::total_steps(train, entries.len()));
    // The adapter, and beside it parameters, two moments and perhaps the best values.
    let checkpoint = trained as u64 * 4 * (4 + u64::from(train.load_best_model_at_end));
    let written = steps.checked_div(train.save_steps).unwrap_or(0);
    // A new one is written before the oldest goes; the trained adapter takes less than one.
    let kept = train.save_total_limit.map_or(written, |limit| written.min(limit + 1));
    let checkpoints = 1 + kept as u64;
    memory_fits(examined, needed, batch, memory::of_machine());
    if let Some(folder) = &subject.output_dir {
        disk_fits(examined, folder, checkpoint, checkpoints);
    }
}

fn processor(examined: &mut Examined, bf16: bool) {
    let threads = rayon::current_num_threads();
    let cores = std::thread::available_parallelism().map_or(threads, std::num::NonZero::get);
    if threads < cores {
        examined.warn(
            Area::Machine,
            format!("{threads} threads on {cores} cores"),
            "unset RAYON_NUM_THREADS, unless others use this machine",
        );
    }
    if large_pages() == Some(false) {
        examined.warn(
            Area::Machine,
            "the system gives no large pages (transparent huge pages are off)",
            "as root, write `madvise` to /sys/kernel/mm/transparent_hugepage/enabled; training takes about a \
             tenth longer without",
        );
    }
    match vector_unit() {
        Some(unit) => {
            let products = match training_device(bf16).factors() {
                Dtype::F32 => "",
                Dtype::Bf16 => ", products in bf16 with sums in f32",
                Dtype::F16 => ", products in f16 with sums of 64 in f16 and longer ones in f32",
            };
            examined.good(Area::Machine, format!("{threads} threads, {unit}{products}"));
        }
        None => examined.warn(
            Area::Machine,
            "no vector unit that is made use of (AVX-512, AVX2 with FMA, NEON)",
            "use a newer processor; training is several times slower here",
        ),
    }
}

/// Whether the system gives large pages to a program that asks, as `smore` does; none where it does not say.
fn large_pages() -> Option<bool> {
    let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(gives_large_pages(&modes))
}

/// Of the modes that Linux lists, the one in brackets holds.
fn gives_large_pages(modes: &str) -> bool {
    !modes.contains("[never]")
}

#[cfg(target_arch = "x86_64")]
fn vector_unit() -> Option<&'static str> {
    if smore_engine::cpu::matrix_unit() {
        Some("AVX-512 and AMX")
    } else if is_x86_feature_detected!("avx512f") {
        Some("AVX-512")
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        Some("AVX2")
    } else {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vector_unit() -> Option<&'static str> {
    cfg!(target_arch = "aarch64").then_some("NEON")
}

/// Tokens of the largest forward pass that can come up.
fn largest_batch(entries: &[Vec<usize>], lengths: &[usize], size: usize) -> usize {
    let mut tokens: Vec<usize> =
        entries.iter().map(|entry| entry.iter().map(|&i| lengths[i]).sum()).collect();
    tokens.sort_unstable_by(|a, b| b.cmp(a));
    tokens.iter().take(size).sum()
}

/// `machine` is what is free and what there is.
fn memory_fits(examined: &mut Examined, needed: u64, batch: usize, machine: Option<(u64, u64)>) {
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / MIB);
    let about = format!("a step of {batch} tokens takes about {}", mib(needed));
    let Some((available, total)) = machine else {
        return examined.good(Area::Machine, format!("{about}; what there is is not known"));
    };
    let message = format!("{about} of memory; {} are free of {}", mib(available), mib(total));
    if needed <= available {
        return examined.good(Area::Machine, message);
    }
    let remedy = "set train.gradient_checkpointing, or lower train.per_device_train_batch_size or \
                  data.cutoff_len; train.bf16 halves weights stored as f32";
    if needed > total {
        let error = crate::error::Error::Config {
            file: "the run does not fit into this machine".into(),
            message: format!("{message}; {remedy}"),
        };
        return examined.fail(Area::Machine, error);
    }
    examined.warn(Area::Machine, message, remedy);
}

fn disk_fits(examined: &mut Examined, folder: &Path, checkpoint: u64, checkpoints: u64) {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / MIB);
    let Some(free) = free_bytes(folder) else { return };
    let all = checkpoint * checkpoints;
    let message = format!(
        "checkpoints take {checkpoints} x {}; {} are free where {} will be",
        mib(checkpoint),
        mib(free),
        folder.display()
    );
    if all <= free {
        examined.good(Area::Machine, message);
    } else {
        let remedy = "free some space, raise train.save_steps, set train.save_total_limit, or choose another output_dir";
        examined.warn(Area::Machine, message, remedy);
    }
}

/// Bytes that a user may still write to the file system of the nearest folder that exists.
#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let absolute = std::path::absolute(folder).ok()?;
    let exists = absolute.ancestors().find(|folder| folder.exists())?;
    let stat = rustix::fs::statvfs(exists).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn memory_is_held_against_what_is_free_and_what_there_is() {
        let cases = [(5, Severity::Good), (15, Severity::Warning), (25, Severity::Error)];
        for (needed, severity) in cases {
            let mut examined = Examined::default();
            memory_fits(&mut examined, needed << 30, 64, Some((10 << 30, 20 << 30)));
            let [finding] = &examined.findings[..] else { panic!("{:?}", examined.findings) };
            assert_eq!(finding.severity, severity);
            let free = "a step of 64 tokens takes about";
            assert!(finding.message.contains(free) && finding.message.contains("10240 MiB"));
            assert_eq!(examined.accept().is_err(), severity == Severity::Error);
        }
    }

    #[test]
    fn large_pages_are_told_from_modes() {
        assert!(gives_large_pages("always [madvise] never\n"));
        assert!(gives_large_pages("[always] madvise never\n"));
        assert!(!gives_large_pages("always madvise [never]\n"));
    }

    #[test]
    fn the_disk_must_hold_all_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let Some(free) = free_bytes(&dir.path().join("not/yet/there")) else { return };
        for (each, severity) in [(1, Severity::Good), (free, Severity::Warning)] {
            let mut examined = Examined::default();
            disk_fits(&mut examined, dir.path(), each, 3);
            assert_eq!(examined.findings[0].severity, severity, "{:?}", examined.findings);
        }
    }

    #[test]
    fn the_largest_batch_is_of_the_longest_entries() {
        let lengths = [3, 9, 4, 8];
        let entries = [vec![0, 2], vec![1], vec![3]];
        assert_eq!(largest_batch(&entries, &lengths, 2), 17);
        assert_eq!(largest_batch(&entries, &lengths, 9), 24);
    }
}
