//! This process's memory, as the system counts it.

use serde::Serialize;

/// Bytes resident now; 0 where the system does not say.
pub fn resident() -> u64 {
    status("VmRSS:")
}

/// Most bytes ever resident since the start or the last [`reset_peak`]; 0 where the system does
/// not say.
pub fn peak() -> u64 {
    status("VmHWM:")
}

/// Starts the peak anew from what is resident now, where the system can (Linux). Elsewhere the
/// peak stays that of the whole process.
pub fn reset_peak() {
    // Failing only leaves the peak as it was.
    drop(std::fs::write("/proc/self/clear_refs", "5"));
}

/// Bytes of memory that are free for use, and that there are; none where the system does not say.
pub fn of_machine() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some((field("MemAvailable:")?, field("MemTotal:")?))
}

/// What the peak of a run is made of, in bytes; the parts add up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// The program, its data and what else was resident before the model.
    pub program_and_data: u64,
    /// Frozen weights, as they are stored.
    pub weights: u64,
    /// Trained parameters, their gradients and moments, and the best values kept.
    pub adapter_and_optimizer: u64,
    /// The rest of the peak: activations, their slopes and scratch. Training has no caches.
    pub activations: u64,
}

impl Split {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.program_and_data + self.weights + self.adapter_and_optimizer + self.activations
    }

    /// Divides `peak`. Weights that were never read from their file are not resident: what is known
    /// is cut to what was measured.
    pub fn of(peak: u64, before: u64, weights: u64, trained: u64) -> Self {
        let mut left = peak;
        let mut take = |part: u64| {
            let part = part.min(left);
            left -= part;
            part
        };
        let (program_and_data, adapter_and_optimizer) = (take(before), take(trained));
        let weights = take(weights);
        Self { program_and_data, weights, adapter_and_optimizer, activations: left }
    }
}

fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_shows_in_the_peak() {
        let before = peak();
        let buffer = vec![1u8; 300 << 20];
        assert!(buffer.iter().map(|&b| u64::from(b)).sum::<u64>() == 300 << 20);
        assert!(peak() >= before.max(300 << 20) && resident() > 0);
    }
}
