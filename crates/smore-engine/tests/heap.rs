//! What is freed stays, on large pages where the system has them. Without the test harness, since a program prepares
//! its heap before it starts a thread.

use std::fs::{File, read_to_string};
use std::io::Read;

const SIZE: usize = 100 << 20;

/// A buffer whose pages were all written, and the faults that this took.
fn written() -> (Vec<u8>, u64) {
    let before = faults();
    (vec![1; SIZE], faults() - before)
}

/// Pages that this process has asked the system for. Nothing is allocated for it: a few bytes out of the room that
/// a buffer has left, and the next one of its size no longer fits.
fn faults() -> u64 {
    let mut stat = [0; 1024];
    let read =
        File::open("/proc/self/stat").and_then(|mut file| file.read(&mut stat)).expect("Linux");
    let stat = str::from_utf8(&stat[..read]).expect("text");
    // Behind the name, which may hold spaces, the eighth field.
    let fields = stat.rsplit_once(')').expect("a name").1;
    fields.split_whitespace().nth(7).and_then(|n| n.parse().ok()).expect("a number")
}

/// Whether the system was asked for large pages at an address, as the mapping's flags have it.
fn on_large_pages(address: usize) -> bool {
    let maps = read_to_string("/proc/self/smaps").expect("Linux");
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some([start, end]) =
            range.map(|(start, end)| [start, end].map(|at| usize::from_str_radix(at, 16)))
            && let (Ok(start), Ok(end)) = (start, end)
        {
            inside = (start..end).contains(&address);
        } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().any(|flag| flag == "hg");
        }
    }
    panic!("{address:x} is in no mapping");
}

fn main() {
    if cfg!(not(all(target_os = "linux", target_env = "gnu"))) {
        return;
    }
    smore_engine::heap::prepare();
    let (buffer, first) = written();
    drop(buffer);
    let (buffer, second) = written();
    assert!(first >= SIZE as u64 >> 21 && second < first / 4, "{second} faults, {first} at first");
    let large = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
    assert_eq!(on_large_pages(buffer.as_ptr().addr() + SIZE / 2), large, "large pages");
}
