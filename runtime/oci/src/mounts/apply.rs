//! Making the planned mounts below a container's root.

use super::Error;
use super::options::Options;
use super::plan::{Kind, Planned, allowed_inside_proc};
use crate::inroot::{self, Make, Root};
use crate::syscall::attr;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// What mounts depend on beside their own plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) cgroup: &'a Path,
    /// The container has a cgroup namespace of its own.
    pub(crate) cgroup_ns: bool,
    pub(crate) user_ns: bool,
}

/// A step that failed, before it is known for which mount.
#[derive(Debug)]
struct Failure {
    step: &'static str,
    message: Option<String>,
    source: io::Error,
}

type Step<T> = Result<T, Failure>;

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Step<T> {
    result.map_err(|source| Failure { step, message: None, source: source.into() })
}

/// Makes one mount. A tmpfs asked to be read-only comes back still writable, for the caller to seal once everything
/// below it has been made.
pub(crate) fn apply(root: &Root, mount: &Planned, context: Context<'_>) -> Result<Option<OwnedFd>, Error> {
    let done = match &mount.kind {
        Kind::Bind { source, recursive } => bind(root, mount, source, *recursive).map(|()| None),
        Kind::Cgroup => cgroup(root, mount, context).map(|()| None),
        Kind::Filesystem { fs, source } => filesystem(root, mount, fs, source, context),
        Kind::Remount => remount(root, mount).map(|()| None),
    };
    done.map_err(|failure| match failure.source.raw_os_error() {
        Some(INSIDE_PROC) if failure.step == CHECK_PROC => Error::InsideProc(mount.destination.clone()),
        _ => Error::Mount {
            kind: describe(&mount.kind),
            destination: mount.destination.clone(),
            step: failure.step.to_owned(),
            message: failure.message,
            source: failure.source,
        },
    })
}

const CHECK_PROC: &str = "check that the destination is not inside /proc";
const INSIDE_PROC: i32 = libc::EPERM;

fn describe(kind: &Kind) -> String {
    match kind {
        Kind::Bind { source, .. } => source.display().to_string(),
        Kind::Cgroup => "cgroup".to_owned(),
        Kind::Filesystem { fs, .. } => fs.clone(),
        Kind::Remount => "again".to_owned(),
    }
}

/// A copy of the mount (or of the part of it) that `fd` refers to, attached nowhere.
pub(crate) fn clone_tree(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(fd, "", flags)?)
}

