//! Cases on disk, of whatever kind.

use super::case::data_error;
use super::{CaseReport, EndToEnd, LayerCase, Tensors, Tolerance};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Computes the case at `path` in f32 and compares everything that was recorded, within
/// `tolerance` or what is documented; also what was computed.
///
/// # Errors
/// If the case cannot be read: names the file and the key or tensor.
pub fn check_case(path: &Path, tolerance: Option<f64>) -> Result<(CaseReport, Tensors)> {
    if path.is_dir() {
        let mut case = EndToEnd::open(path)?;
        let computed = case.compute()?;
        return Ok((case.compare(&computed, tolerance), computed));
    }
    let case = LayerCase::open(path)?;
    let computed = case.compute::<f32>()?;
    let tolerance = tolerance.map_or_else(|| Tolerance::of(case.precision), Tolerance::same);
    Ok((case.compare(&computed, tolerance), computed))
}

/// The cases that `path` names: itself, or those in a folder and the folders in it, sorted. A
/// layer case is its .json file, a whole model's the folder.
///
/// # Errors
/// If there is nothing, or a folder without a case.
pub fn find_cases(path: &Path) -> Result<Vec<PathBuf>> {
    let what = "a layer case's .json file, or a folder that is a case or holds some";
    if !path.is_dir() {
        let missing = !path.exists();
        return match path.extension() {
            _ if missing => Err(Error::Missing { path: path.to_path_buf(), what: what.into() }),
            Some(ending) if ending == "json" => Ok(vec![whole(path)]),
            _ => Err(data_error(path, format!("expected {what}"))),
        };
    }
    let mut cases = Vec::new();
    walk(path, &mut BTreeSet::new(), &mut cases)?;
    cases.sort();
    if cases.is_empty() {
        let message = "no case here: no .json file with a .safetensors file beside it, and no \
                       model, adapter or training run with a recording";
        return Err(data_error(path, message.into()));
    }
    Ok(cases)
}

/// The folder, if the file is of a whole model's case.
fn whole(file: &Path) -> PathBuf {
    let of_model = ["fixture.json", "traj.json", "config.json", "adapter_config.json"];
    match file.parent() {
        Some(folder) if file.file_name().is_some_and(|n| of_model.iter().any(|m| n == *m)) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            if EndToEnd::is_case(folder) { folder.to_path_buf() } else { file.to_path_buf() }
        }
        _ => file.to_path_buf(),
    }
}

/// Adds the cases in `folder`; each real folder is visited once, hidden ones are not.
fn walk(folder: &Path, seen: &mut BTreeSet<PathBuf>, cases: &mut Vec<PathBuf>) -> Result<()> {
    let unreadable = |e| Error::reading(folder, "a folder of cases", e);
    if !seen.insert(folder.canonicalize().map_err(unreadable)?) {
        return Ok(());
    }
    let is_case = EndToEnd::is_case(folder);
    if is_case {
        cases.push(folder.to_path_buf());
    }
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            walk(&path, seen, cases)?;
        } else if !is_case
            && path.extension().is_some_and(|e| e == "json")
            && path.with_extension("safetensors").is_file()
        {
            cases.push(path);
        }
    }
    Ok(())
}

/// A layer case's file without the ending; a whole model's folder.
pub fn case_name(path: &Path) -> String {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    match name {
        Some(name) => name.to_string_lossy().into_owned(),
        None => path
            .canonicalize()
            .ok()
            .filter(|p| p.file_name().is_some())
            .map_or_else(|| path.display().to_string(), |p| case_name(&p)),
    }
}
