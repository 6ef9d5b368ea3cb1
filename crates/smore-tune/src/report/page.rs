//! The page around the charts.

use super::chart::{self, Chart};
use super::{Report, Section};
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d232b; --soft: #667180; --line: #d9dee5; --page: #fbfbfa;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --heat: 0, 114, 178; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #98a3b0; --line: #38414c;
  --page: #14181d; --s0: #56b4e9; --s1: #ee8144; --s2: #2fc49a; --s3: #e09fc2; --s4: #f0b93a;
  --heat: 86, 180, 233; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 52rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.15rem; }
p { margin: .4rem 0; max-width: 44rem; } .note, .subtitle { color: var(--soft); }
.note { font-size: .9rem; }
figure { margin: .75rem 0 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.plain { width: 100%; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; white-space: normal; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 500;
  border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
table.heat th, table.heat td { border: 0; padding: .3rem .7rem; }
table.heat td { min-width: 4.2rem; text-align: center; font-size: .9rem; border-radius: 3px; }
table.heat { border-collapse: separate; border-spacing: 2px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .curve { fill: none; stroke-width: 2;
  stroke-linejoin: round; }
";

pub(super) fn render(report: &Report) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (report.title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (report.title) }
                @if !report.subtitle.is_empty() { p.subtitle { (report.subtitle) } }
                @for section in &report.sections { section { (render_section(section)) } }
            }
        }
    }
}

fn render_section(section: &Section) -> Markup {
    match section {
        Section::Text { heading, paragraphs } => html! {
            h2 { (heading) }
            @for paragraph in paragraphs { p { (paragraph) } }
        },
        Section::Table { heading, note, columns, rows } => html! {
            (head(heading, note))
            figure { table.plain {
                @if columns.iter().any(|c| !c.is_empty()) {
                    thead { tr { @for column in columns { th scope="col" { (column) } } } }
                }
                tbody { @for row in rows { tr { @for (i, cell) in row.iter().enumerate() {
                    @if i == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                } } } }
            } }
        },
        Section::Curves { heading, note, x_label, y_label, log_y, series } => html! {
            (head(heading, note))
            figure { (chart::render(&Chart { title: heading, x_label, y_label, log_y: *log_y, series })) }
        },
        Section::HeatMap { heading, note, rows, columns, values } => html! {
            (head(heading, note))
            figure { (heat_map(rows, columns, values)) }
        },
    }
}

fn head(heading: &str, note: &str) -> Markup {
    html! {
        h2 { (heading) }
        @if !note.is_empty() { p.note { (note) } }
    }
}

fn heat_map(rows: &[String], columns: &[String], values: &[Vec<f64>]) -> Markup {
    let finite = values.iter().flatten().filter(|v| v.is_finite());
    let largest = finite.fold(0.0, |top: f64, &v| top.max(v));
    html! {
        table.heat {
            thead { tr { th {} @for column in columns { th scope="col" { (column) } } } }
            tbody { @for (row, values) in rows.iter().zip(values) { tr {
                th scope="row" { (row) }
                @for &value in values { (cell(value, largest)) }
            } } }
        }
    }
}

/// Colour by the value's share of the largest; text stays readable because it keeps the page's ink
/// on at most half-strong colour.
fn cell(value: f64, largest: f64) -> Markup {
    if !value.is_finite() {
        return html! { td { "\u{2013}" } };
    }
    let share = if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 };
    let style = format!("background: rgba(var(--heat), {:.2})", 0.04 + 0.5 * share);
    html! { td style=(style) { (format!("{value:.2}")) } }
}
