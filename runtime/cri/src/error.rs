//! Why a CRI call fails, and the gRPC code each failure becomes: the one place where the two meet.

use crate::network::NetworkError;
use crate::record::RecordError;
use crate::sandbox::files::FilesError;
use crate::sandbox::namespaces::NamespaceError;
use crate::spec::SpecError;
use crate::streaming::StreamError;
use orlop_image::{ErrorKind, ImageError};
use orlop_keeper::client::KeeperError;
use std::io;
use std::path::PathBuf;
use tonic::{Code, Status};

#[derive(Debug, thiserror::Error)]
pub enum CriError {
    #[error("{what} {id:?} does not exist")]
    NotFound { what: &'static str, id: String },
    #[error("{field} is not valid: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("cannot {operation} {what} {id}: it is {state}")]
    WrongState { operation: &'static str, what: &'static str, id: String, state: &'static str },
    #[error("{what} name {name:?} is taken by {owner}")]
    NameTaken { what: &'static str, name: String, owner: String },
    #[error(
        "the cgroup tree at {root} lacks the controllers {missing}; enable them (systemd: Delegate=yes, \
         kernel: cgroup v2 without v1 mounts) or set ORLOP_MISSING_CONTROLLERS=warn to run without their limits"
    )]
    MissingControllers { root: PathBuf, missing: String },
    #[error("cannot {operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("command {command:?} in container {id} did not end within {seconds} s and was killed")]
    ExecTimeout { id: String, command: String, seconds: i64 },
    #[error("container {id} still runs {seconds} s after it was killed")]
    Unkillable { id: String, seconds: u64 },
    #[error("container {id} did not start: {reason}")]
    Start { id: String, reason: String },
    #[error("the call was cancelled")]
    Cancelled,
    #[error("{rpc} is not offered: {reason}")]
    Unimplemented { rpc: &'static str, reason: &'static str },
    #[error("image {0:?} is not on this node; pull it first")]
    ImageMissing(String),
    #[error("cannot pull {reference}: {source}")]
    Pull { reference: String, source: ImageError },
    #[error("RegistryUnavailable: cannot pull {reference}: {source}")]
    RegistryUnavailable { reference: String, source: ImageError },
    #[error("cannot set up the network of sandbox {sandbox}: {source}")]
    Network { sandbox: String, source: NetworkError },
    #[error("cannot release the network of sandbox {sandbox}: {source}")]
    NetworkRelease { sandbox: String, source: NetworkError },
    #[error("cannot update the limits of container {id}: {reason}")]
    Update { id: String, reason: String },
    #[error(transparent)]
    NetworkConfig(NetworkError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the work was broken off by a defect in the runtime: {0}")]
    Panicked(String),
}

impl CriError {
    pub(crate) fn container(id: &str) -> Self {
        Self::NotFound { what: "container", id: id.to_owned() }
    }

    pub(crate) fn sandbox(id: &str) -> Self {
        Self::NotFound { what: "sandbox", id: id.to_owned() }
    }

    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { operation, path: path.into(), source }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::ImageMissing(_) | Self::Keeper(KeeperError::NoSuchContainer(_)) => {
                Code::NotFound
            }
            Self::Image(error) => image_code(error),
            Self::Pull { source, .. } | Self::RegistryUnavailable { source, .. } => image_code(source),
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::WrongState { .. } => Code::FailedPrecondition,
            Self::NameTaken { .. } => Code::AlreadyExists,
            Self::ExecTimeout { .. } => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unimplemented { .. } => Code::Unimplemented,
            Self::Keeper(KeeperError::Unreachable { .. }) => Code::Unavailable,
            Self::Spec(error) if error.is_invalid_argument() => Code::InvalidArgument,
            Self::Stream(StreamError::TooManyPending) => Code::ResourceExhausted,
            _ => Code::Unknown,
        }
    }
}

fn image_code(error: &ImageError) -> Code {
    match error.kind() {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Unauthorized => Code::Unauthenticated,
        ErrorKind::RegistryUnavailable => Code::Unavailable,
        ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Configuration | ErrorKind::Storage => {
            Code::Unknown
        }
    }
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// An error with its causes, for errors that keep those apart.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
