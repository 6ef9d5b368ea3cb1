//! The self-contained page of a run: tables, curves and heat maps in one HTML file that needs no
//! network and no script, and reads well in light and dark.

mod axis;
mod chart;
mod heat;
mod interval;
mod page;
mod scatter;

pub(crate) use page::interactive;

use crate::error::{Error, Result};
use std::io::Write;
use std::path::Path;

/// A page: a title and what follows it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// A line below the title; may be empty.
    pub subtitle: String,
    /// What it shows, in order.
    pub sections: Vec<Section>,
}

/// A part of a page.
#[derive(Clone, Debug)]
pub enum Section {
    /// Words.
    Text {
        /// Heading.
        heading: String,
        /// Paragraphs.
        paragraphs: Vec<String>,
    },
    /// The few numbers that matter most, large.
    Cards {
        /// The cards.
        cards: Vec<Card>,
    },
    /// What was asked and answered, text by text.
    Exchanges {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// For each question, names and texts.
        rows: Vec<Vec<(String, String)>>,
    },
    /// A table; the first column is read as names, the others as numbers.
    Table {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// Column heads.
        columns: Vec<String>,
        /// Cells, row by row.
        rows: Vec<Vec<String>>,
    },
    /// Curves over one axis.
    Curves {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// What runs to the right.
        x_label: String,
        /// What runs upwards.
        y_label: String,
        /// Logarithmic upwards; linear all the same if a value is not positive.
        log_y: bool,
        /// The curves.
        series: Vec<Series>,
    },
    /// A matrix of numbers, coloured from 0 to the largest; negative ones look like 0.
    HeatMap {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// Row names.
        rows: Vec<String>,
        /// Column names.
        columns: Vec<String>,
        /// Values, row by row.
        values: Vec<Vec<f64>>,
    },
    /// Points in a plane, some singled out.
    Scatter {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// What runs to the right.
        x_label: String,
        /// What runs upwards.
        y_label: String,
        /// Name, place, and whether it is singled out.
        points: Vec<(String, f64, f64, bool)>,
    },
    /// Numbers with intervals, one below the other, with a line at zero.
    Intervals {
        /// Heading.
        heading: String,
        /// What to know before reading it; may be empty.
        note: String,
        /// What the numbers count.
        unit: String,
        /// Name, number and half of its interval, which may be infinite.
        rows: Vec<(String, f64, f64)>,
    },
}

/// A number that matters.
#[derive(Clone, Debug)]
pub struct Card {
    /// What it is.
    pub label: String,
    /// The number, or a word.
    pub value: String,
    /// What it is held against; may be empty.
    pub note: String,
    /// Whether it is good or bad.
    pub tone: Tone,
}

/// How a card is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// To be looked at.
    Bad,
    /// Neither.
    Plain,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its points, by rising x. Those that are not finite are left out; of very many, averages
    /// of neighbours are drawn.
    pub points: Vec<(f64, f64)>,
}

impl Report {
    /// The page as HTML.
    pub fn render(&self) -> String {
        page::render(self).into_string()
    }

    /// Writes the page, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        // Of a bare file name the parent is the empty path, which no folder has.
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let mut file = builder().tempfile_in(folder.unwrap_or(Path::new("."))).map_err(failed)?;
        file.write_all(self.render().as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

/// Temporary files are private unless told otherwise; a report is as readable as any new file.
#[cfg(unix)]
fn builder() -> tempfile::Builder<'static, 'static> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    builder.permissions(std::fs::Permissions::from_mode(0o666));
    builder
}

#[cfg(not(unix))]
fn builder() -> tempfile::Builder<'static, 'static> {
    tempfile::Builder::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(series: Vec<Series>) -> Section {
        Section::Curves {
            heading: "Held-out loss".into(),
            note: "Lower is better.".into(),
            x_label: "step".into(),
            y_label: "nats per token".into(),
            log_y: true,
            series,
        }
    }

    fn curve(name: &str, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.into(), points }
    }

