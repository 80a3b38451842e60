//! The log file: exact size, rotation, and a disk that may be full.

use super::format::{RECORD_OVERHEAD, StreamName, Tag, append_record, compact_utc, timestamp};
use crate::protocol::LogTarget;
use rustix::fs::{Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum LogFileError {
    #[error("log path {0} names no file in a directory")]
    NoFileName(PathBuf),
    #[error("cannot make the log directory {path}: {source}")]
    MakeDirectory { path: PathBuf, source: std::io::Error },
    #[error("cannot open the log {path}: {source}")]
    Open { path: PathBuf, source: Errno },
}

/// Below this even the notice of lost output would not fit.
const MIN_MAX_BYTES: u64 = 256;

#[derive(Debug)]
pub struct LogFile {
    target: LogTarget,
    /// Absent after an attempt to open it failed; the next write tries again.
    file: Option<OwnedFd>,
    size: u64,
    /// Bytes of output that the disk did not take since the last notice.
    dropped: u64,
}

/// What a re-exec carries over besides the descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogFileState {
    pub dropped: u64,
}

impl LogFile {
    pub fn open(target: &LogTarget) -> Result<Self, LogFileError> {
        let mut target = target.clone();
        if target.path.file_name().is_none() {
            return Err(LogFileError::NoFileName(target.path));
        }
        if target.max_bytes != 0 {
            target.max_bytes = target.max_bytes.max(MIN_MAX_BYTES);
        }
        let mut log = Self { target, file: None, size: 0, dropped: 0 };
        log.reopen()?;
        Ok(log)
    }

    /// Takes over a descriptor from before a re-exec; without one the path is opened at the next write.
    pub fn restore(target: &LogTarget, file: Option<OwnedFd>, state: LogFileState) -> Self {
        let size = file.as_ref().and_then(|f| size_of(f.as_fd()).ok()).unwrap_or(0);
        Self { target: target.clone(), file, size, dropped: state.dropped }
    }

    pub fn state(&self) -> LogFileState {
        LogFileState { dropped: self.dropped }
    }

    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    pub fn max_bytes(&self) -> u64 {
        self.target.max_bytes
    }

