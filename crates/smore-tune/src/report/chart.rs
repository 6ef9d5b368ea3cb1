//! Curves as inline SVG: thin axes, few ticks, names at the end of the lines.

use super::Series;
use super::axis::{Axis, LIMIT};
use maud::{Markup, html};

/// More points than this are averaged: a line has no more pixels.
const POINTS: usize = 600;
/// Colours `--s0` to `--s6` of the style sheet.
const COLOURS: usize = 7;
/// A name needs this much height.
const LINE: f64 = 16.0;

/// What [`render`] draws.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x_label: &'a str,
    pub(super) y_label: &'a str,
    pub(super) log_y: bool,
    pub(super) series: &'a [Series],
}

/// A chart with its points thinned and its axes found.
struct Plot<'a> {
    chart: &'a Chart<'a>,
    lines: Vec<Vec<(f64, f64)>>,
    x: Axis,
    y: Axis,
}

/// The page of one size of a drawing, in pixels; the margins are around the area of the curves.
struct Frame {
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    x_ticks: usize,
    y_ticks: usize,
    /// Names stand at the ends of the lines.
    direct: bool,
}

const TOP: f64 = 8.0;
const BOTTOM: f64 = 42.0;

/// The curves in two sizes, of which the style sheet shows the one that fits the screen: a drawing
/// scaled down to a phone would have letters too small to read.
pub(super) fn render(chart: &Chart) -> Markup {
    let lines: Vec<Vec<(f64, f64)>> = chart.series.iter().map(|s| thinned(&s.points)).collect();
    let x = Axis::new(lines.iter().flatten().map(|p| p.0), false, 0.0);
    let y = Axis::new(lines.iter().flatten().map(|p| p.1), chart.log_y, 0.05);
    let plot = Plot { chart, lines, x, y };
    let wide = plot.frame(false);
    html! {
        ul.key.phone[wide.direct] {
            @for (i, series) in chart.series.iter().enumerate() {
                li {
                    svg.swatch width="18" height="8" aria-hidden="true" {
                        line.curve x1="1" x2="17" y1="4" y2="4" style=(stroke(i))
                            stroke-dasharray=[dashes(i)] {}
                    }
                    (plot.name(i, series))
                }
            }
        }
        p.quantity { (chart.y_label) @if plot.y.log { " (log scale)" } }
        (plot.draw(&wide, "chart wide"))
        (plot.draw(&plot.frame(true), "chart phone"))
    }
}

