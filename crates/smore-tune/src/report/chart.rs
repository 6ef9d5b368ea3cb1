//! Curves as inline SVG: thin axes, few ticks, names at the end of the lines.

use super::Series;
use maud::{Markup, html};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 38.0;
/// More points than this are averaged: a line has no more pixels.
const POINTS: usize = 600;

pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x_label: &'a str,
    pub(super) y_label: &'a str,
    pub(super) log_y: bool,
    pub(super) series: &'a [Series],
}

/// From values to pixels along one axis.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone, log: bool, from: f64, to: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let log = log && low > 0.0;
        // Nothing to show, or a constant: leave room on both sides.
        let (low, high) = match (low.is_finite(), low < high) {
            (false, _) => (0.0, 1.0),
            (true, true) => (low, high),
            (true, false) if log => (low / 2.0, high * 2.0),
            (true, false) => (low - 1.0, high + 1.0),
        };
        Self { low, high, log, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.log { x.ln() } else { x };
        let share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low));
        self.from + share * (self.to - self.from)
    }

    /// Round values inside the range.
    fn ticks(&self) -> Vec<f64> {
        if self.log && self.high / self.low > 8.0 {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let steps = decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
            return steps.filter(|t| (self.low..=self.high).contains(t)).collect();
        }
        let rough = (self.high - self.low) / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&s| s >= rough);
        let step = step.unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).take(20).map(|i| i as f64 * step).collect()
    }
}

pub(super) fn render(chart: &Chart) -> Markup {
    let lines: Vec<Vec<(f64, f64)>> = chart.series.iter().map(|s| thinned(&s.points)).collect();
    let all = lines.iter().flatten();
    let x = Axis::new(all.clone().map(|p| p.0), false, LEFT, WIDTH - RIGHT);
    let y = Axis::new(all.map(|p| p.1), chart.log_y, HEIGHT - BOTTOM, TOP);
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(chart.title) {
            (axes(chart, &x, &y))
            @for (i, line) in lines.iter().enumerate() {
                @let colour = format!("var(--s{})", i % 5);
                @if let [(px, py)] = line[..] {
                    circle cx=(pixel(x.at(px))) cy=(pixel(y.at(py))) r="3" fill=(colour) {}
                } @else if !line.is_empty() {
                    polyline.curve points=(path(line, &x, &y)) stroke=(colour) {}
                }
            }
            (legend(chart, &lines, &y))
        }
    }
}

fn axes(chart: &Chart, x: &Axis, y: &Axis) -> Markup {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    html! {
        @for tick in y.ticks() {
            @let at = pixel(y.at(tick));
            line.axis x1=(LEFT) x2=(right) y1=(at) y2=(at) {}
            text x=(LEFT - 8.0) y=(at) dy=".32em" text-anchor="end" { (number(tick)) }
        }
        line.axis x1=(LEFT) x2=(right) y1=(bottom) y2=(bottom) {}
        @for tick in x.ticks() {
            text x=(pixel(x.at(tick))) y=(bottom + 18.0) text-anchor="middle" { (number(tick)) }
        }
        text x=(right) y=(HEIGHT - 4.0) text-anchor="end" { (chart.x_label) }
        text x="0" y="12" {
            (chart.y_label) @if y.log { ", logarithmic" }
        }
    }
}

/// Names beside the last points, moved apart where they would overlap.
fn legend(chart: &Chart, lines: &[Vec<(f64, f64)>], y: &Axis) -> Markup {
    let mut places: Vec<(f64, usize)> = lines
        .iter()
        .enumerate()
        .map(|(i, line)| (line.last().map_or(HEIGHT - BOTTOM, |p| y.at(p.1)), i))
        .collect();
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    for i in 1..places.len() {
        places[i].0 = places[i].0.max(places[i - 1].0 + 15.0);
    }
    html! {
        @for (at, i) in places {
            @let style = format!("fill: var(--s{})", i % 5);
            text x=(WIDTH - RIGHT + 8.0) y=(pixel(at)) dy=".32em" style=(style) {
                (chart.series[i].name)
            }
        }
    }
}

fn path(line: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let point = |&(px, py): &(f64, f64)| format!("{},{}", pixel(x.at(px)), pixel(y.at(py)));
    line.iter().map(point).collect::<Vec<_>>().join(" ")
}

/// The finite points, averaged in buckets where there are many; the ends stay.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    if finite.len() <= POINTS {
        return finite;
    }
    let (first, last) = (finite[0], finite[finite.len() - 1]);
    let size = finite.len().div_ceil(POINTS);
    let mean = |c: &[(f64, f64)]| {
        let n = c.len() as f64;
        (c.iter().map(|p| p.0).sum::<f64>() / n, c.iter().map(|p| p.1).sum::<f64>() / n)
    };
    let middle = finite[1..finite.len() - 1].chunks(size).map(mean);
    std::iter::once(first).chain(middle).chain([last]).collect()
}

fn pixel(x: f64) -> String {
    format!("{x:.1}")
}

fn number(x: f64) -> String {
    let text = if x.abs() >= 0.001 || x == 0.0 { format!("{x:.4}") } else { format!("{x:.1e}") };
    if text.contains('e') || !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_ends_and_the_mean() {
        let points: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= POINTS + 2);
        assert_eq!((thin[0], thin[thin.len() - 1]), (points[0], points[4999]));
        let mean = thin.iter().map(|p| p.1).sum::<f64>() / thin.len() as f64;
        assert!((mean - 0.5).abs() < 0.1, "{mean}");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::new([0.0, 873.0].into_iter(), false, 0.0, 1.0);
        assert_eq!(axis.ticks(), [0.0, 500.0]);
        let axis = Axis::new([0.03, 9.0].into_iter(), true, 0.0, 1.0);
        assert_eq!(axis.ticks(), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]);
        assert_eq!(number(0.25), "0.25");
        assert_eq!(number(500.0), "500");
    }
}
