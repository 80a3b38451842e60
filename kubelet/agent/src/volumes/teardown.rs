//! Taking pods' directories away. Everything here may be repeated, and nothing is deleted through a mount: whatever is
//! mounted below a pod's directory goes first, and if something stays mounted, everything stays.

use crate::podspec::release_subpaths;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Removes a pod's volumes and sub path binds.
pub(super) fn volumes(pod_dir: &Path) -> io::Result<()> {
    release_subpaths(pod_dir)?;
    let volumes = pod_dir.join("volumes");
    unmount_below(&volumes)?;
    remove(&volumes)
}

/// Removes all that a pod has left.
pub(super) fn everything(pod_dir: &Path) -> io::Result<()> {
    volumes(pod_dir)?;
    unmount_below(pod_dir)?;
    remove(pod_dir)
}

fn remove(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Unmounts everything at and below `dir`, the deepest first.
fn unmount_below(dir: &Path) -> io::Result<()> {
    let mut mounts = mounts_below(dir)?;
    // Later mounts lie on top of or below earlier ones.
    mounts.reverse();
    for mount in mounts {
        match rustix::mount::unmount(&mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match mounts_below(dir)?.first() {
        None => Ok(()),
        Some(left) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is still mounted", left.display())))
        }
    }
}

fn mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let dir = match dir.canonicalize() {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    Ok(points.map(unescaped).filter(|point| point.starts_with(&dir)).collect())
}

/// The mount table writes blanks and backslashes as three octal digits.
fn unescaped(point: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(point.len());
    let mut rest = point;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        assert_eq!(unescaped(b"/a\\040b\\134c\\"), PathBuf::from("/a b\\c\\"));
        assert_eq!(unescaped(b"/plain"), PathBuf::from("/plain"));
    }
}
