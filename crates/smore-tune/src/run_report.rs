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
        Metric::Eval(_) => None,
    })];
    if any(|m| matches!(m, Metric::Eval(_))) {
        sections.push(curve("Held-out loss", "nats per answer token", |m| match m {
            Metric::Eval(m) => Some((m.step as f64, m.eval_loss)),
            Metric::Step(_) => None,
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
    let rows = vec![
        vec!["trained parameters".to_owned(), thousands(outcome.trainable_parameters)],
        vec!["held-out loss before".to_owned(), loss(outcome.eval_loss_before)],
        vec!["held-out loss after".to_owned(), loss(outcome.eval_loss_after)],
        vec!["steps".to_owned(), steps(outcome)],
        vec!["tokens".to_owned(), thousands(outcome.tokens)],
        vec!["seconds".to_owned(), format!("{:.1}", outcome.seconds)],
        vec![
            "peak memory, MiB".to_owned(),
            format!("{:.0}", outcome.peak_memory_bytes as f64 / f64::from(1 << 20)),
        ],
    ];
    let name = outcome.output_dir.file_name().unwrap_or_default().to_string_lossy();
    let mut sections = vec![Section::Table {
        heading: "Result".into(),
        note: String::new(),
        columns: vec![String::new(), String::new()],
        rows,
    }];
    sections.extend(curves(&[(name.as_ref(), &outcome.metrics)]));
    Report { title: format!("run {name}"), subtitle: String::new(), sections }
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
