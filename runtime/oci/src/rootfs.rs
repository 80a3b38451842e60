//! A container's root: mounted, made the root directory, and parts of it hidden or made read-only.

use crate::inroot::{self, Root};
use crate::mounts::apply::{attach, clone_tree, kernel_message, mount_context};
use crate::request::{Overlay, Rootfs};
use crate::syscall::attr;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::mount::{
    FsOpenFlags, MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "linux.rootfsPropagation {0:?} is none of shared, slave, private, unbindable and their recursive forms"
    )]
    Propagation(String),
    #[error("change the propagation of {}", .path.display())]
    Change { path: PathBuf, source: io::Error },
    #[error("mount the root file system on {}: {step}{}", .path.display(), .message.as_deref().map(|m| format!(" ({m})")).unwrap_or_default())]
    Mount { path: PathBuf, step: &'static str, message: Option<String>, source: io::Error },
    #[error("make the container's root file system the root: {step}")]
    Pivot { step: &'static str, source: io::Error },
    #[error("mask {path}")]
    Mask { path: String, source: io::Error },
    #[error("make {path} read-only")]
    ReadOnly { path: String, source: io::Error },
}

/// `rslave` and the like, as flags of mount(2).
pub(crate) fn propagation(word: Option<&str>) -> Result<Option<MountPropagationFlags>, Error> {
    let Some(word) = word.filter(|word| !word.is_empty()) else { return Ok(None) };
    let recursive =
        if word.starts_with('r') { MountPropagationFlags::REC } else { MountPropagationFlags::empty() };
    let kind = match word.strip_prefix('r').unwrap_or(word) {
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "private" => MountPropagationFlags::PRIVATE,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return Err(Error::Propagation(word.to_owned())),
    };
    Ok(Some(kind | recursive))
}

/// Cuts the new mount namespace off from the host and mounts the root file system on `path`.
pub(crate) fn mount_root(
    path: &Path,
    rootfs: &Rootfs,
    asked: Option<MountPropagationFlags>,
) -> Result<Root, Error> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    change(Path::new("/"), asked.unwrap_or(slave))?;
    if asked.is_some_and(|flags| flags.contains(MountPropagationFlags::SHARED)) {
        // Otherwise the container's mounts would appear on the host, and pivot_root refuses such a parent.
        make_parent_private(path)?;
    }
    let fail = |step| {
        move |source: rustix::io::Errno| Error::Mount {
            path: path.to_owned(),
            step,
            message: None,
            source: source.into(),
        }
    };
    let open = || rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let place = open().map_err(fail("open it"))?;
    let mount = match rootfs {
        Rootfs::Bundle => Some(clone_tree(&place, true).map_err(|source| Error::Mount {
            path: path.to_owned(),
            step: "copy its mount",
            message: None,
            source,
        })?),
        Rootfs::Overlay(overlay) => mount_overlay(path, overlay)?,
    };
    let Some(mount) = mount else { return Ok(Root::new(open().map_err(fail("open it"))?)) };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", &place, "", flags).map_err(fail("attach"))?;
    Ok(Root::new(mount))
}

fn change(path: &Path, flags: MountPropagationFlags) -> Result<(), Error> {
    mount_change(path, flags).map_err(|source| Error::Change { path: path.to_owned(), source: source.into() })
}

fn make_parent_private(path: &Path) -> Result<(), Error> {
    for ancestor in path.ancestors() {
        match mount_change(ancestor, MountPropagationFlags::PRIVATE) {
            Ok(()) => return Ok(()),
            // Not a mount point: the mount begins further up.
            Err(rustix::io::Errno::INVAL) => {}
            Err(source) => return Err(Error::Change { path: ancestor.to_owned(), source: source.into() }),
        }
    }
    Ok(())
}

/// The longest string that fsconfig takes.
const FSCONFIG_STRING: usize = 255;

/// A detached overlay; or, on kernels without `lowerdir+` (before 6.7), one mounted on `path` by mount(2), and `None`.
fn mount_overlay(path: &Path, overlay: &Overlay) -> Result<Option<OwnedFd>, Error> {
    let fail =
        |step, message, source: io::Error| Error::Mount { path: path.to_owned(), step, message, source };
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| fail("open overlayfs", None, errno.into()))?;
    let set = |key: &str, value: &Path| {
        if value.as_os_str().len() <= FSCONFIG_STRING {
            return rustix::mount::fsconfig_set_string(&context, key, value);
        }
        let dir = rustix::fs::open(value, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::mount::fsconfig_set_string(&context, key, descriptor_path(&dir).as_str())
    };
    for (index, layer) in overlay.lower.iter().enumerate() {
        match set("lowerdir+", layer) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) if index == 0 && unknown_parameter(&context) => {
                mount_overlay_by_page(path, overlay)?;
                return Ok(None);
            }
            Err(errno) => return Err(fail("add a lower layer", kernel_message(&context), errno.into())),
        }
    }
    let explain = |step| {
        let context = &context;
        move |errno: rustix::io::Errno| fail(step, kernel_message(context), errno.into())
    };
    set("upperdir", &overlay.upper).map_err(explain("set the upper layer"))?;
    set("workdir", &overlay.work).map_err(explain("set the work directory"))?;
    rustix::mount::fsconfig_create(&context).map_err(explain("create the overlay"))?;
    mount_context(&context, 0).map(Some).map_err(explain("mount the overlay"))
}

