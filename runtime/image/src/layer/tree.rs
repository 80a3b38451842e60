//! Whole directory trees: removing them and adding up what they take.
//!
//! A container can nest directories deeper than any stack or path limit, so neither operation recurses: removal lifts
//! each non-empty subdirectory up into a scratch directory first, and the walk goes by bounded relative paths.

use std::collections::HashSet;
use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::Usage;

static LIFTED: AtomicU64 = AtomicU64::new(0);

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub(crate) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, DIRECTORY, Mode::empty())?)
}

/// Removes `name` in `parent`, of whatever type. `scratch` is a directory on the same file system; what a crash leaves
/// in it is still garbage. A missing name is a success.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &CStr, scratch: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(cause) => return Err(cause.into()),
    }
    let mut lifted = Vec::new();
    lift(parent, name, scratch, &mut lifted)?;
    while let Some(next) = lifted.pop() {
        let directory = rustix::fs::openat(scratch, next.as_c_str(), DIRECTORY, Mode::empty())?;
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let child = entry.file_name();
            if child == c"." || child == c".." {
                continue;
            }
            match rustix::fs::unlinkat(&directory, child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => lift(directory.as_fd(), child, scratch, &mut lifted)?,
                Err(cause) => return Err(cause.into()),
            }
        }
        rustix::fs::unlinkat(scratch, next.as_c_str(), AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// Removes an empty directory, or moves a full one into the scratch directory and queues it.
fn lift(
    parent: BorrowedFd<'_>,
    name: &CStr,
    scratch: BorrowedFd<'_>,
    queue: &mut Vec<std::ffi::CString>,
) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(cause) => return Err(cause.into()),
    }
    let target = format!("lifted-{}-{}", std::process::id(), LIFTED.fetch_add(1, Ordering::Relaxed));
    let target = std::ffi::CString::new(target).expect("the name has no NUL");
    rustix::fs::renameat(parent, name, scratch, target.as_c_str())?;
    queue.push(target);
    Ok(())
}

/// Removes everything inside the directory at `path`, which serves as its own scratch.
pub(crate) fn empty(path: &Path) -> io::Result<()> {
    let directory = open_directory(path)?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            remove(directory.as_fd(), entry.file_name(), directory.as_fd())?;
        }
    }
    Ok(())
}

/// Disk usage of the tree at `path`, itself included; each inode counts once. Files that vanish meanwhile are left out.
pub(crate) fn usage(path: &Path) -> io::Result<Usage> {
    measure(path).map(|(usage, _)| usage)
}

/// Disk usage, and the sum of the sizes of regular files.
pub(crate) fn measure(path: &Path) -> io::Result<(Usage, u64)> {
    let root = open_directory(path)?;
    let mut total = Usage::default();
    let mut size = 0;
    let mut linked = HashSet::new();
    let mut pending = vec![PathBuf::new()];
    add(&mut total, &rustix::fs::fstat(&root)?);
    while let Some(relative) = pending.pop() {
        let at = if relative.as_os_str().is_empty() { Path::new(".") } else { &relative };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let directory = match rustix::fs::openat2(&root, at, DIRECTORY, Mode::empty(), resolve) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG) => continue,
            Err(cause) => return Err(cause.into()),
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(cause) => return Err(cause.into()),
            };
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if is_directory {
                pending.push(relative.join(OsStr::from_bytes(name.to_bytes())));
            }
            if is_directory || stat.st_nlink == 1 || linked.insert((stat.st_dev, stat.st_ino)) {
                add(&mut total, &stat);
                if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                    size += u64::try_from(stat.st_size).unwrap_or(0);
                }
            }
        }
    }
    Ok((total, size))
}

fn add(total: &mut Usage, stat: &rustix::fs::Stat) {
    total.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
    total.inodes += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let top = open_directory(base.path()).unwrap();
        let mut at = rustix::io::dup(&top).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, c"d", Mode::RWXU).unwrap();
            rustix::fs::symlinkat(c"/etc", &at, c"link").unwrap();
            at = rustix::fs::openat(&at, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        assert!(usage(base.path()).unwrap().inodes > 2000);
        empty(base.path()).unwrap();
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
        assert!(Path::new("/etc").exists());
    }

    #[test]
    fn hard_links_count_once() {
        let base = tempfile::tempdir().unwrap();
        std::fs::write(base.path().join("a"), [0u8; 8192]).unwrap();
        std::fs::hard_link(base.path().join("a"), base.path().join("b")).unwrap();
        assert_eq!(usage(base.path()).unwrap().inodes, 2);
    }
}
