//! This process's memory, as the system counts it.

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
