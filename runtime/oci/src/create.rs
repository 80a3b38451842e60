//! Creating a container without ever blocking the caller: an explicit state machine that is advanced when its
//! descriptor is readable.

use crate::Error;
use crate::container::Container;
use crate::request::CreateRequest;
use std::os::fd::{AsFd, BorrowedFd};

/// Spawns the container's init in its final cgroup and returns at once.
///
/// The calling process must be single-threaded: the child runs ordinary code after a fork. Init becomes a child of the
/// caller, which must reap it (by pidfd or pid; never by waiting for "any child", which would also take hooks).
pub fn create(request: CreateRequest<'_>) -> Result<Starting, Error> {
    todo!("{request:?}")
}

/// A container being set up. Dropped before it is finished, it kills what was started and removes every trace.
#[derive(Debug)]
pub struct Starting {}

#[derive(Debug)]
pub enum Progress {
    /// Call [`Starting::advance`] again when the descriptor is readable.
    Pending,
    /// The container waits for [`Container::start`].
    Created(Box<Container>),
}

impl Starting {
    /// Init's process id, known from the beginning.
    pub fn pid(&self) -> u32 {
        todo!()
    }

    /// Does every step that can be done without waiting. After an error nothing of the container is left.
    pub fn advance(&mut self) -> Result<Progress, Error> {
        todo!()
    }

    /// Drives the set-up to its end, blocking.
    pub fn wait(self) -> Result<Container, Error> {
        todo!()
    }
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
}
