//! The self-contained page of a run: tables, curves and heat maps in one HTML file that needs no
//! network and no script, and reads well in light and dark.

mod chart;
mod page;

use crate::error::{Error, Result};
use std::io::Write;
use std::path::Path;

/// A page.
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
        /// Logarithmic upwards, where all values are positive.
        log_y: bool,
        /// The curves.
        series: Vec<Series>,
    },
    /// A matrix of numbers from 0 up, coloured by size.
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
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its points, by rising x. Those that are not finite are left out.
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
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(self.render().as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let open = std::fs::Permissions::from_mode(0o644);
            file.as_file().set_permissions(open).map_err(failed)?;
        }
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curves(points: Vec<(f64, f64)>) -> Report {
        let series = vec![
            Series { name: "first".into(), points },
            Series { name: "none".into(), points: vec![] },
        ];
        Report {
            title: "a <b> & c".into(),
            subtitle: String::new(),
            sections: vec![Section::Curves {
                heading: "h".into(),
                note: String::new(),
                x_label: "step".into(),
                y_label: "loss".into(),
                log_y: true,
                series,
            }],
        }
    }

    #[test]
    fn is_escaped_and_self_contained() {
        let html = curves(vec![(0.0, 1.0), (1.0, 2.0)]).render();
        assert!(html.contains("a &lt;b&gt; &amp; c"));
        assert!(html.contains("first") && html.contains("none"));
        for forbidden in ["<script", "src=", "href=", "url("] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn odd_curves_are_drawn_without_nonsense() {
        let odd = [
            vec![],
            vec![(1.0, 1.0)],
            vec![(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)],
            vec![(0.0, f64::NAN), (1.0, f64::INFINITY), (2.0, 1.0), (3.0, 0.0)],
            vec![(0.0, -3.0), (5.0, 1e-9)],
        ];
        for points in odd {
            let html = curves(points.clone()).render();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{points:?}");
        }
    }

    #[test]
    fn heat_maps_have_a_cell_for_every_value() {
        let report = Report {
            title: "t".into(),
            subtitle: "s".into(),
            sections: vec![Section::HeatMap {
                heading: "h".into(),
                note: "n".into(),
                rows: vec!["a".into(), "b".into()],
                columns: vec!["x".into(), "y".into(), "z".into()],
                values: vec![vec![0.0, 0.5, 1.0], vec![0.25, f64::NAN, 0.75]],
            }],
        };
        assert_eq!(report.render().matches("<td").count(), 6);
    }

    #[test]
    fn writes_over_an_old_page() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.html");
        std::fs::write(&path, "old").unwrap();
        curves(vec![(0.0, 1.0)]).write(&path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("<!DOCTYPE html>"));
    }
}