    /// Opens the path anew; the old file stays in use if that fails.
    pub fn reopen(&mut self) -> Result<(), LogFileError> {
        let path = &self.target.path;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|source| LogFileError::MakeDirectory { path: parent.to_owned(), source })?;
        }
        let open = |source| LogFileError::Open { path: path.clone(), source };
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640)).map_err(open)?;
        self.size = size_of(file.as_fd()).map_err(open)?;
        self.file = Some(file);
        Ok(())
    }

    /// Whether `bytes` more keep the file within its bound.
    pub fn fits(&self, bytes: usize) -> bool {
        self.target.max_bytes == 0 || self.size + bytes as u64 <= self.target.max_bytes
    }

    /// Moves the file aside under a name with the time in it and starts a new one. Names sort in the order of their
    /// content even when the clock steps back or several files are filled within a second.
    pub fn rotate(&mut self, now: i64) {
        let rotated = self.rotated();
        let time = compact_utc(now);
        let next = match rotated.last() {
            Some(last) if last.time >= time => RotatedName { time: last.time.clone(), nth: last.nth + 1 },
            _ => RotatedName { time, nth: 0 },
        };
        let moved = rustix::fs::renameat_with(
            rustix::fs::CWD,
            &self.target.path,
            rustix::fs::CWD,
            self.sibling(&next),
            RenameFlags::NOREPLACE,
        );
        // A file that somebody has removed needs no new name.
        if matches!(moved, Ok(()) | Err(Errno::NOENT)) {
            self.file = None;
            self.size = 0;
            let kept = (self.target.max_files.max(1) - 1) as usize;
            let surplus = (rotated.len() + 1).saturating_sub(kept);
            for name in rotated.iter().chain([&next]).take(surplus) {
                let _ = std::fs::remove_file(self.sibling(name));
            }
        }
    }

    /// Writes whole records in one go. What the disk does not take is dropped, whole records too, and counted.
    pub fn write_records(&mut self, records: &[u8], now: i64) {
        if records.is_empty() {
            return;
        }
        if self.file.is_none() && self.reopen().is_err() {
            self.dropped += content_bytes(records);
            return;
        }
        if self.dropped > 0 && !self.tell_loss(now) {
            self.dropped += content_bytes(records);
            return;
        }
        // The notice may have filled the file, and a move that failed leaves a full one behind.
        if !self.fits(records.len()) {
            self.rotate(now);
            if !self.fits(records.len()) || self.file.is_none() && self.reopen().is_err() {
                self.dropped += content_bytes(records);
                return;
            }
        }
        let written = self.write_whole(records);
        self.dropped += content_bytes(&records[written..]);
    }

    fn tell_loss(&mut self, now: i64) -> bool {
        let mut record = Vec::new();
        let text =
            format!("orlop-keeper: {} bytes of output were lost: the log could not be written", self.dropped);
        append_record(&mut record, &timestamp(now), StreamName::Stderr, Tag::Full, text.as_bytes());
        if !self.fits(record.len()) {
            self.rotate(now);
            if !self.fits(record.len()) || self.file.is_none() && self.reopen().is_err() {
                return false;
            }
        }
        let told = self.write_whole(&record) == record.len();
        if told {
            self.dropped = 0;
        }
        told
    }

    /// Returns how many bytes are in the file to stay: all, or as many whole records as fitted on the disk.
    fn write_whole(&mut self, records: &[u8]) -> usize {
        let Some(file) = &self.file else { return 0 };
        let mut written = 0;
        while written < records.len() {
            match rustix::io::write(file, &records[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if written < records.len() {
            let whole = records[..written].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
            // If even that fails, the torn record stays and the next one is glued to it: nothing better is left.
            let end =
                if rustix::fs::ftruncate(file, self.size + whole as u64).is_ok() { whole } else { written };
            self.size += end as u64;
            return whole;
        }
        self.size += written as u64;
        written
    }

    /// The files moved aside so far, oldest first.
    fn rotated(&self) -> Vec<RotatedName> {
        let (Some(parent), Some(own)) = (self.target.path.parent(), self.target.path.file_name()) else {
            return Vec::new();
        };
        let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
        let mut names: Vec<RotatedName> =
            entries.flatten().filter_map(|entry| RotatedName::parse(own, &entry.file_name())).collect();
        names.sort();
        names
    }

    fn sibling(&self, name: &RotatedName) -> PathBuf {
        let mut path = self.target.path.as_os_str().to_owned();
        path.push(format!(".{}", name.time));
        if name.nth > 0 {
            path.push(format!(".{}", name.nth));
        }
        Path::new(&path).to_owned()
    }
}

/// `<log>.<time>` and, when that is taken, `<log>.<time>.<n>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RotatedName {
    time: String,
    nth: u32,
}

impl RotatedName {
    fn parse(log: &OsStr, name: &OsStr) -> Option<Self> {
        let suffix = name.as_bytes().strip_prefix(log.as_bytes())?.strip_prefix(b".")?;
        let suffix = std::str::from_utf8(suffix).ok()?;
        let (time, nth) = match suffix.split_once('.') {
            Some((time, nth)) => (time, nth.parse().ok().filter(|n| *n > 0)?),
            None => (suffix, 0),
        };
        let shape_fits = time.len() == 15
            && time.bytes().enumerate().all(|(at, b)| if at == 8 { b == b'-' } else { b.is_ascii_digit() });
        shape_fits.then(|| Self { time: time.to_owned(), nth })
    }
}

fn size_of(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// What the container had written into these records.
fn content_bytes(records: &[u8]) -> u64 {
    records
        .split_inclusive(|&b| b == b'\n')
        .map(|record| record.len().saturating_sub(RECORD_OVERHEAD) as u64)
        .sum()
}
