//! Termination messages: what a container left in its message file, or the end of its log.

use crate::pods::runtime_state::ContainerRecord;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const LONGEST_FILE: u64 = 4096;
const LONGEST_LOG: usize = 2048;
const MOST_LINES: usize = 80;
/// Enough of a log's end to find that many lines in, prefixes included.
const LOG_WINDOW: u64 = 64 << 10;

/// Adds the message of a container that has ended; whatever cannot be read is no message.
pub(super) async fn add(record: &mut ContainerRecord) {
    let file = record.message_file.clone().map(PathBuf::from);
    let from_log = record.falls_back_to_logs && record.exit_code != 0;
    let log = from_log.then(|| PathBuf::from(&record.log_path));
    let read = move || {
        let told = file.as_deref().and_then(read_file).filter(|text| !text.is_empty());
        told.or_else(|| log.as_deref().and_then(read_log))
    };
    let found = tokio::task::spawn_blocking(read).await.ok().flatten();
    if let Some(found) = found.filter(|found| !found.is_empty()) {
        record.message = found;
    }
}

/// The file is the container's to replace: it is opened without following links and without waiting.
fn read_file(path: &Path) -> Option<String> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).ok()?;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(LONGEST_FILE).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_log(path: &Path) -> Option<String> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_WINDOW))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_WINDOW).read_to_end(&mut bytes).ok()?;
    Some(log_tail(&String::from_utf8_lossy(&bytes), length > LOG_WINDOW))
}

/// The last lines of a CRI log without their time, stream and tag.
fn log_tail(text: &str, is_cut: bool) -> String {
    let lines: Vec<&str> = text.lines().skip(usize::from(is_cut)).collect();
    let last = &lines[lines.len().saturating_sub(MOST_LINES)..];
    let mut out = String::new();
    for line in last {
        let mut fields = line.splitn(4, ' ');
        let tag = fields.nth(2).unwrap_or("F");
        out.push_str(fields.next().unwrap_or_default());
        if tag.starts_with('F') {
            out.push('\n');
        }
    }
    let mut from = out.len().saturating_sub(LONGEST_LOG);
    while !out.is_char_boundary(from) {
        from += 1;
    }
    out.split_off(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_has_no_prefixes_and_joins_partial_lines() {
        let log = "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:00Z stderr P tw\n2026-01-01T00:00:00Z stderr F o\n";
        assert_eq!(log_tail(log, false), "one\ntwo\n");
    }

    #[test]
    fn the_tail_of_a_log_has_at_most_80_lines_and_2048_bytes() {
        let line = |i: usize| format!("2026-01-01T00:00:00Z stdout F {i}\n");
        let many: String = (0..200).map(line).collect();
        let tail = log_tail(&many, false);
        assert_eq!(tail.lines().count(), 80);
        assert!(tail.starts_with("120\n") && tail.ends_with("199\n"));
        let long = format!("2026-01-01T00:00:00Z stdout F {}\n", "é".repeat(3000));
        assert!(log_tail(&long, false).len() <= 2048);
    }

    #[test]
    fn a_message_file_replaced_by_a_link_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("secret"), "secret").unwrap();
        std::os::unix::fs::symlink(root.path().join("secret"), root.path().join("message")).unwrap();
        assert_eq!(read_file(&root.path().join("message")), None);
        assert_eq!(read_file(&root.path().join("secret")).as_deref(), Some("secret"));
    }
}
