//! Writes Parquet files for tests.

#![allow(dead_code, reason = "every test binary uses its own part")]

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// A column's values with their definition and repetition levels.
type Leaf = (Vec<ByteArray>, Option<Vec<i16>>, Option<Vec<i16>>);

/// Columns of strings, in groups of `group` rows.
pub(crate) fn strings(path: &Path, columns: &[(&str, Vec<String>)], group: usize) {
    let field = |(name, _): &(&str, _)| format!("required binary {name} (UTF8); ");
    let fields = columns.iter().map(field).collect::<Vec<_>>().concat();
    let rows = columns[0].1.len();
    let groups = (0..rows).step_by(group).map(|from| {
        let part = from..rows.min(from + group);
        let leaf = |(_, values): &(&str, Vec<String>)| -> Leaf {
            (values[part.clone()].iter().map(|v| v.as_str().into()).collect(), None, None)
        };
        columns.iter().map(leaf).collect()
    });
    write(path, &fields, groups.collect());
}

/// One column `messages`: for each row a list of (role, content).
pub(crate) fn conversations(path: &Path, rows: &[Vec<(&str, &str)>]) {
    let fields = "optional group messages (LIST) { repeated group list { optional group element { \
                  optional binary role (UTF8); optional binary content (UTF8); } } }";
    let leaf = |pick: &dyn Fn(&(&str, &str)) -> ByteArray| -> Leaf {
        let values: Vec<ByteArray> = rows.iter().flatten().map(pick).collect();
        let repeated = rows.iter().flat_map(|row| (0..row.len()).map(|i| i16::from(i > 0)));
        (values.clone(), Some(vec![4; values.len()]), Some(repeated.collect()))
    };
    write(path, fields, vec![vec![leaf(&|m| m.0.into()), leaf(&|m| m.1.into())]]);
}

fn write(path: &Path, fields: &str, groups: Vec<Vec<Leaf>>) {
    let schema = parse_message_type(&format!("message schema {{ {fields} }}")).unwrap();
    let properties = Arc::new(WriterProperties::builder().build());
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), properties).unwrap();
    for group in groups {
        let mut row_group = writer.next_row_group().unwrap();
        for (values, definition, repetition) in group {
            let mut column = row_group.next_column().unwrap().unwrap();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, definition.as_deref(), repetition.as_deref()).unwrap();
            column.close().unwrap();
        }
        row_group.close().unwrap();
    }
    writer.close().unwrap();
}
