//! Container logs in the format of the CRI: `<time> <stream> <F|P> <content>`, one record a line.
//!
//! `format` turns a stream of bytes into records, `file` owns the file and its rotation, and [`ContainerLog`] joins
//! them. Invariants: a record is written whole or not at all; no file ever exceeds its bound; a disk that does not take
//! the output costs output (counted, and told in the log once it works again), never the container or the keeper.

mod file;
mod format;

use crate::protocol::LogTarget;
pub use file::{LogFile, LogFileError, LogFileState};
use format::{MAX_PIECE_BYTES, RECORD_OVERHEAD, append_record, timestamp};
pub use format::{Splitter, StreamName, Tag, compact_utc};
use serde::{Deserialize, Serialize};

/// The log of one container: both streams, one file.
#[derive(Debug)]
pub struct ContainerLog {
    file: LogFile,
    stdout: Splitter,
    stderr: Splitter,
}

/// What a re-exec carries over; the file's descriptor goes beside it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct LogState {
    pub file: LogFileState,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl ContainerLog {
    /// `tty`: a terminal's line discipline has put a carriage return before each newline; it is taken off again.
    pub fn open(target: &LogTarget, tty: bool) -> Result<Self, LogFileError> {
        Ok(Self::new(LogFile::open(target)?, tty))
    }

    pub fn restore(file: LogFile, tty: bool, state: LogState) -> Self {
        Self {
            file,
            stdout: Splitter::restore(state.stdout, tty),
            stderr: Splitter::restore(state.stderr, tty),
        }
    }

    fn new(file: LogFile, tty: bool) -> Self {
        Self { file, stdout: Splitter::new(tty), stderr: Splitter::new(tty) }
    }

    pub fn file(&self) -> &LogFile {
        &self.file
    }

    pub fn state(&self) -> LogState {
        LogState {
            file: self.file.state(),
            stdout: self.stdout.pending().to_vec(),
            stderr: self.stderr.pending().to_vec(),
        }
    }

    pub fn reopen(&mut self) -> Result<(), LogFileError> {
        self.file.reopen()
    }

    /// Adds output, in one write unless the file turns over in between. `now` is in nanoseconds since the epoch.
    pub fn append(&mut self, stream: StreamName, bytes: &[u8], now: i64) {
        self.write(stream, Some(bytes), now);
    }

    /// Writes an unterminated last line as a partial record.
    pub fn flush(&mut self, stream: StreamName, now: i64) {
        self.write(stream, None, now);
    }

    fn write(&mut self, stream: StreamName, bytes: Option<&[u8]>, now: i64) {
        let splitter = match stream {
            StreamName::Stdout => &mut self.stdout,
            StreamName::Stderr => &mut self.stderr,
        };
        let stamp = timestamp(now);
        let limit = piece_limit(self.file.max_bytes());
        let file = &mut self.file;
        let mut batch = Vec::with_capacity(bytes.map_or(0, |b| b.len() + b.len() / 4) + 256);
        let mut add = |piece: &[u8], tag: Tag| {
            if !file.fits(batch.len() + piece.len() + RECORD_OVERHEAD) {
                file.write_records(&batch, now);
                batch.clear();
                if !file.fits(piece.len() + RECORD_OVERHEAD) {
                    file.rotate(now);
                }
            }
            append_record(&mut batch, &stamp, stream, tag, piece);
        };
        match bytes {
            Some(bytes) => splitter.push(bytes, limit, &mut add),
            None => splitter.flush(&mut add),
        }
        file.write_records(&batch, now);
    }
}

/// Records are cut so that each fits into an empty file.
fn piece_limit(max_bytes: u64) -> usize {
    if max_bytes == 0 {
        return MAX_PIECE_BYTES;
    }
    let room = usize::try_from(max_bytes).unwrap_or(usize::MAX).saturating_sub(RECORD_OVERHEAD);
    room.clamp(1, MAX_PIECE_BYTES)
}

#[cfg(test)]
mod tests;