/// Attaches a detached mount on what `target` refers to.
pub(crate) fn attach(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

fn open_target(root: &Root, destination: &Path, make: Make) -> Step<OwnedFd> {
    let target = step("make the destination", root.resolve_or_make(destination, make, 0o755))?;
    // A link of the image may lead into proc although the destination's name does not.
    let magic = step("look at the destination", inroot::fs_magic(&target))?;
    if magic == inroot::PROC_MAGIC && destination != Path::new("/proc") && !allowed_inside_proc(destination) {
        return step(CHECK_PROC, Err(io::Error::from_raw_os_error(INSIDE_PROC)));
    }
    Ok(target)
}

fn bind(root: &Root, mount: &Planned, source: &Path, recursive: bool) -> Step<()> {
    let source =
        step("open the source", rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
    let directory = step("look at the source", inroot::kind(&source))? == FileType::Directory;
    let copy = step("copy the source's mount", clone_tree(&source, recursive))?;
    let make = if directory { Make::Directory } else { Make::File };
    let target = open_target(root, &mount.destination, make)?;
    let mut attributes = mount.options.attributes;
    // `rw` does not lift the read-only state that the host gave the source.
    attributes.clear &= !attr::RDONLY;
    step("set the attributes", set_attributes(&copy, attributes, false))?;
    step("attach", attach(&copy, &target))?;
    finish(&copy, &mount.options)
}

fn set_attributes(
    mount: impl AsFd,
    attributes: super::options::Attributes,
    recursive: bool,
) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    attr::set(mount, recursive, attributes.set, attributes.clear)
}

/// Recursive attributes and propagation, once the mount is in place.
fn finish(mount: &OwnedFd, options: &Options) -> Step<()> {
    step("set the recursive attributes", set_attributes(mount, options.recursive, true))?;
    for change in &options.propagation {
        step("change the propagation", attr::propagation(mount, change.recursive, change.kind))?;
    }
    Ok(())
}

fn remount(root: &Root, mount: &Planned) -> Step<()> {
    let target = open_target(root, &mount.destination, Make::Directory)?;
    step("set the attributes", set_attributes(&target, mount.options.attributes, false))?;
    finish(&target, &mount.options)
}

fn filesystem(
    root: &Root,
    mount: &Planned,
    fs: &str,
    source: &str,
    context: Context<'_>,
) -> Step<Option<OwnedFd>> {
    let seal_later = fs == "tmpfs" && mount.options.attributes.set & attr::RDONLY != 0;
    let attributes = mount.options.attributes.set & if seal_later { !attr::RDONLY } else { !0 };
    let existed = root.resolve(&mount.destination).is_ok();
    let target = open_target(root, &mount.destination, Make::Directory)?;
    let mut data = mount.options.data.clone();
    if fs == "tmpfs" && existed && !data.iter().any(|word| word.starts_with("mode=")) {
        // A tmpfs over an existing directory looks like that directory.
        let stat = step("look at the destination", rustix::fs::statat(&target, "", AtFlags::EMPTY_PATH))?;
        data.push(format!("mode={:o}", stat.st_mode & 0o7777));
    }
    let mut made = new_filesystem(fs, source, &data, attributes);
    if let Err(failure) = &made {
        let refused = matches!(failure.source.raw_os_error(), Some(libc::EPERM | libc::EBUSY | libc::EINVAL));
        made = match fs {
            // Without a network (or IPC) namespace of its own a container may not mount a new one; the host's
            // serves as well, under the same attributes.
            "sysfs" if refused => host_tree(Path::new("/sys"), attributes),
            "mqueue" if refused => host_tree(Path::new("/dev/mqueue"), attributes),
            // Group 5 (tty) need not be mapped in a user namespace.
            "devpts" if refused && context.user_ns => {
                data.retain(|word| !word.starts_with("gid="));
                new_filesystem(fs, source, &data, attributes)
            }
            _ => made,
        };
    }
    let made = made?;
    step("attach", attach(&made, &target))?;
    finish(&made, &mount.options)?;
    Ok(seal_later.then_some(made))
}

fn host_tree(path: &Path, attributes: u64) -> Step<OwnedFd> {
    let source =
        step("open the host's", rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
    let copy = step("copy the host's", clone_tree(&source, true))?;
    if attributes != 0 {
        step("set the attributes", attr::set(&copy, true, attributes, 0))?;
    }
    Ok(copy)
}

/// A new, detached mount.
fn new_filesystem(fs: &str, source: &str, data: &[String], attributes: u64) -> Step<OwnedFd> {
    let context = step("open the file system type", rustix::mount::fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC))?;
    let explain = |step: &'static str, errno: Errno| Failure {
        step,
        message: kernel_message(&context),
        source: errno.into(),
    };
    if !source.is_empty() {
        rustix::mount::fsconfig_set_string(&context, "source", source)
            .map_err(|errno| explain("set the source", errno))?;
    }
    for word in data {
        match word.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&context, key, value),
            None => rustix::mount::fsconfig_set_flag(&context, word.as_str()),
        }
        .map_err(|errno| explain("set an option", errno))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|errno| explain("create", errno))?;
    mount_context(&context, attributes).map_err(|errno| explain("mount", errno))
}

/// The mount of a configured file system context.
pub(crate) fn mount_context(context: &OwnedFd, attributes: u64) -> Result<OwnedFd, Errno> {
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or_default());
    rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// What the kernel has to say about the last failure of a file system context (`e overlay: No changes allowed …`).
pub(crate) fn kernel_message(context: &OwnedFd) -> Option<String> {
    let mut buffer = [0u8; 256];
    let length = rustix::io::read(context, &mut buffer).ok()?;
    let text = String::from_utf8_lossy(buffer.get(..length)?);
    Some(text.trim_start_matches(['e', 'w', 'i']).trim().to_owned())
}

fn cgroup(root: &Root, mount: &Planned, context: Context<'_>) -> Step<()> {
    let target = open_target(root, &mount.destination, Make::Directory)?;
    let attributes = mount.options.attributes.set;
    let made = if context.cgroup_ns {
        // In a cgroup namespace a new mount shows the container's cgroup as the root.
        new_filesystem("cgroup2", "cgroup", &[], attributes)?
    } else {
        let own = rustix::fs::openat(CWD, context.cgroup, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let copy = step(
            "copy the container's cgroup",
            clone_tree(step("open the container's cgroup", own)?, false),
        )?;
        if attributes != 0 {
            step("set the attributes", attr::set(&copy, false, attributes, 0))?;
        }
        copy
    };
    step("attach", attach(&made, &target))?;
    finish(&made, &mount.options)
}
