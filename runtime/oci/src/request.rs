//! What a caller asks for: a container to create, a process to run in one.

use crate::cgroup::MissingControllers;
use crate::id::ContainerId;
use oci_spec::runtime::{Process, Spec};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where the container's root file system comes from.
#[derive(Debug, Clone, Default)]
pub enum Rootfs {
    /// `root.path` as it is.
    #[default]
    Bundle,
    /// An overlay that the container's init mounts on `root.path` inside its own mount namespace, so that the host
    /// never sees it and nothing is left behind.
    Overlay(Overlay),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Read-only layers, the topmost first.
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    /// The kernel's scratch directory, on the file system of `upper`.
    pub work: PathBuf,
}

/// The standard streams of a new process.
#[derive(Debug, Default)]
pub enum Stdio {
    /// The caller's own.
    #[default]
    Inherit,
    Fds {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// A terminal allocated in the container's devpts; the master comes back with the finished container or process.
    Terminal,
}

/// A container to create. Start from [`CreateRequest::new`] and change what differs.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    pub id: &'a ContainerId,
    /// Absolute; relative paths of the specification are resolved against it.
    pub bundle: &'a Path,
    pub spec: &'a Spec,
    /// Holds one directory per container; made with mode 0700 if absent.
    pub state_root: &'a Path,
    pub rootfs: Rootfs,
    pub stdio: Stdio,
    /// Root of the cgroup v2 tree.
    pub cgroup_root: &'a Path,
    pub missing_controllers: MissingControllers,
    /// Use `MS_MOVE` and chroot where `pivot_root` cannot work (root on an initramfs).
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// How many descriptors from number 3 on the container's process keeps (socket activation).
    pub preserve_fds: u32,
}

impl<'a> CreateRequest<'a> {
    pub fn new(id: &'a ContainerId, bundle: &'a Path, spec: &'a Spec, state_root: &'a Path) -> Self {
        Self {
            id,
            bundle,
            spec,
            state_root,
            rootfs: Rootfs::default(),
            stdio: Stdio::default(),
            cgroup_root: Path::new(crate::cgroup::DEFAULT_ROOT),
            missing_controllers: MissingControllers::from_env(),
            no_pivot: false,
            no_new_keyring: false,
            preserve_fds: 0,
        }
    }
}

/// One more process in a running container. Start from [`ExecRequest::new`].
#[derive(Debug)]
pub struct ExecRequest<'a> {
    pub process: &'a Process,
    pub stdio: Stdio,
    /// Run in this cgroup below the container's own.
    pub sub_cgroup: Option<&'a Path>,
    /// Join a paused container all the same (the process then waits frozen).
    pub ignore_paused: bool,
    pub preserve_fds: u32,
}

impl<'a> ExecRequest<'a> {
    pub fn new(process: &'a Process) -> Self {
        Self { process, stdio: Stdio::default(), sub_cgroup: None, ignore_paused: false, preserve_fds: 0 }
    }
}
