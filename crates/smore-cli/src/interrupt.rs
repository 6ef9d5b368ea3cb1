//! Ctrl-C: the first asks the run to end with a checkpoint, the second ends the program at once.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of an interrupted program, as shells have it: 128 and the number of SIGINT.
const EXIT_CODE: i32 = 130;

/// Whether the user, or the system by SIGTERM, asked to stop.
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes signals from here on.
    pub(crate) fn listen() -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: a signal ends the program where an earlier one has set the flag.
            flag::register_conditional_shutdown(signal, EXIT_CODE, asked.clone())
                .and_then(|_| flag::register(signal, asked.clone()))
                .context("signals cannot be listened to")?;
        }
        Ok(Self(asked))
    }

    pub(crate) fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