fn unknown_parameter(context: &OwnedFd) -> bool {
    kernel_message(context).is_none_or(|message| message.contains("Unknown parameter"))
}

fn descriptor_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// mount(2) takes one page of options. Layers named by descriptor keep below it up to about 200 of them, and their
/// names need no escaping.
fn mount_overlay_by_page(path: &Path, overlay: &Overlay) -> Result<(), Error> {
    let fail = |step, source: rustix::io::Errno| Error::Mount {
        path: path.to_owned(),
        step,
        message: None,
        source: source.into(),
    };
    let open = |dir: &PathBuf| {
        rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| fail("open a layer", errno))
    };
    let lower = overlay.lower.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let (upper, work) = (open(&overlay.upper)?, open(&overlay.work)?);
    let layers = lower.iter().map(descriptor_path).collect::<Vec<_>>().join(":");
    let data =
        format!("lowerdir={layers},upperdir={},workdir={}", descriptor_path(&upper), descriptor_path(&work));
    let data = std::ffi::CString::new(data).unwrap_or_default();
    rustix::mount::mount("overlay", path, "overlay", MountFlags::empty(), Some(data.as_c_str()))
        .map_err(|errno| fail("mount the overlay", errno))
}

/// Makes `root` the root directory and drops everything else from the mount namespace.
pub(crate) fn pivot(root: &Root, by_moving: bool) -> Result<(), Error> {
    let fail = |step| move |errno: rustix::io::Errno| Error::Pivot { step, source: errno.into() };
    rustix::process::fchdir(root).map_err(fail("enter it"))?;
    if by_moving {
        // Where / is an initramfs, pivot_root cannot work. Other mounts stay in the namespace, out of sight.
        rustix::mount::mount_move(".", "/").map_err(fail("move it onto /"))?;
        rustix::process::chroot(".").map_err(fail("chroot"))?;
    } else {
        // Both names are ".": the old root ends up stacked on the new one, where the unmount below takes it off.
        rustix::process::pivot_root(".", ".").map_err(fail("pivot_root"))?;
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change(".", slave).map_err(fail("keep the unmount from the host"))?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(fail("unmount the old root"))?;
    }
    rustix::process::chdir("/").map_err(fail("enter the new root"))
}

/// The host's /dev/null, verified: an image must not be able to pass its own for it.
pub(crate) fn open_null() -> io::Result<OwnedFd> {
    let null =
        rustix::fs::open("/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::statat(&null, "", AtFlags::EMPTY_PATH)?;
    let genuine = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (1, 3);
    if genuine { Ok(null) } else { Err(io::Error::other("/dev/null is not the null device")) }
}

/// Hides paths: directories under one shared, empty, read-only tmpfs, anything else under the null device.
pub(crate) fn mask(root: &Root, paths: &[String], null: &OwnedFd) -> Result<(), Error> {
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        mask_one(root, path, null, &mut empty)
            .map_err(|source| Error::Mask { path: path.clone(), source })?;
    }
    Ok(())
}

fn mask_one(root: &Root, path: &str, null: &OwnedFd, empty: &mut Option<OwnedFd>) -> io::Result<()> {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    if inroot::kind(&target)? != FileType::Directory {
        return attach(clone_tree(null, false)?, &target);
    }
    match empty {
        Some(first) => attach(clone_tree(&*first, false)?, &target),
        None => {
            let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_set_string(&context, "mode", "555")?;
            rustix::mount::fsconfig_create(&context)?;
            let attributes = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
            let mount = mount_context(&context, attributes)?;
            attach(&mount, &target)?;
            *empty = Some(mount);
            Ok(())
        }
    }
}

fn existing(root: &Root, path: &str) -> io::Result<Option<OwnedFd>> {
    match root.resolve(Path::new(path)) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn make_read_only(root: &Root, paths: &[String]) -> Result<(), Error> {
    for path in paths {
        let one = || -> io::Result<()> {
            let Some(target) = existing(root, path)? else { return Ok(()) };
            let copy = clone_tree(&target, true)?;
            attr::set(&copy, true, attr::RDONLY, 0)?;
            attach(&copy, &target)
        };
        one().map_err(|source| Error::ReadOnly { path: path.clone(), source })?;
    }
    Ok(())
}

/// Makes the root mount itself read-only; mounts below it keep their own state.
pub(crate) fn seal(root: impl AsFd) -> Result<(), Error> {
    attr::set(root, false, attr::RDONLY, 0).map_err(|source| Error::ReadOnly { path: "/".to_owned(), source })
}
