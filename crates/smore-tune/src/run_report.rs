//! What a run's report shows.

use crate::report::{Report, Section, Series};
use crate::sft::{Metric, Outcome};

/// Loss curves of one or several runs.
pub fn curves(runs: &[(&str, &[Metric])]) -> Vec<Section> {
    let series = |name: String, point: fn(&Metric) -> Option<(f64, f64)>, metrics: &[Metric]| {
        Series { name, points: metrics.iter().filter_map(point).collect() }
    };
    let curve =
        |heading: &str, y: &str, point: fn(&Metric) -> Option<(f64, f64)>| Section::Curves {
            heading: heading.into(),
            note: String::new(),
            x_label: "step".into(),
            y_label: y.into(),
            log_y: true,
            series: runs
                .iter()
                .map(|(n, m)| series((*n).to_owned(), point, m))
                .filter(|s| !s.points.is_empty())
                .collect(),
        };
    let any = |test: fn(&Metric) -> bool| runs.iter().any(|(_, m)| m.iter().any(test));
    let mut sections = vec![curve("Training loss", "nats per answer token", |m| match m {
        Metric::Step(m) => Some((m.step as f64, m.loss)),
        _ => None,
    })];
    if any(|m| matches!(m, Metric::Eval(_))) {
        sections.push(curve("Held-out loss", "nats per answer token", |m| match m {
            Metric::Eval(m) => Some((m.step as f64, m.eval_loss)),
            _ => None,
        }));
    }
    if any(|m| matches!(m, Metric::Step(s) if s.balance_loss > 0.0)) {
        sections.push(curve("Balance loss of the routers", "sum over routers", |m| match m {
            Metric::Step(m) if m.balance_loss > 0.0 => Some((m.step as f64, m.balance_loss)),
            _ => None,
        }));
    }
    sections
}

/// The report of a single run.
pub fn report(outcome: &Outcome) -> Report {
    let loss = |x: Option<f64>| x.map_or_else(|| "\u{2013}".to_owned(), |x| format!("{x:.4}"));
    let mib = |bytes: u64| format!("{:.0}", bytes as f64 / f64::from(1 << 20));
    let memory = outcome.memory;
    let rows = vec![
        vec!["trained parameters".to_owned(), thousands(outcome.trainable_parameters)],
        vec!["held-out loss before".to_owned(), loss(outcome.eval_loss_before)],
        vec!["held-out loss after".to_owned(), loss(outcome.eval_loss_after)],
        vec!["steps".to_owned(), steps(outcome)],
        vec!["tokens".to_owned(), thousands(outcome.tokens)],
        vec!["seconds".to_owned(), format!("{:.1}", outcome.seconds)],
        vec!["peak memory, MiB".to_owned(), mib(outcome.peak_memory_bytes)],
        vec!["of which frozen weights".to_owned(), mib(memory.weights)],
        vec!["adapter and optimizer".to_owned(), mib(memory.adapter_and_optimizer)],
        vec!["activations".to_owned(), mib(memory.activations)],
        vec!["program and data".to_owned(), mib(memory.program_and_data)],
    ];
    let name = outcome.output_dir.file_name().unwrap_or_default().to_string_lossy();
    let mut sections = vec![Section::Table {
        heading: "Result".into(),
        note: String::new(),
        columns: vec![String::new(), String::new()],
        rows,
    }];
    sections.extend(marks(&outcome.metrics));
    sections.extend(curves(&[(name.as_ref(), &outcome.metrics)]));
    Report { title: format!("run {name}"), subtitle: String::new(), sections }
}

/// The steps that were out of the ordinary; nothing where there is none.
fn marks(metrics: &[Metric]) -> Option<Section> {
    let row = |metric: &Metric| match metric {
        Metric::Step(m) if !m.flags.is_empty() => {
            let flags: Vec<String> = m.flags.iter().map(ToString::to_string).collect();
            let (loss, norm) = (format!("{:.4}", m.loss), format!("{:.3}", m.grad_norm));
            Some(vec![m.step.to_string(), flags.join(", "), loss, norm])
        }
        _ => None,
    };
    let rows: Vec<_> = metrics.iter().filter_map(row).collect();
    (!rows.is_empty()).then(|| Section::Table {
        heading: "Out of the ordinary".into(),
        note: "Held against the 50 steps before each.".into(),
        columns: ["step", "mark", "loss", "gradient's norm"].map(str::to_owned).to_vec(),
        rows,
    })
}

/// How many, why no more, and which one's values were exported.
fn steps(outcome: &Outcome) -> String {
    let mut text = outcome.steps.to_string();
    if outcome.stopped_early {
        text.push_str(", stopped early");
    }
    if outcome.exported_step != outcome.steps {
        text = format!("{text}; exported: step {}, the best", outcome.exported_step);
    }
    text
}

/// 1234567 -> `1,234,567`
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sft::{Flag, StepMetric};

    #[test]
    fn marked_steps_are_listed() {
        let step = |step: usize, flags: Vec<Flag>| {
            Metric::Step(StepMetric {
                step,
                epoch: 0.5,
                loss: 2.0,
                balance_loss: 0.0,
                grad_norm: 1.0,
                learning_rate: 1e-3,
                trained_tokens: 3,
                tokens: 5,
                seconds: 0.1,
                flags,
            })
        };
        assert!(marks(&[step(1, vec![])]).is_none());
        let flags = vec![Flag::LossSpike, Flag::GradientExplosion];
        let Some(Section::Table { rows, .. }) = marks(&[step(1, vec![]), step(2, flags)]) else {
            panic!("a table");
        };
        assert_eq!(rows, [["2", "loss spike, gradient explosion", "2.0000", "1.000"]]);
    }
}
