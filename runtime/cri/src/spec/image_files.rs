//! Reads single files out of an image's layers without mounting them.
//!
//! Layers are data from strangers: a symbolic link in them must lead to another path of the image and never to the
//! host. So paths are walked one component at a time, without following links, through the layers from the top, with
//! overlayfs' own marks for what a higher layer has removed.

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, readlinkat, statat};
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

const MAX_LINKS: usize = 40;
/// User databases are small; a larger one is somebody's attempt at our memory.
const MAX_BYTES: u64 = 4 << 20;

/// An image's merged tree.
#[derive(Debug)]
pub(crate) struct ImageFiles<'a> {
    layers: &'a [PathBuf],
}

enum Found {
    Link(OsString),
    Dir,
    File(OwnedFd),
    Other,
}

impl<'a> ImageFiles<'a> {
    /// `layers` as in a snapshot: the topmost first.
    pub(crate) fn new(layers: &'a [PathBuf]) -> Self {
        Self { layers }
    }

    /// The contents of a regular file; `None` when the image has none there.
    pub(crate) fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        match self.resolve(Path::new(path))? {
            Some((_, Found::File(fd))) => {
                let mut bytes = Vec::new();
                std::fs::File::from(fd).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
                if bytes.len() as u64 > MAX_BYTES {
                    return Err(io::Error::other(format!("{path} in the image exceeds {MAX_BYTES} bytes")));
                }
                Ok(Some(bytes))
            }
            _ => Ok(None),
        }
    }

    /// Whether the image has a directory there, and its path once links are resolved.
    pub(crate) fn directory(&self, path: &str) -> io::Result<Option<PathBuf>> {
        Ok(match self.resolve(Path::new(path))? {
            Some((resolved, Found::Dir)) => Some(resolved),
            _ => None,
        })
    }

    fn resolve(&self, path: &Path) -> io::Result<Option<(PathBuf, Found)>> {
        let mut pending: VecDeque<OsString> = components(path);
        let mut reached = PathBuf::new();
        let mut links = 0;
        let mut last = Found::Dir;
        while let Some(next) = pending.pop_front() {
            if next == ".." {
                reached.pop();
                last = Found::Dir;
                continue;
            }
            let candidate = reached.join(&next);
            match self.lookup(&candidate)? {
                None => return Ok(None),
                Some(Found::Link(target)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(io::Error::other(format!("too many links at {}", path.display())));
                    }
                    if target.as_bytes().first() == Some(&b'/') {
                        reached = PathBuf::new();
                    }
                    for part in components(Path::new(&target)).into_iter().rev() {
                        pending.push_front(part);
                    }
                    last = Found::Dir;
                }
                Some(Found::Dir) => {
                    reached = candidate;
                    last = Found::Dir;
                }
                Some(found) => {
                    if !pending.is_empty() {
                        return Ok(None);
                    }
                    return Ok(Some((candidate, found)));
                }
            }
        }
        Ok(Some((reached, last)))
    }

    /// One path without links in it, as overlayfs would show it.
    fn lookup(&self, path: &Path) -> io::Result<Option<Found>> {
        for layer in self.layers {
            match in_layer(layer, path)? {
                InLayer::Absent => {}
                InLayer::Hidden => return Ok(None),
                InLayer::Present(found) => return Ok(Some(found)),
            }
        }
        Ok(None)
    }
}

enum InLayer {
    Absent,
    /// Removed by this layer, or below a directory that replaces those beneath.
    Hidden,
    Present(Found),
}

fn in_layer(layer: &Path, path: &Path) -> io::Result<InLayer> {
    let directory = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = rustix::fs::open(layer, directory, Mode::empty())?;
    let mut opaque = false;
    let names: Vec<&OsStr> = path.iter().collect();
    for (index, name) in names.iter().enumerate() {
        let stat = match statat(&dir, *name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(rustix::io::Errno::NOENT) if opaque => return Ok(InLayer::Hidden),
            Err(rustix::io::Errno::NOENT) => return Ok(InLayer::Absent),
            Err(error) => return Err(error.into()),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            return Ok(InLayer::Hidden);
        }
        let last = index + 1 == names.len();
        match kind {
            FileType::Directory => {
                dir = openat(&dir, *name, directory, Mode::empty())?;
                opaque |= is_opaque(&dir);
            }
            _ if !last => return Ok(InLayer::Hidden),
            FileType::Symlink => {
                let target = readlinkat(&dir, *name, Vec::new())?;
                return Ok(InLayer::Present(Found::Link(OsString::from_vec(target.into_bytes()))));
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                return Ok(InLayer::Present(Found::File(openat(&dir, *name, flags, Mode::empty())?)));
            }
            _ => return Ok(InLayer::Present(Found::Other)),
        }
    }
    Ok(InLayer::Present(Found::Dir))
}

fn is_opaque(dir: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd as _;
    // An O_PATH descriptor takes no fgetxattr; its /proc entry does.
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|name| {
        let mut value = [0u8; 4];
        rustix::fs::getxattr(&path, *name, &mut value).is_ok_and(|length| value[..length] == *b"y")
    })
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn layers() -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<_> = ["top", "bottom"].iter().map(|n| dir.path().join(n)).collect();
        for layer in &layers {
            fs::create_dir_all(layer.join("etc")).unwrap();
        }
        (dir, layers)
    }

    #[test]
    fn a_link_to_an_absolute_path_stays_inside_the_image() {
        let (_dir, layers) = layers();
        symlink("/etc/shadow-of-host", layers[0].join("etc/passwd")).unwrap();
        fs::write(layers[1].join("etc/shadow-of-host"), "inside").unwrap();
        let files = ImageFiles::new(&layers);
        assert_eq!(files.read("/etc/passwd").unwrap().unwrap(), b"inside");
        symlink("../../../../../etc/hostname", layers[0].join("etc/group")).unwrap();
        assert_eq!(files.read("/etc/group").unwrap(), None);
    }

    #[test]
    fn a_higher_layer_hides_what_it_removed() {
        let (_dir, layers) = layers();
        fs::write(layers[1].join("etc/passwd"), "old").unwrap();
        assert_eq!(ImageFiles::new(&layers).read("etc/passwd").unwrap().unwrap(), b"old");
        let whiteout = layers[0].join("etc/passwd");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &whiteout,
            FileType::CharacterDevice,
            Mode::empty(),
            rustix::fs::makedev(0, 0),
        )
        .unwrap();
        assert_eq!(ImageFiles::new(&layers).read("etc/passwd").unwrap(), None);
    }

    #[test]
    fn a_circle_of_links_is_an_error_and_not_a_loop() {
        let (_dir, layers) = layers();
        symlink("b", layers[0].join("a")).unwrap();
        symlink("a", layers[1].join("b")).unwrap();
        assert!(ImageFiles::new(&layers).read("a").is_err());
    }
}
