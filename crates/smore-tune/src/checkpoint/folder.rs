//! Folders and files written whole or not at all.

use super::manifest::sha256;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Writes a folder beside its final place and renames it there when `fill` is done, so that nobody
/// ever sees half of it, whatever happens to the process or the machine.
///
/// # Errors
/// If writing fails; what was there before stays.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(|e| io(parent, e))?;
    let fresh = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(parent)
        .map_err(|e| io(parent, e))?;
    fill(fresh.path())?;
    for entry in std::fs::read_dir(fresh.path()).map_err(|e| io(fresh.path(), e))? {
        let file = entry.map_err(|e| io(fresh.path(), e))?.path();
        readable(&file, 0o644)?;
        sync(&file)?;
    }
    readable(fresh.path(), 0o755)?;
    sync(fresh.path())?;
    put(fresh.path(), path).map_err(|e| io(path, e))?;
    // What it holds now is what was there before, if anything was.
    let left = fresh.keep();
    if left.exists() {
        std::fs::remove_dir_all(&left).map_err(|e| io(&left, e))?;
    }
    sync(parent)
}

/// Temporary files and folders are private; a result is as readable as anything the user writes.
fn readable(path: &Path, mode: u32) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let open = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, open)
            .map_err(|source| Error::Io { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// What begins the names of folders that are being written.
pub(crate) const UNFINISHED: &str = ".writing-";

fn sync(path: &Path) -> Result<()> {
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Renames `fresh` to `path`; exchanges them where there is something, so that there always is.
fn put(fresh: &Path, path: &Path) -> std::io::Result<()> {
    if !path.exists() {
        return std::fs::rename(fresh, path);
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, fresh, CWD, path, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    // Not every file system can exchange.
    let retired = path.with_file_name(format!(".replaced-{}", std::process::id()));
    std::fs::rename(path, &retired)?;
    std::fs::rename(fresh, path)?;
    std::fs::remove_dir_all(&retired)
}

/// The file that makes a checkpoint whole: the SHA-256 of all others.
const SEAL: &str = "checkpoint.json";

/// Writes `checkpoint.json` with the hashes of all other files of a folder.
///
/// # Errors
/// If a file cannot be read or this one not written.
pub(crate) fn seal(dir: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    let io = |source| Error::Io { path: dir.to_owned(), source };
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, sha256(&entry.path())?);
    }
    let text = serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "files": files });
    write(&dir.join(SEAL), format!("{text:#}\n").as_bytes())
}

/// Holds a folder's files against the hashes in its `checkpoint.json`.
///
/// # Errors
/// The first file that is missing or is not what was written.
pub(crate) fn check_seal(dir: &Path) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Seal {
        files: BTreeMap<String, String>,
    }
    let file = dir.join(SEAL);
    let bad = |file: PathBuf, message: String| Error::Adapter { file, message };
    let text = std::fs::read_to_string(&file)
        .map_err(|e| Error::reading(&file, "the hashes of a whole checkpoint", e))?;
    let seal: Seal = serde_json::from_str(&text)
        .map_err(|e| bad(file, format!("not the hashes of a checkpoint: {e}")))?;
    for (name, hash) in &seal.files {
        let file = dir.join(name);
        if !file.is_file() {
            return Err(bad(file, "missing from this checkpoint".into()));
        }
        if sha256(&file)? != *hash {
            return Err(bad(file, "not what was written (its SHA-256 differs)".into()));
        }
    }
    Ok(())
}

/// Writes a whole file, or says which could not be written.
///
/// # Errors
/// If writing fails.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::Io { path: PathBuf::from(path), source })
}

/// Has `fill` write a file beside its place and renames it there, so that nobody ever sees half of
/// it.
///
/// # Errors
/// If writing fails; what was there before stays.
pub(crate) fn write_file(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}"));
    fill(&fresh)?;
    sync(&fresh)?;
    std::fs::rename(&fresh, path).map_err(|source| Error::Io { path: path.to_owned(), source })
}
