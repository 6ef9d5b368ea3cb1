//! What came out, beside the paper's figures.

use super::{Method, PaperTask};
use crate::eval::statistics::{Paired, Verdict};
use crate::report::{Report, Section};
use crate::run_report::thousands;
use serde::Serialize;

/// What a method, or the base, came to on a task.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// None for the base.
    pub method: Option<Method>,
    /// The task.
    pub task: PaperTask,
    /// Share of right answers, the mean over the seeds.
    pub accuracy: f64,
    /// Its standard error over the questions.
    pub standard_error: f64,
    /// The same over the base's on the same questions, of the first seed.
    pub paired: Option<Paired>,
    /// Questions.
    pub questions: usize,
    /// Trained parameters of the search's winner.
    pub parameters: usize,
    /// What the winner is.
    pub winner: String,
    /// Seeds.
    pub seeds: usize,
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    /// The cap on trained parameters.
    pub budget: usize,
    /// In any order.
    pub cells: Vec<Cell>,
}

const DASH: &str = "\u{2013}";

/// The paper's averages over its five sets of choices, in percent: Llama 3.2-1B and Llama 3-8B.
fn published(method: Option<Method>) -> [Option<f64>; 2] {
    match method {
        None => [Some(43.41), Some(74.83)],
        Some(Method::Lora) => [Some(59.15), None],
        Some(Method::HydraLora) => [Some(59.63), Some(85.75)],
        Some(Method::MixLora) => [Some(60.40), Some(85.95)],
        Some(Method::Smore) => [Some(61.35), Some(86.83)],
        Some(Method::Smore3) => [None, None],
    }
}

impl Table {
    fn cell(&self, method: Option<Method>, task: PaperTask) -> Option<&Cell> {
        self.cells.iter().find(|c| (c.method, c.task) == (method, task))
    }

    /// The base and the methods that something is known of.
    fn rows(&self) -> Vec<Option<Method>> {
        let all = std::iter::once(None).chain(Method::ALL.map(Some));
        all.filter(|m| self.cells.iter().any(|c| c.method == *m)).collect()
    }

    fn tasks(&self) -> Vec<PaperTask> {
        let known = |task: &PaperTask| self.cells.iter().any(|c| c.task == *task);
        PaperTask::ALL.into_iter().filter(known).collect()
    }

    /// The mean over the sets of choices; none unless all of them were asked.
    pub fn average(&self, method: Option<Method>) -> Option<f64> {
        let choices: Vec<PaperTask> =
            PaperTask::ALL.into_iter().filter(|task| task.is_choice()).collect();
        let values: Option<Vec<f64>> =
            choices.iter().map(|&task| Some(self.cell(method, task)?.accuracy)).collect();
        Some(values?.iter().sum::<f64>() / choices.len() as f64)
    }

    /// Column heads and cells: accuracies in percent with standard errors, the average of the five
    /// sets, and the paper's.
    pub fn accuracies(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let tasks = self.tasks();
        let mut columns = vec!["accuracy, %".to_owned()];
        columns.extend(tasks.iter().map(|task| task.name().to_owned()));
        columns.extend(["average", "paper, 1B", "paper, 8B"].map(str::to_owned));
        let percent = |x: Option<f64>| x.map_or(DASH.into(), |x| format!("{x:.2}"));
        let row = |method: Option<Method>| {
            let mut row = vec![method.map_or("base", Method::name).to_owned()];
            row.extend(tasks.iter().map(|&task| {
                self.cell(method, task).map_or(DASH.into(), |c| {
                    format!("{:.2} \u{b1} {:.2}", 100.0 * c.accuracy, 100.0 * c.standard_error)
                })
            }));
            row.push(percent(self.average(method).map(|x| 100.0 * x)));
            row.extend(published(method).map(percent));
            row
        };
        (columns, self.rows().into_iter().map(row).collect())
    }

    /// Column heads and cells: what each search chose.
    pub fn winners(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let columns = ["task", "method", "parameters", "winner of the search", "over the base, %"];
        let row = |c: &Cell| {
            let paired = c.paired.as_ref().map_or(DASH.into(), |p| {
                let (low, high) = p.interval;
                format!("{:+.2} [{:+.2}, {:+.2}]", 100.0 * p.difference, 100.0 * low, 100.0 * high)
            });
            let method = c.method.map_or("base", Method::name).to_owned();
            let parameters = thousands(c.parameters);
            vec![c.task.name().to_owned(), method, parameters, c.winner.clone(), paired]
        };
        let trained = self.cells.iter().filter(|c| c.method.is_some());
        (columns.map(str::to_owned).to_vec(), trained.map(row).collect())
    }

    /// What must be said first.
    pub fn worse(&self) -> Vec<String> {
        let worse = |c: &&Cell| c.paired.as_ref().is_some_and(|p| p.verdict() == Verdict::Worse);
        let line = |c: &Cell| {
            let name = c.method.map_or("base", Method::name);
            format!("{name} is worse than the base in {}", c.task.name())
        };
        self.cells.iter().filter(worse).map(line).collect()
    }

    /// The page.
    pub fn page(&self, subtitle: &str) -> Report {
        let mut sections = Vec::new();
        let worse = self.worse();
        if !worse.is_empty() {
            sections.push(Section::Text { heading: "First".into(), paragraphs: worse });
        }
        let note = format!(
            "Generation protocol; standard errors over the questions; at most {} trained \
             parameters; the paper's averages are those of its own bases and budgets.",
            thousands(self.budget)
        );
        let (columns, rows) = self.accuracies();
        sections.push(Section::Table { heading: "Accuracy".into(), note, columns, rows });
        let (columns, rows) = self.winners();
        let note =
            "The lowest held-out loss within the budget; differences on the same questions, \
                    with 95% intervals."
                .to_owned();
        sections.push(Section::Table { heading: "What was chosen".into(), note, columns, rows });
        Report { title: "The paper's comparison".into(), subtitle: subtitle.into(), sections }
    }
}
