//! One axis of a chart: its range, where a value lies in it, and its ticks.

/// Values beyond this are not drawn: differences and margins would overflow.
pub(super) const LIMIT: f64 = 1e250;
/// Numbers no larger look like 0: the smallest doubles lack digits, and their reciprocals overflow.
const TINY: f64 = 1e-250;

/// The range an axis shows, linear or logarithmic.
#[derive(Debug)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    pub(super) log: bool,
    /// All values are whole numbers (steps), so no tick may lie between two of them.
    whole: bool,
}

/// A mark on an axis.
#[derive(Debug, PartialEq)]
pub(super) struct Tick {
    /// Its value.
    pub(super) value: f64,
    /// What is written beside it.
    pub(super) label: String,
}

impl Axis {
    /// The axis of `values` within [`LIMIT`]. `log` is obeyed if all are positive; `margin` is the share of
    /// the range left free at both ends.
    pub(super) fn new(values: impl Iterator<Item = f64> + Clone, log: bool, margin: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.clone().fold(f64::NEG_INFINITY, f64::max);
        let whole = values.clone().all(|v| v.fract() == 0.0);
        if low > high {
            return Self { low: 0.0, high: 1.0, log: false, whole: false };
        }
        let log = log && low > TINY;
        let mut axis = Self { low, high, log, whole };
        // A constant, up to rounding, gets room on both sides, so that its line is in the middle.
        if high - low <= (1e-12 * low.abs().max(high.abs())).max(TINY) {
            let room = match low.abs() {
                size if size <= TINY => 1.0,
                size if whole && !log => (0.1 * size).max(1.0),
                size => 0.1 * size,
            };
            (axis.low, axis.high) = (low - room, high + room);
        } else {
            axis.widen(margin);
        }
        axis
    }

    fn widen(&mut self, margin: f64) {
        if self.log {
            let room = (self.high.ln() - self.low.ln()) * margin;
            (self.low, self.high) = (self.low * (-room).exp(), self.high * room.exp());
        } else {
            let room = (self.high - self.low) * margin;
            // An axis of quantities that are never negative does not go below zero.
            let floor = if self.low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
            (self.low, self.high) = ((self.low - room).max(floor), self.high + room);
        }
    }

    /// Where a value lies: 0 at the low end, 1 at the high end.
    pub(super) fn share(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.log { x.ln() } else { x };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }

    /// About `count` round values inside the range.
    pub(super) fn ticks(&self, count: usize) -> Vec<Tick> {
        // Over a short range, evenly spaced numbers read better than 1, 2, 5 even if the scale is
        // logarithmic.
        if self.log && self.high / self.low > 8.0 {
            self.log_ticks(count)
        } else {
            self.linear_ticks(count)
        }
    }

    fn linear_ticks(&self, count: usize) -> Vec<Tick> {
        let rough = (self.high - self.low) / count as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = power
            * match rough / power {
                m if m < 1.5 => 1.0,
                m if m < 3.5 => 2.0,
                m if m < 7.5 => 5.0,
                _ => 10.0,
            };
        let step = if self.whole { step.max(1.0) } else { step };
        let largest = self.low.abs().max(self.high.abs());
        let power = (largest >= 1e6 || step < 0.9e-4).then(|| exponent(largest));
        // A range as narrow as rounding leaves a little slack at its ends.
        let first = (self.low / step - 1e-6).ceil() as i64;
        let last = (self.high / step + 1e-6).floor() as i64;
        let tick = |i: i64| {
            let value = i as f64 * step;
            Tick { value, label: label(value, step, power) }
        };
        (first..=last).map(tick).collect()
    }

    fn log_ticks(&self, count: usize) -> Vec<Tick> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().floor() as i32;
        let length = decades.clone().count();
        let factored = self.high >= 1e6 || self.low < 0.9e-4;
        // Over several decades their powers are enough; over very many, every n-th of them.
        let multiples: &[f64] = match self.high / self.low {
            ratio if ratio < 30.0 => &[1.0, 2.0, 5.0],
            ratio if ratio < 1000.0 => &[1.0, 3.0],
            _ => &[1.0],
        };
        let every = if multiples.len() > 1 { 1 } else { length.div_ceil(count + 1) };
        decades
            .step_by(every)
            .flat_map(|d| multiples.iter().map(move |m| (m * 10f64.powi(d), 10f64.powi(d))))
            .filter(|(value, _)| (self.low..=self.high).contains(value))
            .map(|(value, step)| Tick {
                value,
                label: label(value, step, factored.then(|| exponent(value))),
            })
            .collect()
    }
}

