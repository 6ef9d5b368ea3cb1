//! A plan as tables on a terminal and as a page.

use crate::table::{self, bytes, count};
use smore_tune::plan::{Amount, Budget, Cost, Found, Pace};
use smore_tune::report::{Report, Section};

const DASH: &str = "\u{2013}";
/// Tokens that times are told for where no data are known.
pub(super) const MANY: usize = 1_000_000;
/// Lines of the front that a terminal shows.
const SHOWN: usize = 30;

/// What was planned.
pub(super) struct View<'a> {
    /// The model, as it was named, and its parameters and blocks.
    pub(super) model: String,
    /// The adapter first, then what stands beside it.
    pub(super) costs: &'a [Cost],
    /// How fast each trains, where that was measured.
    pub(super) paces: &'a [Option<Pace>],
    /// Tokens of a forward pass.
    pub(super) tokens: usize,
    /// What the run trains on, where that is known.
    pub(super) amount: Option<Amount>,
    /// What a budget allows.
    pub(super) found: Option<(Budget, &'a [Found])>,
}

/// Heading, what to know before reading, column heads and rows.
struct Table {
    heading: &'static str,
    note: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl View<'_> {
    /// Prints everything.
    pub(super) fn print(&self) {
        println!("{}", self.model);
        for table in self.tables() {
            println!("\n{}{}\n", table.heading, colon(&table.note));
            table::print(&table.columns, &table.rows[..table.rows.len().min(SHOWN)]);
            if let Some(more) = table.rows.len().checked_sub(SHOWN + 1) {
                println!("  and {} more, which --html and --json have", more + 1);
            }
        }
        for line in self.structure() {
            println!("\n{line}");
        }
    }

    /// The page.
    pub(super) fn report(&self) -> Report {
        let mut sections = Vec::new();
        let mut points = Vec::new();
        if let Some((budget, found)) = self.found {
            let place = |f: &Found| {
                let name = format!("{}, width {}", f.name(), f.width);
                let flexibility = f.flexibility_log10.unwrap_or(0.0);
                (name, shown(budget, f.spent(budget)), flexibility, f.on_front)
            };
            points = found.iter().map(place).collect();
            // What is singled out lies on top.
            points.sort_by_key(|p| p.3);
        }
        for table in self.tables() {
            let own = |cells: Vec<&str>| cells.into_iter().map(str::to_owned).collect();
            sections.push(Section::Table {
                heading: table.heading.into(),
                note: table.note,
                columns: own(table.columns),
                rows: table.rows,
            });
        }
        if let Some((budget, _)) = self.found {
            sections.push(Section::Scatter {
                heading: "What the budget allows".into(),
                note: "Every S'MoRE within the budget; singled out are those that nothing beats."
                    .into(),
                x_label: axis(budget).into(),
                y_label: "decimal logarithm of the outputs that trees can give a token".into(),
                points,
            });
        }
        let paragraphs = self.structure();
        if !paragraphs.is_empty() {
            sections.push(Section::Text { heading: "Structure".into(), paragraphs });
        }
        Report { title: "Plan".into(), subtitle: self.model.clone(), sections }
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = vec![self.cost_table(), self.memory_table()];
        if self.paces.iter().any(Option::is_some) {
            tables.push(self.time_table());
        }
        tables.extend(self.found.map(|(budget, found)| front_table(budget, found)));
        tables
    }

    fn cost_table(&self) -> Table {
        let row = |c: &Cost| {
            vec![
                c.name.clone(),
                count(c.parameters),
                count(4 * c.parameters),
                c.file_bytes.map_or(DASH.into(), |n| count(n as usize)),
                count(c.flops.active),
                count(c.flops.executed),
            ]
        };
        Table {
            heading: "Adapters",
            note:
                "FLOPs are those of a token's forward pass, of the experts that act on it and as \
                   executed in training"
                    .into(),
            columns: vec![
                "adapter",
                "parameters",
                "bytes (f32)",
                "file, bytes",
                "FLOPs, active",
                "as executed",
            ],
            rows: self.costs.iter().map(row).collect(),
        }
    }

