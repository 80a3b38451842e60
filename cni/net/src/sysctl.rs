//! Kernel settings below `/proc/sys`, of the calling thread's network namespace.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error("cannot read kernel setting {key}")]
    Read { key: String, source: io::Error },
    #[error("cannot set kernel setting {key} to {value} (is /proc/sys mounted read-only?)")]
    Write { key: String, value: String, source: io::Error },
}

/// # Errors
/// [`SysctlError::Read`]
pub fn read(key: &str) -> Result<String, SysctlError> {
    std::fs::read_to_string(path(key))
        .map(|text| text.trim_end().to_owned())
        .map_err(|source| SysctlError::Read { key: key.to_owned(), source })
}

/// Writes only what differs, so that a read-only `/proc/sys` with the right values is good enough.
///
/// # Errors
/// [`SysctlError`]
pub fn set(key: &str, value: &str) -> Result<(), SysctlError> {
    set_with_undo(key, value).map(Undo::keep)
}

/// As [`set`]; the former value comes back unless the result is [kept](Undo::keep).
///
/// # Errors
/// [`SysctlError`]
pub fn set_with_undo(key: &str, value: &str) -> Result<Undo, SysctlError> {
    let before = read(key)?;
    if before == value {
        return Ok(Undo { path: path(key), before: None });
    }
    std::fs::write(path(key), value).map_err(|source| SysctlError::Write {
        key: key.to_owned(),
        value: value.to_owned(),
        source,
    })?;
    Ok(Undo { path: path(key), before: Some(before) })
}

/// `key` has slashes: interface names contain dots.
fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}

/// Must be dropped in the network namespace in which it was made.
#[derive(Debug)]
#[must_use = "dropping it at once undoes the change"]
pub struct Undo {
    path: PathBuf,
    before: Option<String>,
}

impl Undo {
    pub fn keep(mut self) {
        self.before = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // Nothing more can be done if the setting, or the interface it belonged to, is gone.
            let _ = std::fs::write(&self.path, before);
        }
    }
}
