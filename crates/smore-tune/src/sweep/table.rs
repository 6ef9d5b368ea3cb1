//! What a sweep came to.

use super::Trial;
use super::space::Candidate;
use crate::report::{Report, Section};
use crate::run_report::thousands;
use serde::Serialize;

/// The candidates, the best first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// Of the last rung first, then by mean loss; failed ones last.
    pub rows: Vec<Row>,
}

/// A candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its number.
    pub candidate: usize,
    /// What it differs in.
    pub name: String,
    /// Trained parameters.
    pub parameters: usize,
    /// The last rung it reached.
    pub rung: usize,
    /// Mean held-out loss over the seeds there; none where a seed failed.
    pub loss: Option<f64>,
    /// Standard deviation over the seeds; none of a single one.
    pub deviation: Option<f64>,
    /// Seeds.
    pub seeds: usize,
    /// Alarms about routers that stand, of all seeds.
    pub alarms: usize,
    /// No other has fewer parameters and a lower loss, of those that reached the last rung.
    pub on_front: bool,
    /// Why a seed failed.
    pub error: Option<String>,
}

impl Table {
    /// Of one rung.
    pub(super) fn of(candidates: &[Candidate], trials: &[Trial], rung: usize) -> Self {
        let row = |(i, candidate): (usize, &Candidate)| {
            let mut own: Vec<&Trial> =
                trials.iter().filter(|t| t.candidate == i && t.rung == rung).collect();
            own.sort_by_key(|t| t.seed);
            let losses: Option<Vec<f64>> = own.iter().map(|t| t.loss).collect();
            let n = own.len() as f64;
            let mean = losses.as_ref().map(|l| l.iter().sum::<f64>() / n);
            let deviation = losses.zip(mean).filter(|(l, _)| l.len() > 1).map(|(l, mean)| {
                (l.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
            });
            (!own.is_empty()).then(|| Row {
                candidate: i,
                name: candidate.name.clone(),
                parameters: candidate.parameters,
                rung,
                loss: mean,
                deviation,
                seeds: own.len(),
                alarms: own.iter().map(|t| t.alarms).sum(),
                on_front: false,
                error: own.iter().find_map(|t| t.error.clone()),
            })
        };
        let mut rows: Vec<Row> = candidates.iter().enumerate().filter_map(row).collect();
        let key = |row: &Row| row.loss.unwrap_or(f64::INFINITY);
        rows.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.candidate.cmp(&b.candidate)));
        Self { rows }
    }

    /// Every candidate where it got to.
    pub(super) fn all(candidates: &[Candidate], trials: &[Trial], rungs: usize) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for rung in (0..rungs).rev() {
            let new = Self::of(candidates, trials, rung).rows;
            let new = new.into_iter().filter(|n| rows.iter().all(|r| r.candidate != n.candidate));
            let new: Vec<Row> = new.collect();
            rows.extend(new);
        }
        let last = rungs.saturating_sub(1);
        let better = |a: &Row, b: &Row| {
            let no_worse = a.parameters <= b.parameters && a.loss <= b.loss;
            a.rung == last
                && a.loss.is_some()
                && no_worse
                && (a.parameters < b.parameters || a.loss < b.loss)
        };
        let front: Vec<bool> = rows
            .iter()
            .map(|b| b.rung == last && b.loss.is_some() && !rows.iter().any(|a| better(a, b)))
            .collect();
        rows.iter_mut().zip(front).for_each(|(row, front)| row.on_front = front);
        Self { rows }
    }

    /// The one with the lowest loss of those that were trained in full.
    pub fn best(&self) -> Option<&Row> {
        self.rows.first().filter(|row| row.loss.is_some())
    }

    /// Column heads and cells.
    pub fn cells(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let rungs = self.rows.iter().any(|row| row.rung > 0);
        let row = |row: &Row| {
            let loss = match (row.loss, row.deviation) {
                (Some(loss), Some(d)) => format!("{loss:.4} \u{b1} {d:.4}"),
                (Some(loss), None) => format!("{loss:.4}"),
                (None, _) => "failed".into(),
            };
            let mut cells = vec![row.name.clone(), thousands(row.parameters), loss];
            cells.push(row.seeds.to_string());
            cells.push(row.alarms.to_string());
            cells.push(if row.on_front { "front".into() } else { String::new() });
            if rungs {
                cells.push(row.rung.to_string());
            }
            cells
        };
        let mut columns = vec!["", "parameters", "held-out loss", "seeds", "alarms", "Pareto"];
        if rungs {
            columns.push("rung");
        }
        (columns, self.rows.iter().map(row).collect())
    }

    /// A page with the table and a picture of losses over parameters.
    pub(super) fn page(&self, name: &str) -> Report {
        let (columns, rows) = self.cells();
        let points = self.rows.iter().filter(|r| r.rung == self.rows[0].rung);
        let points = points
            .filter_map(|r| Some((r.name.clone(), r.parameters as f64, r.loss?, r.on_front)))
            .collect();
        let subtitle = match self.best() {
            Some(best) => format!("Best: {}. best.yaml is ready to run.", best.name),
            None => "Every trial failed.".into(),
        };
        let mut sections = vec![
            Section::Scatter {
                heading: "Loss over parameters".into(),
                note: "On the Pareto front, in the other colour, no candidate has both fewer \
                       parameters and a lower loss. Lower left is better."
                    .into(),
                x_label: "trained parameters".into(),
                y_label: "held-out loss, nats per answer token".into(),
                points,
            },
            Section::Table {
                heading: "Candidates".into(),
                note: "Means over the seeds with their standard deviation. The choice of the best \
                       among many makes its loss look lower than it is on new data."
                    .into(),
                columns: columns.iter().map(|&c| c.to_owned()).collect(),
                rows,
            },
        ];
        let failed =
            self.rows.iter().filter_map(|r| Some(format!("{}: {}", r.name, r.error.as_ref()?)));
        let failed: Vec<String> = failed.collect();
        if !failed.is_empty() {
            sections.push(Section::Text { heading: "What failed".into(), paragraphs: failed });
        }
        Report { title: format!("Sweep {name}"), subtitle, sections }
    }
}
