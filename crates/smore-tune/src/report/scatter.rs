//! Points in a plane as inline SVG: those that are singled out in another colour, with their names.

use super::axis::{Axis, LIMIT};
use maud::{Markup, html};

const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;

/// Name, place, and whether a point is singled out.
type Point = (String, f64, f64, bool);

/// The points in two sizes, of which the style sheet shows the one that fits the screen.
pub(super) fn render(title: &str, x: &str, y: &str, points: &[Point]) -> Markup {
    html! {
        p.quantity { (y) }
        (draw(title, x, points, false))
        (draw(title, x, points, true))
    }
}

fn draw(title: &str, x: &str, points: &[Point], phone: bool) -> Markup {
    let (width, height, class) =
        if phone { (360.0, 280.0, "chart phone") } else { (800.0, 380.0, "chart wide") };
    let (left, right, bottom) = (58.0, width - 16.0, height - BOTTOM);
    let drawn: Vec<&Point> =
        points.iter().filter(|p| p.1.abs() < LIMIT && p.2.abs() < LIMIT).collect();
    let across = Axis::new(drawn.iter().map(|p| p.1), true, 0.06);
    let up = Axis::new(drawn.iter().map(|p| p.2), true, 0.08);
    let at_x = |v: f64| left + across.share(v).clamp(0.0, 1.0) * (right - left);
    let at_y = |v: f64| bottom - up.share(v).clamp(0.0, 1.0) * (bottom - TOP);
    html! {
        svg class=(class) viewBox=(format!("0 0 {width} {height}")) role="img" aria-label=(title) {
            @if drawn.is_empty() { text x=(left) y="20" { "nothing to show" } }
            @for tick in up.ticks(5) {
                line.grid x1=(px(left)) x2=(px(right)) y1=(px(at_y(tick.value)))
                    y2=(px(at_y(tick.value))) {}
                text x=(px(left - 8.0)) y=(px(at_y(tick.value))) dy=".35em" text-anchor="end" {
                    (tick.label)
                }
            }
            @for tick in across.ticks(if phone { 3 } else { 6 }) {
                text x=(px(at_x(tick.value))) y=(px(bottom + 18.0)) text-anchor="middle" {
                    (tick.label)
                }
            }
            line.axis x1=(px(left)) x2=(px(right)) y1=(px(bottom)) y2=(px(bottom)) {}
            text x=(px(right)) y=(px(bottom + 38.0)) text-anchor="end" { (x) }
            @for (name, x, y, singled) in drawn {
                circle cx=(px(at_x(*x))) cy=(px(at_y(*y))) r=(if *singled { "6" } else { "4" })
                    style=(format!("fill: var({})", if *singled { "--s1" } else { "--s0" })) {
                    title { (name) ": " (x) ", " (format!("{y:.4}")) }
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
    fn odd_points_are_drawn_without_nonsense() {
        let point = |x, y| ("<a>".to_owned(), x, y, true);
        let cases = [
            vec![],
            vec![point(1.0, 1.0)],
            vec![point(f64::NAN, 1.0), point(1.0, f64::INFINITY)],
            vec![point(-1.0, 0.0), point(5.0, 2.0)],
        ];
        for points in cases {
            let html = render("t", "x", "y", &points).into_string();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
            assert!(!html.contains("<a>"));
        }
        let two = render("t", "x", "y", &[point(1.0, 2.0), point(3.0, 1.0)]).into_string();
        assert_eq!(two.matches("<circle").count(), 2 * 2);
    }
}