impl Plot<'_> {
    fn frame(&self, phone: bool) -> Frame {
        let (width, height, x_ticks, y_ticks) =
            if phone { (360.0, 250.0, 3, 4) } else { (800.0, 320.0, 6, 5) };
        // Letters have no known width here; seven pixels is that of a wide one.
        let size = |text: &str| 7.0 * text.chars().count() as f64;
        let labels = self.y.ticks(y_ticks).iter().map(|t| size(&t.label)).fold(0.0, f64::max);
        let names = self.chart.series.iter().enumerate().map(|(i, s)| size(&self.name(i, s)));
        let names = names.fold(0.0, f64::max);
        let fits = names <= 180.0 && self.lines.len() as f64 * LINE <= height - TOP - BOTTOM;
        let direct = !phone && fits;
        let right = if direct { names + 30.0 } else { 16.0 };
        Frame { width, height, left: labels + 12.0, right, x_ticks, y_ticks, direct }
    }

    fn name(&self, i: usize, series: &Series) -> String {
        if self.lines[i].is_empty() {
            format!("{} (no points)", series.name)
        } else {
            series.name.clone()
        }
    }

    fn draw(&self, frame: &Frame, class: &str) -> Markup {
        let names: Vec<&str> = self.chart.series.iter().map(|s| s.name.as_str()).collect();
        let Chart { title, x_label, y_label, .. } = self.chart;
        let said = format!("{title}: {y_label} by {x_label}; {}", names.join(", "));
        let (width, height) = (frame.width, frame.height);
        html! {
            svg class=(class) viewBox=(format!("0 0 {width} {height}")) role="img"
                aria-label=(said) {
                (self.axes(frame))
                @for (i, line) in self.lines.iter().enumerate() {
                    @let pixels: Vec<_> = line.iter().map(|&p| self.at(frame, p)).collect();
                    @if let [(x, y)] = pixels[..] {
                        circle cx=(pixel(x)) cy=(pixel(y)) r="3.5" style=(fill(i)) {}
                    } @else if !pixels.is_empty() {
                        polyline.curve points=(path(&pixels)) style=(stroke(i))
                            stroke-dasharray=[dashes(i)] {}
                    }
                }
                @if frame.direct { (self.names(frame)) }
            }
        }
    }

    /// From a point to pixels.
    fn at(&self, frame: &Frame, (x, y): (f64, f64)) -> (f64, f64) {
        let (right, bottom) = (frame.width - frame.right, frame.height - BOTTOM);
        let across = frame.left + self.x.share(x) * (right - frame.left);
        (across, bottom - self.y.share(y) * (bottom - TOP))
    }

    fn axes(&self, frame: &Frame) -> Markup {
        let (left, right, bottom) = (frame.left, frame.width - frame.right, frame.height - BOTTOM);
        let empty = self.lines.iter().all(Vec::is_empty);
        html! {
            @if empty {
                text x=(pixel(f64::midpoint(left, right))) y=(pixel(bottom / 2.0))
                    text-anchor="middle" { "nothing to show" }
            } @else {
                @for tick in self.y.ticks(frame.y_ticks) {
                    @let y = self.at(frame, (0.0, tick.value)).1;
                    line.grid x1=(left) x2=(right) y1=(pixel(y)) y2=(pixel(y)) {}
                    text x=(left - 10.0) y=(pixel(y)) dy=".35em" text-anchor="end" { (tick.label) }
                }
                @for tick in self.x.ticks(frame.x_ticks) {
                    @let x = pixel(self.at(frame, (tick.value, 1.0)).0);
                    line.axis x1=(x) x2=(x) y1=(bottom) y2=(bottom + 4.0) {}
                    text x=(x) y=(bottom + 18.0) text-anchor="middle" { (tick.label) }
                }
            }
            line.axis x1=(left) x2=(right) y1=(bottom) y2=(bottom) {}
            text x=(right) y=(bottom + 36.0) text-anchor="end" { (self.chart.x_label) }
        }
    }

    /// Names beside the last points, moved apart where they would overlap.
    fn names(&self, frame: &Frame) -> Markup {
        let bottom = frame.height - BOTTOM;
        let end = |line: &Vec<(f64, f64)>| line.last().map_or(bottom, |&p| self.at(frame, p).1);
        let mut places: Vec<(usize, f64)> = self.lines.iter().map(end).enumerate().collect();
        places.sort_by(|a, b| a.1.total_cmp(&b.1));
        move_apart(&mut places, TOP, bottom - LINE / 2.0);
        let left = frame.width - frame.right + 8.0;
        html! {
            @for (i, y) in places {
                line.curve x1=(pixel(left)) x2=(pixel(left + 10.0)) y1=(pixel(y)) y2=(pixel(y))
                    style=(stroke(i)) {}
                text.name x=(pixel(left + 16.0)) y=(pixel(y)) dy=".35em" {
                    (self.name(i, &self.chart.series[i]))
                }
            }
        }
    }
}

/// Moves heights, which rise, to at least a line's distance within the two bounds.
fn move_apart(places: &mut [(usize, f64)], top: f64, bottom: f64) {
    let mut least = top;
    for place in places.iter_mut() {
        place.1 = place.1.max(least);
        least = place.1 + LINE;
    }
    let mut most = bottom;
    for place in places.iter_mut().rev() {
        place.1 = place.1.min(most);
        most = place.1 - LINE;
    }
}

/// The points that can be drawn, averaged in buckets where there are many; the ends stay.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let drawable = |p: &(f64, f64)| p.0.abs() < LIMIT && p.1.abs() < LIMIT;
    let drawn: Vec<(f64, f64)> = points.iter().copied().filter(drawable).collect();
    let [first, middle @ .., last] = &drawn[..] else { return drawn };
    if drawn.len() <= POINTS {
        return drawn;
    }
    let buckets = POINTS - 2;
    let mean = |i: usize| {
        let range = i * middle.len() / buckets..(i + 1) * middle.len() / buckets;
        let share = 1.0 / range.len() as f64;
        middle[range].iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0 * share, sum.1 + p.1 * share))
    };
    std::iter::once(*first).chain((0..buckets).map(mean)).chain([*last]).collect()
}

fn path(pixels: &[(f64, f64)]) -> String {
    let point = |&(x, y): &(f64, f64)| format!("{},{}", pixel(x), pixel(y));
    pixels.iter().map(point).collect::<Vec<_>>().join(" ")
}

fn pixel(x: f64) -> String {
    format!("{x:.1}")
}

fn stroke(i: usize) -> String {
    format!("stroke: var(--s{})", i % COLOURS)
}

fn fill(i: usize) -> String {
    format!("fill: var(--s{})", i % COLOURS)
}