/// The power of ten below a number. The addend is for logarithms like that of 1000, which come out
/// a little low.
fn exponent(x: f64) -> i32 {
    (x.abs().log10() + 1e-9).floor() as i32
}

/// `value` with the digits that tell it from its neighbours `step` away, as a multiple of a power
/// of ten if one is given.
fn label(value: f64, step: f64, power: Option<i32>) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let factor = power.unwrap_or(0);
    let decimals = usize::try_from(factor - exponent(step)).unwrap_or(0);
    let multiple = format!("{:.decimals$}", value / 10f64.powi(factor));
    let text = match power {
        None => multiple,
        Some(power) => {
            let raised: String = power.to_string().chars().map(superscript).collect();
            if multiple == "1" { format!("10{raised}") } else { format!("{multiple}×10{raised}") }
        }
    };
    text.replace('-', "\u{2212}")
}

fn superscript(digit: char) -> char {
    match digit {
        '-' => '\u{207b}',
        '1' => '\u{b9}',
        '2' => '\u{b2}',
        '3' => '\u{b3}',
        _ => digit.to_digit(10).and_then(|d| char::from_u32(0x2070 + d)).unwrap_or(digit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool, count: usize) -> Vec<String> {
        let axis = Axis::new(values.iter().copied(), log, 0.0);
        axis.ticks(count).into_iter().map(|t| t.label).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(labels(&[0.0, 873.0], false, 4), ["0", "200", "400", "600", "800"]);
        assert_eq!(
            labels(&[0.501, 0.503], false, 3),
            ["0.5010", "0.5015", "0.5020", "0.5025", "0.5030"]
        );
        assert_eq!(labels(&[-0.6, 0.7], false, 3), ["\u{2212}0.5", "0", "0.5"]);
        assert_eq!(labels(&[0.4, 9.0], true, 4), ["0.5", "1", "2", "5"]);
        assert_eq!(labels(&[1e-3, 1.0], true, 4), ["0.001", "0.01", "0.1", "1"]);
    }

    #[test]
    fn steps_have_no_ticks_between_them() {
        assert_eq!(labels(&[0.0, 1.0, 2.0, 3.0], false, 6), ["0", "1", "2", "3"]);
    }

    #[test]
    fn large_and_small_numbers_factor_out_a_power_of_ten() {
        assert_eq!(labels(&[0.0, 4e6], false, 2), ["0", "2×10⁶", "4×10⁶"]);
        assert_eq!(labels(&[0.0, -1e-5], false, 2), ["−1.0×10⁻⁵", "−0.5×10⁻⁵", "0"]);
        assert_eq!(labels(&[0.0, 2e-5], false, 2), ["0", "10⁻⁵", "2×10⁻⁵"]);
        assert_eq!(labels(&[1e-7, 1e-3], true, 5), ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³"]);
    }

    #[test]
    fn any_range_has_few_ticks_with_different_labels() {
        let ends =
            [-1e249, -7.0, -1e-9, 0.0, 1e-290, 1e-249, 3e-7, 0.1, 0.1 + 1e-10, 1.0, 65536.0, 1e249];
        for (log, count) in [(false, 3), (false, 6), (true, 4)] {
            for (i, &low) in ends.iter().enumerate() {
                for &high in &ends[i..] {
                    let axis = Axis::new([low, high].into_iter(), log, 0.05);
                    let ticks = axis.ticks(count);
                    let case = format!("{low} to {high}, {count}: {ticks:?}");
                    assert!((1..=2 * count + 1).contains(&ticks.len()), "{case}");
                    assert!(ticks.windows(2).all(|t| t[0].label != t[1].label), "{case}");
                    let inside = |t: &Tick| (-1e-5..=1.00001).contains(&axis.share(t.value));
                    assert!(ticks.iter().all(inside), "{case}");
                }
            }
        }
    }

    #[test]
    fn a_value_that_is_not_positive_makes_the_axis_linear() {
        assert!(Axis::new([1.0, 10.0].into_iter(), true, 0.0).log);
        assert!(!Axis::new([0.0, 10.0].into_iter(), true, 0.0).log);
        assert!(!Axis::new([-1.0, 10.0].into_iter(), true, 0.0).log);
    }

    #[test]
    fn a_constant_lies_in_the_middle() {
        for value in [0.0, 0.69, -3.0, 1e-12, 4096.0, 1e249] {
            let axis = Axis::new([value, value].into_iter(), false, 0.05);
            assert!((axis.share(value) - 0.5).abs() < 0.01, "{value}: {axis:?}");
        }
    }
}
