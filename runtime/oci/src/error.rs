//! The error every operation of this crate returns.

use crate::id::{ContainerId, InvalidId};
use crate::state::Status;
use crate::{cgroup, console, devices, hooks, mounts, namespaces, process, rootfs, seccomp, state, sysctl};
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    #[error("container with given ID already exists: {0}")]
    Exists(ContainerId),
    #[error("container does not exist: {0}")]
    NotExist(ContainerId),
    #[error("container not running")]
    NotRunning,
    #[error("cannot start a container that is {0}")]
    NotCreated(Status),
    #[error("cannot exec in a {0} container")]
    ExecRefused(Status),
    #[error("container is {actual}, not {wanted}")]
    WrongStatus { actual: Status, wanted: Status },
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped { id: ContainerId, status: Status },
    #[error("container's cgroup is not empty: {0} process(es) found")]
    CgroupNotEmpty(usize),
    #[error("container's cgroup unexpectedly frozen")]
    CgroupFrozen,
    #[error("timed out waiting for cgroup {} to become {wanted}", .cgroup.display())]
    FreezeTimeout { cgroup: PathBuf, wanted: &'static str },
    #[error("invalid specification: {0}")]
    Spec(&'static str),
    #[error("ociVersion {0:?} is not supported; use 1.x")]
    Version(String),
    #[error("root file system {}", .path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Namespace(#[from] namespaces::Error),
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Device(#[from] devices::Error),
    #[error(transparent)]
    Console(#[from] console::Error),
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    State(#[from] state::Error),
    #[error("{step}")]
    System { step: &'static str, source: io::Error },
    /// Set-up failed inside the container's process; the text is its own, causes included.
    #[error("{0}")]
    Init(String),
    #[error("the container's process died during set-up: {0}")]
    Died(String),
}

impl Error {
    pub(crate) fn system<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { step, source: source.into() }
    }

    pub fn is_not_exist(&self) -> bool {
        matches!(self, Self::NotExist(_))
    }

    /// The container, or the process asked for, has already ended.
    pub fn is_not_running(&self) -> bool {
        matches!(self, Self::NotRunning)
    }

    /// The error and its causes on one line, in the words that callers of runtimes match.
    pub fn report(&self) -> String {
        crate::channel::chain(self)
    }
}
