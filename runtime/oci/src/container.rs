//! A container that exists: created, running, paused or stopped.

use crate::Error;
use crate::cgroup::Cgroup;
use crate::exec::StartingExec;
use crate::id::ContainerId;
use crate::request::ExecRequest;
use crate::state::Status;
use oci_spec::runtime::LinuxResources;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

/// A handle to a container. Dropping it leaves the container alone.
#[derive(Debug)]
pub struct Container {
    id: ContainerId,
}

impl Container {
    /// Finds a container by its state; works from any process.
    pub fn load(state_root: &Path, id: &ContainerId) -> Result<Self, Error> {
        todo!("{state_root:?} {id}")
    }

    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Init's process id in the caller's PID namespace.
    pub fn pid(&self) -> u32 {
        todo!()
    }

    /// Readable once init has exited; `None` when it had already gone at [`Container::load`].
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        todo!()
    }

    /// The terminal's master, once, after a create with [`crate::Stdio::Terminal`].
    pub fn take_console(&mut self) -> Option<OwnedFd> {
        todo!()
    }

    pub fn cgroup(&self) -> &Cgroup {
        todo!()
    }

    pub fn status(&self) -> Result<Status, Error> {
        todo!()
    }

    /// Lets the created container run its program. Returns when the program has been executed, or with the reason why
    /// it could not be. Blocks only for `startContainer` and `poststart` hooks.
    pub fn start(&self) -> Result<(), Error> {
        todo!()
    }

    /// Sends a signal to init.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        todo!("{signal}")
    }

    /// SIGKILL to every process of the container.
    pub fn kill_all(&self) -> Result<(), Error> {
        todo!()
    }

    pub fn pause(&self) -> Result<(), Error> {
        todo!()
    }

    pub fn resume(&self) -> Result<(), Error> {
        todo!()
    }

    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        todo!("{resources:?}")
    }

    /// Runs one more process. It becomes a child of the caller, which must reap it.
    pub fn exec(&self, request: ExecRequest<'_>) -> Result<StartingExec, Error> {
        todo!("{request:?}")
    }

    /// Removes cgroup and state of a stopped container and runs its `poststop` hooks. With `force` it is killed first.
    /// Idempotent: what is gone already is no error.
    pub fn delete(&self, force: bool) -> Result<(), Error> {
        todo!("{force}")
    }
}
