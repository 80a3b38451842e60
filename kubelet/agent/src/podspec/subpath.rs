//! Parts of volumes. What a volume holds is under the control of pods, so a path in it is never walked by name from
//! outside: it is opened with `openat2` so that no link leads out of the volume, and that very directory or file is bound
//! to a place of ours, which a pod cannot exchange any more.

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Below the pod's directory: `<this>/<volume>/<container>/<index of the volume mount>`.
pub(super) const DIRECTORY: &str = "volume-subpaths";
/// A rename elsewhere in the volume can make the kernel give up a walk it cannot prove to be safe.
const ATTEMPTS: u32 = 32;

/// Binds `sub_path` of the volume at `base` to `target`, making missing directories with the mode of the volume's own.
pub(super) fn bind(base: &Path, sub_path: &Path, target: &Path) -> io::Result<()> {
    let root =
        rustix::fs::openat(CWD, base, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let source = open_or_make(&root, sub_path)?;
    let directory = FileType::from_raw_mode(rustix::fs::fstat(&source)?.st_mode) == FileType::Directory;
    // A former attempt of the container may have left a bind of something that was replaced since.
    detach(target)?;
    prepare_target(target, directory)?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(&source, "", flags)?;
    rustix::mount::move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Takes away all binds of a pod. Idempotent; goes on after a failure and returns the first.
pub(crate) fn release(pod_dir: &Path) -> io::Result<()> {
    let top = pod_dir.join(DIRECTORY);
    let mut first = Ok(());
    for volume in entries(&top)? {
        for container in entries(&volume)? {
            for place in entries(&container)? {
                let removed = detach(&place).and_then(|()| remove_place(&place));
                if first.is_ok() {
                    first = removed;
                }
            }
            let _ = std::fs::remove_dir(&container);
        }
        let _ = std::fs::remove_dir(&volume);
    }
    first?;
    match std::fs::remove_dir(&top) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Never recursive: if something is still mounted there, it is the pod's data.
fn remove_place(place: &Path) -> io::Result<()> {
    if place.symlink_metadata()?.is_dir() { std::fs::remove_dir(place) } else { std::fs::remove_file(place) }
}

/// Unmounts until nothing is mounted at `target`.
fn detach(target: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn prepare_target(target: &Path, directory: bool) -> io::Result<()> {
    if let Ok(present) = target.symlink_metadata()
        && present.is_dir() != directory
    {
        remove_place(target)?;
    }
    if directory {
        return std::fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(target).map(drop)
}

fn open_or_make(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    match open_beneath(root, path) {
        Err(Errno::NOENT) => {}
        other => return Ok(other?),
    }
    let mode = Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & 0o777);
    let mut walked = PathBuf::new();
    let mut parent =
        rustix::fs::openat(root, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for name in path.components() {
        walked.push(name);
        parent = match open_beneath(root, &walked) {
            Ok(found) => found,
            Err(Errno::NOENT) => make(&parent, name.as_os_str(), mode)?,
            Err(error) => return Err(error.into()),
        };
    }
    Ok(parent)
}

/// Makes one directory. Where a dangling link is in its place this fails, since `mkdir` does not follow it.
fn make(parent: &OwnedFd, name: &std::ffi::OsStr, mode: Mode) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(parent, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    // Against the umask; a set-group-ID bit that the parent handed down stays.
    let inherited = rustix::fs::fstat(&made)?.st_mode & 0o6000;
    rustix::fs::fchmod(&made, mode | Mode::from_raw_mode(inherited))?;
    Ok(made)
}

fn open_beneath(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match rustix::fs::openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::in_private_mounts;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn bound(base: &Path, sub_path: &str, target: &Path) -> io::Result<()> {
        bind(base, Path::new(sub_path), target)
    }

    #[test]
    fn parts_are_bound_made_and_released() {
        in_private_mounts(|| async {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("volume");
            fs::create_dir_all(base.join("a/b")).unwrap();
            fs::set_permissions(&base, fs::Permissions::from_mode(0o770)).unwrap();
            fs::write(base.join("a/file"), "content").unwrap();
            symlink("a", base.join("link")).unwrap();
            let pod = dir.path().join("pod");
            let place = |index: &str| pod.join(DIRECTORY).join("v").join("c").join(index);
            bound(&base, "link/file", &place("0")).unwrap();
            assert_eq!(fs::read_to_string(place("0")).unwrap(), "content");
            bound(&base, "new/deep", &place("1")).unwrap();
            fs::write(place("1").join("x"), "").unwrap();
            assert!(base.join("new/deep/x").exists());
            let mode = fs::metadata(base.join("new")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o770);
            // The next attempt of the container: what is there now, directory or file.
            fs::remove_file(base.join("a/file")).unwrap();
            fs::create_dir(base.join("a/file")).unwrap();
            bound(&base, "link/file", &place("0")).unwrap();
            assert!(place("0").is_dir());
            release(&pod).unwrap();
            release(&pod).unwrap();
            assert!(!pod.join(DIRECTORY).exists());
            assert!(base.join("new/deep/x").exists());
        });
    }

    #[test]
    fn no_link_leads_out_of_a_volume() {
        in_private_mounts(|| async {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("volume");
            let outside = dir.path().join("outside");
            fs::create_dir_all(base.join("sub")).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("secret"), "").unwrap();
            symlink(&outside, base.join("absolute")).unwrap();
            symlink("../outside", base.join("relative")).unwrap();
            symlink("/proc/self/root", base.join("magic")).unwrap();
            symlink("../../outside", base.join("sub/up")).unwrap();
            symlink("../outside/made", base.join("dangling")).unwrap();
            let target = dir.path().join("target");
            for path in [
                "absolute",
                "absolute/secret",
                "relative",
                "relative/new",
                "magic/etc",
                "sub/up",
                "sub/up/n",
                "dangling",
                "dangling/n",
            ] {
                let error = bound(&base, path, &target).unwrap_err();
                assert!(!target.exists(), "{path}: {error}");
            }
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "something was made outside");
        });
    }
}
