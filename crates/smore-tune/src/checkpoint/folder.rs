//! Folders and files written whole or not at all.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Writes a folder beside its final place and renames it there when `fill` is done, so that nobody
/// ever sees half of it.
///
/// # Errors
/// If writing fails; what was there before stays.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|e| io(parent, e))?;
    let fresh = tempfile::Builder::new()
        .prefix(".writing-")
        .tempdir_in(parent)
        .map_err(|e| io(parent, e))?;
    fill(fresh.path())?;
    for entry in std::fs::read_dir(fresh.path()).map_err(|e| io(fresh.path(), e))? {
        let file = entry.map_err(|e| io(fresh.path(), e))?.path();
        std::fs::File::open(&file).and_then(|f| f.sync_all()).map_err(|e| io(&file, e))?;
    }
    let fresh = fresh.keep();
    let retired = parent.join(format!(".replaced-{}", std::process::id()));
    if path.exists() {
        std::fs::rename(path, &retired).map_err(|e| io(path, e))?;
    }
    std::fs::rename(&fresh, path).map_err(|e| io(path, e))?;
    if retired.exists() {
        std::fs::remove_dir_all(&retired).map_err(|e| io(&retired, e))?;
    }
    // Temporary folders are private; a result is as readable as anything the user writes.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, open).map_err(|e| io(path, e))?;
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
