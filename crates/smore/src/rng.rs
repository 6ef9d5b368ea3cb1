//! Random numbers that depend on what they are for and on nothing else.
//!
//! Every stream is keyed by (seed, purpose, step, block), so that a run gives the same bits
//! whatever else drew numbers before, on any number of threads, and after a resume.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// What a stream of random numbers is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Starting values of adapter parameters.
    AdapterInit = 1,
    /// Starting values of a base model trained from scratch.
    BaseInit = 2,
    /// Which samples are held out.
    Split = 3,
    /// Order of the samples in an epoch.
    Order = 4,
    /// Noise of the noisy top-k gate.
    GateNoise = 5,
    /// Sampling of generated tokens.
    Sampling = 6,
    /// What growth of an adapter draws.
    Growth = 7,
    /// What dropout leaves out of an adapter's input.
    Dropout = 8,
    /// Samples drawn again for a bootstrap interval.
    Bootstrap = 12,
    /// Values that a sweep tries.
    Sweep = 14,
    /// Which samples stand for new ones in a permutation test.
    Permutation = 13,
    /// Which parts a composed task is put together from.
    Tasks = 9,
}

/// The generator for one purpose at one step in one block (or any other place numbered by the
/// caller).
pub fn stream(seed: u64, purpose: Purpose, step: u64, block: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (bytes, value) in key.chunks_exact_mut(8).zip([seed, purpose as u64, step, block]) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}
