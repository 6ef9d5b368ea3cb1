//! TensorBoard's event files: protocol buffers in frames of TFRecord.
//!
//! A frame is the length (u64), its checksum, the event, its checksum; checksums are CRC-32C,
//! rotated and shifted as TensorFlow does. Of the messages in TensorFlow's `event.proto` and
//! `summary.proto` only scalars and the marks of files and sessions are written.

use crate::error::{Error, Result};
use crate::sft::Metric;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file being written.
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `folder`. Where a run goes on behind `step`, readers forget what earlier files
    /// say of later steps.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn create(folder: &Path, step: usize) -> Result<Self> {
        let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(|e| io(folder, e))?;
        // Readers take files in the order of their names.
        let (seconds, id) = (now() as u64, std::process::id());
        let name = |n: usize| folder.join(format!("events.out.tfevents.{seconds}.smore.{id}.{n}"));
        let mut n = 0;
        while name(n).exists() {
            n += 1;
        }
        let path = name(n);
        let file = File::create(&path).map_err(|e| io(&path, e))?;
        let mut events = Self { path, file };
        let mut version = Vec::new();
        bytes(&mut version, 3, b"brain.Event:2");
        events.event(0, &version)?;
        if step > 0 {
            // SessionLog { status: START }
            let mut session = Vec::new();
            bytes(&mut session, 7, &[0x08, 0x01]);
            events.event(step + 1, &session)?;
        }
        Ok(events)
    }

    /// Adds what a line of `metrics.jsonl` says.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn metric(&mut self, metric: &Metric) -> Result<()> {
        match metric {
            Metric::Step(m) => self.scalars(
                m.step,
                &[
                    ("train/loss", m.loss),
                    ("train/balance_loss", m.balance_loss),
                    ("train/learning_rate", m.learning_rate),
                    ("train/grad_norm", m.grad_norm),
                    ("train/epoch", m.epoch),
                ],
            ),
            Metric::Eval(m) => self.scalars(m.step, &[("eval/loss", m.eval_loss)]),
            Metric::Routers(m) => self.scalars(
                m.step,
                &[
                    ("routers/largest_imbalance", m.imbalance),
                    ("routers/mean_evenness", m.evenness),
                    ("routers/idle_experts", m.idle_experts as f64),
                ],
            ),
            Metric::Alarm(m) => {
                let raised = if m.over { 0.0 } else { 1.0 };
                self.scalars(m.step, &[("routers/alarm", raised)])
            }
        }
    }

    fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        let mut event = Vec::new();
        bytes(&mut event, 5, &summary);
        self.event(step, &event)
    }

    /// Writes an event whose time and step are put before `rest`.
    fn event(&mut self, step: usize, rest: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step as u64);
        event.extend(rest);
        let source = self.file.write_all(&frame(&event));
        source.map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of bytes, a string or a message.
fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn masked(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frame of `abc`, put together by hand from the definition: CRC-32C of the nine digits is
    /// e3069283 by its standard, and the mask is a rotation by 15 and a sum.
    #[test]
    fn frames_are_those_of_tfrecord() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let crc: u32 = 0xe306_9283;
        // 0xe3069283 turned right by 15 bits is 0x2507c60d.
        assert_eq!(crc.rotate_right(15), 0x2507_c60d);
        let mask = 0x2507_c60d_u32.wrapping_add(0xa282_ead8);
        assert_eq!(masked(b"123456789"), mask.to_le_bytes());
        let framed = frame(b"123456789");
        assert_eq!(framed[..8], [9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(framed[12..21], *b"123456789");
        assert_eq!(framed[21..], mask.to_le_bytes());
    }

    #[test]
    fn numbers_are_varints() {
        let mut out = Vec::new();
        varint(&mut out, 300);
        varint(&mut out, 5);
        assert_eq!(out, [0xac, 0x02, 0x05]);
    }
}
