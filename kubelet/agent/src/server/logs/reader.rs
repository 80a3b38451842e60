//! Reads whole lines of a log that grows and is rotated by renaming.

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use std::io::{self, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

const CHUNK: usize = 64 << 10;
/// A line that is longer is passed on in pieces; the writer of our logs never makes one.
const MAX_LINE: usize = 1 << 20;

/// An open log. Lines come out whole and in order, across rotations.
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    inode: u64,
    /// Read, but not yet a whole line.
    rest: Vec<u8>,
    watch: Option<EventStream<[u8; 1024]>>,
}

impl LogFile {
    /// Opens the log where its last `tail` lines begin, or at its beginning.
    pub(super) async fn open(path: PathBuf, tail: Option<u64>) -> io::Result<Self> {
        let mut file = File::open(&path).await?;
        let inode = file.metadata().await?.ino();
        if let Some(tail) = tail {
            let start = tail_start(&mut file, tail).await?;
            file.seek(SeekFrom::Start(start)).await?;
        }
        Ok(Self { path, file, inode, rest: Vec::new(), watch: None })
    }

    /// Whole lines, or none when there are no more for now.
    pub(super) async fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let mut chunk = std::mem::take(&mut self.rest);
            let before = chunk.len();
            chunk.reserve(CHUNK);
            let count = self.file.read_buf(&mut chunk).await?;
            let whole = chunk.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if whole > 0 || chunk.len() > MAX_LINE {
                let cut = if whole > 0 { whole } else { chunk.len() };
                self.rest = chunk.split_off(cut);
                return Ok(Some(chunk));
            }
            self.rest = chunk;
            if count == 0 && self.rest.len() == before && !self.next_file().await? {
                return Ok(None);
            }
        }
    }

    /// Moves on to the new file if this one was renamed and has been read to its end.
    async fn next_file(&mut self) -> io::Result<bool> {
        let Ok(named) = tokio::fs::metadata(&self.path).await else { return Ok(false) };
        if named.ino() == self.inode {
            return Ok(false);
        }
        // The writer opens the new file only after its last write to the old one; that write may be newer than our
        // last look at it.
        let mut late = Vec::new();
        self.file.read_to_end(&mut late).await?;
        self.rest.extend_from_slice(&late);
        self.file = File::open(&self.path).await?;
        self.inode = self.file.metadata().await?.ino();
        self.watch = None;
        Ok(true)
    }

    /// Waits until something may have been written or renamed.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        let watch = match &mut self.watch {
            Some(watch) => watch,
            None => {
                let inotify = Inotify::init()?;
                if let Some(folder) = self.path.parent() {
                    inotify.watches().add(folder, WatchMask::CREATE | WatchMask::MOVED_TO)?;
                }
                let writes = WatchMask::MODIFY | WatchMask::MOVE_SELF | WatchMask::DELETE_SELF;
                match inotify.watches().add(&self.path, writes) {
                    // Renamed away this moment: its successor's creation wakes the watch on the folder.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    added => drop(added?),
                }
                // What was written before the watch began is found by the caller's next read.
                self.watch = Some(inotify.into_event_stream([0; 1024])?);
                return Ok(());
            }
        };
        match watch.next().await {
            Some(event) => event.map(drop),
            None => Err(io::Error::other("the watch on the log ended")),
        }
    }
}

/// Where the last `lines` lines begin. A last line without a newline counts.
async fn tail_start(file: &mut File, lines: u64) -> io::Result<u64> {
    let length = file.metadata().await?.len();
    let (mut at, mut found) = (length, 0);
    let mut chunk = vec![0; CHUNK];
    if lines == 0 {
        return Ok(length);
    }
    while at > 0 {
        let size = at.min(CHUNK as u64);
        at -= size;
        file.seek(SeekFrom::Start(at)).await?;
        let piece = &mut chunk[..usize::try_from(size).unwrap_or(CHUNK)];
        file.read_exact(piece).await?;
        for (offset, byte) in piece.iter().enumerate().rev() {
            let position = at + offset as u64;
            // The newline that ends the file ends the last line, it begins none.
            if *byte == b'\n' && position + 1 < length {
                found += 1;
                if found == lines {
                    return Ok(position + 1);
                }
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tail(content: &str, lines: u64) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, content).unwrap();
        let mut log = LogFile::open(path, Some(lines)).await.unwrap();
        let mut text = Vec::new();
        while let Some(piece) = log.read().await.unwrap() {
            text.extend_from_slice(&piece);
        }
        text.extend_from_slice(&log.rest);
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn the_tail_begins_at_a_line() {
        assert_eq!(tail("a\nb\nc\n", 2).await, "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2).await, "b\nc");
        assert_eq!(tail("a\nb\n", 5).await, "a\nb\n");
        assert_eq!(tail("a\nb\n", 0).await, "");
        assert_eq!(tail("", 3).await, "");
        let long: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(tail(&long, 15_000).await.lines().next(), Some("line 5000"));
    }
}
