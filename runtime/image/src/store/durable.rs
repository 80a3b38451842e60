//! Files that are either the old one or the new one, whatever happens: temporary name, sync, rename, sync the directory.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ImageError;

/// Prefix of files that were being written: not records, removed at open.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Writes or replaces the file at `path`.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ImageError::store("write", path)(std::io::ErrorKind::InvalidInput.into()));
    };
    let temporary = parent.join(format!("{TEMPORARY}{}", name.to_string_lossy()));
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&temporary, path)).map_err(ImageError::store("write", path))?;
    sync_directory(parent)
}

/// Writes a content-addressed file, unless it is there already.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    match fs::metadata(path) {
        Ok(existing) if existing.len() == bytes.len() as u64 => Ok(()),
        _ => write(path, bytes),
    }
}

pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), ImageError> {
    let bytes =
        serde_json::to_vec_pretty(value).map_err(|cause| ImageError::store("encode", path)(cause.into()))?;
    write(path, &bytes)
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ImageError> {
    let bytes = fs::read(path).map_err(ImageError::store("read", path))?;
    serde_json::from_slice(&bytes).map_err(|cause| ImageError::store("decode", path)(cause.into()))
}

/// Removes a file for good; a missing one is a success.
pub(super) fn remove_file(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(ImageError::store("remove", path)(cause)),
        Ok(()) => path.parent().map_or(Ok(()), sync_directory),
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), ImageError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(ImageError::store("sync", path))
}
