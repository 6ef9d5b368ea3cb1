//! What a run's report shows.

use crate::report::{Card, Report, Section, Series, Tone};
use crate::routing::LayerUsage;
use crate::routing::health::Alarm;
use crate::sft::{Exchange, Metric, ModuleParameters, Outcome, RoutersMetric, StepMetric};

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

/// The report of a single run: on the first screen what a manager asks, below what an engineer does.
pub fn report(outcome: &Outcome) -> Report {
    let name = outcome.output_dir.file_name().unwrap_or_default().to_string_lossy();
    let runs = [(name.as_ref(), &outcome.metrics[..])];
    let mut sections = vec![Section::Cards { cards: cards(outcome) }];
    sections.extend(flagged(outcome));
    sections.extend(marks(&outcome.metrics));
    sections.extend(exchanges(outcome));
    sections.extend(curves(&runs));
    sections.extend(health(outcome));
    sections.extend(pace(&runs));
    sections.push(plan(outcome));
    sections.push(result(outcome));
    Report { title: format!("Run {name}"), subtitle: verdict(outcome), sections }
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What came of it, in a sentence.
fn verdict(outcome: &Outcome) -> String {
    let steps = outcome.exported_step;
    let loss = match (outcome.eval_loss_before, outcome.eval_loss_after) {
        (Some(before), Some(after)) if after < before => {
            format!("The held-out loss fell from {before:.3} to {after:.3} in {steps} steps")
        }
        (Some(before), Some(after)) => format!(
            "The held-out loss did not fall: {before:.3} before, {after:.3} after {steps} steps"
        ),
        _ => format!("Trained for {steps} steps; nothing was held out to judge it by"),
    };
    let routers = match (outcome.routing.is_empty(), outcome.standing_alarms().len()) {
        (true, _) => String::new(),
        (false, 0) => "; the routers are healthy".into(),
        (false, 1) => "; one router alarm stands".into(),
        (false, n) => format!("; {n} router alarms stand"),
    };
    let stopped = if outcome.stopped_early { "; stopped early" } else { "" };
    format!("{loss}{routers}{stopped}.")
}

fn cards(outcome: &Outcome) -> Vec<Card> {
    let card = |label: &str, value: String, note: String, tone| Card {
        label: label.into(),
        value,
        note,
        tone,
    };
    let mut cards = Vec::new();
    if let (Some(before), Some(after)) = (outcome.eval_loss_before, outcome.eval_loss_after) {
        let tone = if after < before { Tone::Good } else { Tone::Bad };
        let change = 100.0 * (after / before - 1.0);
        let note = format!("{change:+.0}% from {before:.3}");
        cards.push(card("Held-out loss", format!("{after:.3}"), note, tone));
    }
    if !outcome.routing.is_empty() {
        let (standing, all) = (outcome.standing_alarms().len(), outcome.alarms.len());
        let worst = outcome.routing.iter().map(LayerUsage::evenness).fold(1.0, f64::min);
        let note = match (standing, all) {
            (0, 0) => format!("least evenness {worst:.2}"),
            (0, _) => "alarms during the run are over".into(),
            _ => "see below".into(),
        };
        let (value, tone) = match standing {
            0 => ("healthy".into(), Tone::Good),
            1 => ("1 alarm".into(), Tone::Bad),
            n => (format!("{n} alarms"), Tone::Bad),
        };
        cards.push(card("Routers", value, note, tone));
    }
    let share = 100.0 * outcome.trainable_parameters as f64 / outcome.base_parameters.max(1) as f64;
    cards.push(card(
        "Trained parameters",
        thousands(outcome.trainable_parameters),
        format!("{share:.2}% of the base's"),
        Tone::Plain,
    ));
    let planned = outcome.planned_memory.total();
    let note = format!("planned {}", mib(planned));
    cards.push(card("Peak memory", mib(outcome.peak_memory_bytes), note, Tone::Plain));
    let speed = outcome.tokens as f64 / outcome.seconds.max(1e-9);
    let note = format!("{} tokens in {}", thousands(outcome.tokens), duration(outcome.seconds));
    cards.push(card("Tokens per second", thousands(speed as usize), note, Tone::Plain));
    cards
}

/// 3661 -> `1 h 1 min`
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// Alarms and warnings.
fn flagged(outcome: &Outcome) -> Vec<Section> {
    let mut sections = Vec::new();
    if !outcome.alarms.is_empty() {
        let standing = outcome.standing_alarms();
        let row = |alarm: &Alarm| {
            let state = match (alarm.over, standing.contains(&alarm)) {
                (true, _) => "over",
                (false, true) => "stands",
                (false, false) => "raised",
            };
            let weight = alarm.balance_weight.map_or(String::new(), |(a, b)| format!("{a} to {b}"));
            let experts: Vec<String> = alarm.experts.iter().map(usize::to_string).collect();
            vec![
                format!("{} in layer {} of {}", alarm.alarm, alarm.layer, alarm.place),
                alarm.step.to_string(),
                state.to_owned(),
                format!("{:.3}", alarm.value),
                experts.join(", "),
                weight,
            ]
        };
        let columns = ["", "step", "", "value", "experts", "balance weight"];
        let remedy = standing.first().map_or("All of them are over.".into(), |alarm| {
            format!("What helps: {}.", alarm.remedy())
        });
        sections.push(Section::Table {
            heading: "Alarms about routers".into(),
            note: remedy,
            columns: columns.map(str::to_owned).to_vec(),
            rows: outcome.alarms.iter().map(row).collect(),
        });
    }
    if !outcome.warnings.is_empty() {
        let paragraphs = outcome.warnings.clone();
        sections.push(Section::Text { heading: "Warnings before the run".into(), paragraphs });
    }
    let marked = |m: &Metric| matches!(m, Metric::Step(s) if !s.flags.is_empty());
    if sections.is_empty() && !outcome.metrics.iter().any(marked) {
        let paragraphs = vec!["Nothing: no alarm, no loss spike, no gradient explosion.".into()];
        sections.push(Section::Text { heading: "What was flagged".into(), paragraphs });
    }
    sections
}

fn exchanges(outcome: &Outcome) -> Option<Section> {
    let row = |e: &Exchange| {
        let texts = [
            ("question", &e.prompt),
            ("expected", &e.expected),
            ("before", &e.before),
            ("after", &e.after),
        ];
        texts.map(|(name, text)| (name.to_owned(), text.trim().to_owned())).to_vec()
    };
    (!outcome.exchanges.is_empty()).then(|| Section::Exchanges {
        heading: "Answers before and after".into(),
        note: "Held-out samples, where there are some, answered by the likeliest token each time; \
               long answers are cut."
            .into(),
        rows: outcome.exchanges.iter().map(row).collect(),
    })
}

/// Heading of the map.
pub const EVENNESS: &str = "How evenly the routers use their experts";

/// How the routers went.
fn health(outcome: &Outcome) -> Vec<Section> {
    if outcome.routing.is_empty() {
        return Vec::new();
    }
    let points = |value: fn(&RoutersMetric) -> f64| {
        let point = |m: &Metric| match m {
            Metric::Routers(m) => Some((m.step as f64, value(m))),
            _ => None,
        };
        outcome.metrics.iter().filter_map(point).collect::<Vec<_>>()
    };
    let series = [
        Series { name: "mean evenness".into(), points: points(|m| m.evenness) },
        Series { name: "largest imbalance".into(), points: points(|m| m.imbalance) },
    ];
    let mut sections = Vec::new();
    if series.iter().any(|s| !s.points.is_empty()) {
        sections.push(Section::Curves {
            heading: "Health of the routers".into(),
            note: "Evenness: 1 is even use, 0 a single expert. Imbalance: 0 is even use, 1 always \
                   the same experts; of the worst layer."
                .into(),
            x_label: "step".into(),
            y_label: "of 1".into(),
            log_y: false,
            series: series.to_vec(),
        });
    }
    sections.push(evenness_map(EVENNESS, &outcome.routing));
    sections
}

/// Evenness of every router: a row for each adapted map, a column for each layer.
pub fn evenness_map(heading: &str, usage: &[LayerUsage]) -> Section {
    let depth = usage.iter().map(|u| u.layer + 1).max().unwrap_or(0);
    let rows: Vec<&[LayerUsage]> = usage.chunks(depth.max(1)).collect();
    let name = |u: &LayerUsage| u.path.trim_start_matches("model.layers.").to_owned();
    Section::HeatMap {
        heading: heading.into(),
        note:
            "Entropy of the experts' shares on the held-out samples over that of equal shares: 1 \
               is even, 0 is a single expert. Layer 0 holds the leaves."
                .into(),
        rows: rows.iter().map(|r| name(&r[0])).collect(),
        columns: (0..depth).map(|l| format!("layer {l}")).collect(),
        values: rows.iter().map(|r| r.iter().map(LayerUsage::evenness).collect()).collect(),
    }
}

/// Learning rate, memory and throughput.
fn pace(runs: &[(&str, &[Metric])]) -> Vec<Section> {
    let curve = |heading: &str, unit: &str, points: fn(&[&StepMetric]) -> Vec<(f64, f64)>| {
        let series = runs.iter().map(|(name, metrics)| {
            fn step(metric: &Metric) -> Option<&StepMetric> {
                if let Metric::Step(m) = metric { Some(m) } else { None }
            }
            let steps: Vec<&StepMetric> = metrics.iter().filter_map(step).collect();
            Series { name: (*name).to_owned(), points: points(&steps) }
        });
        Section::Curves {
            heading: heading.into(),
            note: String::new(),
            x_label: "step".into(),
            y_label: unit.into(),
            log_y: false,
            series: series.collect(),
        }
    };
    let throughput = |steps: &[&StepMetric]| {
        let between = steps.windows(2).filter_map(|pair| {
            let seconds = pair[1].seconds - pair[0].seconds;
            (seconds > 0.0).then(|| (pair[1].step as f64, pair[1].tokens as f64 / seconds))
        });
        between.collect()
    };
    let memory = |steps: &[&StepMetric]| {
        let mib = |m: &&StepMetric| m.resident_memory_bytes as f64 / f64::from(1 << 20);
        steps.iter().map(|m| (m.step as f64, mib(m))).filter(|p| p.1 > 0.0).collect()
    };
    vec![
        curve("Learning rate", "of a step", |steps| {
            steps.iter().map(|m| (m.step as f64, m.learning_rate)).collect()
        }),
        curve("Throughput", "tokens per second, evaluations included", throughput),
        curve("Memory after each step", "MiB resident", memory),
    ]
}

/// Where the trained parameters are.
fn plan(outcome: &Outcome) -> Section {
    let row = |m: &ModuleParameters| {
        let each = m.parameters / m.places.max(1);
        let numbers = [m.places, each, m.parameters, m.router];
        let mut row = vec![m.module.clone()];
        row.extend(numbers.map(thousands));
        row
    };
    let mut rows: Vec<Vec<String>> = outcome.modules.iter().map(row).collect();
    let routers = outcome.modules.iter().map(|m| m.router).sum();
    let total = vec![
        "in all".to_owned(),
        String::new(),
        String::new(),
        thousands(outcome.trainable_parameters),
        thousands(routers),
    ];
    rows.push(total);
    let columns = ["", "places", "parameters each", "together", "of which routers"];
    Section::Table {
        heading: "Plan of the trained parameters".into(),
        note: format!("The base's {} are frozen.", thousands(outcome.base_parameters)),
        columns: columns.map(str::to_owned).to_vec(),
        rows,
    }
}

/// Everything else, planned beside measured.
fn result(outcome: &Outcome) -> Section {
    let loss = |x: Option<f64>| x.map_or_else(|| "\u{2013}".to_owned(), |x| format!("{x:.4}"));
    let (memory, planned) = (outcome.memory, outcome.planned_memory);
    let plain = |name: &str, value: String| vec![name.to_owned(), String::new(), value];
    let both = |name: &str, planned: u64, measured: u64| {
        vec![name.to_owned(), mib(planned), mib(measured)]
    };
    let rows = vec![
        plain("held-out loss before", loss(outcome.eval_loss_before)),
        plain("held-out loss after", loss(outcome.eval_loss_after)),
        plain("steps", steps(outcome)),
        plain("tokens", thousands(outcome.tokens)),
        plain("seconds", format!("{:.1}", outcome.seconds)),
        both("peak memory", planned.total(), outcome.peak_memory_bytes),
        both("of which frozen weights", planned.weights, memory.weights),
        both("adapter and optimizer", planned.adapter_and_optimizer, memory.adapter_and_optimizer),
        both("activations", planned.activations, memory.activations),
        both("program and data", planned.program_and_data, memory.program_and_data),
    ];
    Section::Table {
        heading: "Result".into(),
        note: "Of the peak, what is not known to be something else counts as activations.".into(),
        columns: ["", "planned", "measured"].map(str::to_owned).to_vec(),
        rows,
    }
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
                resident_memory_bytes: 0,
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
