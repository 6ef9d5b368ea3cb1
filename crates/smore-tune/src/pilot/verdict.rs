//! What the trials say.

use super::statistics::Estimate;
use super::tasks::{NEW, SEEN};
use super::{Contender, Family, Study, TUNING_SEED, Trial};
use crate::report::{Report, Section};
use crate::run_report::thousands;
use serde::Serialize;
use std::fmt::Write;

/// A contender on a family of tasks, over the seeds of the study.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The tasks.
    pub family: Family,
    /// The adapter.
    pub contender: Contender,
    /// The rate that tuning chose.
    pub learning_rate: f64,
    /// Whether that rate is an end of the grid, so that one beyond it may be better.
    pub at_the_edge: bool,
    /// Share of held-out questions answered exactly.
    pub accuracy: Estimate,
    /// The same on combinations that training has, and on those it has not.
    pub by_kind: Vec<(String, Estimate)>,
    /// Held-out cross-entropy per answer token, in nats.
    pub loss: Estimate,
    /// Accuracy minus LoRA's, seed by seed.
    pub accuracy_over_lora: Estimate,
    /// Loss minus LoRA's, seed by seed.
    pub loss_over_lora: Estimate,
    /// Mean seconds of a trial.
    pub seconds: f64,
}

/// The whole study.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// What was asked.
    pub study: Study,
    /// Trained parameters of each contender.
    pub parameters: Vec<(Contender, usize)>,
    /// Families in order, contenders in order.
    pub rows: Vec<Row>,
}

/// The rate with the lowest held-out loss while tuning.
pub(super) fn best_rate(trials: &[Trial], contender: Contender, family: Family) -> f64 {
    let tuned = trials
        .iter()
        .filter(|t| (t.contender, t.family, t.seed) == (contender, family, TUNING_SEED));
    tuned.min_by(|a, b| a.loss.total_cmp(&b.loss)).map_or(f64::NAN, |t| t.learning_rate)
}

impl Verdict {
    pub(super) fn of(study: &Study, sizes: &[(Contender, usize)], trials: &[Trial]) -> Self {
        let of = |contender, family| -> Vec<&Trial> {
            let mut all: Vec<&Trial> = trials
                .iter()
                .filter(|t| (t.contender, t.family) == (contender, family) && t.seed != TUNING_SEED)
                .collect();
            all.sort_by_key(|t| t.seed);
            all
        };
        let mut rows = Vec::new();
        for &family in &study.families {
            let lora = of(Contender::Lora, family);
            for &contender in &study.contenders {
                let own = of(contender, family);
                let rate = best_rate(trials, contender, family);
                rows.push(row(study, (family, contender, rate), &own, &lora));
            }
        }
        Self { study: study.clone(), parameters: sizes.to_vec(), rows }
    }

    /// The question in the project's name, answered in a sentence for each family.
    pub fn answers(&self) -> Vec<String> {
        let answer = |family: &Family| {
            let better = |metric: fn(&Row) -> Estimate, sign: f64| -> Vec<&str> {
                let rows = self.rows.iter().filter(|r| r.family == *family);
                rows.filter(|r| metric(r).differs_from_zero() && sign * metric(r).mean > 0.0)
                    .map(|r| r.contender.name())
                    .collect()
            };
            let list = |names: Vec<&str>| match names.len() {
                0 => "none".to_owned(),
                _ => names.join("; "),
            };
            format!(
                "{} ({}): better than LoRA in accuracy beyond chance: {}; worse: {}.",
                family.name(),
                family.description(),
                list(better(|r| r.accuracy_over_lora, 1.0)),
                list(better(|r| r.accuracy_over_lora, -1.0)),
            )
        };
        self.study.families.iter().map(answer).collect()
    }