    fn page(sections: Vec<Section>) -> Report {
        Report { title: "a <b> & c".into(), subtitle: "of <today>".into(), sections }
    }

    #[test]
    fn everything_is_escaped_and_self_contained() {
        let bad = || "<script src='http://x'>".to_owned();
        let html = page(vec![
            Section::Text { heading: bad(), paragraphs: vec![bad()] },
            Section::Cards {
                cards: vec![Card { label: bad(), value: bad(), note: bad(), tone: Tone::Bad }],
            },
            Section::Exchanges { heading: bad(), note: bad(), rows: vec![vec![(bad(), bad())]] },
            Section::Table {
                heading: bad(),
                note: bad(),
                columns: vec![bad()],
                rows: vec![vec![bad(), bad()]],
            },
            section(vec![curve(&bad(), vec![(0.0, 1.0), (1.0, 2.0)])]),
            Section::HeatMap {
                heading: bad(),
                note: bad(),
                rows: vec![bad()],
                columns: vec![bad()],
                values: vec![vec![1.0]],
            },
            Section::Scatter {
                heading: bad(),
                note: bad(),
                x_label: bad(),
                y_label: bad(),
                points: vec![(bad(), 1.0, 2.0, true)],
            },
            Section::Intervals {
                heading: bad(),
                note: bad(),
                unit: bad(),
                rows: vec![(bad(), 1.0, 0.5)],
            },
        ])
        .render();
        assert!(html.contains("<h1>a &lt;b&gt; &amp; c</h1>") && html.contains("of &lt;today&gt;"));
        for forbidden in ["<script", "<link", "<img", " src=", " href=", "url(", "@import"] {
            // What is left of the text above is harmless once its `<` is gone.
            let html = html.replace("&lt;script src=", "");
            assert!(!html.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn odd_curves_are_drawn_without_nonsense() {
        let tiny = f64::MIN_POSITIVE / 1024.0;
        let odd = [
            vec![],
            vec![(1.0, 1.0)],
            vec![(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)],
            vec![(0.0, f64::NAN), (1.0, f64::INFINITY), (2.0, 1.0), (3.0, 0.0)],
            vec![(f64::NAN, f64::NAN)],
            vec![(0.0, -3.0), (5.0, 1e-9)],
            vec![(0.0, tiny), (1.0, 1.0)],
            vec![(0.0, tiny), (tiny, tiny)],
            vec![(0.0, f64::MAX), (1.0, f64::MIN), (2.0, 1e249), (3.0, -1e249)],
            vec![(5.0, 1.0), (5.0, 2.0), (5.0, 3.0)],
        ];
        for points in odd {
            for others in [vec![], vec![curve("none", vec![])]] {
                let mut series = vec![curve("first", points.clone())];
                series.extend(others);
                let html = page(vec![section(series)]).render();
                assert!(!html.contains("NaN") && !html.contains("inf"), "{points:?}");
                assert!(html.contains("first"));
            }
        }
        assert!(page(vec![section(vec![])]).render().contains("nothing to show"));
    }

    #[test]
    fn tables_have_row_heads_and_cells() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let table = |columns| Section::Table {
            heading: "Result".into(),
            note: String::new(),
            columns,
            rows: vec![row("steps", "300"), row("tokens", "1,000")],
        };
        let html = page(vec![table(row("", ""))]).render();
        assert_eq!((html.matches("<td>").count(), html.matches("scope=\"row\"").count()), (2, 2));
        assert!(!html.contains("<thead>") && !html.contains("<figcaption>"));
        assert!(page(vec![table(row("", "value"))]).render().contains(">value</th>"));
    }

    #[test]
    fn writes_over_an_old_page() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.html");
        std::fs::write(&path, "old").unwrap();
        let report = page(vec![]);
        report.write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), report.render());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_names_the_file() {
        let path = tempfile::tempdir().unwrap().path().join("gone/report.html");
        let error = page(vec![]).write(&path).unwrap_err();
        assert!(matches!(error, Error::Io { path: p, .. } if p == path));
    }
}
