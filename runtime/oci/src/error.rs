//! The error every operation of this crate returns.

use crate::cgroup;
use crate::id::{ContainerId, InvalidId};

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
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// Set-up failed inside the container's first process; the text is its own.
    #[error("{0}")]
    Init(String),
}

impl Error {
    pub fn is_not_exist(&self) -> bool {
        matches!(self, Self::NotExist(_))
    }

    /// The container, or the process asked for, has already ended.
    pub fn is_not_running(&self) -> bool {
        matches!(self, Self::NotRunning)
    }
}
