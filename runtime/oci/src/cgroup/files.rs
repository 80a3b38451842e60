//! Reading and writing single cgroup files.

use super::Error;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

pub(super) fn write_raw(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    // Never O_CREAT: a file that is not there means a missing controller, and cgroupfs would answer EPERM.
    fs::OpenOptions::new().write(true).open(dir.join(file))?.write_all(value.as_bytes())
}

pub(super) fn write(dir: &Path, file: &str, value: &str) -> Result<(), Error> {
    write_raw(dir, file, value).map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound && !dir.exists() {
            return Error::NotExist(dir.to_owned());
        }
        Error::Write { file: dir.join(file), value: value.to_owned(), source }
    })
}

pub(super) fn read(dir: &Path, file: &str) -> Result<String, Error> {
    fs::read_to_string(dir.join(file)).map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound && !dir.exists() {
            return Error::NotExist(dir.to_owned());
        }
        Error::Read { file: dir.join(file), source }
    })
}

/// `None` when the file is absent or its feature is switched off (PSI answers EOPNOTSUPP).
pub(super) fn read_optional(dir: &Path, file: &str) -> Result<Option<String>, Error> {
    match fs::read_to_string(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) if matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) => Ok(None),
        Err(source) => Err(Error::Read { file: dir.join(file), source }),
    }
}
