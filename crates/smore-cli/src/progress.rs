//! Progress of a run on the terminal.

use crate::interrupt::Interrupt;
use crate::table::bytes;
use indicatif::{ProgressBar, ProgressStyle};
use smore_tune::memory;
use smore_tune::sft::{Metric, Observer, StepMetric};
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

/// Losses in the curve beside the bar.
const CURVE: usize = 24;
/// Without a terminal, steps are told of no more often than this.
const LINES_APART: Duration = Duration::from_secs(30);

/// Draws a bar with time left and under it the curve of the loss, learning rate, gradient, speed
/// and memory; without a terminal, prints a line for every evaluation and now and then for a step.
pub(crate) struct Progress {
    bar: ProgressBar,
    interactive: bool,
    quiet: bool,
    losses: VecDeque<f64>,
    last_line: Instant,
    /// Seconds and tokens of the run when this program began to watch it.
    before: Option<(f64, usize)>,
    interrupt: Option<Interrupt>,
    /// Of the routers over the last window.
    evenness: Option<f64>,
}

impl Progress {
    /// `label` names the run, of so many steps with the first done; `quiet` shows nothing.
    pub(crate) fn new(label: &str, (done, steps): (usize, usize), quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(steps as u64) };
        let style = ProgressStyle::with_template(
            "{prefix:.bold} {bar:28.cyan/dim} {pos}/{len}  {eta} left\n{msg}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_prefix(label.to_owned());
        bar.set_position(done as u64);
        bar.reset_eta();
        let interactive = !bar.is_hidden();
        Self {
            bar,
            interactive,
            quiet,
            losses: VecDeque::new(),
            last_line: Instant::now(),
            before: None,
            interrupt: None,
            evenness: None,
        }
    }

    /// Passes an interrupt on to the run.
    pub(crate) fn stopped_by(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = Some(interrupt);
        self
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

    fn step(&mut self, m: &StepMetric, total_steps: usize, tokens: usize) {
        self.losses.push_back(m.loss);
        if self.losses.len() > CURVE {
            self.losses.pop_front();
        }
        let (seconds, read) = *self.before.get_or_insert((m.seconds, tokens));
        let speed = (tokens - read) as f64 / (m.seconds - seconds).max(1e-9);
        let speed = if tokens == read { "-".into() } else { format!("{speed:.0}") };
        let memory = bytes(memory::resident());
        self.bar.set_position(m.step as u64);
        let routers = self.evenness.map_or_else(String::new, |e| format!("  routers {e:.2} even"));
        self.bar.set_message(format!(
            "{}  loss {:.4}  lr {:.2e}  gradient {:.3}{routers}  {speed} tokens/s  {memory}",
            curve(&self.losses),
            m.loss,
            m.learning_rate,
            m.grad_norm,
        ));
        for flag in &m.flags {
            self.line(&format!(
                "step {}/{total_steps}: {flag}: loss {:.4}, gradient {:.3}",
                m.step, m.loss, m.grad_norm
            ));
        }
        if !self.interactive && self.last_line.elapsed() > LINES_APART {
            self.last_line = Instant::now();
            let (step, loss) = (m.step, m.loss);
            self.line(&format!("step {step}/{total_steps}: loss {loss:.4}, {speed} tokens/s"));
        }
    }
}

impl Observer for Progress {
    fn metric(&mut self, metric: &Metric, total_steps: usize, tokens: usize) {
        match metric {
            Metric::Step(m) => self.step(m, total_steps, tokens),
            Metric::Eval(m) => {
                let loss = m.eval_loss;
                self.line(&format!("step {}/{total_steps}: held-out loss {loss:.4}", m.step));
            }
            Metric::Routers(m) => self.evenness = Some(m.evenness),
            Metric::Alarm(alarm) => {
                let (step, remedy) = (alarm.step, alarm.remedy());
                let line = if alarm.over {
                    format!("step {step}/{total_steps}: {alarm}")
                } else {
                    format!("step {step}/{total_steps}: alarm: {alarm}; {remedy}")
                };
                self.line(&line);
            }
        }
    }

    fn saved(&mut self, path: &Path) {
        self.line(&format!("wrote {}", path.display()));
    }

    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn interrupted(&mut self) -> bool {
        self.interrupt.as_ref().is_some_and(Interrupt::asked)
    }
}

/// A bar for `len` pieces of work that are alike, with the time left.
pub(crate) fn bar(label: &str, len: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {pos} of {len} {wide_bar} {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len as u64).with_style(style).with_prefix(label.to_owned())
}

/// Losses as a line of blocks, the highest the tallest.
fn curve(losses: &VecDeque<f64>) -> String {
    const BLOCKS: [char; 8] = [
        '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}',
        '\u{2588}',
    ];
    let low = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let high = losses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let height = |x: &f64| (x - low) / (high - low).max(1e-12) * 7.0;
    losses.iter().map(|x| BLOCKS[(height(x).round() as usize).min(7)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_span_from_the_lowest_to_the_highest() {
        let drawn = curve(&[3.0, 2.0, 1.0].into());
        assert_eq!(drawn, "\u{2588}\u{2585}\u{2581}");
        assert_eq!(curve(&[1.0, 1.0].into()), "\u{2581}\u{2581}");
    }
}
