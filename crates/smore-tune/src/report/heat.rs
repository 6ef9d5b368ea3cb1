//! A matrix as a table of coloured cells.

use maud::{Markup, html};

/// One cell per value, coloured from nothing at 0 to full at the largest value.
pub(super) fn render(rows: &[String], columns: &[String], values: &[Vec<f64>]) -> Markup {
    let finite = || values.iter().flatten().copied().filter(|v| v.is_finite());
    let largest = finite().fold(0.0, f64::max);
    let whole = finite().all(|v| v.fract() == 0.0);
    let size = finite().fold(0.0, |size: f64, v| size.max(v.abs()));
    html! {
        table.heat {
            thead { tr { td.corner {} @for column in columns { th scope="col" { (column) } } } }
            tbody {
                @for (i, values) in values.iter().enumerate() {
                    tr {
                        th scope="row" { (rows.get(i).map_or("", String::as_str)) }
                        @for &value in values {
                            @if value.is_finite() {
                                td.cell style=(format!("--v: {:.3}", share(value, largest))) {
                                    (written(value, size, whole))
                                }
                            } @else {
                                td.missing { "\u{2013}" }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn share(value: f64, largest: f64) -> f64 {
    if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 }
}

/// A value with the same number of decimals as its neighbours; `size` is that of the largest.
fn written(value: f64, size: f64, whole: bool) -> String {
    if size >= 1e6 || (size < 1e-4 && size > 0.0) {
        return format!("{value:.1e}");
    }
    let decimals = match size {
        _ if whole => 0,
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 0.1 => 2,
        _ => (1.0 - size.log10().floor()) as usize,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_cell_for_every_value() {
        let values = [vec![0.0, 0.5, 1.0], vec![0.25, f64::NAN, 0.75], vec![-1.0]];
        let html = render(&["a".into()], &["x".into()], &values).into_string();
        assert_eq!(html.matches("<td class=\"cell\"").count(), 6);
        assert_eq!(html.matches("<td class=\"missing\"").count(), 1);
        assert!(html.contains("--v: 0.750\">0.75</td>"));
        assert!(html.contains("--v: 0.000\">-1.00</td>"));
    }

    #[test]
    fn odd_matrices_are_drawn() {
        for values in [vec![], vec![vec![]], vec![vec![0.0; 2]], vec![vec![f64::NAN]]] {
            let html = render(&["r".into()], &[], &values).into_string();
            assert!(!html.contains("NaN"), "{values:?}");
        }
    }

    #[test]
    fn decimals_suit_the_size() {
        assert_eq!(written(0.5, 1.0, false), "0.50");
        assert_eq!(written(0.012, 0.05, false), "0.012");
        assert_eq!(written(12.34, 56.0, false), "12.3");
        assert_eq!(written(12.0, 900.0, true), "12");
        assert_eq!(written(1.5e7, 2e7, false), "1.5e7");
    }
}