    /// The rows of one family as cells.
    pub fn table(&self, family: Family) -> (Vec<String>, Vec<Vec<String>>) {
        let mut columns: Vec<String> = ["", "accuracy", "minus LoRA's"].map(str::to_owned).into();
        let combined = family != Family::Desk;
        if combined {
            columns.extend([SEEN, NEW].map(str::to_owned));
        }
        columns.extend(["loss", "minus LoRA's", "rate", "seconds"].map(str::to_owned));
        let cells = |r: &Row| {
            let mut cells = vec![
                r.contender.name().to_owned(),
                percent(r.accuracy),
                difference(r.accuracy_over_lora, 100.0, 1),
            ];
            if combined {
                cells.extend(r.by_kind.iter().map(|(_, e)| percent(*e)));
            }
            let edge = if r.at_the_edge { "*" } else { "" };
            cells.extend([
                format!("{:.3} \u{b1} {:.3}", r.loss.mean, r.loss.half),
                difference(r.loss_over_lora, 1.0, 3),
                format!("{:.0e}{edge}", r.learning_rate),
                format!("{:.0}", r.seconds),
            ]);
            cells
        };
        let rows = self.rows.iter().filter(|r| r.family == family).map(cells).collect();
        (columns, rows)
    }

    fn what(&self) -> String {
        let sizes = self.parameters.iter().map(|(_, n)| *n);
        let (low, high) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
        format!(
            "{} to {} trained parameters, {} training samples, {} epochs, {} held-out questions, \
             {} seeds; learning rate of each contender chosen from {} by the held-out loss of a \
             seed of its own (* at an end of that grid).",
            thousands(low),
            thousands(high),
            thousands(self.study.train),
            self.study.epochs,
            self.study.held_out,
            self.study.seeds,
            self.study
                .learning_rates
                .iter()
                .map(|r| format!("{r:.0e}"))
                .collect::<Vec<_>>()
                .join(", "),
        )
    }

    /// The tables in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("{}\n\n", self.what());
        for answer in self.answers() {
            let _ = writeln!(text, "- {answer}");
        }
        for &family in &self.study.families {
            let (columns, rows) = self.table(family);
            let _ = writeln!(text, "\n**{}**: {}\n", family.name(), family.description());
            let _ = writeln!(text, "| {} |", columns.join(" | "));
            let _ = writeln!(text, "|{}", "---|".repeat(columns.len()));
            for row in rows {
                let _ = writeln!(text, "| {} |", row.join(" | "));
            }
        }
        text
    }

    /// The page.
    pub fn page(&self) -> Report {
        let mut sections = vec![Section::Text {
            heading: "Does structure help?".into(),
            paragraphs: [self.answers(), vec![self.what()]].concat(),
        }];
        for &family in &self.study.families {
            let own: Vec<&Row> = self.rows.iter().filter(|r| r.family == family).collect();
            let (columns, rows) = self.table(family);
            sections.push(Section::Intervals {
                heading: format!("Accuracy minus LoRA's: {}", family.name()),
                note: format!(
                    "{}. Points are means over the seeds, bars 95% intervals; a bar that meets the \
                     line at zero says nothing.",
                    family.description()
                ),
                unit: "percentage points".into(),
                rows: own
                    .iter()
                    .filter(|r| r.contender != Contender::Lora)
                    .map(|r| {
                        let e = r.accuracy_over_lora;
                        (r.contender.name().to_owned(), 100.0 * e.mean, 100.0 * e.half)
                    })
                    .collect(),
            });
            sections.push(Section::Table {
                heading: format!("In numbers: {}", family.name()),
                note: String::new(),
                columns,
                rows,
            });
        }
        Report {
            title: "smore reproduce pilot".into(),
            subtitle: "LoRA, HydraLoRA, MixLoRA and S'MoRE at equal trained parameters".into(),
            sections,
        }
    }
}

