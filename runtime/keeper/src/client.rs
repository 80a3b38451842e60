//! The agent's side of the keeper's socket.

use crate::protocol::{ContainerView, CreateContainer, Event, ExecProcess, Exit};
use std::os::fd::OwnedFd;
use std::path::Path;
use tokio::sync::broadcast;

/// Why the keeper did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KeeperError {
    #[error("cannot reach the keeper at {path}: {reason}; is orlop-keeper.service running?")]
    Unreachable { path: String, reason: String },
    #[error("container {0} does not exist")]
    NoSuchContainer(String),
    #[error("{0}")]
    Refused(String),
}

/// A connection to the keeper that is made again when it breaks. Clones share it.
#[derive(Debug, Clone)]
pub struct Keeper {}

/// The streams of a process started by [`Keeper::exec`].
#[derive(Debug)]
pub struct ExecStreams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// What a started exec hands back.
#[derive(Debug)]
pub struct ExecStarted {
    pub pid: u32,
    /// The terminal's master, when one was asked for.
    pub console: Option<OwnedFd>,
}

/// A container's live streams. Output also goes on to the log.
#[derive(Debug)]
pub struct Attached {
    /// Write end of the container's standard input (or the terminal's master), if it has one.
    pub stdin: Option<OwnedFd>,
    /// A copy of standard output from now on.
    pub stdout: OwnedFd,
    /// A copy of standard error; absent with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The terminal's master, for resizing.
    pub console: Option<OwnedFd>,
}

#[allow(clippy::todo, clippy::unused_async, unused_variables)]
impl Keeper {
    pub async fn connect(socket: &Path) -> Result<Self, KeeperError> {
        todo!()
    }
    /// Returns when init has set everything up and waits for [`Keeper::start`].
    pub async fn create(&self, request: CreateContainer) -> Result<ContainerView, KeeperError> {
        todo!()
    }
    pub async fn start(&self, id: &str) -> Result<ContainerView, KeeperError> {
        todo!()
    }
    /// Signals init, or with `all` every process of the container. Succeeds on an exited container.
    pub async fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), KeeperError> {
        todo!()
    }
    /// Kills what still runs, removes the cgroup and forgets the container. Succeeds when it does not exist.
    pub async fn delete(&self, id: &str) -> Result<(), KeeperError> {
        todo!()
    }
    pub async fn list(&self) -> Result<Vec<ContainerView>, KeeperError> {
        todo!()
    }
    pub async fn exec(&self, request: ExecProcess, streams: ExecStreams) -> Result<ExecStarted, KeeperError> {
        todo!()
    }
    /// Waits for the end of a process started by [`Keeper::exec`], and acknowledges it.
    pub async fn wait_exec(&self, container: &str, exec_id: &str) -> Result<Exit, KeeperError> {
        todo!()
    }
    /// Signals every process the exec started.
    pub async fn kill_exec(&self, container: &str, exec_id: &str, signal: i32) -> Result<(), KeeperError> {
        todo!()
    }
    pub async fn attach(&self, id: &str) -> Result<Attached, KeeperError> {
        todo!()
    }
    /// Opens the log file anew after somebody else has renamed it.
    pub async fn reopen_log(&self, id: &str) -> Result<(), KeeperError> {
        todo!()
    }
    /// The agent has the exit on its own disk: the keeper need not repeat it.
    pub async fn acknowledge(&self, id: &str) -> Result<(), KeeperError> {
        todo!()
    }
    /// Exits as they happen. After a reconnect, unacknowledged ones come again.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        todo!()
    }
}