/// Tells curves apart that share a colour.
fn dashes(i: usize) -> Option<&'static str> {
    match i / COLOURS % 3 {
        0 => None,
        1 => Some("6 4"),
        _ => Some("1 4"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawing(series: &[Series]) -> String {
        let chart = Chart { title: "t", x_label: "x", y_label: "y", log_y: true, series };
        render(&chart).into_string()
    }

    /// The points of every line of the wide drawing.
    fn lines(html: &str) -> Vec<Vec<(f64, f64)>> {
        let wide = html.split("<svg class=\"chart phone\"").next().unwrap();
        let paths = wide.split("points=\"").skip(1).map(|s| s.split('"').next().unwrap());
        let number = |s: &str| s.parse::<f64>().unwrap();
        let point = |s: &str| s.split_once(',').map(|(x, y)| (number(x), number(y))).unwrap();
        paths.map(|path| path.split(' ').map(point).collect()).collect()
    }

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    #[test]
    fn a_constant_is_a_visible_line() {
        let html = drawing(&[series("flat", &[(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)])]);
        let line = &lines(&html)[0];
        assert_eq!(line.len(), 3);
        assert!(line.iter().all(|p| p.1 == line[0].1 && p.1 > 50.0 && p.1 < 270.0), "{line:?}");
        assert!(line[2].0 - line[0].0 > 500.0, "{line:?}");
    }

    #[test]
    fn a_single_point_is_a_dot() {
        let html = drawing(&[series("one", &[(7.0, 0.3)])]);
        assert_eq!(html.matches("<circle").count(), 2);
        assert!(lines(&html).is_empty());
    }

    #[test]
    fn points_that_are_not_finite_are_skipped() {
        let nan = f64::NAN;
        let points = [(0.0, 1.0), (1.0, nan), (nan, 2.0), (3.0, f64::INFINITY), (4.0, 3.0)];
        let html = drawing(&[series("holes", &points)]);
        assert_eq!(lines(&html)[0].len(), 2);
    }

    #[test]
    fn a_falling_curve_falls() {
        let html = drawing(&[series("loss", &[(0.0, 3.0), (10.0, 0.5)])]);
        let line = &lines(&html)[0];
        assert!(line[0].0 < line[1].0 && line[0].1 < line[1].1, "{line:?}");
    }

    #[test]
    fn every_name_is_written_and_many_or_long_ones_only_in_the_key() {
        let point = [(0.0, 1.0), (1.0, 2.0)];
        let few: Vec<_> = (0..3).map(|i| series(&format!("run <{i}>"), &point)).collect();
        let html = drawing(&few);
        for i in 0..3 {
            assert_eq!(html.matches(&format!(">run &lt;{i}&gt;<")).count(), 2, "key and line");
        }
        let many: Vec<_> = (0..30).map(|i| series(&format!("run {i};"), &point)).collect();
        let html = drawing(&many);
        assert!(!html.contains("class=\"name\"") && !html.contains("key phone"));
        assert!((0..30).all(|i| html.contains(&format!("</svg>run {i};</li>"))));
        let long = drawing(&[series(&"long ".repeat(20), &point)]);
        assert!(!long.contains("class=\"name\"") && !long.contains("key phone"));
        assert!(drawing(&[series("none", &[])]).contains("none (no points)"));
    }

    #[test]
    fn names_move_apart_and_stay_inside() {
        let mut places = vec![(0, 2.0), (1, 100.0), (2, 101.0), (3, 300.0), (4, 300.0)];
        move_apart(&mut places, 10.0, 290.0);
        let heights: Vec<f64> = places.iter().map(|p| p.1).collect();
        assert_eq!(heights, [10.0, 100.0, 116.0, 274.0, 290.0]);
    }

    #[test]
    fn thinning_keeps_the_ends_and_the_mean() {
        for n in [601, 5000, 100_000] {
            let points: Vec<(f64, f64)> =
                (0..n).map(|i| (f64::from(i), f64::from(i * 7 % 10))).collect();
            let thin = thinned(&points);
            assert_eq!(thin.len(), POINTS);
            assert_eq!((thin[0], thin[POINTS - 1]), (points[0], points[points.len() - 1]));
            assert!(thin.windows(2).all(|p| p[0].0 < p[1].0));
            let mean = thin.iter().map(|p| p.1).sum::<f64>() / thin.len() as f64;
            assert!((mean - 4.5).abs() < 0.1, "{mean}");
        }
        let short: Vec<(f64, f64)> = (0..600).map(|i| (f64::from(i), 0.5)).collect();
        assert_eq!(thinned(&short), short);
    }
}
