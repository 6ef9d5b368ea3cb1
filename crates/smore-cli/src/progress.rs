//! Progress of a run on the terminal.

use crate::table::bytes;
use indicatif::{ProgressBar, ProgressStyle};
use smore_tune::memory;
use smore_tune::sft::{Metric, Observer};
use std::path::Path;

/// Draws a bar with loss, speed, memory and time left; without a terminal, prints a line for every
/// evaluation instead.
pub(crate) struct Progress {
    bar: ProgressBar,
    interactive: bool,
    quiet: bool,
}

impl Progress {
    /// `label` names the run; `quiet` shows nothing.
    pub(crate) fn new(label: &str, steps: usize, quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(steps as u64) };
        let style = ProgressStyle::with_template(
            "{prefix:.bold} {bar:28.cyan/dim} {pos}/{len}  {msg}  {eta} left",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_prefix(label.to_owned());
        let interactive = !bar.is_hidden();
        Self { bar, interactive, quiet }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, text: &str) {
        if self.interactive {
            self.bar.println(text);
        } else if !self.quiet {
            eprintln!("{text}");
        }
    }
}

impl Observer for Progress {
    fn metric(&mut self, metric: &Metric, total_steps: usize, tokens: usize) {
        match metric {
            Metric::Step(m) => {
                self.bar.set_position(m.step as u64);
                let speed = tokens as f64 / m.seconds.max(1e-9);
                self.bar.set_message(format!(
                    "loss {:.4}  {speed:.0} tokens/s  {}",
                    m.loss,
                    bytes(memory::resident())
                ));
            }
            Metric::Eval(m) => {
                let loss = m.eval_loss;
                self.line(&format!("step {}/{total_steps}: held-out loss {loss:.4}", m.step));
            }
        }
    }

    fn saved(&mut self, path: &Path) {
        self.line(&format!("wrote {}", path.display()));
    }
}
