//! Running one more process inside a container, in the same non-blocking shape as creating one.

use crate::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A process on its way into a container. Dropped before it is finished, it is killed and reaped.
#[derive(Debug)]
pub struct StartingExec {}

#[derive(Debug)]
pub enum ExecProgress {
    Pending,
    /// The program runs.
    Running(ExecProcess),
}

/// A process that runs in a container; a child of the caller.
#[derive(Debug)]
pub struct ExecProcess {
    pub pid: u32,
    pub pidfd: OwnedFd,
    /// The terminal's master, if one was asked for.
    pub console: Option<OwnedFd>,
}

impl StartingExec {
    pub fn pid(&self) -> u32 {
        todo!()
    }

    pub fn advance(&mut self) -> Result<ExecProgress, Error> {
        todo!()
    }

    pub fn wait(self) -> Result<ExecProcess, Error> {
        todo!()
    }
}

impl AsFd for StartingExec {
    fn as_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
}
