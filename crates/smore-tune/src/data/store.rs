//! Where the tokens of samples are held: in memory, and from a limit on in a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use super::Sample;
use crate::error::{Error, Result};

/// Bytes of tokens that are held in memory.
pub(super) const IN_MEMORY: usize = 4 << 20;

/// Bytes of one token and whether it is a target.
const TOKEN: usize = size_of::<u32>() + size_of::<bool>();

/// The tokens of one sample. Clones share them.
#[derive(Clone, Debug)]
pub(super) enum Tokens {
    Held(Arc<(Vec<u32>, Vec<bool>)>),
    /// `len` ids from byte `at` on, and behind them a byte for each that tells whether it is a target.
    Filed {
        file: Arc<OnceLock<Mmap>>,
        at: u64,
        len: u32,
    },
}

impl Tokens {
    pub(super) fn held(ids: Vec<u32>, trained: Vec<bool>) -> Self {
        debug_assert_eq!(ids.len(), trained.len());
        Self::Held(Arc::new((ids, trained)))
    }

    pub(super) fn ids(&self) -> &[u32] {
        match self {
            Self::Held(held) => &held.0,
            // Samples begin at multiples of four, see `Spill::write`.
            Self::Filed { file, at, len } => {
                bytemuck::cast_slice(&mapped(file)[*at as usize..][..*len as usize * 4])
            }
        }
    }

    pub(super) fn trained(&self) -> &[bool] {
        match self {
            Self::Held(held) => &held.1,
            Self::Filed { file, at, len } => {
                let from = *at as usize + *len as usize * 4;
                bytemuck::checked::cast_slice(&mapped(file)[from..][..*len as usize])
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Held(held) => held.0.len(),
            Self::Filed { len, .. } => *len as usize,
        }
    }
}

fn mapped(file: &OnceLock<Mmap>) -> &Mmap {
    file.get().expect("a sample's tokens are asked for after its file is whole")
}

impl PartialEq for Tokens {
    fn eq(&self, other: &Self) -> bool {
        self.ids() == other.ids() && self.trained() == other.trained()
    }
}

impl Eq for Tokens {}

/// Takes tokens to a file without a name, which is gone with the process, once more than `limit` bytes
/// are held. The system reads them back when they are asked for, and lets go of them when memory
/// is short.
pub(super) struct Spill {
    folder: PathBuf,
    room: usize,
    file: Option<BufWriter<File>>,
    written: u64,
    map: Arc<OnceLock<Mmap>>,
}

impl Spill {
    pub(super) fn new(folder: &Path, limit: usize) -> Self {
        Self { folder: folder.to_owned(), room: limit, file: None, written: 0, map: Arc::default() }
    }

    /// Holds the tokens of new samples, here or there.
    pub(super) fn hold(&mut self, samples: &mut [Sample]) -> Result<()> {
        for sample in samples {
            let size = sample.len() * TOKEN;
            if size <= self.room {
                self.room -= size;
            } else {
                self.room = 0;
                sample.tokens = self.write(&sample.tokens).map_err(|e| self.error(e))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, tokens: &Tokens) -> std::io::Result<Tokens> {
        let file = if let Some(file) = &mut self.file {
            file
        } else {
            let file = tempfile::tempfile_in(&self.folder)?;
            self.file.insert(BufWriter::with_capacity(1 << 20, file))
        };
        let (ids, trained) = (tokens.ids(), tokens.trained());
        file.write_all(bytemuck::cast_slice(ids))?;
        file.write_all(bytemuck::cast_slice(trained))?;
        let padding = trained.len().next_multiple_of(4) - trained.len();
        file.write_all(&[0; 3][..padding])?;
        let at = self.written;
        self.written += (ids.len() * TOKEN + padding) as u64;
        Ok(Tokens::Filed { file: self.map.clone(), at, len: ids.len() as u32 })
    }

    /// Makes the file's tokens readable. Bytes in it.
    pub(super) fn finish(mut self) -> Result<u64> {
        if let Some(file) = self.file.take() {
            let map =
                file.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|file| {
                    // SAFETY: the file has no name and no other handle, so nobody else can change it.
                    unsafe { Mmap::map(&file) }
                });
            let map = map.map_err(|e| self.error(e))?;
            assert!(self.map.set(map).is_ok(), "the file is finished once");
        }
        Ok(self.written)
    }

    fn error(&self, source: std::io::Error) -> Error {
        Error::Run(format!(
            "{}: {source}, after {} MiB of tokens that do not fit in memory; give data.cache_dir a \
             folder with more room",
            self.folder.display(),
            self.written >> 20
        ))
    }
}
