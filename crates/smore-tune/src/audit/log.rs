//! The file: appended to under a lock and synced, read with every fault named.

use super::{GENESIS, Record};
use crate::checkpoint::manifest::hex;
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// In front of a line's hash.
const HASH: &str = ",\"hash\":\"";

/// The end of a chain.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Head {
    /// Number of the last record; 0 in an empty log.
    pub number: u64,
    /// Its hash; [`GENESIS`] in an empty log.
    pub hash: String,
}

/// A log that is appended to.
pub struct Log {
    path: PathBuf,
}

impl Log {
    /// Opens a log, or begins one, and checks that it can be continued.
    ///
    /// # Errors
    /// If it cannot be written, ends in half a line, or its last record is not what was written.
    pub fn open(path: &Path) -> Result<Self> {
        let log = Self { path: path.to_owned() };
        let mut file = log.locked()?;
        log.head(&mut file)?;
        Ok(log)
    }

    /// Gives the record its place in the chain, appends it and waits until it is on the disk.
    /// Several programs may append to one log.
    ///
    /// # Errors
    /// As [`Log::open`].
    pub fn append(&self, mut record: Record) -> Result<Head> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut file = self.locked()?;
        let before = self.head(&mut file)?;
        record.number = before.number + 1;
        record.previous = before.hash;
        let (line, hash) = line(&record)?;
        file.write_all(line.as_bytes()).map_err(io)?;
        file.sync_all().map_err(io)?;
        if before.number == 0 {
            // A new file's name must last too.
            let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new("."))).and_then(|f| f.sync_all()).map_err(io)?;
        }
        Ok(Head { number: record.number, hash })
    }

    /// The file, held alone until it is closed.
    fn locked(&self) -> Result<File> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(&self.path).map_err(io)?;
        file.lock().map_err(io)?;
        Ok(file)
    }

    /// The end of the chain, as its last line has it.
    fn head(&self, file: &mut File) -> Result<Head> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let last = last_line(file).map_err(io)?;
        if last.is_empty() {
            return Ok(Head { number: 0, hash: GENESIS.to_owned() });
        }
        let wrong = |what: &str| {
            Err(Error::Run(format!(
                "{}: {what}; nothing is added to it. See `smore audit verify`, keep the file as it \
                 is and begin a new log",
                self.path.display()
            )))
        };
        let Some(line) = last.strip_suffix(b"\n") else {
            return wrong("ends in half a line, so a write was cut off");
        };
        match parse(line) {
            Ok((record, hash)) => Ok(Head { number: record.number, hash }),
            Err(fault) => wrong(&format!("its last line {fault}")),
        }
    }
}

/// The last line with its line break, or what follows the last line break; empty for no file.
fn last_line(file: &mut File) -> std::io::Result<Vec<u8>> {
    let (mut tail, mut at) = (Vec::new(), file.seek(SeekFrom::End(0))?);
    while at > 0 {
        let n = at.min(1 << 16);
        at -= n;
        file.seek(SeekFrom::Start(at))?;
        let mut piece = vec![0; n as usize];
        file.read_exact(&mut piece)?;
        piece.extend_from_slice(&tail);
        tail = piece;
        let inner = &tail[..tail.len() - 1];
        if let Some(end) = inner.iter().rposition(|&b| b == b'\n') {
            return Ok(tail.split_off(end + 1));
        }
    }
    Ok(tail)
}

/// A record's line and its hash.
fn line(record: &Record) -> Result<(String, String)> {
    let mut text = serde_json::to_string(record)
        .map_err(|e| Error::Run(format!("the record cannot be written as JSON: {e}")))?;
    text.pop();
    let hash = hex(&Sha256::digest(text.as_bytes()));
    Ok((format!("{text}{HASH}{hash}\"}}\n"), hash))
}

/// A line's record and hash, or what is wrong with it.
fn parse(line: &[u8]) -> std::result::Result<(Record, String), String> {
    let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8".to_owned())?;
    let (body, hash) = text
        .rsplit_once(HASH)
        .and_then(|(body, rest)| Some((body, rest.strip_suffix("\"}")?)))
        .ok_or_else(|| "is not a record: it does not end in its hash".to_owned())?;
    let found = hex(&Sha256::digest(body.as_bytes()));
    if found != hash {
        return Err(format!("was changed: its hash is {hash}, of its bytes {found}"));
    }
    let record =
        serde_json::from_str(&format!("{body}}}")).map_err(|e| format!("is not a record: {e}"))?;
    Ok((record, found))
}

/// What is wrong in a log.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fault {
    /// The line, counted from 1.
    pub line: usize,
    /// The number of the record there, where it can be read.
    pub record: Option<u64>,
    /// What is wrong.
    pub message: String,
}

/// A log as it was read.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Records that are what was written, with their lines and hashes.
    pub records: Vec<(usize, Record, String)>,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

impl Chain {
    /// The end of the chain.
    pub fn head(&self) -> Head {
        self.records.last().map_or_else(
            || Head { number: 0, hash: GENESIS.to_owned() },
            |(_, record, hash)| Head { number: record.number, hash: hash.clone() },
        )
    }

    /// Whether a record with this hash is there: a head that was noted earlier must still be.
    pub fn holds(&self, hash: &str) -> bool {
        self.records.iter().any(|(_, _, own)| own == hash)
    }
}

/// Reads a log and checks every line and the chain.
///
/// # Errors
/// If the file cannot be read; what is wrong in it is in [`Chain::faults`].
pub fn read(path: &Path) -> Result<Chain> {
    let bytes = std::fs::read(path).map_err(|e| Error::reading(path, "an audit log", e))?;
    let mut chain = Chain { records: Vec::new(), faults: Vec::new() };
    let mut before = Some((0, GENESIS.to_owned()));
    for (i, text) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let line = i + 1;
        let Some(text) = text.strip_suffix(b"\n") else {
            let message = "half a line: a write was cut off, or the end was".to_owned();
            chain.faults.push(Fault { line, record: None, message });
            break;
        };
        match parse(text) {
            Ok((record, hash)) => {
                if let Some(message) = before.and_then(|before| out_of_place(&before, &record)) {
                    chain.faults.push(Fault { line, record: Some(record.number), message });
                }
                before = Some((record.number, hash.clone()));
                chain.records.push((line, record, hash));
            }
            Err(message) => {
                chain.faults.push(Fault { line, record: None, message });
                // What follows has nothing to be held against.
                before = None;
            }
        }
    }
    Ok(chain)
}

/// What is wrong with a record behind one of this number and hash.
fn out_of_place((number, hash): &(u64, String), record: &Record) -> Option<String> {
    if record.number != number + 1 {
        return Some(format!(
            "follows record {number}, expected {}: removed, inserted or reordered",
            number + 1
        ));
    }
    (record.previous != *hash)
        .then(|| format!("does not continue record {number}: its `previous` is another hash"))
}
