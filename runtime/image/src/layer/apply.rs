//! Writes tar members below one directory, in overlayfs form, and never anywhere else.
//!
//! Every parent is opened relative to the layer's root with `openat2(RESOLVE_IN_ROOT)`, so symbolic links inside the
//! layer lead where they would lead in the container and nothing leads out; the last component is never followed.
//! Deletions become overlayfs whiteouts (character device 0:0) and opaque directories (`trusted.overlay.opaque`).
//! Overlay attributes that an image brings along are dropped: they could redirect lookups in the merged tree.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::tarstream::{Kind, Member, Segment, TarStream};
use super::{LayerError, tree};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const MAX_DANGLING_LINKS: usize = 8;
const IMPLIED_MODE: Mode = Mode::from_raw_mode(0o755);
const BUFFER: usize = 128 * 1024;

/// Owner, mode and time of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DirectoryMeta {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

/// What the archive left unsaid.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// The layer's own entry for `/`, if it has one.
    pub(crate) root: Option<DirectoryMeta>,
    /// Directories the layer needs but does not describe: theirs are the attributes of the layers below.
    pub(crate) implied: Vec<PathBuf>,
}

/// Unpacks one layer into one directory.
pub(crate) struct Applier {
    root: OwnedFd,
    /// Where replaced directories go to be removed; on the same file system, outside the layer.
    scratch: OwnedFd,
    /// Members come grouped by directory, so the last parent is nearly always the next one.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    directory_times: BTreeMap<PathBuf, Timestamps>,
    implied: BTreeSet<PathBuf>,
    root_meta: Option<DirectoryMeta>,
    buffer: Vec<u8>,
}

impl Applier {
    pub(crate) fn new(root: &Path, scratch: &Path) -> Result<Self, LayerError> {
        let open =
            |path: &Path| tree::open_directory(path).map_err(|cause| LayerError::io("open", path, cause));
        let root_fd = open(root)?;
        // Whatever the umask says; the archive may say otherwise.
        rustix::fs::fchmod(&root_fd, IMPLIED_MODE)
            .map_err(|cause| LayerError::io("change mode of", root, cause))?;
        Ok(Self {
            root: root_fd,
            scratch: open(scratch)?,
            parent: None,
            directory_times: BTreeMap::new(),
            implied: BTreeSet::new(),
            root_meta: None,
            buffer: vec![0; BUFFER],
        })
    }

    /// Writes the whole archive; reads to the end of `source`.
    pub(crate) fn apply(mut self, source: impl Read) -> Result<Applied, LayerError> {
        let mut stream = TarStream::new(source);
        while let Some(member) = stream.next()? {
            self.member(&member, &mut stream)?;
        }
        stream.drain()?;
        self.set_directory_times()?;
        Ok(Applied { root: self.root_meta, implied: self.implied.into_iter().collect() })
    }

