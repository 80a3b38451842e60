//! Device nodes and the usual links in /dev.

use crate::inroot::{Make, Root};
use crate::mounts::apply::{attach, clone_tree};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("device {}: number {major}:{minor} is out of range", .path.display())]
    Number { path: PathBuf, major: i64, minor: i64 },
    #[error("device {}: type must be b, c, u or p", .0.display())]
    Type(PathBuf),
    #[error("make device {}", .path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("device {} exists already and is another one", .0.display())]
    Differs(PathBuf),
    #[error("make link {}", .path.display())]
    Link { path: PathBuf, source: io::Error },
}

/// A node to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    path: PathBuf,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    uid: u32,
    gid: u32,
}

const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The default nodes and those of the specification; one that the specification lists itself is taken from there.
pub(crate) fn plan(listed: &[LinuxDevice]) -> Result<Vec<Node>, Error> {
    let mut nodes: Vec<Node> = DEFAULTS
        .iter()
        .filter(|(path, ..)| !listed.iter().any(|device| device.path() == Path::new(path)))
        .map(|&(path, major, minor)| Node {
            path: path.into(),
            kind: FileType::CharacterDevice,
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
        .collect();
    for device in listed {
        let path = device.path().clone();
        let (kind, numbered) = match device.typ() {
            LinuxDeviceType::B => (FileType::BlockDevice, true),
            LinuxDeviceType::C | LinuxDeviceType::U => (FileType::CharacterDevice, true),
            LinuxDeviceType::P => (FileType::Fifo, false),
            LinuxDeviceType::A => return Err(Error::Type(path)),
        };
        let (major, minor) = if numbered { (device.major(), device.minor()) } else { (0, 0) };
        let (Ok(major), Ok(minor)) = (u32::try_from(major), u32::try_from(minor)) else {
            return Err(Error::Number { path, major, minor });
        };
        nodes.push(Node {
            path,
            kind,
            major,
            minor,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    Ok(nodes)
}

/// Makes the nodes; in a user namespace, where mknod is refused, by binding the host's. Expects a umask of 0.
pub(crate) fn make(root: &Root, nodes: &[Node], user_ns: bool) -> Result<(), Error> {
    for node in nodes {
        let made = if user_ns && node.kind != FileType::Fifo { bind(root, node) } else { mknod(root, node)? };
        made.map_err(|source| Error::Make { path: node.path.clone(), source })?;
    }
    Ok(())
}

fn bind(root: &Root, node: &Node) -> io::Result<()> {
    let source = rustix::fs::open(&node.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let copy = clone_tree(&source, false)?;
    attach(&copy, root.resolve_or_make(&node.path, Make::File, 0o755)?)
}

/// The outer error is "there is another one"; the inner one the system's.
fn mknod(root: &Root, node: &Node) -> Result<io::Result<()>, Error> {
    let (parent, name) = match root.parent_of(&node.path) {
        Ok(found) => found,
        Err(error) => return Ok(Err(error)),
    };
    let device = rustix::fs::makedev(node.major, node.minor);
    match rustix::fs::mknodat(&parent, &name, node.kind, Mode::from_raw_mode(node.mode), device) {
        Ok(()) => {}
        Err(Errno::EXIST) => match rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat)
                if FileType::from_raw_mode(stat.st_mode) == node.kind
                    && (node.kind == FileType::Fifo || stat.st_rdev == device) =>
            {
                return Ok(Ok(()));
            }
            Ok(_) => return Err(Error::Differs(node.path.clone())),
            Err(errno) => return Ok(Err(errno.into())),
        },
        Err(errno) => return Ok(Err(errno.into())),
    }
    let owner = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
    Ok(rustix::fs::chownat(&parent, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into))
}

/// `/dev/fd` and its kin, and `ptmx` of the container's own devpts.
pub(crate) fn links(root: &Root) -> Result<(), Error> {
    let all = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("/proc/kcore", "/dev/core"),
    ];
    let fail = |path: &str| {
        let path = path.into();
        move |source: io::Error| Error::Link { path, source }
    };
    for (target, link) in all {
        if target == "/proc/kcore" && !Path::new("/proc/kcore").exists() {
            continue;
        }
        let (parent, name) = root.parent_of(Path::new(link)).map_err(fail(link))?;
        symlink(&parent, &name, target, false).map_err(fail(link))?;
    }
    let (parent, name) = root.parent_of(Path::new("/dev/ptmx")).map_err(fail("/dev/ptmx"))?;
    symlink(&parent, &name, "pts/ptmx", true).map_err(fail("/dev/ptmx"))
}

fn symlink(parent: impl std::os::fd::AsFd, name: &OsStr, target: &str, replace: bool) -> io::Result<()> {
    let parent: BorrowedFd<'_> = parent.as_fd();
    match rustix::fs::symlinkat(target, parent, name) {
        Err(Errno::EXIST) if replace => {
            // The host's ptmx would open terminals of the host.
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            Ok(rustix::fs::symlinkat(target, parent, name)?)
        }
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_device_replaces_the_default_of_its_path() {
        let listed: Vec<LinuxDevice> =
            serde_json::from_str(r#"[{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384}]"#)
                .unwrap();
        let nodes = plan(&listed).unwrap();
        let null: Vec<_> = nodes.iter().filter(|node| node.path == Path::new("/dev/null")).collect();
        assert_eq!((nodes.len(), null.len(), null[0].mode), (6, 1, 0o600));
    }

    #[test]
    fn a_negative_number_is_refused() {
        let listed: Vec<LinuxDevice> =
            serde_json::from_str(r#"[{"path":"/dev/x","type":"b","major":-1,"minor":0}]"#).unwrap();
        assert!(matches!(plan(&listed), Err(Error::Number { .. })));
    }
}