fn row(
    study: &Study,
    (family, contender, learning_rate): (Family, Contender, f64),
    own: &[&Trial],
    lora: &[&Trial],
) -> Row {
    let estimate =
        |of: &dyn Fn(&Trial) -> f64| Estimate::of(&own.iter().map(|t| of(t)).collect::<Vec<_>>());
    let over = |of: &dyn Fn(&Trial) -> f64| {
        let pairs = own.iter().filter_map(|t| Some((t, lora.iter().find(|l| l.seed == t.seed)?)));
        Estimate::of(&pairs.map(|(t, l)| of(t) - of(l)).collect::<Vec<_>>())
    };
    let kind = |name: &str| {
        let estimate = estimate(&|t| t.by_kind.get(name).copied().unwrap_or(f64::NAN));
        (name.to_owned(), estimate)
    };
    let rates = &study.learning_rates;
    let edge = |r: Option<&f64>| r == Some(&learning_rate);
    Row {
        family,
        contender,
        learning_rate,
        at_the_edge: edge(rates.first()) || edge(rates.last()),
        accuracy: estimate(&|t| t.accuracy),
        by_kind: match family {
            Family::Desk => vec![kind(SEEN)],
            Family::Pairs | Family::Branch => vec![kind(SEEN), kind(NEW)],
        },
        loss: estimate(&|t| t.loss),
        accuracy_over_lora: over(&|t| t.accuracy),
        loss_over_lora: over(&|t| t.loss),
        seconds: own.iter().map(|t| t.seconds).sum::<f64>() / own.len() as f64,
    }
}

fn percent(e: Estimate) -> String {
    format!("{:.1} \u{b1} {:.1}%", 100.0 * e.mean, 100.0 * e.half)
}

fn difference(e: Estimate, factor: f64, decimals: usize) -> String {
    let (mean, half) = (factor * e.mean, factor * e.half);
    format!("{mean:+.decimals$} \u{b1} {half:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(contender: Contender, seed: u64, rate: f64, accuracy: f64) -> Trial {
        Trial {
            contender,
            family: Family::Pairs,
            learning_rate: rate,
            seed,
            parameters: 1000,
            loss: 1.0 - accuracy,
            accuracy,
            by_kind: [(SEEN.to_owned(), accuracy), (NEW.to_owned(), 0.0)].into(),
            seconds: 2.0,
        }
    }

    fn study() -> Study {
        Study {
            contenders: vec![Contender::Lora, Contender::Smore2],
            families: vec![Family::Pairs],
            seeds: 3,
            learning_rates: vec![1e-3, 2e-3, 4e-3],
            ..Study::quick()
        }
    }

    /// LoRA's seeds differ by far more than the two contenders do on each seed.
    #[test]
    fn differences_are_taken_seed_by_seed() {
        let mut trials = Vec::new();
        for (seed, accuracy) in [(1, 0.2), (2, 0.5), (3, 0.8)] {
            trials.push(trial(Contender::Smore2, seed, 2e-3, accuracy + 0.05 + seed as f64 / 1e3));
            trials.push(trial(Contender::Lora, seed, 1e-3, accuracy));
        }
        for (contender, best) in [(Contender::Lora, 1e-3), (Contender::Smore2, 2e-3)] {
            for rate in [1e-3, 2e-3, 4e-3] {
                let accuracy = if rate == best { 0.9 } else { 0.1 };
                trials.push(trial(contender, TUNING_SEED, rate, accuracy));
            }
        }
        let verdict = Verdict::of(&study(), &[(Contender::Lora, 1000)], &trials);
        let [lora, smore] = &verdict.rows[..] else { panic!("two rows") };
        assert!((lora.learning_rate, smore.learning_rate) == (1e-3, 2e-3));
        assert!(lora.at_the_edge && !smore.at_the_edge);
        assert!((lora.accuracy.mean - 0.5).abs() < 1e-12 && lora.accuracy.half > 0.7);
        assert!((smore.accuracy_over_lora.mean - 0.052).abs() < 1e-12);
        assert!(smore.accuracy_over_lora.half < 0.01);
        assert_eq!(lora.accuracy_over_lora.mean, 0.0);
        assert!(verdict.answers()[0].contains("beyond chance: S'MoRE, 2 layers; worse: none"));
        let markdown = verdict.markdown();
        assert!(markdown.contains("| S'MoRE, 2 layers | 55.2"), "{markdown}");
        let html = verdict.page().render();
        assert!(html.contains("S&#39;MoRE, 2 layers") || html.contains("S'MoRE, 2 layers"));
    }
}
