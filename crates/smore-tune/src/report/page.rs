//! The page around the charts.

use super::chart::{self, Chart};
use super::{Card, Report, Section, Tone, heat, interval, scatter};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

const STYLE: &str = include_str!("page.css");

pub(super) fn render(report: &Report) -> Markup {
    let sections = html! {
        @for section in &report.sections { section { (render_section(section)) } }
    };
    shell(&report.title, &report.subtitle, "", &sections, &html! {})
}

/// A page that a script fills: `main` holds its elements, and the script finds `data` as JSON in the
/// element `data`. One file that needs no network.
pub(crate) fn interactive(
    title: &str,
    subtitle: &str,
    style: &str,
    main: &Markup,
    data: &Value,
    script: &str,
) -> String {
    let data = data.to_string().replace('<', "\\u003c");
    let script = html! {
        script type="application/json" id="data" { (PreEscaped(data)) }
        script { (PreEscaped(script)) }
    };
    shell(title, subtitle, style, main, &script).into_string()
}

fn shell(title: &str, subtitle: &str, style: &str, main: &Markup, script: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) (PreEscaped(style)) }
            }
            body {
                header {
                    h1 { (title) }
                    @if !subtitle.is_empty() { p { (subtitle) } }
                }
                main { (main) }
                (script)
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
        Section::Cards { cards } => html! {
            ul.cards { @for card in cards { (self::card(card)) } }
        },
        Section::Exchanges { heading, note, rows } => {
            let exchange = |row: &[(String, String)]| {
                html! {
                    dl.exchange {
                        @for (name, text) in row { div { dt { (name) } dd { (text) } } }
                    }
                }
            };
            html! {
                h2 { (heading) }
                @if !note.is_empty() { p.about { (note) } }
                @for row in rows { (exchange(row)) }
            }
        }
        Section::Table { heading, note, columns, rows } => {
            figure(heading, note, &table(columns, rows))
        }
        Section::Curves { heading, note, x_label, y_label, log_y, series } => {
            let chart = Chart { title: heading, x_label, y_label, log_y: *log_y, series };
            figure(heading, note, &chart::render(&chart))
        }
        Section::HeatMap { heading, note, rows, columns, values } => {
            figure(heading, note, &heat::render(rows, columns, values))
        }
        Section::Scatter { heading, note, x_label, y_label, points } => {
            figure(heading, note, &scatter::render(heading, x_label, y_label, points))
        }
        Section::Intervals { heading, note, unit, rows } => {
            figure(heading, note, &interval::render(heading, unit, rows))
        }
    }
}

fn card(card: &Card) -> Markup {
    let tone = match card.tone {
        Tone::Good => "good",
        Tone::Bad => "bad",
        Tone::Plain => "plain-card",
    };
    html! {
        li class=(tone) {
            span.label { (card.label) }
            span.value { (card.value) }
            @if !card.note.is_empty() { span.note { (card.note) } }
        }
    }
}

fn figure(heading: &str, note: &str, content: &Markup) -> Markup {
    html! {
        h2 { (heading) }
        figure {
            @if !note.is_empty() { figcaption { (note) } }
            div.scroll { (content) }
        }
    }
}

fn table(columns: &[String], rows: &[Vec<String>]) -> Markup {
    html! {
        table.plain {
            @if columns.iter().any(|c| !c.is_empty()) {
                thead { tr { @for column in columns { th scope="col" { (column) } } } }
            }
            tbody {
                @for row in rows {
                    tr {
                        @for (i, cell) in row.iter().enumerate() {
                            @if i == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Colour = [f64; 3];

    /// WCAG 2 relative luminance.
    fn luminance(colour: Colour) -> f64 {
        let linear = colour.map(|c| {
            let c = c / 255.0;
            if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
        });
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    }

    fn contrast(a: Colour, b: Colour) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    /// What the style sheet gives the variable `name`, in its light or dark part.
    fn variable(name: &str, dark: bool) -> &'static str {
        let (light, rest) = STYLE.split_once("@media (prefers-color-scheme: dark)").unwrap();
        let part = if dark { rest } else { light };
        let start = part.find(&format!("{name}:")).unwrap() + name.len() + 1;
        part[start..].split(';').next().unwrap().trim()
    }

    fn hex(text: &str) -> Colour {
        [1, 3, 5].map(|i| f64::from(u8::from_str_radix(&text[i..i + 2], 16).unwrap()))
    }

    #[test]
    fn heat_cells_are_readable_at_every_share() {
        for dark in [false, true] {
            let page = hex(variable("--page", dark));
            let heat: Vec<f64> =
                variable("--heat", dark).split(' ').map(|c| c.parse().unwrap()).collect();
            let turn: f64 = variable("--turn", dark).parse().unwrap();
            let sign: f64 = variable("--sign", dark).parse().unwrap();
            for i in 0..=1000 {
                let share = f64::from(i) / 1000.0;
                let strength = 0.05 + 0.95 * share;
                let cell = [0, 1, 2].map(|c| page[c] * (1.0 - strength) + heat[c] * strength);
                let ink = if (share - turn) * sign > 0.0 { [255.0; 3] } else { [0.0; 3] };
                let ratio = contrast(cell, ink);
                assert!(ratio > 4.5, "dark {dark}, share {share}: {ratio}");
            }
        }
    }

    #[test]
    fn words_and_curves_stand_out() {
        for dark in [false, true] {
            let page = hex(variable("--page", dark));
            for (name, least) in [("--ink", 7.0), ("--soft", 4.5)] {
                assert!(contrast(page, hex(variable(name, dark))) > least, "{name}, dark {dark}");
            }
            for i in 0..7 {
                let colour = hex(variable(&format!("--s{i}"), dark));
                assert!(contrast(page, colour) > 2.0, "series {i}, dark {dark}");
            }
        }
    }
}
