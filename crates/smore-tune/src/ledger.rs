//! Work in pieces that survives a kill: a folder with the settings of the whole and a line for every
//! piece that is done, and workers that run the rest side by side.

use crate::checkpoint::write;
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The pieces that are done, on disk and in memory.
pub(crate) struct Ledger<T> {
    path: PathBuf,
    state: Mutex<(File, Vec<T>)>,
}

impl<T: Serialize + DeserializeOwned + Clone> Ledger<T> {
    /// Opens the ledger `folder/lines`, whose settings are in `folder/settings`. A line that a kill
    /// cut off is of a piece that runs again.
    ///
    /// # Errors
    /// If the folder holds work with other settings, or cannot be written.
    pub(crate) fn open(
        folder: &Path,
        (settings, lines): (&str, &str),
        own: &impl Serialize,
    ) -> Result<Self> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let name = folder.join(settings);
        let own = json(own)?;
        if name.exists() {
            if std::fs::read_to_string(&name).map_err(failed(&name))? != own {
                return Err(Error::Config {
                    file: name.display().to_string(),
                    message:
                        "the folder holds work with other settings; choose another folder, or \
                              remove this one"
                            .into(),
                });
            }
        } else {
            write(&name, own.as_bytes())?;
        }
        let path = folder.join(lines);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed(&path)(e)),
        };
        let text = String::from_utf8_lossy(&bytes);
        let done: Vec<T> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        let whole = done.iter().map(line).collect::<Result<String>>()?;
        let fresh = folder.join(format!(".{lines}"));
        write(&fresh, whole.as_bytes())?;
        std::fs::rename(&fresh, &path).map_err(failed(&path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(failed(&path))?;
        Ok(Self { path, state: Mutex::new((file, done)) })
    }

    fn state(&self) -> MutexGuard<'_, (File, Vec<T>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All pieces that are done, in the order in which they ended.
    pub(crate) fn done(&self) -> Vec<T> {
        self.state().1.clone()
    }

    /// Notes a piece.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn add(&self, piece: &T) -> Result<()> {
        let text = line(piece)?;
        let mut state = self.state();
        let written = state.0.write_all(text.as_bytes()).and_then(|()| state.0.sync_data());
        written.map_err(|source| Error::Io { path: self.path.clone(), source })?;
        state.1.push(piece.clone());
        Ok(())
    }
}

fn line(piece: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(piece);
    text.map(|text| text + "\n").map_err(|e| Error::Run(format!("not to be written as JSON: {e}")))
}

fn json(settings: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(settings);
    text.map(|text| text + "\n").map_err(|e| Error::Run(format!("not to be written as JSON: {e}")))
}

/// Runs every piece of `todo`, `workers` at a time, each on `threads` threads of its own. After an
/// error no other piece begins.
///
/// # Errors
/// The first error of a piece.
pub(crate) fn side_by_side<T: Send>(
    todo: VecDeque<T>,
    (workers, threads): (usize, usize),
    piece: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let todo = Mutex::new(todo);
    let next = || todo.lock().ok().and_then(|mut todo| todo.pop_front());
    let work = || -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::Run(format!("no threads to work on: {e}")))?;
        while let Some(own) = next() {
            if let Err(error) = pool.install(|| piece(own)) {
                // The other workers end after the piece they are at.
                todo.lock().iter_mut().for_each(|todo| todo.clear());
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        all.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: (&str, &str) = ("settings.json", "lines.jsonl");

    #[test]
    fn stopped_work_keeps_its_pieces_and_drops_half_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::<(u64, f64)>::open(dir.path(), FILES, &"own").unwrap();
        let piece = |i: u64| (i, 0.1 + i as f64 / 3.0);
        for i in 1..=3 {
            ledger.add(&piece(i)).unwrap();
        }
        drop(ledger);
        let path = dir.path().join("lines.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let ledger = Ledger::<(u64, f64)>::open(dir.path(), FILES, &"own").unwrap();
        assert_eq!(ledger.done(), [piece(1), piece(2)]);
        ledger.add(&piece(3)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let error = Ledger::<(u64, f64)>::open(dir.path(), FILES, &"another").err().unwrap();
        assert!(error.to_string().contains("other settings"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn every_piece_runs_once_and_an_error_ends_the_rest() {
        let seen = Mutex::new(Vec::new());
        let see = |i: usize| {
            seen.lock().unwrap().push(i);
            if i == 50 { Err(Error::Run("no".into())) } else { Ok(()) }
        };
        side_by_side((0..40).collect(), (3, 1), see).unwrap();
        let mut all = std::mem::take(&mut *seen.lock().unwrap());
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<_>>());
        assert!(side_by_side((50..100).collect(), (1, 1), see).is_err());
        assert_eq!(*seen.lock().unwrap(), [50]);
    }
}
