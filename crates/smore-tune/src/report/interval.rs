//! Numbers with intervals as inline SVG: a point and a bar each, and a line at zero.

use super::axis::{Axis, LIMIT};
use maud::{Markup, html};

/// Height of a row.
const ROW: f64 = 26.0;
const TOP: f64 = 6.0;
const BOTTOM: f64 = 42.0;

/// The rows in two sizes, of which the style sheet shows the one that fits the screen.
pub(super) fn render(title: &str, unit: &str, rows: &[(String, f64, f64)]) -> Markup {
    html! {
        (draw(title, unit, rows, false))
        (draw(title, unit, rows, true))
    }
}

fn draw(title: &str, unit: &str, rows: &[(String, f64, f64)], phone: bool) -> Markup {
    let (width, class) = if phone { (360.0, "chart phone") } else { (800.0, "chart wide") };
    // Letters have no known width here; seven pixels is that of a wide one. A phone has the names
    // above their bars.
    let names = rows.iter().map(|r| 7.0 * r.0.chars().count() as f64).fold(0.0, f64::max);
    let (left, above) = if phone { (12.0, 15.0) } else { (names + 12.0, 0.0) };
    let (right, row) = (width - 16.0, ROW + above);
    let bottom = TOP + row * rows.len() as f64;
    let drawn = || rows.iter().filter(|r| r.1.abs() < LIMIT);
    let ends = drawn().flat_map(|&(_, mean, half)| {
        // An interval without end is drawn to the edge and must not set the scale.
        let half = if half < LIMIT { half } else { 0.0 };
        [mean - half, mean + half]
    });
    let values: Vec<f64> = ends.chain([0.0]).collect();
    let axis = Axis::new(values.iter().copied(), false, 0.08);
    let at = |x: f64| left + axis.share(x).clamp(0.0, 1.0) * (right - left);
    let names: Vec<&str> = rows.iter().map(|r| r.0.as_str()).collect();
    let said = format!("{title}, {unit}: {}", names.join(", "));
    html! {
        svg class=(class) viewBox=(format!("0 0 {width} {}", bottom + BOTTOM)) role="img"
            aria-label=(said) {
            @if rows.is_empty() { text x=(left) y="20" { "nothing to show" } }
            @for tick in axis.ticks(if phone { 3 } else { 6 }) {
                line.grid x1=(px(at(tick.value))) x2=(px(at(tick.value))) y1=(px(TOP)) y2=(px(bottom)) {}
                text x=(px(at(tick.value))) y=(px(bottom + 18.0)) text-anchor="middle" {
                    (tick.label)
                }
            }
            line.axis x1=(px(at(0.0))) x2=(px(at(0.0))) y1=(px(TOP)) y2=(px(bottom + 4.0)) {}
            text x=(px(right)) y=(px(bottom + 36.0)) text-anchor="end" { (unit) }
            @for (i, (name, mean, half)) in rows.iter().enumerate() {
                @let y = TOP + row * i as f64 + above + ROW / 2.0;
                @if phone {
                    text.name x=(px(left)) y=(px(y - 11.0)) { (name) }
                } @else {
                    text.name x=(px(left - 12.0)) y=(px(y)) dy=".35em" text-anchor="end" { (name) }
                }
                @if mean.abs() < LIMIT {
                    line.curve x1=(px(at(mean - half))) x2=(px(at(mean + half))) y1=(px(y))
                        y2=(px(y)) style="stroke: var(--s0)" {}
                    circle cx=(px(at(*mean))) cy=(px(y)) r="4" style="fill: var(--s0)" {}
                }
            }
        }
    }
}

fn px(x: f64) -> String {
    format!("{x:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_rows_are_drawn_without_nonsense() {
        let rows = [
            ("a".to_owned(), 1.0, 0.5),
            ("b".to_owned(), -2.0, f64::INFINITY),
            ("c".to_owned(), f64::NAN, f64::NAN),
            ("d".to_owned(), 0.0, 0.0),
        ];
        for rows in [&rows[..], &rows[2..3], &[]] {
            let html = render("t", "u", rows).into_string();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        }
        assert_eq!(render("t", "u", &rows).into_string().matches("<circle").count(), 2 * 3);
    }
}