    fn member<R: Read>(&mut self, member: &Member, stream: &mut TarStream<R>) -> Result<(), LayerError> {
        let path = relative(&member.path)?;
        let Some(name) = path.file_name() else { return self.root_entry(member) };
        let parent_path = path.parent().unwrap_or_else(|| Path::new(""));
        let parent = self.parent(parent_path)?;
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.whiteout(&path, parent_path, &parent, name.as_bytes(), hidden);
        }
        let opaque = self.make_room(member, &path, &parent, name)?;
        match member.kind {
            Kind::File => self.file(member, &path, &parent, name, stream)?,
            Kind::Directory => self.directory(member, &path, &parent, name, opaque)?,
            Kind::Hardlink => self.hardlink(member, &path, &parent, name)?,
            Kind::Symlink => {
                if member.link.is_empty() || member.link.contains(&0) {
                    return Err(LayerError::Entry { path, reason: "a symbolic link without a target" });
                }
                rustix::fs::symlinkat(OsStr::from_bytes(&member.link), &parent, name)
                    .map_err(|cause| LayerError::io("create", &path, cause))?;
                attributes_by_name(member, &path, &parent, name)?;
            }
            Kind::Fifo | Kind::CharDevice | Kind::BlockDevice => {
                let kind = match member.kind {
                    Kind::Fifo => FileType::Fifo,
                    Kind::CharDevice => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let device = rustix::fs::makedev(member.device.0, member.device.1);
                rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(0o600), device)
                    .map_err(|cause| LayerError::io("create", &path, cause))?;
                attributes_by_name(member, &path, &parent, name)?;
            }
        }
        Ok(())
    }

    fn root_entry(&mut self, member: &Member) -> Result<(), LayerError> {
        if member.kind != Kind::Directory {
            return Err(LayerError::Entry { path: "/".into(), reason: "the root is not a directory" });
        }
        attributes_by_fd(member, Path::new("/"), &self.root)?;
        self.root_meta = Some(DirectoryMeta { uid: member.uid, gid: member.gid, mode: member.mode });
        self.directory_times.insert(PathBuf::new(), times(member));
        Ok(())
    }

    fn whiteout(
        &mut self,
        path: &Path,
        parent_path: &Path,
        parent: &OwnedFd,
        name: &[u8],
        hidden: &[u8],
    ) -> Result<(), LayerError> {
        if name == OPAQUE_MARKER {
            return set_opaque(parent, parent_path);
        }
        // Other names with the doubled prefix are the bookkeeping of aufs.
        if name.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::Escape { path: path.to_owned() });
        }
        let hidden = OsStr::from_bytes(hidden);
        match file_type(parent, hidden).map_err(|cause| LayerError::io("examine", path, cause))? {
            // A whiteout speaks of the layers below: what this layer itself puts there stays.
            Some(FileType::Directory) => {
                let directory = rustix::fs::openat(parent, hidden, directory_flags(), Mode::empty())
                    .map_err(|cause| LayerError::io("open", path, cause))?;
                set_opaque(&directory, path)
            }
            Some(_) => Ok(()),
            None => rustix::fs::mknodat(
                parent,
                hidden,
                FileType::CharacterDevice,
                Mode::empty(),
                rustix::fs::makedev(0, 0),
            )
            .map_err(|cause| LayerError::io("create whiteout", path, cause)),
        }
    }

    /// Removes what an earlier member left in the way. True if that was a whiteout now replaced by a directory, which
    /// must then be opaque.
    fn make_room(
        &mut self,
        member: &Member,
        path: &Path,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<bool, LayerError> {
        let existing = file_type(parent, name).map_err(|cause| LayerError::io("examine", path, cause))?;
        match (existing, member.kind) {
            (None, _) | (Some(FileType::Directory), Kind::Directory) => return Ok(false),
            // A link to itself says nothing.
            (Some(_), Kind::Hardlink) if relative(&member.link)? == path => return Ok(false),
            _ => {}
        }
        let whiteout = existing == Some(FileType::CharacterDevice)
            && rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| stat.st_rdev == 0);
        let c_name = std::ffi::CString::new(name.as_bytes())
            .map_err(|_| LayerError::Entry { path: path.to_owned(), reason: "its name holds a NUL byte" })?;
        tree::remove(parent.as_fd(), &c_name, self.scratch.as_fd())
            .map_err(|cause| LayerError::io("replace", path, cause))?;
        self.parent = None;
        Ok(whiteout && member.kind == Kind::Directory)
    }

    fn file<R: Read>(
        &mut self,
        member: &Member,
        path: &Path,
        parent: &OwnedFd,
        name: &OsStr,
        stream: &mut TarStream<R>,
    ) -> Result<(), LayerError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))
            .map_err(|cause| LayerError::io("create", path, cause))?;
        let mut file = File::from(file);
        let failed = |cause: io::Error| LayerError::io("write", path, cause);
        let whole = [Segment { offset: 0, length: member.size }];
        for segment in member.sparse.as_deref().unwrap_or(&whole) {
            if member.sparse.is_some() {
                file.seek(SeekFrom::Start(segment.offset)).map_err(failed)?;
            }
            let mut left = segment.length;
            while left > 0 {
                let want = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
                let got = stream.read(&mut self.buffer[..want])?;
                if got == 0 {
                    return Err(LayerError::Malformed("a file has less data than its header says"));
                }
                file.write_all(&self.buffer[..got]).map_err(failed)?;
                left -= got as u64;
            }
        }
        if member.sparse.is_some() {
            file.set_len(member.size).map_err(failed)?;
        }
        let file = OwnedFd::from(file);
        attributes_by_fd(member, path, &file)?;
        rustix::fs::futimens(&file, &times(member))
            .map_err(|cause| LayerError::io("set times of", path, cause))
    }

    fn directory(
        &mut self,
        member: &Member,
        path: &Path,
        parent: &OwnedFd,
        name: &OsStr,
        opaque: bool,
    ) -> Result<(), LayerError> {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(cause) => return Err(LayerError::io("create", path, cause)),
        }
        let directory = rustix::fs::openat(parent, name, directory_flags(), Mode::empty())
            .map_err(|cause| LayerError::io("open", path, cause))?;
        attributes_by_fd(member, path, &directory)?;
        if opaque {
            set_opaque(&directory, path)?;
        }
        self.implied.remove(path);
        self.directory_times.insert(path.to_owned(), times(member));
        Ok(())
    }

    /// The target must be in this layer: the layers below are not at hand, and copying from them would make the
    /// layer's content depend on where it is used.
    fn hardlink(
        &mut self,
        member: &Member,
        path: &Path,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), LayerError> {
        let target = relative(&member.link)?;
        if target == path {
            return Ok(());
        }
        let missing = || LayerError::MissingLinkTarget { path: path.to_owned(), target: target.clone() };
        let target_name = target.file_name().ok_or_else(missing)?;
        let target_parent = match open_in_root(&self.root, target.parent().unwrap_or_else(|| Path::new(""))) {
            Ok(target_parent) => target_parent,
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(missing()),
            Err(cause) => return Err(LayerError::io("open the parent of", &target, cause)),
        };
        match rustix::fs::linkat(&target_parent, target_name, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(missing()),
            Err(cause) => Err(LayerError::io("link", path, cause)),
        }
    }

    /// The directory `path`, made where it is missing.
    fn parent(&mut self, path: &Path) -> Result<Rc<OwnedFd>, LayerError> {
        if let Some((cached, directory)) = &self.parent
            && cached == path
        {
            return Ok(Rc::clone(directory));
        }
        let directory = match open_in_root(&self.root, path) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => {
                self.make_directories(path, 0)?;
                open_in_root(&self.root, path).map_err(|cause| LayerError::io("open", path, cause))?
            }
            Err(cause) => return Err(LayerError::io("open", path, cause)),
        };
        let directory = Rc::new(directory);
        self.parent = Some((path.to_owned(), Rc::clone(&directory)));
        Ok(directory)
    }

    fn make_directories(&mut self, path: &Path, links: usize) -> Result<(), LayerError> {
        let mut done = PathBuf::new();
        for component in path.components() {
            let above =
                open_in_root(&self.root, &done).map_err(|cause| LayerError::io("open", &done, cause))?;
            let name = component.as_os_str();
            let next = done.join(name);
            match rustix::fs::mkdirat(&above, name, IMPLIED_MODE) {
                Ok(()) => {
                    rustix::fs::chmodat(&above, name, IMPLIED_MODE, AtFlags::empty())
                        .map_err(|cause| LayerError::io("change mode of", &next, cause))?;
                    self.implied.insert(next.clone());
                }
                Err(Errno::EXIST) => match open_in_root(&self.root, &next) {
                    Ok(_) => {}
                    // A symbolic link whose target is in a layer below.
                    Err(Errno::NOENT) if links < MAX_DANGLING_LINKS => {
                        let target = rustix::fs::readlinkat(&above, name, Vec::new())
                            .map_err(|cause| LayerError::io("read link", &next, cause))?;
                        let target = link_target(&done, Path::new(OsStr::from_bytes(target.as_bytes())));
                        self.make_directories(&target, links + 1)?;
                    }
                    Err(cause) => return Err(LayerError::io("open", &next, cause)),
                },
                Err(cause) => return Err(LayerError::io("create", &next, cause)),
            }
            done = next;
        }
        Ok(())
    }

    /// Last, because every file made inside a directory changes its time.
    fn set_directory_times(&mut self) -> Result<(), LayerError> {
        for (path, times) in &self.directory_times {
            match open_in_root(&self.root, path) {
                Ok(directory) => {
                    let at = format!("/proc/self/fd/{}", directory.as_raw_fd());
                    rustix::fs::utimensat(rustix::fs::CWD, at, times, AtFlags::empty())
                        .map_err(|cause| LayerError::io("set times of", path, cause))?;
                }
                // Replaced by a later member.
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(cause) => return Err(LayerError::io("open", path, cause)),
            }
        }
        Ok(())
    }
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn open_in_root(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    loop {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // The kernel saw a rename during a walk through "..": it asks for another try.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// A member's path relative to the layer's root: no leading slash, no ".", never a "..".
fn relative(path: &[u8]) -> Result<PathBuf, LayerError> {
    let given = Path::new(OsStr::from_bytes(path));
    if path.contains(&0) {
        return Err(LayerError::Entry { path: given.to_owned(), reason: "its name holds a NUL byte" });
    }
    let mut clean = PathBuf::new();
    for component in given.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(LayerError::Escape { path: given.to_owned() });
            }
        }
    }
    Ok(clean)
}

