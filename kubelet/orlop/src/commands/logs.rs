//! `orlop logs`: reads the container's log file, whose format is that of the CRI.

use super::NodeSocket;
use anyhow::{Context, Result};
use orlop_proto::cri::{Container, ContainerState, ContainerStatusRequest};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub follow: bool,
    pub timestamps: bool,
    pub tail: Option<usize>,
}

pub async fn logs(mut node: NodeSocket, container: Container, options: Options) -> Result<()> {
    let path = status(&mut node, &container.id).await?.1;
    let mut reader = LogReader::open(&path)?;
    let mut lines = reader.lines()?;
    if let Some(tail) = options.tail {
        lines.drain(..lines.len().saturating_sub(tail));
    }
    loop {
        for line in &lines {
            write_line(line, options.timestamps)?;
        }
        if !options.follow {
            return Ok(());
        }
        // Asked before the last read, so that what was written until the end is still printed.
        let running = status(&mut node, &container.id).await.is_ok_and(|(running, _)| running);
        if running {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        lines = reader.lines()?;
        if lines.is_empty() && !running {
            return Ok(());
        }
    }
}

async fn status(node: &mut NodeSocket, id: &str) -> Result<(bool, PathBuf)> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let status = node
        .runtime
        .container_status(request)
        .await?
        .into_inner()
        .status
        .context("the container has no status")?;
    Ok((status.state == ContainerState::ContainerRunning as i32, PathBuf::from(status.log_path)))
}

/// Prints one line of the log's format: time, stream, tag, text.
fn write_line(line: &[u8], timestamps: bool) -> Result<()> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (Some(time), Some(stream), Some(tag), Some(text)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Ok(());
    };
    let mut output: Box<dyn Write> = if stream == b"stderr" {
        Box::new(std::io::stderr().lock())
    } else {
        Box::new(std::io::stdout().lock())
    };
    if timestamps {
        output.write_all(time)?;
        output.write_all(b" ")?;
    }
    // A partial piece is followed by the rest of its line.
    output.write_all(if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text })?;
    output.flush()?;
    Ok(())
}

/// Reads complete lines as they come, across rotations of the file.
#[derive(Debug)]
struct LogReader {
    path: PathBuf,
    file: BufReader<std::fs::File>,
    inode: u64,
}

impl LogReader {
    fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).with_context(|| format!("open the log {}", path.display()))?;
        let inode = file.metadata()?.ino();
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), inode })
    }

    fn lines(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut lines = self.complete_lines()?;
        let renamed = std::fs::metadata(&self.path).is_ok_and(|m| m.ino() != self.inode);
        if renamed {
            // The old file is finished: read what came between, then go on with the new one.
            lines.extend(self.complete_lines()?);
            *self = Self::open(&self.path)?;
            lines.extend(self.complete_lines()?);
        }
        Ok(lines)
    }

    fn complete_lines(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            let length = self.file.by_ref().take(1 << 20).read_until(b'\n', &mut line)?;
            if length == 0 {
                return Ok(lines);
            }
            if line.last() != Some(&b'\n') {
                self.file.seek(SeekFrom::Current(-i64::try_from(length)?))?;
                return Ok(lines);
            }
            lines.push(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_follows_the_file_through_a_rotation_and_waits_for_whole_lines() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("0.log");
        std::fs::write(&path, "one\ntw")?;
        let mut reader = LogReader::open(&path)?;
        assert_eq!(reader.lines()?, [b"one\n"]);
        std::fs::write(&path, "one\ntwo\n")?;
        std::fs::rename(&path, folder.path().join("0.log.old"))?;
        std::fs::write(&path, "three\n")?;
        assert_eq!(reader.lines()?, [b"two\n".to_vec(), b"three\n".to_vec()]);
        assert!(reader.lines()?.is_empty());
        Ok(())
    }
}
