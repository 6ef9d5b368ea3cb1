//! Tables and numbers for people.

pub(crate) use smore_tune::run_report::thousands as count;

/// Prints rows under a header, columns aligned: the first to the left, the others to the right.
pub(crate) fn print(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().map(|r| r[column].chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(i, (cell, &w))| {
            if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }
        });
        println!("  {}", padded.collect::<Vec<_>>().join("   ").trim_end());
    };
    line(header.to_vec());
    let rule: Vec<String> = widths.iter().map(|&w| "\u{2500}".repeat(w)).collect();
    line(rule.iter().map(String::as_str).collect());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// Bytes in MiB or GiB; a dash where the system does not say.
pub(crate) fn bytes(n: u64) -> String {
    let mib = n as f64 / f64::from(1 << 20);
    match n {
        0 => "\u{2013}".into(),
        _ if mib < 1000.0 => format!("{mib:.0} MiB"),
        _ => format!("{:.2} GiB", mib / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(7), "7");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(123_456), "123,456");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
    }
}