/// Where a link in directory `at` points, as a path below the root that never rises above it.
fn link_target(at: &Path, target: &Path) -> PathBuf {
    let mut result = if target.is_absolute() { PathBuf::new() } else { at.to_owned() };
    for component in target.components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            _ => {}
        }
    }
    result
}

fn file_type(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<Option<FileType>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(cause) => Err(cause),
    }
}

fn set_opaque(directory: &OwnedFd, path: &Path) -> Result<(), LayerError> {
    // The descriptor may be an O_PATH one, on which fsetxattr is refused.
    let at = format!("/proc/self/fd/{}", directory.as_raw_fd());
    rustix::fs::setxattr(at, "trusted.overlay.opaque", b"y", XattrFlags::empty())
        .map_err(|cause| LayerError::io("mark opaque", path, cause))
}

fn times(member: &Member) -> Timestamps {
    let at = Timespec { tv_sec: member.mtime.0, tv_nsec: i64::from(member.mtime.1) };
    Timestamps { last_access: at, last_modification: at }
}

/// Owner before mode, because changing the owner clears set-id bits; capabilities after both, for the same reason.
fn attributes_by_fd(member: &Member, path: &Path, fd: &OwnedFd) -> Result<(), LayerError> {
    let failed = |operation| move |cause: Errno| LayerError::io(operation, path, cause);
    rustix::fs::fchown(fd, Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))
        .map_err(failed("change owner of"))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(member.mode)).map_err(failed("change mode of"))?;
    for (name, value) in wanted_xattrs(member) {
        let set = rustix::fs::fsetxattr(fd, OsStr::from_bytes(name), value, XattrFlags::empty());
        tolerate_xattr(set, name).map_err(failed("set an extended attribute of"))?;
    }
    Ok(())
}

