//! Counts as Parquet, and back.

use super::counts::{Counts, LayerCounts};
use super::summary::LayerUsage;
use crate::error::{Error, Result};
use parquet::basic::{Compression, ZstdLevel};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::RowAccessor;
use parquet::schema::parser::parse_message_type;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

const SCHEMA: &str = "message routing {
    required binary split (UTF8);
    required int64 first_step;
    required int64 last_step;
    required binary place (UTF8);
    required int64 tokens;
    required double trees;
    required int64 layer;
    required int64 fanout;
    optional int64 parent;
    required int64 expert;
    required int64 count;
    required double weight;
}";

/// What was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Steps of training.
    Train,
    /// An evaluation.
    HeldOut,
    /// A sample that later traffic is compared with.
    Reference,
    /// A generation.
    Generation,
}

impl Split {
    const ALL: [Self; 4] = [Self::Train, Self::HeldOut, Self::Reference, Self::Generation];

    /// As in the column `split`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "held_out",
            Self::Reference => "reference",
            Self::Generation => "generation",
        }
    }
}

/// What was counted from one step to another.
#[derive(Clone, Debug)]
pub struct Window {
    /// Where.
    pub split: Split,
    /// First and last step.
    pub steps: (usize, usize),
    /// Every layer of every place, layers of a place together, leaves first.
    pub layers: Vec<(LayerUsage, LayerCounts)>,
}

impl Window {
    /// A window of counts.
    pub fn of(split: Split, steps: (usize, usize), counts: &Counts) -> Self {
        let layers = counts.routed().flat_map(|(_, place)| place.layers.iter().cloned());
        Self { split, steps, layers: counts.usage().into_iter().zip(layers).collect() }
    }

    /// Rows of the table.
    pub(crate) fn rows(&self) -> usize {
        self.layers.iter().map(|(_, counts)| counts.count.len()).sum()
    }

    /// Sample `number` of a reference. Parents are left out, which makes it a fifth of the size.
    pub(crate) fn reference(number: usize, counts: &Counts) -> Self {
        let mut window = Self::of(Split::Reference, (number, number), counts);
        for (_, counts) in &mut window.layers {
            (counts.count, counts.weight) = (counts.load(), counts.weights());
            counts.parents = 0;
        }
        window
    }
}

/// Writes windows, in order, as a file of their own.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, windows: &[Window]) -> Result<()> {
    let failed = |e: parquet::errors::ParquetError| Error::Io {
        path: path.to_owned(),
        source: std::io::Error::other(e),
    };
    let io = |source| Error::Io { path: path.to_owned(), source };
    let schema = Arc::new(parse_message_type(SCHEMA).map_err(failed)?);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_created_by(concat!("smore ", env!("CARGO_PKG_VERSION")).to_owned())
        .build();
    let file = File::create(path).map_err(io)?;
    let mut writer =
        SerializedFileWriter::new(file, schema, Arc::new(properties)).map_err(failed)?;
    let mut group = writer.next_row_group().map_err(failed)?;
    let mut number = 0;
    while let Some(mut column) = group.next_column().map_err(failed)? {
        fill(column.untyped(), number, windows).map_err(failed)?;
        column.close().map_err(failed)?;
        number += 1;
    }
    group.close().map_err(failed)?;
    let file = writer.into_inner().map_err(failed)?;
    file.sync_all().map_err(io)
}