    fn memory_table(&self) -> Table {
        let mut rows = Vec::new();
        for cost in self.costs {
            for peak in &cost.memory {
                let s = &peak.split;
                let parts = [s.weights, s.adapter_and_optimizer, s.activations, peak.total];
                let precision = if peak.bf16 { "bf16" } else { "f32" };
                let again = if peak.gradient_checkpointing { "yes" } else { "no" };
                let mut row = vec![cost.name.clone(), precision.into(), again.into()];
                row.extend(parts.map(bytes));
                rows.push(row);
            }
        }
        Table {
            heading: "Peak memory",
            note: format!("a training step of {} tokens, estimated", count(self.tokens)),
            columns: vec![
                "adapter",
                "weights in",
                "recomputed",
                "weights",
                "adapter, optimizer",
                "activations",
                "in all",
            ],
            rows,
        }
    }

    fn time_table(&self) -> Table {
        let (heading, note) =
            ("Time", "measured on this machine, on random weights of these shapes");
        let mut columns = vec!["adapter", "tokens/s"];
        match self.amount {
            Some(_) => columns.extend(["an epoch", "the whole run"]),
            None => columns.push("a million tokens"),
        }
        let row = |(cost, pace): (&Cost, &Option<Pace>)| {
            let pace = (*pace)?;
            let rate = pace.seconds_per_token.max(1e-12).recip();
            let mut row = vec![cost.name.clone(), count(rate.round() as usize)];
            if let Some(a) = self.amount {
                let epoch = pace.seconds(a.tokens, a.updates);
                row.extend([duration(epoch), duration(epoch * a.epochs())]);
            } else {
                row.push(duration(pace.seconds(MANY, MANY / self.tokens.max(1))));
            }
            Some(row)
        };
        let note = match self.amount {
            Some(a) => format!(
                "{note}; an epoch has {} tokens in {} samples and {} steps",
                count(a.tokens),
                count(a.samples),
                count(a.updates)
            ),
            None => note.into(),
        };
        let rows = self.costs.iter().zip(self.paces).filter_map(row).collect();
        Table { heading, note, columns, rows }
    }

    fn structure(&self) -> Vec<String> {
        let Some(s) = self.costs.first().and_then(|c| c.structure.as_ref()) else { return vec![] };
        let mut lines = vec![format!(
            "above LoRA of equal rank, biases and router aside: {} parameters ({:.1}%), \
             propagation {:.1}% of its multiplications",
            count(s.parameters_above_lora),
            100.0 * s.parameter_overhead,
            100.0 * s.propagation_overhead
        )];
        lines.extend(s.flexibility_log10.map(|log10| {
            format!("structural flexibility: 10^{log10:.1} outputs for a token on one linear map")
        }));
        lines
    }
}

fn front_table(budget: Budget, found: &[Found]) -> Table {
    let row = |f: &Found| {
        let mut row = vec![
            f.name(),
            count(f.parameters),
            bytes(f.memory),
            count(f.flops),
            count(f.width),
            f.flexibility_log10.map_or(DASH.into(), |log10| format!("10^{log10:.1}")),
        ];
        row.extend(f.seconds.map(duration));
        row
    };
    let mut columns =
        vec!["S'MoRE", "parameters", "peak memory", "FLOPs", "width d_L", "flexibility"];
    if found.iter().any(|f| f.seconds.is_some()) {
        columns.push("time");
    }
    let front: Vec<&Found> = found.iter().filter(|f| f.on_front).collect();
    let what = match budget {
        Budget::Parameters(_) => "parameters",
        Budget::Memory(_) => "memory",
        Budget::Time(_) => "time",
    };
    let note = format!(
        "{} S'MoRE fit; of them {} that no other beats in {what}, width and flexibility, the \
         dearest first",
        found.len(),
        front.len()
    );
    let rows = front.into_iter().rev().map(row).collect();
    Table { heading: "Within the budget", note, columns, rows }
}

fn axis(budget: Budget) -> &'static str {
    match budget {
        Budget::Parameters(_) => "trained parameters, millions",
        Budget::Memory(_) => "peak memory, GiB",
        Budget::Time(_) => "hours",
    }
}

fn shown(budget: Budget, spent: f64) -> f64 {
    match budget {
        Budget::Parameters(_) => spent / 1e6,
        Budget::Memory(_) => spent / f64::from(1 << 30),
        Budget::Time(_) => spent / 3600.0,
    }
}

fn colon(note: &str) -> String {
    if note.is_empty() { String::new() } else { format!(": {note}") }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}
