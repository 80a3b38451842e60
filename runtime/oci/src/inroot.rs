//! Paths inside a container's root file system.
//!
//! The image decides what lies at those paths, so nothing is ever opened by a plain path: every step goes through
//! `openat2` with `RESOLVE_IN_ROOT` (symbolic links and `..` end at the root) and without magic links, and what comes
//! back is an `O_PATH` descriptor that later steps work on.

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// What the last component of a path becomes when it does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Directory,
    File,
}

/// The root directory of a container.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
}

const RESOLVE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);
/// As many symbolic links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

impl Root {
    pub(crate) fn new(dir: OwnedFd) -> Self {
        Self { dir }
    }

    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { dir: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// Opens what is at `path`; `flags` as for `openat2`.
    pub(crate) fn open_at(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        // EAGAIN: a rename raced with the walk over `..`; the kernel asks to try again.
        for _ in 0..16 {
            match rustix::fs::openat2(&self.dir, path, flags | OFlags::CLOEXEC, Mode::empty(), RESOLVE) {
                Err(Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// An `O_PATH` descriptor of what is at `path`, symbolic links followed inside the root.
    pub(crate) fn resolve(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH)
    }

    /// Opens `path`, making what is missing. Dangling links are followed too, inside the root: an image whose
    /// `/var/run` points to an absent `/run` gets `/run`.
    pub(crate) fn resolve_or_make(&self, path: &Path, make: Make, mode: u32) -> io::Result<OwnedFd> {
        match self.resolve(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut done = PathBuf::new();
        let mut todo: VecDeque<OsString> = names(path).collect();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            let next = done.join(&name);
            match self.open_at(&next, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(found) if kind(&found)? == FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
                    let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                    if target.is_absolute() {
                        done = PathBuf::new();
                    }
                    for name in names(target).collect::<Vec<_>>().into_iter().rev() {
                        todo.push_front(name);
                    }
                }
                Ok(_) => done = next,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let parent = self.directory(&done)?;
                    let kind = if todo.is_empty() { make } else { Make::Directory };
                    make_one(parent.as_fd(), &name, kind, mode)?;
                    done = next;
                }
                Err(error) => return Err(error),
            }
        }
        self.open_at(&done, OFlags::PATH | OFlags::NOFOLLOW)
    }

    fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        self.open_at(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// The parent directory of `path`, made if missing, and its last name.
    pub(crate) fn parent_of(&self, path: &Path) -> io::Result<(OwnedFd, OsString)> {
        let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("/"));
        let dir = self.resolve_or_make(parent, Make::Directory, 0o755)?;
        Ok((dir, name))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

fn make_one(parent: BorrowedFd<'_>, name: &OsStr, make: Make, mode: u32) -> io::Result<()> {
    let made = match make {
        Make::Directory => rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode)),
        Make::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

pub(crate) fn kind(fd: impl AsFd) -> io::Result<FileType> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

/// The magic number of the file system that `fd` is on.
pub(crate) fn fs_magic(fd: impl AsFd) -> io::Result<u64> {
    let found = rustix::fs::fstatfs(fd)?;
    #[allow(
        clippy::unnecessary_cast,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        reason = "the field's type differs by target"
    )]
    let magic = found.f_type as u64;
    Ok(magic)
}

pub(crate) const PROC_MAGIC: u64 = 0x9fa0;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_and_dots_cannot_lead_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(&inside).unwrap();
        fs::create_dir_all(&outside).unwrap();
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        let root = Root::open(&inside).unwrap();
        for path in ["absolute/x/y", "relative/x/y", "../../outside/x/y"] {
            root.resolve_or_make(Path::new(path), Make::Directory, 0o755).unwrap();
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nothing may be made outside");
        assert!(inside.join("outside/x/y").is_dir());
    }

    #[test]
    fn a_dangling_link_is_followed_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("var")).unwrap();
        symlink("/run", dir.path().join("var/run")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.resolve_or_make(Path::new("/var/run/secrets/token"), Make::File, 0o755).unwrap();
        assert!(dir.path().join("run/secrets/token").is_file());
    }

    #[test]
    fn a_loop_of_links_ends_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert!(root.resolve_or_make(Path::new("a/x"), Make::Directory, 0o755).is_err());
    }
}