/// Writes column `number` of the schema.
fn fill(
    writer: &mut ColumnWriter,
    number: usize,
    windows: &[Window],
) -> parquet::errors::Result<()> {
    // One value for all rows of a layer.
    let layers = || windows.iter().flat_map(|w| w.layers.iter().map(move |layer| (w, layer)));
    let per_layer = |value: &dyn Fn(&Window, &LayerUsage, &LayerCounts) -> i64| -> Vec<i64> {
        layers()
            .flat_map(|(w, (u, c))| std::iter::repeat_n(value(w, u, c), c.count.len()))
            .collect()
    };
    let names = |value: &dyn Fn(&Window, &LayerUsage) -> ByteArray| -> Vec<ByteArray> {
        layers().flat_map(|(w, (u, c))| std::iter::repeat_n(value(w, u), c.count.len())).collect()
    };
    match writer {
        ColumnWriter::ByteArrayColumnWriter(w) => {
            let values = match number {
                0 => names(&|window, _| window.split.name().into()),
                _ => names(&|_, usage| usage.path.as_str().into()),
            };
            w.write_batch(&values, None, None)?;
        }
        ColumnWriter::DoubleColumnWriter(w) => {
            let values: Vec<f64> = match number {
                5 => layers()
                    .flat_map(|(_, (u, c))| std::iter::repeat_n(u.trees, c.count.len()))
                    .collect(),
                _ => layers().flat_map(|(_, (_, c))| c.weight.iter().copied()).collect(),
            };
            w.write_batch(&values, None, None)?;
        }
        ColumnWriter::Int64ColumnWriter(w) => {
            let along = |value: &dyn Fn(usize, &LayerCounts) -> i64| -> Vec<i64> {
                let all = layers().flat_map(|(_, (_, c))| {
                    (0..c.count.len()).map(|i| value(i, c)).collect::<Vec<_>>()
                });
                all.collect()
            };
            let values = match number {
                1 => per_layer(&|window, _, _| window.steps.0 as i64),
                2 => per_layer(&|window, _, _| window.steps.1 as i64),
                4 => per_layer(&|_, usage, _| usage.tokens as i64),
                6 => per_layer(&|_, usage, _| usage.layer as i64),
                7 => per_layer(&|_, _, counts| counts.fanout as i64),
                8 => along(&|i, c| if c.parents > 0 { (i / c.experts) as i64 } else { -1 }),
                9 => along(&|i, c| (i % c.experts) as i64),
                _ => along(&|i, c| c.count[i] as i64),
            };
            if number == 8 {
                let levels: Vec<i16> = values.iter().map(|&v| i16::from(v >= 0)).collect();
                let values: Vec<i64> = values.into_iter().filter(|&v| v >= 0).collect();
                w.write_batch(&values, Some(&levels), None)?;
            } else {
                w.write_batch(&values, None, None)?;
            }
        }
        _ => unreachable!("the schema has no other type"),
    }
    Ok(())
}

/// Reads what [`write()`] wrote.
///
/// # Errors
/// If the file is missing, cut off, or of another kind.
pub fn read(path: &Path) -> Result<Vec<Window>> {
    let bad = |message: String| Error::Adapter { file: path.to_owned(), message };
    let what = "statistics of routing in Parquet";
    let file = File::open(path).map_err(|e| Error::reading(path, what, e))?;
    let broken = |e: parquet::errors::ParquetError| bad(format!("not {what}: {e}"));
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let schema = parse_message_type(SCHEMA).map_err(broken)?;
    if reader.metadata().file_metadata().schema().get_fields() != schema.get_fields() {
        return Err(bad(format!(
            "not {what}: its columns are others; expected those of a run's \
                                folder `routing`"
        )));
    }
    let mut windows: Vec<Window> = Vec::new();
    for row in reader.get_row_iter(None).map_err(broken)? {
        let row = row.map_err(broken)?;
        let text = |i| row.get_string(i).map_err(broken);
        let number = |i| {
            let value = row.get_long(i).map_err(broken)?;
            usize::try_from(value)
                .map_err(|_| bad(format!("a column holds {value}; expected 0 or more")))
        };
        let name = text(0)?;
        let split = Split::ALL.into_iter().find(|s| s.name() == name);
        let split = split.ok_or_else(|| {
            bad(format!("`split` is `{name}`; expected train, held_out, reference or generation"))
        })?;
        let steps = (number(1)?, number(2)?);
        if !windows.last().is_some_and(|w| (w.split, w.steps) == (split, steps)) {
            windows.push(Window { split, steps, layers: Vec::new() });
        }
        let Some(window) = windows.last_mut() else { continue };
        let (place, layer) = (text(3)?, number(6)?);
        if !window.layers.last().is_some_and(|(u, _)| u.path == *place && u.layer == layer) {
            let usage = LayerUsage {
                path: place.clone(),
                layer,
                tokens: number(4)? as u64,
                trees: row.get_double(5).map_err(broken)?,
                ..LayerUsage::default()
            };
            let counts = LayerCounts {
                experts: 0,
                parents: 0,
                fanout: number(7)?,
                count: Vec::new(),
                weight: Vec::new(),
            };
            window.layers.push((usage, counts));
        }
        let Some((_, counts)) = window.layers.last_mut() else { continue };
        if row.get_long(8).is_ok() {
            counts.parents = counts.parents.max(number(8)? + 1);
        }
        counts.experts = counts.experts.max(number(9)? + 1);
        counts.count.push(number(10)? as u64);
        counts.weight.push(row.get_double(11).map_err(broken)?);
    }
    for (usage, counts) in windows.iter_mut().flat_map(|w| &mut w.layers) {
        if counts.count.len() != counts.parents.max(1) * counts.experts || counts.fanout == 0 {
            return Err(bad(format!(
                "layer {} of {} has {} rows for {} experts; expected one for each under each parent",
                usage.layer,
                usage.path,
                counts.count.len(),
                counts.experts
            )));
        }
        let seen = (usage.tokens, usage.trees);
        *usage = LayerUsage::of(&usage.path, usage.layer, seen, counts);
    }
    Ok(windows)
}