fn attributes_by_name(
    member: &Member,
    path: &Path,
    parent: &OwnedFd,
    name: &OsStr,
) -> Result<(), LayerError> {
    let failed = |operation| move |cause: Errno| LayerError::io(operation, path, cause);
    let (uid, gid) = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("change owner of"))?;
    if member.kind != Kind::Symlink {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(member.mode), AtFlags::empty())
            .map_err(failed("change mode of"))?;
    }
    for (attribute, value) in wanted_xattrs(member) {
        let at = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
        let set = rustix::fs::lsetxattr(at, OsStr::from_bytes(attribute), value, XattrFlags::empty());
        tolerate_xattr(set, attribute).map_err(failed("set an extended attribute of"))?;
    }
    rustix::fs::utimensat(parent, name, &times(member), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("set times of"))
}

fn wanted_xattrs(member: &Member) -> impl Iterator<Item = (&[u8], &[u8])> {
    member
        .xattrs
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .filter(|(name, _)| !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay."))
}

/// File systems without the attribute's namespace, and user attributes on special files, are not worth an image.
fn tolerate_xattr(set: rustix::io::Result<()>, name: &[u8]) -> rustix::io::Result<()> {
    match set {
        Err(Errno::OPNOTSUPP) => Ok(()),
        Err(Errno::PERM) if name.starts_with(b"user.") => Ok(()),
        other => other,
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
